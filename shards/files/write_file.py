"""How single files are written: complete or not there, and one clear error for what the disk refuses.

    temporary name beside the target → bytes, hashed as they go → fsync → rename → fsync of the folder

The mode is what the umask leaves. On an error the temporary file is removed; a kill leaves one, and the next write to
the same name replaces it. Errors of the operating system become a SystemFailure that names the target.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from stat import S_ISFIFO, S_ISREG

from shards.errors import SystemFailure

TEMPORARY = ".writing-"
"""Start of the name of a file or folder that is being written."""
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What fsync of a folder answers on file systems that have none (some network and FUSE ones)."""


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a SystemFailure about `path`."""
    try:
        yield
    except OSError as error:
        raise SystemFailure(OSError(error.errno, error.strerror or str(error), str(path))) from error


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading. Anything else is an OSError: opening a FIFO would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def no_pipe(path: str, flags: int) -> int:
    """An `opener` of `open` for a file that is written. A FIFO is an OSError: opening it would wait for a reader."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # of a FIFO without a reader, and of a socket
            raise OSError(errno.EINVAL, "not a regular file", path) from None
        raise
    if S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write `parts` one after the other; return the sha256 of the file, in hex. Raises SystemFailure."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    digest = hashlib.sha256()
    with named_errors(path):
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    digest.update(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write UTF-8; return its sha256."""
    return write_file(path, [text.encode()])


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
