"""A base that is streamed through a copier that is late, at random, and leaves NaN where it has not been yet."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from train_runs import lora_parameters

from train.config.model import DiTConfig, LoRAConfig
from train.lora.lora import inject, reset
from train.model import stream
from train.model.dit import WanDiT, build_model, init_random
from train.model.stream import BlockStream, Copier, place_base

DIMS = DiTConfig(dim=48, num_heads=2, num_layers=4, ffn_dim=96, text_dim=32, text_len=16)
LORA = LoRAConfig(rank=4, targets=("self_attn", "cross_attn", "ffn"))


def late_copier(device: torch.device, seed: int = 0, most_seconds: float = 0.002) -> Copier:
    """Never in time: a copy takes half a millisecond to two."""
    delays = random.Random(seed)
    return Copier(device, lambda: time.sleep(most_seconds * (0.25 + 0.75 * delays.random())))


class LatestCopier(Copier):
    """As late as it may be: a copy is made when it is waited for, after those that were begun before it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._begun: list[tuple[Tensor, weakref.ref[Tensor]]] = []

    def copy(self, target: Tensor, source: Tensor) -> Any:
        target.view(torch.uint8).fill_(255)
        self._begun.append((target, weakref.ref(source)))
        return target

    def wait(self, done: Any) -> None:
        while any(target is done for target, _ in self._begun):
            target, reference = self._begun.pop(0)
            source = reference()
            if source is not None:
                target.copy_(source)


def park(blocks: BlockStream) -> None:
    """Let a block that is not resident hold NaN, as a GPU would refuse what lies in the host's memory."""
    for views in blocks.host_views:
        views[:] = [torch.full(view.shape, 255, dtype=torch.uint8).view(view.dtype) if view.element_size() == 1
                    else torch.full_like(view, torch.nan) for view in views]  # fmt: skip


@contextmanager
def late_copies(make: Callable[[torch.device], Copier] = late_copier) -> Iterator[None]:
    """Late copiers for all that is streamed inside the `with`, and NaN where a block is not resident."""
    plain, built = stream.make_copier, BlockStream.enter
    stream.make_copier = make

    def enter(self: BlockStream, index: int, following: int | None) -> None:
        if self._held == [None, None]:  # the first: numbers are loaded by now
            park(self)
            for held, views in enumerate(self.host_views):
                self._point(held, views)
        built(self, index, following)

    BlockStream.enter = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        stream.make_copier, BlockStream.enter = plain, built  # type: ignore[method-assign]


def make_placed(
    dims: DiTConfig,
    lora: LoRAConfig,
    dtype: torch.dtype = torch.float32,
    *,
    kind: Any = None,
    streamed: bool = False,
    seed: int = 0,
) -> WanDiT:
    """A model with random weights whose base is kept as asked, and a LoRA that has not trained."""
    model = build_model(dims, dtype, "meta")
    inject(model, lora, 0)
    model.stream = place_base(model, torch.device("cpu"), kind, streamed=streamed)
    init_random(model, seed)
    reset(model, 0)
    return model


def passes(model: WanDiT) -> list[Tensor]:
    """Velocities of two micro-steps and of an evaluation between them, and the LoRA's gradients."""
    generator = torch.Generator().manual_seed(2)
    results = []
    for first in (True, False):
        latent = torch.randn(2, 48, 3, 4, 6, generator=generator)
        text = torch.randn(2, 16, 32, generator=generator)
        keys = torch.tensor([5, 6])
        velocity = model(latent, torch.tensor([300.0, 713.25]), torch.tensor([first, False]), text, keys)
        velocity.square().mean().backward()
        with torch.no_grad():
            results.append(model.eval()(latent, torch.tensor([1.0, 2.0]), torch.tensor([False, first]), text))
        model.train()
        results.append(velocity.detach())
    return results + [weight.grad for weight in lora_parameters(model)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
