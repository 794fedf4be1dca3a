"""What a run's folder says, read while the run may still write: metrics, evaluations, checkpoints, events, pictures.

An unfinished last line is left for later; any other line that cannot be read is an error that names it.
Importing it imports no torch.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.config import load_config
from shards.errors import UserError
from shards.files.tensor_files import SAMPLES_FOLDER
from train.checkpoint import CheckpointState, find_checkpoints, read_checkpoint
from train.config.train import TrainConfig
from train.run.events import EVENTS_FILE, read_json_lines
from train.run.log import HELD_OUT_FILE, METRICS_FILE

NUMBERS = (
    "step", "epoch", "loss", "lr", "grad_norm", "updates", "skipped", "loss_scale", "seconds", "data_wait_seconds",
    "tokens", "tflops", "mfu", "memory_gib",
)  # fmt: skip


class Skip(NamedTuple):
    """An update that was not applied."""

    step: int
    block: str
    """Where the overflow began."""
    loss_scale: float | None
    """After it."""


class Substitute(NamedTuple):
    """An unreadable sample and what was taken instead."""

    step: int
    key: str
    taken: str


class Event(NamedTuple):
    """A beginning, a resume, a wait or a stop."""

    time: str
    step: int
    what: str


class Slots(NamedTuple):
    """Every slot that a loss was recorded of, as columns."""

    step: np.ndarray
    """int64."""
    slot: np.ndarray
    """int64."""
    key: np.ndarray
    """int64, places in `Steps.keys`."""
    loss: np.ndarray
    """float64."""


class Steps(NamedTuple):
    """metrics.jsonl as columns."""

    numbers: Mapping[str, np.ndarray]
    """float64 of each name of `NUMBERS`; NaN where a line has none."""
    buckets: list[str]
    keys: list[str]
    """Every sample that was trained on, in the order of its first use."""
    uses: np.ndarray
    """How often each was."""
    slots: Slots
    skips: list[Skip]
    substitutes: list[Substitute]

    def __len__(self) -> int:
        return len(self.buckets)


class SampledLatent(NamedTuple):
    """One latent that was sampled during training, and what was decoded from it."""

    step: int
    name: str
    latent: Path
    video: Path | None
    still: Path | None


@dataclass(frozen=True)
class History:
    """What events.jsonl holds; empty for a run of a version that wrote none."""

    events: list[Event]
    planned_gib: float | None
    """Planned peak of the newest start."""
    device: str | None
    base: str | None


class Run(NamedTuple):
    """All that a page is made of."""

    folder: Path
    config: TrainConfig
    config_text: str
    steps: Steps
    evaluations: list[dict[str, Any]]
    states: list[tuple[Path, CheckpointState]]
    history: History
    pictures: list[SampledLatent]


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises UserError where it is none, or a file of it cannot be read."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml", expected="the `output` of `wantrain fit`")
    config = load_config(TrainConfig, path)
    return Run(
        folder, config, path.read_text(encoding="utf-8"), read_steps(folder), read_evaluations(folder),
        read_states(folder), read_history(folder), find_pictures(folder),
    )  # fmt: skip


def read_steps(folder: Path) -> Steps:
    """metrics.jsonl of a run; no step where there is none yet. Raises UserError naming a bad line."""
    path = folder / METRICS_FILE
    columns: dict[str, list[float]] = {name: [] for name in NUMBERS}
    buckets: list[str] = []
    places: dict[str, int] = {}
    uses: list[int] = []
    slots = tuple(array("d") for _ in range(4))  # there may be millions
    skips: list[Skip] = []
    substitutes: list[Substitute] = []
    for number, line in read_json_lines(path):
        try:
            for name in NUMBERS:
                columns[name].append(_number(line.get(name)))
            step = int(line["step"])
            buckets.append(str(line["bucket"]))
            keys = [str(key) for key in line["keys"]]
            losses = line.get("slot_losses") or [None] * len(keys)  # earlier versions wrote none
            for slot, (key, loss) in enumerate(zip(keys, losses, strict=True)):
                place = places.setdefault(key, len(places))
                if place == len(uses):
                    uses.append(0)
                uses[place] += 1
                if loss is not None:
                    for column, value in zip(slots, (step, slot, place, _number(loss)), strict=True):
                        column.append(value)
            if line.get("overflow"):
                skips.append(Skip(step, str(line["overflow"]), line.get("loss_scale")))
            substitutes += [Substitute(step, str(bad), str(taken)) for bad, taken in line.get("substituted") or ()]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {number}: {error!r}", expected="a step as `wantrain fit` writes it"
            ) from None
    numbers = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    columns_read = [np.array(column).astype(np.int64) for column in slots[:3]]
    slots_read = Slots(columns_read[0], columns_read[1], columns_read[2], np.array(slots[3]))
    return Steps(numbers, buckets, list(places), np.array(uses, dtype=np.int64), slots_read, skips, substitutes)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """held_out.jsonl: step, mean, t2v, i2v, sigmas, num_clips, seconds of each evaluation."""
    path = folder / HELD_OUT_FILE
    found = []
    for number, line in read_json_lines(path):
        if not isinstance(line.get("step"), int) or not isinstance(line.get("t2v"), list):
            raise UserError(f"{path}, line {number}: no evaluation", expected="lines as `wantrain fit` writes them")
        found.append({**line, **{name: [_number(x) for x in line.get(name) or ()] for name in ("t2v", "i2v")}})
    return found


def read_states(folder: Path) -> list[tuple[Path, CheckpointState]]:
    """The checkpoints to resume from, oldest first; one that vanishes meanwhile is left out."""
    found = []
    for path in find_checkpoints(folder / "checkpoints"):
        try:
            found.append((path, read_checkpoint(path)))
        except UserError:
            if path.exists():  # not just pruned by the run
                raise
    return found


def read_history(folder: Path) -> History:
    """Beginnings, resumes, waits and stops, and the plan of the newest start. Raises UserError naming a bad line."""
    path = folder / EVENTS_FILE
    events: list[Event] = []
    planned: float | None = None
    device: str | None = None
    base: str | None = None
    for number, line in read_json_lines(path):
        try:
            kind, time, step = line["event"], str(line["time"]), int(line["step"])
            if kind in ("start", "resume"):
                base = str(line["base"])
                events.append(Event(time, step, "began" if kind == "start" else "resumed"))
            elif kind == "device":
                device = f"{line['name']}; {line['precision']} ({line['reason']})"
            elif kind == "plan":
                planned = None if line["gib"] is None else float(line["gib"])
            elif kind == "waiting":
                over = "waited" if line["is_over"] else "is waiting"
                events.append(Event(time, step, f"{over} for storage for {line['seconds']:.0f} s: {line['what']}"))
            elif kind == "stop":
                events.append(Event(time, step, _describe_stop(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {number}: {error!r}", expected="an event as `wantrain fit` writes it"
            ) from None
    return History(events, planned, device, base)


def _describe_stop(line: Mapping[str, Any]) -> str:
    reason = str(line["reason"])
    if reason == "signal":
        return f"stopped by signal {line['signal']}"
    if reason == "error":
        return f"stopped by an error: {line['error']}"
    return {"done": "finished", "patience": "stopped early"}.get(reason, reason)


def find_pictures(folder: Path) -> list[SampledLatent]:
    """What was sampled during training, by step and name."""
    pictures = []
    for latent in sorted((folder / SAMPLES_FOLDER).glob("step-*/[!.]*.safetensors")):
        made = [latent.with_suffix(suffix) for suffix in (".mp4", ".jpg")]
        video, still = (path if path.is_file() else None for path in made)
        pictures.append(SampledLatent(int(latent.parent.name.removeprefix("step-")), latent.stem, latent, video, still))
    return pictures


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)
