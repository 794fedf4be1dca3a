"""What the latents' statistics give away: a shifted channel, a shard of another VAE, odd and constant samples.

Each feature (mean, deviation, smoothness of a channel) of a sample is compared with the median over the dataset, in
units of the samples' own spread (1.4826 × the median absolute deviation). Medians stand as long as most samples are
sound. A shard is judged by the median of its samples, whose error is 1.2533 σ ÷ √(its clips): windows of one clip are
no independent draws. Samples of one latent frame are compared with each other only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from shards.format.keys import clip_hash
from shards.stats.features import FEATURES
from shards.stats.unit import UnitStats

REFERENCE_SAMPLES = 4096
"""Samples, chosen by a hash of their keys, whose medians are the reference."""
MAX_SHARD_Z = 6.0
"""A shard's median beyond so many of its standard errors is drift: by chance two in 10⁹ features, of a shard's 144."""
MAX_SAMPLE_Z = 15.0
"""A sample beyond so many spreads of the samples is an outlier; the features' tails are longer than a normal's."""
OTHER_VAE_SHARE = 0.25
"""Where so large a share of a shard's features drifts, it is not a channel that is off, but the encoder."""
EXPECTED_MEAN, EXPECTED_STD = 1.0, 2.0
"""A normalised latent has mean 0 and deviation 1 a channel; beyond |mean| 1 or a factor of 2 it is worth a word."""
MIN_CLIPS = 3
_MIN_REFERENCE = 8
_MAD_TO_SIGMA, _MEDIAN_ERROR = 1.4826, 1.2533
_MAX_OUTLIERS = 50


class Reference(NamedTuple):
    """Medians and spreads of the features over the dataset, for one kind of sample."""

    median: np.ndarray
    """float32 [3, C]."""
    spread: np.ndarray
    """float32 [3, C], as a normal's σ."""
    num_samples: int


class Channels(NamedTuple):
    """Sums over all samples, for the table of channels."""

    num_samples: int
    mean: np.ndarray
    """float64 [C]: mean over samples of their mean."""
    std: np.ndarray
    """float64 [C]: of all elements."""
    smoothness: np.ndarray


class ShardVerdict(NamedTuple):
    """How one shard stands against the dataset."""

    unit: int
    num_samples: int
    share_off: float
    """Share of its features that drift."""
    worst: float
    """Largest distance in standard errors."""
    off: list[dict[str, Any]]
    """The features that drift, worst first: feature, channel, found, reference, errors."""


class ReferenceBuilder:
    """Collects the reference samples of a stream of units: the same ones in whatever order they come."""

    def __init__(self) -> None:
        self._rows = {False: _Smallest(REFERENCE_SAMPLES), True: _Smallest(REFERENCE_SAMPLES)}
        self._sums: list[np.ndarray] = []
        self._num = 0

    def add(self, stats: UnitStats) -> None:
        """Take a unit's part."""
        if not len(stats.keys):
            return
        for place, key in enumerate(stats.keys):
            self._rows[bool(stats.is_image[place])].add(clip_hash(key, "stats"), stats.features[place])
        values = stats.features.astype(np.float64)
        mean, std, smooth = values[:, 0], values[:, 1], values[:, 2]
        sums = np.stack([mean.sum(0), (std**2 + mean**2).sum(0), smooth.sum(0)])
        if not self._sums:
            self._sums = [np.zeros_like(sums)]
        if self._sums[0].shape == sums.shape:
            self._sums[0] += sums
            self._num += len(mean)

    def channels(self) -> Channels | None:
        """The table of channels; None without a sample."""
        if not self._num:
            return None
        mean, square, smooth = self._sums[0] / self._num
        return Channels(self._num, mean, np.sqrt(np.maximum(0, square - mean**2)), smooth)

    def references(self) -> dict[bool, Reference]:
        """References of videos (False) and of one-frame samples (True), where there are enough samples."""
        return {
            is_image: _reference(np.stack(rows))
            for is_image, smallest in self._rows.items()
            if len(rows := smallest.rows()) >= _MIN_REFERENCE and len({row.shape for row in rows}) == 1
        }


class _Smallest:
    """The `num` rows of smallest hash among those added."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._limit: int | None = None
        self._found: list[tuple[int, int, np.ndarray]] = []

    def add(self, value: int, row: np.ndarray) -> None:
        if self._limit is None or value <= self._limit:
            self._found.append((value, len(self._found), row))  # the place: rows cannot be compared
            if len(self._found) >= 2 * self._num:
                self._cut()

    def rows(self) -> list[np.ndarray]:
        self._cut()
        return [row for *_, row in self._found]

    def _cut(self) -> None:
        self._found = sorted(self._found)[: self._num]
        if len(self._found) == self._num:
            self._limit = self._found[-1][0]


def _reference(rows: np.ndarray) -> Reference:
    median = np.median(rows, axis=0)
    spread = _MAD_TO_SIGMA * np.median(np.abs(rows - median), axis=0)
    # Where most samples agree to the last bit any other would be infinitely far.
    return Reference(median, np.maximum(spread, 0.01 * _typical(spread)), len(rows))


def _typical(spread: np.ndarray) -> np.ndarray:
    """A floor for each kind of feature: the median spread over channels, never nothing."""
    return np.maximum(np.median(spread, axis=1, keepdims=True), 1e-4)


def judge_shard(unit: int, stats: UnitStats, references: dict[bool, Reference]) -> ShardVerdict | None:
    """A shard against the dataset; None where it has too few clips to say anything."""
    worst_of = None
    for is_image, reference in references.items():
        chosen = stats.is_image == is_image
        num_clips = len({clip for clip, is_one in zip(stats.clips, chosen, strict=True) if is_one})
        if num_clips < MIN_CLIPS or stats.features.shape[1:] != reference.median.shape:
            continue
        found = np.median(stats.features[chosen], axis=0)
        error = reference.spread * _MEDIAN_ERROR * np.sqrt(1 / num_clips + 1 / reference.num_samples)
        distance = np.abs(found - reference.median) / error
        verdict = ShardVerdict(
            unit,
            len(stats.keys),
            float((distance > MAX_SHARD_Z).mean()),
            float(distance.max()),
            list(_features_off(found, reference.median, distance)),
        )
        if worst_of is None or verdict.worst > worst_of.worst:
            worst_of = verdict
    return worst_of


def _features_off(found: np.ndarray, reference: np.ndarray, distance: np.ndarray) -> Iterator[dict[str, Any]]:
    places = np.argwhere(distance > MAX_SHARD_Z)
    for kind, channel in sorted(places.tolist(), key=lambda place: -distance[place[0], place[1]])[:12]:
        yield {
            "feature": FEATURES[kind],
            "channel": channel,
            "found": float(found[kind, channel]),
            "reference": float(reference[kind, channel]),
            "errors": float(distance[kind, channel]),
        }


def sample_distances(stats: UnitStats, references: dict[bool, Reference]) -> Iterator[tuple[float, str, str]]:
    """For each sample beyond MAX_SAMPLE_Z: its largest distance in spreads, its key, and which feature it is."""
    for is_image, reference in references.items():
        chosen = np.flatnonzero(stats.is_image == is_image)
        if not len(chosen) or stats.features.shape[1:] != reference.median.shape:
            continue
        distance = np.abs(stats.features[chosen] - reference.median) / reference.spread
        flat = distance.reshape(len(chosen), -1)
        worst = flat.argmax(axis=1)
        for row in np.flatnonzero(flat.max(axis=1) > MAX_SAMPLE_Z).tolist():
            kind, channel = divmod(int(worst[row]), distance.shape[2])
            value = float(stats.features[chosen[row], kind, channel])
            words = (
                f"{FEATURES[kind]} of channel {channel} is {value:.3g}, usually {reference.median[kind, channel]:.3g}"
            )
            yield float(flat[row].max()), stats.keys[int(chosen[row])], words


def largest(found: Iterable[tuple[float, str, str]]) -> list[dict[str, Any]]:
    """The largest distances, at most fifty, as plain values."""
    best = heapq.nlargest(_MAX_OUTLIERS, found)
    return [{"key": key, "spreads": distance, "what": what} for distance, key, what in best]


def channels_off(channels: Channels, reference: Reference | None) -> list[dict[str, Any]]:
    """Channels of the whole dataset that are not as a normalised latent's: mean 0, deviation 1.

    Also, where the normalisation is not the trained VAE's: a channel that is far from what the other channels are.
    """
    off = []
    others = _far_from_the_others(channels.mean)
    for channel, (mean, std) in enumerate(zip(channels.mean.tolist(), channels.std.tolist(), strict=True)):
        if abs(mean) > EXPECTED_MEAN or not 1 / EXPECTED_STD <= std <= EXPECTED_STD or channel in others:
            median = float(reference.median[0, channel]) if reference else mean
            off.append({"channel": channel, "mean": mean, "std": std, "median_mean": median})
    return off


def _far_from_the_others(values: np.ndarray) -> set[int]:
    median = np.median(values)
    spread = max(_MAD_TO_SIGMA * float(np.median(np.abs(values - median))), 0.02)
    return set(np.flatnonzero(np.abs(values - median) > 10 * spread).tolist())


def share_words(items: Sequence[dict[str, Any]]) -> str:
    """The features that drift, for a line of text."""
    words = [f"{item['feature']} of channel {item['channel']}: {item['found']:.3g}, elsewhere {item['reference']:.3g}"
             for item in items[:3]]  # fmt: skip
    return "; ".join(words) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")
