"""`wantrain plan`: memory, seconds and days of a run before it runs, in closed form. Importing it imports no torch.

Nothing is built and nothing is traced. FLOPs are those executed, recomputation included; seconds at 100 % divide them
by the GPU's peak, and the stated efficiency is the share of that peak which training is expected to reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import UserError
from shards.gpus import Gpu
from train.config.model import TI2V_5B, DiTConfig
from train.config.train import TrainConfig, slots_per_rank
from train.estimate.communication import (
    Exchange,
    Mesh,
    candidates,
    choose_mesh,
    count_exchange,
    local_shape,
    rank_flops,
)
from train.estimate.flops import forward_flops
from train.estimate.memory import Memory
from train.estimate.saves import GIB, Saves, describe_saves, make_chooser, run_memory
from train.geometry import SAVE_GROUPS, Bucket, Shape, num_tokens

DAY_SECONDS = 86_400
HELD_OUT_PASSES = 18
"""Forward passes of one held-out clip: nine quantiles, text-to-video and image-to-video."""
ENCODE_REFERENCE = Bucket(49, 704, 1280)
"""The size that `Gpu.encode_seconds` is for."""


class Size(NamedTuple):
    """A bucket of the run and its share of the samples."""

    bucket: Bucket
    share: float


class Setting(NamedTuple):
    """One way to run, and what it comes to."""

    name: str
    saves: str
    """What the blocks keep in the largest bucket."""
    memory: Memory | None
    """Of the largest bucket; None where it is not in closed form (the whole model trains)."""
    fits: bool | None
    step_flops: float
    """Executed in a step by all GPUs, mean over the buckets."""
    seconds_at_peak: float
    """A step's."""
    seconds: float
    """A step's, at the stated efficiency, what is exchanged included."""
    mesh: Mesh = Mesh()
    exchange: Exchange = Exchange()
    """A rank's, mean over the buckets."""

    @property
    def exchange_share(self) -> float:
        """Of the step's seconds, if nothing overlaps."""
        return self.exchange.seconds / self.seconds if self.seconds else 0.0


class Estimate(NamedTuple):
    """What a run takes on some GPUs."""

    gpu: Gpu
    num_gpus: int
    efficiency: float
    sizes: tuple[Size, ...]
    settings: tuple[Setting, ...]
    chosen: Setting
    """The config's own."""
    fastest: Setting | None
    """Of those that fit."""
    layouts: tuple[Setting, ...]
    """The same checkpointing under other layouts; the configured one is not repeated."""
    num_steps: int
    train_days: float
    held_out_share: float
    """Of the run's time."""
    encode_samples: int
    encode_days: float
    """Stage 1 on as many of these GPUs, if each sample of the run is another one."""
    notes: tuple[str, ...]


def make_plan(
    config: TrainConfig,
    gpu: Gpu,
    num_gpus: int,
    sizes: Sequence[Size],
    *,
    efficiency: float | None = None,
    num_nodes: int = 1,
) -> Estimate:
    """Plan a run. Raises UserError for a precision that the GPU has not, or a batch that does not divide."""
    efficiency = gpu.efficiency if efficiency is None else efficiency
    dims, notes = _dims(config)
    compute_bytes = _compute_bytes(config, gpu, notes)
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
    if num_gpus > 1:
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
    held_out = (
        _held_out_flops(config, dims, sizes) / (gpu.peak_tflops * 1e12 * efficiency) / mesh.ulysses
    )  # every replica takes all of it
    training = chosen.seconds * config.max_steps
    samples = config.max_steps * config.data.global_batch
    return Estimate(
        gpu=gpu,
        num_gpus=num_gpus,
        efficiency=efficiency,
        sizes=tuple(sizes),
        settings=tuple(settings),
        chosen=chosen,
        fastest=min((s for s in settings if s.fits), key=lambda s: s.seconds, default=None),
        layouts=tuple(other_layouts(basis, mesh)),
        num_steps=config.max_steps,
        train_days=(training + held_out) / DAY_SECONDS,
        held_out_share=held_out / (training + held_out),
        encode_samples=samples,
        encode_days=samples * _encode_seconds(gpu, sizes) / num_gpus / DAY_SECONDS,
        notes=tuple(notes),
    )


class Basis(NamedTuple):
    """What every setting of a plan has in common."""

    config: TrainConfig
    dims: DiTConfig
    gpu: Gpu
    sizes: tuple[Size, ...]
    compute_bytes: int
    efficiency: float

    @property
    def device_bytes(self) -> int:
        """Memory of the GPU."""
        return int(self.gpu.memory_gib * GIB)


def choose_run_mesh(config: TrainConfig, num_ranks: int, num_nodes: int, device_bytes: int | None) -> tuple[Mesh, str]:
    """The layout of a run about to begin, and why: for the sizes of its dataset. Raises UserError as `choose_mesh`."""
    dims, _ = _dims(config)
    shapes: list[Shape] = []
    if device_bytes is not None and config.lora is not None:
        shapes = _shapes(config, dims, read_sizes(config, ())[0])
    compute_bytes = 4 if config.precision.compute == "fp32" else 2
    return choose_mesh(
        config, dims, num_ranks, num_nodes, shapes, device_bytes=device_bytes, compute_bytes=compute_bytes
    )


def _shapes(config: TrainConfig, dims: DiTConfig, sizes: Sequence[Size]) -> list[Shape]:
    return [Shape(config.data.micro_batch, _tokens(dims, bucket)) for bucket, _ in sizes]


def other_layouts(basis: Basis, own: Mesh) -> list[Setting]:
    """The configured checkpointing under other layouts of the same GPUs, those that are possible."""
    if basis.config.lora is None:
        return []
    data = basis.config.data
    found = []
    for mesh in candidates(basis.dims, own.num_gpus, own.num_nodes, data.global_batch, data.micro_batch):
        choose = _choices(basis, mesh)[_own_name(basis.config)]
        with contextlib.suppress(UserError):  # the memory is too small for what is configured, there
            if mesh != own:
                found.append(cost(basis, mesh, _own_name(basis.config), choose))
    return found


def read_sizes(config: TrainConfig, texts: Sequence[str]) -> tuple[list[Size], str]:
    """The buckets of the run, and in words where they are from: the command, the dataset, or the reference size."""
    if texts:
        return [Size(parse_size(text), 1 / len(texts)) for text in texts], "as given"
    from train.data.loader import select_samples
    from train.data.open import open_data

    try:
        dataset = open_data(config)
        ordinals, _ = select_samples(dataset, config.data, hold_out_one=config.eval is not None)
    except UserError as error:
        words = str(error).splitlines()[0]
        return [Size(ENCODE_REFERENCE, 1.0)], f"the reference's, since the dataset cannot be asked ({words})"
    counts: dict[Bucket, int] = {}
    for ordinal in ordinals:
        sample = dataset.samples[ordinal]
        bucket = Bucket(sample.frames, sample.height, sample.width)
        counts[bucket] = counts.get(bucket, 0) + 1
    return [Size(bucket, count / len(ordinals)) for bucket, count in sorted(counts.items())], "the dataset's"


def parse_size(text: str) -> Bucket:
    """`1280x704x49`: width, height, frames. Raises UserError."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--size {text}: not a size", expected="width x height x frames, such as 1280x704x49")
    width, height, frames = map(int, parts)
    return Bucket(frames, height, width)


def _dims(config: TrainConfig) -> tuple[DiTConfig, list[str]]:
    if config.model.dims is not None:
        return config.model.dims, []
    checkpoint = config.model.checkpoint or ""
    if Path(checkpoint).exists():
        from train.model.load import read_dit_config

        return read_dit_config(checkpoint), []
    return TI2V_5B, [f"{checkpoint} is not here: sizes of Wan2.2-TI2V-5B are taken"]


def _compute_bytes(config: TrainConfig, gpu: Gpu, notes: list[str]) -> int:
    compute = config.precision.compute
    if compute == "bf16" and gpu.precision == "fp16":
        raise UserError(f"precision.compute: bf16 is only emulated on a {gpu.name}", fix="precision.compute=auto")
    if compute == "fp32":
        notes.append("fp32 stays far below the 16-bit peak that the seconds are counted by")
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
            )
    elif config.checkpointing.policy == "auto":
        choices["auto"] = choices["full"]
    return choices


def _constant(saves: Saves) -> Callable[[Shape], Saves]:
    return lambda shape: saves


def cost(basis: Basis, mesh: Mesh, name: str, choose: Callable[[Shape], Saves]) -> Setting:
    """Mean FLOPs and exchange of a step; memory and kept values of the bucket that takes the most."""
    config, dims, gpu = basis.config, basis.dims, basis.gpu
    flops, exchange, largest, words = 0.0, Exchange(), None, ""
    micro = config.data.micro_batch
    for bucket, share in basis.sizes:
        shape = Shape(micro, _tokens(dims, bucket))
        here = local_shape(shape, mesh.ulysses)
        saves = choose(here)
        flops += share * rank_flops(dims, shape, config.lora, saves, mesh.ulysses) * mesh.ulysses
        counted = count_exchange(config, dims, mesh, gpu, shape, saves, basis.compute_bytes)
        exchange = Exchange(*(total + share * part for total, part in zip(exchange, counted, strict=True)))
        if config.lora is None:
            words = "what autograd does" if saves[0] else "input only"
            continue
        memory = run_memory(config, dims, here, saves, basis.compute_bytes, mesh.base_shards, mesh.ulysses)
        if largest is None or memory.total > largest.total:
            largest, words = memory, describe_saves(saves)
    flops *= config.data.global_batch / micro
    at_peak = flops / (gpu.peak_tflops * 1e12 * mesh.num_gpus)
    fits = None if largest is None else largest.total <= basis.device_bytes
    seconds = at_peak / basis.efficiency + exchange.seconds
    return Setting(name, words, largest, fits, flops, at_peak, seconds, mesh, exchange)


def _tokens(dims: DiTConfig, bucket: Bucket) -> int:
    try:
        return num_tokens(dims, *bucket)
    except ValueError as error:
        raise UserError(f"size {bucket}: {error}") from None


def _held_out_flops(config: TrainConfig, dims: DiTConfig, sizes: Sequence[Size]) -> float:
    if config.eval is None:
        return 0.0
    evaluations = 1 + -(-config.max_steps // config.eval.every_steps)
    one = sum(share * forward_flops(dims, Shape(1, _tokens(dims, bucket)), config.lora) for bucket, share in sizes)
    return one * HELD_OUT_PASSES * config.eval.num_clips * evaluations


def _encode_seconds(gpu: Gpu, sizes: Sequence[Size]) -> float:
    """Seconds of VAE encoding of a mean sample: 4.2 + 12.6 a further latent frame, by area (wan22.md, section 3)."""

    def work(bucket: Bucket) -> float:
        return (4.2 + 12.6 * ((bucket.frames - 1) // 4)) * bucket.height * bucket.width

    return gpu.encode_seconds * sum(share * work(bucket) for bucket, share in sizes) / work(ENCODE_REFERENCE)


# A plan for people and for programs. Importing it imports no torch.


def as_json(plan: Estimate) -> dict[str, Any]:
    """The plan as JSON values."""

    def setting(value: Setting | None) -> dict[str, Any] | None:
        if value is None:
            return None
        memory = value.memory and value.memory._asdict() | {"total": value.memory.total}
        exchange = value.exchange._asdict() | {"share": value.exchange_share}
        return value._asdict() | {"memory": memory, "mesh": value.mesh._asdict(), "exchange": exchange}

    values = plan._asdict()
    values["gpu"] = plan.gpu._asdict()
    values["sizes"] = [{"size": str(size.bucket), "share": size.share} for size in plan.sizes]
    values["settings"] = [setting(value) for value in plan.settings]
    values["layouts"] = [setting(value) for value in plan.layouts]
    values["chosen"], values["fastest"] = setting(plan.chosen), setting(plan.fastest)
    return values


def describe_estimate(plan: Estimate, origin: str = "as given") -> list[str]:
    """The plan for people, a line an entry."""
    gpu = plan.gpu
    sizes = ", ".join(f"{size.bucket} ({size.share:.0%})" for size in plan.sizes)
    lines = [
        f"{plan.num_gpus} × {gpu.name}: {gpu.peak_tflops:g} TFLOP/s {gpu.precision} peak and {gpu.memory_gib:g} GiB "
        f"each; efficiency {plan.efficiency:.0%} (an estimate)",
        f"sizes, {origin}: {sizes}",
        "",
        f"{'checkpointing':<26}{'memory':>10}  {'fits':<5}{'TFLOP/step':>11}{'at 100 %':>11}{'s/step':>9}{'days':>8}",
    ]
    for setting in plan.settings:
        memory = "not known" if setting.memory is None else f"{setting.memory.total / GIB:.1f} GiB"
        fits = {True: "yes", False: "no", None: "?"}[setting.fits]
        mark = " ◀ configured" if setting is plan.chosen else ""
        mark += " ◀ fastest" if setting is plan.fastest else ""
        days = plan.num_steps * setting.seconds / DAY_SECONDS
        lines.append(
            f"{setting.name:<26}{memory:>10}  {fits:<5}{setting.step_flops / 1e12:>11,.0f}"
            f"{setting.seconds_at_peak:>9.2f} s{setting.seconds:>9.2f}{days:>8.2f}{mark}"
        )
    lines += ["", *describe_layouts(plan), *describe_memory(plan.chosen), ""]
    lines += [
        f"training: {plan.train_days:.2f} days, of which the held-out loss takes {plan.held_out_share:.1%}",
        f"stage 1 before it: {plan.encode_days:.2f} days to encode {plan.encode_samples:,} samples on the same GPUs "
        f"(an estimate; `wanprep plan` knows more)",
    ]
    return lines + [f"note: {note}" for note in plan.notes]


def describe_layouts(plan: Estimate) -> list[str]:
    """What else the same GPUs could do, and what is exchanged; nothing for one GPU."""
    if plan.num_gpus == 1:
        return []
    words = ("layout, same checkpointing", "memory", "fits", "s/step", "exchanged", "of the step")
    lines = ["{:<30}{:>10}  {:<5}{:>9}{:>12}{:>12}".format(*words)]
    for setting in (plan.chosen, *plan.layouts):
        memory = "not known" if setting.memory is None else f"{setting.memory.total / GIB:.1f} GiB"
        fits = {True: "yes", False: "no", None: "?"}[setting.fits]
        moved = f"{setting.exchange.total_bytes / 1e9:,.2f} GB"
        mark = " ◀ configured" if setting is plan.chosen else ""
        lines.append(
            f"{setting.mesh!s:<30}{memory:>10}  {fits:<5}{setting.seconds:>9.2f}{moved:>12}"
            f"{setting.exchange_share:>12.1%}{mark}"
        )
    bandwidth = f"{plan.gpu.link_gb_per_second:g} GB/s within a machine"
    if plan.chosen.mesh.num_nodes > 1:
        bandwidth += f", {plan.gpu.network_gb_per_second:g} between them"
    return [*lines, f"exchanged a GPU and step, at {bandwidth} (assumed), nothing overlapped", ""]


def describe_memory(setting: Setting) -> list[str]:
    """Memory of a setting, part by part."""
    if setting.memory is None:
        return ["memory: not in closed form when the whole model trains"]
    parts = setting.memory._asdict()
    lines = [f"memory of {setting.name}: {setting.saves}"]
    for name, size in parts.items():
        guess = " (an estimate)" if name == "workspace" else ""
        lines.append(f"  {name:<10}{size / GIB:>8.2f} GiB{guess}")
    return lines
