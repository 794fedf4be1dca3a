"""A bounded cache of an S3 root's shards on local disk: a tar is fetched whole at its first read, then `pread`.

Several processes may share a folder. A fetched tar is checked against the digest in its name before it is used; when
the bound is reached, the shards unused for longest go. A shard larger than the bound is read by ranged GETs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.errors import ShardDamage
from shards.storage.base import Entry, Storage

_CHUNK = 8 * 2**20


class CachedStorage:
    """`source` with its tars read through `folder`, which is kept to `max_bytes`.

    All else (commits, lists, writes) goes to the source.
    """

    def __init__(self, source: Storage, folder: Path, max_bytes: int) -> None:
        self._source, self._max_bytes = source, max_bytes
        # Tars of several roots may have one name: each root has its own folder, under one bound.
        self._all = Path(folder).absolute()
        self._folder = self._all / hashlib.sha256(source.address().encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)

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
                os.utime(self._folder / local)  # its last use, for the eviction
                return got
        return self._source.read_into(name, offset, buffer)

    def forget(self, name: str) -> None:
        """Drop the copy of a tar, which was found damaged."""
        (self._folder / name.replace("/", "-")).unlink(missing_ok=True)

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """See Storage."""
        return self._source.get_range(name, offset, length)

    def put(self, name: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """See Storage."""
        return self._source.put(name, data, if_absent=if_absent)

    def get(self, name: str, max_bytes: int = 2**30) -> bytes:
        """See Storage."""
        return self._source.get(name, max_bytes)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See Storage."""
        return self._source.list(prefix)

    def exists(self, name: str) -> bool:
        """See Storage."""
        return self._source.exists(name)

    def size(self, name: str) -> int:
        """See Storage."""
        return self._source.size(name)

    def modified(self, name: str) -> float:
        """See Storage."""
        return self._source.modified(name)

    def delete(self, name: str) -> None:
        """See Storage."""
        self._source.delete(name)

    def url(self, name: str = "") -> str:
        """See Storage."""
        return self._source.url(name)

    def address(self) -> str:
        """See Storage."""
        return self._source.address()

    def _fetch(self, name: str, local: str) -> bool:
        """Fetch a tar into the folder; False when it is larger than the bound."""
        with self._locked(f"{local}.lock"):
            if (self._folder / local).exists():
                return True
            size = self._source.size(name)
            if size > self._max_bytes:
                return False
            temporary = self._folder / f"{local}.part"  # one name: what a killed process left is written over
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
                    raise ShardDamage(self.url(name), f"cut short: {size} bytes announced", offset=offset)
                file.write(buffer[:got])
                digest.update(buffer[:got])
                offset += got
        if digest.hexdigest()[:8] != name[-12:-4]:
            raise ShardDamage(self.url(name), f"sha256 {digest.hexdigest()}, which is not the one in its name")

    def _evict(self, incoming: int) -> None:
        """Remove the tars unused for longest until `incoming` more bytes fit."""
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
    def _locked(self, name: str, folder: Path | None = None) -> Iterator[None]:
        with ((folder or self._folder) / name).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read(path: Path, offset: int, buffer: memoryview) -> int:
    # Opened for each read: a descriptor kept would keep an evicted shard on the disk.
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(buffer) and (got := file.readinto(buffer[done:])):
            done += got
    return done
