"""Lines too many for memory: kept in a scratch file, with an index of thirty bytes a line that can be sorted."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

from preprocess.corpus import map_ahead

ZSTD_LEVEL = 3
_WRITE_BYTES = 2**20
_NUM_COMPRESSORS = 2


class Batch(NamedTuple):
    """Some lines, column by column: what a worker process hands over."""

    hashes: list[int]
    """Order of each line: a uint64."""
    lines: list[bytes]
    """Without a newline."""
    tags: list[str]
    """What lines are counted by; few distinct values."""
    seconds: list[float]

    @classmethod
    def empty(cls) -> Batch:
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

    def add(self, batch: Batch) -> None:
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
