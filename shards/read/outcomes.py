"""What became of every candidate: the rows of all units' ledgers, and which of several attempts at one is the latest.

A candidate keeps its ordinal when it is tried again in a later unit: of its rows, that of the highest unit counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shards.format.commit import Blob, committed_units, read_commit
from shards.format.ledger import LedgerRow, read_ledger
from shards.format.names import LATENTS
from shards.storage.base import Storage

MAX_LEDGER_BYTES = 2**30


class Outcome(NamedTuple):
    """One attempt at one candidate."""

    unit: int
    row: LedgerRow
    is_latest: bool
    """Whether no later unit has a row of this candidate: the one that counts."""


def read_outcomes(storage: Storage) -> Iterator[Outcome]:
    """All rows of all committed units, from the last unit to the first. Raises ShardDamage."""
    seen: set[int] = set()
    for unit in sorted(committed_units(storage, LATENTS), reverse=True):
        rows = list(unit_rows(storage, read_commit(storage, LATENTS, unit).commit.ledger))
        for row in rows:
            yield Outcome(unit, row, row.candidate not in seen)
        seen.update(row.candidate for row in rows)


def unit_rows(storage: Storage, ledger: Blob | None) -> Iterator[LedgerRow]:
    """The rows of a unit's ledger, as its commit names it. Raises ShardDamage."""
    if ledger is not None:
        yield from read_ledger(storage.get(ledger.name, MAX_LEDGER_BYTES), storage.url(ledger.name))
