"""Runs of 64 and of 1,024 ranks in one process: who trains what, what a rank holds, what it exchanges."""

from __future__ import annotations

import collections
from typing import NamedTuple

import pytest
import torch
from fake_ranks import exchange_of, fake_group, planned, resident_bytes

from train.config.model import TI2V_5B, LoRAConfig
from train.data.sampler import START, Order
from train.estimate.full import weight_shapes
from train.estimate.memory import block_bytes
from train.geometry import Shape
from train.lora.lora import inject
from train.model.dit import build_model
from train.parallel.fsdp import shard_base
from train.parallel.ranks import Layout


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


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world_size=64),
        Layout(world_size=1024),
        Layout(world_size=64, base_shards=64),
        Layout(world_size=1024, base_shards=8),
        Layout(world_size=1024, ulysses=8),
        Layout(world_size=64, base_shards=8, ulysses=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", ["none", "full"])
def test_what_a_rank_exchanges_is_the_closed_form(layout: Layout, policy: str) -> None:
    """To the byte: LoRA gradients once a step, two gathers a block and micro-step, tokens in three passes."""
    shape, micro_steps = Shape(2, 45), 2
    counted, plan = exchange_of(layout, policy, shape, micro_steps), planned(layout, policy, shape, micro_steps)
    assert counted.calls["all-reduce"] == 1
    assert counted.calls["all-gather"] == (2 * 3 * micro_steps if layout.base_shards > 1 else 0)
    assert counted.bytes["all-reduce"] == pytest.approx(plan.gradient_bytes, abs=1)
    assert counted.bytes["all-gather"] == pytest.approx(plan.base_bytes, abs=1)
    assert counted.bytes["all-to-all"] + counted.bytes["velocity"] == pytest.approx(plan.token_bytes, abs=1)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world_size=8),
        Layout(world_size=8, base_shards=8),
        Layout(world_size=64, base_shards=8),
        Layout(world_size=64, base_shards=64, ulysses=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("train", [None, ["blocks.1-2.ffn", "head"], ["head"], ["text_embedding"]], ids=str)
@pytest.mark.parametrize("policy", ["none", "full"])
def test_what_a_rank_exchanges_where_every_weight_trains(layout: Layout, train: list[str] | None, policy: str) -> None:
    """To the byte: gradients once a step, in float32; two gathers a block and micro-step, one of blocks without any."""
    arguments = layout, policy, Shape(2, 45), 2
    counted = exchange_of(*arguments, lora=None, train=train)
    plan = planned(*arguments, lora=None, train=train)
    reduced = counted.bytes["all-reduce"] + counted.bytes["reduce-scatter"]
    assert reduced == pytest.approx(plan.gradient_bytes, abs=8)
    assert counted.bytes["all-gather"] == pytest.approx(plan.base_bytes, abs=8)
    if train is None:
        assert counted.bytes["all-to-all"] + counted.bytes["velocity"] == pytest.approx(plan.token_bytes, abs=1)


def test_the_planner_knows_every_weight() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in build_model(TI2V_5B, device="meta").named_parameters()}
    assert weight_shapes(TI2V_5B) == shapes


@pytest.mark.parametrize("num_ranks", [64, pytest.param(1024, marks=pytest.mark.slow)])
def test_what_a_rank_holds_of_the_real_model(num_ranks: int) -> None:
    """A 64th or a 1,024th of the blocks, 9.7 GB in bf16, and whole only what is no block's and the LoRA."""
    with fake_group(num_ranks):
        model = build_model(TI2V_5B, torch.bfloat16, "meta")
        inject(model, LoRAConfig(rank=16), 0)
        shard_base(model, torch.distributed.device_mesh.init_device_mesh("cpu", (num_ranks,)), torch.device("cpu"))
        parts, whole = resident_bytes(model)
    assert parts == 30 * block_bytes(TI2V_5B, 2, num_ranks) // num_ranks
    assert whole < 0.5 * 2**30
