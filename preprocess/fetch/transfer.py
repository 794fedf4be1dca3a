"""One download as it stands: its limits, what has arrived, and what goes wrong with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import IO

_SNIFFED_BYTES = 512
_DOCUMENTS = (b"<", b"{")
"""How HTML, XML and JSON begin, and no video or picture."""


class Trouble(Exception):
    """One attempt failed. `again`: another attempt now may help; `retryable`: another build may."""

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        again: bool = False,
        retryable: bool = False,
        wait_seconds: float | None = None,
    ) -> None:
        self.reason = reason
        self.detail = detail
        self.again = again
        self.retryable = retryable or again
        self.wait_seconds = wait_seconds
        super().__init__(f"{reason}: {detail}")


class TransferStopped(Exception):
    """The build was asked to stop while this clip was under way; says nothing about the clip."""


class Limits:
    """Bounds of one download.

    Args:
        deadline_seconds: longest whole download, from now on; waiting for a turn at a host does not count.
        silence_seconds: longest silence.
        max_bytes: most bytes.
        min_bytes_per_second: slowest transfer, over `silence_seconds`; 0: any.
        stopped: whether the build is to end.
    """

    def __init__(
        self,
        deadline_seconds: float,
        silence_seconds: float,
        max_bytes: int,
        min_bytes_per_second: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.deadline = time.monotonic() + deadline_seconds
        self.silence_seconds = silence_seconds
        self.max_bytes = max_bytes
        self.min_bytes_per_second = min_bytes_per_second
        self.stopped = stopped

    def remaining_seconds(self) -> float:
        """Seconds until the deadline. Raises Trouble when it is past, and Stopped."""
        if self.stopped():
            raise TransferStopped
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise Trouble("fetch-timeout", "the whole download took longer than fetch.deadline_seconds", retryable=True)
        return remaining

    def check_bytes(self, num_bytes: int) -> None:
        """Raises Trouble above the limit."""
        if num_bytes > self.max_bytes:
            raise Trouble("fetch-too-large", f"{num_bytes:,} bytes or more, above fetch.max_mib {self.max_bytes >> 20}")


class ByteCounter:
    """Bytes that have come over the network, counted by many threads, read by whoever shows them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count further bytes."""
        with self._lock:
            self.num_bytes += num_bytes


class Partial:
    """What has arrived of a clip: the open file, and what proves that the rest belongs to the same content."""

    def __init__(self, file: IO[bytes], meter: ByteCounter) -> None:
        self._file = file
        self._meter = meter
        self._start = b""
        self.num_bytes = 0
        self.validator: str | None = None
        self.total_bytes: int | None = None
        """The content's length as the first answer told it."""

    @property
    def resumable(self) -> bool:
        """Whether a rest may be asked for: something is there, and what it belongs to can be named."""
        return self.num_bytes > 0 and self.validator is not None

    def restart(self) -> None:
        """Forget what has arrived."""
        # Only where there is something: ext4 writes a file that was ever cut to 0 bytes to disk as it is closed.
        if self.num_bytes:
            self._file.seek(0)
            self._file.truncate()
        self.num_bytes = 0
        self._start = b""
        self.validator = self.total_bytes = None

    def append(self, chunks: Iterable[bytes], limits: Limits) -> None:
        """Write what arrives, and judge the whole. Raises Trouble on the limits and on an early end, and Stopped."""
        pace = _Pace(limits)
        for chunk in chunks:
            self._file.write(chunk)
            if len(self._start) < _SNIFFED_BYTES:
                self._start += chunk[:_SNIFFED_BYTES]
            self.num_bytes += len(chunk)
            self._meter.add(len(chunk))
            limits.check_bytes(self.num_bytes)
            limits.remaining_seconds()
            pace.check(len(chunk))
        received, total = self.num_bytes, self.total_bytes
        if total is not None and received != total:
            if received > total:
                self.restart()
            raise Trouble("fetch-truncated", f"{received:,} of {total:,} bytes arrived", again=True)
        self._check_content()

    def _check_content(self) -> None:
        """Refuse what is no clip at a glance: an error page with status 200 says nothing of the clip."""
        if self.num_bytes == 0:
            raise Trouble("fetch-empty", "a body of 0 bytes", again=True)
        start = self._start[:_SNIFFED_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(_DOCUMENTS):
            num_bytes = self.num_bytes
            self.restart()
            raise Trouble("fetch-not-media", f"{num_bytes:,} bytes of HTML, XML or JSON instead of a clip", again=True)


class _Pace:
    """Bytes over stretches of `silence_seconds`: a server that drips is as bad as a silent one."""

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
            raise Trouble("fetch-too-slow", detail, again=True)
        self._start, self._num_bytes = time.monotonic(), 0
