"""A folder as a storage. A name is a relative path with "/" between its parts; `put` is atomic."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG

from shards.console import LOG
from shards.errors import MissingObject, ShardDamage, UserError
from shards.storage.base import MAX_OBJECT_BYTES, Entry

# Temporary names carry the machine and the process that made them, so that only those of dead processes are removed.

TEMPORARY = ".tmp-"
"""Prefix of the base name of an unfinished file or of a scratch folder; no listing shows them."""


_NAMED = re.compile(rf"{re.escape(TEMPORARY)}[a-z]+-([0-9a-f]{{8}})-([0-9]{{1,10}})-[0-9a-f]{{16}}")


def temporary_name(kind: str = "put") -> str:
    """A new temporary name of this process."""
    return f"{TEMPORARY}{kind}-{_here()}-{os.getpid()}-{secrets.token_hex(8)}"


def is_dead(name: str) -> bool:
    """Whether a process of this machine made that name and has ended. False where that cannot be known."""
    named = _NAMED.fullmatch(name)
    if named is None or named[1] != _here():
        return False
    try:
        os.kill(int(named[2]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False


def _here() -> str:
    """The scope in which a process id is unique: this machine and this PID namespace."""
    place = socket.gethostname()
    with contextlib.suppress(OSError):
        place += f" {Path('/proc/self/ns/pid').readlink()}"
    return hashlib.sha256(place.encode()).hexdigest()[:8]


_MAX_OPEN_FILES = 64
_NOT_A_FILE = "not a regular file"
_NOT_SUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_CHUNK = 2**20


class LocalStorage:
    """A folder. Reads are `pread` over a bounded set of open files, opened again in each process."""

    def __init__(self, root: Path) -> None:
        self._root = Path(root).absolute()
        self._forget_all()

    def __getstate__(self) -> dict[str, object]:
        return {"root": self._root}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]

    def put(self, name: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """Temporary file, fsync, rename (or link, which fails when the name is taken), fsync of the folder."""
        target = self._path(name)
        if isinstance(data, Path):
            data.stat()  # when the disk was unmounted, fail here: do not create its folder again on the disk below
        self._make_folder(target.parent)
        temporary = target.with_name(temporary_name())
        try:
            with _naming(temporary):
                _write(temporary, data)
            if not if_absent:
                temporary.replace(target)
            elif not _link_new(temporary, target):
                return False
            sync_path(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
        self._forget(name)
        return True

    def get(self, name: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
        """See Storage."""
        data = self.get_range(name, 0, max_bytes + 1)
        if len(data) > max_bytes:
            raise ShardDamage(name, f"larger than {max_bytes:,} bytes")
        return data

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """See Storage."""
        file, parts = self._open(name), []
        with _naming(self._root / name):
            length = min(length, max(0, os.fstat(file.descriptor).st_size - offset))
            while length > 0 and (part := os.pread(file.descriptor, length, offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """See Storage."""
        file, done = self._open(name), 0
        with _naming(self._root / name):
            while done < len(buffer) and (got := os.preadv(file.descriptor, [buffer[done:]], offset + done)):
                done += got
        return done

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See Storage. Temporary files, and all that are not regular files, are not shown; of the latter it warns."""
        folder = prefix.rpartition("/")[0]
        entries = [entry for entry in self._walk(folder) if entry.name.startswith(prefix)]
        return iter(sorted(entries))

    def exists(self, name: str) -> bool:
        """See Storage."""
        return self._path(name).is_file()

    def size(self, name: str) -> int:
        """See Storage."""
        return self._stat(name).st_size

    def modified(self, name: str) -> float:
        """See Storage."""
        return self._stat(name).st_mtime

    def delete(self, name: str) -> None:
        """See Storage."""
        self._path(name).unlink(missing_ok=True)
        self._forget(name)

    def url(self, name: str = "") -> str:
        """See Storage."""
        return str(self._root / name)

    def address(self) -> str:
        """See Storage."""
        return self.url()

    def temporaries(self) -> Iterator[Path]:
        """Files that a killed `put` left, and scratch folders of builds, for `sweep`."""
        for place, folders, files in os.walk(self._root):
            yield from (Path(place, name) for name in sorted((*folders, *files)) if name.startswith(TEMPORARY))
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]

    def drop_dead_temporaries(self) -> None:
        """Remove what `put`s of dead processes of this machine left; those of other machines stay."""
        for path in list(self.temporaries()):
            if is_dead(path.name):
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise UserError(f"object name {name!r}", expected="a relative path that stays under the root")
        return self._root.joinpath(*parts)

    def _stat(self, name: str) -> os.stat_result:
        try:
            found = self._path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObject(self.url(name)) from None
        if not S_ISREG(found.st_mode):
            raise ShardDamage(self.url(name), _NOT_A_FILE)
        return found

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_path(folder.parent)

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Entry]:
        """The regular files below a folder; `above` identifies the folders that lead to it, against loops of links."""
        try:
            found = list(os.scandir(self._root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for item in found:
            name = f"{folder}/{item.name}" if folder else item.name
            if item.name.startswith(TEMPORARY):
                continue
            try:
                stat = item.stat()
            except OSError as error:
                if item.is_symlink():
                    LOG.warning("%s: skipped: a link that leads nowhere: %s", item.path, error.strerror)
                elif not isinstance(error, FileNotFoundError):  # else it was removed meanwhile
                    raise
                continue
            place = (stat.st_dev, stat.st_ino)
            if S_ISREG(stat.st_mode):
                yield Entry(name, stat.st_size)
            elif not S_ISDIR(stat.st_mode):
                LOG.warning("%s: skipped: %s", item.path, _NOT_A_FILE)
            elif place in above:
                LOG.warning("%s: skipped: a link to a folder above it", item.path)
            else:
                yield from self._walk(name, (*above, place))

    def _open(self, name: str) -> _OpenFile:
        if not name.endswith(".tar"):
            return _OpenFile(self._path(name))  # only a tar never changes under its name: nothing else is kept open
        if self._pid != os.getpid():
            self._forget_all()  # another thread may have held the lock when this process was forked
        with self._lock:
            file = self._files.pop(name, None) or _OpenFile(self._path(name))
            self._files[name] = file
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def _forget(self, name: str) -> None:
        if self._pid == os.getpid():
            with self._lock:
                self._files.pop(name, None)

    def _forget_all(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._pid = os.getpid()


class _OpenFile:
    """A descriptor closed with its last reference, so that a reader in another thread never loses it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            # Without O_NONBLOCK the open of a FIFO waits for a writer.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObject(str(path)) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # ENXIO: a socket
                raise ShardDamage(str(path), f"{_NOT_A_FILE}: {error.strerror}") from None
            raise
        if not S_ISREG(os.fstat(self.descriptor).st_mode):
            raise ShardDamage(str(path), _NOT_A_FILE)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _write(path: Path, data: bytes | Path) -> None:
    if isinstance(data, Path):
        try:
            os.link(data, path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(data, path)
    else:
        path.write_bytes(data)
    sync_path(path)


def _link_new(temporary: Path, target: Path) -> bool:
    """Give a file its name, unless that is taken: then False."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        warn_once(f"{target.parent}: this file system has no hard links; a second writer of the same unit would win")
        if target.exists():
            return False
        temporary.replace(target)
    return True


def lock_file(descriptor: int, path: Path, *, wait: bool = True) -> bool | None:
    """Take an exclusive flock: True; False when another process holds it; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        warn_once(f"{path.parent}: this file system has no locks ({error.strerror}); Lustre: mount it with -o flock")
        return None
    return True


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the first time."""
    LOG.warning("%s", message)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path into errors of system calls on descriptors, which carry none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_path(path: Path) -> None:
    """fsync a file, or a folder (its names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
