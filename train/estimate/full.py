"""Training of all weights, or of those that `train` names: a rank's memory and what it receives, in closed form.

T numbers train. The model is sharded over s ranks, in m copies (n = s · m ranks). A rank holds 1/s of the float32
weights, of their gradients and of the optimizer's state, and all norms and modulations of the blocks. In an optimizer
step it receives these bytes (c: bytes of a number in the compute dtype):

    weights     2 · (c · blocks + 4 · what is outside them) · (s − 1)/s   per micro-step: forward and backward pass
    gradients   4 · T · (s − 1)/s, then 8 · T/s · (m − 1)/m over the copies   per step, in float32

Rows are padded to a multiple of s. Blocks before the first that trains are gathered in the forward pass only, except
the last of them, which FSDP2 gathers in the backward pass too.

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
from train.estimate.memory import CONTEXT_BYTES, FRAGMENTATION, Memory, input_bytes
from train.geometry import Shape
from train.lora.targets import match_weights


class GatheredPart(NamedTuple):
    """Numbers of a block, or of what is outside the blocks."""

    sharded: int
    """Padded, so that rows divide by the ranks."""
    trained: int
    """How many of them train; padded too."""
    replicated: int = 0
    """Norms and modulation of a block, which every rank holds."""
    replicated_trained: int = 0


class Parts(NamedTuple):
    """A model by what FSDP2 gathers at a time."""

    blocks: tuple[GatheredPart, ...]
    outside: GatheredPart
    first: int
    """Index of the block where the backward pass ends; the number of blocks if it reaches none of them."""

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
    *blocks, outside = (GatheredPart(*count) for count in counts)
    own = (index for index, block in enumerate(blocks) if block.trained or block.replicated_trained)
    enters = any(not name.startswith(("blocks.", "head.")) for name in trained)
    return Parts(tuple(blocks), outside, 0 if enters else next(own, len(blocks)))


def weight_bytes(parts: Parts, shards: int, compute_bytes: int, micro_steps: float) -> float:
    """What a rank receives of weights in a step."""
    # In the backward pass FSDP2 gathers one block ahead, so also the block before `first`, which is not used.
    gathers = sum(1 + (index >= parts.first - 1) for index in range(len(parts.blocks)))
    inside = sum(block.sharded for block in parts.blocks[:1]) * gathers * compute_bytes
    return micro_steps * (inside + 2 * 4 * parts.outside.sharded) * (shards - 1) / shards


def forward_bytes(parts: Parts, shards: int, compute_bytes: int) -> float:
    """What a rank receives of weights in a forward pass without gradients."""
    inside = sum(block.sharded for block in parts.blocks) * compute_bytes
    return (inside + 4 * parts.outside.sharded) * (shards - 1) / shards


def gradient_bytes(parts: Parts, shards: int, num_ranks: int) -> float:
    """What a rank receives of gradients in a step; an all-reduce counts twice, a reduce-scatter once."""
    copies = num_ranks // shards
    of_rows = 4 * parts.trained * (shards - 1) / shards + 8 * parts.trained / shards * (copies - 1) / copies
    return of_rows + 8 * parts.replicated_trained * (num_ranks - 1) / num_ranks


def trained_numbers(parts: Sequence[GatheredPart]) -> int:
    """Numbers of some parts that train."""
    return sum(part.trained + part.replicated_trained for part in parts)


class _Peak(NamedTuple):
    """Bytes in memory at one moment of the backward pass."""

    gradients: float
    saved: float
    transient: float


def full_memory(
    config: TrainConfig,
    dims: DiTConfig,
    shape: Shape,
    *,
    recomputed: bool,
    compute_bytes: int,
    optimizer_bytes: float,
    shards: int = 1,
    ulysses: int = 1,
    num_ranks: int = 1,
) -> Memory:
    """Memory of one GPU for a micro-batch of one shape, under autograd.

    c bytes a number in the compute dtype, N tokens held here, width d, feed-forward f, heads h, S text tokens. A block
    keeps N ((44 + 11c) d + 2cf + 8h + 36) + S ((8 + 2c) d + 4), and cNd more where others share its samples. With
    the policy `full` each block keeps 4Nd, and only the block in work keeps the rest. Also in memory: N (cf + 4d), a
    weight's gradient (cdf), two gathered blocks (c bytes per number), the gradient sums of the block before (4 bytes
    per number), and what is outside the blocks (4 bytes per number).
    Counted on traces at the real model's proportions (tests/train/test_full_memory.py).

    Args:
        shape: what one rank holds.
        recomputed: blocks are run again in the backward pass.
        shards: ranks that a copy of the model is sharded over.
    """
    parts, c = model_parts(config, dims, shards), compute_bytes
    tokens, text, dim = shape.all_tokens, shape.batch * dims.text_len, dims.dim
    source, last = 4 * tokens * dim, dims.num_layers - 1
    saved = tokens * ((44 + 11 * c) * dim + 2 * c * dims.ffn_dim + 8 * dims.num_heads + 36)
    saved += text * ((8 + 2 * c) * dim + 4) + (c * tokens * dim if ulysses > 1 else 0)
    block = parts.blocks[0].sharded
    embeddings = [size for name, size in _sizes(dims).items() if name.startswith(("patch_embedding", "text_embedding"))]
    outside = 4 * parts.outside.sharded if shards > 1 else 0
    outside += c * sum(embeddings) if c < 4 else 4 * text * dims.text_dim
    outside += 2 * c * text * dim
    adds_up = config.data.global_batch * ulysses > num_ranks * shape.batch

    def gradients(index: int) -> float:
        done, ahead = (
            trained_numbers(parts.blocks[index + 1 :]),
            trained_numbers((*parts.blocks[: index + 1], parts.outside)),
        )
        return 4 * done / shards + 4 * ahead * adds_up

    def kept(index: int) -> float:
        count = index + 1 - parts.first
        return count * source + saved if recomputed else count * saved + source

    def weights(index: int) -> float:
        if shards > 1:
            return block * (2 * c + 4 * (index < last)) + c * dim * dims.ffn_dim
        return c * dim * dims.ffn_dim + (c * block * (1 if recomputed else index + 1 - parts.first) if c < 4 else 0)

    peaks = [
        _Peak(gradients(index), kept(index), outside + weights(index) + c * tokens * dims.ffn_dim)
        for index in range(parts.first, dims.num_layers)
    ]
    # Where the backward pass begins, in the float32 head.
    kept_by_all = (dims.num_layers - parts.first) * (source if recomputed else saved)
    gathered = c * block * (1 if shards > 1 else 0 if recomputed or c == 4 else dims.num_layers - parts.first)
    peaks.append(_Peak(gradients(last), kept_by_all, outside + gathered + 23 * tokens * dim))
    if shards == 1 and num_ranks > 1:  # the all-reduce is done on one flat copy
        everything = 4.0 * trained_numbers((*parts.blocks, parts.outside))
        peaks.append(_Peak(everything, 0, everything))
    peak = max(peaks, key=sum)
    own = (parts.trained / shards) + parts.replicated_trained
    memory = Memory(
        base=4 * (parts.sharded // shards + parts.replicated),
        lora=0,
        gradients=int(peak.gradients),
        optimizer=int(own * (optimizer_bytes + (4 if config.optim.ema_decay is not None else 0))),
        saved=int(peak.saved),
        transient=int(peak.transient),
        inputs=input_bytes(dims, shape, compute_bytes=c, ulysses=ulysses),
        workspace=0,
    )
    return memory._replace(workspace=CONTEXT_BYTES + int(FRAGMENTATION * memory.total))


def _sizes(dims: DiTConfig) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in weight_shapes(dims).items()}
