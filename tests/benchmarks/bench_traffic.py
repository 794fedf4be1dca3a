"""Memory traffic, counted: bytes that the operators of a VAE encode and of a training step read and write.

Real dimensions on fake tensors, 1280×704×49, each operand of an operator once. What is counted is what eager operators
ask of the memory; caches and fusion make it less. Promises: a VAE encode with `vae_low_traffic` ≤ 450 GB and its peak
not above the library's. The step's figures are printed.

    python tests/benchmarks/bench_traffic.py
"""

import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from train_traces import Traffic, fake_model, fake_tensors, trace_step, vae_traffic

from train.config.model import TI2V_5B, LoRAConfig
from train.geometry import SAVE_GROUPS
from train.recompute.runner import keep

FRAMES, SIZE, LATENT = 49, (704, 1280), (1, 13, 44, 80)
POLICIES = {"none": SAVE_GROUPS, "attention": ("attention",), "full": ()}
ROWS = 8


def show(title: str, counts: Counter[tuple[str, str]]) -> None:
    """The operators that move most."""
    print(f"{title}: {sum(counts.values()) / 1e9:.0f} GB")
    for (name, dtypes), num_bytes in counts.most_common(ROWS):
        print(f"  {num_bytes / 1e9:8.1f} GB  {name} ({dtypes})")


def trace(num_layers: int, saves: tuple[str, ...]) -> Traffic:
    """A micro-step of a model of a few blocks."""
    with fake_tensors():
        model = fake_model(TI2V_5B.model_copy(update={"num_layers": num_layers}), LoRAConfig(rank=16))
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        keep(model, lambda shape: (saves,) * num_layers)
        with Traffic() as traffic:
            trace_step(model, LATENT)
    return traffic


def main() -> int:
    """Print both tables; 1 when a promise is broken."""
    library, ours = (vae_traffic(FRAMES, SIZE, low_traffic=low) for low in (False, True))
    show("VAE encode, the library's", library.bytes)
    show("VAE encode, vae_low_traffic", ours.bytes)
    moved, peaks = sum(ours.bytes.values()) / 1e9, [each.peak / 2**30 for each in (library, ours)]
    print(f"VAE: {moved:.0f} GB (promise ≤ 450), peak {peaks[1]:.2f} GiB (promise ≤ {peaks[0]:.2f}, the library's)")
    for name, saves in POLICIES.items():
        two, three = trace(2, saves), trace(3, saves)
        block = three.between() - two.between()
        total = two.between() + (TI2V_5B.num_layers - 2) * block
        print(
            f"step, checkpointing {name}: {total / 1e9:.0f} GB outside GEMMs and attention, {block / 1e9:.2f} a block"
        )
        if name == "none":
            show("  of it a block", three.bytes - two.bytes)
    return int(moved > 450 or peaks[1] > peaks[0])


if __name__ == "__main__":
    sys.exit(main())
