"""One unit as columns: what a reader needs of a commit, a fifth of its size; and the lines of the index are these.

A dataset of 160,000 samples is then a few arrays and two lists of text, not a million objects.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shards.commit import StoredCommit
from shards.damage import ShardDamage
from shards.layout import JSON_MEMBER, KEY, LATENTS

_JSON_CHECK_DIGITS = 16
SUMMARY_FIELDS = {"clip": str, "start_ms": int, "frames": int, "height": int, "width": int, "source_media": str}


def unit_columns(stored: StoredCommit) -> dict[str, Any]:
    """The columns of a commit, as plain JSON values."""
    commit = stored.commit
    json_members = [sample.member(JSON_MEMBER) for sample in commit.samples]
    arrays = [sample.arrays() for sample in commit.samples]
    flat = [member for of_sample in arrays for member in of_sample]
    specs = list(dict.fromkeys((str(member.dtype), member.shape or ()) for member in flat))
    columns: dict[str, Any] = {
        "kind": commit.kind,
        "unit": commit.unit,
        "commit": [stored.size, stored.seal],
        "revision": stored.revision,
        "identity_sha256": commit.identity_sha256,
        "tar": [commit.tar.name, commit.tar.size, commit.tar.sha256],
        "provenance": commit.provenance,
        "key": [sample.key for sample in commit.samples],
        "json": [
            [member.offset for member in json_members if member],
            [member.size for member in json_members if member],
            [int(member.sha256[:_JSON_CHECK_DIGITS], 16) for member in json_members if member],
        ],
        "num_arrays": [len(of_sample) for of_sample in arrays],
        "specs": [[dtype, list(shape)] for dtype, shape in specs],
        "arrays": [
            [member.offset for member in flat],
            [member.size for member in flat],
            [int(member.check or "", 16) for member in flat],
            [specs.index((str(member.dtype), member.shape or ())) for member in flat],
        ],
    }
    if commit.kind == LATENTS:
        summaries = [sample.summary.model_dump() for sample in commit.samples]
        for field in (*SUMMARY_FIELDS, "category"):
            columns[field] = [summary[field] for summary in summaries]
    return columns


class Spec(NamedTuple):
    """Dtype name and shape of an array."""

    dtype: str
    shape: tuple[int, ...]


class Shard(NamedTuple):
    """One tar of a table: which of the roots it lies in, its name and its unit."""

    root: int
    kind: str
    unit: int
    tar: str
    size: int
    sha256: str
    revision: str


class Table(NamedTuple):
    """Rows of one kind over all units and roots. N rows, A arrays; row i has the arrays start[i] … start[i+1]."""

    keys: list[str]
    shards: list[Shard]
    specs: list[Spec]
    shard: np.ndarray
    """int32 [N], index into shards."""
    json: np.ndarray
    """int64 [3, N]: offset, size, and the first eight bytes of sha256 (as uint64's bits) of the JSON member."""
    start: np.ndarray
    """int64 [N + 1]."""
    arrays: np.ndarray
    """int64 [4, A]: offset, size, frame checksum, index into specs."""
    summary: dict[str, Any]
    """For latents: clip and category as lists, the rest as int64 [N]; source_media is 1 for an image."""


class TableBuilder:
    """Collects units into a Table, checking what `unit_columns` promised (the index is a file like any other).

    Units may come in any order; the table's is that of roots and units.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._shards: list[Shard] = []
        self._specs: dict[Spec, int] = {}
        self._keys: list[str] = []
        self._rows_of_shard: list[int] = []
        self._num_arrays = array("q")
        # Flat machine numbers: as Python objects they would be most of the memory of a large dataset.
        self._json = (array("q"), array("q"), array("Q"))
        self._arrays = (array("q"), array("q"), array("q"), array("q"))
        self._summary: dict[str, Any] = {name: array("q") for name, kind in SUMMARY_FIELDS.items() if kind is int}
        self._summary |= {"clip": [], "category": [], "source_media": []}
        self._shared: dict[str | None, str | None] = {}

    def add(self, root: int, columns: Mapping[str, Any], file: str) -> None:
        """Append one unit of root number `root`. Raises ShardDamage naming `file` on columns that don't fit."""
        try:
            self._append(root, columns)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            what = f"the columns of unit {columns.get('unit')!r} don't fit: {type(error).__name__} {error}"
            raise ShardDamage(file, what, mend="`wanshards index ROOT` makes the index anew") from None

    def table(self, file: str) -> Table:
        """The table of all units added. Raises ShardDamage on numbers out of range."""
        start = np.concatenate([[0], np.cumsum(np.frombuffer(self._num_arrays, np.int64))]).astype(np.int64)
        documents = np.stack([np.frombuffer(column, np.int64) for column in self._json])
        arrays = np.stack([np.frombuffer(column, np.int64) for column in self._arrays])
        shard = np.repeat(np.arange(len(self._shards), dtype=np.int32), self._rows_of_shard)
        summary = self._summary_columns() if self._kind == LATENTS else {}
        table = Table(self._keys, self._shards, list(self._specs), shard, documents, start, arrays, summary)
        _check_places(table, file)
        return _in_order(table)

    def _append(self, root: int, columns: Mapping[str, Any]) -> None:
        keys, counts = columns["key"], columns["num_arrays"]
        ordinals = [self._spec(dtype, tuple(shape)) for dtype, shape in columns["specs"]]
        documents, (offsets, sizes, checks, spec_of) = columns["json"], columns["arrays"]
        summary = {field: columns[field] for field in self._summary} if self._kind == LATENTS else {}
        _same_length(len(keys), counts, *documents, *summary.values())
        _same_length(sum(counts), offsets, sizes, checks, spec_of)
        if len(documents) != 3 or min(counts, default=1) < 1 or min(spec_of, default=0) < 0:
            raise ValueError("counts out of range")
        if not all(map(KEY.fullmatch, keys)):
            raise ValueError("a key that is none")
        name, size, sha256 = columns["tar"]
        shard = Shard(root, columns["kind"], columns["unit"], name, int(size), sha256, columns["revision"])
        for column, values in zip(self._arrays, (offsets, sizes, checks, [ordinals[s] for s in spec_of]), strict=True):
            column.extend(values)
        for column, values in zip(self._json, documents, strict=True):
            column.extend(values)
        for field, values in summary.items():
            # Equal texts become one object: 160,000 categories are a few dozen.
            shared = field in ("category", "source_media")
            self._summary[field].extend([self._shared.setdefault(v, v) for v in values] if shared else values)
        self._keys.extend(keys)
        self._num_arrays.extend(counts)
        self._rows_of_shard.append(len(keys))
        self._shards.append(shard)

    def _spec(self, dtype: Any, shape: tuple[Any, ...]) -> int:
        ordinal = self._specs.get(Spec(dtype, shape))
        if ordinal is None:
            if type(dtype) is not str or not all(type(size) is int for size in shape):
                raise TypeError(f"spec {dtype!r} {shape!r}")
            ordinal = self._specs[Spec(dtype, shape)] = len(self._specs)
        return ordinal

    def _summary_columns(self) -> dict[str, Any]:
        numbers = {name: np.frombuffer(v, np.int64) for name, v in self._summary.items() if isinstance(v, array)}
        is_image = np.array([value == "image" for value in self._summary["source_media"]], np.int64)
        return {
            **numbers,
            "clip": self._summary["clip"],
            "category": self._summary["category"],
            "source_media": is_image,
        }


def _check_places(table: Table, file: str) -> None:
    """Raises ShardDamage unless every member lies within its tar."""
    sizes = np.array([item.size for item in table.shards], np.int64)
    of_array = sizes[np.repeat(table.shard, np.diff(table.start))]
    for (offset, size), limit in ((table.arrays[:2], of_array), (table.json[:2], sizes[table.shard])):
        if ((offset < 512) | (size < 0) | (size > limit) | (offset > limit - size)).any():
            raise ShardDamage(file, "a member that lies outside its tar")


def _in_order(table: Table) -> Table:
    """The table with its shards sorted by root and unit; itself when they are."""
    wanted = sorted(range(len(table.shards)), key=lambda place: table.shards[place][:3:2])
    if wanted == list(range(len(table.shards))):
        return table
    rank = np.empty(len(wanted), np.int32)
    rank[wanted] = np.arange(len(wanted), dtype=np.int32)
    rows = np.argsort(rank[table.shard], kind="stable")
    counts = np.diff(table.start)[rows]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    flat = np.repeat(table.start[rows] - start[:-1], counts) + np.arange(start[-1])
    summary = {
        name: column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows.tolist()]
        for name, column in table.summary.items()
    }
    keys = [table.keys[row] for row in rows.tolist()]
    shards = [table.shards[place] for place in wanted]
    shard = rank[table.shard][rows]
    return Table(keys, shards, table.specs, shard, table.json[:, rows], start, table.arrays[:, flat], summary)


def _same_length(expected: int, *columns: Sequence[Any]) -> None:
    if any(len(column) != expected for column in columns):
        raise ValueError(f"columns of {sorted({len(column) for column in columns})} values, expected {expected}")
