"""`wantrain plan`: memory, seconds and days of a run before it runs, in closed form. Importing it imports no torch.

Nothing is built and nothing is traced. FLOPs are those executed, recomputation included; seconds at 100 % divide them
by the GPU's peak, and the stated efficiency is the share of that peak which training is expected to reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import UserError
from train.config import TrainConfig, slots_per_rank
from train.flops import SAVE_GROUPS, Shape, forward_flops, num_tokens, step_flops
from train.hardware import Gpu
from train.memory import Memory, num_lora_parameters, num_parameters
from train.model_config import TI2V_5B, DiTConfig
from train.order import Bucket
from train.policy import GIB, Saves, describe_saves, make_chooser, run_memory

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
    """A step's, at the stated efficiency."""


class Plan(NamedTuple):
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
    num_steps: int
    reduce_seconds: float
    """Summing LoRA gradients over the GPUs, once a step."""
    train_days: float
    held_out_share: float
    """Of the run's time."""
    encode_samples: int
    encode_days: float
    """Stage 1 on as many of these GPUs, if each sample of the run is another one."""
    notes: tuple[str, ...]


def make_plan(
    config: TrainConfig, gpu: Gpu, num_gpus: int, sizes: Sequence[Size], *, efficiency: float | None = None
) -> Plan:
    """Plan a run. Raises UserError for a precision that the GPU has not, or a batch that does not divide."""
    efficiency = gpu.efficiency if efficiency is None else efficiency
    slots_per_rank(config.data, num_gpus)
    dims, notes = _dims(config)
    compute_bytes = _compute_bytes(config, gpu, notes)
    reduce_seconds = _reduce_seconds(config, dims, gpu, num_gpus)
    per_gpu = gpu.peak_tflops * 1e12 * num_gpus
    settings = []
    for name, choose in _choices(config, dims, gpu, compute_bytes).items():
        try:
            flops, memory, saves = _cost(config, dims, sizes, choose, compute_bytes)
        except UserError as error:
            if name == _own_name(config):
                raise
            notes.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        at_peak = flops / per_gpu
        fits = None if memory is None else memory.total <= gpu.memory_gib * GIB
        seconds = at_peak / efficiency + reduce_seconds
        settings.append(Setting(name, saves, memory, fits, flops, at_peak, seconds))
    chosen = next(setting for setting in settings if setting.name == _own_name(config))
    if chosen.fits is False:
        notes.append(
            f"{chosen.name} does not fit a {gpu.name}: lower data.micro_batch or set checkpointing.policy: auto"
        )
    held_out = _held_out_flops(config, dims, sizes) / (gpu.peak_tflops * 1e12 * efficiency)
    training = chosen.seconds * config.max_steps
    samples = config.max_steps * config.data.global_batch
    return Plan(
        gpu=gpu,
        num_gpus=num_gpus,
        efficiency=efficiency,
        sizes=tuple(sizes),
        settings=tuple(settings),
        chosen=chosen,
        fastest=min((s for s in settings if s.fits), key=lambda s: s.seconds, default=None),
        num_steps=config.max_steps,
        reduce_seconds=reduce_seconds,
        train_days=(training + held_out) / DAY_SECONDS,
        held_out_share=held_out / (training + held_out),
        encode_samples=samples,
        encode_days=samples * _encode_seconds(gpu, sizes) / num_gpus / DAY_SECONDS,
        notes=tuple(notes),
    )


def read_sizes(config: TrainConfig, texts: Sequence[str]) -> tuple[list[Size], str]:
    """The buckets of the run, and in words where they are from: the command, the dataset, or the reference size."""
    if texts:
        return [Size(parse_size(text), 1 / len(texts)) for text in texts], "as given"
    from train.data import select_samples
    from train.session import open_data

    try:
        dataset = open_data(config)
        ordinals, _ = select_samples(dataset, config.data)
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
        from train.weights import read_dit_config

        return read_dit_config(checkpoint), []
    return TI2V_5B, [f"{checkpoint} is not here: sizes of Wan2.2-TI2V-5B are taken"]


def _compute_bytes(config: TrainConfig, gpu: Gpu, notes: list[str]) -> int:
    compute = config.precision.compute
    if compute == "bf16" and gpu.precision == "fp16":
        raise UserError(f"precision.compute: bf16 is only emulated on a {gpu.name}", mend="precision.compute=auto")
    if compute == "fp32":
        notes.append("fp32 stays far below the 16-bit peak that the seconds are counted by")
    return 4 if compute == "fp32" else 2


def _reduce_seconds(config: TrainConfig, dims: DiTConfig, gpu: Gpu, num_gpus: int) -> float:
    trained = num_lora_parameters(dims, config.lora) if config.lora else sum(num_parameters(dims))
    return 8 * trained * (num_gpus - 1) / num_gpus / (gpu.link_gb_per_second * 1e9)


def _own_name(config: TrainConfig) -> str:
    budget = config.checkpointing.budget_gib
    return config.checkpointing.policy + (f" ({budget:g} GiB)" if budget is not None else "")


def _choices(config: TrainConfig, dims: DiTConfig, gpu: Gpu, compute_bytes: int) -> dict[str, Callable[[Shape], Saves]]:
    """Settings to compare, by name; the config's own among them."""
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
        limit = int(gpu.memory_gib * GIB)
        own = config.checkpointing.model_copy(update={"policy": "auto", "budget_gib": None})
        automatic = config.model_copy(update={"checkpointing": own})
        choices["auto"] = make_chooser(automatic, dims, device_bytes=limit, compute_bytes=compute_bytes)
        choices[_own_name(config)] = make_chooser(config, dims, device_bytes=limit, compute_bytes=compute_bytes)
    elif config.checkpointing.policy == "auto":
        choices["auto"] = choices["full"]
    return choices


def _constant(saves: Saves) -> Callable[[Shape], Saves]:
    return lambda shape: saves


def _cost(
    config: TrainConfig,
    dims: DiTConfig,
    sizes: Sequence[Size],
    choose: Callable[[Shape], Saves],
    compute_bytes: int,
) -> tuple[float, Memory | None, str]:
    """Mean FLOPs of a step; memory and kept values of the bucket that takes the most."""
    flops, largest, words = 0.0, None, ""
    micro = config.data.micro_batch
    for bucket, share in sizes:
        shape = Shape(micro, _tokens(dims, bucket))
        saves = choose(shape)
        a_pass = step_flops(dims, shape, config.lora, saves, num_rows=2)
        flops += share * a_pass * config.data.global_batch / micro
        if config.lora is None:
            words = "what autograd does" if saves[0] else "input only"
            continue
        memory = run_memory(config, dims, shape, saves, compute_bytes)
        if largest is None or memory.total > largest.total:
            largest, words = memory, describe_saves(saves)
    return flops, largest, words


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


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""

    def setting(value: Setting | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return value._asdict() | {"memory": value.memory and value.memory._asdict() | {"total": value.memory.total}}

    values = plan._asdict()
    values["gpu"] = plan.gpu._asdict()
    values["sizes"] = [{"size": str(size.bucket), "share": size.share} for size in plan.sizes]
    values["settings"] = [setting(value) for value in plan.settings]
    values["chosen"], values["fastest"] = setting(plan.chosen), setting(plan.fastest)
    return values


def describe(plan: Plan, origin: str = "as given") -> list[str]:
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
    lines += ["", *describe_memory(plan.chosen), ""]
    lines += [
        f"training: {plan.train_days:.2f} days, of which the held-out loss takes {plan.held_out_share:.1%}; summing "
        f"gradients over {plan.num_gpus} GPUs {plan.reduce_seconds:.3f} s a step",
        f"stage 1 before it: {plan.encode_days:.2f} days to encode {plan.encode_samples:,} samples on the same GPUs "
        f"(an estimate; `wanprep plan` knows more)",
    ]
    return lines + [f"note: {note}" for note in plan.notes]


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
