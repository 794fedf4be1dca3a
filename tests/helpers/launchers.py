"""Launchers as processes of their own (`launch_ranks.py`), and what a test asks of them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def start_launcher(*arguments: object) -> subprocess.Popen[str]:
    """`launch_ranks.py` with these arguments."""
    command = [sys.executable, str(Path(__file__).with_name("launch_ranks.py")), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def end(launcher: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Its exit code, and what it and rank 0 said. A launcher that is killed takes its ranks with it."""
    with launcher:
        try:
            _, said = launcher.communicate(timeout=seconds)
        finally:
            launcher.kill()
    return launcher.returncode, said


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids(folder: Path, what: str = "pid") -> list[int]:
    """Of all ranks that have said theirs."""
    return [int(path.read_text()) for path in folder.glob(f"{what}-*") if path.read_text()]
