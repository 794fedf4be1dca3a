"""`events.jsonl`: what happened to a run, one JSON object a line, for programs. Importing this imports no torch.

Every line has `time` (local, ISO 8601 with its offset), `event`, and `step` (batches consumed by then). Beside them:

    start       base, parameters, trained, revision, processes
    resume      the same, and checkpoint (path of the one that is resumed from)
    device      name, precision, reason (why this precision), available_gib (the least on any GPU; null on a CPU)
    plan        bucket (the largest), tflop (a step and process), gib (planned peak; null where it is not known)
    checkpoint  path
    waiting     what (is waited for), since (when that began)
    stop        reason (done, patience, signal or error), signal (its number or null), error (text or null),
                export (path or null)

Lines are only ever added, also by a resume: the file is the history of the run's folder.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, Literal

EVENTS_FILE = "events.jsonl"
EventName = Literal["start", "resume", "device", "plan", "checkpoint", "waiting", "stop"]


def write_event(folder: Path, event: EventName, step: int, **values: Any) -> None:
    """Add one line, in one write. What a kill left of an unfinished line is removed first."""
    line = {"time": time_now(), "event": event, "step": step, **values}
    with (folder / EVENTS_FILE).open("ab+") as file:
        file.seek(0)
        written = file.read()
        if not written.endswith(b"\n"):
            file.truncate(written.rfind(b"\n") + 1)
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def time_now() -> str:
    """Local time with its offset, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
