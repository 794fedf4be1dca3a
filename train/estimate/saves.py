"""Which values each block keeps: from a policy, a shape and a budget to groups. Importing it imports no torch.

Groups are ranked by what they cost to compute again for each byte they take. Attention's outputs lead at 4,000 tokens
and more (4(N + S)d FLOPs for 4d bytes a token), then q k v with the normalised inputs, then the feed-forward's inner
activation. The last blocks are given theirs first: their backward pass begins while everything else is alive, so they
are the ones that should not have to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from shards.errors import UserError
from shards.gpus import GIB
from train.config.model import DiTConfig, LoRAConfig
from train.config.optim import OptimConfig
from train.config.train import TrainConfig
from train.estimate.flops import adapted_linears, first_trained_block, recompute_flops
from train.estimate.full import full_memory
from train.estimate.memory import BaseStore, Memory, kept_bytes, step_memory
from train.geometry import SAVE_GROUPS, Shape

Saves = tuple[Collection[str], ...]
AUTO_SHARE = 0.97
"""Share of a GPU's free memory that `auto` plans with: the workspace within it is an estimate."""


def rank_groups(
    dims: DiTConfig, shape: Shape, adapted: Collection[str] = (), rank: int = 0, *, compute_bytes: int = 2
) -> list[str]:
    """Save groups, the most FLOPs a byte first."""

    def worth(group: str) -> float:
        nothing = kept_bytes(dims, shape, (), adapted, rank, compute_bytes=compute_bytes)
        kept = kept_bytes(dims, shape, (group,), adapted, rank, compute_bytes=compute_bytes)
        return recompute_flops(dims, shape, group, adapted, rank) / (kept - nothing)

    return sorted(SAVE_GROUPS, key=worth, reverse=True)


def save_most(
    dims: DiTConfig, shape: Shape, lora: LoRAConfig, fits: Callable[[Saves], bool], *, compute_bytes: int = 2
) -> Saves | None:
    """The mix that keeps the most under `fits`, group by group in rank order; None when keeping nothing is too much."""
    adapted = adapted_linears(dims, lora)
    first = first_trained_block(adapted)
    order = [
        (group, index)
        for group in rank_groups(dims, shape, adapted[-1], lora.rank, compute_bytes=compute_bytes)
        for index in reversed(range(first, dims.num_layers))
    ]

    def keeping(count: int) -> Saves:
        kept: list[list[str]] = [[] for _ in adapted]
        for group, index in order[:count]:
            kept[index].append(group)
        return tuple(tuple(groups) for groups in kept)

    if not fits(keeping(0)):
        return None
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(keeping(middle)) else (low, middle - 1)
    return keeping(low)


def total_kept(dims: DiTConfig, shape: Shape, lora: LoRAConfig, saves: Saves, **options: Any) -> int:
    """Bytes that all blocks keep; `options` as of `kept_bytes`."""
    adapted = adapted_linears(dims, lora)
    first = first_trained_block(adapted)
    pairs = list(zip(saves, adapted, strict=True))[first:]
    return sum(kept_bytes(dims, shape, s, names, lora.rank, **options) for s, names in pairs)


def run_memory(
    config: TrainConfig,
    dims: DiTConfig,
    shape: Shape,
    saves: Sequence[Collection[str]],
    compute_bytes: int,
    base_shards: int = 1,
    ulysses: int = 1,
    streamed: bool = False,
    *,
    num_ranks: int = 1,
) -> Memory:
    """`step_memory`, or `full_memory`, as a run is configured; `streamed` also where `auto` chose it.

    `num_ranks` counts where every weight trains.
    """
    if config.lora is None:
        return full_memory(
            config,
            dims,
            shape,
            recomputed=not saves[0],
            compute_bytes=compute_bytes,
            optimizer_bytes=_optimizer_bytes(config.optim),
            shards=base_shards,
            ulysses=ulysses,
            num_ranks=num_ranks,
        )
    return step_memory(
        dims,
        shape,
        config.lora,
        saves,
        compute_bytes=compute_bytes,
        optimizer_bytes=_optimizer_bytes(config.optim),
        moving_average=config.optim.ema_decay is not None,
        base_shards=base_shards,
        ulysses=ulysses,
        store=base_store(config, streamed),
    )


def _optimizer_bytes(config: OptimConfig) -> float:
    """Of state a trained number; of an optimizer that is not ours it is measured. Raises UserError as that does."""
    if config.is_own:
        return 2.1 if config.name == "adamw8bit" else 8.0
    import json

    from train.optim import probe_optimizer

    return probe_optimizer(config.name, json.dumps(config.args))


def base_store(config: TrainConfig, streamed: bool = False) -> BaseStore:
    """How a run's base is kept."""
    streamed = streamed or config.model.stream_blocks is True
    return BaseStore(config.model.base_dtype, streamed, config.checkpointing.offload_inputs)


def make_chooser(
    config: TrainConfig,
    dims: DiTConfig,
    *,
    device_bytes: int | None,
    compute_bytes: int = 2,
    base_shards: int = 1,
    ulysses: int = 1,
    streamed: bool = False,
) -> Callable[[Shape], Saves]:
    """From the shape of a micro-batch to what each block keeps, for a frozen base.

    Args:
        device_bytes: memory of the GPU that the run can use, for `auto`; None (a CPU) keeps everything.
        base_shards: ranks that one copy of the base is sharded over.
        ulysses: ranks that share a sample's tokens; shapes are what one of them holds.
        streamed: blocks are streamed, as configured or as `auto` chose.
    Raises (when called): UserError where not even the least fits, with what would.
    """
    policy, lora = config.checkpointing.policy, _frozen_base(config)
    everything, nothing = (SAVE_GROUPS,) * dims.num_layers, ((),) * dims.num_layers

    def memory(shape: Shape, saves: Saves) -> Memory:
        return run_memory(config, dims, shape, saves, compute_bytes, base_shards, ulysses, streamed)

    @lru_cache(maxsize=64)
    def choose(shape: Shape) -> Saves:
        if policy == "none" or (policy == "auto" and device_bytes is None):
            return everything
        if policy == "full":
            return nothing
        if policy == "auto":
            limit = int(AUTO_SHARE * (device_bytes or 0))
            chosen = save_most(
                dims,
                shape,
                lora,
                lambda saves: memory(shape, saves).total <= limit,
                compute_bytes=compute_bytes,
            )
            if chosen is None:
                _refuse_device(shape, memory(shape, nothing), limit, base_store(config, streamed))
            return chosen
        budget = int((config.checkpointing.budget_gib or 0) * GIB)
        options = {"compute_bytes": compute_bytes, "offload_inputs": config.checkpointing.offload_inputs}
        chosen = save_most(
            dims,
            shape,
            lora,
            lambda saves: total_kept(dims, shape, lora, saves, **options) <= budget,
            compute_bytes=compute_bytes,
        )
        if chosen is None:
            least = total_kept(dims, shape, lora, nothing, **options) / GIB
            raise UserError(
                f"checkpointing.budget_gib: {config.checkpointing.budget_gib:g} is less than the blocks' inputs alone",
                expected=f"at least {least:.2f} for {shape.batch} samples of {shape.tokens:,} tokens",
                fix="raise it, lower data.micro_batch, or set checkpointing.policy: auto",
            )
        return chosen

    return choose


def _refuse_device(shape: Shape, need: Memory, limit: int, store: BaseStore) -> NoReturn:
    fix = "shorter or smaller buckets, or a GPU with more memory"
    if not store.offload_inputs:
        fix = "checkpointing.offload_inputs=true; " + fix
    if not store.streamed:
        fix = "model.stream_blocks=true; " + fix
    if shape.batch > 1:
        fix = f"data.micro_batch: 1 (it is {shape.batch}); " + fix
    raise UserError(
        f"{shape.batch} samples of {shape.tokens:,} tokens need {need.total / GIB:.1f} GiB with every block recomputed",
        expected=f"at most {limit / GIB:.1f} GiB, {AUTO_SHARE:.0%} of what is free on this GPU",
        fix=fix,
    )


def _frozen_base(config: TrainConfig) -> LoRAConfig:
    if config.lora is None:
        raise ValueError("every weight trains (lora: null): autograd decides what its blocks keep")
    return config.lora


def describe_saves(saves: Sequence[Collection[str]]) -> str:
    """A mix in words: `10 × all, 20 × attention + projections`."""
    counts: dict[str, int] = {}
    for groups in saves:
        names = [name for name in SAVE_GROUPS if name in groups]
        text = "all" if len(names) == len(SAVE_GROUPS) else " + ".join(names) or "input only"
        counts[text] = counts.get(text, 0) + 1
    return ", ".join(f"{count} × {text}" for text, count in sorted(counts.items(), key=lambda item: -item[1]))
