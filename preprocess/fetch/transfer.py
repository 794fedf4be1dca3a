"""The state of one download: its limits, the bytes received so far, and its errors."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO

from preprocess.rejection import short

_SNIFFED_BYTES = 512
_DOCUMENTS = (
    b"<", b"{", b"%PDF", b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf",
    b"Rar!", b"(\xb5/\xfd", b"\x04\x22\x4d\x18", b"\x7fELF", b"MZ", b"\xff\xfe", b"\xfe\xff", b"#EXTM3U",
    b"SQLite format 3", b"\xd0\xcf\x11\xe0", b"\xca\xfe\xba\xbe", b"\x00asm",
)  # fmt: skip
"""How HTML, XML, JSON, PDF, archives, playlists, databases, programs and UTF-16 begin, and no video or picture."""
_DOCUMENT_TYPES = re.compile(r"text/|application/(?:\w+\+)?(?:json|xml|pdf|zip|gzip|javascript|html)\b|multipart/")
_MEDIA = re.compile(
    rb".{4}(?:ftyp|moov|mdat|wide|free|skip|jP  |G)|\x1aE\xdf\xa3|RIFF|G|\x00\x00\x01[\xb0-\xbf]|OggS|FLV|0&\xb2u"
    rb"|\x06\x0e\x2b4|\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\x00|MM\x00\*|\x1f\x07\x00", re.DOTALL
)  # fmt: skip
"""How the containers of clips begin: such a body is a clip whatever its Content-Type is."""
_CONTROLS = bytes({*range(0x20), 0x7F} - {*b"\t\n\f\r"})


class FetchError(Exception):
    """One attempt failed. `again`: another attempt now may help; `retryable`: another build may."""

    def __init__(
        self, reason: str, detail: str, *, again: bool = False, retryable: bool = False,
        wait_seconds: float | None = None,
    ) -> None:  # fmt: skip
        self.reason = reason
        self.detail = detail
        self.again = again
        self.retryable = retryable or again
        self.wait_seconds = wait_seconds
        super().__init__(f"{reason}: {detail}")


class TransferStopped(Exception):
    """The build was stopped during this download; it says nothing about the clip."""


@dataclass
class Limits:
    """Bounds of one download."""

    deadline: float
    """When the download must be complete, by `time.monotonic`; waiting for a slot at a host moves it."""
    silence_seconds: float
    max_bytes: int
    min_bytes_per_second: float
    """Slowest transfer, over `silence_seconds`; 0: any."""
    stopped: Callable[[], bool]
    """Whether the build was stopped."""

    def remaining_seconds(self) -> float:
        """Seconds until the deadline. Raises FetchError when it is past, and TransferStopped."""
        if self.stopped():
            raise TransferStopped
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise FetchError("fetch-timeout", "the download took longer than fetch.deadline_seconds", retryable=True)
        return remaining

    def check_bytes(self, num_bytes: int) -> None:
        """Raises FetchError above the limit."""
        if num_bytes > self.max_bytes:
            raise FetchError(
                "fetch-too-large", f"{num_bytes:,} bytes or more, above fetch.max_mib {self.max_bytes >> 20}"
            )


class ByteCounter:
    """Bytes received over the network, added by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count further bytes."""
        with self._lock:
            self.num_bytes += num_bytes


class Partial:
    """The received part of a clip: the open file, and the validator that a resumed download must match."""

    def __init__(self, file: IO[bytes], counter: ByteCounter) -> None:
        self._file = file
        self._counter = counter
        self._start = b""
        self.num_bytes = 0
        self.validator: str | None = None
        self.total_bytes: int | None = None
        """The content's length by the first response."""
        self.content_type = ""

    @property
    def resumable(self) -> bool:
        """Whether a range can continue it: some bytes have arrived, and a validator names their content."""
        return self.num_bytes > 0 and self.validator is not None

    def restart(self) -> None:
        """Drop the received bytes."""
        # Not when empty: ext4 flushes a file that was truncated to 0 bytes when it is closed.
        if self.num_bytes:
            self._file.seek(0)
            self._file.truncate()
        self.num_bytes = 0
        self._start = b""
        self.validator = self.total_bytes = None

    def append(self, chunks: Iterable[bytes], limits: Limits) -> None:
        """Write the chunks, then check length and content. Raises FetchError and TransferStopped."""
        pace = _Pace(limits)
        for chunk in chunks:
            self._file.write(chunk)
            if len(self._start) < _SNIFFED_BYTES:
                self._start += chunk[:_SNIFFED_BYTES]
            self.num_bytes += len(chunk)
            self._counter.add(len(chunk))
            limits.check_bytes(self.num_bytes)
            limits.remaining_seconds()
            pace.check(len(chunk))
        received, total = self.num_bytes, self.total_bytes
        if total is not None and received != total:
            if received > total:
                self.restart()
            raise FetchError("fetch-truncated", f"{received:,} of {total:,} bytes arrived", again=True)
        self._check_content()

    def _check_content(self) -> None:
        """Refuse what is clearly not a clip: an error page with status 200 says nothing about the clip."""
        if self.num_bytes == 0:
            raise FetchError("fetch-empty", "a body of 0 bytes", again=True)
        if is_document(self._start[:_SNIFFED_BYTES], self.content_type):
            num_bytes, kind = self.num_bytes, short(self.content_type, 60) or "unknown type"
            self.restart()
            detail = f"{num_bytes:,} bytes of text, an archive or another document ({kind}) instead of a clip"
            raise FetchError("fetch-not-media", detail, again=True)


def is_document(start: bytes, content_type: str = "") -> bool:
    """Whether a body that begins so is an error page or any other document, and not a clip.

    The first bytes decide; the Content-Type only where they are unknown, for servers often declare clips wrongly.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    # No container's first bytes are without control characters; text of any encoding is.
    if text.startswith(_DOCUMENTS) or start[257:262] == b"ustar" or start.translate(None, _CONTROLS) == start:
        return True
    return _MEDIA.match(start) is None and _DOCUMENT_TYPES.match(content_type.strip().lower()) is not None


class _Pace:
    """Bytes over intervals of `silence_seconds`: a server that drips is as bad as a silent one."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._start = time.monotonic()
        self._num_bytes = 0

    def check(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        seconds = time.monotonic() - self._start
        if seconds < self._limits.silence_seconds:
            return
        rate = self._num_bytes / seconds
        if rate < self._limits.min_bytes_per_second:
            floor = self._limits.min_bytes_per_second / 1024
            detail = f"{rate / 1024:.1f} KiB/s over {seconds:.1f} s, below fetch.min_kib_per_second {floor:g}"
            raise FetchError("fetch-too-slow", detail, again=True)
        self._start, self._num_bytes = time.monotonic(), 0
