"""`wantrain doctor`: what is wrong with this machine and this configuration, and how to fix it."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from shards.console import counted
from shards.errors import UserError
from shards.machine import Finding, check_disk, check_python, check_torch, guarded
from train.config.train import TrainConfig

MIN_SHARED_MEMORY_GIB = 1.0


def examine(config: TrainConfig | None) -> Iterator[Finding]:
    """All findings, one after the other; those that need a configuration only with one."""
    yield check_python(sys.version_info[:3])
    yield from check_torch()
    yield check_ffmpeg()
    yield check_bitsandbytes(config)
    yield check_shared_memory(Path("/dev/shm"))  # noqa: S108 - looked at, not written to
    if importlib.util.find_spec("torch") is not None:
        from train.doctor.ranks import check_ranks

        yield from check_ranks(config)
    if config is None:
        return
    yield check_disk(Path(config.output))
    if not config.optim.is_own:
        yield check_optimizer(config)
    yield from guarded("dataset", lambda: check_dataset(config))
    yield from guarded("one step", lambda: check_step(config))


def check_ffmpeg() -> Finding:
    """ffmpeg serves stage 1 only: its absence is a note."""
    path = shutil.which("ffmpeg")
    return Finding("ffmpeg", "ok" if path else "note", path or "none on PATH: training needs none")


def check_bitsandbytes(config: TrainConfig | None) -> Finding:
    """bitsandbytes is needed for 8-bit AdamW only."""
    needed = config is not None and config.optim.name == "adamw8bit"
    if importlib.util.find_spec("torch") is None:
        return Finding("bitsandbytes", "note", "not looked at without torch")
    from train.optim import import_bitsandbytes

    try:
        return Finding("bitsandbytes", "ok", str(import_bitsandbytes().__version__))
    except UserError as error:
        return Finding("bitsandbytes", "problem" if needed else "note", error.problem, error.fix or "")


def check_optimizer(config: TrainConfig) -> Finding:
    """Another optimizer is imported, tried on two small matrices, and saved and restored there."""
    from train.optim import probe_optimizer

    try:
        num_bytes = probe_optimizer(config.optim.name, json.dumps(config.optim.args))
    except UserError as error:
        return Finding("optimizer", "problem", error.problem, error.fix or error.expected or "")
    return Finding("optimizer", "ok", f"{config.optim.name}, {num_bytes:.3g} bytes of state a trained number")


def check_shared_memory(place: Path) -> Finding:
    """Collectives between processes of one machine go through it."""
    if not place.is_dir():
        return Finding("shared memory", "note", f"no {place} on {platform.system()}")
    free = shutil.disk_usage(place).free / 2**30
    if free < MIN_SHARED_MEMORY_GIB:
        fix = "start the container with --shm-size=8g (or --ipc=host)"
        return Finding("shared memory", "problem", f"{free:.2f} GiB free in {place}", fix)
    return Finding("shared memory", "ok", f"{free:.1f} GiB free in {place}")


def check_dataset(config: TrainConfig) -> Iterator[Finding]:
    """The dataset opens; its identity, its text set, its sides, its buckets."""
    from train.data.loader import select_samples
    from train.data.open import open_data
    from train.data.sampler import describe_buckets
    from train.data.weights import describe_shares, expected_shares, make_order

    dataset = open_data(config)
    identity, revision = dataset.identity_digest[:12], dataset.revision[:12]
    yield Finding("dataset", "ok", f"{counted(len(dataset), 'sample')}, identity {identity}, revision {revision}")
    empty, negative = (len(dataset.null_text(which)) for which in ("empty", "negative"))
    text = f"{config.data.text_set}, identity {str(dataset.text_identity_digest)[:12]}"
    yield Finding("text set", "ok", f"{text}, null captions of {empty} and {negative} tokens")
    for name, note in sorted(dataset.info.notes.items()):
        yield Finding("dataset note", "note", f"{name}: {note}")
    train, validation = select_samples(dataset, config.data, hold_out_one=config.eval is not None)
    order = make_order(dataset, train, config)
    batches = order.num_batches(0)
    sides = f"{counted(order.num_samples, 'sample')} to train on in {counted(batches, 'batch', 'batches')}"
    sides += f", {len(validation):,} held out"
    yield Finding("order", "ok", sides)
    if config.data.weights:
        for line in describe_shares(expected_shares(dataset, train, order, config.data.weights)):
            yield Finding("data.weights", "ok", f"{line} expected")
    if order.too_small:
        few = describe_buckets(order.too_small.items())
        yield Finding("order", "note", f"left out: {few}", "lower data.global_batch, or build more shards")
    if config.eval is not None and not validation:
        yield Finding("held-out loss", "problem", "no held-out clip", "raise data.validation_fraction, or eval: null")


def check_step(config: TrainConfig) -> Iterator[Finding]:
    """One real step, nothing written: the model loads, the LoRA is injected, gradients come and are finite."""
    import time

    from train.data.loader import Loader
    from train.run.session import open_session, peak_memory_gib
    from train.run.state import TrainingState
    from train.step import backward

    session = open_session(config)
    trainee, progress = session.trainee, TrainingState(session)
    what = f"LoRA in {counted(len(trainee.adapted), 'module')}" if trainee.adapted else "the whole model"
    yield Finding("model", "ok", f"{trainee.precision.name} ({trainee.precision.reason}), {what}")
    text_len = trainee.dims.text_len
    loader = Loader(session.dataset, session.order, session.ordinals, config, text_len=text_len)
    try:
        batch, _ = next(loader)
    finally:
        loader.close()
    began = time.perf_counter()
    loss = backward(trainee, batch, progress.scaler.scale_loss)
    _, norm, overflow = progress.update()
    seconds, memory = time.perf_counter() - began, peak_memory_gib(trainee.device)
    found = f"loss {loss.mean if loss else math.nan:.4f}, {seconds:.2f} s, {memory:.1f} GiB"
    if norm is None:
        yield Finding("one step", "note", f"{found}; skipped for overflow in {overflow}; the loss scale adapts")
    else:
        yield Finding("one step", "ok", f"{found}, gradient norm {norm:.3g}")


def measure_ranges(config: TrainConfig) -> dict[str, float]:
    """Largest magnitude of every block's and every linear's output over one batch of real latents, in fp32."""
    import torch

    from train.data.loader import Loader
    from train.precision import record_ranges
    from train.run.session import open_session
    from train.step import losses

    config = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "fp32"})})
    session = open_session(config)
    text_len = session.trainee.dims.text_len
    loader = Loader(session.dataset, session.order, session.ordinals, config, text_len=text_len)
    try:
        batch, _ = next(loader)
    finally:
        loader.close()
    with torch.no_grad(), record_ranges(session.trainee.model) as ranges:
        for start in range(0, len(batch.keys), config.data.micro_batch):
            losses(session.trainee, batch, slice(start, start + config.data.micro_batch))
    return ranges
