"""Units in short form: what a pass over all units keeps in memory, where complete commits would be too large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shards.errors import ShardDamage, StorageOutage, UserError
from shards.format.commit import Blob, Commit, StoredCommit, committed_units, read_commit
from shards.storage.base import Storage
from shards.storage.patience import reader_pool

_THREADS = 16


class UnitRef(NamedTuple):
    """One committed unit, some hundred bytes a sample smaller than its commit."""

    kind: str
    unit: int
    revision: str
    tar: Blob
    ledger: Blob | None
    keys: tuple[str, ...]

    @classmethod
    def of(cls, stored: StoredCommit) -> UnitRef:
        """From its commit."""
        commit = stored.commit
        keys = tuple(sample.key for sample in commit.samples)
        return cls(commit.kind, commit.unit, stored.revision, commit.tar, commit.ledger, keys)

    def commit(self, storage: Storage) -> Commit:
        """Its commit, read again. Raises ShardDamage when it is missing, damaged, or names another tar now."""
        commit = read_commit(storage, self.kind, self.unit).commit
        if commit.tar != self.tar:
            raise ShardDamage(storage.url(self.tar.name), "its unit was built again meanwhile: run this command again")
        return commit


def unit_numbers(storage: Storage, kind: str) -> list[int]:
    """The units of a kind that have a commit now, ascending; without the null embeddings."""
    return sorted(committed_units(storage, kind))


def read_units(
    storage: Storage, kind: str, units: Sequence[int], damaged: list[str] | None = None
) -> Iterator[StoredCommit]:
    """The units' commits in this order, few at a time; what is wrong with an unreadable one goes into `damaged`."""
    with reader_pool(_THREADS) as pool:
        for start in range(0, len(units), _THREADS):
            for found in pool.map(lambda unit: _read(storage, kind, unit), units[start : start + _THREADS]):
                if isinstance(found, StoredCommit):
                    yield found
                elif damaged is not None:
                    damaged.append(found)


def list_units(storage: Storage, kind: str) -> list[UnitRef]:
    """All units of a kind whose commit can be read now."""
    return [UnitRef.of(stored) for stored in read_units(storage, kind, unit_numbers(storage, kind))]


def _read(storage: Storage, kind: str, unit: int) -> StoredCommit | str:
    try:
        return read_commit(storage, kind, unit)
    except StorageOutage:
        raise
    except UserError as error:
        return str(error.problem)
