"""Opening a dataset in commits alone (its tars are holes of the right size), each as a whole process.

    python tests/benchmarks/bench_shards_open.py              160,000 samples in 2,500 units
    python tests/benchmarks/bench_shards_open.py million      1,008,000 samples in 16,000 units

Promises with the index: 160,000 samples open, and are listed by `wanshards ls`, in under 2 s and 300 MB each; a
million samples, with a training run's order and its pin, in 14 s of CPU and 1.2 GB. From the commits alone a million
take at most 180 s of CPU. The exit code is 1 where one that is printed is broken.
"""

import os
import subprocess
import sys
import tempfile
import time
from math import inf
from pathlib import Path
from typing import NamedTuple

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


class Cost(NamedTuple):
    """What one process took, or may take."""

    seconds: float = inf
    """By the clock."""
    cpu: float = inf
    """CPU seconds."""
    memory: float = inf
    """Peak, MB."""


OPENED, LISTED = "open_dataset, order and pin", "wanshards ls"
PROMISES = {
    False: {f"{OPENED} with index": Cost(2, inf, 300), f"{LISTED} with index": Cost(2, inf, 300)},
    True: {f"{OPENED} with index": Cost(inf, 14, 1200), f"{OPENED} without index": Cost(inf, 180, inf)},
}
"""The most by what is measured, of 160,000 samples and of a million."""


def measure(command: list[str]) -> Cost:
    """What one process takes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return Cost(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def report(name: str, command: list[str], runs: int, most: Cost) -> bool:
    """Print the medians of some runs beside what is promised; whether that is broken."""
    found = [measure(command) for _ in range(runs)]
    cost = Cost(*(sorted(column)[runs // 2] for column in zip(*found, strict=True)))
    broken = any(value > limit for value, limit in zip(cost, most, strict=True))
    units = {"s": most.seconds, "s of CPU": most.cpu, "MB": most.memory}
    promised = ", ".join(f"{limit:g} {unit}" for unit, limit in units.items() if limit < inf)
    words = f" (promise ≤ {promised})" * bool(promised) + "  BROKEN" * broken
    print(f"{name}: {cost.seconds:.2f} s, {cost.cpu:.2f} of CPU, {cost.memory:.0f} MB{words}", flush=True)
    return broken


def main() -> int:
    """Print seconds and peak memory, with and without the index; 1 where a promise is broken."""
    broken = False
    is_million = sys.argv[1:2] == ["million"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(folder) / "shards"
        if not root.exists():
            write_commits(root, *((16_000, 63) if is_million else ()))
        (root / "index.jsonl.zst").unlink(missing_ok=True)
        wanshards = str(Path(sys.executable).with_name("wanshards"))
        commands = {
            OPENED: [sys.executable, "-c", OPEN, str(root)],
            LISTED: [wanshards, "ls", str(root)],
        }
        most = PROMISES[is_million]
        for name, command in commands.items():
            broken |= report(f"{name} without index", command, 1, most.get(f"{name} without index", Cost()))
        report("wanshards index", [wanshards, "index", str(root)], 1, Cost())
        print(f"a file of {(root / 'index.jsonl.zst').stat().st_size / 1e6:.1f} MB")
        for name, command in commands.items():
            runs = 1 if is_million else 5
            broken |= report(f"{name} with index", command, runs, most.get(f"{name} with index", Cost()))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
