"""Which samples are seen how often: `data.weights`, and the share of the training that each of its globs has.

Weights are exact fractions of what the config says in decimals: 0.1 is a tenth.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shards.errors import UserError
from train.data.sampler import Order
from train.geometry import Bucket

if TYPE_CHECKING:
    from shards.read.dataset import Dataset
    from train.config.train import TrainConfig

KINDS = ("clip", "category", "tag")
LEAST = Fraction(1, 1000)


class Share(NamedTuple):
    """What a glob of `data.weights` stands for."""

    glob: str
    weight: float
    samples: float
    """Its share of the samples."""
    seen: float
    """Its share of what is, or was, trained on."""


def sample_weights(dataset: Dataset, ordinals: Sequence[int], weights: Mapping[str, float]) -> list[Fraction]:
    """The weight of each sample: the product over the globs that match it.

    Raises UserError for a glob that matches none of them, and for a product too small to be meant.
    """
    if not weights:
        return [Fraction(1)] * len(ordinals)
    own = {glob: Fraction(str(weight)) for glob, weight in sorted(weights.items())}
    matches = {glob: match(dataset, ordinals, glob) for glob in own}
    for glob, found in matches.items():
        if not found.any():
            _refuse(dataset, ordinals, glob)
    made: dict[tuple[bool, ...], Fraction] = {}
    result = []
    for row in zip(*(found.tolist() for found in matches.values()), strict=True):
        if row not in made:
            made[row] = prod(
                (weight for weight, is_of in zip(own.values(), row, strict=True) if is_of), start=Fraction(1)
            )
            if 0 < made[row] < LEAST:
                globs = [glob for glob, is_of in zip(own, row, strict=True) if is_of]
                raise UserError(
                    f"data.weights: {' × '.join(globs)} is {float(made[row]):g}",
                    expected=f"0, which leaves the samples out, or at least {float(LEAST):g}",
                )
        result.append(made[row])
    return result


def make_order(dataset: Dataset, ordinals: Sequence[int], config: TrainConfig) -> Order:
    """The order of a run over its training side."""
    weights = kept_weights(dataset, ordinals, config.data.weights) if config.data.weights else None
    return Order([dataset.samples[ordinal] for ordinal in ordinals], config.seed, config.data.global_batch, weights)


def kept_weights(dataset: Dataset, ordinals: Sequence[int], weights: Mapping[str, float]) -> list[Fraction]:
    """The weights of what `select_samples` has kept: its globs of weight 0 match none of it."""
    return sample_weights(dataset, ordinals, {glob: weight for glob, weight in weights.items() if weight})


def expected_shares(
    dataset: Dataset, ordinals: Sequence[int], order: Order, weights: Mapping[str, float]
) -> list[Share]:
    """The share of each glob in what an order trains, over many epochs."""
    buckets = set(order.buckets)
    trained = [
        n for n in ordinals if Bucket(*(getattr(dataset.samples[n], side) for side in Bucket._fields)) in buckets
    ]
    each = dict(zip(ordinals, kept_weights(dataset, ordinals, weights), strict=True))
    return _shares(dataset, trained, np.array([float(each[ordinal]) for ordinal in trained]), weights)


def real_shares(dataset: Dataset, uses: Mapping[str, int], weights: Mapping[str, float]) -> list[Share]:
    """The share of each glob in what was trained on: `uses` by key."""
    ordinals = [dataset.ordinal(key) for key in uses]
    return _shares(dataset, ordinals, np.array(list(uses.values()), dtype=float), weights)


def _shares(dataset: Dataset, ordinals: Sequence[int], uses: np.ndarray, weights: Mapping[str, float]) -> list[Share]:
    shares = []
    for glob, weight in weights.items():
        found = match(dataset, ordinals, glob)
        shares.append(Share(glob, weight, float(found.mean()), float(uses[found].sum() / uses.sum())))
    return shares


def match(dataset: Dataset, ordinals: Sequence[int], glob: str) -> np.ndarray:
    """Which of the samples a glob matches, bool."""
    kind, pattern = _parse(glob)
    fits = re.compile(fnmatch.translate(pattern)).match
    known: dict[Collection[str], bool] = {}
    found = np.zeros(len(ordinals), dtype=bool)
    for place, names in enumerate(_names(dataset, ordinals, kind)):
        if names not in known:
            known[names] = any(fits(name) for name in names)
        found[place] = known[names]
    return found


def _parse(glob: str) -> tuple[str, str]:
    kind, colon, pattern = glob.partition(":")
    return (kind, pattern) if colon and kind in KINDS else ("clip", glob)


def _names(dataset: Dataset, ordinals: Sequence[int], kind: str) -> list[tuple[str, ...]]:
    samples = dataset.samples
    if kind == "category":
        return [(name,) if (name := samples[ordinal].category) is not None else () for ordinal in ordinals]
    if kind == "tag":
        return [dataset.tags().get(samples[ordinal].clip_id, ()) for ordinal in ordinals]
    return [(samples[ordinal].clip_id,) for ordinal in ordinals]


def _refuse(dataset: Dataset, ordinals: Sequence[int], glob: str) -> None:
    kind, pattern = _parse(glob)
    words = {"clip": "clip ids", "category": "categories", "tag": "tags"}[kind]
    there = sorted({name for names in _names(dataset, ordinals, kind) for name in names})
    near = difflib.get_close_matches(pattern, there[:10_000], n=3, cutoff=0.3) or there[:3]
    raise UserError(
        f"data.weights: {glob!r} matches none of {len(ordinals):,} samples to train on",
        expected=f"a glob over their {words}"
        + (f", such as {', '.join(map(repr, near))}" if near else ": there is none"),
        fix="`category:GLOB` and `tag:GLOB` name a category or a tag; all else is a clip id",
    )


def describe_shares(shares: Sequence[Share]) -> list[str]:
    """Shares for people, a line each."""
    return [
        f"{share.glob} × {share.weight:g}: {100 * share.samples:.1f} % of the samples, "
        f"{100 * share.seen:.1f} % of the training"
        for share in shares
    ]
