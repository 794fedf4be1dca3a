"""A bounded folder of downloaded clips, shared by runs and by machines' processes; the least recently used go first."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

from shards.errors import UserError


class ClipCache:
    """Clips by the digest of `fetch_source.cache_name`, which is itself never written.

    A clip in use is linked, so that evicting it harms nobody.
    """

    def __init__(self, folder: Path, max_gib: float) -> None:
        self._folder = folder
        self._max_bytes = int(max_gib * 2**30)
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"fetch.cache: {str(folder)!r}: {error.strerror}"
            raise UserError(problem, expected="a folder that can be written") from None

    def take(self, name: str, target: Path) -> bool:
        """Put the clip called `name` at `target`; False when it is not there."""
        entry = self._entry(name)
        try:
            os.utime(entry)
            _link(entry, target)
        except FileNotFoundError:
            return False
        return True

    def keep(self, name: str, path: Path) -> None:
        """Keep a copy (a link where the file system can) of `path` as `name`; then evict down to the bound."""
        entry = self._entry(name)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=self._folder) as folder:
            copy = Path(folder) / "clip"
            _link(path, copy)
            os.utime(copy)
            copy.replace(entry)
        with self._lock:
            self._evict()

    def _entry(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.clip"

    def _evict(self) -> None:
        found = []
        for path in self._folder.glob("*.clip"):
            try:
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process was first
                continue
        excess = sum(size for _, size, _ in found) - self._max_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _link(source: Path, target: Path) -> None:
    try:
        target.unlink(missing_ok=True)
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
