"""Write the tables of docs/scaling.md, and the figures at the head of the ready configs, from the planner.

    python docs/reference/scaling_tables.py

tests/train/test_scaling.py fails while one of them differs from what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from shards.config import load_config
from shards.gpus import GPUS
from train.config.model import TI2V_5B
from train.config.train import DataConfig, ModelConfig, OptimConfig, TrainConfig
from train.estimate.plan import Estimate, Setting, make_plan
from train.estimate.saves import GIB
from train.estimate.sizes import Size
from train.geometry import Bucket

PAGE = Path(__file__).parents[1] / "scaling.md"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("ti2v_5b_*.yaml"))
FIGURES = re.compile(r"^#   \d+×\d+×\d+ .*\n#   \d+×\d+×\d+ .*\n", re.MULTILINE)
COMMAND = re.compile(r"wantrain plan \S+ --gpu (\S+)(?: --gpus (\d+))?")
BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LARGE, SMALL, LONG = Bucket(49, 704, 1280), Bucket(49, 480, 832), Bucket(121, 704, 1280)


class System(NamedTuple):
    """GPUs that the page speaks of."""

    title: str
    gpu: str
    num_gpus: int
    num_nodes: int = 1
    global_batch: int = 16


SYSTEMS = (
    System("2 × V100, PCIe", "v100-32gb", 2),
    System("2 × V100, NVLink", "v100-sxm", 2),
    System("8 × A100", "a100-80gb", 8),
    System("8 × H100", "h100", 8),
    System("64 × H100, batch 64", "h100", 64, 8, 64),
    System("64 × H100, batch 16", "h100", 64, 8, 16),
)


def plan_of(system: System, bucket: Bucket) -> Estimate:
    """The shipped settings: LoRA of rank 32 on both attentions, one sample a micro-batch, `auto` checkpointing."""
    shares = system.num_gpus
    ulysses = max(1, shares // system.global_batch)
    config = TrainConfig(
        output="run",
        max_steps=10_000,
        model=ModelConfig(dims=TI2V_5B),
        data=DataConfig(root="shards", global_batch=system.global_batch),
        optim=OptimConfig(name="adamw8bit" if "v100" in system.gpu else "adamw"),
    )
    parallel = config.parallel.model_copy(update={"ulysses": ulysses})
    config = config.model_copy(update={"parallel": parallel})
    return make_plan(config, GPUS[system.gpu], system.num_gpus, [Size(bucket, 1.0)], num_nodes=system.num_nodes)


def best_of(plan: Estimate) -> Setting:
    """The layout with the shortest step of those that fit."""
    return min((s for s in (plan.chosen, *plan.layouts) if s.fits), key=lambda s: s.seconds)


def choices() -> str:
    """For each system and size: the layout to choose and what it comes to."""
    lines = [
        "| GPUs | size | choose | s a step | samples/s | exchanged | of the step | memory a rank | days |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for system in SYSTEMS:
        for bucket in (SMALL, LARGE, LONG):
            plan = plan_of(system, bucket)
            best = best_of(plan)
            days = 160_000 / system.global_batch * best.seconds / 86_400
            lines.append(
                f"| {system.title} | {bucket} | {best.mesh} | {best.seconds:.2f} | "
                f"{system.global_batch / best.seconds:.2f} | {_gigabytes(best)} | {best.exchange_share:.1%} | "
                f"{_memory(best)} | {days:.2f} |"
            )
    return "\n".join(lines)


def layouts() -> str:
    """For each system: every layout at 1280×704×49."""
    lines = [
        "| GPUs | layout | s a step | gradients | base | tokens | of the step | memory a rank |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for system in SYSTEMS:
        plan = plan_of(system, LARGE)
        best = best_of(plan)
        for setting in (plan.chosen, *plan.layouts):
            moved = setting.exchange
            parts = " | ".join(
                f"{part / 1e9:,.2f}" for part in (moved.gradient_bytes, moved.base_bytes, moved.token_bytes)
            )
            name = f"**{setting.mesh}**" if setting is best else str(setting.mesh)
            lines.append(
                f"| {system.title} | {name} | {setting.seconds:.2f} | {parts} | {setting.exchange_share:.1%} | "
                f"{_memory(setting)}{'' if setting.fits else ', does not fit'} |"
            )
    return "\n".join(lines)


def assumptions() -> str:
    """What the seconds rest on."""
    lines = [
        "| GPU | 16-bit peak, TFLOP/s | GEMMs | attention, forward | backward | memory traffic, GB/s | within a "
        "machine | between machines |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(system.gpu for system in SYSTEMS):
        gpu = GPUS[name]
        lines.append(
            f"| {name} | {gpu.peak_tflops:g} | {gpu.gemm_tflops:g} | {gpu.attention_tflops:g} | "
            f"{gpu.attention_backward_tflops:g} | {gpu.traffic_gb:,.0f} | {gpu.link_gb_per_second:g} | "
            f"{gpu.network_gb_per_second:g} |"
        )
    return "\n".join(lines)


def _gigabytes(setting: Setting) -> str:
    return f"{setting.exchange.total_bytes / 1e9:,.2f} GB"


def _memory(setting: Setting) -> str:
    return "?" if setting.memory is None else f"{setting.memory.total / GIB:.1f} GiB"


def filled(text: str) -> str:
    """The page with its tables as the planner has them now."""
    tables = {"choices": choices, "layouts": layouts, "assumptions": assumptions}
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]]()}\n{match[3]}", text)


def headed(path: Path) -> str:
    """A ready config with the figures of its `wantrain plan` at both sizes."""
    text = path.read_text(encoding="utf-8")
    command = COMMAND.search(text)
    if command is None:
        raise ValueError(f"{path}: no line says how it is planned")
    gpu, num_gpus = GPUS[command[1]], int(command[2] or 1)
    config, lines = load_config(TrainConfig, path), []
    for bucket in (SMALL, LARGE):
        plan = make_plan(config, gpu, num_gpus, [Size(bucket, 1.0)])
        cells = [
            f"{bucket}",
            f"{_memory(plan.chosen)}{' a GPU' if num_gpus > 1 else ''}",
            f"{plan.chosen.seconds:.3g} s a step",
            f"160,000 samples in {plan.train_days:.2g} days",
            f"stage 1 before it, {plan.encode_mode}: {plan.encode_days:.2g} days",
        ]
        lines.append(f"#   {cells[0]:11}   {'   '.join(cells[1:])}\n")
    return FIGURES.sub("".join(lines), text)


if __name__ == "__main__":
    for each in CONFIGS:
        each.write_text(headed(each), encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
