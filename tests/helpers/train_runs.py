"""Small training runs for the tests: a few hundred parameters over random shards."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.config import validate_config
from train.config.train import TrainConfig

DIMS = {"dim": 32, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 64, "text_len": 32, "freq_dim": 16}


def make_config(root: Path | str, output: Path | str, **changes: Any) -> TrainConfig:
    """A run of ten steps of four samples; `changes` are given as data__micro_batch=2."""
    values: dict[str, Any] = {
        "output": str(output),
        "max_steps": 10,
        "model": {"dims": DIMS},
        "data": {"root": str(root), "global_batch": 4, "micro_batch": 2, "validation_fraction": 0.2},
        "lora": {"rank": 4},
        "optim": {"lr": 1e-3},
        "eval": None,
        "checkpoint": {"every_steps": 5},
    }
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return validate_config(TrainConfig, values, origin="the test's config")


def read_metrics(output: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (Path(output) / name).read_text().splitlines()]
    clocked = ("memory_gib", "tflops", "mfu")
    return [{k: v for k, v in line.items() if "seconds" not in k and k not in clocked} for line in lines]


def wait_for_metrics(output: Path, steps: int, seconds: float = 120) -> None:
    """Until a run that another process trains has done some steps."""
    deadline, path = time.monotonic() + seconds, output / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "no step was trained"
        time.sleep(0.05)


def send_when(metrics: Path, number: int) -> None:
    """Send this process a signal as soon as a step is in the metrics."""

    def watch() -> None:
        while not metrics.exists() or not metrics.stat().st_size:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def checkpoint_bytes(output: Path | str, step: int) -> dict[str, bytes]:
    """The files of a checkpoint, state.json without what the clock decides, and so without its seal."""
    files = {}
    for path in sorted((Path(output) / "checkpoints" / f"step-{step:07d}").iterdir()):
        files[path.name] = path.read_bytes()
    state = json.loads(files["state.json"])
    files["state.json"] = json.dumps({k: v for k, v in state.items() if "seconds" not in k and k != "seal"}).encode()
    return files


def fit_in_child(config: TrainConfig, resume: str = "auto", kill_at: str | None = None) -> int:
    """Run `fit` in a process of its own and return its exit code.

    Args:
        kill_at: the child kills itself with SIGKILL as soon as this path under the run's folder exists.
    """
    context = multiprocessing.get_context("forkserver")
    # Each child would import these anew: torch._dynamo comes with the first optimizer.
    context.set_forkserver_preload(["train.loop", "torch._dynamo", "torch.utils.tensorboard", "bitsandbytes"])
    process = context.Process(target=_fit, args=(config, resume, kill_at))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def _fit(config: TrainConfig, resume: str, kill_at: str | None) -> None:
    import torch

    from train.loop import fit

    torch.set_num_threads(1)
    if kill_at is not None:
        sys.addaudithook(_killer(Path(config.output) / kill_at))
    fit(config, resume=resume)


def _killer(path: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Looks whenever a file is opened, made or renamed: a thread that polls would miss what is there for a moment."""

    def look(event: str, _: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename") and path.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    return look


def finish(model: Any, saves: Any, **options: Any) -> Any:
    """Give the LoRA of a WanDiT random weights, and set what its blocks keep for their backward pass."""
    import torch

    from train.lora.lora import lora_modules
    from train.recompute.runner import keep

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.normal_(0, 0.1, generator=generator)
    keep(model, saves, **options)
    return model.train()


def lora_parameters(model: Any) -> list[Any]:
    """A and B of every adapted module, in the model's order."""
    from train.lora.lora import lora_modules

    return [weight for module in lora_modules(model).values() for weight in (module.lora_A, module.lora_B)]


def merge(model: Any) -> None:
    """Add scale · B A into every adapted weight; B is zero then."""
    import torch

    from train.lora.lora import lora_modules

    with torch.no_grad():
        for module in lora_modules(model).values():
            module.weight.copy_(module.weight.float() + module.scale * (module.lora_B @ module.lora_A))
            module.lora_B.zero_()


def train_spoiled(config: TrainConfig, bad_rank: int, bad_step: int) -> list[dict[str, Any]]:
    """A run in which one rank's latents overflow fp16 in one step; what each rank made of every step."""
    from shards.console import set_up_logging
    from train import loop
    from train.run.state import TrainingState

    plain, seen = loop.backward, []

    def spoiled(trainee: Any, batch: Any, *rest: Any) -> Any:
        if (int(os.environ["RANK"]), batch.step) == (bad_rank, bad_step):
            batch.latent_BCTHW[:] = 3e5
        return plain(trainee, batch, *rest)

    update = TrainingState.update

    def watched(self: TrainingState) -> Any:
        result = update(self)
        weights = hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.trainee.tensors().values())).hexdigest()
        seen.append({"scale": self.scaler.scale, "skipped": self.skipped, "blamed": result[2], "weights": weights})
        return result

    loop.backward, TrainingState.update = spoiled, watched  # type: ignore[method-assign]
    set_up_logging(terminal=False)
    loop.fit(config)
    return seen
