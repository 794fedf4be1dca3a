"""Lines too many for memory: kept in a scratch file, with an index of thirty bytes a line that can be sorted."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import zstandard

from preprocess.corpus.corpus import map_ahead
from preprocess.plan.plan import Plan

ZSTD_LEVEL = 3
_WRITE_BYTES = 2**20
_NUM_COMPRESSORS = 2


class LineBatch(NamedTuple):
    """Some lines, column by column: what a worker process hands over."""

    hashes: list[int]
    """Order of each line: a uint64."""
    lines: list[bytes]
    """Without a newline."""
    tags: list[str]
    """What lines are counted by; few distinct values."""
    seconds: list[float]

    @classmethod
    def empty(cls) -> LineBatch:
        """A batch to append to."""
        return cls([], [], [], [])

    def append(self, line_hash: int, line: bytes, tag: str, seconds: float = 0.0) -> None:
        """One more line."""
        self.hashes.append(line_hash)
        self.lines.append(line)
        self.tags.append(tag)
        self.seconds.append(seconds)


class Spill:
    """Lines on disk, named by their place: 0, 1, … in the order they were added."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=_WRITE_BYTES)
        self._size = 0
        self._hashes = array("Q")
        self._ends = array("Q")
        self._tags = array("L")
        self._seconds = array("d")
        self._tag_names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, batch: LineBatch) -> None:
        """Keep the lines of a batch, behind those before."""
        self._hashes.extend(batch.hashes)
        self._seconds.extend(batch.seconds)
        names = self._tag_names
        self._tags.extend(names.setdefault(tag, len(names)) for tag in batch.tags)
        for line in batch.lines:
            self._size += len(line)
            self._ends.append(self._size)
        self._file.write(b"".join(batch.lines))

    def line(self, place: int) -> bytes:
        """One line. Places of lines added since `flush` are not readable yet."""
        start = self._ends[place - 1] if place else 0
        return os.pread(self._file.fileno(), self._ends[place] - start, start)

    def flush(self) -> None:
        """Make all lines readable."""
        self._file.flush()

    def groups(self) -> Iterator[tuple[int, list[int]]]:
        """(hash, places) by rising hash."""
        if not self._hashes:
            return
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        in_order = hashes[order]
        starts = np.flatnonzero(np.concatenate(([True], in_order[1:] != in_order[:-1]))).tolist()
        for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
            yield int(in_order[start]), order[start:end].tolist()

    def tag_counts(self, places: Sequence[int]) -> dict[str, int]:
        """How many of these lines have each tag, most frequent first, then by name."""
        names = list(self._tag_names)
        counts = Counter(names[self._tags[place]] for place in places)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def total_seconds(self, places: Sequence[int]) -> float:
        """Sum of the lines' seconds, in the order given."""
        return float(sum(self._seconds[place] for place in places))

    def write_frames(self, places: Sequence[int], lines_per_frame: int, path: Path) -> tuple[int, ...]:
        """Write lines, each with its newline, `lines_per_frame` a zstd frame; the length of each frame in bytes."""
        self.flush()
        chunks = (places[start : start + lines_per_frame] for start in range(0, len(places), lines_per_frame))
        texts = (b"".join(self.line(place) + b"\n" for place in chunk) for chunk in chunks)
        sizes = []
        with path.open("wb") as file, ThreadPoolExecutor(_NUM_COMPRESSORS) as pool:
            for frame in map_ahead(pool, _compress, texts, num_ahead=2 * _NUM_COMPRESSORS):
                file.write(frame)
                sizes.append(len(frame))
        return tuple(sizes)

    def write_frame(self, places: Sequence[int], path: Path) -> None:
        """Write lines, each with its newline, as one zstd frame, in bounded memory."""
        self.flush()
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        with path.open("wb") as file, compressor.stream_writer(file) as writer:
            for place in places:
                writer.write(self.line(place) + b"\n")

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _compress(text: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(text)


# Which rows of the plan's earlier ledgers still count, while a further generation is frozen.
#
# Rows are append-only. A record that was refused may pass later (its file was fixed, the sieve has changed), or be
# refused for another reason: then the latest counts, and the new generation says how many earlier rows it supersedes.


class _Row(NamedTuple):
    generation: int
    digest: bytes
    tag: str


class Superseded:
    """Rows of earlier ledgers by their source, some two hundred bytes each, and what has superseded them so far."""

    def __init__(self, plan: Plan, planned_sources: Collection[str]) -> None:
        """Read the ledgers of `plan`. Raises ShardDamage."""
        self.superseded_by: Counter[str] = Counter()
        self._rows: dict[bytes, _Row] = {}
        # Rows known as they are, which nothing supersedes: of candidates' sources (those were superseded when the
        # candidate came), and of sources that name several documents (an archive may hold a name twice).
        self._fixed: set[bytes] = set()
        planned = {_digest(source.encode()) for source in planned_sources}
        tags: dict[str, str] = {}
        for number in range(len(plan.generations)):
            for line in plan.ledger_lines(number):
                row = orjson.loads(line)
                tag = f"{row['stage']}/{row['reason']}"
                self._read(
                    _digest(row["source"].encode()), _Row(number, _digest(line), tags.setdefault(tag, tag)), planned
                )

    def _read(self, source: bytes, row: _Row, planned: set[bytes]) -> None:
        earlier = self._rows.get(source)
        if source in planned or (earlier is not None and earlier.generation == row.generation):
            self._fixed.add(row.digest)
        else:
            self._rows[source] = row

    def has_source(self, line: bytes) -> bool:
        """Whether a row stands for the source of this line, of a record or of a row."""
        return bool(self._rows) and _source(line) in self._rows

    def knows(self, line: bytes) -> bool:
        """Whether exactly this row stands."""
        if not self._rows and not self._fixed:
            return False
        digest = _digest(line)
        if digest in self._fixed:
            return True
        source = _source(line)
        row = self._rows.get(source)
        if row is None or row.digest != digest:
            return False
        del self._rows[source]
        self._fixed.add(digest)
        return True

    def supersede(self, line: bytes) -> None:
        """This record became a candidate, or got this row: the row that stood for its source counts no longer."""
        row = self._rows.pop(_source(line), None) if self._rows else None
        if row is not None:
            self.superseded_by[row.tag] += 1


def _source(line: bytes) -> bytes:
    return _digest(orjson.loads(line)["source"].encode())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
