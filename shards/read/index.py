"""index.jsonl.zst: all commits as columns, a line a unit. A cache, rebuilt from the commits at any time, never trusted.

A line counts only while the root's listing shows the commit with the size the line says and, as the unit's only tar,
the one it names; any other unit is read from its commit. A stale or missing index costs time and changes nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import zstandard

from shards.console import LOG, with_progress
from shards.errors import MissingObject, ShardDamage
from shards.format.commit import MAX_COMMIT_BYTES, parse_commit
from shards.format.dataset_info import read_info
from shards.format.ledger import read_ledger_lines
from shards.format.names import FORMAT_VERSION, INDEX_NAME, commit_name, parse_name
from shards.format.sealed_json import canonical_json, parse_json
from shards.read.table import unit_columns
from shards.storage.base import Storage
from shards.storage.patience import reader_pool

_MAX_INDEX_BYTES = 2**30
_MAX_LINES = 2**21
_THREADS = 16
_BATCH = 64
"""Commits whose bytes are held."""
_MANY_COMMITS = 500
"""From here on the reading of commits takes seconds, and its progress is shown."""


class Listing(NamedTuple):
    """What a root's listing shows: sizes of commits by (kind, unit), of all other objects by name, each unit's tars."""

    commits: dict[tuple[str, int], int]
    objects: dict[str, int]
    tars: dict[tuple[str, int], list[str]]
    """More than one where a killed writer, or one that came second, left its own, or a unit was built again."""


def list_root(storage: Storage, kinds: list[str]) -> Listing:
    """List the folders of `kinds`."""
    commits: dict[tuple[str, int], int] = {}
    objects: dict[str, int] = {}
    tars: dict[tuple[str, int], list[str]] = {}
    for kind in kinds:
        for entry in storage.list(f"{kind}/"):
            name = parse_name(entry.name)
            if name and name.what == "commit":
                commits[name.kind, name.unit] = entry.size
                continue
            objects[entry.name] = entry.size
            if name and name.what == "tar":
                tars.setdefault((name.kind, name.unit), []).append(entry.name)
    return Listing(commits, objects, tars)


def text_sets(storage: Storage) -> list[str]:
    """The text sets that have objects under the root, whatever dataset.json says."""
    return sorted({entry.name.split("/")[1] for entry in storage.list("text/") if entry.name.count("/") == 2})


def write_index(storage: Storage) -> int:
    """Rebuild the index from all commits; returns the number of units in it. Raises UserError without a dataset."""
    read_info(storage)
    kinds = ["latents", *(f"text/{name}" for name in text_sets(storage))]
    units = sorted(list_root(storage, kinds).commits)
    out = io.BytesIO()
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    with compressor.stream_writer(out, closefd=False) as stream:
        stream.write(canonical_json({"format_version": FORMAT_VERSION, "num_units": len(units)}) + b"\n")
        for columns in with_progress(_read_commits(storage, units), len(units), "index"):
            stream.write(canonical_json(columns) + b"\n")
    storage.put(INDEX_NAME, out.getvalue())
    return len(units)


def load_columns(storage: Storage, kinds: list[str], listing: Listing) -> Iterator[dict[str, Any]]:
    """The columns of every commit of `kinds`, from the index where it holds, from the commits elsewhere."""
    left = {unit for unit in listing.commits if unit[0] in kinds}
    try:
        for columns in read_index(storage):
            if is_current(columns, listing) and (unit := unit_of(columns)) in left:
                left.remove(unit)
                yield columns
    except MissingObject:
        pass
    except ShardDamage as damage:
        LOG.warning("%s (the commits are read instead; `wanshards index` rebuilds it)", damage.problem)
    commits = _read_commits(storage, sorted(left))
    if len(left) >= _MANY_COMMITS:
        commits = with_progress(commits, len(left), "reading commits (`wanshards index` makes this quick)")
    yield from commits


def is_current(columns: dict[str, Any], listing: Listing) -> bool:
    """Whether a line of the index is that of a commit in the listing, and its tar is the only one of the unit.

    A unit that was built again can have a commit of the same size while the old tar is still there: of two tars the
    listing does not say which one the commit names. A single tar is that one, because its name carries its digest.
    """
    try:
        unit, (commit_size, _), (tar, size, _) = unit_of(columns), columns["commit"], columns["tar"]
    except (KeyError, TypeError, ValueError):
        return False
    is_only_tar = listing.tars.get(unit) == [tar] and listing.objects.get(tar) == size
    return is_only_tar and listing.commits.get(unit) == commit_size


def unit_of(columns: dict[str, Any]) -> tuple[str, int]:
    """Kind and unit of a line."""
    return str(columns["kind"]), int(columns["unit"])


def read_index(storage: Storage) -> Iterator[dict[str, Any]]:
    """The index's lines after its first. Raises MissingObject, or ShardDamage where it is not an index."""
    file = storage.url(INDEX_NAME)
    for number, line in enumerate(read_ledger_lines(storage.get(INDEX_NAME, _MAX_INDEX_BYTES), file)):
        value = parse_json(line, file)
        if number > _MAX_LINES or not isinstance(value, dict):
            raise ShardDamage(file, f"line {number + 1} is not a unit's columns")
        if number == 0 and value.get("format_version") != FORMAT_VERSION:
            raise ShardDamage(file, f"it is of format version {value.get('format_version')!r}")
        if number:
            yield value


def _read_commits(storage: Storage, units: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    if not units:
        return
    # Threads wait for storage alone: parsing in several of them takes twice the CPU time, and no less of the clock.
    with reader_pool(_THREADS) as pool:
        for start in range(0, len(units), _BATCH):
            batch = units[start : start + _BATCH]
            names = [commit_name(*unit) for unit in batch]
            found = pool.map(partial(storage.get, max_bytes=MAX_COMMIT_BYTES), names)
            for unit, name, data in zip(batch, names, found, strict=True):
                yield unit_columns(parse_commit(data, storage.url(name), *unit))
