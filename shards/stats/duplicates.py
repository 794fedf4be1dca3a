"""Which samples show the same pictures: equal bytes, or fingerprints of latents that hardly differ.

Fingerprints (hundreds of bits, `features.py`) are cut into bands of 32 bits. Samples that share a band are
compared; two of which 5 % of the bits differ share one of 24 bands with probability 0.99, two that have nothing in
common with 24 / 2³². So a dataset is searched in a few sorts, not in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from shards.stats.unit import UnitStats

MAX_DIFFERENT = 0.04
"""Share of bits in which two samples of the same pictures may differ."""
_BAND_BYTES = 4
_MAX_GROUPS, _MAX_NAMED = 200, 20


class Alike(NamedTuple):
    """Samples that show the same pictures."""

    members: list[int]
    """Their places, ascending."""
    largest_difference: float
    """Largest share of differing bits of the pairs that joined them; 0: equal."""


def find_duplicates(units: Sequence[UnitStats]) -> list[dict[str, Any]]:
    """Groups of samples that show the same, as plain values: what is equal, by how much it differs, the members."""
    units = [stats for stats in units if stats.keys]
    if not units:
        return []
    keys, clips, digests, previews = (
        list(chain.from_iterable(getattr(stats, field) for stats in units))
        for field in ("keys", "clips", "digests", "previews")
    )
    prints = np.concatenate([stats.prints for stats in units])
    # Constant latents are a finding of their own: they show no pictures that could be the same.
    varies: list[bool] = np.any(prints, axis=1).tolist()
    digests = [digest if it else "" for digest, it in zip(digests, varies, strict=True)]
    found: dict[frozenset[int], dict[str, Any]] = {}
    for what, groups in (
        ("the same latent", find_equal(digests, clips)),
        ("the same preview strip", find_equal(previews, clips)),
        ("nearly the same latent", find_alike(prints, clips)),
    ):
        for members, difference in groups:
            group = {
                "what": what,
                "difference": round(difference, 4),
                "num": len(members),
                "keys": [keys[place] for place in members[:_MAX_NAMED]],
                "clips": sorted({clips[place] for place in members})[:_MAX_NAMED],
            }
            found.setdefault(frozenset(members), group)
    return sorted(found.values(), key=lambda item: (item["difference"], -item["num"]))[:_MAX_GROUPS]


def find_alike(prints: np.ndarray, clips: Sequence[str]) -> list[Alike]:
    """Groups of samples with nearly equal fingerprints (uint8 [N, B]) that hold more than one clip.

    Windows of one clip may look alike, which is no finding. A print without a set bit is that of a latent that does not
    vary, and is like no other.
    """
    return _of_several_clips(_join(_near_pairs(prints, clips)), clips)


def find_equal(digests: Sequence[str], clips: Sequence[str]) -> list[Alike]:
    """Groups of samples of equal digests that hold more than one clip; an empty digest is none."""
    places: dict[str, list[int]] = {}
    for place, digest in enumerate(digests):
        if digest:
            places.setdefault(digest, []).append(place)
    return _of_several_clips((Alike(members, 0.0) for members in places.values()), clips)


def _of_several_clips(groups: Iterable[Alike], clips: Sequence[str]) -> list[Alike]:
    return [group for group in groups if len({clips[member] for member in group.members}) > 1]


def _near_pairs(prints: np.ndarray, clips: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    num_bits = prints.shape[1] * 8
    varies = np.flatnonzero(prints.any(axis=1))
    for run in _shared_bands(prints[varies]):
        places = varies[run]
        if len({clips[place] for place in places.tolist()}) == 1:
            continue
        # Against the first and the one before: in a run of thousands every pair would be millions.
        for ones, others in ((places[1:], places[:-1]), (places[2:], np.broadcast_to(places[0], len(places) - 2))):
            different = np.bitwise_count(prints[ones] ^ prints[others]).sum(axis=1)
            for near in np.flatnonzero(different <= MAX_DIFFERENT * num_bits).tolist():
                yield int(ones[near]), int(others[near]), int(different[near]) / num_bits


def _shared_bands(prints: np.ndarray) -> Iterator[np.ndarray]:
    num_bands = prints.shape[1] // _BAND_BYTES if len(prints) else 0
    for band in range(num_bands):
        # Every num_bands-th byte: a band takes bits of many channels, not the cells of a few.
        values = np.ascontiguousarray(prints[:, band::num_bands][:, :_BAND_BYTES]).view(np.uint32)[:, 0]
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(np.diff(values[order], prepend=values[order[:1]] + 1, append=values[order[-1:]] + 1))
        for run in np.flatnonzero(np.diff(edges) > 1):
            yield order[edges[run] : edges[run + 1]]


def _join(pairs: Iterable[tuple[int, int, float]]) -> list[Alike]:
    """Disjoint sets from pairs of places and how much these differ."""
    parent: dict[int, int] = {}
    largest: dict[int, float] = {}

    def root(place: int) -> int:
        while (above := parent.setdefault(place, place)) != place:
            parent[place] = parent[above]
            place = parent[place]
        return place

    for one, other, difference in pairs:
        low, high = sorted((root(one), root(other)))
        if low != high:
            parent[high] = low
            largest[low] = max(difference, largest.get(low, 0.0), largest.get(high, 0.0))
    members: dict[int, list[int]] = {}
    for place in sorted(parent):
        members.setdefault(root(place), []).append(place)
    return [Alike(places, largest[top]) for top, places in members.items()]
