"""Bytes that a rank exchanges in an optimizer step ÷ the closed form: exact, on every machine.

The closed form is in train/estimate/communication.py.

The real training step on a small model, in one process whose group is fake: what goes over the wire depends on sizes
alone. What a rank of 64 and of 1,024 holds is measured at the real sizes.
"""

import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from fake_ranks import DIMS, exchange_of, fake_group, planned, resident_bytes

from train.config.model import TI2V_5B, LoRAConfig
from train.data.sampler import START, Order
from train.estimate.memory import step_memory
from train.geometry import Shape
from train.lora.lora import inject
from train.model.dit import build_model
from train.parallel.fsdp import shard_base
from train.parallel.ranks import Layout

LAYOUTS = (
    ("replicate 2", Layout(world_size=2)),
    ("replicate 1,024", Layout(world_size=1024)),
    ("shard over 2", Layout(world_size=2, base_shards=2)),
    ("shard over 64", Layout(world_size=64, base_shards=64)),
    ("shard over 8 of 1,024", Layout(world_size=1024, base_shards=8)),
    ("ulysses 2", Layout(world_size=2, ulysses=2)),
    ("ulysses 8 of 1,024", Layout(world_size=1024, ulysses=8)),
    ("shard over 8 × ulysses 4 of 64", Layout(world_size=64, base_shards=8, ulysses=4)),
)
MICRO_STEPS = 3


def main() -> int:
    """Print every ratio; 1 when one is not 1."""
    broken = 0
    print(f"{'layout':32} {'kept':6} {'gradients':>10} {'base':>8} {'tokens':>8}   calls")
    for name, layout in LAYOUTS:
        for policy in ("none", "full"):
            shape = Shape(2, 45)
            counted, plan = exchange_of(layout, policy, shape, MICRO_STEPS), planned(layout, policy, shape, MICRO_STEPS)
            pairs = [
                (counted.bytes["all-reduce"], plan.gradient_bytes),
                (counted.bytes["all-gather"], plan.base_bytes),
                (counted.bytes["all-to-all"] + counted.bytes["velocity"], plan.token_bytes),
            ]
            ratios = [1.0 if measured == formula == 0 else measured / max(formula, 1e-9) for measured, formula in pairs]
            gathers = 2 * DIMS.num_layers * MICRO_STEPS if layout.base_shards > 1 else 0
            broken += any(abs(ratio - 1) > 5e-3 for ratio in ratios)
            broken += counted.calls["all-reduce"] != 1 or counted.calls["all-gather"] != gathers
            print(f"{name:32} {policy:6} {ratios[0]:10.4f} {ratios[1]:8.4f} {ratios[2]:8.4f}   {dict(counted.calls)}")
    for size in (64, 1024):
        measure_rank(size)
    return int(broken > 0)


def measure_rank(num_ranks: int) -> None:
    """What a rank holds of the real model in bf16, LoRA of rank 32 included, and what the order costs it."""
    with fake_group(num_ranks):
        model = build_model(TI2V_5B, torch.bfloat16, "meta")
        inject(model, LoRAConfig(rank=32), 0)
        began = time.perf_counter()
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (num_ranks,))
        shard_base(model, mesh, torch.device("cpu"))
        seconds = time.perf_counter() - began
        parts, whole = resident_bytes(model)
    memory = step_memory(TI2V_5B, Shape(1, 0), LoRAConfig(rank=32), ((),) * 30, base_shards=num_ranks)
    held = f"{parts / 2**20:.0f} MiB of blocks, {whole / 2**20:.0f} MiB whole"
    plan = f"planned with two blocks gathered {(memory.base + memory.lora) / 2**20:.0f}"
    print(f"{num_ranks} ranks, base over all: {held}, {plan}; spread in {seconds:.1f} s")
    samples = [Clip(f"clip-{number:06d}") for number in range(160_000)]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    Order(samples, seed=0, global_batch=num_ranks).batch(START)
    seconds, grown = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{num_ranks} ranks: order of 160,000 samples in {seconds:.2f} s, {grown / 1024:.0f} MiB more at the peak")


class Clip(NamedTuple):
    """A sample as the order sees it."""

    key: str
    frames: int = 49
    height: int = 704
    width: int = 1280


if __name__ == "__main__":
    sys.exit(main())
