"""One unit as columns: what a reader needs of a commit, a fifth of its size; and the lines of the index are these.

A dataset of 160,000 samples is then a few arrays and two lists of text, not a million objects.
"""

from __future__ import annotations

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
    flat = [array for of_sample in arrays for array in of_sample]
    specs = list(dict.fromkeys((str(array.dtype), array.shape or ()) for array in flat))
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
            [array.offset for array in flat],
            [array.size for array in flat],
            [int(array.check or "", 16) for array in flat],
            [specs.index((str(array.dtype), array.shape or ())) for array in flat],
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
    """Collects units into a Table, checking what `unit_columns` promised (the index is a file like any other)."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._shards: list[Shard] = []
        self._specs: dict[Spec, int] = {}
        self._keys: list[str] = []
        self._rows_of_shard: list[int] = []
        self._json: list[list[int]] = [[], [], []]
        self._num_arrays: list[int] = []
        self._arrays: list[list[int]] = [[], [], [], []]
        self._tar_sizes: list[int] = []
        self._summary: dict[str, list[Any]] = {field: [] for field in (*SUMMARY_FIELDS, "category")}

    def add(self, root: int, columns: Mapping[str, Any], file: str) -> None:
        """Append one unit of root number `root`. Raises ShardDamage naming `file` on columns that don't fit."""
        try:
            self._append(root, columns)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"the columns of unit {columns.get('unit')!r} don't fit: {type(error).__name__} {error}"
            raise ShardDamage(file, what, mend="`wanshards index ROOT` makes the index anew") from None

    def table(self, file: str) -> Table:
        """The table of all units added. Raises ShardDamage on numbers out of range."""
        start = np.concatenate([[0], np.cumsum(np.array(self._num_arrays, np.int64))]).astype(np.int64)
        try:
            arrays = np.array(self._arrays, np.int64).reshape(4, -1)
            json_columns = np.array([np.array(column, np.uint64).view(np.int64) for column in self._json])
            summary = self._summary_columns()
        except (OverflowError, ValueError, TypeError) as error:
            raise ShardDamage(file, f"a number out of range: {error}") from None
        shard = np.repeat(np.arange(len(self._shards), dtype=np.int32), self._rows_of_shard)
        self._check_places(arrays, json_columns, shard, start, file)
        return Table(
            self._keys, self._shards, list(self._specs), shard, json_columns.reshape(3, -1), start, arrays, summary
        )

    def _append(self, root: int, columns: Mapping[str, Any]) -> None:
        keys, counts = columns["key"], columns["num_arrays"]
        specs = [Spec(str(dtype), tuple(int(size) for size in shape)) for dtype, shape in columns["specs"]]
        ordinals = [self._specs.setdefault(spec, len(self._specs)) for spec in specs]
        json_columns, (offsets, sizes, checks, spec_of) = columns["json"], columns["arrays"]
        summary = {field: columns[field] for field in self._summary} if self._kind == LATENTS else {}
        _same_length(len(keys), counts, *json_columns, *summary.values())
        _same_length(sum(counts), offsets, sizes, checks, spec_of)
        if len(json_columns) != 3 or min(counts, default=1) < 1 or min(spec_of, default=0) < 0:
            raise ValueError("counts out of range")
        if not all(map(KEY.fullmatch, keys)):
            raise ValueError("a key that is none")
        name, size, sha256 = columns["tar"]
        self._arrays[3].extend([ordinals[spec] for spec in spec_of])
        for column, values in zip(self._arrays, (offsets, sizes, checks), strict=False):
            column.extend(values)
        for column, values in zip(self._json, json_columns, strict=True):
            column.extend(values)
        for field, values in summary.items():
            self._summary[field].extend(values)
        self._keys.extend(keys)
        self._num_arrays.extend(counts)
        self._rows_of_shard.append(len(keys))
        self._shards.append(Shard(root, columns["kind"], columns["unit"], name, int(size), sha256, columns["revision"]))

    def _summary_columns(self) -> dict[str, Any]:
        if self._kind != LATENTS:
            return {}
        # Equal texts become one object: 160,000 categories are a few dozen.
        shared: dict[str | None, str | None] = {}
        found: dict[str, Any] = {"clip": self._summary["clip"]}
        found["category"] = [shared.setdefault(value, value) for value in self._summary["category"]]
        found["source_media"] = np.array([value == "image" for value in self._summary["source_media"]], np.int64)
        for field, kind in SUMMARY_FIELDS.items():
            if kind is int:
                found[field] = np.array(self._summary[field], np.int64)
        return found

    def _check_places(
        self, arrays: np.ndarray, json_columns: np.ndarray, shard: np.ndarray, start: np.ndarray, file: str
    ) -> None:
        sizes = np.array([item.size for item in self._shards], np.int64)
        of_array = sizes[np.repeat(shard, np.diff(start))]
        for offset, size, limit in (
            (arrays[0], arrays[1], of_array),
            (json_columns[0], json_columns[1], sizes[shard]),
        ):
            if ((offset < 512) | (size < 0) | (size > limit) | (offset > limit - size)).any():
                raise ShardDamage(file, "a member that lies outside its tar")


def _same_length(expected: int, *columns: Sequence[Any]) -> None:
    if any(len(column) != expected for column in columns):
        raise ValueError(f"columns of {sorted({len(column) for column in columns})} values, expected {expected}")
