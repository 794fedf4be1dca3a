"""Memory of a training step in closed form, part by part, for our own model. Importing it imports no torch.

c bytes a number in the compute dtype, N tokens of a micro-batch, width d, feed-forward f, heads h, S text tokens of the
micro-batch, LoRA rank r. A block's values (train/recompute/block.py) by the group they are kept with:

    attention     N (2cd + 8h)                            both outputs and their log-sum-exp
    projections   N (7cd + 24) + S (2cd + 4) + low ranks  q k v q2, three normalised inputs, k2 v2, scales
    ffn_up        N cf + low ranks
    input         4Nd                                     instead of projections

The peak is reached in the last block, where everything kept lives beside what that one block works with.

A block's linears take c bytes a weight, or 1 and a scale a row (fp8), or ½ and a scale for 64 (nf4), and then one of
them is in the compute dtype at a time, the largest of d × f. Streamed, two blocks are on the device; with inputs
offloaded none is kept, and two are there in a backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from shards.gpus import CONTEXT_BYTES
from train.config.model import DiTConfig, LoRAConfig
from train.estimate.flops import adapted_linears, block_linears, first_trained_block, linear_rows
from train.geometry import SAVE_GROUPS, Shape

FRAGMENTATION = 0.04
"""Share of the allocator's peak that lies idle between allocations: an estimate."""


class BaseStore(NamedTuple):
    """How the frozen base and the inputs of its blocks are kept."""

    dtype: str = "auto"
    """`model.base_dtype`."""
    streamed: bool = False
    """Blocks lie in the host's memory; two are on the device."""
    offload_inputs: bool = False
    """Block inputs lie in the host's memory."""

    def weight_bytes(self, compute_bytes: int, inside: int, outside: int) -> int:
        """A linear's weight as it is kept."""
        count = inside * outside
        if self.dtype == "fp8":
            return count + 4 * outside
        if self.dtype == "nf4":
            return (count + 1) // 2 + 4 * -(-count // 64)
        return count * self.plain_bytes(compute_bytes)

    def plain_bytes(self, compute_bytes: int) -> int:
        """A number of biases and embeddings."""
        return 2 if self.dtype in ("bf16", "fp16") else compute_bytes

    def is_converted(self, compute_bytes: int) -> bool:
        """Whether a linear's weight is brought to the compute dtype where it is multiplied."""
        return self.dtype in ("fp8", "nf4") or self.plain_bytes(compute_bytes) != compute_bytes


AS_COMPUTED = BaseStore()
BASES = {
    "16 bit": AS_COMPUTED,
    "16 bit, inputs offloaded": BaseStore(offload_inputs=True),
    "16 bit, streamed": BaseStore(streamed=True),
    "16 bit, streamed, inputs offloaded": BaseStore(streamed=True, offload_inputs=True),
    "fp8": BaseStore("fp8"),
    "fp8, streamed, inputs offloaded": BaseStore("fp8", streamed=True, offload_inputs=True),
    "nf4": BaseStore("nf4"),
}
"""Ways that a plan compares; those of 16 bit change no bit."""


class Memory(NamedTuple):
    """Bytes of one GPU, part by part."""

    base: int
    """The model's own weights; sharded over processes where the layout says so."""
    lora: int
    """Trained weights, float32, and the copy in the compute dtype."""
    gradients: int
    """Of the trained weights, float32."""
    optimizer: int
    """Both moments, and the moving average where there is one."""
    saved: int
    """What all blocks keep for the backward pass, beside one block's working set."""
    transient: int
    """The working set of one block in its forward or backward pass, whichever is larger."""
    inputs: int
    """Latents, noise, text, rotary table, embeddings."""
    workspace: int
    """CUDA context, libraries, fragmentation: not in closed form, an estimate."""

    @property
    def allocated(self) -> int:
        """What the allocator hands out: all but the workspace."""
        return sum(self) - self.workspace

    @property
    def total(self) -> int:
        """What the GPU must have."""
        return sum(self)


def num_parameters(dims: DiTConfig) -> tuple[int, int]:
    """Weights in the compute dtype, and weights that stay float32 (norms, modulation, time embedding, head)."""
    dim, patch = dims.dim, dims.patch[0] * dims.patch[1] * dims.patch[2]
    linears = sum((inside + 1) * outside for inside, outside in block_linears(dims).values())
    block_islands = 4 * dim + 2 * dim + 6 * dim
    text = (dims.text_dim + 1) * dim + (dim + 1) * dim
    time = (dims.freq_dim + 1) * dim + (dim + 1) * dim + (dim + 1) * 6 * dim
    head = (dim + 1) * dims.out_channels * patch + 2 * dim
    wide = dims.num_layers * block_islands + time + head
    return dims.num_layers * linears + text + (dims.in_channels * patch + 1) * dim, wide


def block_bytes(dims: DiTConfig, compute_bytes: int, shards: int = 1, store: BaseStore = AS_COMPUTED) -> int:
    """A block's own weights; padded so that every one's rows divide by the ranks that they are sharded over."""
    linears = list(block_linears(dims).values())
    wide = [*((dims.dim, 1),) * 6, (1, 6 * dims.dim)]  # norms of q and k in both attentions, norm3, modulation
    if store != AS_COMPUTED:  # never sharded
        kept = sum(store.weight_bytes(compute_bytes, *size) for size in linears)
        biases = store.plain_bytes(compute_bytes) * sum(outside for _, outside in linears)
        return kept + biases + 4 * sum(rows * columns for rows, columns in wide)
    narrow = [(outside, columns) for inside, outside in linears for columns in (inside, 1)]
    sizes = [(compute_bytes, *shape) for shape in narrow] + [(4, *shape) for shape in wide]
    return sum(width * -(-rows // shards) * shards * columns for width, rows, columns in sizes)


def host_bytes(
    dims: DiTConfig, shape: Shape, saves: Sequence[Collection[str]], compute_bytes: int, store: BaseStore
) -> int:
    """Pinned memory of the host that one process takes: streamed blocks, and inputs of blocks."""
    blocks = dims.num_layers * block_bytes(dims, compute_bytes, store=store) if store.streamed else 0
    offloaded = sum("projections" not in kept for kept in saves) if store.offload_inputs else 0
    return blocks + offloaded * value_bytes(dims, shape, "input")


def num_lora_parameters(dims: DiTConfig, lora: LoRAConfig) -> int:
    """Numbers in all A and B."""
    linears = block_linears(dims)
    return sum(lora.rank * sum(linears[name]) for names in adapted_linears(dims, lora) for name in names)


def value_bytes(
    dims: DiTConfig, shape: Shape, group: str, adapted: Collection[str] = (), rank: int = 0, *, compute_bytes: int = 2
) -> int:
    """What a block keeps for one group of `flops.SAVE_GROUPS`, or for `input`."""
    tokens, dim = shape.all_tokens, dims.dim
    if group == "input":
        return 4 * tokens * dim
    if group == "attention":
        return tokens * (2 * compute_bytes * dim + 8 * dims.num_heads)
    members = [name for name in adapted if name.startswith("ffn") == (group == "ffn_up")]
    low = sum(compute_bytes * rank * linear_rows(dims, shape, name) for name in members)
    if group == "ffn_up":
        return tokens * compute_bytes * dims.ffn_dim + low
    text = shape.batch * dims.text_len
    return tokens * (7 * compute_bytes * dim + 24) + text * (2 * compute_bytes * dim + 4) + low


def kept_bytes(
    dims: DiTConfig,
    shape: Shape,
    saves: Collection[str],
    adapted: Collection[str] = (),
    rank: int = 0,
    *,
    compute_bytes: int = 2,
    offload_inputs: bool = False,
) -> int:
    """What a block keeps between its forward and its backward pass."""
    groups = [*saves, *([] if "projections" in saves or offload_inputs else ["input"])]
    return sum(value_bytes(dims, shape, g, adapted, rank, compute_bytes=compute_bytes) for g in groups)


def block_peak_bytes(
    dims: DiTConfig,
    shape: Shape,
    saves: Collection[str],
    adapted: Collection[str],
    rank: int,
    *,
    compute_bytes: int = 2,
    ulysses: int = 1,
    store: BaseStore = AS_COMPUTED,
) -> int:
    """The most that lives while a block is worked on, its kept values included, its neighbours' not.

    Three places compete: the feed-forward's way down (forward; everything of the block is alive), its backward pass,
    and the backward pass of self-attention, by when what was computed again has mostly been used up.
    """
    tokens, dim, inner, c = shape.all_tokens, dims.dim, dims.ffn_dim, compute_bytes
    values = {g: value_bytes(dims, shape, g, adapted, rank, compute_bytes=c) for g in SAVE_GROUPS}
    everything, source = sum(values.values()), 4 * tokens * dim
    down = "ffn.2" in adapted
    forward = everything + source + tokens * (4 * dim + c * inner + c * dim)
    kept_source = 0 if "projections" in saves else source
    feed_forward = everything + kept_source + tokens * (4 * dim + c * dim + c * inner * (2 if down else 1))
    # Incoming gradient and ours, one normalisation's gradient and its product in float32; q k, their gradients, input.
    attention = kept_bytes(dims, shape, saves, adapted, rank, compute_bytes=c) + tokens * (16 * dim + 3 * c * dim)
    if ulysses > 1:
        # What other ranks sent for self-attention is held from where it is computed again; else it comes beside ours.
        feed_forward += 0 if "attention" in saves else 3 * c * tokens * dim
        attention += 2 * c * tokens * dim
    if store.offload_inputs and "projections" not in saves:
        # The input of the block that comes next in the backward pass is fetched meanwhile.
        feed_forward, attention = feed_forward + source, attention + source
    if store.is_converted(c):
        forward, feed_forward = forward + c * dim * inner, feed_forward + c * dim * inner
    return max(forward, feed_forward, attention)


def input_bytes(dims: DiTConfig, shape: Shape, *, compute_bytes: int = 2, ulysses: int = 1) -> int:
    """Latent, noise, target and prediction of all tokens; text and its embedding; rotary table; constants a token."""
    patch = dims.patch[0] * dims.patch[1] * dims.patch[2]
    latents = 4 * shape.all_tokens * ulysses * patch * (3 * dims.in_channels + 2 * dims.out_channels)
    text = shape.batch * dims.text_len * (2 * dims.text_dim + compute_bytes * dims.dim)
    return latents + text + 8 * shape.tokens * dims.head_dim + 8 * shape.all_tokens


def step_memory(
    dims: DiTConfig,
    shape: Shape,
    lora: LoRAConfig,
    saves: Sequence[Collection[str]],
    *,
    compute_bytes: int = 2,
    optimizer_bytes: float = 8.0,
    moving_average: bool = False,
    base_shards: int = 1,
    ulysses: int = 1,
    store: BaseStore = AS_COMPUTED,
) -> Memory:
    """Memory of one GPU for a micro-batch of one shape.

    Args:
        saves: for each block the groups it keeps.
        optimizer_bytes: of state a trained number: 8 for AdamW, about 2 for its 8-bit form.
        base_shards: processes that the base's blocks are sharded over (two blocks are gathered at a time); what is no
            block's is replicated.
        ulysses: processes that share a sample's tokens; `shape` is what one of them holds.
        store: how the base is kept; a sharded one is as it is computed.
    """
    narrow, wide = num_parameters(dims)
    base = narrow * compute_bytes + 4 * wide
    blocks = dims.num_layers * block_bytes(dims, compute_bytes)
    if store != AS_COMPUTED:
        outside = narrow - dims.num_layers * sum((i + 1) * o for i, o in block_linears(dims).values())
        base -= blocks + outside * (compute_bytes - store.plain_bytes(compute_bytes))
        base += (2 if store.streamed else dims.num_layers) * block_bytes(dims, compute_bytes, store=store)
    elif base_shards > 1:
        gathered = block_bytes(dims, compute_bytes, base_shards)
        base += dims.num_layers * gathered // base_shards - blocks + 2 * gathered
    trained = num_lora_parameters(dims, lora)
    adapted = adapted_linears(dims, lora)
    first = first_trained_block(adapted)
    options: dict[str, Any] = {"compute_bytes": compute_bytes}
    kept = [
        kept_bytes(dims, shape, s, names, lora.rank, offload_inputs=store.offload_inputs, **options)
        if index >= first
        else 0
        for index, (s, names) in enumerate(zip(saves, adapted, strict=True))
    ]
    peak = max(
        (
            sum(kept[:index])
            + block_peak_bytes(
                dims, shape, saves[index], adapted[index], lora.rank, ulysses=ulysses, store=store, **options
            )
            for index in range(first, len(kept))
        ),
        default=0,
    )
    saved = sum(kept)
    parts = Memory(
        base=base,
        lora=trained * (4 + (compute_bytes if compute_bytes < 4 else 0)),
        gradients=4 * trained,
        optimizer=int(trained * (optimizer_bytes + (4 if moving_average else 0))),
        saved=saved,
        transient=peak - saved,
        inputs=input_bytes(dims, shape, ulysses=ulysses, **options),
        workspace=0,
    )
    return parts._replace(workspace=CONTEXT_BYTES + int(FRAGMENTATION * parts.total))
