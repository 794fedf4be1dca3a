"""The units of a dataset in short: what a pass over all of them keeps, where whole commits would be too much."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from shards.commit import Blob, Commit, read_commit
from shards.damage import ShardDamage
from shards.errors import UserError
from shards.index import list_root
from shards.layout import NULL_UNIT
from shards.storage import Storage

_THREADS = 16
_BATCH = 256


class UnitRef(NamedTuple):
    """One committed unit; some hundred bytes a sample less than its commit."""

    kind: str
    unit: int
    revision: str
    tar: Blob
    ledger: Blob | None
    keys: tuple[str, ...]

    def commit(self, storage: Storage) -> Commit:
        """Its commit, read anew. Raises ShardDamage when it is gone, damaged, or another tar's by now."""
        commit = read_commit(storage, self.kind, self.unit).commit
        if commit.tar != self.tar:
            raise ShardDamage(storage.url(self.tar.name), "its unit was made anew meanwhile: run this again")
        return commit


def list_units(storage: Storage, kind: str, damaged: list[str] | None = None) -> list[UnitRef]:
    """All units of a kind that have a commit now; what is wrong with one that cannot be read goes into `damaged`."""
    numbers = [unit for _, unit in sorted(list_root(storage, [kind]).commits) if unit != NULL_UNIT]
    units = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(numbers), _BATCH):  # bounded: the commits of a batch, not of the dataset
            for found in pool.map(lambda unit: _unit(storage, kind, unit), numbers[start : start + _BATCH]):
                if isinstance(found, UnitRef):
                    units.append(found)
                elif damaged is not None:
                    damaged.append(found)
    return units


def _unit(storage: Storage, kind: str, unit: int) -> UnitRef | str:
    try:
        stored = read_commit(storage, kind, unit)
    except (ShardDamage, UserError) as error:
        return str(error.problem)
    commit = stored.commit
    keys = tuple(sample.key for sample in commit.samples)
    return UnitRef(kind, unit, stored.revision, commit.tar, commit.ledger, keys)
