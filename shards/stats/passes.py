"""The first pass of `wanshards stats`: units one after another, or a few at a time, each read once or found kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from shards.errors import UserError
from shards.format.commit import Commit, StoredCommit
from shards.format.keys import clip_hash
from shards.format.names import LATENTS, text_kind
from shards.read.units import UnitRef, list_units, read_units, unit_numbers
from shards.stats.cache import StatsCache
from shards.stats.counter import Histograms
from shards.stats.unit import UnitStats, latent_unit, text_unit
from shards.storage.base import Storage

Item = TypeVar("Item")
Kept = TypeVar("Kept")


class Unit(NamedTuple):
    """One unit and what of it is asked for."""

    ref: UnitRef
    wanted: frozenset[str] | None

    @property
    def cache_name(self) -> str:
        """By the tar's digest, and by the keys where not all were asked for."""
        if self.wanted is None:
            return f"{self.ref.tar.sha256[:40]}-all"
        chosen = hashlib.sha256(" ".join(sorted(self.wanted)).encode()).hexdigest()
        return f"{self.ref.tar.sha256[:40]}-{chosen[:16]}"


class Passes:
    """Goes over the units of latents and of text once, each unit's commit in hand while its samples are read."""

    def __init__(self, storage: Storage, text_set: str | None, sample: int | None, kept: StatsCache, jobs: int) -> None:
        if sample is not None and sample < 1:
            raise UserError(f"--sample {sample}", expected="at least 1")
        self._storage, self._kept, self._jobs = storage, kept, jobs
        self._sample = sample
        self._kinds = [LATENTS, *([text_kind(text_set)] if text_set else [])]
        self._units = {kind: unit_numbers(storage, kind) for kind in self._kinds}

    @property
    def num_units(self) -> int:
        """Of both kinds."""
        return sum(map(len, self._units.values()))

    def latents(self, damaged: list[str]) -> Iterator[tuple[Unit, UnitStats]]:
        """Each unit of latents with its statistics; unreadable commits go into `damaged`."""
        return self._each(LATENTS, damaged, self._kept.read_latents, latent_unit, self._kept.write_latents)

    def texts(self, damaged: list[str]) -> Iterator[tuple[Unit, Histograms]]:
        """The same of the text set; nothing where there is none."""
        for kind in self._kinds[1:]:
            yield from self._each(kind, damaged, self._kept.read_tally, text_unit, self._kept.write_tally)

    def _each(
        self,
        kind: str,
        damaged: list[str],
        recall: Callable[[str], Kept | None],
        read: Callable[[Storage, Commit, Collection[str] | None], Kept],
        keep: Callable[[str, Kept], None],
    ) -> Iterator[tuple[Unit, Kept]]:
        chosen = None if self._sample is None else self._chosen(kind, self._sample)

        def one(stored: StoredCommit) -> tuple[Unit, Kept]:
            ref = UnitRef.of(stored)
            unit = Unit(ref, None if chosen is None else chosen.intersection(ref.keys))
            found = recall(unit.cache_name)
            if found is None:
                found = read(self._storage, stored.commit, unit.wanted)
                keep(unit.cache_name, found)
            return unit, found

        yield from _mapped(one, read_units(self._storage, kind, self._units[kind], damaged), self._jobs)

    def _chosen(self, kind: str, num: int) -> frozenset[str] | None:
        """The `num` keys of smallest hash, whatever else is there; None: all."""
        keys = [key for unit in list_units(self._storage, kind) for key in unit.keys]
        if num >= len(keys):
            return None
        hashes = np.array([clip_hash(key, "stats") for key in keys], np.uint64)
        limit = np.partition(hashes, num - 1)[num - 1]
        return frozenset(key for key, value in zip(keys, hashes.tolist(), strict=True) if value <= limit)


def _mapped(one: Callable[[Item], Kept], items: Iterator[Item], jobs: int) -> Iterator[Kept]:
    """`map` over threads with few results waiting. With one job, in this thread: a profile stays readable."""
    if jobs == 1:
        yield from map(one, items)
        return
    with ThreadPoolExecutor(jobs) as pool:
        while batch := list(islice(items, 4 * jobs)):
            yield from pool.map(one, batch)
