"""Peak memory of a whole build at 100, 1,000 and 10,000 clips, each in a process of its own.

    python tests/benchmarks/bench_preprocess_memory.py [--most 10000]

Plan, fetch (files beside their JSON), captions, budget, writer, ledgers, text pass and counts are the real ones. One
clip is looked into and decoded; the others take its facts and a copy of its frames, since ten thousand times ffmpeg
would take an hour, in processes that are gone when memory is counted. The VAE takes no time; the text encoder is the
demonstration's. Promise: peak memory at the most clips ≤ 1.05 × that at 1,000 and grows less than 1 kB a clip from 100.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from engine_parts import FixedVae, copied_frames, engine_config, write_clips


def build(num_clips: int) -> None:
    """Build with so many clips; print this process's peak memory in kB."""
    from preprocess import pipeline
    from preprocess.encoders import encoders

    encoders.load_vae_encoder = lambda config: FixedVae(0.0)
    with tempfile.TemporaryDirectory() as folder, copied_frames():
        corpus = write_clips(Path(folder, "corpus"), num_clips, "320x192", 3.0, distinct=1)
        config = engine_config(corpus, Path(folder, "out"), (320, 192), 17, engine={"max_queue_mib": 64})
        counts = pipeline.build_shards(config, quiet=True)
    if counts["accepted"] != num_clips:
        sys.exit(f"{counts['accepted']} of {num_clips} accepted: {counts['rejected_by']}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Print the peaks beside the promise; exit 1 where it is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=10_000)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        build(asked.one)
        return
    peaks = {}
    for count in (100, 1000, asked.most):
        command = [sys.executable, __file__, "--one", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[count] = int(done.stdout.split()[-1])
        print(f"{count:>7,} clips: peak {peaks[count] / 1024:,.0f} MiB", flush=True)
    ratio = peaks[asked.most] / peaks[1000]
    each = (peaks[asked.most] - peaks[100]) * 1024 / (asked.most - 100)
    print(f"peak at {asked.most:,} ÷ at 1,000  {ratio:.3f}   promise ≤ 1.05")
    print(f"growth from 100, a clip    {each:,.0f} B   promise < 1,024")
    sys.exit(ratio > 1.05 or each >= 1024)


if __name__ == "__main__":
    main()
