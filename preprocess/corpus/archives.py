"""One file that holds many annotations: `.jsonl`, `.jsonl.zst`, `.zip`, `.tar`, streamed.

A damaged document becomes a ledger row. A damaged file (cut short, not what its name says) is a UserError: a plan
never changes, so it is not made from a part of the corpus. A member is read up to the limit of a document whatever
size it claims, so that a decompression bomb costs no memory. A member's name is never used as a path.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Self

from preprocess.corpus.records import MAX_DOCUMENT_BYTES, too_large
from preprocess.rejection import Rejection, short
from shards.errors import UserError

ARCHIVE_SUFFIXES = (".jsonl", ".jsonl.zst", ".zip", ".tar", ".tar.gz", ".tgz")

MAX_WINDOW_BYTES = 2**27
"""Memory that a zstd frame may ask for."""
MAX_TAR_HEADER_BYTES = 2**20
"""Most bytes of a long name or of extended attributes in a tar."""
_LONG_HEADERS = {
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
}  # fmt: skip
_BLOCK_BYTES = 2**16
_ZSTD_INPUT_BYTES = 2**10


class Document(NamedTuple):
    """One annotation as the corpus holds it."""

    source: str
    """Where: a path relative to the corpus, a member's name, `file.jsonl:LINE`."""
    data: bytes
    rejection: Rejection | None = None
    """Why it could not be read; then `data` is empty."""
    fields: dict[str, Any] | None = None
    """A record's fields, as `records.read_fields` gives them, where the layout is not the JSON one; `data` is empty."""


def iter_archive(location: str) -> Iterator[Document]:
    """The documents of an archive, in its order. Raises UserError where the archive is missing or damaged."""
    path = Path(location)
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            if name.endswith(".zip"):
                yield from _iter_zip(file)
            elif name.endswith((".tar", ".tar.gz", ".tgz")):
                yield from _iter_tar(file)
            elif name.endswith(".zst"):
                yield from _iter_zst_lines(file, path.name)
            else:
                yield from _iter_lines(file, path.name)
    except FileNotFoundError:
        raise UserError(f"corpus.location: {location}: no such file") from None
    # RecursionError: tarfile reads a header before a header before a header … in a call each.
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, RecursionError) as error:
        raise _damaged(location, error) from None


def _damaged(location: str, error: Exception) -> UserError:
    return UserError(
        f"corpus.location: {location}: damaged: {short(str(error), 200)}",
        expected="a complete archive: a plan never changes, so it is not made from a part of the corpus",
        fix="copy the file again, and compare its size and digest with the original's",
    )


def _iter_zst_lines(file: IO[bytes], name: str) -> Iterator[Document]:
    import zstandard

    try:
        yield from _iter_lines(io.BufferedReader(_ZstdFile(file), _BLOCK_BYTES), name)
    except zstandard.ZstdError as error:
        raise _damaged(name, error) from None


class _ZstdFile(io.RawIOBase):
    """Consecutive zstd frames as a raw file; EOFError where the file ends within a frame.

    The library's own stream reader reports nothing there.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame = self._decompressor.decompressobj()
        self._is_within_frame = False
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        """A file to read from."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` with decompressed bytes; 0 at the end."""
        while not self._plain:
            # 1 KiB of input gives at most tens of megabytes at zstd's highest ratio.
            self._packed = self._packed or self._file.read(_ZSTD_INPUT_BYTES)
            if not self._packed:
                if self._is_within_frame:
                    raise EOFError("cut short within a zstd frame")
                return 0
            self._decompress()
        num_bytes = min(len(buffer), len(self._plain))
        buffer[:num_bytes] = self._plain[:num_bytes]
        self._plain = self._plain[num_bytes:]
        return num_bytes

    def _decompress(self) -> None:
        self._plain = memoryview(self._frame.decompress(self._packed))
        self._is_within_frame = not self._frame.eof
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()


def _iter_lines(file: IO[bytes], name: str) -> Iterator[Document]:
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        source = f"{name}:{number}"
        if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            num_bytes = len(line)
            while not line.endswith(b"\n") and (line := file.readline(_BLOCK_BYTES)):
                num_bytes += len(line)
            yield Document(source, b"", too_large(num_bytes))
        elif line.strip():
            yield Document(source, line)


def _iter_zip(file: IO[bytes]) -> Iterator[Document]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not _is_annotation(info.filename) or info.is_dir():
                continue
            yield _zip_document(archive, info)


def _zip_document(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Document:
    refusal = _refuse_member(info.filename, info.file_size)
    if refusal is not None:
        return refusal
    try:
        with archive.open(info) as member:
            data = member.read(MAX_DOCUMENT_BYTES + 1)
    # Encrypted (RuntimeError), an unknown method (NotImplementedError), damaged: each concerns this member alone.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        return Document(info.filename, b"", Rejection("read", "unreadable", short(str(error))))
    return Document(info.filename, data) if len(data) <= MAX_DOCUMENT_BYTES else _too_large(info.filename, len(data))


def _iter_tar(file: IO[bytes]) -> Iterator[Document]:
    # "r|*" streams and finds the compression.
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_TarInfo) as archive:
        for member in archive:
            # tarfile keeps every member and every global header in memory otherwise.
            archive.members, archive.pax_headers = [], {}  # type: ignore[attr-defined]
            if _is_annotation(member.name) and not member.isdir():
                yield _tar_document(archive, member)
            _skip_rest(archive, member)
        if not getattr(archive, "saw_end", False):
            raise EOFError("cut short: the end mark is missing")


def _skip_rest(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Go to the end of a member: tarfile would read on behind the archive's end, once for each 10 KiB declared."""
    stream: Any = archive.fileobj
    while (left := archive.offset - 1 - stream.tell()) > 0:
        if not stream.read(min(left, _BLOCK_BYTES)):
            raise EOFError(f"cut short within {short(member.name, 80)}")


class _TarInfo(tarfile.TarInfo):
    """Records on its archive that the end mark was read: tarfile reports nothing where a header is cut off."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See tarfile, which reads a header of any length that comes before a member's own into memory."""
        info = super().frombuf(buf, encoding, errors)
        if info.type in _LONG_HEADERS and info.size > MAX_TAR_HEADER_BYTES:
            raise _too_long(f"a header of {info.size:,} bytes")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise _too_long("a sparse member, whose header has no bound")
        return info

    def _proc_gnusparse_10(self, *arguments: object) -> None:
        raise _too_long("a sparse member, whose header has no bound")

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """See tarfile."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.saw_end = True  # type: ignore[attr-defined]
            raise


def _too_long(what: str) -> UserError:
    return UserError(
        f"corpus.location: a tar archive with {what}",
        expected=f"headers of at most {MAX_TAR_HEADER_BYTES:,} bytes and no sparse members",
        fix="pack the annotations again: tar --format=ustar -czf NEW.tar.gz FOLDER",
    )


def _tar_document(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Document:
    if not member.isreg():
        return Document(short(member.name), b"", Rejection("read", "symlink", "a link or a special file"))
    refusal = _refuse_member(member.name, member.size)
    if refusal is not None:
        return refusal
    content = archive.extractfile(member)
    data = content.read() if content is not None else b""
    if len(data) != member.size:
        raise EOFError(f"cut short within {short(member.name, 80)}")
    return Document(member.name, data)


def _is_annotation(name: str) -> bool:
    return name.lower().endswith(".json") and not name.startswith("__MACOSX/")


def _refuse_member(name: str, num_bytes: int) -> Document | None:
    """A row for a member whose name leads out of the archive, or that is too large; None for a good one."""
    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts or not _is_plain(name):
        return Document(
            short(name), b"", Rejection("read", "bad-file-name", "leads out of the archive, or is not UTF-8")
        )
    return _too_large(name, num_bytes) if num_bytes > MAX_DOCUMENT_BYTES else None


def _is_plain(name: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF or character == "\0" for character in name)


def _too_large(name: str, num_bytes: int) -> Document:
    return Document(name, b"", too_large(num_bytes))
