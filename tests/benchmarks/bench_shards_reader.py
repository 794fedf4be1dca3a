"""Samples a second of the reader, as a ratio to a bare loop of `readinto` and zstd over the same bytes, warm.

Promises: one process at least 0.85 × the bare loop, which checks zstd's checksum too and nothing else, in CPU seconds;
two processes at least 1.7 × one. By the clock that needs two idle cores: where the machine has other work at the
start, the CPU seconds of both decide, which that does not hide. Runs alternate; the median counts. The exit code is 1
where a promise is broken. Also: bytes a sample against raw float16 and padded text.
"""

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import numpy as np
import zstandard
from shards_data import IDENTITY, PROVENANCE, TEXT_IDENTITY

from shards.format.arrays import array_facts, encode_array
from shards.format.commit import read_commit
from shards.format.dataset_info import DatasetInfo, Generation, TextSetInfo, write_info
from shards.format.keys import sample_key
from shards.format.sealed_json import canonical_json
from shards.read.dataset import Dataset, open_dataset
from shards.storage import open_storage
from shards.write.shard_writer import ShardWriter

RUNS = 9
UNITS, SAMPLES = 2, 32
SHAPE = (48, 13, 44, 80)
TOKENS, DIM = 120, 4096


def write(root: Path) -> None:
    """Units of 1280×704×49 latents, N(0, 1) in float16, and embeddings of 120 tokens in bfloat16."""
    storage, rng = open_storage(root), np.random.default_rng(0)
    (root / "scratch").mkdir(parents=True, exist_ok=True)
    for unit in range(UNITS):
        with (
            ShardWriter(storage, "latents", unit, IDENTITY, root / "scratch", PROVENANCE) as latents,
            ShardWriter(storage, "text/default", unit, TEXT_IDENTITY, root / "scratch", PROVENANCE) as texts,
        ):
            for place in range(SAMPLES):
                write_sample(latents, texts, f"clip-{unit}-{place}", rng)
            latents.seal([])
            texts.seal()
    (root / "plan").mkdir()
    generation = Generation(
        name="gen-000", plan_sha256="0" * 64, first_unit=0, num_units=UNITS, num_candidates=0, num_records=0
    )
    text_sets = {"default": TextSetInfo(identity=TEXT_IDENTITY)}
    write_info(storage, DatasetInfo(identity=IDENTITY, text_sets=text_sets, generations=(generation,)))


def write_sample(latents: ShardWriter, texts: ShardWriter, clip: str, rng: np.random.Generator) -> None:
    """One sample of both kinds."""
    latent = rng.standard_normal(SHAPE, np.float32).astype(np.float16)
    text = (rng.standard_normal((TOKENS, DIM), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    key = sample_key(clip, 0, 49, 704, 1280)
    summary = {"clip": clip, "start_ms": 0, "frames": 49, "height": 704, "width": 1280}
    meta = canonical_json({"clip": clip, "latent": array_facts(latent)})
    members = {"json": meta, "latent.npy.zst": encode_array(latent)}
    latents.add(key, members, {**summary, "source_media": "video", "category": None})
    members = {"json": canonical_json({"text": [array_facts(text)]}), "text.npy.zst": encode_array(text)}
    texts.add(key, members, {"variants": 1, "tokens": [TOKENS]})


def bare_loop(root: Path) -> Callable[[], None]:
    """`readinto` of every array into one buffer, zstd with its checksum, nothing else."""
    storage, places = open_storage(root), []
    for kind in ("latents", "text/default"):
        for unit in range(UNITS):
            commit = read_commit(storage, kind, unit).commit
            file = (root / commit.tar.name).open("rb", buffering=0)
            places += [(file, item.offset, item.size) for sample in commit.samples for item in sample.arrays()]
    buffer = memoryview(bytearray(max(size for _, _, size in places)))

    def loop() -> None:
        decompressor = zstandard.ZstdDecompressor()
        for file, offset, size in places:
            file.seek(offset)
            file.readinto(buffer[:size])
            decompressor.decompress(buffer[:size])

    return loop


def read_all(dataset: Dataset, part: int = 0, parts: int = 1) -> None:
    """Every sample's latent and text."""
    for place in range(part, len(dataset), parts):
        dataset.latent(place)
        dataset.text(place)


def worker(dataset: Dataset, part: int, parts: int, barrier: object) -> None:
    """A process that reads its share, three times over, between two barriers."""
    read_all(dataset, part, parts)
    barrier.wait()
    for _ in range(3):
        read_all(dataset, part, parts)
    barrier.wait()


def processes_seconds(dataset: Dataset, parts: int) -> tuple[float, float]:
    """Seconds, by the clock and of CPU, in which `parts` processes read the whole dataset three times, shared out."""
    before = children_cpu_seconds()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(parts + 1)
    workers = [context.Process(target=worker, args=(dataset, part, parts, barrier)) for part in range(parts)]
    for process in workers:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for process in workers:
        process.join()
    return seconds, children_cpu_seconds() - before


def children_cpu_seconds() -> float:
    """CPU seconds of all processes that were joined."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(work: Callable[[], None]) -> float:
    """CPU seconds of one call: one thread does all, and other work on the machine counts little."""
    start = time.process_time()
    work()
    return time.process_time() - start


def print_sizes(root: Path) -> None:
    """Stored bytes a sample against what they hold."""
    kinds = {"latent": "latents", "text": "text/default"}
    bytes_of = {
        name: read_commit(open_storage(root), kind, 0).commit.tar.size / SAMPLES for name, kind in kinds.items()
    }
    raw, padded = int(np.prod(SHAPE)) * 2, 512 * DIM * 2
    print(f"latent {bytes_of['latent']:,.0f} bytes a sample, raw float16 {raw:,}: {bytes_of['latent'] / raw:.3f} ×")
    print(
        f"text {bytes_of['text']:,.0f} bytes a sample of {TOKENS} tokens, padded to 512 {padded:,}: "
        f"{bytes_of['text'] / padded:.3f} ×"
    )


def main() -> int:
    """Print the ratios; 1 where a promise is broken."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        write(root)
        dataset = open_dataset(root)
        print_sizes(root)
        bare = bare_loop(root)
        bare()
        read_all(dataset)
        seconds = [(timed(bare), timed(lambda: read_all(dataset))) for _ in range(RUNS)]
        of_loop = statistics.median(loop / reader for loop, reader in seconds)
        speed = len(dataset) / statistics.median(reader for _, reader in seconds)
        print(f"reader / bare loop: {of_loop:.2f} × (promise ≥ 0.85), {speed:.0f} samples a CPU second")
        pairs = [(processes_seconds(dataset, 1), processes_seconds(dataset, 2)) for _ in range(5)]
        by_clock = statistics.median(one[0] / two[0] for one, two in pairs)
        of_cpu = statistics.median(2 * one[1] / two[1] for one, two in pairs)
        name, ratio = ("the clock", by_clock) if cores - load >= 1.5 else ("CPU seconds", of_cpu)
        where = f"{cores} cores, load {load:.1f} at the start"
        print(
            f"two processes / one: {by_clock:.2f} × by the clock, {of_cpu:.2f} × by CPU seconds "
            f"(promise ≥ 1.7 by {name}: {where})"
        )
    return int(of_loop < 0.85 or ratio < 1.7)


if __name__ == "__main__":
    sys.exit(main())
