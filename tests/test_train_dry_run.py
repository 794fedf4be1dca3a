"""Runs of 64 and of 1,024 ranks in one process: who trains what, what a rank holds, what it exchanges."""

from __future__ import annotations

import collections
from typing import NamedTuple

import pytest

from train.order import START, Order


class Clip(NamedTuple):
    """A sample as the order sees it."""

    key: str
    frames: int
    height: int
    width: int


SIZES = ((49, 480, 832), (49, 832, 480), (17, 704, 1280))


def corpus(count: int) -> list[Clip]:
    """Samples of three sizes, seven of ten in the first."""
    return [Clip(f"clip-{i:06d}", *SIZES[0 if i % 10 < 7 else 1 + i % 2]) for i in range(count)]


@pytest.mark.parametrize("num_ranks", [64, 1024])
def test_the_order_is_dealt_out_without_loss(num_ranks: int) -> None:
    """Every sample of every bucket exactly once an epoch but for what carries over, whoever holds the slot."""
    samples = corpus(20_480)
    share = 2
    order = Order(samples, seed=3, global_batch=share * num_ranks)
    seen: collections.Counter[int] = collections.Counter()
    position = START
    while position.epoch < 3:
        batch = order.batch(position)
        dealt = [batch.ordinals[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
        assert sum(dealt, ()) == batch.ordinals
        assert len({(samples[o].frames, samples[o].height) for o in batch.ordinals}) == 1
        seen.update(batch.ordinals)
        position = order.next(position)
    assert len(seen) == len(samples)
    assert set(seen.values()) <= {2, 3}  # a remainder is trained in the next epoch
