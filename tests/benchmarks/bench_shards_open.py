"""Opening a dataset of 160,000 samples in 2,500 units, and `wanshards ls` on it, each as a whole process.

Promises, with the index: under 2 s and 300 MB each. Without it the commits are read: what that costs is printed too.
The dataset is made of commits alone, with tars that are holes of the right size.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from shards_scale import write_commits

RUNS = 5
OPEN = "import sys; from shards.read.dataset import open_dataset as read; print(read(sys.argv[1]).samples[-1].key)"


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, CPU seconds and peak MB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Print seconds and peak memory, with and without the index."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        write_commits(root)
        wanshards = str(Path(sys.executable).with_name("wanshards"))
        commands = {
            "open_dataset": [sys.executable, "-c", OPEN, str(root)],
            "wanshards ls": [wanshards, "ls", str(root)],
        }
        for name, command in commands.items():
            seconds, cpu, memory = measure(command)
            print(f"{name} without index: {seconds:.2f} s, {cpu:.2f} of CPU, {memory:.0f} MB")
        seconds, cpu, memory = measure([wanshards, "index", str(root)])
        size = (root / "index.jsonl.zst").stat().st_size / 1e6
        print(f"wanshards index: {seconds:.2f} s, {cpu:.2f} of CPU, {memory:.0f} MB, a file of {size:.1f} MB")
        for name, command in commands.items():
            runs = [measure(command) for _ in range(RUNS)]
            seconds, cpu, memory = (sorted(column)[RUNS // 2] for column in zip(*runs, strict=True))
            print(
                f"{name} with index: {seconds:.2f} s (promise < 2), {cpu:.2f} of CPU, {memory:.0f} MB (promise < 300)"
            )


if __name__ == "__main__":
    main()
