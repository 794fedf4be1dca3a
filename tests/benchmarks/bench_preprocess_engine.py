"""How much of a build the encoder is at work, with an encoder of fixed time in place of a GPU and real decoding.

    python tests/benchmarks/bench_preprocess_engine.py [--clips 96] [--seconds 1.2]
    python tests/benchmarks/bench_preprocess_engine.py --tail [--clips 200]

720×480 clips at 29.97 are looked into, decoded (49 frames at 24) and scaled to 832×480 by two decoders; then encoded in
`--seconds` each, compressed, written; then their captions are embedded by the demonstration's small text encoder.
Promises: encoder-busy share of the latent pass ≥ 0.95; the whole build, plan and text and all, ≤ 1.05 × the encoder's
own time. The imports (torch, diffusers, transformers) are made before: they take seconds, of hours.

With `--tail` the clips come over HTTP from this machine, three times, each build in a process of its own: at once; 1 %
of them 100 times as late as the others; and with lognormal times. Promises: busy ≥ 0.95 each time; the same tars; and
a tail costs no more memory than the encoded clips that may wait, `engine.max_queue_mib`.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from engine_parts import TAILS, FixedVae, engine_config, served_after, write_clips

from preprocess import pipeline
from preprocess.build.progress import PassProgress
from preprocess.encoders import encoders

QUEUE_MIB = 512
URLS = "https://d111.cloudfront.net/proxy/"


def build(num_clips: int, seconds: float, folder: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """Build the clips of `folder` with an encoder of fixed time; the figures."""
    vae = FixedVae(seconds)
    encoders.load_text_encoder(config := encoders.EncodersConfig(device="cpu"), encoders.load_tokenizer(config))
    encoders.load_vae_encoder = lambda config: vae
    passes: dict[str, dict[str, Any]] = {}
    unit = PassProgress.unit

    def timed(progress: PassProgress, number: int) -> None:
        unit(progress, number)
        passes[progress.title] = progress.facts()

    PassProgress.unit = timed
    engine = {"decoders": 2, "max_queue_mib": QUEUE_MIB}
    prep = engine_config(folder / "corpus", folder / "out", (832, 480), 49, engine=engine, **sections)
    start = time.perf_counter()
    counts = pipeline.build_shards(prep, quiet=True)
    whole = time.perf_counter() - start
    if counts["accepted"] != num_clips:
        sys.exit(f"{counts['accepted']} of {num_clips} clips accepted: {counts['rejected_by']}")
    latents = passes["latents"]
    digest = hashlib.sha256()
    for tar in sorted((folder / "out").glob("**/*.tar")):
        digest.update(tar.name.encode() + tar.read_bytes())
    return {
        "seconds": latents["seconds"], "busy": vae.busy_seconds, "whole": whole, "tars": digest.hexdigest()[:16],
        "pools": latents["pools"], "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def build_with_tail(tail: str, num_clips: int, seconds: float) -> None:
    """One build in this process, its clips from a server whose answers have a tail; print the figures as JSON."""
    with tempfile.TemporaryDirectory() as name, served_after(Path(name, "cdn"), TAILS[tail]) as url:
        write_clips(Path(name, "corpus"), num_clips, "720x480", 6.0, cdn=Path(name, "cdn"))
        sections = {"fetch": {"mirrors": {URLS: url}, "allow_hosts": ["127.0.0.1"]}}
        print(json.dumps(build(num_clips, seconds, Path(name), sections)))


def compare_tails(num_clips: int, seconds: float) -> None:
    """Print the figures of each tail beside the promises; exit 1 where one is broken."""
    found = {}
    for tail in TAILS:
        command = [sys.executable, __file__, "--one", tail, "--clips", str(num_clips), "--seconds", str(seconds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[tail] = figures = json.loads(done.stdout.splitlines()[-1])
        share = figures["busy"] / figures["seconds"]
        print(
            f"{tail:<9} encoder busy {share:.3f} of {figures['seconds']:.1f} s (promise ≥ 0.95), peak "
            f"{figures['peak_mib']:,.0f} MiB, tars {figures['tars']}, pools {figures['pools']}",
            flush=True,
        )
    growth = max(each["peak_mib"] for each in found.values()) - found["none"]["peak_mib"]
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(f"memory that a tail costs {growth:,.0f} MiB   promise ≤ {QUEUE_MIB}")
    same = len({each["tars"] for each in found.values()}) == 1
    print(f"the same tars            {'yes' if same else 'NO'}   promise: yes")
    slow = any(each["busy"] < 0.95 * each["seconds"] for each in found.values())
    sys.exit(slow or growth > QUEUE_MIB or not same)


def main() -> None:
    """Print the shares beside the promises; exit 1 where one is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int)
    parser.add_argument("--seconds", type=float, default=1.2, help="of the encoder, a clip")
    parser.add_argument("--tail", action="store_true", help="clips over HTTP, some of them late")
    parser.add_argument("--one", choices=list(TAILS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        build_with_tail(asked.one, asked.clips, asked.seconds)
        return
    if asked.tail:
        compare_tails(asked.clips or 200, asked.seconds)
    num_clips = asked.clips or 96
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder, "corpus"), num_clips, "720x480", 6.0)
        found = build(num_clips, asked.seconds, Path(folder), {})
    share, ratio = found["busy"] / found["seconds"], found["whole"] / found["busy"]
    print(f"{num_clips} clips, encoder {asked.seconds:g} s each, {len(os.sched_getaffinity(0))} cores, 2 decoders")
    times = f"latent pass {found['seconds']:.1f} s, encoder at work {found['busy']:.1f} s"
    print(f"{times}, whole build {found['whole']:.1f} s")
    print(f"load average {os.getloadavg()[0]:.1f}; pools {found['pools']}")
    print(f"encoder-busy share           {share:.3f}   promise ≥ 0.95")
    print(f"whole build ÷ encoder's time {ratio:.3f}   promise ≤ 1.05")
    sys.exit(share < 0.95 or ratio > 1.05)


if __name__ == "__main__":
    main()
