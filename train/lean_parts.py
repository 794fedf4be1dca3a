"""What a block with a written-out backward pass is made of (train/lean.py), and its linears, forward and backward.

Shapes: B slots, L tokens, M = B·L, I O input and output channels of a linear, r LoRA rank, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from train.between import Turn
from train.ulysses import Ulysses

Values = dict[str, Tensor]
Gradients = dict[str, tuple[Tensor, Tensor]]
"""By linear: of A and of B, in the compute dtype."""


class LoRAParts(NamedTuple):
    """A LoRA beside a linear, in the compute dtype."""

    down_rI: Tensor
    up_Or: Tensor
    scale: float
    """What its update is multiplied by; 1 / (1 - dropout) included."""
    live_MI: Tensor | None
    """Dropout: which of its inputs live, bool."""


class LinearParts(NamedTuple):
    """One linear as the block computes it, in the compute dtype."""

    weight_OI: Tensor
    bias_O: Tensor
    lora: LoRAParts | None


class BlockParts(NamedTuple):
    """Frozen tensors of a block, and its LoRA."""

    linears: dict[str, LinearParts]
    norms: dict[str, Tensor]
    """Float32 weights: `self_attn.q`, `self_attn.k`, `cross_attn.q`, `cross_attn.k`, `norm3`, `norm3.bias`."""
    modulation_16D: Tensor


class Shared(NamedTuple):
    """What all blocks of a forward pass read."""

    rows_BR6D: Tensor
    text_BSD: Tensor
    turn: Turn
    zeros_BL1: Tensor
    """Zeros and ones stand for mean and scale where a normalised input is normalised no further."""
    ones_BL1: Tensor
    num_first: int
    heads: tuple[int, int]
    eps: float
    kernel: str
    ulysses: Ulysses | None = None
    """The ranks that share the samples' tokens; None: all tokens are here."""
    num_tokens: int = 0
    """Tokens of a sample, wherever they are."""


def low_rank(lora: LoRAParts, x_MI: Tensor) -> Tensor:
    return (x_MI if lora.live_MI is None else x_MI * lora.live_MI) @ lora.down_rI.t()


def linear(values: Values, name: str, x_BLI: Tensor, parts: BlockParts) -> Tensor:
    """x W' + b + scale · B A x. The low-rank product is put by for the backward pass, unless it is there."""
    part, x_MI = parts.linears[name], x_BLI.flatten(0, 1)
    out_MO = torch.addmm(part.bias_O, x_MI, part.weight_OI.t())
    if part.lora is not None:
        if f"{name}.low" not in values:
            values[f"{name}.low"] = low_rank(part.lora, x_MI)
        out_MO.addmm_(values[f"{name}.low"], part.lora.up_Or.t(), alpha=part.lora.scale)
    return out_MO.unflatten(0, x_BLI.shape[:2])


def joint_low_rank(values: Values, names: Sequence[str], x_BLI: Tensor, parts: BlockParts) -> None:
    """Put by the low-rank products of linears that share their input: one GEMM, where no dropout sets them apart."""
    names = [name for name in names if parts.linears[name].lora is not None]
    downs = _joint_downs(names, parts)
    if downs is not None:
        low_MR = x_BLI.flatten(0, 1) @ torch.cat(downs).t()
        lows = low_MR.split([len(down_rI) for down_rI in downs], dim=1)
        for name, low_Mr in zip(names, lows, strict=True):
            values[f"{name}.low"] = low_Mr


def _joint_downs(names: Collection[str], parts: BlockParts) -> list[Tensor] | None:
    """The A of several LoRAs that take one and the same input; None where there are not several, or dropout is on."""
    loras = [cast(LoRAParts, parts.linears[name].lora) for name in names]
    if len(loras) < 2 or any(lora.live_MI is not None for lora in loras):
        return None
    return [lora.down_rI for lora in loras]


def linear_backward(
    values: Values, name: str, grad_BLO: Tensor, x_BLI: Tensor, parts: BlockParts, grads: Gradients
) -> Tensor:
    """Gradient of a linear's input; those of its LoRA go into `grads`.

    `x_BLI`, the linear's input, is read only where it has a LoRA.
    """
    dx_BLI = base_backward(name, grad_BLO, parts)
    if parts.linears[name].lora is not None:
        low_rank_backward({name: up_backward(values, name, grad_BLO, parts)}, x_BLI, parts, grads, dx_BLI)
    return dx_BLI


def base_backward(name: str, grad_BLO: Tensor, parts: BlockParts, dx_BLI: Tensor | None = None) -> Tensor:
    """Gradient of a frozen linear's input, added to `dx_BLI` where given."""
    grad_MO, weight_OI = grad_BLO.flatten(0, 1), parts.linears[name].weight_OI
    dx_MI = grad_MO @ weight_OI if dx_BLI is None else dx_BLI.flatten(0, 1).addmm_(grad_MO, weight_OI)
    return dx_MI.unflatten(0, grad_BLO.shape[:2])


def up_backward(values: Values, name: str, grad_BLO: Tensor, parts: BlockParts) -> tuple[Tensor, Tensor]:
    """Gradients of a LoRA's low-rank product, M × r, and of B; uses up the product that was put by."""
    lora, grad_MO = cast(LoRAParts, parts.linears[name].lora), grad_BLO.flatten(0, 1)
    dlow_Mr, dup_Or = grad_MO @ lora.up_Or, grad_MO.t() @ values.pop(f"{name}.low")
    if lora.scale != 1:
        dlow_Mr.mul_(lora.scale)
        dup_Or.mul_(lora.scale)
    return dlow_Mr, dup_Or


def low_rank_backward(
    given: Mapping[str, tuple[Tensor, Tensor]],
    x_BLI: Tensor,
    parts: BlockParts,
    grads: Gradients,
    dx_BLI: Tensor | None = None,
) -> None:
    """From what `up_backward` gave for linears that share their input: gradients of A and B into `grads`, and of the
    input added to `dx_BLI`. One GEMM each for all of them where no dropout sets them apart.
    """
    x_MI, dx_MI = x_BLI.flatten(0, 1), None if dx_BLI is None else dx_BLI.flatten(0, 1)
    downs = _joint_downs(given, parts)
    if downs is not None:
        dlow_MR = torch.cat([dlow_Mr for dlow_Mr, _ in given.values()], dim=1)
        ddowns = (dlow_MR.t() @ x_MI).split([len(down_rI) for down_rI in downs])
        if dx_MI is not None:
            dx_MI.addmm_(dlow_MR, torch.cat(downs))
        for name, ddown_rI in zip(given, ddowns, strict=True):
            grads[name] = ddown_rI, given[name][1]
        return
    for name, (dlow_Mr, dup_Or) in given.items():
        lora = cast(LoRAParts, parts.linears[name].lora)
        grads[name] = dlow_Mr.t() @ (x_MI if lora.live_MI is None else x_MI * lora.live_MI), dup_Or
        if dx_MI is None:
            continue
        if lora.live_MI is None:
            dx_MI.addmm_(dlow_Mr, lora.down_rI)
        else:
            dx_MI.add_((dlow_Mr @ lora.down_rI).mul_(lora.live_MI))
