"""`wantrain plan`: memory, seconds and days of a run before it runs, in closed form. Importing it imports no torch.

Nothing is built and nothing is traced. FLOPs are those executed, recomputation included; seconds at 100 % divide them
by the GPU's peak. The likely seconds take GEMMs, attention's forward and backward pass and memory traffic apart, each
at the rate that is expected of the GPU (shards/gpus.py); the optimistic and pessimistic ones are these times a factor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shards.errors import UserError
from shards.gpus import DAY_SECONDS, Gpu, VaeMode, vae_encode_tflop
from train.config.model import DiTConfig
from train.config.train import TrainConfig, is_quantised, slots_per_rank
from train.estimate.communication import (
    Exchange,
    Mesh,
    Transfer,
    candidates,
    choose_mesh,
    conversion_traffic,
    count_exchange,
    count_transfer,
    forward_exchange_seconds,
    local_shape,
    rank_work,
)
from train.estimate.flops import Work, forward_work, with_compile
from train.estimate.memory import BASES, Memory, host_bytes
from train.estimate.saves import GIB, Saves, base_store, describe_saves, make_chooser, run_memory
from train.estimate.sizes import Size, read_dims, read_sizes
from train.geometry import SAVE_GROUPS, TEMPORAL_STRIDE, Bucket, Shape, num_tokens

NUM_LEVELS = 9
"""Noise levels of the held-out loss; at each a clip of several latent frames is seen in two modes."""
OPTIMISTIC, PESSIMISTIC = 0.76, 1.4
"""The range of the likely seconds: every kernel near its best, and every kernel at the worst that was reported."""
SMALL_SIZE = (480, 832)
"""Height and width that the proxies of broadcast archives suffice for."""


class Setting(NamedTuple):
    """One way to run, and what it comes to."""

    name: str
    saves: str
    """What the blocks keep in the largest bucket."""
    memory: Memory | None
    """Of the largest bucket."""
    fits: bool | None
    step_flops: float
    """Executed in a step by all GPUs, mean over the buckets."""
    seconds_at_peak: float
    """A step's."""
    work_seconds: Work
    """A step's on one GPU, part by part: the likely ones."""
    mesh: Mesh = Mesh()
    exchange: Exchange = Exchange()
    """A rank's, mean over the buckets."""
    transfer: Transfer = Transfer()
    """Between a GPU and its host, a step's."""
    host_bytes: int = 0
    """Pinned memory of the host a process: streamed blocks, and the largest bucket's inputs of blocks."""

    @property
    def seconds(self) -> float:
        """A step's, likely, what is exchanged included, and what of the transfers is not hidden."""
        return sum(self.work_seconds) + self.exchange.seconds + self.transfer.exposed_seconds

    def days(self, num_steps: int, factor: float = 1.0) -> float:
        """Of so many steps; `factor` is OPTIMISTIC or PESSIMISTIC."""
        apart = self.exchange.seconds + self.transfer.exposed_seconds
        return num_steps * (factor * sum(self.work_seconds) + apart) / DAY_SECONDS

    @property
    def exchange_share(self) -> float:
        """Of the step's seconds, if nothing overlaps."""
        return self.exchange.seconds / self.seconds if self.seconds else 0.0


class Estimate(NamedTuple):
    """What a run takes on some GPUs."""

    gpu: Gpu
    num_gpus: int
    sizes: tuple[Size, ...]
    settings: tuple[Setting, ...]
    chosen: Setting
    """The config's own."""
    fastest: Setting | None
    """Of those that fit."""
    layouts: tuple[Setting, ...]
    """The same checkpointing under other layouts; the configured one is not repeated."""
    bases: tuple[Setting, ...]
    """The same layout with the base kept in other ways, as much kept as fits."""
    fastest_exact: Setting | None
    """Of those that fit and change no bit."""
    fastest_base: Setting | None
    """Of all that fit."""
    num_steps: int
    train_days: float
    train_days_range: tuple[float, float]
    """Optimistic and pessimistic."""
    held_out_share: float
    """Of the run's time."""
    encode_samples: int
    encode_mode: VaeMode
    """Of the dataset; fp32, the default of `encoders.vae_precision`, where it cannot be read."""
    encode_days: float
    """Stage 1 on as many of these GPUs in that mode, if each sample of the run is another one."""
    encode_days_fast: float
    """The same in 16 bits."""
    shorter: tuple[str, ...]
    """What would shorten the run, the largest gain first."""
    notes: tuple[str, ...]


def make_plan(
    config: TrainConfig,
    gpu: Gpu,
    num_gpus: int,
    sizes: Sequence[Size],
    *,
    efficiency: float | None = None,
    num_nodes: int = 1,
    vae_mode: VaeMode = "fp32",
) -> Estimate:
    """Plan a run. Raises UserError for a precision that the GPU has not, or a batch that does not divide.

    Args:
        efficiency: share of the peak that everything reaches, in place of the GPU's expected rates.
        vae_mode: what stage 1 encodes in.
    """
    dims, notes = read_dims(config)
    compute_bytes = _compute_bytes(config, gpu, notes)
    config = with_compile(config, dims, gpu, _shapes(config, dims, sizes), num_gpus, notes)
    basis = Basis(config, dims, gpu, tuple(sizes), compute_bytes, efficiency)
    mesh, reason = choose_mesh(
        config,
        dims,
        num_gpus,
        num_nodes,
        _shapes(config, dims, sizes),
        device_bytes=basis.device_bytes,
        compute_bytes=compute_bytes,
    )
    if num_gpus > 1 or mesh.streamed:
        notes.append(f"layout: {reason}")
    slots_per_rank(config.data, mesh.dp_size)
    settings = []
    for name, choose in _choices(basis, mesh).items():
        try:
            settings.append(cost(basis, mesh, name, choose))
        except UserError as error:
            if name == _own_name(config):
                raise
            notes.append(f"{name}: {str(error).splitlines()[0]}")
    chosen = next(setting for setting in settings if setting.name == _own_name(config))
    if chosen.fits is False:
        notes.append(
            f"{chosen.name} does not fit a {gpu.name}: lower data.micro_batch or set checkpointing.policy: auto"
        )
    held_out, held_out_exchange = _held_out_seconds(basis, mesh)
    training = chosen.seconds * config.max_steps
    samples = config.max_steps * config.data.global_batch
    encode = {mode: _encode_days(gpu, mode, sizes, samples, num_gpus) for mode in ("fp32", "fp16")}
    encode_days = encode["fp32" if vae_mode == "fp32" else "fp16"]
    low, high = (
        chosen.days(config.max_steps, f) + (f * held_out + held_out_exchange) / DAY_SECONDS
        for f in (OPTIMISTIC, PESSIMISTIC)
    )
    held_out += held_out_exchange
    bases = base_settings(basis, mesh)
    fitting = sorted((base for base in bases.values() if base.fits), key=lambda base: base.seconds)
    return Estimate(
        gpu=gpu,
        num_gpus=num_gpus,
        sizes=tuple(sizes),
        settings=tuple(settings),
        chosen=chosen,
        fastest=min((s for s in settings if s.fits), key=lambda s: s.seconds, default=None),
        layouts=tuple(other_layouts(basis, mesh)),
        bases=tuple(bases.values()),
        fastest_exact=next((base for base in fitting if BASES[base.name].dtype == "auto"), None),
        fastest_base=next(iter(fitting), None),
        num_steps=config.max_steps,
        train_days=(training + held_out) / DAY_SECONDS,
        train_days_range=(low, high),
        held_out_share=held_out / (training + held_out),
        encode_samples=samples,
        encode_mode=vae_mode,
        encode_days=encode_days,
        encode_days_fast=encode["fp16"],
        shorter=tuple(_suggestions(basis, chosen, encode_days, encode["fp16"])),
        notes=tuple(notes),
    )


class Basis(NamedTuple):
    """What every setting of a plan has in common."""

    config: TrainConfig
    dims: DiTConfig
    gpu: Gpu
    sizes: tuple[Size, ...]
    compute_bytes: int
    efficiency: float | None

    @property
    def device_bytes(self) -> int:
        """Memory of the GPU."""
        return int(self.gpu.memory_gib * GIB)


def choose_run_mesh(config: TrainConfig, num_ranks: int, num_nodes: int, device_bytes: int | None) -> tuple[Mesh, str]:
    """The layout of a run about to begin, and why: for the sizes of its dataset. Raises UserError as `choose_mesh`."""
    dims, _ = read_dims(config)
    shapes: list[Shape] = []
    if device_bytes is not None:
        shapes = _shapes(config, dims, read_sizes(config, ())[0])
    compute_bytes = 4 if config.precision.compute == "fp32" else 2
    return choose_mesh(
        config, dims, num_ranks, num_nodes, shapes, device_bytes=device_bytes, compute_bytes=compute_bytes
    )


def _shapes(config: TrainConfig, dims: DiTConfig, sizes: Sequence[Size]) -> list[Shape]:
    return [Shape(config.data.micro_batch, _tokens(dims, bucket)) for bucket, _ in sizes]


def other_layouts(basis: Basis, own: Mesh) -> list[Setting]:
    """The configured checkpointing under other layouts of the same GPUs, those that are possible."""
    data = basis.config.data
    found = []
    for mesh in candidates(basis.dims, own.num_gpus, own.num_nodes, data.global_batch, data.micro_batch):
        if mesh.base_shards > 1 and (basis.config.model.stream_blocks is True or is_quantised(basis.config)):
            continue
        place = mesh._replace(streamed=own.streamed and mesh.base_shards == 1)
        choose = _choices(basis, place)[_own_name(basis.config)]
        with contextlib.suppress(UserError):  # the memory is too small for what is configured, there
            if place != own:
                found.append(cost(basis, place, _own_name(basis.config), choose))
    return found


def base_settings(basis: Basis, mesh: Mesh) -> dict[str, Setting]:
    """Each way to keep the base on one process, with as much kept of the activations as fits."""
    config, found = basis.config, {}
    if config.lora is None or mesh.base_shards > 1 or basis.compute_bytes != 2:
        return {}
    for name, store in BASES.items():
        model = {"base_dtype": store.dtype, "stream_blocks": store.streamed}
        checkpointing = {"policy": "auto", "budget_gib": None, "offload_inputs": store.offload_inputs}
        tried = config.model_copy(
            update={
                "model": config.model.model_copy(update=model),
                "checkpointing": config.checkpointing.model_copy(update=checkpointing),
            }
        )
        other, place = basis._replace(config=tried), mesh._replace(streamed=store.streamed)
        try:
            found[name] = cost(other, place, name, _choices(other, place)["auto"])
        except UserError:  # it does not fit with every block recomputed
            found[name] = cost(other, place, name, _constant(((),) * basis.dims.num_layers))._replace(fits=False)
    return found


def _compute_bytes(config: TrainConfig, gpu: Gpu, notes: list[str]) -> int:
    compute = config.precision.compute
    if compute == "bf16" and gpu.precision == "fp16":
        raise UserError(f"precision.compute: bf16 is only emulated on a {gpu.name}", fix="precision.compute=auto")
    if compute == "fp32":
        notes.append("fp32 uses no tensor cores: the 16-bit peak is out of its reach")
    return 4 if compute == "fp32" else 2


def _own_name(config: TrainConfig) -> str:
    budget = config.checkpointing.budget_gib
    return config.checkpointing.policy + (f" ({budget:g} GiB)" if budget is not None else "")


def _choices(basis: Basis, mesh: Mesh) -> dict[str, Callable[[Shape], Saves]]:
    """Settings to compare, by name; the config's own among them."""
    config, dims = basis.config, basis.dims
    everywhere = {
        "none": SAVE_GROUPS,
        "attention + projections": ("attention", "projections"),
        "attention": ("attention",),
        "full": (),
    }
    if config.lora is None:
        everywhere = {name: everywhere[name] for name in ("none", "full")}
    choices = {name: _constant((kept,) * dims.num_layers) for name, kept in everywhere.items()}
    if config.lora is not None:
        own = config.checkpointing.model_copy(update={"policy": "auto", "budget_gib": None})
        automatic = config.model_copy(update={"checkpointing": own})
        for name, settings in (("auto", automatic), (_own_name(config), config)):
            choices[name] = make_chooser(
                settings,
                dims,
                device_bytes=basis.device_bytes,
                compute_bytes=basis.compute_bytes,
                base_shards=mesh.base_shards,
                ulysses=mesh.ulysses,
                streamed=mesh.streamed,
            )
    elif config.checkpointing.policy == "auto":
        choices["auto"] = choices["full"]
    return choices


def _constant(saves: Saves) -> Callable[[Shape], Saves]:
    return lambda shape: saves


def cost(basis: Basis, mesh: Mesh, name: str, choose: Callable[[Shape], Saves]) -> Setting:
    """Mean FLOPs and exchange of a step; memory and kept values of the bucket that takes the most."""
    config, dims, gpu = basis.config, basis.dims, basis.gpu
    work, exchange, largest, words = Work(0, 0, 0, 0), Exchange(), None, ""
    transfer, of_host, store = Transfer(), 0, base_store(config, mesh.streamed)
    micro = config.data.micro_batch
    for bucket, share in basis.sizes:
        shape = Shape(micro, _tokens(dims, bucket))
        here = local_shape(shape, mesh.ulysses)
        saves = choose(here)
        own = rank_work(dims, shape, config.lora, saves, mesh.ulysses, compiled=config.model.compile is True)
        if config.lora is not None:
            converted = conversion_traffic(config, dims, saves, basis.compute_bytes, store)
            own = own._replace(traffic_bytes=own.traffic_bytes + converted)
            forward = sum(_work_seconds(basis, forward_work(dims, shape, config.lora))) / mesh.ulysses
            passes = forward, max(0.0, sum(_work_seconds(basis, own)) - forward)
            moved = count_transfer(config, dims, gpu, here, saves, basis.compute_bytes, passes, store)
            transfer = Transfer(*(total + share * part for total, part in zip(transfer, moved, strict=True)))
            of_host = max(of_host, host_bytes(dims, here, saves, basis.compute_bytes, store))
        work = Work(*(total + share * part for total, part in zip(work, own, strict=True)))
        counted = count_exchange(config, dims, mesh, gpu, shape, saves, basis.compute_bytes)
        exchange = Exchange(*(total + share * part for total, part in zip(exchange, counted, strict=True)))
        parts = mesh.memory_parts
        memory = run_memory(config, dims, here, saves, basis.compute_bytes, *parts, num_ranks=mesh.num_gpus)
        if largest is None or memory.total > largest.total:
            largest, words = memory, describe_saves(saves)
    micro_steps = config.data.global_batch / micro / mesh.dp_size
    work, transfer = work.scaled(micro_steps), Transfer(*(micro_steps * part for part in transfer))
    fits = None if largest is None else largest.total <= basis.device_bytes
    at_peak = work.flops / (gpu.peak_tflops * 1e12)
    seconds = _work_seconds(basis, work)
    flops = work.flops * mesh.num_gpus
    return Setting(name, words, largest, fits, flops, at_peak, seconds, mesh, exchange, transfer, of_host)


def _work_seconds(basis: Basis, work: Work) -> Work:
    if basis.efficiency is None:
        return work.seconds(basis.gpu, basis.compute_bytes)
    return work.scaled(1 / (basis.gpu.peak_tflops * 1e12 * basis.efficiency))._replace(traffic_bytes=0.0)


def _tokens(dims: DiTConfig, bucket: Bucket) -> int:
    try:
        return num_tokens(dims, *bucket)
    except ValueError as error:
        raise UserError(f"size {bucket}: {error}") from None


def _held_out_seconds(basis: Basis, mesh: Mesh) -> tuple[float, float]:
    """Of all evaluations of a run on one GPU: seconds of work, and of exchanges.

    Forward passes are divided among the ranks round by round (train/evaluate.py), a pass's seconds each.
    """
    config, dims = basis.config, basis.dims
    if config.eval is None:
        return 0.0, 0.0
    work, exchanged, passes = 0.0, 0.0, 0.0
    for bucket, share in basis.sizes:
        num_modes = 2 if bucket.frames > TEMPORAL_STRIDE else 1
        here = share * config.eval.num_clips / config.eval.batch * NUM_LEVELS * num_modes
        shape = Shape(config.eval.batch, _tokens(dims, bucket))
        work += here * sum(_work_seconds(basis, forward_work(dims, shape, config.lora))) / mesh.ulysses
        exchanged += here * forward_exchange_seconds(config, dims, mesh, basis.gpu, shape, basis.compute_bytes)
        passes += here
    evaluations = 1 + -(-config.max_steps // config.eval.every_steps)
    times = evaluations * math.ceil(passes / mesh.dp_size) / passes
    return times * work, times * exchanged


def _encode_days(gpu: Gpu, mode: VaeMode, sizes: Sequence[Size], num_samples: int, num_gpus: int) -> float:
    tflop = sum(share * vae_encode_tflop(bucket.width, bucket.height, bucket.frames) for bucket, share in sizes)
    return num_samples * gpu.encode_seconds(mode, tflop) / num_gpus / DAY_SECONDS


def _suggestions(basis: Basis, chosen: Setting, encode_days: float, encode_fast: float) -> list[str]:
    """What would shorten both stages, with figures, the largest gain in days first."""
    config, found = basis.config, []
    days = chosen.days(config.max_steps)

    def other(sizes: Sequence[Size], **changes: Any) -> float:
        tried = basis._replace(config=config.model_copy(update=changes), sizes=tuple(sizes))
        with contextlib.suppress(UserError):
            return cost(tried, chosen.mesh, "", _choices(tried, chosen.mesh)[_own_name(config)]).days(config.max_steps)
        return days

    height, width = SMALL_SIZE
    if any(size.bucket.height * size.bucket.width > height * width for size in basis.sizes):
        small = [Size(Bucket(size.bucket.frames, height, width), size.share) for size in basis.sizes]
        less = days - other(small)
        share = _encode_days(basis.gpu, "fp32", small, 1, 1) / _encode_days(basis.gpu, "fp32", basis.sizes, 1, 1)
        found.append(
            (
                less + encode_days * (1 - share),
                f"832×480, where the clips are no larger: training {days - less:.2f} days, stage 1 "
                f"{encode_days * share:.2f}",
            )
        )
        if config.lora is not None:
            words = f"that LoRA (lora.start_from): training {days - 0.8 * less:.2f} days"
            found.append((0.8 * less, f"80 % of the steps at 832×480, then the rest at full size from {words}"))
    found.append((0.75 * encode_days, f"a quarter of the clips for four epochs: stage 1 {encode_days / 4:.2f} days"))
    if encode_fast < 0.9 * encode_days:
        words = f"encoders.vae_precision=auto: stage 1 {encode_fast:.2f} days, if 16 bits agree with fp32 on this card"
        found.append((encode_days - encode_fast, words))
    if basis.compute_bytes == 4:
        quick = basis._replace(compute_bytes=2)
        fast = cost(quick, chosen.mesh, "", _choices(quick, chosen.mesh)[_own_name(config)]).days(config.max_steps)
        found.append((days - fast, f"precision.compute=auto ({basis.gpu.precision}): training {fast:.2f} days"))
    if not config.model.compile and (config.lora is not None or chosen.mesh.base_shards == 1):
        fast = other(basis.sizes, model=config.model.model_copy(update={"compile": True}))
        found.append((days - fast, f"model.compile=true: training {fast:.2f} days"))
    total = max(days + encode_days, 1e-12)
    return [words for gain, words in sorted(found, key=lambda item: -item[0]) if gain > 0.01 * total]
