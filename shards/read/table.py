"""One unit as columns: what a reader needs of a commit, in a fifth of its size. The lines of the index are these.

A dataset of 160,000 samples is then a few arrays and two lists of strings, not a million objects.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from shards.errors import ShardDamage
from shards.format.commit import StoredCommit
from shards.format.names import JSON_MEMBER, KEY, LATENTS

_JSON_CHECK_DIGITS = 16
_KEYS = re.compile(rf"(?:{KEY.pattern}\n)*")
NUMBERS = ("start_ms", "frames", "height", "width")
"""The integer fields of a latent's summary."""


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
            pack(member.offset for member in json_members if member),
            pack(member.size for member in json_members if member),
            pack(int(member.sha256[:_JSON_CHECK_DIGITS], 16) for member in json_members if member),
        ],
        "num_arrays": pack(len(of_sample) for of_sample in arrays),
        "specs": [[dtype, list(shape)] for dtype, shape in specs],
        "arrays": [
            pack(member.offset for member in flat),
            pack(member.size for member in flat),
            pack(int(member.check or "", 16) for member in flat),
            pack(specs.index((str(member.dtype), member.shape or ())) for member in flat),
        ],
    }
    if commit.kind == LATENTS:
        summaries = [sample.summary.model_dump() for sample in commit.samples]
        for field in NUMBERS:
            columns[field] = pack(summary[field] for summary in summaries)
        columns["is_image"] = pack(summary["source_media"] == "image" for summary in summaries)
        columns["clip"] = [summary["clip"] for summary in summaries]
        columns["category"] = [summary["category"] for summary in summaries]
    return columns


def pack(values: Iterable[int]) -> str:
    """Integers as base64 of little-endian 64-bit words: parsing millions of decimals takes seconds."""
    return base64.b64encode(np.array(list(values), "<u8").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """int64 of what `pack` wrote. Raises ValueError or TypeError on anything else."""
    return np.frombuffer(_unpack_bytes(text), "<i8").astype(np.int64, copy=False)


def _unpack_bytes(text: str) -> bytes:
    """The same as its bytes, for columns that are collected as they are: an array of each costs more than its words."""
    return binascii.a2b_base64(text, strict_mode=True)


@contextmanager
def refusing_odd_columns(columns: Mapping[str, Any], file: str) -> Iterator[None]:
    """Raise ShardDamage naming `file` where the columns turn out not to be those of a unit."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
        what = f"the columns of unit {columns.get('unit')!r} do not fit together: {type(error).__name__} {error}"
        raise ShardDamage(file, what[:300], fix="`wanshards index ROOT` rebuilds the index") from None


class Spec(NamedTuple):
    """Dtype name and shape of an array."""

    dtype: str
    shape: tuple[int, ...]


class Shard(NamedTuple):
    """One tar of a table: the index of its root, its name and its unit."""

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
    """For latents: clip and category as lists, the rest as int64 [N]; is_image is 1 or 0."""


class TableBuilder:
    """Collects units into a Table, checking all that `unit_columns` ensures (the index is a file that may be damaged).

    Units may be added in any order; the table is sorted by root and unit.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._shards: list[Shard] = []
        self._specs: dict[tuple[str, tuple[int, ...]], int] = {}
        self._keys: list[str] = []
        self._rows_of_shard: list[int] = []
        # Flat machine words: as Python objects they would be most of the memory of a large dataset.
        self._words: dict[str, bytearray] = defaultdict(bytearray)
        self._clips: list[str] = []
        self._categories: list[str | None] = []
        self._shared: dict[str | None, str | None] = {}

    def add(self, root: int, columns: Mapping[str, Any], file: str) -> None:
        """Append one unit of root number `root`. Raises ShardDamage naming `file` on inconsistent columns."""
        with refusing_odd_columns(columns, file):
            self._append(root, columns)

    def table(self, file: str) -> Table:
        """The table of all units added. Raises ShardDamage on numbers out of range."""
        start = np.concatenate([[0], np.cumsum(self._column("num_arrays"))]).astype(np.int64)
        documents = np.stack([self._column(f"json{place}") for place in range(3)])
        arrays = np.stack([self._column(f"arrays{place}") for place in range(4)])
        shard = np.repeat(np.arange(len(self._shards), dtype=np.int32), self._rows_of_shard)
        summary: dict[str, Any] = {}
        if self._kind == LATENTS:
            summary = {field: self._column(field) for field in (*NUMBERS, "is_image")}
            summary |= {"clip": self._clips, "category": self._categories}
        table = Table(
            self._keys, self._shards, [Spec(*spec) for spec in self._specs], shard, documents, start, arrays, summary
        )
        _check_places(table, file)
        return _in_order(table)

    def _append(self, root: int, columns: Mapping[str, Any]) -> None:
        keys, counts = columns["key"], unpack(columns["num_arrays"])
        documents = [_unpack_bytes(column) for column in columns["json"]]
        *places, spec_of = columns["arrays"]
        places, spec_of = [_unpack_bytes(column) for column in places], unpack(spec_of)
        ordinals = np.array([self._spec(dtype, tuple(shape)) for dtype, shape in columns["specs"]], np.int64)
        _same_length(len(keys), counts)
        _same_length(8 * len(keys), *documents)
        _same_length(int(counts.sum()), spec_of)
        _same_length(8 * len(spec_of), *places)
        if len(documents) != 3 or len(places) != 3 or (counts < 1).any() or (spec_of < 0).any():
            raise ValueError("counts out of range")
        lines = "\n".join([*keys, ""])
        if lines.count("\n") != len(keys) or not _KEYS.fullmatch(lines):
            raise ValueError("an invalid key")
        words = {"num_arrays": counts.tobytes(), **{f"json{place}": column for place, column in enumerate(documents)}}
        arrays = (*places, (ordinals[spec_of] if len(spec_of) else spec_of).tobytes())
        words |= {f"arrays{place}": column for place, column in enumerate(arrays)}
        if self._kind == LATENTS:
            words |= self._summary(columns, len(keys))
        name, size, sha256 = columns["tar"]
        shard = Shard(root, columns["kind"], columns["unit"], name, int(size), sha256, columns["revision"])
        for field, column in words.items():
            self._words[field] += column
        self._keys.extend(keys)
        self._rows_of_shard.append(len(keys))
        self._shards.append(shard)

    def _summary(self, columns: Mapping[str, Any], num_rows: int) -> dict[str, bytes]:
        words = {field: _unpack_bytes(columns[field]) for field in (*NUMBERS, "is_image")}
        clips, categories = columns["clip"], columns["category"]
        _same_length(num_rows, clips, categories)
        _same_length(8 * num_rows, *words.values())
        if not all(type(clip) is str for clip in clips):
            raise TypeError("a clip id that is not text")
        self._clips.extend(clips)
        # Equal texts become one object: 160,000 categories are a few dozen.
        self._categories.extend([self._shared.setdefault(value, value) for value in categories])
        return words

    def _column(self, field: str) -> np.ndarray:
        return np.frombuffer(self._words[field], "<i8").astype(np.int64, copy=False)

    def _spec(self, dtype: Any, shape: tuple[Any, ...]) -> int:
        ordinal = self._specs.get((dtype, shape))
        if ordinal is None:
            if type(dtype) is not str or not all(type(size) is int for size in shape):
                raise TypeError(f"spec {dtype!r} {shape!r}")
            ordinal = self._specs[dtype, shape] = len(self._specs)
        return ordinal


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


def _same_length(expected: int, *columns: Sized) -> None:
    if any(len(column) != expected for column in columns):
        raise ValueError(f"columns of {sorted({len(column) for column in columns})} values, expected {expected}")
