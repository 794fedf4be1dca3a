"""`stats` against reading and decompressing the same latents, and its memory over ten times the samples.

Promise: at most 1.3 × the CPU seconds of the bare loop (read a frame, undo zstd, check its checksum), over 10,000
samples of 832×480×49; at most 2 KiB of memory for each sample beyond a tenth of them. The clock is printed beside it. A
few tars are written and linked under many units' names, each with a commit and a digest of its own, so that nothing is
found in the cache. `--samples N` changes the number.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from peak import PEAK_KIB
from stats_data import write_latents

from shards.format.arrays import decode_array
from shards.format.commit import Blob, commit_bytes, committed_units, read_commit
from shards.format.dataset_info import read_info, write_info
from shards.format.names import LATENT_MEMBER, LATENTS, commit_name, tar_name
from shards.storage import open_storage

SAMPLES_PER_UNIT, WRITTEN_UNITS = 64, 4
SHAPE = (48, 13, 30, 52)


def write(root: Path, num_units: int) -> None:
    """`num_units` units over WRITTEN_UNITS tars."""
    with tempfile.TemporaryDirectory() as scratch:
        write_latents(root, WRITTEN_UNITS, samples=SAMPLES_PER_UNIT, shape=SHAPE, scratch=Path(scratch))
    link_units(root, num_units)


def link_units(root: Path, num_units: int) -> None:
    """Bring the root to `num_units` units: links to tars that are there, with commits and digests of their own."""
    storage = open_storage(root)
    for unit in range(len(committed_units(storage, LATENTS)), num_units):
        commit = read_commit(storage, LATENTS, unit % WRITTEN_UNITS).commit
        sha256 = hashlib.sha256(str(unit).encode()).hexdigest()
        tar = Blob(name=tar_name(LATENTS, unit, sha256), size=commit.tar.size, sha256=sha256)
        os.link(root / commit.tar.name, root / tar.name)
        linked = commit.model_copy(update={"unit": unit, "tar": tar, "ledger": None})
        storage.put(commit_name(LATENTS, unit), commit_bytes(linked))
    info = read_info(storage)
    grown = info.generations[0].model_copy(update={"num_units": num_units})
    (root / "dataset.json").unlink()
    write_info(storage, info.model_copy(update={"generations": (grown,)}))


def read_bare(root: Path, num_units: int) -> None:
    """Read and decompress every latent, and nothing else."""
    storage, buffer = open_storage(root), bytearray(2**23)
    for unit in range(num_units):
        commit = read_commit(storage, LATENTS, unit).commit
        for sample in commit.samples:
            member = sample.member(LATENT_MEMBER)
            view = memoryview(buffer)[: member.size]
            storage.read_into(commit.tar.name, member.offset, view)
            decode_array(view, shape=member.shape, dtype=member.dtype)


def bare_seconds(root: Path, num_units: int) -> tuple[float, float]:
    """CPU seconds and seconds by the clock of the bare loop."""
    cpu, clock = time.process_time(), time.perf_counter()
    read_bare(root, num_units)
    return time.process_time() - cpu, time.perf_counter() - clock


def stats_cost(root: Path) -> tuple[float, float, float]:
    """CPU seconds, clock and peak memory, in MiB, of a process that takes statistics; imports are not counted."""
    code = (
        "from shards.stats.stats import dataset_stats; import time;"
        "cpu, clock = time.process_time(), time.perf_counter();"
        f"dataset_stats({str(root)!r}); print(time.process_time() - cpu, time.perf_counter() - clock,"
        f"{PEAK_KIB} / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cpu, clock, mib = map(float, done.stdout.split())
    return cpu, clock, mib


def main() -> int:
    """Print ratio and memory; 1 where a promise is broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    num_units = -(-arguments.samples // SAMPLES_PER_UNIT)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write(small, max(WRITTEN_UNITS, num_units // 10))
        shutil.copytree(small, large, copy_function=os.link)
        link_units(large, num_units)
        pairs, peak = [], 0.0
        for _ in range(arguments.runs):
            bare, bare_clock = bare_seconds(large, num_units)
            ours, clock, peak = stats_cost(large)
            pairs.append((bare, ours, bare_clock, clock))
        ratio = statistics.median(ours / bare for bare, ours, _, _ in pairs)
        by_clock = statistics.median(ours / bare for _, _, bare, ours in pairs)
        each = ", ".join(f"{ours:.1f} / {bare:.1f} s" for bare, ours, _, _ in pairs)
        num = num_units * SAMPLES_PER_UNIT
        words = f"{ratio:.2f} × (promise ≤ 1.3), {num:,} samples, CPU {each}; {by_clock:.2f} × by the clock"
        print(f"stats / reading and decompressing: {words}", flush=True)
        _, _, few = stats_cost(small)
        more = (peak - few) * 1024 / (num - max(WRITTEN_UNITS, num_units // 10) * SAMPLES_PER_UNIT)
        words = f"{few:.0f} MiB at a tenth, {peak:.0f} MiB at {num:,} samples"
        print(f"peak memory: {words}, {more:.2f} KiB a sample more (promise ≤ 2)")
    return int(ratio > 1.3 or more > 2)


if __name__ == "__main__":
    sys.exit(main())
