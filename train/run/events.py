"""`events.jsonl`: what happened to a run, one JSON object a line, for programs. Importing this imports no torch.

Every line has `time` (local, ISO 8601 with its offset), `event`, and `step` (batches consumed by then). Beside them:

    start       base, parameters, trained, revision, processes
    resume      the same, and checkpoint (path of the one that is resumed from)
    device      name, precision, reason (why this precision), available_gib (the least on any GPU; null on a CPU)
    plan        bucket (the largest), tflop (a step and process), gib (planned peak; null where it is not known)
    checkpoint  path
    waiting     what (is waited for: an operation and its address), reason (the last failure), seconds (since it began),
                is_over; once when it begins to be long, once a minute, and at its end
    stop        reason (done, patience, signal or error), signal (its number or null), error (text or null),
                export (path or null)

Lines are only ever added, also by a resume: the file is the history of the run's folder.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Any, Literal

from shards.errors import UserError
from shards.files.write_file import named_errors, no_pipe, open_file

EVENTS_FILE = "events.jsonl"
_BLOCK_BYTES = 65_536
_LOCK = threading.Lock()
"""Waits for storage are reported by the threads that wait."""
EventName = Literal["start", "resume", "device", "plan", "checkpoint", "waiting", "stop"]


def write_event(folder: Path, event: EventName, step: int, **values: Any) -> None:
    """Add one line, in one write. What a kill left of an unfinished line is removed first."""
    time = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    line = {"time": time, "event": event, "step": step, **values}
    path = folder / EVENTS_FILE
    with _LOCK, named_errors(path), open(path, "ab+", opener=no_pipe) as file:
        _end_with_a_line(file)
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _end_with_a_line(file: BufferedRandom) -> None:
    """Cut off what follows the last line's end; only the file's end is read."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        end = start + file.read(end - start).rfind(b"\n") + 1
        if end > start:
            break
    if end < size:
        file.truncate(end)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each complete line of a JSON-lines file.

    Raises UserError for a line that is no object, unless it is the last one and has no end yet.
    """
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # being written, or cut short by a kill
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: {error}", expected="a JSON object a line") from None
                if not isinstance(values, dict):
                    raise UserError(f"{path}, line {number}: {type(values).__name__}", expected="a JSON object a line")
                yield number, values
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
