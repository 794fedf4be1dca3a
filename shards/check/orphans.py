"""Orphans: objects that no commit names, left by killed or slower writers. `sweep` removes them."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from shards.errors import FutureFormat, MissingObject, ShardDamage
from shards.format.commit import read_commit
from shards.format.dataset_info import read_info
from shards.format.names import LATENTS, parse_name, text_kind
from shards.read.index import list_root, text_sets
from shards.storage.base import Storage
from shards.storage.local import TEMPORARY, LocalStorage, lock_file
from shards.storage.s3 import S3Storage


class Orphan(NamedTuple):
    """An object that no commit names."""

    name: str
    size: int


def find_orphans(storage: Storage, older_than_seconds: float) -> Iterator[Orphan]:
    """Tars and ledgers that no commit names, last written more than `older_than_seconds` ago.

    A writer puts its tar before its commit: the age must exceed the time a put takes, or a running build loses its
    unit (and makes it again). A unit whose commit is damaged keeps all its objects. Raises UserError without a dataset.
    """
    info = read_info(storage)
    kinds = [LATENTS, *(text_kind(name) for name in sorted({*info.text_sets, *text_sets(storage)}))]
    listing = list_root(storage, kinds)
    named: set[str] = set()
    damaged: set[tuple[str, int]] = set()
    for kind, unit in listing.commits:
        try:
            commit = read_commit(storage, kind, unit).commit
        except (ShardDamage, FutureFormat):
            damaged.add((kind, unit))
            continue
        named.update(blob.name for blob in (commit.tar, commit.ledger) if blob)
    newest = time.time() - older_than_seconds
    for name, size in sorted(listing.objects.items()):
        what = parse_name(name)
        if what is None or name in named or (what.kind, what.unit) in damaged:
            continue
        try:
            if storage.modified(name) <= newest:
                yield Orphan(name, size)
        except MissingObject:  # removed meanwhile
            continue


def sweep(storage: Storage, older_than_seconds: float, *, delete: bool) -> list[Orphan]:
    """The orphans under a root, with temporary files and unfinished uploads; removed when `delete`."""
    found = list(find_orphans(storage, older_than_seconds))
    if delete:
        for orphan in found:
            storage.delete(orphan.name)
    newest = time.time() - older_than_seconds
    if isinstance(storage, LocalStorage):
        found += _sweep_temporaries(storage, newest, delete)
    elif isinstance(storage, S3Storage):
        found += _sweep_bucket(storage, newest, delete)
    return found


def sweep_committed(storage: LocalStorage) -> list[Orphan]:
    """Remove, at any age, the objects of committed units that their commits do not name; a damaged unit keeps all.

    A commit in a folder is never replaced, so other objects of its unit are never used again. In a bucket it may be
    replaced, by a server that ignores `If-None-Match`: there only the age decides, in `sweep`.
    """
    listing = list_root(storage, [LATENTS, *(text_kind(name) for name in text_sets(storage))])
    objects: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in listing.objects:
        if what := parse_name(name):
            objects[what.kind, what.unit].append(name)
    found = []
    for (kind, unit), names in sorted(objects.items()):
        if (kind, unit) not in listing.commits or len(names) <= (2 if kind == LATENTS else 1):  # a tar, a ledger
            continue
        with contextlib.suppress(ShardDamage, FutureFormat):
            commit = read_commit(storage, kind, unit).commit
            kept = {blob.name for blob in (commit.tar, commit.ledger) if blob}
            found += [Orphan(name, listing.objects[name]) for name in sorted(set(names) - kept)]
    for orphan in found:
        storage.delete(orphan.name)
    return found


def _sweep_bucket(storage: S3Storage, newest: float, delete: bool) -> Iterator[Orphan]:
    for upload in list(storage.uploads(newest)):  # all pages first: aborting changes them
        if delete:
            storage.abort_upload(upload)
        yield Orphan(f"{upload.name} (unfinished upload)", 0)
    for entry in list(storage.list(TEMPORARY)):  # notes of builds that were killed
        with contextlib.suppress(MissingObject):
            if storage.modified(entry.name) <= newest:
                if delete:
                    storage.delete(entry.name)
                yield Orphan(entry.name, entry.size)


def _sweep_temporaries(storage: LocalStorage, newest: float, delete: bool) -> Iterator[Orphan]:
    for path in storage.temporaries():
        try:
            orphan = _sweep_folder(path, newest, delete) if path.is_dir() else _sweep_file(path, newest, delete)
        except FileNotFoundError:  # removed meanwhile
            continue
        if orphan:
            yield orphan


def _sweep_file(path: Path, newest: float, delete: bool) -> Orphan | None:
    stat = path.stat()
    if stat.st_mtime > newest:
        return None
    if delete:
        path.unlink(missing_ok=True)
    return Orphan(path.name, stat.st_size)


def _sweep_folder(folder: Path, newest: float, delete: bool) -> Orphan | None:
    """A complete scratch folder. The process that uses one holds an exclusive lock on it (`flock`) while it runs."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not lock_file(lock, folder, wait=False):  # its process still runs, or nobody can know
            return None
        stats = [folder.stat(), *(path.stat() for path in folder.rglob("*"))]
        if max(stat.st_mtime for stat in stats) > newest:
            return None
        if delete:
            shutil.rmtree(folder)
        return Orphan(f"{folder.name}/", sum(stat.st_size for stat in stats if S_ISREG(stat.st_mode)))
    finally:
        os.close(lock)
