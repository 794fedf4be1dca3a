"""How long a build that is started again takes to go on, over 1,000 finished units.

    python tests/benchmarks/bench_preprocess_restart.py [--units 1000]

The units are real ones (plan, commits, ledgers, text shards) of one clip each; one clip is looked into and decoded,
the others take its facts and frames. Then 10 units are taken away, and the build is started in a process of its own.
Promise: from the call to the first clip of a unit that is not there < 2 s; over nothing but finished units, from the
call to its end < 2 s. The imports (torch, diffusers, transformers) are made before, and the encoder is one that takes
no time to load.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from engine_parts import FixedVae, copied_frames, engine_config, write_clips

NUM_LOST = 10


def build(folder: Path) -> None:
    """Build what is not there; print the seconds to the first clip, and to the end."""
    from preprocess import pipeline
    from preprocess.build import clip as parts
    from preprocess.encoders import encoders

    encoders.load_text_encoder(config := encoders.EncodersConfig(device="cpu"), encoders.load_tokenizer(config))
    encoders.load_vae_encoder = lambda config: FixedVae(0.0)
    fetch, first = parts.Preparer.fetch, []

    def timed(preparer, candidate):
        first.append(time.perf_counter())
        return fetch(preparer, candidate)

    parts.Preparer.fetch = timed
    config = engine_config(folder / "corpus", folder / "out", (320, 192), 17, shards={"unit_size": 1})
    with copied_frames():
        start = time.perf_counter()
        pipeline.build_shards(config, quiet=True)
        end = time.perf_counter()
    print((first[0] if first else end) - start, end - start)


def main() -> None:
    """Print the seconds beside the promise; exit 1 where it is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        build(asked.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder, "corpus"), asked.units, "320x192", 3.0, distinct=1)

        def run() -> list[float]:
            command = [sys.executable, __file__, "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return [float(word) for word in done.stdout.split()[-2:]]

        print(f"built {asked.units:,} units in {run()[1]:.1f} s")
        nothing = min(run()[1] for _ in range(3))
        for unit in range(0, asked.units, asked.units // NUM_LOST):
            Path(folder, f"out/latents/shard-{unit:06d}.json").unlink()
        on = run()[0]
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(f"all units there, to the end         {nothing:.2f} s   promise < 2")
    print(f"{NUM_LOST} units missing, to the first clip  {on:.2f} s   promise < 2")
    sys.exit(max(nothing, on) >= 2)


if __name__ == "__main__":
    main()
