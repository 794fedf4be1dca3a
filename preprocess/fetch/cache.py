"""A bounded folder of downloaded clips, shared by runs and processes; the least recently used are evicted first.

    <sha256 of a clip's name>.clip    an entry: complete and synced before it gets this name
    total                             bytes of all entries, or more: written before an entry is added
    lock                              held while entries are added or removed
    tmp-…                             a copy in progress, locked by its process; a dead process's is removed

A clip is handed out as a hard link to its entry, so that eviction disturbs no reader. An entry in use has a second
link: evicting it would free nothing, so it is skipped. Where links are not possible a clip is copied in and out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.console import LOG
from shards.errors import DISK_FULL, UserError

KEPT_SHARE = 0.95
"""Eviction frees space down to this share of the bound, so that the folder is not listed for every clip."""


class ClipCache:
    """Clips by the digest of `url.cache_name`, which is itself never written; used by many threads at once."""

    def __init__(self, folder: Path, max_gib: float) -> None:
        self._folder = folder
        self._max_bytes = int(max_gib * 2**30)
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._sweep()
                # The bound may be smaller than the last run's.
                self._make_room(0)
        except OSError as error:
            problem = f"fetch.cache: {str(folder)!r}: {error.strerror}"
            raise UserError(problem, expected="a folder that can be written") from None

    def take(self, name: str, target: Path) -> bool:
        """Link or copy the clip called `name` to `target`; False when it is not in the cache."""
        entry = self._entry(name)
        try:
            _link_or_copy(entry, target)
        except FileNotFoundError:
            return False
        with contextlib.suppress(FileNotFoundError, PermissionError):  # evicted meanwhile; another user's
            os.utime(entry)
        return True

    def keep(self, name: str, path: Path) -> None:
        """Keep `path` as `name`, by a link where the file system allows it; the least recently used are evicted.

        A clip above the bound is not kept, nor any clip when all entries are in use or the disk is full.
        """
        entry, num_bytes = self._entry(name), path.stat().st_size
        if num_bytes > self._max_bytes:
            self._warn(f"a clip of {num_bytes:,} bytes is above fetch.cache_gib and not kept")
            return
        try:
            _sync(path)
            if not self._keep_link(path, entry, num_bytes):
                self._keep_copy(path, entry, num_bytes)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._warn(f"no space left in {self._folder}: clips are not kept")

    def drop(self, name: str) -> None:
        """Remove the entry called `name`; one that is not there is no error."""
        self._entry(name).unlink(missing_ok=True)

    def _keep_link(self, path: Path, entry: Path, num_bytes: int) -> bool:
        """True when the entry is there, or there is no room for it; False where links are not possible."""
        with self._locked():
            if entry.exists() or not self._make_room(num_bytes):
                return True
            try:
                entry.hardlink_to(path)
            except OSError:  # another file system, or one without links
                return False
            os.utime(entry)
            return True

    def _keep_copy(self, path: Path, entry: Path, num_bytes: int) -> None:
        with self._locked():  # `_sweep` must not find the file before it is locked
            number, name = tempfile.mkstemp(prefix="tmp-", dir=self._folder)
            fcntl.flock(number, fcntl.LOCK_EX)
        try:
            with open(number, "wb") as copy, path.open("rb") as original:  # noqa: PTH123 - a descriptor
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
                with self._locked():
                    # `_keep_link` counted its bytes; other processes may have added entries since.
                    if not entry.exists() and self._make_room(num_bytes):
                        Path(name).replace(entry)
        finally:
            Path(name).unlink(missing_ok=True)

    def _entry(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.clip"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread of one process at a time. The system frees a dead process's lock."""
        with self._lock, (self._folder / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, num_bytes: int) -> bool:
        """Evict until `num_bytes` more fit, and count them; False when what is in use leaves no room.

        The count is raised before the entry is added: a process that dies in between leaves it too high, never too
        low, and the next eviction counts again.
        """
        total = self._read_total()
        if total is None or total + num_bytes > self._max_bytes:
            total = self._evict(num_bytes)
        fits = total + num_bytes <= self._max_bytes
        self._write_total(total + num_bytes if fits else total)
        return fits

    def _read_total(self) -> int | None:
        try:
            text = (self._folder / "total").read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return None
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None

    def _write_total(self, total: int) -> None:
        (self._folder / "total").write_text(str(total), encoding="ascii")

    def _evict(self, num_bytes: int) -> int:
        """Remove the least recently used entries that nobody uses, unless all fit; return the bytes left."""
        found = []
        total = 0
        for path in self._folder.glob("*.clip"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                total += status.st_size
                if status.st_nlink == 1:
                    found.append((status.st_mtime_ns, path, status.st_size))
        if total + num_bytes <= self._max_bytes:
            return total
        aim = max(0, int(self._max_bytes * KEPT_SHARE) - num_bytes)
        for _, path, size in sorted(found):
            if total <= aim:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _sweep(self) -> None:
        """Remove copies that dead processes left."""
        for path in self._folder.glob("tmp-*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _warn(self, what: str) -> None:
        """Warn, once a run for each kind."""
        kind = what.split(maxsplit=1)[0]
        if kind not in self._warned:
            self._warned.add(kind)
            LOG.warning("fetch.cache: %s", what)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _link_or_copy(source: Path, target: Path) -> None:
    """Raises FileNotFoundError where there is no source; nothing is left at the target then."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
