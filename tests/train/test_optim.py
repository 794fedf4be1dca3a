"""Optimizer state, schedule, clipping, average."""

import math

import pytest
import torch
from torch import nn

from shards.errors import UserError
from train.config.train import OptimConfig
from train.optim import (
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    update_average,
)


def test_learning_rate_rises_then_follows_its_schedule():
    def course(**changes):
        config = OptimConfig(lr=1.0, warmup_updates=4, final_lr_share=0.1, **changes)
        return [learning_rate(config, updates, 24) for updates in range(25)]

    for schedule in ("constant", "cosine", "linear"):
        assert course(schedule=schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(course(schedule="constant")[4:]) == {1.0}
    assert course(schedule="linear")[14] == pytest.approx(0.55) and course(schedule="linear")[24] == pytest.approx(0.1)
    cosine = course(schedule="cosine")
    assert cosine[14] == pytest.approx(0.1 + 0.9 * 0.5) and cosine[24] == pytest.approx(0.1)
    assert cosine[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_clipping_is_torchs():
    ours, theirs = ([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))] for _ in range(2))
    for first, second in zip(ours, theirs, strict=True):
        first.grad = torch.arange(first.numel(), dtype=torch.float32).view_as(first)
        second.grad = first.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert clip_gradients(ours, 0.5) == pytest.approx(expected.item())
    assert all(first.grad.equal(second.grad) for first, second in zip(ours, theirs, strict=True))
    assert clip_gradients(ours, None) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_goes_through_tensors_to_the_bit(name):
    config = OptimConfig(name=name, lr=1e-2, min_8bit_size=32, weight_decay=0.01)

    def make():
        generator = torch.Generator().manual_seed(0)
        weights = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in (("a", (16, 8)), ("a.b", (4, 4)))}
        return weights, make_optimizer(weights.values(), config)

    def steps(weights, optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    straight, optimizer = make()
    steps(straight, optimizer, 0, 6)
    weights, optimizer = make()
    steps(weights, optimizer, 0, 3)
    tensors = optimizer_tensors(optimizer, {weight: name for name, weight in weights.items()})
    resumed, fresh = make()
    for name_of, weight in resumed.items():
        weight.data.copy_(weights[name_of])
    load_optimizer_tensors(fresh, {weight: name for name, weight in resumed.items()}, tensors)
    steps(resumed, fresh, 3, 6)
    assert all(resumed[name_of].equal(weight) for name_of, weight in straight.items())
    if name == "adamw8bit":
        assert tensors["a.state1"].dtype == torch.uint8 and "a.absmax1" in tensors
        assert tensors["a.b.state1"].dtype == torch.float32  # fewer elements than min_8bit_size
    other, another = make()
    with pytest.raises(UserError, match="does not fit"):
        load_optimizer_tensors(another, {weight: f"x.{name}" for name, weight in other.items()}, tensors)


def test_state_of_the_other_optimizer_is_refused():
    weight = nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    first = make_optimizer([weight], OptimConfig(name="adamw8bit", min_8bit_size=32))
    first.step()
    second = make_optimizer([weight], OptimConfig(name="adamw"))
    with pytest.raises(UserError, match="state1"):
        load_optimizer_tensors(second, {weight: "w"}, optimizer_tensors(first, {weight: "w"}))


def test_average_follows_slowly_and_forgets_the_start():
    weights = {"w": torch.zeros(3)}
    average = {"w": torch.zeros(3)}
    weights["w"] += 1
    update_average(average, weights, 0.99, 1)
    assert average["w"][0] == pytest.approx(1 - 2 / 11)
    for updates in range(2, 2000):
        update_average(average, weights, 0.99, updates)
    assert average["w"][0] == pytest.approx(1.0, abs=1e-5)
