"""Floating-point operations of a step in closed form: 2 a multiply-add, GEMMs and attention only.

A block over N tokens of width d, with feed-forward f, S text tokens and LoRA rank r, costs forward

    linears  2N(6d² + 2df)     q k v o of self-attention, q o of cross-attention, both of the feed-forward
    text     4Sd²              k v of cross-attention
    scores   4N²d + 4NSd       both attentions
    LoRA     2r(in + out) a token of each adapted linear

Backward with a frozen base: the linears once more (no weight gradients), 2.5 × the scores (flash: 5 GEMMs for 2),
2 × the LoRA. Nothing flows into the text, and nothing into the input of the first adapted block. What is recomputed
comes on top. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from shards.gpus import Gpu
from train.config.model import DiTConfig, LoRAConfig
from train.config.train import TrainConfig
from train.geometry import SAVE_GROUPS, Shape
from train.lora.targets import match_targets

Adapted = Sequence[frozenset[str]]
"""For each block, which of its linears carry a LoRA."""
TRAFFIC, TRAFFIC_FORWARD = 339, 126
"""Bytes a channel, token and block that elementwise operators move, in 16 bits: in a forward and backward pass, and in
a forward pass without gradients. Traced on fake tensors at 1280×704×49."""
TRAFFIC_REPEATED = {"attention": 37, "projections": 60, "ffn_up": 4}
"""The same for each group of values that is computed again for the backward pass."""
COMPILED_TRAFFIC = 0.46
"""Share of the traffic that is left once operators are fused: an estimate."""
COMPILE_SECONDS = 120.0
"""Of torch.compile for one size, with and without a first frame: an estimate."""
MAX_COMPILED_SIZES = 16
"""Each size and mode has graphs of its own, forward and backward; `auto` compiles no more sizes than these."""


class Work(NamedTuple):
    """What a GPU does, apart by what bounds it: one efficiency cannot serve attention at 11,440 and at 5,070 tokens."""

    gemm_flops: float
    attention_flops: float
    """Forward passes, those that are repeated included."""
    attention_backward_flops: float
    traffic_bytes: float
    """Of everything between the matrix products."""

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.gemm_flops + self.attention_flops + self.attention_backward_flops

    def seconds(self, gpu: Gpu, compute_bytes: int) -> Work:
        """Seconds of each part on a GPU at the rates that are expected of it; fp32 uses no tensor cores."""
        rates = (gpu.gemm_tflops, gpu.attention_tflops, gpu.attention_backward_tflops)
        if compute_bytes == 4:
            rates = (gpu.vae_fp32_tflops,) * 3
        gemm, forward, backward = (flops / (rate * 1e12) for flops, rate in zip(self[:3], rates, strict=True))
        return Work(gemm, forward, backward, self.traffic_bytes * compute_bytes / 2 / (gpu.traffic_gb * 1e9))

    def scaled(self, factor: float) -> Work:
        """So many times as much."""
        return Work(*(factor * part for part in self))


@lru_cache(maxsize=16)
def block_linears(dims: DiTConfig) -> Mapping[str, tuple[int, int]]:
    """Linears of a block by their name in it: channels in, channels out."""
    dim, inner = dims.dim, dims.ffn_dim
    sizes = {f"{part}.{leaf}": (dim, dim) for part in ("self_attn", "cross_attn") for leaf in "qkvo"}
    return {**sizes, "ffn.0": (dim, inner), "ffn.2": (inner, dim)}


@lru_cache(maxsize=64)  # a plan asks for each layout and policy, and a pattern is matched with every name
def adapted_linears(dims: DiTConfig, lora: LoRAConfig | None) -> tuple[frozenset[str], ...]:
    """For each block, the linears that the LoRA's targets select. Raises UserError when a target selects nothing."""
    linears = block_linears(dims)
    if lora is None:
        return (frozenset(),) * dims.num_layers
    names = [f"blocks.{index}.{name}" for index in range(dims.num_layers) for name in linears]
    chosen = match_targets(names, lora.targets)
    return tuple(
        frozenset(name for name in linears if f"blocks.{index}.{name}" in chosen) for index in range(dims.num_layers)
    )


def linear_rows(dims: DiTConfig, shape: Shape, name: str) -> int:
    """Rows that a linear of a block multiplies: video tokens, or text tokens for the text's keys and values."""
    return shape.batch * dims.text_len if name in ("cross_attn.k", "cross_attn.v") else shape.all_tokens


def linear_flops(dims: DiTConfig, shape: Shape, name: str) -> int:
    """Forward FLOPs of one linear of a block, without its LoRA."""
    inside, outside = block_linears(dims)[name]
    return 2 * linear_rows(dims, shape, name) * inside * outside


def lora_flops(dims: DiTConfig, shape: Shape, name: str, rank: int) -> int:
    """Forward FLOPs of one linear's LoRA."""
    return 2 * linear_rows(dims, shape, name) * rank * sum(block_linears(dims)[name])


def score_flops(dims: DiTConfig, shape: Shape) -> int:
    """Forward FLOPs of both attentions of a block, at two GEMMs each."""
    return 4 * shape.all_tokens * dims.dim * (shape.tokens + dims.text_len)


def block_forward_flops(dims: DiTConfig, shape: Shape, adapted: Collection[str] = (), rank: int = 0) -> int:
    """One block, forward."""
    linears = sum(linear_flops(dims, shape, name) for name in block_linears(dims))
    return linears + score_flops(dims, shape) + sum(lora_flops(dims, shape, name, rank) for name in adapted)


def block_backward_flops(
    dims: DiTConfig, shape: Shape, adapted: Collection[str], rank: int, *, needs_input_gradient: bool
) -> int:
    """One block, backward through a frozen base; `needs_input_gradient` is False for the first block that trains."""
    text = {"cross_attn.k", "cross_attn.v"}
    # The linears whose input needs no gradient.
    closed = text | (set() if needs_input_gradient else {"self_attn.q", "self_attn.k", "self_attn.v"})
    total = sum(linear_flops(dims, shape, name) for name in block_linears(dims) if name not in closed)
    total += 5 * score_flops(dims, shape) // 2
    for name in adapted:
        inside, outside = block_linears(dims)[name]
        # Into low rank and into B cost `outside` each; into A costs `inside`, and into the input again `inside`.
        gemms = 2 * outside + inside * (1 if name in closed else 2)
        total += 2 * linear_rows(dims, shape, name) * rank * gemms
    return total


def recompute_flops(dims: DiTConfig, shape: Shape, group: str, adapted: Collection[str] = (), rank: int = 0) -> int:
    """What a block computes again in its backward pass when it has not kept `group`."""
    if group == "attention":
        return score_flops(dims, shape)
    inside = {"ffn_up": ("ffn.0",)}.get(group) or tuple(n for n in block_linears(dims) if not n.startswith("ffn"))
    base = sum(linear_flops(dims, shape, name) for name in inside)
    if group == "ffn_up" and "ffn.2" in adapted:
        # Of the way down only its LoRA's low-rank product is needed again.
        base += 2 * shape.all_tokens * rank * dims.ffn_dim
    return base + sum(lora_flops(dims, shape, name, rank) for name in inside if name in adapted)


def outer_forward_flops(dims: DiTConfig, shape: Shape, *, num_rows: int = 1) -> int:
    """Embeddings and head; `num_rows` modulation rows a sample (two where the first frame is clean)."""
    dim, patch = dims.dim, dims.patch[0] * dims.patch[1] * dims.patch[2]
    tokens = 2 * shape.all_tokens * dim * patch * (dims.in_channels + dims.out_channels)
    text = 2 * shape.batch * dims.text_len * dim * (dims.text_dim + dim)
    return tokens + text + 2 * shape.batch * num_rows * dim * (dims.freq_dim + dim + 6 * dim)


def forward_flops(dims: DiTConfig, shape: Shape, lora: LoRAConfig | None, *, num_rows: int = 1) -> int:
    """The complete model, forward."""
    rank = lora.rank if lora else 0
    blocks = sum(block_forward_flops(dims, shape, adapted, rank) for adapted in adapted_linears(dims, lora))
    return blocks + outer_forward_flops(dims, shape, num_rows=num_rows)


def step_flops(
    dims: DiTConfig,
    shape: Shape,
    lora: LoRAConfig | None,
    saves: Sequence[Collection[str]] | None = None,
    *,
    num_rows: int = 1,
) -> int:
    """Forward and backward of one micro-batch, what is recomputed included.

    Args:
        saves: for each block the groups it keeps; None keeps everything, so that no GEMM is done twice.
        lora: None trains every weight: then the base's weight gradients count too.
    """
    total = forward_flops(dims, shape, lora, num_rows=num_rows)
    if lora is None:
        return 3 * total + dims.num_layers * score_flops(dims, shape) // 2 + _recomputed(dims, shape, None, saves)
    adapted = adapted_linears(dims, lora)
    first = first_trained_block(adapted)
    for index, names in enumerate(adapted):
        if index >= first:
            total += block_backward_flops(dims, shape, names, lora.rank, needs_input_gradient=index > first)
    patch = dims.patch[0] * dims.patch[1] * dims.patch[2]
    total += 2 * shape.all_tokens * dims.dim * patch * dims.out_channels
    return total + _recomputed(dims, shape, lora, saves)


def step_work(
    dims: DiTConfig,
    shape: Shape,
    lora: LoRAConfig | None,
    saves: Sequence[Collection[str]],
    *,
    num_rows: int = 1,
    compiled: bool = False,
) -> Work:
    """`step_flops` by what bounds it, and the memory traffic of everything else."""
    first = first_trained_block(adapted_linears(dims, lora)) if lora else 0
    scores, trained = score_flops(dims, shape), dims.num_layers - first
    forward = scores * (dims.num_layers + sum("attention" not in kept for kept in saves[first:]))
    backward = 2.5 * scores * trained
    repeated = sum(TRAFFIC_REPEATED[group] for kept in saves[first:] for group in SAVE_GROUPS if group not in kept)
    moved = TRAFFIC * trained + TRAFFIC_FORWARD * first + repeated
    traffic = shape.all_tokens * dims.dim * moved * (COMPILED_TRAFFIC if compiled else 1)
    gemm = step_flops(dims, shape, lora, saves, num_rows=num_rows) - forward - backward
    return Work(gemm, forward, backward, traffic)


def with_compile(
    config: TrainConfig, dims: DiTConfig, gpu: Gpu | None, shapes: Sequence[Shape], num_gpus: int, notes: list[str]
) -> TrainConfig:
    """The config with `model.compile: auto` decided, and a note of why.

    It compiles where that saves twice the seconds that it takes at the start.

    Args:
        gpu: None where there is none, or its speeds are not known.
        shapes: of a micro-batch in each bucket.
    """
    if config.model.compile != "auto":
        return config
    compiles, reason = _compile_pays(config, dims, gpu, shapes, num_gpus)
    notes.append(f"model.compile: auto is {str(compiles).lower()} here: {reason}")
    return config.model_copy(update={"model": config.model.model_copy(update={"compile": compiles})})


def _compile_pays(
    config: TrainConfig, dims: DiTConfig, gpu: Gpu | None, shapes: Sequence[Shape], num_gpus: int
) -> tuple[bool, str]:
    if gpu is None:
        return False, "no GPU whose speeds are known"
    if config.lora is None:
        return False, "every weight trains"
    if config.lora.dropout:
        return False, "compiled blocks cannot draw LoRA dropout"
    if len(shapes) > MAX_COMPILED_SIZES:
        return False, f"each of {len(shapes)} sizes would be compiled"
    kept = ((*SAVE_GROUPS,),) * dims.num_layers
    eager = sum(step_work(dims, shape, config.lora, kept).traffic_bytes for shape in shapes) / len(shapes)
    passes = config.max_steps * config.data.global_batch / config.data.micro_batch / num_gpus
    saved = passes * eager * (1 - COMPILED_TRAFFIC) / (gpu.traffic_gb * 1e9)
    taken = COMPILE_SECONDS * len(shapes)
    return saved > 2 * taken, f"it would save about {saved / 60:,.0f} minutes and take about {taken / 60:,.0f}"


def forward_work(dims: DiTConfig, shape: Shape, lora: LoRAConfig | None) -> Work:
    """A forward pass of the complete model without gradients."""
    scores = dims.num_layers * score_flops(dims, shape)
    traffic = dims.num_layers * TRAFFIC_FORWARD * shape.all_tokens * dims.dim
    return Work(forward_flops(dims, shape, lora) - scores, scores, 0.0, traffic)


def _recomputed(dims: DiTConfig, shape: Shape, lora: LoRAConfig | None, saves: Sequence[Collection[str]] | None) -> int:
    if saves is None:
        return 0
    adapted = adapted_linears(dims, lora)
    return sum(
        recompute_flops(dims, shape, group, names, lora.rank if lora else 0)
        for names, kept in list(zip(adapted, saves, strict=True))[first_trained_block(adapted) if lora else 0 :]
        for group in SAVE_GROUPS
        if group not in kept
    )


def first_trained_block(adapted: Adapted) -> int:
    """Index of the first block with a LoRA: the backward pass ends there."""
    return next((index for index, names in enumerate(adapted) if names), len(adapted))
