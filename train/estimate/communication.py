"""Many GPUs in closed form: what a layout computes, exchanges and holds a rank. Importing it imports no torch.

n ranks, P of them share a sample's tokens (Ulysses), s of them share one copy of the frozen base (FSDP2). A rank sends
and receives in an optimizer step of m micro-steps, with c bytes a number in the compute dtype,

    LoRA gradients   2 · 4 · (LoRA numbers) · (n − 1)/n              once, float32, whatever m is
    base             2 · (bytes of all blocks) · (s − 1)/s · m       gathered in the forward and the backward pass
                     (of a base that trains: train/estimate/full.py)
    tokens           4 · (N/P) · d · c · (P − 1)/P a block and pass  q k v there, the output back; m times

and a trained block makes three passes: forward, backward, and between them once more, with what is computed again or
was kept by tokens. The velocity is gathered once a forward pass, 4 bytes a number. Bytes are exact; the
seconds divide them by a bandwidth that is assumed (shards/gpus.py), and nothing is taken to overlap: an upper bound.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from shards.errors import UserError
from shards.gpus import Gpu
from train.config.model import DiTConfig, LoRAConfig
from train.config.train import TrainConfig, is_quantised
from train.estimate.flops import Work, adapted_linears, block_linears, first_trained_block, step_flops, step_work
from train.estimate.full import forward_bytes, gradient_bytes, model_parts, weight_bytes
from train.estimate.memory import BaseStore, block_bytes, num_lora_parameters
from train.estimate.saves import AUTO_SHARE, run_memory
from train.geometry import SAVE_GROUPS, Shape

ULYSSES_TRIED = (1, 2, 4, 8)


class Mesh(NamedTuple):
    """How the GPUs of a run share its work."""

    num_gpus: int = 1
    num_nodes: int = 1
    """Machines; each has as many GPUs."""
    base_shards: int = 1
    """Neighbouring ranks that one copy of the frozen base is sharded over."""
    ulysses: int = 1
    """Neighbouring ranks that share the tokens of one sample."""
    streamed: bool = False
    """Every rank's blocks lie in the host's memory, as configured or since a step does not fit otherwise."""

    @property
    def memory_parts(self) -> tuple[int, int, bool]:
        """What decides a rank's memory."""
        return self.base_shards, self.ulysses, self.streamed

    @property
    def dp_size(self) -> int:
        """Ranks, or groups of them, that a global batch is divided among."""
        return self.num_gpus // self.ulysses

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one machine."""
        return self.num_gpus // self.num_nodes

    def link(self, gpu: Gpu, size: int) -> float:
        """Bytes a second a GPU of an exchange among `size` neighbouring ranks."""
        return 1e9 * (gpu.link_gb_per_second if size <= self.gpus_per_node else gpu.network_gb_per_second)

    def __str__(self) -> str:
        if self.num_gpus == 1:
            return "one GPU, blocks streamed" if self.streamed else "one GPU"
        parts = [f"replicate {self.dp_size}"] if self.base_shards == 1 and self.dp_size > 1 else []
        parts += [f"shard over {self.base_shards}"] if self.base_shards > 1 else []
        parts += [f"ulysses {self.ulysses}"] if self.ulysses > 1 else []
        parts += ["streamed"] if self.streamed else []
        return " × ".join(parts)


class Exchange(NamedTuple):
    """What one rank exchanges in an optimizer step."""

    gradient_bytes: float = 0.0
    base_bytes: float = 0.0
    token_bytes: float = 0.0
    seconds: float = 0.0
    """At the assumed bandwidths, without overlap."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.gradient_bytes + self.base_bytes + self.token_bytes


def make_mesh(num_gpus: int, num_nodes: int, base_shards: int, ulysses: int, dims: DiTConfig) -> Mesh:
    """Check sizes against each other. Raises UserError with those that do."""
    if num_gpus % num_nodes:
        raise UserError(f"--gpus {num_gpus} does not divide by --nodes {num_nodes}")
    if dims.num_heads % ulysses or num_gpus % ulysses:
        fits = [size for size in range(1, num_gpus + 1) if dims.num_heads % size == 0 and num_gpus % size == 0]
        raise UserError(
            f"parallel.ulysses: {ulysses} must divide the {dims.num_heads} heads and the {num_gpus} GPUs",
            expected=", ".join(map(str, fits)),
        )
    return Mesh(num_gpus, num_nodes, base_shards, ulysses)


def choose_mesh(
    config: TrainConfig,
    dims: DiTConfig,
    num_gpus: int,
    num_nodes: int,
    shapes: Sequence[Shape],
    *,
    device_bytes: int | None,
    compute_bytes: int,
) -> tuple[Mesh, str]:
    """The configured layout, and why. `auto` takes the first of these that a step fits in, keeping the least:

    the base replicated, then sharded over a machine; as few ranks a sample as the batch allows, then more; then the
    base streamed from the host's memory. A base that trains is never streamed, and is sharded over all GPUs at last.

    Args:
        shapes: complete micro-batches of the run.
        device_bytes: memory of a GPU; None on a CPU, whose memory is not asked.
    Raises: UserError for a layout that these GPUs cannot form.
    """
    wanted, asked = config.parallel.shard, config.parallel.ulysses
    here, trains = num_gpus // num_nodes, config.lora is None
    fixed = {"full": num_gpus, "hybrid": here, "none": 1}
    degrees = [asked] if asked != "auto" else _degrees(config, dims, num_gpus, here)
    shards = [fixed[wanted]] if wanted != "auto" else sorted({1, here})
    streamed = config.model.stream_blocks is True
    if trains and wanted == "auto" and not config.model.compile:
        shards = sorted({1, here, num_gpus})
    if streamed or is_quantised(config) or (trains and config.model.compile):
        shards = [1]
    meshes = [
        make_mesh(num_gpus, num_nodes, size, degree, dims)._replace(streamed=streamed)
        for degree in degrees
        for size in shards
    ]
    if config.model.stream_blocks == "auto" and not trains:
        meshes += [mesh._replace(streamed=True) for mesh in meshes if mesh.base_shards == 1]
    first = meshes[0]
    words = f"parallel.shard: {wanted}, parallel.ulysses: {asked}"
    if asked == "auto" and first.ulysses > 1:
        batch = config.data.global_batch
        words += f"; {batch} samples divided among {num_gpus} processes, so {first.ulysses} share one"
    if device_bytes is None or len(meshes) == 1:
        return first, words
    # `auto` checkpointing leaves a share of the memory free, and refuses what does not fit the rest.
    limit = device_bytes * (AUTO_SHARE if config.checkpointing.policy == "auto" else 1)
    needs: list[int] = []
    for mesh in meshes:
        needs.append(_least_memory(config, dims, mesh, shapes, compute_bytes))
        if needs[-1] <= limit:
            words += f"; a step takes {needs[-1] / 2**30:.1f} GiB of {device_bytes / 2**30:.1f}"
            return mesh, words + (f", and {needs[0] / 2**30:.1f} as {first}" if mesh != first else "")
    return max(meshes, key=lambda mesh: (mesh.ulysses, mesh.base_shards, mesh.streamed)), f"{words}; nothing fits"


def _degrees(config: TrainConfig, dims: DiTConfig, num_gpus: int, here: int) -> list[int]:
    """Ranks that may share a sample, ascending; the first is the least that the batch can be divided among."""
    data, found = config.data, []
    for degree in range(1, here + 1):
        share, rest = divmod(data.global_batch, num_gpus // degree)
        if here % degree == 0 and dims.num_heads % degree == 0 and share and not rest and not share % data.micro_batch:
            found.append(degree)
    # A batch that no degree divides evenly is refused later, with the sizes that do.
    return found if found and (found[0] == 1 or num_gpus > data.global_batch // data.micro_batch) else [1]


def _least_memory(config: TrainConfig, dims: DiTConfig, mesh: Mesh, shapes: Sequence[Shape], compute_bytes: int) -> int:
    keeps_all = config.lora is None and config.checkpointing.policy == "none"  # else it can keep less
    saves = (SAVE_GROUPS if keeps_all else (),) * dims.num_layers
    parts = mesh.memory_parts
    return max(
        run_memory(
            config,
            dims,
            local_shape(shape, mesh.ulysses),
            saves,
            compute_bytes,
            *parts,
            num_ranks=mesh.num_gpus,
        ).total
        for shape in shapes
    )


def local_shape(shape: Shape, ulysses: int) -> Shape:
    """What a rank holds of a micro-batch: its stretch of the tokens, padded where they do not divide."""
    return Shape(shape.batch, -(-shape.tokens // ulysses))


def rank_flops(
    dims: DiTConfig,
    shape: Shape,
    lora: LoRAConfig | None,
    saves: Sequence[Collection[str]],
    ulysses: int = 1,
) -> float:
    """FLOPs that one rank executes for a micro-batch.

    A step is a polynomial a + bN + cN² of the tokens: text and time are computed by every rank of a sequence (a), what
    is done token by token by each for its own, padding included (b), and self-attention's scores by head, over the
    tokens that there are (c).
    """

    def flops(tokens: int) -> int:
        return step_flops(dims, Shape(shape.batch, tokens), lora, saves, num_rows=2)

    n = shape.tokens
    if ulysses == 1:
        return float(flops(n))
    nothing, one, two = flops(0), flops(n), flops(2 * n)
    square = (two - 2 * one + nothing) / 2
    line = one - nothing - square
    return nothing + line * local_shape(shape, ulysses).tokens / n + square / ulysses


def rank_work(
    dims: DiTConfig,
    shape: Shape,
    lora: LoRAConfig | None,
    saves: Sequence[Collection[str]],
    ulysses: int = 1,
    *,
    compiled: bool = False,
) -> Work:
    """The same by what bounds it: attention is divided by heads, elementwise operators by tokens."""
    one = step_work(dims, shape, lora, saves, num_rows=2, compiled=compiled).scaled(1 / ulysses)
    attention = one.attention_flops + one.attention_backward_flops
    return one._replace(gemm_flops=rank_flops(dims, shape, lora, saves, ulysses) - attention)


def count_exchange(
    config: TrainConfig,
    dims: DiTConfig,
    mesh: Mesh,
    gpu: Gpu,
    shape: Shape,
    saves: Sequence[Collection[str]],
    compute_bytes: int,
) -> Exchange:
    """What a rank exchanges in a step of one micro-batch shape."""
    micro_steps = config.data.global_batch / mesh.dp_size / shape.batch
    n, s, p = mesh.num_gpus, mesh.base_shards, mesh.ulysses
    if config.lora is None:
        parts = model_parts(config, dims, s)
        gradients = gradient_bytes(parts, s, n)
        base = weight_bytes(parts, s, compute_bytes, micro_steps)
    else:
        gradients = 8 * num_lora_parameters(dims, config.lora) * (n - 1) / n
        base = 2 * dims.num_layers * block_bytes(dims, compute_bytes, s) * (s - 1) / s * micro_steps
    tokens = micro_steps * _token_bytes(dims, shape, p, num_passes(dims, config.lora, saves), compute_bytes)
    seconds = gradients / mesh.link(gpu, n) + base / mesh.link(gpu, s) + tokens / mesh.link(gpu, p)
    return Exchange(gradients, base, tokens, seconds)


def forward_exchange_seconds(
    config: TrainConfig, dims: DiTConfig, mesh: Mesh, gpu: Gpu, shape: Shape, compute_bytes: int
) -> float:
    """Seconds that a rank exchanges in a forward pass without gradients: the base once, tokens once a block."""
    s, p = mesh.base_shards, mesh.ulysses
    base = dims.num_layers * block_bytes(dims, compute_bytes, s) * (s - 1) / s
    if config.lora is None:
        base = forward_bytes(model_parts(config, dims, s), s, compute_bytes)
    tokens = _token_bytes(dims, shape, p, dims.num_layers, compute_bytes)
    return base / mesh.link(gpu, s) + tokens / mesh.link(gpu, p)


def _token_bytes(dims: DiTConfig, shape: Shape, ulysses: int, num_passes: int, compute_bytes: int) -> float:
    """What comes in over the wire of a sample that is shared: tokens at every pass of a block, the velocity once."""
    held = local_shape(shape, ulysses).all_tokens * (ulysses - 1) / ulysses
    velocity = 4 * held * ulysses * dims.out_channels * dims.patch[1] * dims.patch[2]
    return 4 * held * dims.dim * compute_bytes * num_passes + velocity


class Transfer(NamedTuple):
    """What passes between a GPU and its host in a step: streamed blocks, and inputs of blocks."""

    num_bytes: float = 0.0
    seconds: float = 0.0
    """At the host's link."""
    exposed_seconds: float = 0.0
    """Of them what the computation does not hide: copies run beside a pass, forward and backward each."""


def count_transfer(
    config: TrainConfig,
    dims: DiTConfig,
    gpu: Gpu,
    shape: Shape,
    saves: Sequence[Collection[str]],
    compute_bytes: int,
    pass_seconds: tuple[float, float],
    store: BaseStore,
) -> Transfer:
    """Of one micro-step, whose forward and backward pass take so long; `shape` is what one rank holds.

    The two blocks that a pass ends with are there for the next: each way moves the others. Half of the inputs' bytes
    go out in the forward pass, half come back.
    """
    first = first_trained_block(adapted_linears(dims, config.lora))
    moved = 0
    if store.streamed:
        copies = max(0, dims.num_layers - 2) + max(0, dims.num_layers - 2 - first)
        moved = copies * block_bytes(dims, compute_bytes, store=store)
    if store.offload_inputs:
        moved += 8 * shape.all_tokens * dims.dim * sum("projections" not in kept for kept in saves[first:])
    seconds = moved / (1e9 * gpu.host_gb)
    exposed = sum(max(0.0, seconds / 2 - compute) for compute in pass_seconds)
    return Transfer(moved, seconds, exposed)


def conversion_traffic(
    config: TrainConfig, dims: DiTConfig, saves: Sequence[Collection[str]], compute_bytes: int, store: BaseStore
) -> float:
    """Bytes of memory traffic of a micro-step for bringing weights to the compute dtype, wherever they are multiplied:
    once forward, once for the gradient of the input, once more where it is computed again."""
    if not store.is_converted(compute_bytes):
        return 0.0
    sizes = block_linears(dims)
    # Read as kept and written; fp8 is multiplied by its scales in place.
    passes = 3 if store.dtype == "fp8" else 1
    once = {n: store.weight_bytes(compute_bytes, i, o) + passes * compute_bytes * i * o for n, (i, o) in sizes.items()}
    total = float(dims.num_layers * sum(once.values()))
    for kept in saves[first_trained_block(adapted_linears(dims, config.lora)) :]:
        total += sum(size for name, size in once.items() if name not in ("cross_attn.k", "cross_attn.v"))
        total += once["ffn.0"] * ("ffn_up" not in kept)
        total += sum(size for name, size in once.items() if not name.startswith("ffn")) * ("projections" not in kept)
    return total


def num_passes(dims: DiTConfig, lora: LoRAConfig | None, saves: Sequence[Collection[str]]) -> int:
    """Times that a micro-step takes the tokens of a block through self-attention's exchange, over all blocks.

    A block of a frozen base is passed once forward and, where it trains, twice more: gradients there and back, and q k
    v with the output again, which are kept as this rank's tokens, if at all. Where every weight trains autograd keeps
    what other ranks sent, and the middle one is only made by a block that is computed again.
    """
    if lora is None:
        return sum(3 if not kept else 2 for kept in saves)
    adapted = adapted_linears(dims, lora)
    first = first_trained_block(adapted)
    passes = dims.num_layers + 2 * (dims.num_layers - first)
    if not any(name.startswith("self_attn") for name in adapted[first]):
        # Nothing of it flows back through self-attention, which is only run again for what follows it.
        passes -= 2 if "attention" in saves[first] else 1
    return passes


def candidates(dims: DiTConfig, num_gpus: int, num_nodes: int, global_batch: int, micro_batch: int) -> list[Mesh]:
    """Layouts worth comparing: the base replicated or sharded over a machine or over all; 1, 2, 4, 8 GPUs a sample."""
    here = num_gpus // num_nodes
    meshes = []
    for ulysses in ULYSSES_TRIED:
        if dims.num_heads % ulysses or here % ulysses or global_batch % (num_gpus // ulysses):
            continue
        if (global_batch // (num_gpus // ulysses)) % micro_batch:
            continue
        for shards in sorted({1, here, num_gpus}):
            mesh = Mesh(num_gpus, num_nodes, shards, ulysses)
            if mesh not in meshes:
                meshes.append(mesh)
    return meshes
