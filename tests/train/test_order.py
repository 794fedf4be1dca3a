"""Order: a function of (seed, epoch, key); nothing padded, repeated or left out; a state of two numbers."""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from train.data.sampler import START, Order, Position, hash_key

GOLDEN_HASH = 4234898429108722499
GOLDEN_ORDER = [(8, 6), (10, 9), (5, 4), (3, 2), (1, 0)]


class Sample(NamedTuple):
    key: str
    frames: int
    height: int
    width: int


def samples(*counts: int) -> list[Sample]:
    """`counts[i]` samples of the i-th size."""
    return [
        Sample(f"clip{size}-{n}", 17 + 4 * size, 96, 160) for size, count in enumerate(counts) for n in range(count)
    ]


def walk(order: Order, num_epochs: int) -> list[tuple[int, tuple[int, ...]]]:
    position, batches = START, []
    while position.epoch < num_epochs:
        batches.append((position.epoch, order.batch(position).ordinals))
        position = order.next(position)
    return batches


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_each_bucket_is_used_evenly_over_epochs(counts, global_batch, seed):
    data = samples(*counts)
    if all(count < global_batch for count in counts):
        with pytest.raises(UserError, match="no bucket can fill a batch"):
            Order(data, seed, global_batch)
        return
    order = Order(data, seed, global_batch)
    num_epochs = 5
    batches = walk(order, num_epochs)
    used = Counter(ordinal for _, batch in batches for ordinal in batch)
    for size, count in enumerate(counts):
        mine = [ordinal for ordinal, sample in enumerate(data) if sample.frames == 17 + 4 * size]
        if count < global_batch:
            assert not any(used[ordinal] for ordinal in mine)
            continue
        # Every sample once an epoch, but for less than a batch that waits for the next one.
        assert sum(used[ordinal] for ordinal in mine) == num_epochs * count // global_batch * global_batch
        assert {used[ordinal] for ordinal in mine} <= {num_epochs - 1, num_epochs}
    for _, batch in batches:
        assert len({data[ordinal].frames for ordinal in batch}) == 1 and len(batch) == global_batch


def test_remainder_begins_the_next_epoch():
    order = Order(samples(7), seed=0, global_batch=3)
    batches = walk(order, 3)
    assert [epoch for epoch, _ in batches] == [0, 0, 1, 1, 2, 2, 2]
    line = sorted((ordinal for _, batch in batches for ordinal in batch), key=str)
    assert Counter(line) == dict.fromkeys(range(7), 3)


def test_order_knows_keys_not_places():
    data = samples(20, 9)
    forwards, backwards = Order(data, 3, 4), Order(data[::-1], 3, 4)
    for (_, ours), (_, theirs) in zip(walk(forwards, 3), walk(backwards, 3), strict=True):
        assert [data[ordinal].key for ordinal in ours] == [data[::-1][ordinal].key for ordinal in theirs]


def test_seed_and_epoch_change_the_order():
    data = samples(64)
    orders = {tuple(b for _, b in walk(Order(data, seed, 8), 1)) for seed in range(4)}
    assert len(orders) == 4
    batches = walk(Order(data, 0, 8), 2)
    assert [b for epoch, b in batches if epoch == 0] != [b for epoch, b in batches if epoch == 1]


def test_buckets_are_mixed_through_the_epoch():
    order = Order(samples(80, 80), 0, 4)
    kinds = [order.batch(Position(0, n)).bucket.frames for n in range(order.num_batches(0))]
    changes = sum(first != second for first, second in pairwise(kinds))
    assert 10 < changes < 30


def test_any_position_is_reached_without_walking():
    order = Order(samples(23, 11), seed=5, global_batch=4)
    position = START
    for step in range(1, 60):
        assert order.position_of_step(step) == position
        position = order.next(position)
    fresh = Order(samples(23, 11), seed=5, global_batch=4)
    assert fresh.batch(Position(6, 2)) == order.batch(Position(6, 2))


def test_a_bucket_too_small_is_reported_and_an_empty_order_says_why():
    order = Order(samples(8, 3), seed=0, global_batch=4)
    assert [(str(bucket), count) for bucket, count in order.too_small.items()] == [("160×96×21", 3)]
    assert order.num_samples == 8
    with pytest.raises(UserError, match="160×96×17 has 3") as caught:
        Order(samples(3), seed=0, global_batch=4)
    assert "data.global_batch" in str(caught.value)


def test_order_is_what_it_was():
    # A change here changes the order of every run: raise ORDER_VERSION.
    assert hash_key("clip0-1") == GOLDEN_HASH
    assert [order for _, order in walk(Order(samples(6, 5), seed=1, global_batch=2), 1)] == GOLDEN_ORDER
