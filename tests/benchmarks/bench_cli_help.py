"""Seconds of `--help` for each command line, as a whole process. Promise: under 0.5."""

import subprocess
import sys
import time
from pathlib import Path

RUNS = 9


def main() -> int:
    """Print the fastest, middle and slowest of nine runs of each tool; 1 where a middle one breaks the promise."""
    slow = False
    for tool in ("wanprep", "wantrain", "wanshards"):
        command = [Path(sys.executable).parent / tool, "--help"]
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        seconds.sort()
        print(f"{tool} --help: {seconds[0]:.3f} / {seconds[RUNS // 2]:.3f} / {seconds[-1]:.3f} s (promise < 0.5)")
        slow |= seconds[RUNS // 2] >= 0.5
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
