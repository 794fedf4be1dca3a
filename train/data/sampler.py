"""The order in which samples are trained: a function of (seed, epoch, key). Its state is two numbers.

Samples of one size form a bucket, and a step takes all its slots from one bucket. A bucket is an endless line: the
permutation of its keys for epoch 0, then the one for epoch 1, and so on, cut into batches without a gap. Samples
that do not fill a batch at the end of an epoch begin the bucket's next epoch: nothing is padded, repeated or left out.
An epoch of the run has every batch that is complete by then, in an order that mixes the buckets.

    epoch 0   bucket A  [a3 a0 a4][a1 a5 a2] a6        bucket B  [b1 b0 b2] b3
    epoch 1   bucket A  [a6 a2 a5][a0 a1 a6] a3 a4     bucket B  [b3 b2 b0] b1

A sample of weight w is in an epoch ⌊w⌋ or ⌈w⌉ times: before epoch e it was taken ⌊e·w + u⌋ times, where u in [0, 1) is
a hash of its key and the seed. So after any number of epochs no sample is a whole use away from its share.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from shards.errors import UserError
from train.geometry import Bucket

ORDER_VERSION = 1
PHASE = -1
"""In place of an epoch: what keys the hash that decides between ⌊w⌋ and ⌈w⌉ uses."""


class Sized(Protocol):
    """What the order needs to know of a sample."""

    @property
    def key(self) -> str:
        """Unique name of the sample."""

    @property
    def frames(self) -> int:
        """Frames of the window."""

    @property
    def height(self) -> int:
        """Height in pixels."""

    @property
    def width(self) -> int:
        """Width in pixels."""


class Position(NamedTuple):
    """The next batch: all of the order's state."""

    epoch: int
    batch: int


START = Position(0, 0)


class OrderedBatch(NamedTuple):
    """One step's samples, slot by slot."""

    ordinals: tuple[int, ...]
    """Indices into the samples the order was made from."""
    bucket: Bucket
    epoch: int


class Order:
    """The order of a fixed set of samples under a seed, a global batch and, where given, a weight above 0 each."""

    def __init__(
        self, samples: Sequence[Sized], seed: int, global_batch: int, weights: Sequence[Fraction] | None = None
    ) -> None:
        self.seed = seed
        self.global_batch = global_batch
        members_by_size: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        keys: list[str] = []  # read once: `samples` may be a view that makes each sample on access
        for ordinal, sample in enumerate(samples):
            keys.append(sample.key)
            members_by_size[sample.frames, sample.height, sample.width].append(ordinal)
        members = {Bucket(*size): ordinals for size, ordinals in members_by_size.items()}
        self.too_small = {bucket: len(some) for bucket, some in sorted(members.items()) if len(some) < global_batch}
        """Buckets that cannot fill a batch, with their number of samples; they are never trained on."""
        self.buckets = [bucket for bucket in sorted(members) if bucket not in self.too_small]
        if not self.buckets:
            raise UserError(
                f"no bucket can fill a batch: {describe_buckets(self.too_small.items()) or 'there are no samples'}",
                expected=f"at least data.global_batch = {global_batch} samples of one size",
                fix="lower data.global_batch, or build more shards",
            )
        self._ordinals, self._hashes = [], []
        self._uses: list[_Uses | None] = []
        for bucket in self.buckets:
            # By key, so that the order in which the samples are listed does not matter.
            ordinals = sorted(members[bucket], key=keys.__getitem__)
            self._ordinals.append(np.array(ordinals, dtype=np.int64))
            hashes = _hash_keys([keys[ordinal] for ordinal in ordinals])
            self._hashes.append(hashes)
            own = None if weights is None else [weights[ordinal] for ordinal in ordinals]
            self._uses.append(None if own is None else _Uses(mix(hashes, seed, PHASE), own))
        # A step reads at most two epochs of a bucket; the rest is kept so that buckets do not evict each other.
        self._permutation = lru_cache(maxsize=4 * len(self.buckets))(self._permute)
        self._count = lru_cache(maxsize=1024)(self._count_batches)
        self._schedule = lru_cache(maxsize=2)(self._mix)

    @property
    def num_samples(self) -> int:
        """Samples that are trained on."""
        return sum(map(len, self._ordinals))

    def num_batches(self, epoch: int) -> int:
        """Batches that `epoch` holds."""
        return len(self._schedule(epoch))

    def batch(self, position: Position) -> OrderedBatch:
        """The samples at `position`."""
        position = self._not_empty(position)
        which, index = self._schedule(position.epoch)[position.batch]
        start, epoch = index * self.global_batch, position.epoch
        while self._before(which, epoch) > start:
            epoch -= 1
        ordinals: list[int] = []
        while len(ordinals) < self.global_batch:
            first = start + len(ordinals) - self._before(which, epoch)
            line = self._permutation(which, epoch)
            ordinals += line[first : first + self.global_batch - len(ordinals)].tolist()
            epoch += 1
        return OrderedBatch(tuple(ordinals), self.buckets[which], position.epoch)

    def next(self, position: Position) -> Position:
        """The position after `position`."""
        position = self._not_empty(position)
        return self._not_empty(Position(position.epoch, position.batch + 1))

    def position_of_step(self, step: int) -> Position:
        """The position of the batch that step `step` (from 1) takes in a run that began at the first."""
        epoch, left = 0, step - 1
        while left >= (batches := self._count(epoch)):
            epoch, left = epoch + 1, left - batches
        return Position(epoch, left)

    def _not_empty(self, position: Position) -> Position:
        """The position itself, or where its epoch ends before it, the first of the next epoch that has a batch."""
        while position.batch >= self._count(position.epoch):
            position = Position(position.epoch + 1, 0)
        return position

    def _before(self, which: int, epoch: int) -> int:
        """Samples along a bucket's endless line before `epoch` begins."""
        uses = self._uses[which]
        return epoch * len(self._ordinals[which]) if uses is None else uses.before(epoch)

    def _count_batches(self, epoch: int) -> int:
        return sum(len(self._indices(which, epoch)) for which in range(len(self.buckets)))

    def _indices(self, which: int, epoch: int) -> range:
        """Batches along a bucket's endless line that are completed in `epoch`."""
        return range(*(self._before(which, each) // self.global_batch for each in (epoch, epoch + 1)))

    def _permute(self, which: int, epoch: int) -> np.ndarray:
        ordinals, hashes, uses = self._ordinals[which], self._hashes[which], self._uses[which]
        if uses is None:
            return ordinals[np.argsort(mix(hashes, self.seed, epoch), kind="stable")]
        counts = uses.of(epoch)
        rows = np.repeat(np.arange(len(counts)), counts)
        copy = (np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]).astype(np.uint64)
        mixed = mix(hashes[rows] ^ (copy * np.uint64(0x9E3779B97F4A7C15)), self.seed, epoch)
        # Copy k of n lies in the k-th n-th of the epoch, so that the uses of a sample are apart.
        of = counts[rows].astype(np.uint64)
        return ordinals[rows][np.argsort(copy * (np.uint64(2**64 - 1) // of) + mixed // of, kind="stable")]

    def _mix(self, epoch: int) -> list[tuple[int, int]]:
        batches = [(which, index) for which in range(len(self.buckets)) for index in self._indices(which, epoch)]
        names = _hash_keys(f"{self.buckets[which]} {index}" for which, index in batches)
        places = np.argsort(mix(names, self.seed, epoch), kind="stable")
        return [batches[place] for place in places]


class _Uses:
    """How often the samples of a bucket are taken: ⌊e·w + u⌋ times before epoch e, in exact arithmetic."""

    def __init__(self, phases: np.ndarray, weights: Sequence[Fraction]) -> None:
        """`phases`: u · 2⁶⁴ of each sample, uint64."""
        groups: dict[Fraction, list[int]] = {}
        for place, weight in enumerate(weights):
            groups.setdefault(weight, []).append(place)
        self._phases = phases
        self._groups = [(weight, np.array(places), np.sort(phases[places])) for weight, places in groups.items()]
        self.before = lru_cache(maxsize=1024)(self._before)
        """Uses of all samples before an epoch."""

    def _before(self, epoch: int) -> int:
        total = 0
        for weight, places, phases in self._groups:
            whole, limit = self._split(weight, epoch)
            more = len(phases) - int(np.searchsorted(phases, np.uint64(limit))) if limit < 2**64 else 0
            total += whole * len(places) + more
        return total

    def of(self, epoch: int) -> np.ndarray:
        """Uses of each sample in an epoch, int64."""
        counts = np.zeros(len(self._phases), dtype=np.int64)
        for weight, places, _ in self._groups:
            for sign, each in ((1, epoch + 1), (-1, epoch)):
                whole, limit = self._split(weight, each)
                more = self._phases[places] >= np.uint64(limit) if limit < 2**64 else 0
                counts[places] += sign * (whole + more)
        return counts

    @staticmethod
    def _split(weight: Fraction, epoch: int) -> tuple[int, int]:
        """⌊e·w⌋, and the phase from which on it is one more."""
        whole, part = divmod(weight * epoch, 1)
        return int(whole), math.ceil((1 - part) * 2**64)


def hash_key(key: str) -> int:
    """A uint64 of a key, the same in every process and version."""
    return int(_hash_keys([key])[0])


def _hash_keys(keys: Iterable[str]) -> np.ndarray:
    """uint64, one per key."""
    digests = b"".join([hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys])
    return np.frombuffer(digests, "<u8").astype(np.uint64, copy=False)


def mix(hashes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """uint64 hashes keyed by (seed, epoch): splitmix64's finaliser (Steele et al. 2014) over each."""
    key = hash_key(f"order {ORDER_VERSION} {seed} {epoch}")
    mixed = hashes ^ np.uint64(key)
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(multiplier)
    return mixed ^ (mixed >> np.uint64(31))


def describe_buckets(buckets: Iterable[tuple[Bucket, int]]) -> str:
    """Buckets and their numbers of samples, for people."""
    return ", ".join(f"{bucket} has {count}" for bucket, count in buckets)


def check_order_version(version: int) -> None:
    """Raise UserError when a checkpoint's order was made by another version of this file."""
    if version != ORDER_VERSION:
        raise UserError(
            f"the checkpoint's sample order is version {version}, this program's is {ORDER_VERSION}",
            fix="resume with the program that began the run, or begin a new run",
        )
