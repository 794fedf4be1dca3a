"""Checkpoints that are complete or absent: safetensors and JSON, written under a temporary name, synced, renamed.

    checkpoints/step-0000500/lora.safetensors       raw A and B by module (model.safetensors for a full model)
                             average.safetensors    their moving average, where there is one
                             optimizer.safetensors  moments, or 8-bit codes with their scales
                             state.json             step, updates, position in the order, loss scale, versions, identity
                             dataset-pin.json       the very commits of the dataset that the run reads

There is no pickle, and no state of a random generator: every draw is a function of the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from shards.config import Config, validate_config
from shards.errors import UserError
from shards.storage.local import sync_path

if TYPE_CHECKING:
    from torch import Tensor

LORA_FILE = "lora.safetensors"
MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "average.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
PIN_FILE = "dataset-pin.json"
_NAME = re.compile(r"step-(\d{7,})")
Count = Annotated[int, Field(ge=0)]
Owed = Literal["evaluation", "pictures"]


class CheckpointState(Config):
    """`state.json`: everything of a run that is not a tensor."""

    format_version: Literal[1] = 1
    step: Count
    """Batches consumed."""
    updates: Count
    """Optimizer steps applied."""
    skipped: Count
    """Optimizer steps skipped for overflow."""
    skipped_in_a_row: Count = 0
    """Of them, those since the last applied one."""
    epoch: Count
    """Epoch of the next batch."""
    batch: Count
    """Index of the next batch in its epoch."""
    scaler: dict[str, Any]
    """State of the loss scaler."""
    overflows: dict[str, Any] = Field(default_factory=dict)
    """Overflow telemetry."""
    best_step: int | None = None
    """Step of the lowest held-out loss so far."""
    best_loss: float | None = None
    """The lowest held-out loss so far."""
    evaluations_since_best: Count = 0
    """Evaluations in a row without improvement."""
    owed: tuple[Owed, ...] = ()
    """What is still to be done after the step (a signal interrupted it); a resume does it first."""
    seconds: float = 0.0
    """Wall-clock seconds of training so far, held-out loss included."""
    eval_seconds: float = 0.0
    """Of them, seconds spent on the held-out loss."""
    draws_version: int
    """Version of the random draws."""
    order_version: int
    """Version of the sample order."""
    identity: dict[str, Any]
    """What decides the numbers: configuration, weights, dataset."""
    provenance: dict[str, str] = Field(default_factory=dict)
    """Versions and hardware; a difference is reported, not refused."""


def write_checkpoint(
    folder: Path, state: CheckpointState, tensors: Mapping[str, Mapping[str, Tensor]], pin: Mapping[str, Any]
) -> Path:
    """Write `checkpoints/step-N` under `folder`, complete or not at all, and return its path.

    Args:
        folder: the run's `checkpoints` folder.
        state: goes into state.json.
        tensors: named tensors by file name; they are written as they are, from the CPU.
        pin: opens the dataset again as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(state.step)
    temporary = folder / f".writing-{final.name}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    for name, named in tensors.items():
        save_tensors(temporary / name, named)
    write_text(temporary / PIN_FILE, json.dumps(pin) + "\n")
    write_text(temporary / STATE_FILE, state.model_dump_json(indent=1) + "\n")
    sync_path(temporary)
    if final.exists():  # left by a run that was then resumed from an earlier checkpoint
        stale = folder / f".stale-{final.name}"
        if stale.exists():
            shutil.rmtree(stale)
        final.rename(stale)
        temporary.rename(final)
        shutil.rmtree(stale)
    else:
        temporary.rename(final)
    sync_path(folder)
    return final


def read_checkpoint(path: Path) -> CheckpointState:
    """The state of a checkpoint. Raises UserError naming what is missing or not as it should be."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint", expected="a folder such as RUN/checkpoints/step-0000500")
    try:
        text = (path / STATE_FILE).read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {STATE_FILE} cannot be read: {error}", expected="a complete checkpoint") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: {STATE_FILE} holds {type(values).__name__}", expected="an object")
    return validate_config(CheckpointState, values, origin=str(path / STATE_FILE))


def read_pin(folder: Path) -> dict[str, Any]:
    """The commits of the dataset that a checkpoint, or a run, was begun with."""
    try:
        pin = json.loads((folder / PIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {PIN_FILE} cannot be read: {error}", expected="a complete checkpoint") from None
    if not isinstance(pin, dict):
        raise UserError(f"{folder}: {PIN_FILE} holds {type(pin).__name__}", expected="an object")
    return pin


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under a run's `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune_checkpoints(folder: Path, keep_last: int, best_step: int | None) -> list[Path]:
    """Remove all but the newest `keep_last` and the best; return what was removed."""
    best = checkpoint_name(best_step) if best_step is not None else None
    removed = [path for path in find_checkpoints(folder)[:-keep_last] if path.name != best]
    _remove(removed)
    return removed


def drop_later(folder: Path, step: int) -> list[Path]:
    """Remove the checkpoints after `step`, the steps that this resume replaces; return what was removed.

    Left in place they would count as the newest: new ones would be pruned for them, and `auto` would resume from them.
    """
    removed = [path for path in find_checkpoints(folder) if path.name > checkpoint_name(step)]
    _remove(removed)
    return removed


def _remove(paths: list[Path]) -> None:
    for path in paths:
        # Renamed first: a kill between two unlinks must not leave half a checkpoint under its name.
        doomed = path.with_name(f".removing-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Clear what a kill left behind: half-written, half-removed and replaced checkpoints."""
    for pattern in (".writing-step-*", ".removing-step-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for path in folder.glob(".stale-step-*"):
        final = path.with_name(path.name.removeprefix(".stale-"))
        if final.exists():
            shutil.rmtree(path)
        else:  # killed between the two renames: the old one is still complete
            path.rename(final)


def checkpoint_name(step: int) -> str:
    """`step-0000500`."""
    return f"step-{step:07d}"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors beside `path`, sync, rename."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".writing-{path.name}")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    sync_path(temporary)
    temporary.rename(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors onto the CPU. Raises UserError naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}", fix="resume from an older checkpoint") from None
    return tensors


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file beyond `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        if json.loads(line)["step"] > step:
            break
        kept.append(line)
    write_text(path, b"".join(kept).decode())


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 beside `path`, sync, rename."""
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync_path(temporary)
    temporary.rename(path)
