"""What the latents' statistics show: a shifted channel, a shard of another VAE, odd and constant samples.

Each feature (mean, deviation, smoothness of a channel) of a sample is compared with the median over the dataset, in
units of the samples' own spread (1.4826 × the median absolute deviation). Medians hold as long as most samples are
sound. A shard is judged by the median of its samples, whose error is 1.2533 σ ÷ √(its clips): windows of one clip are
not independent draws. Samples of one latent frame are compared with each other only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
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
"""A normalised latent has mean 0 and deviation 1 a channel; beyond |mean| 1 or a factor of 2 it is reported."""
MIN_CLIPS = 3
_MIN_REFERENCE = 8
_MAD_TO_SIGMA, _MEDIAN_ERROR = 1.4826, 1.2533
_MAX_OUTLIERS, _MAX_FEATURES = 50, 12


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


def find_references(units: Sequence[UnitStats]) -> dict[bool, Reference]:
    """References of videos (False) and of one-frame samples (True), where there are enough samples.

    They are of the samples of smallest hash, so the same ones in whatever order units come.
    """
    references = {}
    for is_image in (False, True):
        hashes = (
            (clip_hash(stats.keys[row], "stats"), unit, row)
            for unit, stats in enumerate(units)
            for row in np.flatnonzero(stats.is_image == is_image).tolist()
        )
        chosen = heapq.nsmallest(REFERENCE_SAMPLES, hashes)
        if len(chosen) >= _MIN_REFERENCE:
            rows = np.stack([units[unit].features[row] for _, unit, row in chosen])
            median = np.median(rows, axis=0)
            spread = _MAD_TO_SIGMA * np.median(np.abs(rows - median), axis=0)
            # Where most samples agree to the last bit any other would be infinitely far: a floor for each kind of
            # feature, a hundredth of the median spread over channels.
            typical = np.maximum(np.median(spread, axis=1, keepdims=True), 1e-4)
            references[is_image] = Reference(median, np.maximum(spread, 0.01 * typical), len(rows))
    return references


def sum_channels(units: Sequence[UnitStats]) -> Channels | None:
    """The table of channels; None without a sample."""
    num = sum(len(stats.keys) for stats in units)
    if not num:
        return None
    sums = np.zeros((3, units[0].features.shape[2]))
    for stats in units:
        mean, std, smooth = stats.features.astype(np.float64).transpose(1, 0, 2)
        sums += np.stack([mean.sum(0), (std**2 + mean**2).sum(0), smooth.sum(0)])
    mean, square, smooth = sums / num
    return Channels(num, mean, np.sqrt(np.maximum(0, square - mean**2)), smooth)


def judge_shard(stats: UnitStats, references: dict[bool, Reference]) -> dict[str, Any] | None:
    """A shard against the dataset, by its worse kind of samples; None where it has too few clips to say anything.

    `largest_errors` is the largest distance in standard errors, `share_off` the share of its features that drift, `off`
    these, worst first.
    """
    verdicts: list[dict[str, Any]] = []
    for is_image, reference in references.items():
        chosen = stats.is_image == is_image
        num_clips = len({stats.clips[row] for row in np.flatnonzero(chosen).tolist()})
        if num_clips < MIN_CLIPS:
            continue
        found = np.median(stats.features[chosen], axis=0)
        error = reference.spread * _MEDIAN_ERROR * np.sqrt(1 / num_clips + 1 / reference.num_samples)
        distance = np.abs(found - reference.median) / error
        places = sorted(np.argwhere(distance > MAX_SHARD_Z).tolist(), key=lambda place: -distance[place[0], place[1]])
        off = [
            {
                "feature": FEATURES[kind],
                "channel": channel,
                "found": float(found[kind, channel]),
                "reference": float(reference.median[kind, channel]),
                "errors": float(distance[kind, channel]),
            }
            for kind, channel in places[:_MAX_FEATURES]
        ]
        share_off = float((distance > MAX_SHARD_Z).mean())
        verdicts.append({"largest_errors": float(distance.max()), "share_off": share_off, "off": off})
    return max(verdicts, key=lambda verdict: verdict["largest_errors"], default=None)


def find_outliers(units: Sequence[UnitStats], references: dict[bool, Reference]) -> list[dict[str, Any]]:
    """The samples beyond MAX_SAMPLE_Z spreads, farthest first, at most fifty: key, distance, which feature it is."""
    found = (item for stats in units for item in _far_samples(stats, references))
    best = heapq.nlargest(_MAX_OUTLIERS, found)
    return [{"key": key, "spreads": distance, "what": what} for distance, key, what in best]


def _far_samples(stats: UnitStats, references: dict[bool, Reference]) -> Iterator[tuple[float, str, str]]:
    for is_image, reference in references.items():
        chosen = np.flatnonzero(stats.is_image == is_image)
        if not len(chosen):
            continue
        distance = np.abs(stats.features[chosen] - reference.median) / reference.spread
        flat = distance.reshape(len(chosen), -1)
        for row in np.flatnonzero(flat.max(axis=1) > MAX_SAMPLE_Z).tolist():
            kind, channel = divmod(int(flat[row].argmax()), distance.shape[2])
            value, usual = stats.features[chosen[row], kind, channel], reference.median[kind, channel]
            what = f"{FEATURES[kind]} of channel {channel} is {value:.3g}, usually {usual:.3g}"
            yield float(flat[row].max()), stats.keys[chosen[row]], what


def channels_off(channels: Channels) -> list[tuple[int, float, float]]:
    """(channel, mean, deviation) of those that are not as a normalised latent's: mean 0, deviation 1.

    Also, where the normalisation is not the trained VAE's: a channel that is far from what the other channels are.
    """
    mean, std = channels.mean, channels.std
    from_others = np.abs(mean - np.median(mean))
    is_off = (np.abs(mean) > EXPECTED_MEAN) | (std < 1 / EXPECTED_STD) | (std > EXPECTED_STD)
    is_off |= from_others > 10 * max(_MAD_TO_SIGMA * float(np.median(from_others)), 0.02)
    return [(channel, float(mean[channel]), float(std[channel])) for channel in np.flatnonzero(is_off).tolist()]
