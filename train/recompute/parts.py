"""What a block with a written-out backward pass is made of (train/recompute/block.py), and its linears,
forward and backward.

Shapes: B slots, L tokens, M = B·L, I O input and output channels of a linear, r LoRA rank, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.model.quantise import Quantised
from train.parallel.ulysses import Ulysses
from train.recompute.ops import Rotation

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
    """One linear as the block computes it."""

    weight_OI: Tensor | Quantised
    """As it is kept; brought to the compute dtype where it is multiplied, so that one linear is so at a time."""
    bias_O: Tensor
    lora: LoRAParts | None
    output_scale: float = 1.0
    """See `model.block.Linear`: in the forward pass alone, since gradients are those of the unscaled output."""


class BlockParts(NamedTuple):
    """Frozen tensors of a block, and its LoRA."""

    linears: dict[str, LinearParts]
    norms: dict[str, Any]
    """Float32 weights: `self_attn.q`, `self_attn.k`, `cross_attn.q`, `cross_attn.k`, `norm3`, `norm3.bias`. In 16 bit
    `cross_attn.q` is None and its weight stands in `cross_attn.k`: the few keys are multiplied, not the queries."""
    modulation_16D: Tensor


class Shared(NamedTuple):
    """What all blocks of a forward pass read."""

    rows_BR6D: Tensor
    text_BSD: Tensor
    rotation: Rotation
    zeros_BL1: Tensor
    """Zeros and ones are the mean and scale where a normalised input is normalised no further."""
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
    """x W' + b + scale · B A x. The low-rank product is saved for the backward pass."""
    part, x_MI = parts.linears[name], x_BLI.flatten(0, 1)
    scale = part.output_scale
    out_MO = torch.addmm(part.bias_O, x_MI, part.weight_OI.to(x_MI.dtype).t(), beta=scale, alpha=scale)
    if part.lora is not None:
        low_Mr = values[f"{name}.low"] = low_rank(part.lora, x_MI)
        out_MO.addmm_(low_Mr, part.lora.up_Or.t(), alpha=part.lora.scale * scale)
    return out_MO.unflatten(0, x_BLI.shape[:2])


def linear_backward(
    values: Values,
    name: str,
    grad_BLO: Tensor,
    x_BLI: Tensor,
    parts: BlockParts,
    grads: Gradients,
    dx_BLI: Tensor | None = None,
) -> Tensor:
    """Gradient of a linear's input, added to `dx_BLI` where given; those of its LoRA go into `grads`.

    `x_BLI`, the linear's input, is read only where it has a LoRA.
    """
    part, grad_MO = parts.linears[name], grad_BLO.flatten(0, 1)
    weight_OI = part.weight_OI.to(grad_MO.dtype)
    dx_MI = grad_MO @ weight_OI if dx_BLI is None else dx_BLI.flatten(0, 1).addmm_(grad_MO, weight_OI)
    del weight_OI
    if part.lora is not None:
        dlow_Mr = lora_backward(values, name, grad_BLO, x_BLI, part.lora, grads)
        if part.lora.live_MI is None:
            dx_MI.addmm_(dlow_Mr, part.lora.down_rI)
        else:
            dx_MI.add_((dlow_Mr @ part.lora.down_rI).mul_(part.lora.live_MI))
    return dx_MI.unflatten(0, grad_BLO.shape[:2])


def lora_backward(
    values: Values, name: str, grad_BLO: Tensor, x_BLI: Tensor, lora: LoRAParts, grads: Gradients
) -> Tensor:
    """Gradients of A and B into `grads`; returns that of the low-rank product, M × r."""
    grad_MO, x_MI = grad_BLO.flatten(0, 1), x_BLI.flatten(0, 1)
    dlow_Mr, dup_Or = grad_MO @ lora.up_Or, grad_MO.t() @ values.pop(f"{name}.low")
    if lora.scale != 1:
        dlow_Mr.mul_(lora.scale)
        dup_Or.mul_(lora.scale)
    grads[name] = dlow_Mr.t() @ (x_MI if lora.live_MI is None else x_MI * lora.live_MI), dup_Or
    return dlow_Mr
