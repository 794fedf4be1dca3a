"""Weights of frozen linears in 8 or 4 bits, and back, one linear at a time.

    fp8   E4M3 and a float32 scale a row: the row's largest magnitude is 448, the largest that E4M3 holds
    nf4   the 4-bit normal float of QLoRA (arXiv:2305.14314) by bitsandbytes: a float32 scale every 64 numbers

Codes are made on the CPU, so that they are a function of the weights alone.

Shapes: O I output and input channels of a linear.
"""

from __future__ import annotations

import importlib
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shards.errors import UserError

Kind = Literal["fp8", "nf4"]
FP8 = torch.float8_e4m3fn
NF4_BLOCK = 64
"""Numbers that share a scale."""


class Quantised(NamedTuple):
    """A weight in few bits."""

    kind: Kind
    shape: tuple[int, int]
    """O × I of the weight."""
    codes: Tensor
    """fp8: O × I of E4M3; nf4: bytes of two codes."""
    scales: Tensor
    """float32; fp8: O × 1, nf4: one every NF4_BLOCK numbers."""

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight O × I in a dtype that the linear computes in: a tensor of its own, to be dropped after use."""
        if self.kind == "fp8":
            # E4M3 is exact in 16 bits. In place: the product is formed in float32 and rounded once.
            return self.codes.to(dtype).mul_(self.scales)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size(self.shape)
        state = QuantState(self.scales, shape=shape, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
        weight: Tensor = dequantize_4bit(self.codes, state)
        return weight

    @torch.no_grad()
    def fill(self, weight_OI: Tensor) -> None:
        """Quantise a weight into the codes and scales."""
        weight_OI = weight_OI.detach().to("cpu", torch.float32)
        if self.kind == "fp8":
            largest_O1 = weight_OI.abs().amax(1, keepdim=True)
            scales = torch.where(largest_O1 > 0, largest_O1 / torch.finfo(FP8).max, 1.0)
            codes = (weight_OI / scales).to(FP8)
        else:
            from bitsandbytes.functional import quantize_4bit

            codes, state = quantize_4bit(weight_OI.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
            scales = state.absmax
        self.codes.copy_(codes)
        self.scales.copy_(scales)


def empty_quantised(kind: Kind, shape: tuple[int, int]) -> Quantised:
    """What holds a weight of that shape, on `meta`. Raises UserError where bitsandbytes is needed and not there."""
    count = shape[0] * shape[1]
    num_scales: tuple[int, ...] = (shape[0], 1)
    if kind == "fp8":
        codes = torch.empty(shape, dtype=FP8, device="meta")
    else:
        try:
            importlib.import_module("bitsandbytes")
        except ImportError:
            raise UserError(
                "model.base_dtype: nf4 needs bitsandbytes", fix="pip install bitsandbytes, or fp8"
            ) from None
        codes = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta")
        num_scales = (-(-count // NF4_BLOCK),)
    return Quantised(kind, shape, codes, torch.empty(num_scales, dtype=torch.float32, device="meta"))


def quantised_weights(model: nn.Module) -> dict[str, Quantised]:
    """By the weight's name in the model."""
    found = ((f"{name}.weight", getattr(module, "quantised", None)) for name, module in model.named_modules())
    return {name: quantised for name, quantised in found if quantised is not None}
