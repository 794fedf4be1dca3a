"""Our fetch of many small files over loopback HTTP against a bare loop over urllib3, with the same parallelism.

    python tests/benchmarks/bench_preprocess_fetch.py [--files 2000] [--kib 64] [--parallel 8]

The server is a process of its own. Both clients write each body to a file; ours has its list of hosts, limits,
watchdog, time-outs, length and content checks. Interleaved rounds, medians: wall clock, which the server
bounds too, and the client's CPU time, which is all its own. Promises: wall clock ≤ 1.25 × the bare loop's, and at
most 2 ms of CPU a file more; a clip takes a hundred times that to be looked into and decoded.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import urllib3

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.records import Record
from preprocess.fetch.fetcher import Fetcher

ROUNDS = 15
SERVER = """
import sys, time
from pathlib import Path
from preprocess.demo.server import served
with served(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def ours(records: list[Record], folder: Path, parallel: int) -> None:
    """As the decoders of a build do."""
    config = FetchConfig(allow_hosts=("127.0.0.1",), per_host=parallel)

    def one(record: Record) -> None:
        with fetcher.fetched(record):
            pass

    with (
        Fetcher(config, CorpusConfig(location="nowhere"), folder, threading.Event(), parallel) as fetcher,
        ThreadPoolExecutor(parallel) as pool,
    ):
        list(pool.map(one, records))


def bare(urls: list[str], folder: Path, parallel: int) -> None:
    """No check of anything."""
    with urllib3.PoolManager(maxsize=parallel) as manager, ThreadPoolExecutor(parallel) as pool:

        def one(numbered: tuple[int, str]) -> None:
            path = folder / str(numbered[0])
            response = manager.request("GET", numbered[1], preload_content=False)
            with path.open("wb") as file:
                for chunk in response.stream(1 << 18):
                    file.write(chunk)
            response.release_conn()
            path.unlink()

        list(pool.map(one, enumerate(urls)))


def timed(client: Callable[..., None], *arguments: object) -> tuple[float, float]:
    """Wall clock and CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    client(*arguments)
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """Print the ratios beside the promise; exit 1 where it is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--kib", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        media, scratch = Path(name, "media"), Path(name, "scratch")
        media.mkdir()
        scratch.mkdir()
        (media / "clip.mp4").write_bytes(os.urandom(asked.kib << 10))
        command = [sys.executable, "-c", SERVER, str(media)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            base = server.stdout.readline().strip()
            urls = [f"{base}clip.mp4?{number}" for number in range(asked.files)]
            records = [Record(clip_id="a", source="a.json", url=url) for url in urls]
            pairs = [
                (timed(ours, records, scratch, asked.parallel), timed(bare, urls, scratch, asked.parallel))
                for _ in range(ROUNDS)
            ]
            server.stdin.close()
    wall = median(mine[0] / other[0] for mine, other in pairs)
    cpu = median(mine[1] / other[1] for mine, other in pairs)
    more = 1000 * median(mine[1] - other[1] for mine, other in pairs) / asked.files
    each = median(mine[0] for mine, _ in pairs) / asked.files
    print(
        f"{asked.files:,} files of {asked.kib} KiB, {asked.parallel} at a time; load average {os.getloadavg()[0]:.1f}"
    )
    print(f"ours {1000 * each:.2f} ms a file, {asked.kib / 1024 / each:.0f} MiB/s")
    print(f"wall clock, ours ÷ bare   {wall:.2f}   promise ≤ 1.25")
    print(f"client's CPU, ours ÷ bare {cpu:.2f}")
    print(f"more CPU than bare        {more:.2f} ms a file   promise ≤ 2")
    sys.exit(wall > 1.25 or more > 2)


if __name__ == "__main__":
    main()
