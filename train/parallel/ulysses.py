"""Ulysses: the tokens of one sample shared by several ranks, its heads during self-attention.

    own tokens × all heads ──to_heads──▶ all tokens × own heads ─ attention ──to_tokens──▶ own tokens × all heads

Everything but self-attention works token by token, on each rank's own part; text and time are the same on all. P
ranks hold ceil(L / P) tokens each. Where L does not divide, tokens are padded at the end, and cut again between the
exchange and the attention: the kernel sees no mask. What is computed for a padded token is dropped, and its gradient
is zero. The way back of each exchange is the other one (DeepSpeed-Ulysses, arXiv:2309.14509).

Shapes: B slots, L tokens of a sample, l of them held here, N heads, n = N / P of them here, K channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The operators below torch.distributed._functional_collectives: its names change from version to version.
_ops: Any = torch.ops._c10d_functional
Way = Callable[[Tensor], Tensor]


class Ulysses(NamedTuple):
    """The ranks that share this one's samples."""

    group: str
    """Name of their process group."""
    size: int
    rank: int
    """Which part of the tokens, and which heads, are this rank's."""

    def num_held(self, num_tokens: int) -> int:
        """Tokens that each rank holds of a sample, padding included."""
        return -(-num_tokens // self.size)

    def offset(self, num_tokens: int) -> int:
        """Index of the first token held here; beyond the last one where all held here is padding."""
        return self.rank * self.num_held(num_tokens)

    def own(self, x_BLP: Tensor) -> Tensor:
        """The part of all tokens that this rank holds, padded with zeros."""
        num_tokens = x_BLP.shape[1]
        start, held = self.offset(num_tokens), self.num_held(num_tokens)
        return pad_tokens(x_BLP[:, start : start + held], held)

    def to_heads(self, own_BlNK: Tensor, num_tokens: int) -> Tensor:
        """Exchange own tokens of all heads for all tokens of own heads, B × L × n × K; padding is cut."""
        parts_PBlnK = own_BlNK.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4).contiguous()
        return self._swap(parts_PBlnK).transpose(0, 1).flatten(1, 2)[:, :num_tokens]

    def to_tokens(self, all_BLnK: Tensor) -> Tensor:
        """The other way: all tokens of own heads for own tokens of all heads, B × l × N × K; padding is zeros."""
        held = self.num_held(all_BLnK.shape[1])
        padded = pad_tokens(all_BLnK, self.size * held)
        parts_PBlnK = padded.unflatten(1, (self.size, held)).transpose(0, 1).contiguous()
        return self._swap(parts_PBlnK).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _swap(self, parts_P: Tensor) -> Tensor:
        """Part p goes to rank p, and rank p's comes in its place. What goes is contiguous: not every version of the
        operator ensures that, and a gradient with its bytes in another order would be silently wrong."""
        sizes = [1] * self.size
        swapped: Tensor = _ops.wait_tensor(_ops.all_to_all_single(parts_P, sizes, sizes, self.group))
        return swapped

    def gather(self, own_BlP: Tensor, num_tokens: int) -> Tensor:
        """All tokens from each rank's own; padding is cut."""
        parts = _ops.all_gather_into_tensor(own_BlP.transpose(0, 1).contiguous(), self.size, self.group)
        full: Tensor = _ops.wait_tensor(parts)[:num_tokens].transpose(0, 1)
        return full


def pad_tokens(x_BL: Tensor, num_tokens: int) -> Tensor:
    """Zeros behind the last token."""
    missing = num_tokens - x_BL.shape[1]
    return F.pad(x_BL, (0, 0) * (x_BL.ndim - 2) + (0, missing)) if missing else x_BL


class _Exchange(torch.autograd.Function):
    """One way forward, another one back."""

    @staticmethod
    def forward(ctx: Any, there: Way, back: Way, x: Tensor) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.back(grad)


def to_heads(ulysses: Ulysses, own_BlNK: Tensor, num_tokens: int) -> Tensor:
    """`Ulysses.to_heads`, for autograd."""
    there = partial(ulysses.to_heads, num_tokens=num_tokens)
    heads: Tensor = _Exchange.apply(there, ulysses.to_tokens, own_BlNK)
    return heads


def to_tokens(ulysses: Ulysses, all_BLnK: Tensor) -> Tensor:
    """`Ulysses.to_tokens`, for autograd."""
    back = partial(ulysses.to_heads, num_tokens=all_BLnK.shape[1])
    own: Tensor = _Exchange.apply(ulysses.to_tokens, back, all_BLnK)
    return own


def gather(ulysses: Ulysses, own_BlP: Tensor, num_tokens: int) -> Tensor:
    """`Ulysses.gather`, for autograd. Every rank computes the same full loss from it, so the backward is a slice: each
    takes the gradient of its own part; a sum over the ranks would count it once for every rank."""
    there = partial(ulysses.gather, num_tokens=num_tokens)
    full: Tensor = _Exchange.apply(there, ulysses.own, own_BlP)
    return full
