"""Checkpoints, never half written: safetensors and JSON under a temporary name, synced, then renamed.

    checkpoints/step-0000500/lora.safetensors       raw A and B by module (model.safetensors for a full model)
                             average.safetensors    their average (moving, or schedule-free), where there is one
                             optimizer.safetensors  moments, or 8-bit codes with their scales
                             state.json             step, updates, position in the order, loss scale, identity;
                                                    versions, sha256 of the other files; sealed as commits of shards are
                             dataset-pin.json       the very commits of the dataset that the run reads

There is no pickle, and no state of a random generator: every draw is a function of the step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from shards.config import Config, validate_config
from shards.console import LOG
from shards.errors import ShardDamage, UserError
from shards.files.write_file import TEMPORARY, named_errors, open_file, sync_folder, write_file, write_text
from shards.format.sealed_json import open_document, seal_document

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LORA_FILE = "lora.safetensors"
MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "average.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
PIN_FILE = "dataset-pin.json"
OLDER = "resume from an older checkpoint: --resume RUN/checkpoints/step-…; `wantrain verify RUN` says which are good"
# Names of dtypes in a safetensors header, in the order in which the library writes tensors of them: widest first.
_DTYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NAME = re.compile(r"step-(\d{7,})")
LEFTOVERS = (f"{TEMPORARY}step-*", ".removing-step-*")
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
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """What of another optimizer's state is no tensor, and where its tensors belong; empty for ours."""
    draws_version: int
    """Version of the random draws."""
    order_version: int
    """Version of the sample order."""
    identity: dict[str, Any]
    """What decides the numbers: configuration, weights, dataset."""
    provenance: dict[str, str] = Field(default_factory=dict)
    """Versions and hardware; a difference is reported, not refused."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of each other file of the checkpoint; empty in checkpoints of earlier versions."""


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
    temporary = begin_checkpoint(folder, state.step)
    try:
        files = {name: write_tensors(temporary / name, named) for name, named in tensors.items()}
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return seal_checkpoint(folder, state, files, pin)


def begin_checkpoint(folder: Path, step: int) -> Path:
    """The empty folder that a checkpoint is written into: see `seal_checkpoint`."""
    temporary = folder / f"{TEMPORARY}{checkpoint_name(step)}"
    with named_errors(temporary):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    return temporary


def seal_checkpoint(folder: Path, state: CheckpointState, digests: Mapping[str, str], pin: Mapping[str, Any]) -> Path:
    """Give what was written since `begin_checkpoint` its state and its name; `digests` are those of its files."""
    final = folder / checkpoint_name(state.step)
    temporary = folder / f"{TEMPORARY}{final.name}"
    with named_errors(final):
        try:
            files = dict(digests)
            files[PIN_FILE] = write_text(temporary / PIN_FILE, json.dumps(pin) + "\n")
            body = state.model_copy(update={"files": files}).model_dump(mode="json")
            write_file(temporary / STATE_FILE, [seal_document(body, indent=1)])
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        stale = folder / f".stale-{final.name}"
        if final.exists():  # left by a run that was then resumed from an earlier checkpoint
            shutil.rmtree(stale, ignore_errors=True)
            final.rename(stale)
        temporary.rename(final)
        shutil.rmtree(stale, ignore_errors=True)
        sync_folder(folder)
    return final


def read_checkpoint(path: Path) -> CheckpointState:
    """The state of a checkpoint. Raises UserError naming what is missing or not as it should be."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint", expected="a folder such as RUN/checkpoints/step-0000500")
    values = _read_object(path / STATE_FILE)
    if values.pop("seal", None) is not None or values.get("files"):  # those without digests had no seal
        try:
            open_document((path / STATE_FILE).read_bytes(), STATE_FILE)
        except ShardDamage as error:
            raise UserError(f"{path}: {STATE_FILE} is damaged: {error.what}", fix=OLDER) from None
    return validate_config(CheckpointState, values, origin=str(path / STATE_FILE))


def check_files(path: Path, state: CheckpointState) -> list[str]:
    """What is wrong with the files of a checkpoint against the digests in its state; nothing where it has none."""
    problems = []
    for name, expected in state.files.items():
        try:
            found = _digest(path / name)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
            continue
        if found != expected:
            problems.append(f"{name} is damaged: its sha256 is {found}, {STATE_FILE} says {expected}")
    return problems


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex. Raises SystemFailure."""
    with named_errors(path):
        return _digest(path)


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def examine_checkpoint(path: Path) -> tuple[CheckpointState | None, list[str]]:
    """The state of a checkpoint, and what is wrong with it; no state where that cannot be read."""
    try:
        state = read_checkpoint(path)
    except UserError as error:
        return None, [error.problem.removeprefix(f"{path}: ")]
    problems = check_files(path, state)
    if (named := _NAME.fullmatch(path.name)) and int(named[1]) != state.step:
        problems.append(f"{STATE_FILE} is of step {state.step}")
    return state, problems


class Verified(NamedTuple):
    """What `wantrain verify` found of one checkpoint or one file of a run."""

    path: str
    state: Literal["good", "unverified", "unfinished", "damaged"]
    """`unverified`: of an earlier version, without digests. `unfinished`: a kill left it, a resume removes it."""
    problems: list[str]


def verify_run(path: Path) -> list[Verified]:
    """Check every checkpoint of a run, or one checkpoint, and the lines of a run's JSON files. Raises UserError."""
    if (path / STATE_FILE).exists() or _NAME.fullmatch(path.name):
        return [_verify(path)]
    if not (path / "config.yaml").is_file() and not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is no run and no checkpoint", expected="the `output` of `wantrain fit`")
    folder = path / "checkpoints"
    found = [_verify(one) for one in find_checkpoints(folder)]
    leftovers = sorted(one for pattern in LEFTOVERS for one in folder.glob(pattern))
    found += [Verified(str(one), "unfinished", []) for one in leftovers]
    for file in sorted(path.glob("*.jsonl")):
        with named_errors(file), open_file(file) as opened:
            *lines, rest = opened.read().split(b"\n")
        bad = [number for number, line in enumerate(lines, start=1) if not _is_object(line)]
        problems = [f"line {number} is no JSON object" for number in bad]
        found.append(Verified(str(file), "damaged" if bad else "unfinished" if rest else "good", problems))
    return found


def _verify(path: Path) -> Verified:
    state, problems = examine_checkpoint(path)
    good = "good" if state is not None and state.files else "unverified"
    return Verified(str(path), "damaged" if problems else good, problems)  # type: ignore[arg-type]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def refuse_damage(path: Path, others: list[Path]) -> None:
    """Raise UserError when a checkpoint is damaged, naming the newest good one of `others`; warn without digests."""
    state, problems = examine_checkpoint(path)
    if not problems:
        if state is not None and not state.files:
            LOG.warning("%s is of an earlier version, without digests: its bytes cannot be verified", path)
        return
    good = (other for other in reversed(others) if other != path and not examine_checkpoint(other)[1])
    newest = next(good, None)
    raise UserError(
        f"{path}: {'; '.join(problems)}",
        fix=f"--resume {newest}, the newest good one"
        if newest
        else "start a new run: no checkpoint of this one is good",
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint or a run. Raises UserError."""
    try:
        with named_errors(path), open_file(path) as file:
            values = json.loads(file.read().decode())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path.parent}: {path.name} cannot be read: {error}", expected="a complete checkpoint"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path.parent}: {path.name} holds {type(values).__name__}", expected="an object")
    return values


def read_pin(folder: Path) -> dict[str, Any]:
    """The commits of the dataset that a checkpoint, or a run, was begun with."""
    return _read_object(folder / PIN_FILE)


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under a run's `checkpoints` folder, oldest first. Raises UserError where it is no folder."""
    if not folder.is_dir():
        if os.path.lexists(folder):  # else found at the first checkpoint, when there is something to lose
            raise UserError(f"{folder}: not a folder, and no link to one", fix="move it away")
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def recorded_overflows(source: Path) -> dict[str, int]:
    """The overflows by block in the checkpoint that a path is or lies in, of a run in its newest; elsewhere none."""
    for place in (source, source.resolve().parent):
        if (place / STATE_FILE).is_file():
            return read_checkpoint(place).overflows
        if found := find_checkpoints(place / "checkpoints"):
            return read_checkpoint(found[-1]).overflows
    return {}


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
    for pattern in LEFTOVERS:
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors of any device as safetensors; return the file's sha256.

    The same tensors and metadata make the same bytes: the library writes metadata in an order that changes from run to
    run, here it is sorted. Otherwise the bytes are the library's.
    """
    return write_file(path, _safetensors(tensors, metadata or {}))


class StoredTensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def safetensors_header(specs: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Length and header of a file, and the bytes of the tensors that follow it, in the order of `_in_order`."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in _in_order(specs):
        dtype, shape = specs[name]
        end = offset + math.prod(shape) * dtype.itemsize
        stored = _DTYPES[str(dtype).removeprefix("torch.")]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _in_order(specs: Mapping[str, StoredTensor]) -> list[str]:
    import torch

    places = {getattr(torch, name): place for place, name in enumerate(_DTYPES) if hasattr(torch, name)}
    return sorted(specs, key=lambda name: (places[specs[name].dtype], name))


def read_header(path: Path) -> dict[str, int]:
    """Where each tensor of a file that we have begun lies in it, in bytes."""
    with named_errors(path), open_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    import torch

    specs = {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    yield safetensors_header(specs, metadata)[0]
    for name in _in_order(specs):
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors onto the CPU. Raises UserError naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with named_errors(path):
            open_file(path).close()  # the library says "not found" of whatever it cannot open
            tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}", fix=OLDER) from None
    return tensors


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file beyond `step`, a last line that a kill cut short, and lines that are none.

    A line in the middle that cannot be read is reported: the disk, or somebody else, wrote it.
    """
    with named_errors(path):
        data = path.read_bytes() if path.is_file() else b""
    kept = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # not splitlines: it parts at a carriage return too
        try:
            found = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            found = None
        if type(found) is not int:
            LOG.warning("%s, line %d is no record of a step; removed: %.80s", path, number, repr(line)[2:-1])
        elif found <= step:
            kept.append(line + b"\n")
    if b"".join(kept) != data:
        write_file(path, kept)
