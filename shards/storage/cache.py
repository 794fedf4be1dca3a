"""A bounded cache of an S3 root's shards on local disk: a tar is downloaded at its first read, then `pread`.

Several processes may share a folder. A downloaded tar is checked against the digest in its name before it is used; when
the bound is reached, the least recently used shards are removed. A shard larger than the bound is read by ranged GETs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.errors import ShardDamage
from shards.storage.base import Storage
from shards.storage.local import lock_file

_CHUNK = 8 * 2**20


class CachedStorage:
    """`source` with its tars read through `folder`, which is kept to `max_bytes`; all else goes to the source."""

    def __init__(self, source: Storage, folder: Path, max_bytes: int) -> None:
        self._source, self._max_bytes = source, max_bytes
        # Tars of several roots may have one name: each root has its own folder, under one bound.
        self._all = Path(folder).absolute()
        self._folder = self._all / hashlib.sha256(source.address().encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled there is no source yet
            raise AttributeError(name)
        return getattr(self._source, name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """See Storage."""
        if not name.endswith(".tar"):
            return self._source.read_into(name, offset, buffer)
        local = name.replace("/", "-")
        for _ in range(2):
            if not (self._folder / local).exists() and not self._fetch(name, local):
                break
            with suppress(FileNotFoundError):  # evicted by another process between the two lines
                got = _read(self._folder / local, offset, buffer)
                os.utime(self._folder / local)  # the eviction reads this as its last use
                return got
        return self._source.read_into(name, offset, buffer)

    def forget(self, name: str) -> None:
        """Drop the copy of a tar that was found damaged."""
        (self._folder / name.replace("/", "-")).unlink(missing_ok=True)

    def _fetch(self, name: str, local: str) -> bool:
        """Download a tar into the folder; False when that cannot be: it is larger than the bound, or nothing locks."""
        with self._locked(f"{local}.lock") as locked:
            if not locked:  # a shared folder is not safe without locks
                return False
            if (self._folder / local).exists():
                return True
            size = self._source.size(name)
            if size > self._max_bytes:
                return False
            temporary = self._folder / f"{local}.part"  # a fixed name: what a killed process left is overwritten
            try:
                self._download(name, size, temporary)
                with self._locked("eviction.lock", self._all):
                    self._evict(size)
                    temporary.replace(self._folder / local)
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def _download(self, name: str, size: int, target: Path) -> None:
        digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, size))), 0
        with target.open("wb") as file:
            while offset < size:
                got = self._source.read_into(name, offset, buffer[: min(_CHUNK, size - offset)])
                if not got:
                    raise ShardDamage(self._source.url(name), f"truncated: {size} bytes announced", offset=offset)
                file.write(buffer[:got])
                digest.update(buffer[:got])
                offset += got
        if digest.hexdigest()[:8] != name[-12:-4]:
            raise ShardDamage(self._source.url(name), f"sha256 {digest.hexdigest()}, which is not the one in its name")

    def _evict(self, incoming: int) -> None:
        """Remove the least recently used tars until `incoming` more bytes fit."""
        found = []
        for path in self._all.glob("*/*.tar"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        total = incoming + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _locked(self, name: str, folder: Path | None = None) -> Iterator[bool]:
        path = (folder or self._folder) / name
        with path.open("wb") as file:
            yield lock_file(file.fileno(), path) is True


def _read(path: Path, offset: int, buffer: memoryview) -> int:
    # Opened for each read: a descriptor kept would keep an evicted shard on the disk.
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(buffer) and (got := file.readinto(buffer[done:])):
            done += got
    return done
