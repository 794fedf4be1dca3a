"""The real 5B shape with random weights on this machine's GPU: TFLOP/s, MFU, peak memory against the plan, kernels.

    python tests/benchmarks/bench_train_gpu.py [--compile] [--profile]

Rank 32 on both attentions, one sample a step, 832×480×49 and 1280×704×49, each policy that fits. Without a GPU it says
so and proves nothing. Put what it prints into docs/performance.md with the hardware and the date.
"""

import statistics
import sys
import time

import torch

from shards.gpus import by_driver_name
from train.config.model import TI2V_5B, LoRAConfig
from train.config.train import CheckpointingConfig, DataConfig, ModelConfig, TrainConfig
from train.device import device_info
from train.estimate.flops import step_flops
from train.estimate.memory import step_memory
from train.estimate.saves import GIB, describe_saves, make_chooser
from train.geometry import SAVE_GROUPS, Shape, num_tokens
from train.lora.lora import inject, lora_parameters
from train.model.dit import WanDiT, backend_for, build_model
from train.model.kernels import kernel_name
from train.objective import add_noise, slot_losses
from train.precision import resolve_precision
from train.recompute.runner import keep

SIZES = ((49, 480, 832), (49, 704, 1280))
POLICIES = {
    "none": SAVE_GROUPS,
    "attention + projections": ("attention", "projections"),
    "attention": ("attention",),
    "full": (),
}
WARM_UP, STEPS = 3, 10
LORA = LoRAConfig(rank=32)


def make_step(model: WanDiT, optimizer: torch.optim.Optimizer, size: tuple[int, int, int]):
    """One optimizer step on random data."""
    frames, height, width = size
    shape = (1, 48, (frames - 1) // 4 + 1, height // 16, width // 16)
    latent, noise = (torch.randn(shape, device="cuda") for _ in range(2))
    text = torch.randn(1, 512, 4096, device="cuda")
    sigma, first = torch.tensor([0.7], dtype=torch.float64), torch.tensor([False])

    def step() -> None:
        noised, target = add_noise(latent, noise, sigma, first)
        velocity = model(noised, (1000 * sigma).float().cuda(), first, text)
        slot_losses(velocity, target, first).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(step) -> float:
    """Median seconds of a step after warm-up."""
    seconds = []
    for index in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if index + 1 == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
    return statistics.median(seconds[WARM_UP:])


def profile(step) -> None:
    """Where a step's time goes, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=90))


def main() -> None:
    """Print a line for each size and policy."""
    if not torch.cuda.is_available():
        print("6. needs a GPU and this machine has none: achieved TFLOP/s and MFU are NOT proven here")
        return
    device, facts = torch.device("cuda", 0), device_info("cuda")
    gpu, precision = by_driver_name(facts.name), resolve_precision("auto", facts)
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    print(
        f"{facts.name}, torch {torch.__version__}, {precision.name}, {memory_bytes / GIB:.1f} GiB, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    model = build_model(TI2V_5B, precision.dtype, device, seed=0)
    inject(model, LORA, 0)
    optimizer = torch.optim.AdamW(lora_parameters(model.train()), lr=1e-4, fused=True)
    for size in SIZES:
        shape = Shape(1, num_tokens(TI2V_5B, *size))
        backend = backend_for(device, precision.dtype, shape.tokens, 128)
        print(f"{size[2]}×{size[1]}×{size[0]}: {shape.tokens:,} tokens, kernel "
              f"{kernel_name(backend)} of {backend}")  # fmt: skip
        config = TrainConfig(
            output="run", max_steps=1, model=ModelConfig(dims=TI2V_5B), data=DataConfig(root="shards"), lora=LORA,
            checkpointing=CheckpointingConfig(policy="auto"),
        )  # fmt: skip
        auto = make_chooser(config, TI2V_5B, device_bytes=memory_bytes)(shape)
        for name, saves in {**{n: (s,) * 30 for n, s in POLICIES.items()}, "auto": auto}.items():
            planned = step_memory(TI2V_5B, shape, LORA, saves)
            if planned.total > memory_bytes:
                print(f"  {name}: does not fit, planned {planned.total / GIB:.1f} GiB")
                continue
            keep(model, lambda _, saves=saves: saves, compiled="--compile" in sys.argv)
            step = make_step(model, optimizer, size)
            seconds = time_steps(step)
            executed, own = (step_flops(TI2V_5B, shape, LORA, s) / seconds / 1e12 for s in (saves, None))
            peak = torch.cuda.max_memory_allocated()
            mfu = f"MFU {own / gpu.peak_tflops:.1%}, HFU {executed / gpu.peak_tflops:.1%}" if gpu else "peak not known"
            print(
                f"  {name} ({describe_saves(saves)}): {seconds:.3f} s, {executed:.0f} TFLOP/s executed, {mfu}; "
                f"{peak / GIB:.2f} GiB, {peak / planned.allocated:.3f} × planned",
                flush=True,
            )
            if "--profile" in sys.argv and name == "none":
                profile(step)


if __name__ == "__main__":
    main()
