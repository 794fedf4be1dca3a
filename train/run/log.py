"""What a run reports: a line a step for people, a JSON object a step for programs, curves for both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from shards.console import LOG, live_bar
from shards.errors import SystemFailure, UserError
from shards.files.write_file import named_errors, no_pipe
from train.config.train import LogConfig
from train.evaluate import HeldOut
from train.run.events import EventName, read_json_lines, write_event

METRICS_FILE = "metrics.jsonl"
HELD_OUT_FILE = "held_out.jsonl"


class StepRecord(NamedTuple):
    """One step, as it goes into metrics.jsonl."""

    step: int
    """Batches consumed, this one included."""
    epoch: int
    bucket: str
    loss: float
    """Sum over the global batch's slots ÷ its size, weighted as configured."""
    lr: float
    grad_norm: float | None
    """Before clipping; None when the update was skipped."""
    updates: int
    """Optimizer steps applied, this one included."""
    skipped: int
    """Optimizer steps skipped for overflow so far."""
    loss_scale: float
    seconds: float
    """Wall clock of the step."""
    data_wait_seconds: float
    """Of it, waiting for the batch."""
    tokens: int
    """Video tokens of the global batch."""
    tflops: float
    """Executed a second by a process, recomputation included, 10¹²."""
    mfu: float | None
    """The model's own FLOPs a second ÷ the GPU's peak; None where that is not known."""
    memory_gib: float
    """Peak of the device so far; of the process on a CPU."""
    num_image_to_video: int
    keys: Sequence[str]
    """Samples by slot."""
    slot_losses: Sequence[float]
    """Loss of each slot, to five digits, weighted as configured."""
    overflow: str | None
    """Block that the update was skipped for."""
    substituted: Sequence[tuple[str, str]]
    """(unreadable key, key taken instead)."""


class RunLog:
    """Writes metrics.jsonl, held_out.jsonl, events.jsonl, TensorBoard and, if asked, W&B; on rank 0 alone."""

    def __init__(self, folder: Path, config: LogConfig, *, first_step: int, max_steps: int, settings: str) -> None:
        self._config, self._folder = config, folder
        with contextlib.ExitStack() as opened:
            self._metrics = opened.enter_context(_open_to_append(folder / METRICS_FILE))
            self._held_out = opened.enter_context(_open_to_append(folder / HELD_OUT_FILE))
            self._wandb = _open_wandb(config.wandb_project, folder, settings) if config.wandb_project else None
            self._board = _open_tensorboard(folder / "tensorboard", first_step)
            opened.pop_all()
        self._bar = _Bar(first_step - 1, max_steps)

    def write_step(self, record: StepRecord) -> None:
        """One step, everywhere."""
        _append(self._metrics, record._asdict())
        values = {
            name: getattr(record, name)
            for name in ("loss", "lr", "grad_norm", "loss_scale", "memory_gib", "tflops", "mfu")
        }
        values["tokens_per_second"] = record.tokens / max(record.seconds, 1e-9)
        values["data_wait_share"] = record.data_wait_seconds / max(record.seconds, 1e-9)
        self._curves({f"train/{name}": value for name, value in values.items() if value is not None}, record.step)
        self._bar.advance(record)

    def event(self, event: EventName, step: int, **values: Any) -> None:
        """One line of events.jsonl."""
        write_event(self._folder, event, step, **values)

    def write_held_out(self, step: int, held_out: HeldOut, seconds: float) -> None:
        """One evaluation, everywhere."""
        _append(self._held_out, {"step": step, **held_out.as_dict(), "seconds": seconds})
        curves = {"held_out/mean": held_out.mean}
        for mode in ("t2v", "i2v"):
            losses: tuple[float, ...] = getattr(held_out, mode)
            for place, loss in enumerate(losses, start=1):
                curves[f"held_out/{mode}_q{place}"] = loss
        self._curves(curves, step)

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations written so far."""
        return [line for _, line in read_json_lines(self._folder / HELD_OUT_FILE)]

    def sync(self) -> None:
        """Make what was written so far survive a crash of the machine; called with each checkpoint."""
        with named_errors(self._folder):
            for file in (self._metrics, self._held_out):
                file.flush()
                os.fsync(file.fileno())
            self._board.flush()

    def close_after(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Flush and close everything, as the exit of a context; an error of its own does not hide an earlier one."""
        self._bar.close()
        ends = [self.sync, self._metrics.close, self._held_out.close, self._board.close]
        if self._wandb is not None:
            ends.append(self._wandb.finish)
        failures = []
        for end in ends:
            try:
                with named_errors(self._folder):
                    end()
            except SystemFailure as own:
                failures.append(own)
        if failures and error is None:
            raise failures[0]
        if failures:
            LOG.warning("the files of the run's log are incomplete: %s", failures[0])

    def _curves(self, values: Mapping[str, float], step: int) -> None:
        with named_errors(self._folder / "tensorboard"):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


def describe_step(record: StepRecord) -> str:
    """One line a step: loss, rate, gradient norm, time, throughput, share of waiting for data, memory."""
    wait = 100 * record.data_wait_seconds / max(record.seconds, 1e-9)
    line = (
        f"step {record.step}  loss {record.loss:.4f}  lr {record.lr:.2e}  grad {record.grad_norm or math.nan:.3g}  "
        f"{record.seconds:.2f} s/step  {record.tokens / max(record.seconds, 1e-9):,.0f} tokens/s  "
        f"{record.tflops:.3g} TFLOP/s  data wait {wait:.0f} %  {record.memory_gib:.1f} GiB"
    )
    if record.mfu is not None:
        line += f"  MFU {record.mfu:.0%}"
    if record.overflow:
        line += f"  SKIPPED: overflow in {record.overflow}, loss scale now {record.loss_scale:g}"
    for bad, taken in record.substituted:
        line += f"  SUBSTITUTED {bad} by {taken}"
    return line


class _Bar:
    """A progress line on a terminal, with the log's lines above it; elsewhere nothing."""

    def __init__(self, done: int, total: int) -> None:
        self._first, self._total, self._began = done, total, time.monotonic()
        self._stack = contextlib.ExitStack()
        self._show = None
        if sys.stderr.isatty():
            self._show = self._stack.enter_context(live_bar("training", total, done, "first step"))

    def advance(self, record: StepRecord) -> None:
        if self._show is not None:
            # Of all steps so far, evaluations and checkpoints included: a step may take minutes.
            each = (time.monotonic() - self._began) / max(1, record.step - self._first)
            facts = f"loss {record.loss:.4f}  {record.seconds:.2f} s/step"
            self._show(record.step, each * (self._total - record.step), facts)

    def close(self) -> None:
        self._stack.close()


def _open_to_append(path: Path) -> IO[str]:
    with named_errors(path):
        return open(path, "a", encoding="utf-8", opener=no_pipe)


def _append(file: IO[str], values: Mapping[str, Any]) -> None:
    with named_errors(Path(file.name)):
        file.write(json.dumps(_finite(values), ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()


def _finite(value: Any) -> Any:
    """The value with null for each number that JSON cannot hold (a loss that overflowed)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"TensorBoard cannot be imported: {error}", fix="pip install -e '.[train]' -c constraints.txt"
        ) from None
    # What a killed run wrote beyond its checkpoint is hidden.
    return SummaryWriter(str(folder), purge_step=first_step)


def _open_wandb(project: str | None, folder: Path, settings: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"log.wandb_project: {project} needs the package wandb",
            fix="pip install -e '.[wandb]' -c constraints.txt, or set log.wandb_project=null",
        ) from None
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # the same at every resume
    try:
        return wandb.init(
            project=project, dir=str(folder), name=folder.name, config={"yaml": settings}, resume="allow", id=run_id
        )
    except wandb.Error as error:
        raise UserError(
            f"log.wandb_project: {project}: Weights & Biases does not start: {error}",
            fix="`wandb login` or WANDB_API_KEY; WANDB_MODE=offline without a network; or log.wandb_project=null",
        ) from None
