"""What a run opens before its first step (folder, dataset, split, order, model) and restores at its end."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
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
from typing import IO, Any

import torch

from shards.config import dump_config, parse_yaml
from shards.console import LOG, counted
from shards.errors import UserError
from shards.files.write_file import named_errors, no_pipe, write_text
from shards.gpus import by_driver_name
from shards.read.dataset import Dataset
from train.checkpoint import PIN_FILE, find_checkpoints, read_pin, refuse_damage
from train.config.model import DiTConfig
from train.config.train import TrainConfig, dataset_roots, run_identity, slots_per_rank
from train.data.loader import check_model_fits, select_samples
from train.data.open import open_data
from train.data.sampler import Order, describe_buckets
from train.data.weights import describe_shares, expected_shares, make_order
from train.device import choose_device, device_info
from train.estimate.flops import with_compile
from train.evaluate import Evaluator, choose_held_out
from train.geometry import Shape, num_tokens
from train.objective import sigma_density
from train.parallel.ranks import ALONE, Ranks
from train.run.trainee import Trainee, make_trainee, resolve_dims, weights_digest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Session:
    """Everything that a run reads and never changes."""

    folder: Path
    dataset: Dataset
    ordinals: list[int]
    """The training side."""
    held_out: Evaluator | None
    """Takes the held-out loss; None without `eval`."""
    order: Order
    trainee: Trainee
    identity: dict[str, Any]
    """What decides the numbers; a resume insists on it."""
    ranks: Ranks = ALONE
    """The processes of the run."""


def open_session(
    config: TrainConfig,
    *,
    verify: bool = False,
    start: Path | None = None,
    ranks: Ranks = ALONE,
    device_bytes: int | None = None,
) -> Session:
    """Open the dataset, check it against the model, build the model. Raises UserError for what does not fit.

    `start`, a checkpoint, opens the very commits that its run began with, though others were added since.
    `device_bytes` is what `auto` plans with on every rank; None asks this GPU.
    """
    slots_per_rank(config.data, ranks.layout.dp_size)
    if config.parallel.offload and ranks.layout.base_shards == 1:
        raise UserError(
            "parallel.offload: true, but every process holds the full base here: only a sharded base can be offloaded",
            fix="model.stream_blocks=true and parallel.offload=false; or shard the base over several processes: "
            "parallel.shard=full",
        )
    sigma_density(config.objective)  # bounds that hold nothing are refused before the weights are built
    dataset = open_data(config, None if start is None else read_pin(start))
    if verify and ranks.is_first:
        verify_dataset(config)
    ordinals, validation = select_samples(dataset, config.data, hold_out_one=config.eval is not None)
    order = make_order(dataset, ordinals, config)
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
    if config.model.compile == "auto":
        compiles = ranks.broadcast(_decide_compile(config, dims, order, start, ranks) if ranks.is_first else None)
        config = config.model_copy(update={"model": config.model.model_copy(update={"compile": compiles})})
    trainee = make_trainee(config, ranks, device_bytes)
    evaluator = None
    if config.eval is not None:
        density = sigma_density(config.objective)
        evaluator = Evaluator(
            dataset, held_out, config.eval, config.data, density, dims.text_len, trainee.device, ranks
        )
    identity = full_identity(config, dataset, trainee)
    return Session(Path(config.output), dataset, ordinals, evaluator, order, trainee, identity, ranks)


def _decide_compile(config: TrainConfig, dims: DiTConfig, order: Order, start: Path | None, ranks: Ranks) -> bool:
    """What `model.compile: auto` comes to: what the run began with, by its config.yaml, or else what the plan says."""
    begun = None if start is None else start.resolve().parents[1] / "config.yaml"
    if begun is not None and begun.is_file():
        kept = parse_yaml(begun.read_text(encoding="utf-8"), str(begun)).get("model", {}).get("compile")
        if isinstance(kept, bool):
            return kept
    facts = device_info(choose_device(config.precision.device, None if ranks.alone else ranks.layout.local_rank))
    gpu = by_driver_name(facts.name) if facts.kind == "cuda" and importlib.util.find_spec("triton") else None
    shapes = [Shape(config.data.micro_batch, num_tokens(dims, *bucket)) for bucket in order.buckets]
    notes: list[str] = []
    decided = with_compile(config, dims, gpu, shapes, ranks.layout.world_size, notes)
    LOG.info("%s", notes[0])
    return bool(decided.model.compile)


def full_identity(config: TrainConfig, dataset: Dataset, trainee: Trainee) -> dict[str, Any]:
    """What decides the numbers of a run: configuration, weights, dataset."""
    # Kept as it is computed in, resident or streamed, the base has the same numbers.
    kept = config.model.base_dtype
    return {
        "config": run_identity(config),
        "precision": trainee.precision.name,
        **({} if kept in ("auto", trainee.precision.name) else {"base_dtype": kept}),
        "weights": weights_digest(config.model.checkpoint),
        "dims": trainee.dims.model_dump(mode="json"),
        "dataset": {
            "identity": dataset.identity_digest,
            "text_identity": dataset.text_identity_digest,
            "revision": dataset.revision,
        },
    }


def choose_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to resume from: `auto` the newest of the run, `never` none, else the one at that path.

    Raises UserError when `never` would write over a run's checkpoints.
    """
    found = find_checkpoints(folder / "checkpoints")
    if resume != "never":
        chosen = Path(resume) if resume != "auto" else found[-1] if found else None
        if chosen is not None:
            refuse_damage(chosen, found)
        return chosen
    if found:
        raise UserError(
            f"{folder} holds a run already, up to {found[-1].name}",
            fix="choose another output, remove that folder, or resume it with --resume auto",
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
    """Lock the run's folder; the kernel releases it when the process ends. Raises UserError when another holds it."""
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with named_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path, "w", opener=no_pipe))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training into this folder") from None
        except OSError as error:  # Lustre without the mount option flock, some FUSE file systems
            LOG.warning("%s: cannot be locked (%s): see to it that one run at a time writes here", path, error.strerror)
        yield


class _LogFile(logging.StreamHandler[IO[str]]):
    """Lines into a file; where that fails, as on a full disk, the terminal says so once, and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """In place of a traceback for each line that cannot be written."""
        LOG.removeHandler(self)
        LOG.warning("%s is incomplete from here on: %s", self.stream.name, sys.exc_info()[1])


@contextlib.contextmanager
def log_file(folder: Path, rank: int = 0) -> Iterator[None]:
    """Copy the log to `logs/rank-N.log`."""
    path = folder / "logs" / f"rank-{rank}.log"
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8", opener=no_pipe)  # noqa: SIM115 - closed below
    handler = _LogFile(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        handler.close()
        with contextlib.suppress(OSError):  # `handleError` has said so
            file.close()


class StoppedBySignal(Exception):
    """A signal asked for the end in the middle of work that can be repeated."""


class StopSignal:
    """What signals asked any rank for, agreed by all: every rank calls `sync` at the same places."""

    def __init__(self, ranks: Ranks = ALONE, pulse: Callable[[], None] = lambda: None) -> None:
        self._ranks, self._pulse = ranks, pulse
        self.failed: int | None = None
        """A rank that failed, as all know it; afterwards `sync` exchanges nothing more."""
        self._fails = False
        self.asked: int | None = None
        """Signal that asked this process for the end."""
        self.asked_checkpoint = False
        """A signal asked this process for a checkpoint."""
        self.signal: int | None = None
        """Write a checkpoint and end."""
        self.checkpoint = False
        """Write a checkpoint and continue; the loop sets it back when the checkpoint is written."""

    def sync(self) -> bool:
        """All-reduce the requests; return whether to end. It also tells the heartbeat that this rank moves."""
        self._pulse()
        if self.failed is not None:
            return True
        own, self.asked_checkpoint = self.asked_checkpoint, False
        failing = self._ranks.layout.rank + 1 if self._fails else 0
        number, wanted, failed = self._ranks.all_reduce_max(float(self.asked or 0), float(own), float(failing))
        self.signal = int(number) or None
        self.checkpoint = self.checkpoint or bool(wanted)
        self.failed = int(failed) - 1 if failed else None
        return self.signal is not None or self.failed is not None

    def fail(self) -> None:
        """Tell the others that this rank failed, at their next sync."""
        self._fails = True
        self.sync()

    def raise_if_asked(self) -> None:
        """Raise StoppedBySignal when a signal asked for the end, or a rank failed."""
        if self.sync():
            raise StoppedBySignal


@contextlib.contextmanager
def stop_signals(stop: StopSignal) -> Iterator[StopSignal]:
    """Let SIGTERM, SIGHUP and Ctrl-C ask `stop` for a checkpoint and an end, SIGUSR1 for a checkpoint.

    A second Ctrl-C interrupts. What is ignored already stays ignored: nohup ignores SIGHUP.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask_end(number: int, frame: FrameType | None) -> None:
        stop.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask_checkpoint(number: int, frame: FrameType | None) -> None:
        stop.asked_checkpoint = True

    handlers = dict.fromkeys(STOP_SIGNALS, ask_end) | {signal.SIGUSR1: ask_checkpoint}
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Only kernels that repeat to the bit, until the run ends."""
    if not wanted:
        yield
        return
    # cuBLAS reads it when it makes its first handle.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def describe_data(session: Session) -> list[str]:
    """What is about to be trained on, for people."""
    order, dataset, weights = session.order, session.dataset, session.trainee.config.data.weights
    batches, batch = order.num_batches(0), order.global_batch
    shares = expected_shares(dataset, session.ordinals, order, weights) if weights else []
    return [
        f"data: {counted(order.num_samples, 'sample')} in {counted(len(order.buckets), 'bucket')}, the first epoch has "
        f"{counted(batches, 'batch', 'batches')} of {batch}; revision {dataset.revision[:12]}",
        *(f"data.weights: {line} expected" for line in describe_shares(shares)),
        f"held out: {counted(session.held_out.num_clips, 'clip')}"
        if session.held_out
        else "held out: nothing, no held-out loss",
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
