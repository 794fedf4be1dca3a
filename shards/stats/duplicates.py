"""Which samples show the same pictures: equal bytes, or fingerprints of latents that hardly differ.

Fingerprints (hundreds of bits, `latent_features.py`) are cut into bands of 32 bits. Samples that share a band are
compared; two of which 5 % of the bits differ share one of 24 bands with probability 0.99, two that have nothing in
common with 24 / 2³². So a dataset is searched in a few sorts, not in pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_DIFFERENT = 0.04
"""Share of bits in which two samples of the same pictures may differ."""
_BAND_BYTES = 4


class Alike(NamedTuple):
    """Samples that show the same pictures."""

    members: list[int]
    """Their places, ascending."""
    largest_difference: float
    """Largest share of differing bits met when they were joined; 0: equal."""


def find_alike(prints: np.ndarray, clips: Sequence[str], max_different: float = MAX_DIFFERENT) -> list[Alike]:
    """Groups of samples with nearly equal fingerprints (uint8 [N, B]) that hold more than one clip.

    Windows of one clip may look alike: they are no find by themselves. A print without a set bit is that of a latent
    that does not vary, and is like no other.
    """
    varies = np.flatnonzero(prints.any(axis=1)) if prints.size else np.zeros(0, np.int64)
    joined = _Joined(len(prints))
    limit = max_different * prints.shape[1] * 8 if prints.size else 0
    for run in _shared_bands(prints[varies]):
        # Against the first and the one before: in a run of thousands every pair would be millions.
        places = varies[run]
        if len({clips[place] for place in places.tolist()}) == 1:
            continue
        for ones, others in ((places[1:], places[:-1]), (places[2:], np.broadcast_to(places[0], len(places) - 2))):
            different = np.bitwise_count(prints[ones] ^ prints[others]).sum(axis=1)
            for near in np.flatnonzero(different <= limit).tolist():
                if not joined.same(one := int(ones[near]), other := int(others[near])):
                    joined.join(one, other, int(different[near]) / (prints.shape[1] * 8))
    return [group for group in joined.groups() if len({clips[member] for member in group.members}) > 1]


def find_equal(digests: Sequence[str], clips: Sequence[str]) -> list[Alike]:
    """Groups of samples of equal digests that hold more than one clip; an empty digest is none."""
    places: dict[str, list[int]] = {}
    for place, digest in enumerate(digests):
        if digest:
            places.setdefault(digest, []).append(place)
    groups = [Alike(members, 0.0) for members in places.values() if len(members) > 1]
    return [group for group in groups if len({clips[member] for member in group.members}) > 1]


def _shared_bands(prints: np.ndarray) -> Iterator[np.ndarray]:
    num_bands = prints.shape[1] // _BAND_BYTES if prints.size else 0
    for band in range(num_bands):
        # Every num_bands-th byte: a band takes bits of many channels, not the cells of a few.
        values = np.ascontiguousarray(prints[:, band::num_bands][:, :_BAND_BYTES]).view(np.uint32)[:, 0]
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(np.diff(values[order], prepend=values[order[:1]] + 1, append=values[order[-1:]] + 1))
        for run in np.flatnonzero(np.diff(edges) > 1):
            yield order[edges[run] : edges[run + 1]]


class _Joined:
    """Disjoint sets."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))
        self._largest: dict[int, float] = {}

    def same(self, a: int, b: int) -> bool:
        return self._root(a) == self._root(b)

    def join(self, a: int, b: int, different: float) -> None:
        low, high = sorted((self._root(a), self._root(b)))
        self._parent[high] = low
        self._largest[low] = max(different, self._largest.get(low, 0.0), self._largest.get(high, 0.0))

    def groups(self) -> list[Alike]:
        members: dict[int, list[int]] = {}
        for place in range(len(self._parent)):
            root = self._root(place)
            if root in self._largest:
                members.setdefault(root, []).append(place)
        return [Alike(places, self._largest[root]) for root, places in members.items()]

    def _root(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place
