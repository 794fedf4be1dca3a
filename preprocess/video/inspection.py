"""The inspector as its parent sees it: a child process under a deadline, asked about one file.

Two questions: everything that can be known of the file, and what the decoder complains about within one window.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

import preprocess
from preprocess.config import PrepConfig
from preprocess.facts import Inspection
from preprocess.rejection import ClipRejected, Rejection
from preprocess.video.ffmpeg import Result, first_line, run_killable

MAX_INSPECTION_BYTES = 16 << 20
ROOT = str(Path(preprocess.__file__).resolve().parents[1])
INSPECTOR = (
    "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "from preprocess.video.inspector import main; main(sys.argv[1:])"
)
"""Run with -P, so that a `preprocess.py` in the current folder is never taken for this package."""


def inspect_file(path: Path, config: PrepConfig) -> Inspection:
    """Run the inspector on `path` under the decode limits. Raises ClipRejected where it hangs, crashes or fails."""
    result = _run_inspector(path, config)
    if _failure(result) and not result.timed_out and result.returncode >= 0:
        # It answers for every file that it can read or not. Failing itself it says nothing of the file for good,
        # unless it does so again.
        first, result = result, _run_inspector(path, config)
        repeats = _failure(first) == _failure(result)
    else:
        repeats = False
    if result.timed_out:
        reject_clip("probe-timeout", f"no answer within {config.decode.timeout_seconds:g} s", retryable=True)
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        reject_clip("decoder-crashed", f"the inspector ended by {name}: {first_line(result.stderr)}")
    failure = _failure(result)
    if failure:
        reason = "too-large" if "MemoryError" in failure else "inspector-failed"
        reject_clip(reason, failure, retryable=reason != "too-large" and not repeats)
    return Inspection.model_validate_json(bytes(result.stdout))


def _run_inspector(path: Path, config: PrepConfig, *window: str) -> Result:
    limits = config.decode
    kind = "images" if config.sieve.images else "videos"
    pixels = str(int(limits.max_megapixels * 1_000_000))
    return run_killable(
        [sys.executable, "-P", "-c", INSPECTOR, ROOT, str(path), pixels, str(limits.max_memory_mib), kind, *window],
        timeout_seconds=limits.timeout_seconds,
        max_stdout_bytes=MAX_INSPECTION_BYTES,
        environment=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )


def _failure(result: Result) -> str:
    """Why the inspector gave no answer that can be read; empty: it gave one."""
    if result.overflowed or result.returncode:
        lines = result.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {result.returncode}"
    try:
        Inspection.model_validate_json(bytes(result.stdout))
    except ValidationError as error:
        return f"its answer is not readable: {error.error_count()} errors"
    return ""


def complaints_within(path: Path, config: PrepConfig, first_seconds: float, last_seconds: float) -> list[str] | None:
    """What the decoder reports of the pictures between two times of the file's own clock; None: it cannot be told."""
    result = _run_inspector(path, config, f"{first_seconds:.6f}", f"{last_seconds:.6f}")
    if result.timed_out or result.overflowed or result.returncode:
        return None
    found: list[str] = json.loads(bytes(result.stdout))
    return found


def reject_clip(reason: str, detail: str, retryable: bool = False) -> NoReturn:
    """Raise ClipRejected of stage `probe`."""
    raise ClipRejected(Rejection("probe", reason, detail[:300], retryable))
