"""Opening a dataset in commits alone (its tars are holes of the right size), each as a whole process.

    python tests/benchmarks/bench_shards_open.py              160,000 samples in 2,500 units
    python tests/benchmarks/bench_shards_open.py million      1,008,000 samples in 16,000 units

Promises with the index: 160,000 samples open, and are listed by `wanshards ls`, in under 2 s and 300 MB each; a
million samples, with a training run's order and its pin, in 14 s of CPU and 1.2 GB. From the commits alone a million
take at most 180 s of CPU.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from shards_scale import write_commits

OPEN = """
import sys
from shards.read.dataset import open_dataset
from train.data.sampler import START, Order
dataset = open_dataset(sys.argv[1])
order = Order(dataset.samples, seed=0, global_batch=16)
print(dataset.samples[-1].key, order.batch(START).ordinals[0], len(dataset.pin()["commits"]))
"""


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, CPU seconds and peak MB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def report(name: str, command: list[str], runs: int) -> None:
    """Print the medians of some runs."""
    found = [measure(command) for _ in range(runs)]
    seconds, cpu, memory = (sorted(column)[runs // 2] for column in zip(*found, strict=True))
    print(f"{name}: {seconds:.2f} s, {cpu:.2f} of CPU, {memory:.0f} MB", flush=True)


def main() -> None:
    """Print seconds and peak memory, with and without the index."""
    is_million = sys.argv[1:2] == ["million"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(folder) / "shards"
        if not root.exists():
            write_commits(root, *((16_000, 63) if is_million else ()))
        (root / "index.jsonl.zst").unlink(missing_ok=True)
        wanshards = str(Path(sys.executable).with_name("wanshards"))
        commands = {
            "open_dataset, order and pin": [sys.executable, "-c", OPEN, str(root)],
            "wanshards ls": [wanshards, "ls", str(root)],
        }
        for name, command in commands.items():
            report(f"{name} without index", command, 1)
        report("wanshards index", [wanshards, "index", str(root)], 1)
        print(f"a file of {(root / 'index.jsonl.zst').stat().st_size / 1e6:.1f} MB")
        for name, command in commands.items():
            report(f"{name} with index", command, 1 if is_million else 5)


if __name__ == "__main__":
    main()
