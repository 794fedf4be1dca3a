"""The report's page and the memory it takes over a dataset of the archive's size, with preview strips of 20 kB.

Promise: under 20 MB for 160,000 samples. A few tars are linked under many units' names, their samples under keys of
their own. `--samples N` changes the number.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from shards_data import PREVIEW
from stats_data import write_latents

from shards.format.commit import Blob, Commit, SampleInfo, commit_bytes, read_commit
from shards.format.dataset_info import read_info, write_info
from shards.format.names import LATENTS, commit_name, tar_name
from shards.report.report import write_dataset_report
from shards.storage import open_storage

SAMPLES_PER_UNIT, WRITTEN_UNITS = 64, 4
SHAPE = (48, 13, 6, 10)
"""Small latents: the page does not show them, and the statistics read 2,000 of them."""


def write(root: Path, num_units: int) -> None:
    """`num_units` units over WRITTEN_UNITS tars, written as files: a build's syncs are not what is measured."""
    with tempfile.TemporaryDirectory() as scratch:
        write_latents(
            root, WRITTEN_UNITS, samples=SAMPLES_PER_UNIT, shape=SHAPE, scratch=Path(scratch),
            preview=PREVIEW + bytes(20_000),
        )  # fmt: skip
    storage = open_storage(root)
    written = [read_commit(storage, LATENTS, unit).commit for unit in range(WRITTEN_UNITS)]
    for unit in range(WRITTEN_UNITS, num_units):
        commit = _linked(written[unit % WRITTEN_UNITS], unit)
        os.link(root / written[unit % WRITTEN_UNITS].tar.name, root / commit.tar.name)
        (root / commit_name(LATENTS, unit)).write_bytes(commit_bytes(commit))
    info = read_info(storage)
    count = num_units * SAMPLES_PER_UNIT
    grown = info.generations[0].model_copy(
        update={"num_units": num_units, "num_candidates": count, "num_records": count}
    )
    (root / "dataset.json").unlink()
    write_info(storage, info.model_copy(update={"generations": (grown,)}))


def _linked(commit: Commit, unit: int) -> Commit:
    sha256 = f"{unit:064x}"[::-1]
    tar = Blob(name=tar_name(LATENTS, unit, sha256), size=commit.tar.size, sha256=sha256)
    samples = tuple(_renamed(sample, f"u{unit}-") for sample in commit.samples)
    return commit.model_copy(update={"unit": unit, "tar": tar, "ledger": None, "samples": samples})


def _renamed(sample: SampleInfo, prefix: str) -> SampleInfo:
    summary = sample.summary.model_copy(update={"clip": prefix + sample.summary.clip})
    return sample.model_copy(update={"key": prefix + sample.key, "summary": summary})


def main() -> int:
    """Print the page's size, what it holds, seconds and memory; 1 where the page is too large."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=160_000)
    num_units = -(-parser.parse_args().samples // SAMPLES_PER_UNIT)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        write(root, num_units)
        start = time.process_time()
        made = write_dataset_report(str(root), Path(folder) / "report.html", cache=Path(folder) / "cache")
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shown = f"{made['samples']:,} of {made['of_samples']:,} samples, {made['samples_with_pictures']:,} with pictures"
    print(f"page: {made['bytes'] / 1e6:.1f} MB (promise < 20), {shown}; {seconds:.0f} CPU s, peak {peak:.0f} MiB")
    return int(made["bytes"] >= 20e6)


if __name__ == "__main__":
    sys.exit(main())
