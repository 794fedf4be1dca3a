"""Bytes a second of `verify`, as a ratio to `sha256sum` over the same files, warm. Promise: at least 0.8.

CPU seconds of one thread, so that other work on the machine counts little; the median of alternating runs.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_shards_reader import write

from shards.check.verify import verify
from shards.storage import open_storage

RUNS = 7


def cpu_seconds(work: Callable[[], object]) -> float:
    """User and system seconds of this process and of the children collected during `work`."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    work()
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))


def main() -> int:
    """Print the ratio; 1 where it breaks the promise."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root)
        tars = sorted(root.rglob("*.tar"))
        size = sum(path.stat().st_size for path in tars)
        pairs = []
        for _ in range(RUNS):
            plain = cpu_seconds(lambda: subprocess.run(["sha256sum", *tars], check=True, capture_output=True))
            pairs.append((plain, cpu_seconds(lambda: verify(open_storage(root), "hash", partial=True))))
        ratio = statistics.median(plain / ours for plain, ours in pairs)
        ours = statistics.median(ours for _, ours in pairs)
        print(f"verify / sha256sum: {ratio:.2f} × (promise ≥ 0.8), {size / ours / 1e6:,.0f} MB a CPU second")
    return int(ratio < 0.8)


if __name__ == "__main__":
    sys.exit(main())
