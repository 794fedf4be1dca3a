"""How much of a build the encoder is at work, with an encoder of fixed time in place of a GPU and real decoding.

    python tests/benchmarks/bench_preprocess_engine.py [--clips 96] [--seconds 1.2]

720×480 clips at 29.97 are looked into, decoded (49 frames at 24) and scaled to 832×480 by two decoders; then encoded in
`--seconds` each, compressed, written; then their captions are embedded by the demonstration's small text encoder.
Promises: encoder-busy share of the latent pass ≥ 0.95; the whole build, plan and text and all, ≤ 1.05 × the encoder's
own time. The imports (torch, diffusers, transformers) are made before: they take seconds, of hours.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from engine_parts import FixedVae, engine_config, write_clips

from preprocess import pipeline
from preprocess.build.progress import PassProgress
from preprocess.encoders import encoders


def main() -> None:
    """Print the shares beside the promises; exit 1 where one is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=1.2, help="of the encoder, a clip")
    asked = parser.parse_args()
    vae = FixedVae(asked.seconds)
    encoders.load_text_encoder(config := encoders.EncodersConfig(device="cpu"), encoders.load_tokenizer(config))
    encoders.load_vae_encoder = lambda config: vae
    passes: dict[str, float] = {}
    unit, seen = PassProgress.unit, []

    def timed(progress: PassProgress, number: int) -> None:
        unit(progress, number)
        passes[progress.title] = progress.facts()["seconds"]
        seen.append(progress.facts())

    PassProgress.unit = timed
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_clips(Path(folder, "corpus"), asked.clips, "720x480", 6.0)
        prep = engine_config(corpus, Path(folder, "out"), (832, 480), 49)
        start = time.perf_counter()
        counts = pipeline.build_shards(prep, quiet=True)
        whole = time.perf_counter() - start
    if counts["accepted"] != asked.clips:
        sys.exit(f"{counts['accepted']} of {asked.clips} clips accepted: {counts['rejected_by']}")
    latents = passes["latents"]
    share, ratio = vae.busy_seconds / latents, whole / vae.busy_seconds
    print(f"{asked.clips} clips, encoder {asked.seconds:g} s each, {len(os.sched_getaffinity(0))} cores, 2 decoders")
    print(f"latent pass {latents:.1f} s, encoder at work {vae.busy_seconds:.1f} s, whole build {whole:.1f} s")
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(f"encoder-busy share           {share:.3f}   promise ≥ 0.95")
    print(f"whole build ÷ encoder's time {ratio:.3f}   promise ≤ 1.05")
    sys.exit(share < 0.95 or ratio > 1.05)


if __name__ == "__main__":
    main()
