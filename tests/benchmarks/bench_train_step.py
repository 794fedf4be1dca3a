"""Time of a training step ÷ a plain loop of diffusers + peft + AdamW on the same weights' sizes, in interleaved pairs.

dim 768, 6 heads of 128, 6 blocks, feed-forward 3072, 2,700 tokens, rank 16 on q k v o, float32 on the CPU, once without
recomputation on both sides and once with full checkpointing on both. `--compile` compiles blocks too (minutes).
Ratios are of wall clock, and of CPU seconds beside it, which other users of the machine disturb less. The share of the
peer's step that is attention and GEMMs stands below: ours calls the same ones, so no ratio can go far below that share.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from torch import Tensor, nn
from train_runs import lora_parameters

from train.config.model import DiTConfig, LoRAConfig
from train.lora.lora import inject
from train.model.dit import build_model
from train.objective import add_noise, slot_losses
from train.recompute.runner import keep

PAIRS = 21
LATENT = (1, 48, 5, 36, 60)  # 5 × 18 × 30 = 2,700 tokens
DIMS = DiTConfig(dim=768, num_heads=6, num_layers=6, ffn_dim=3072, text_dim=256, text_len=512)
Step = Callable[[], float]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, noise, noise level, text."""
    generator = torch.Generator().manual_seed(0)
    latent, noise = (torch.randn(LATENT, generator=generator) for _ in range(2))
    return latent, noise, torch.tensor([0.7], dtype=torch.float64), torch.randn(1, 512, 256, generator=generator)


def our_step(policy: str, compiled: bool) -> Step:
    """One optimizer step of this project's model and objective."""
    model = build_model(DIMS, seed=0)
    inject(model, LoRAConfig(rank=16), 0)
    keep(model.train(), policy, compiled=compiled)
    weights = lora_parameters(model)
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    latent, noise, sigma, text = batch()
    first = torch.tensor([False])

    def step() -> float:
        noised, target = add_noise(latent, noise, sigma, first)
        loss = slot_losses(model(noised, (1000 * sigma).float(), first, text), target, first).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def peer_step(policy: str, compiled: bool) -> Step:
    """The same with diffusers' transformer and peft's LoRA, as its documents show it."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=6, attention_head_dim=128, in_channels=48, out_channels=48, text_dim=256, ffn_dim=3072,
        num_layers=6, cross_attn_norm=True,
    )  # fmt: skip
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if policy == "full":
        model.enable_gradient_checkpointing()
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)
    latent, noise, sigma, text = batch()

    def step() -> float:
        noised = ((1 - sigma) * latent + sigma * noise).float()
        velocity = model(noised, (1000 * sigma).float(), text, return_dict=False)[0]
        loss = nn.functional.mse_loss(velocity, noise - latent)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ratio(ours: Step, theirs: Step, pairs: int) -> tuple[float, float, float, float]:
    """Median of the ratios of interleaved pairs: of wall clock, of CPU seconds; and the median seconds of each side."""
    ours()
    theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    busy: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            began, busy_began = time.perf_counter(), time.process_time()
            (ours, theirs)[side]()
            seconds[side].append(time.perf_counter() - began)
            busy[side].append(time.process_time() - busy_began)
    wall, cpu = (
        statistics.median(mine / other for mine, other in zip(*sides, strict=True)) for sides in (seconds, busy)
    )
    return wall, cpu, statistics.median(seconds[0]), statistics.median(seconds[1])


def kernel_share(step: Step) -> float:
    """Share of a step's time in attention and GEMMs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")
    return sum(time for key, time in spent.items() if key.startswith(names)) / sum(spent.values())


def main() -> int:
    """Print each ratio with its promise; 1 when one is broken."""
    pairs = int(sys.argv[sys.argv.index("--pairs") + 1]) if "--pairs" in sys.argv else PAIRS
    cases = [(policy, False, False, 0.90) for policy in ("none", "full")]
    if "--compile" in sys.argv:
        cases += [("none", True, False, 0.85), ("none", True, True, 1.00)]
    broken = False
    for policy, compiled, peer_compiled, most in cases:
        peer = peer_step(policy, peer_compiled)
        value, cpu, mine, other = ratio(our_step(policy, compiled), peer, pairs)
        broken |= value > most
        names = "compiled" if compiled else "eager", "compiled" if peer_compiled else "eager"
        print(
            f"5. checkpointing {policy}, ours {names[0]} ÷ diffusers + peft {names[1]}: {value:.3f}, "
            f"of CPU seconds {cpu:.3f} (promise ≤ {most:.2f}); {mine:.2f} s against {other:.2f} s, "
            f"median of {pairs} pairs, {torch.get_num_threads()} threads{'  BROKEN' if value > most else ''}",
            flush=True,
        )
        print(f"   attention and GEMMs in the peer's step: {kernel_share(peer):.3f} of it", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
