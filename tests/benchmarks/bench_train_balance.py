"""Padding and imbalance: useful FLOPs ÷ (ranks × the busiest rank), over an epoch of a manifest of mixed sizes. Counts.

Useful is what one process would execute for the samples of a step. The busiest rank executes its slots (all of a step
are of one bucket), under Ulysses its stretch of the tokens with padding, its heads, and text and time embeddings like
every rank of its sequence. For comparison: the same samples dealt at random, as a loader without buckets would.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from train.config.model import TI2V_5B, LoRAConfig
from train.config.train import DataConfig, slots_per_rank
from train.data.sampler import Order
from train.estimate.communication import rank_flops
from train.geometry import SAVE_GROUPS, Bucket, Shape, num_tokens

PROMISE = 0.97
NUM_SAMPLES = 20_000
# Shares of a broadcast archive cut at five lengths, wide and upright, large and small, and some pictures.
MANIFEST = {
    Bucket(17, 704, 1280): 0.20,
    Bucket(49, 704, 1280): 0.25,
    Bucket(121, 704, 1280): 0.05,
    Bucket(49, 1280, 704): 0.03,
    Bucket(33, 480, 832): 0.12,
    Bucket(49, 480, 832): 0.20,
    Bucket(81, 480, 832): 0.09,
    Bucket(81, 832, 480): 0.01,
    Bucket(1, 704, 1280): 0.05,
}
LAYOUTS = ((2, 1), (8, 1), (16, 1), (64, 1), (2, 2), (16, 2), (64, 2), (64, 4), (64, 8))
"""Ranks, and how many of them share a sample."""


class Sample(NamedTuple):
    """A line of the manifest."""

    key: str
    frames: int
    height: int
    width: int


@lru_cache
def flops(bucket: Bucket, ulysses: int) -> float:
    """A rank's for one sample, nothing computed twice."""
    shape = Shape(1, num_tokens(TI2V_5B, *bucket))
    return rank_flops(TI2V_5B, shape, LoRAConfig(), (SAVE_GROUPS,) * TI2V_5B.num_layers, ulysses)


def make_manifest() -> list[Sample]:
    """Samples in the manifest's shares."""
    chosen = random.Random(0).choices(list(MANIFEST), list(MANIFEST.values()), k=NUM_SAMPLES)
    return [Sample(f"clip-{number:06d}", *bucket) for number, bucket in enumerate(chosen)]


def balance(steps: Sequence[Sequence[Bucket]], num_ranks: int, ulysses: int) -> float:
    """Useful FLOPs ÷ (ranks × busiest rank) where each share of ranks takes a contiguous part of every step."""
    useful = busiest = 0.0
    for buckets in steps:
        share = len(buckets) * ulysses // num_ranks
        parts = [buckets[start : start + share] for start in range(0, len(buckets), share)]
        useful += sum(flops(bucket, 1) for bucket in buckets)
        busiest += max(sum(flops(bucket, ulysses) for bucket in part) for part in parts)
    return useful / (num_ranks * busiest)


def main() -> int:
    """Print the ratios; 1 when the promise is broken where a layout is meant for such a manifest."""
    samples, broken = make_manifest(), []
    for num_ranks, ulysses in LAYOUTS:
        batch = max(16, num_ranks // ulysses)
        slots_per_rank(DataConfig(root="shards", global_batch=batch), num_ranks // ulysses)
        order = Order(samples, 0, batch)
        position, steps = order.position_of_step(1), []
        while position.epoch == 0:
            steps.append([order.batch(position).bucket] * batch)
            position = order.next(position)
        mixed = [Bucket(s.frames, s.height, s.width) for s in random.Random(1).sample(samples, len(steps) * batch)]
        dealt = [mixed[start : start + batch] for start in range(0, len(mixed), batch)]
        ratio = balance(steps, num_ranks, ulysses)
        name = f"{num_ranks} ranks, Ulysses {ulysses}, batch {batch}"
        words = f"{name}: {ratio:.4f} (promise ≥ {PROMISE}); without buckets {balance(dealt, num_ranks, ulysses):.3f}"
        print(words if ratio >= PROMISE else words + "  BROKEN")
        broken += [name] if ratio < PROMISE else []
        left = len(samples) - sum(map(len, steps))
        assert left < batch * len(order.buckets), "an epoch leaves less than a batch of each bucket for the next"
    for ulysses in (2, 4, 8):
        worst = min(MANIFEST, key=lambda bucket: flops(bucket, 1) / flops(bucket, ulysses))
        share = flops(worst, 1) / (ulysses * flops(worst, ulysses))
        print(f"Ulysses {ulysses}, the size that it suits least: {worst} {share:.4f}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
