"""Every weight trained, or those that `train` names: what is where, and what is exchanged, in closed form.

T numbers train. Sharded over s ranks, in m copies of the model (n = s · m ranks), a rank holds 1/s of the float32
weights, of their gradients and of the optimizer's state, and the norms and modulations of the blocks completely. It
receives in an optimizer step of so many micro-steps, with c bytes a number in the compute dtype,

    weights     2 · (c · blocks + 4 · what is outside them) · (s − 1)/s a micro-step    forward and backward pass
    gradients   4 · T · (s − 1)/s, then 8 · T/s · (m − 1)/m over the copies, once a step, float32

rows padded so that they divide by s. Blocks ahead of the first that trains are gathered for the forward pass
alone, but for the last of them.
Importing this imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from train.config.model import DiTConfig
from train.config.train import TrainConfig
from train.estimate.flops import block_linears
from train.lora.targets import match_weights


class Part(NamedTuple):
    """Numbers of a block, or of what is outside the blocks."""

    sharded: int
    """Padded, so that rows divide by the ranks."""
    trained: int
    """Of them, padded too."""
    replicated: int = 0
    """Norms and modulation of a block, which every rank holds."""
    replicated_trained: int = 0


class Parts(NamedTuple):
    """A model by what FSDP2 gathers at a time."""

    blocks: tuple[Part, ...]
    outside: Part
    first: int
    """The backward pass ends at this block; as many as there are blocks where it does not come to them."""

    @property
    def sharded(self) -> int:
        """Numbers that are sharded."""
        return self.outside.sharded + sum(block.sharded for block in self.blocks)

    @property
    def trained(self) -> int:
        """Of them those that train."""
        return self.outside.trained + sum(block.trained for block in self.blocks)

    @property
    def replicated(self) -> int:
        """Numbers that every rank holds."""
        return sum(block.replicated for block in self.blocks)

    @property
    def replicated_trained(self) -> int:
        """Of them those that train."""
        return sum(block.replicated_trained for block in self.blocks)


def weight_shapes(dims: DiTConfig) -> dict[str, tuple[int, ...]]:
    """The model's weights by official name, in its order."""
    dim, patch = dims.dim, dims.patch[0] * dims.patch[1] * dims.patch[2]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inside: int, outside: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outside, inside), (outside,)

    shapes["patch_embedding.weight"] = (dim, dims.in_channels, *dims.patch)
    shapes["patch_embedding.bias"] = (dim,)
    linear("text_embedding.0", dims.text_dim, dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dims.freq_dim, dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    for index in range(dims.num_layers):
        block = f"blocks.{index}."
        shapes[f"{block}modulation"] = (1, 6, dim)
        for name, (inside, outside) in block_linears(dims).items():
            linear(block + name, inside, outside)
        for part in ("self_attn", "cross_attn"):
            shapes |= {f"{block}{part}.norm_{letter}.weight": (dim,) for letter in "qk"}
        shapes |= {f"{block}norm3.weight": (dim,), f"{block}norm3.bias": (dim,)}
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", dim, dims.out_channels * patch)
    return shapes


def model_parts(config: TrainConfig, dims: DiTConfig, shards: int = 1) -> Parts:
    """The model's parts, rows padded to `shards` ranks. Raises UserError for a pattern of `train` without a weight."""
    return _parts(dims, config.train, shards)


@lru_cache(maxsize=64)
def _parts(dims: DiTConfig, patterns: tuple[str, ...] | None, shards: int) -> Parts:
    shapes = weight_shapes(dims)
    trained = set(shapes if patterns is None else match_weights(list(shapes), patterns))
    counts = [[0, 0, 0, 0] for _ in range(dims.num_layers + 1)]
    for name, (rows, *rest) in shapes.items():
        in_block = name.startswith("blocks.")
        place = int(name.split(".")[1]) if in_block else dims.num_layers
        is_island = in_block and ("norm" in name or "modulation" in name)
        size = (rows if is_island else -(-rows // shards) * shards) * math.prod(rest)
        counts[place][2 * is_island] += size
        counts[place][2 * is_island + 1] += size * (name in trained)
    *blocks, outside = (Part(*count) for count in counts)
    own = (index for index, block in enumerate(blocks) if block.trained or block.replicated_trained)
    enters = any(not name.startswith(("blocks.", "head.")) for name in trained)
    return Parts(tuple(blocks), outside, 0 if enters else next(own, len(blocks)))


def weight_bytes(parts: Parts, shards: int, compute_bytes: int, micro_steps: float) -> float:
    """What a rank receives of weights in a step."""
    # FSDP2 fetches a block ahead in the backward pass, also the one that it does not come to.
    gathers = sum(1 + (index >= parts.first - 1) for index in range(len(parts.blocks)))
    inside = sum(block.sharded for block in parts.blocks[:1]) * gathers * compute_bytes
    return micro_steps * (inside + 2 * 4 * parts.outside.sharded) * (shards - 1) / shards


def forward_bytes(parts: Parts, shards: int, compute_bytes: int) -> float:
    """What a rank receives of weights in a forward pass without gradients."""
    inside = sum(block.sharded for block in parts.blocks) * compute_bytes
    return (inside + 4 * parts.outside.sharded) * (shards - 1) / shards


def gradient_bytes(parts: Parts, shards: int, num_ranks: int) -> float:
    """What a rank receives of gradients in a step; a sum over ranks that is not of shards is counted twice."""
    copies = num_ranks // shards
    of_rows = 4 * parts.trained * (shards - 1) / shards + 8 * parts.trained / shards * (copies - 1) / copies
    return of_rows + 8 * parts.replicated_trained * (num_ranks - 1) / num_ranks


def trained_numbers(parts: Sequence[Part]) -> int:
    """Numbers of some parts that train."""
    return sum(part.trained + part.replicated_trained for part in parts)
