"""Counts of a training step, exact and the same on every machine: FLOPs, saved bytes, peak memory, operators.

Real dimensions on fake tensors with the CPU's flash attention; the operators are counted on a small real model.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from train_traces import CountedOperators, LiveBytes, counted_flops, fake_model, fake_tensors, trace_step

from train.config.model import TI2V_5B, DiTConfig, LoRAConfig
from train.estimate.flops import step_flops
from train.estimate.memory import step_memory
from train.geometry import SAVE_GROUPS, Shape
from train.lora.lora import inject
from train.model.dit import build_model
from train.recompute.runner import keep

LORA = LoRAConfig(rank=32)
TINY = {"dim": 48, "num_heads": 2, "ffn_dim": 96, "text_dim": 32, "text_len": 16}
POLICIES = {
    "none": SAVE_GROUPS,
    "attention + projections": ("attention", "projections"),
    "attention": ("attention",),
    "full": (),
}
failures: list[str] = []


def report(what: str, value: float, least: float, most: float) -> None:
    """Print a ratio and its promise; remember one that is broken."""
    within = least <= value <= most
    print(f"{what}: {value:.4f} (promise {f'{least:g}–' if least else '≤ '}{most:g}){'' if within else '  BROKEN'}")
    if not within:
        failures.append(what)


def trace(num_layers: int, latent_frames: int, saves: tuple[str, ...]) -> tuple[float, int, int]:
    """FLOPs, peak bytes, bytes alive between forward and backward of a step at real dimensions."""
    dims = TI2V_5B.model_copy(update={"num_layers": num_layers})
    results = []
    for mode in (counted_flops, LiveBytes):
        with fake_tensors():
            model = fake_model(dims, LORA)
            for weight in model.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None
            keep(model, lambda shape: (saves,) * num_layers)
            with mode() as counter:
                if isinstance(counter, LiveBytes):
                    model.head.register_forward_hook(lambda *args, live=counter: results.append(live.live))
                trace_step(model, (1, latent_frames, 44, 80))
            results.append(counter.peak if isinstance(counter, LiveBytes) else counter.get_total_flops())
    flops, alive, peak = results
    return float(flops), int(peak), int(alive)


def count_operators(num_layers: int, dtype: torch.dtype, image_first: bool) -> int:
    """Operators of a step that compute something, tables that are made once apart."""
    model = build_model(DiTConfig(num_layers=num_layers, **TINY), dtype, seed=0)
    inject(model, LORA, 0)
    keep(model, "none")
    arguments = (torch.randn(1, 48, 3, 4, 6), torch.tensor([3.0]), torch.tensor([image_first]), torch.randn(1, 16, 32))
    with torch.no_grad():
        model(*arguments)
    with CountedOperators() as counter:
        model(*arguments).sum().backward()
    return sum(counter.counts.values())


def main() -> int:
    """Print every ratio with its promise; 1 when one is broken."""
    dims, width = TI2V_5B, 2 * (9 * TI2V_5B.dim + TI2V_5B.ffn_dim)
    few = dims.model_copy(update={"num_layers": 3})
    flop_promise = {"none": 1.005, "attention + projections": 1.4, "attention": 1.4, "full": 1.4}
    for frames, latent_frames in ((17, 5), (49, 13), (121, 31)):
        shape = Shape(1, latent_frames * 22 * 40)
        for name, saves in POLICIES.items():
            flops, peak, _ = trace(3, latent_frames, saves)
            report(f"1. {frames} frames, {name}: FLOPs ÷ closed form without recomputation",
                   flops / step_flops(few, shape, LORA), 0, flop_promise[name])  # fmt: skip
            memory = step_memory(few, shape, LORA, (saves,) * 3)
            activations = memory.saved + memory.transient + memory.inputs + memory.lora // 3
            report(f"3. {frames} frames, {name}: peak live bytes ÷ planned", peak / activations, 0.97, 1.03)
        grown = trace(3, latent_frames, SAVE_GROUPS)[2] - trace(2, latent_frames, SAVE_GROUPS)[2]
        report(f"2. {frames} frames: saved bytes a token and block ÷ 2(9d+f), stretch 1.05",
               grown / shape.tokens / width, 0, 1.12)  # fmt: skip
    for dtype, most in ((torch.float32, 185), (torch.bfloat16, 200)):
        for image_first in (False, True):
            grown = count_operators(4, dtype, image_first) - count_operators(3, dtype, image_first)
            mode = "image" if image_first else "text"
            report(f"4. operators a block, forward + backward, {dtype}, {mode} to video", grown, 0, most)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
