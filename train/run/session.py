"""What a run opens before its first step: folder, dataset, split, order, model; and what it leaves as it found it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from shards.config import dump_config
from shards.console import LOG
from shards.errors import UserError
from shards.read.dataset import Dataset
from train.checkpoint import PIN_FILE, find_checkpoints, read_checkpoint, read_pin, write_text
from train.config.train import TrainConfig, dataset_roots, run_identity, slots_per_rank
from train.data.loader import check_model_fits, select_samples
from train.data.open import open_data
from train.data.sampler import Order, describe_buckets
from train.evaluate import choose_held_out
from train.parallel.ranks import ALONE, Ranks
from train.run.trainee import Trainee, make_trainee, resolve_dims, weights_digest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Session:
    """Everything a run reads and never changes."""

    folder: Path
    dataset: Dataset
    ordinals: list[int]
    """The training side."""
    held_out: list[int]
    """Samples of the held-out loss."""
    order: Order
    trainee: Trainee
    identity: dict[str, Any]
    """What decides the numbers; a resume insists on it."""
    ranks: Ranks = ALONE
    """The processes of the run."""


def open_session(
    config: TrainConfig, *, verify: bool = False, start: Path | None = None, ranks: Ranks = ALONE
) -> Session:
    """Open the dataset, check it against the model, build the model. Raises UserError for whatever does not fit.

    `start`, a checkpoint, opens the very commits that its run began with, though others were added since.
    """
    slots_per_rank(config.data, ranks.layout.dp_size)
    dataset = open_data(config, None if start is None else read_pin(start))
    if verify and ranks.is_first:
        verify_dataset(config)
    ordinals, validation = select_samples(dataset, config.data, hold_out_one=config.eval is not None)
    order = Order([dataset.samples[ordinal] for ordinal in ordinals], config.seed, config.data.global_batch)
    if order.too_small and ranks.is_first:
        LOG.warning(
            "left out, too few samples for a batch of %d: %s",
            config.data.global_batch,
            describe_buckets(order.too_small.items()),
        )
    held_out = choose_held_out(dataset, validation, config.eval) if config.eval else []
    dims = resolve_dims(config)  # what does not fit is found before the weights are built, which takes minutes
    for ordinal in ordinals[0], *held_out[:1]:
        check_model_fits(dataset, ordinal, channels=dims.in_channels, text_dim=dims.text_dim, text_len=dims.text_len)
    trainee = make_trainee(config, ranks)
    folder = Path(config.output)
    return Session(folder, dataset, ordinals, held_out, order, trainee, full_identity(config, dataset, trainee), ranks)


def full_identity(config: TrainConfig, dataset: Dataset, trainee: Trainee) -> dict[str, Any]:
    """What decides the numbers of a run: configuration, weights, dataset."""
    return {
        "config": run_identity(config),
        "precision": trainee.precision.name,
        "weights": weights_digest(config.model.checkpoint),
        "dims": trainee.dims.model_dump(mode="json"),
        "dataset": {
            "identity": dataset.identity_digest,
            "text_identity": dataset.text_identity_digest,
            "revision": dataset.revision,
        },
    }


def choose_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: `auto` the newest of the run, `never` none, else the one at that path.

    Raises UserError when `never` would write over a run's checkpoints.
    """
    found = find_checkpoints(folder / "checkpoints")
    if resume == "auto":
        return found[-1] if found else None
    if resume != "never":
        read_checkpoint(Path(resume))
        return Path(resume)
    if found:
        raise UserError(
            f"{folder} holds a run already, up to {found[-1].name}",
            fix="choose another output, remove that folder, or let it go on with --resume auto",
        )
    return None


def write_settings(session: Session, config: TrainConfig) -> str:
    """Write config.yaml, resolved and naming the dataset's revision, and the pin of its commits; return the text."""
    pinned = config.model_copy(update={"data": config.data.model_copy(update={"revision": session.dataset.revision})})
    dataset = session.dataset
    head = f"# dataset identity {dataset.identity_digest}\n# text identity    {dataset.text_identity_digest}\n"
    text = head + dump_config(pinned)
    write_text(session.folder / "config.yaml", text)
    write_text(session.folder / PIN_FILE, json.dumps(session.dataset.pin()) + "\n")
    return text


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder; a kill lets go of it. Raises UserError when another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be made a folder: {error.strerror}") from None
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training into this folder") from None
        yield


@contextlib.contextmanager
def log_file(folder: Path, rank: int = 0) -> Iterator[None]:
    """Copy the log to `logs/rank-N.log`."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "logs" / f"rank-{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        handler.close()


class StoppedBySignal(Exception):
    """A signal has asked for the end, in the middle of what can be given up."""


class StopSignal:
    """What signals have asked this process for."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """Write a checkpoint and end."""
        self.checkpoint = False
        """Write a checkpoint and go on."""


class AgreedStop:
    """What signals have asked any of the ranks for, as all of them have it: looked at by all at the same places."""

    def __init__(self, asked: StopSignal, ranks: Ranks, pulse: Callable[[], None] = lambda: None) -> None:
        self._asked, self._ranks, self._pulse = asked, ranks, pulse
        self.signal: int | None = None
        """Write a checkpoint and end."""
        self.checkpoint = False
        """Write a checkpoint and go on; whoever writes it takes it back."""

    def look(self) -> bool:
        """Ask all ranks; return whether to end. To the watch it is a sign of life."""
        self._pulse()
        own = self._asked.checkpoint
        if own:
            self._asked.checkpoint = False
        number, wanted = self._ranks.all_reduce_max(float(self._asked.signal or 0), float(own))
        self.signal = int(number) or None
        self.checkpoint = self.checkpoint or bool(wanted)
        return self.signal is not None

    def raise_if_asked(self) -> None:
        """Raise Stopped when a signal has asked for the end."""
        if self.look():
            raise StoppedBySignal


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """SIGTERM and Ctrl-C ask for a checkpoint and an end, SIGUSR1 for a checkpoint; a second Ctrl-C interrupts."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask_end(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask_checkpoint(number: int, frame: FrameType | None) -> None:
        stop.checkpoint = True

    before = {number: signal.signal(number, ask_end) for number in STOP_SIGNALS}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, ask_checkpoint)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Only kernels that repeat to the bit, for as long as the run lasts."""
    if not wanted:
        yield
        return
    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def describe_data(session: Session) -> list[str]:
    """What is about to be trained on, for people."""
    order, dataset = session.order, session.dataset
    batches, batch = order.num_batches(0), order.global_batch
    return [
        f"data: {order.num_samples:,} samples in {len(order.buckets)} buckets, the first epoch has {batches:,} batches "
        f"of {batch}; revision {dataset.revision[:12]}",
        f"held out: {len(session.held_out)} clips" if session.held_out else "held out: nothing, no held-out loss",
    ]


def provenance(trainee: Trainee) -> dict[str, str]:
    """Versions and hardware that may move the last bits."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.machine()}
    if trainee.device.type == "cuda":
        versions["gpu"] = torch.cuda.get_device_name(trainee.device)
    return versions


def peak_memory_gib(device: torch.device) -> float:
    """Peak of the device's allocator; on a CPU, of the process's resident memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def verify_dataset(config: TrainConfig) -> None:
    """Hash every byte of the dataset; units not built yet are no damage. Raises UserError naming the damage."""
    from shards.check.verify import verify
    from shards.storage import open_storage

    for root in dataset_roots(config.data):
        problems = verify(open_storage(root), "hash", jobs=config.data.workers, partial=True).problems
        if problems:
            first = "; ".join(f"{problem.file} {problem.member or ''}: {problem.what}" for problem in problems[:3])
            raise UserError(
                f"{root}: {len(problems)} problems: {first}", fix=f"`wanshards verify {root}` lists them all"
            )
