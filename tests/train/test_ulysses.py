"""The tokens of a sample shared by ranks: one process's velocity and gradients, whatever divides or does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_a_group, run_ranks
from torch import Tensor
from train_runs import finish

from train.config.model import DiTConfig, LoRAConfig
from train.lora.lora import inject
from train.model.dit import WanDiT, build_model
from train.parallel.ulysses import Ulysses, to_heads, to_tokens

DIMS = DiTConfig(dim=192, num_heads=24, num_layers=3, ffn_dim=100, text_dim=32, text_len=16)
LORA = LoRAConfig(rank=4, targets=("self_attn", "cross_attn", "ffn"), dropout=0.2)
POLICIES: dict[str, Any] = {
    "none": "none",
    "full": "full",
    "mixed": lambda shape: [(), ("attention",), ("projections", "ffn_up")],
}
EVEN, ODD, SHORT = (4, 8), (6, 10), (2, 2)
"""Latent rows and columns: three frames of them are 24, 45 and 3 tokens."""


def build(policy: str, lora: LoRAConfig | None, dtype: torch.dtype, *, compiled: bool = False) -> WanDiT:
    model = build_model(DIMS, dtype, seed=7, param_dtype=None if lora else torch.float32)
    if lora:
        inject(model, lora, 0)
    return finish(model, POLICIES[policy], compiled=compiled)


def passes(model: WanDiT, size: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Velocities of two micro-steps, one with an image-to-video sample, one without; and the gradients of both."""
    generator = torch.Generator().manual_seed(2)
    velocities = []
    for first in (True, False):
        latent = torch.randn(2, 48, 3, *size, generator=generator)
        text = torch.randn(2, 16, 32, generator=generator)
        times, keys = torch.tensor([300.0, 713.25]), torch.tensor([5, 6])
        velocity = model(latent, times, torch.tensor([first, False]), text, keys)
        (velocity - latent).square().mean().backward()
        velocities.append(velocity.detach())
    return velocities, [weight.grad for weight in model.parameters() if weight.requires_grad]


def differences(
    policy: str, size: tuple[int, int], lora: LoRAConfig | None, dtype: torch.dtype, compiled: bool = False
) -> tuple[float, float]:
    """Of the velocity, and of the gradients summed over the ranks, from one process's, relative in the norm."""
    exact, exact_grads = passes(build(policy, lora, dtype), size)
    model = build(policy, lora, dtype, compiled=compiled)
    model.ulysses = Ulysses(dist.group.WORLD.group_name, dist.get_world_size(), dist.get_rank())
    ours, grads = passes(model, size)
    for grad in grads:
        dist.all_reduce(grad)

    def worst(one: list[Tensor], other: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(one, other, strict=True))

    return worst(ours, exact), worst(grads, exact_grads)


@pytest.mark.parametrize(
    ("num_ranks", "policy", "size"),
    [
        (2, "none", ODD),
        (4, "full", ODD),
        (3, "mixed", EVEN),
        (4, "none", SHORT),
        *(
            pytest.param(n, p, s, marks=pytest.mark.slow)
            for n in (2, 4, 6)
            for p in POLICIES
            for s in (EVEN, ODD, SHORT)
        ),
    ],
)
def test_ranks_that_share_the_tokens_give_one_process_s_numbers(
    num_ranks: int, policy: str, size: tuple[int, int]
) -> None:
    """24 heads; tokens that divide, that do not, and fewer than the ranks; a first frame that only some ranks hold."""
    for velocity, gradient in run_ranks(num_ranks, in_a_group, differences, policy, size, LORA, torch.float32):
        assert velocity < 2e-6 and gradient < 5e-6


@pytest.mark.parametrize("policy", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_model_that_trains_whole_does_too(policy: str) -> None:
    """By autograd through the exchanges: also what is no block's, the time and text embeddings, the head."""
    for velocity, gradient in run_ranks(3, in_a_group, differences, policy, ODD, None, torch.float32):
        assert velocity < 2e-6 and gradient < 5e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", ["none", "mixed"])
def test_compiled_blocks_give_one_process_s_numbers(policy: str) -> None:
    """The exchanges are part of the graph: `fullgraph` refuses a break."""
    lora, minutes = LORA.model_copy(update={"dropout": 0.0}), 12  # to compile on two busy cores
    found = run_ranks(2, in_a_group, differences, policy, ODD, lora, torch.float32, True, seconds=60 * minutes)
    for velocity, gradient in found:
        assert velocity < 2e-6 and gradient < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_as_one_process_does(dtype: torch.dtype) -> None:
    """Attention by heads reads the same numbers; sums of a longer or shorter row move the last bits alone."""
    for velocity, gradient in run_ranks(2, in_a_group, differences, "mixed", ODD, LORA, dtype):
        assert velocity < 3e-3 and gradient < 3e-2


def there_and_back(permuted: bool) -> float:
    """Largest error of an exchange's gradient against the one that is known, its input or its gradient permuted."""
    ulysses = Ulysses(dist.group.WORLD.group_name, dist.get_world_size(), dist.get_rank())
    whole = torch.randn(2, 7, 6, 4, generator=torch.Generator().manual_seed(3))  # 7 tokens, 6 heads
    weight = torch.randn(2, 7, 6, 4, generator=torch.Generator().manual_seed(4))
    own = ulysses.own(whole).requires_grad_()
    given = own.transpose(1, 2).contiguous().transpose(1, 2) if permuted else own
    heads = to_heads(ulysses, given, 7)
    mine = slice(ulysses.rank * 2, ulysses.rank * 2 + 2)
    error = float((heads - whole[:, :, mine]).detach().abs().max())
    back = to_tokens(ulysses, heads * heads)
    (back.permute(0, 2, 1, 3) * ulysses.own(weight).permute(0, 2, 1, 3)).sum().backward()
    expected = 2 * ulysses.own(whole) * ulysses.own(weight)
    return max(error, float((own.grad - expected).abs().max()))


@pytest.mark.parametrize("permuted", [False, True])
def test_an_exchange_s_gradient_is_exact_when_what_comes_is_permuted(permuted: bool) -> None:
    """The trap of all-to-all: a permuted gradient that is not made contiguous is right forward and wrong backward."""
    assert max(run_ranks(3, in_a_group, there_and_back, permuted)) < 1e-6
