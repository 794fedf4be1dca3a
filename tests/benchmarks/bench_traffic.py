"""Memory traffic, counted: bytes that the operators of a VAE encode and of a training step read or write.

Real dimensions on fake tensors, each operand of an operator once. What is counted is what eager operators ask of the
memory; caches and fusion make it less. Promises: a VAE encode of 1280×704×49 with `vae_low_traffic` ≤ 450 GB and its
peak not above the library's; a micro-step of that size without recomputation ≤ 380 GB outside GEMMs and attention.
Beside it the same step in diffusers + peft.

    python tests/benchmarks/bench_traffic.py
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from train_traces import Traffic, fake_model, fake_tensors, trace_step, vae_traffic

from train.config.model import TI2V_5B, LoRAConfig
from train.geometry import SAVE_GROUPS
from train.recompute.runner import keep

FRAMES, SIZE = 49, (704, 1280)
LATENTS = {"1280×704×49": (1, 13, 44, 80), "832×480×49": (1, 13, 30, 52)}
POLICIES = {"none": SAVE_GROUPS, "attention": ("attention",), "full": ()}
ROWS = 12
VAE_PROMISE, STEP_PROMISE = 450e9, 380e9


def show(title: str, counts: Counter[tuple[str, str]]) -> None:
    """The operators that move most."""
    print(f"{title}: {sum(counts.values()) / 1e9:.0f} GB")
    for (name, dtypes), num_bytes in counts.most_common(ROWS):
        print(f"  {num_bytes / 1e9:8.1f} GB  {name} ({dtypes})")


def our_step(num_layers: int, saves: tuple[str, ...], latent: tuple[int, int, int, int]) -> Traffic:
    """A micro-step of a model of a few blocks."""
    with fake_tensors():
        model = fake_model(TI2V_5B.model_copy(update={"num_layers": num_layers}), LoRAConfig(rank=16))
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        keep(model, lambda shape: (saves,) * num_layers)
        with Traffic() as traffic:
            trace_step(model, latent)
    return traffic


def peer_step(num_layers: int, checkpointed: bool, latent: tuple[int, int, int, int]) -> Traffic:
    """The same in bf16 by diffusers' transformer and peft's LoRA, as their documents show it."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    batch, *size = latent
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = WanTransformer3DModel(
                num_attention_heads=24, attention_head_dim=128, in_channels=48, out_channels=48, text_dim=4096,
                ffn_dim=14336, num_layers=num_layers, cross_attn_norm=True,
            )  # fmt: skip
            model.requires_grad_(False)
            model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    finally:
        torch.set_default_dtype(torch.float32)
    if checkpointed:
        model.enable_gradient_checkpointing()
    model.train()
    with fake_tensors():
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                fake = torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                fake.grad = torch.empty_like(fake) if weight.requires_grad else None
                setattr(module, name, fake)
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        noised, target = (torch.empty(batch, 48, *size, dtype=torch.bfloat16) for _ in range(2))
        text = torch.empty(batch, 512, 4096, dtype=torch.bfloat16)
        with Traffic() as traffic:
            velocity = model(noised, torch.empty(batch), text, return_dict=False)[0]
            torch.nn.functional.mse_loss(velocity.float(), target.float()).backward()
    return traffic


def whole(trace: Callable[[int], Traffic]) -> tuple[float, Counter[tuple[str, str]]]:
    """Bytes of 30 blocks outside GEMMs and attention, and a block's by operator, from two traces of a few blocks."""
    two, three = trace(2), trace(3)
    block = three.between() - two.between()
    return two.between() + (TI2V_5B.num_layers - 2) * block, three.bytes - two.bytes


def main() -> int:
    """Print the tables; 1 when a promise is broken."""
    library, ours = (vae_traffic(FRAMES, SIZE, low_traffic=low) for low in (False, True))
    show("VAE encode, the library's", library.bytes)
    show("VAE encode, vae_low_traffic", ours.bytes)
    moved, peaks = sum(ours.bytes.values()), [each.peak / 2**30 for each in (library, ours)]
    print(
        f"VAE: {moved / 1e9:.0f} GB (promise ≤ 450), peak {peaks[1]:.2f} GiB (promise ≤ {peaks[0]:.2f}, the library's)"
    )
    kept = True
    for size, latent in LATENTS.items():
        for name, saves in POLICIES.items():
            total, block = whole(lambda num, saves=saves, latent=latent: our_step(num, saves, latent))
            promised = size == "1280×704×49" and name == "none"
            kept = kept and (total <= STEP_PROMISE or not promised)
            words = " (promise ≤ 380)" if promised else ""
            print(f"step {size}, checkpointing {name}: {total / 1e9:.0f} GB{words} outside GEMMs and attention")
            show("  a block", block)
        for name in ("none", "full"):
            total, block = whole(lambda num, name=name, latent=latent: peer_step(num, name == "full", latent))
            print(f"step {size}, diffusers + peft, checkpointing {name}: {total / 1e9:.0f} GB")
    return int(moved > VAE_PROMISE or peaks[1] > peaks[0] or not kept)


if __name__ == "__main__":
    sys.exit(main())
