"""Which rows of the plan's earlier ledgers still count, while a further generation is frozen.

Rows are append-only. A record that was refused may pass later (its file was mended, the sieve has changed), or be
refused for another reason: then the latest counts, and the new generation says how many earlier rows it supersedes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import orjson

from preprocess.plan import Plan


class _Row(NamedTuple):
    generation: int
    digest: bytes
    tag: str


class Standing:
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
