"""What a run waits for beside its steps.

    python tests/benchmarks/bench_train_waits.py              both parts
    python tests/benchmarks/bench_train_waits.py evaluation   the held-out loss's share on two processes, and the plan's
    python tests/benchmarks/bench_train_waits.py start        first batch, weights, index, checkpoint, export: seconds

The first part is a ratio of two shares of one run, so that a slow or busy machine does not decide it: promised is a
planned share between 2/3 and 3/2 of the measured one. The second part prints the least of several tries (decision 130).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import numpy as np
import torch
from shards_data import write_dataset
from shards_scale import write_commits
from train_runs import make_config

from shards.config import dump_config
from shards.format.arrays import decode_array, encode_array, to_float32
from shards.gpus import GPUS
from shards.read.dataset import open_dataset
from train import checkpoint
from train.config.model import TI2V_5B, DiTConfig, LoRAConfig
from train.data.draws import draw_noise
from train.data.sampler import Order
from train.estimate.memory import num_lora_parameters
from train.estimate.plan import make_plan, read_sizes
from train.launch.launch import own_command
from train.model.dit import build_model
from train.model.load import load_dit, save_dit

WIDE = {"dim": 384, "num_heads": 6, "num_layers": 4, "ffn_dim": 1536, "text_dim": 64, "text_len": 32, "freq_dim": 64}
LATENT = (48, 13, 44, 80)  # 1280×704×49
TRIES = 5


def evaluation(folder: Path) -> int:
    """Planned ÷ measured share of the held-out loss; 1 when they are too far apart."""
    write_dataset(folder / "shards", scratch=folder / "scratch")
    config = make_config(
        folder / "shards", folder / "run", max_steps=40, model__dims=WIDE, data__micro_batch=1, data__global_batch=4,
        data__validation_fraction=0.4, eval={"num_clips": 4, "every_steps": 10}, checkpoint__every_steps=1000,
        checkpointing={"policy": "none"}, lora__targets=["self_attn", "cross_attn"],
    )  # fmt: skip
    (folder / "run.yaml").write_text(dump_config(config))
    command = own_command(["fit", str(folder / "run.yaml"), "--nproc-per-node", "2"])
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    held_out, steps = (
        [json.loads(line)["seconds"] for line in (folder / "run" / name).read_text().splitlines()]
        for name in ("held_out.jsonl", "metrics.jsonl")
    )
    measured = sum(held_out) / (sum(held_out) + sum(steps))
    plan = make_plan(config, GPUS["h100"], 2, read_sizes(config, ())[0], efficiency=0.5)
    ratio = plan.held_out_share / measured
    print(
        f"held-out loss, two processes: planned {plan.held_out_share:.1%}, measured {measured:.1%}, ratio {ratio:.2f}"
    )
    return not 2 / 3 <= ratio <= 3 / 2


def start(folder: Path) -> int:
    """Seconds of what happens once or with each checkpoint, at the sizes of Wan2.2-TI2V-5B."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal(LATENT).astype(np.float16)
    stored = encode_array(latent)
    noise = tell("one slot's noise, 1280×704×49", lambda: draw_noise(0, 1, 0, LATENT))
    read = tell("its latent, decoded", lambda: to_float32(decode_array(stored, shape=LATENT, dtype="float16")))
    print(f"  first batch of 16 slots by two threads: {8 * (noise + read):.2f} s")

    trained = num_lora_parameters(TI2V_5B, LoRAConfig(rank=16))
    weights = {f"{place}": torch.randn(trained // 100) for place in range(100)}
    moments = {f"{name}.{key}": x.clone() for name, x in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    tensors = {checkpoint.LORA_FILE: weights, checkpoint.OPTIMIZER_FILE: moments}
    size = sum(x.nbytes for named in tensors.values() for x in named.values())
    print(f"LoRA of rank 16 of 5B: {size / 1e6:.0f} MB with its moments")
    tell("  copied", lambda: [x.to("cpu", copy=True) for named in tensors.values() for x in named.values()])
    state = checkpoint.CheckpointState(
        step=1, updates=1, skipped=0, epoch=0, batch=1, scaler={}, draws_version=1, order_version=1, identity={}
    )
    tell("  written", lambda: checkpoint.write_checkpoint(folder / "checkpoints", state, tensors, {}))
    tell("  exported", lambda: checkpoint.write_tensors(folder / "lora.safetensors", weights))
    small = {checkpoint.LORA_FILE: {"x": torch.randn(20_000)}, checkpoint.OPTIMIZER_FILE: {"x": torch.randn(40_000)}}
    tell("the demonstration's checkpoint written", lambda: checkpoint.write_checkpoint(folder / "s", state, small, {}))
    with (folder / "metrics.jsonl").open("a") as file:

        def line() -> None:
            file.write("x" * 500 + "\n")
            file.flush()
            os.fsync(file.fileno())

        tell("the log's fsync", line)

    model = build_model(DiTConfig(dim=1536, num_heads=12, num_layers=8, ffn_dim=6144), torch.float32, seed=0)
    path = folder / "model.safetensors"
    save_dit(model, path)

    def cold() -> None:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        load_dit(model, path)

    gigabytes = path.stat().st_size / 1e9
    for name, load in (("cached", lambda: load_dit(model, path)), ("from the disk", cold)):
        seconds = tell(f"weights of {gigabytes:.1f} GB, {name}", load)
        print(f"  {seconds / gigabytes:.2f} s a GB, {10 * seconds / gigabytes:.0f} s for 5B in 16 bits")

    root = folder / "many"
    write_commits(root, 500)
    for name in ("commits", "index"):
        seconds = tell(f"32,000 samples opened from the {name}, with the order", lambda: opened(root))
        print(f"  160,000 samples: {5 * seconds:.1f} s")
        subprocess.run([Path(sys.executable).with_name("wanshards"), "index", str(root)], check=True)
    return 0


def opened(root: Path) -> None:
    """As a run does at its start."""
    Order(open_dataset(root).samples, seed=0, global_batch=16)


def tell(what: str, work: Callable[[], Any]) -> float:
    """Print the least seconds of several tries, by the clock and of CPU; return the former."""
    seconds, cpu = [], []
    for _ in range(TRIES):
        began, busy = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - busy)
    print(f"{what}: {min(seconds):.3f} s ({min(cpu):.3f} s of CPU)")
    return min(seconds)


PARTS = {"evaluation": evaluation, "start": start}

if __name__ == "__main__":
    broken = 0
    for part in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            broken += PARTS[part](Path(folder))
    raise SystemExit(broken)
