"""The transformer block of Wan2.2, and what it is made of, under autograd.

LoRA training runs the hand-written block of train/recompute/block.py in its place.

Shapes: B slots, L tokens, D model width, N heads, n of them worked on here, K channels a head, S text tokens, R
modulation rows a sample: one (t), or two (first frame's, then t). Precision as train/model/dit.py says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.config.model import DiTConfig
from train.model.attention import Backend, attend
from train.model.quantise import Quantised
from train.model.rope import rotate
from train.parallel.ulysses import Ulysses, to_heads, to_tokens


class DropoutKey(NamedTuple):
    """What LoRA dropout is a function of, beside the layer: so no generator, and the same on every layout."""

    slot_B: Tensor
    """int64, one key a sample, from (seed, step, slot)."""
    token_offset: int
    """Global index of the first token held here."""


class BlockInputs(NamedTuple):
    """What every block reads beside the residual stream."""

    rows_BR6D: Tensor
    text_BSD: Tensor
    rope: tuple[Tensor, Tensor]
    num_first: int
    """Leading tokens that take the first modulation row; 0 where there is one row."""
    backend: Backend
    dropout: DropoutKey | None
    ulysses: Ulysses | None
    """The ranks that share the samples' tokens; None: all tokens are here."""
    num_tokens: int
    """Tokens of a sample, wherever they are."""


BlockRunner = Callable[[int, "Block", Tensor, BlockInputs], Tensor]


class Linear(nn.Linear):
    """A linear that computes in its input's dtype, whatever dtype its weight is kept in."""

    output_scale = 1.0
    """A power of two that the output is multiplied by before it is rounded, so that fp16 holds it. Set on the linears
    ahead of a residual only, where the float32 gate divides by it again (train/precision.py, fold_outputs)."""
    quantised: Quantised | None = None
    """The weight where it is kept in few bits; `weight` is on `meta` then, for its name and shape."""

    @property
    def kept(self) -> Tensor | Quantised:
        """The weight as it is kept; `.to(dtype)` gives what is multiplied by."""
        return self.weight if self.quantised is None else self.quantised

    def forward(self, x: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """x W' + b. `dropout` is for the subclass that adds a LoRA."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.output_scale == 1 or bias is None:
            return F.linear(x, self.kept.to(x.dtype), bias)
        rows, scale = x.flatten(0, -2), self.output_scale
        return torch.addmm(bias, rows, self.kept.to(x.dtype).t(), beta=scale, alpha=scale).unflatten(0, x.shape[:-1])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; float32 out."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention; queries and keys are normalised over all heads before they are split."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim, dtype=dtype) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, config.eps) for _ in range(2))
        self.heads = (config.num_heads, config.head_dim)

    def forward(self, x_BLD: Tensor, context_BSD: Tensor, inputs: BlockInputs, *, rotated: bool) -> Tensor:
        """Attend from x to the context (x itself for self-attention)."""
        drop = inputs.dropout
        # Text is the same on every rank of a sequence, so its tokens count from 0.
        context_drop = drop if rotated or drop is None else drop._replace(token_offset=0)
        q_BLNK = self.norm_q(self.q(x_BLD, drop)).unflatten(2, self.heads)
        k_BSNK = self.norm_k(self.k(context_BSD, context_drop)).unflatten(2, self.heads)
        v_BSNK = self.v(context_BSD, context_drop).unflatten(2, self.heads)
        if rotated:
            q_BLNK, k_BSNK = rotate(q_BLNK, *inputs.rope), rotate(k_BSNK, *inputs.rope)
        dtype = v_BSNK.dtype
        q_BLNK, k_BSNK = q_BLNK.to(dtype), k_BSNK.to(dtype)
        if not rotated or inputs.ulysses is None:
            return self.o(attend(q_BLNK, k_BSNK, v_BSNK, inputs.backend), drop)
        # What follows the exchange has all tokens of this rank's heads.
        q, k, v = (to_heads(inputs.ulysses, x, inputs.num_tokens) for x in (q_BLNK, k_BSNK, v_BSNK))
        a_BLnK = attend(q, k, v, inputs.backend).unflatten(2, q.shape[2:])
        return self.o(to_tokens(inputs.ulysses, a_BLnK).flatten(2), drop)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to a float32 residual stream."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Attention(config, dtype)
        # norm3 comes before the cross-attention; norm1 and norm2 have no parameters.
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps, dtype=torch.float32)
        self.cross_attn = Attention(config, dtype)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            Linear(config.ffn_dim, config.dim, dtype=dtype),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim, dtype=torch.float32))
        self.eps = config.eps

    def forward(self, x_BLD: Tensor, inputs: BlockInputs, body: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """One block; x is float32 before and after (Wan model.py, WanAttentionBlock).

        LoRA training passes `body`, the hand-written block of train/recompute/block.py, which computes the same with
        fewer saved bytes; it runs inside this call so that the hooks of the block (FSDP2) fire. The two are held
        together by tests/train/test_checkpointing.py.
        """
        if body is not None:
            return body(x_BLD)
        dtype = inputs.text_BSD.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + inputs.rows_BR6D).unbind(2)
        y_BLD = norm_and_modulate(x_BLD, shift1, scale1, inputs.num_first, eps=self.eps, dtype=dtype)
        gate1 = gate1 / self.self_attn.o.output_scale
        gate2 = gate2 / cast(Linear, self.ffn[2]).output_scale
        x_BLD = gated_sum(x_BLD, self.self_attn(y_BLD, y_BLD, inputs, rotated=True), gate1, inputs.num_first)
        y_BLD = self.cross_attn(self.norm3(x_BLD).to(dtype), inputs.text_BSD, inputs, rotated=False)
        x_BLD = torch.add(x_BLD, y_BLD, alpha=1 / self.cross_attn.o.output_scale)
        y_BLD = norm_and_modulate(x_BLD, shift2, scale2, inputs.num_first, eps=self.eps, dtype=dtype)
        y_BLD = self.ffn[2](self.ffn[1](self.ffn[0](y_BLD, inputs.dropout)), inputs.dropout)
        return gated_sum(x_BLD, y_BLD, gate2, inputs.num_first)


def norm_and_modulate(
    x_BLD: Tensor, shift_BRD: Tensor, scale_BRD: Tensor, num_first: int, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift in float32, rounded once to `dtype`; one multiply-add a segment of tokens."""
    normal_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    scale_BRD = 1 + scale_BRD
    if not num_first:
        return torch.addcmul(shift_BRD, normal_BLD, scale_BRD).to(dtype)
    segments = zip(shift_BRD.split(1, 1), split_first(normal_BLD, num_first), scale_BRD.split(1, 1), strict=True)
    return torch.cat([torch.addcmul(shift, x, scale).to(dtype) for shift, x, scale in segments], dim=1)


def gated_sum(x_BLD: Tensor, y_BLD: Tensor, gate_BRD: Tensor, num_first: int) -> Tensor:
    """x + y · gate in float32, whatever dtype y has."""
    if not num_first:
        return torch.addcmul(x_BLD, y_BLD, gate_BRD)
    segments = zip(split_first(x_BLD, num_first), split_first(y_BLD, num_first), gate_BRD.split(1, 1), strict=True)
    return torch.cat([torch.addcmul(x, y, gate) for x, y, gate in segments], dim=1)


def split_first(x_BLD: Tensor, num_first: int) -> tuple[Tensor, ...]:
    """The first frame's tokens and the rest. A split: the gradient of a slice would be as large as the input, twice."""
    return x_BLD.split((num_first, x_BLD.shape[1] - num_first), dim=1)


def run_plain(index: int, block: Block, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
    """Run a block and let autograd keep what it wants."""
    return block(x_BLD, inputs)


def run_recomputed(index: int, block: Block, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
    """Run a block, keep only its input, run it again in the backward pass. Nothing in it draws from a generator."""
    if not torch.is_grad_enabled():
        return block(x_BLD, inputs)
    return checkpoint(block, x_BLD, inputs, use_reentrant=False, preserve_rng_state=False)
