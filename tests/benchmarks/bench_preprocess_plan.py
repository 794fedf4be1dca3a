"""Scan and plan of an annotation tree against a bare loop of read and parse over the same files.

Promise: each at most 1.5 × the bare loop on two cores at the corpus's number of files, 455,648 of 3 KB, and at most
1 GB resident. `--full` takes so many; without it the seconds at 15,000 and at 60,000 files are continued to that number
in a straight line: starting the worker processes (about a second) weighs little there.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FULL, SMALL = 455_648, 60_000
ROUNDS = 2
PROMISED_RATIO, PROMISED_MIB = 1.5, 1024
SYLLABLES = (
    "가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후"
)


def main() -> int:
    """Generate the files, warm the cache, run the three in turn, print the best of each and the ratios; 1 where the
    promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} files instead of {SMALL:,}")
    parser.add_argument("--run", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(*options.run)
        return 0
    numbers = [FULL] if options.full else [SMALL // 4, SMALL]
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        for number in numbers:
            start = time.perf_counter()
            num_bytes = generate(Path(folder, str(number)), number)
            print(f"{number:,} files of {num_bytes / number:,.0f} bytes in {time.perf_counter() - start:.0f} s")
        return int(not measure(folder, numbers))


def measure(folder: str, numbers: list[int]) -> bool:
    """Run bare, scan and plan in turn, so that all meet the same machine; print the least of each, and return whether
    the promise is kept."""
    found = {(number, what): [] for number in numbers for what in ("bare", "scan", "plan")}
    for number in numbers:
        run_apart("bare", f"{folder}/{number}")
    for _ in range(ROUNDS):
        for (number, what), runs in found.items():
            runs.append(run_apart(what, f"{folder}/{number}"))
    best = {key: min(run["seconds"] for run in runs) for key, runs in found.items()}
    for (number, what), runs in found.items():
        cpu, seconds = min(run["cpu_seconds"] for run in runs), best[number, what]
        print(f"{number:,} files, {what:5} {seconds:7.2f} s  {seconds / number * 1e6:6.1f} µs a file  {cpu:7.2f} CPU-s")
    kept, most = True, numbers[-1]
    for what in ("bare", "scan", "plan"):
        seconds = best[most, what]
        if most < FULL:
            seconds += (FULL - most) * (seconds - best[numbers[0], what]) / (most - numbers[0])
            best[FULL, what] = seconds
        ratio, mib = seconds / best[FULL, "bare"], max(run["mib"] for run in found[most, what])
        kept &= ratio <= PROMISED_RATIO and mib <= PROMISED_MIB
        print(f"{FULL:,} files, {what:5} {seconds:6.1f} s  {ratio:5.2f} × bare; {mib:.0f} MiB at {most:,}")
    print(f"promise: at most {PROMISED_RATIO} × and {PROMISED_MIB} MiB: {'kept' if kept else 'NOT KEPT'}")
    return kept


def run_apart(what: str, folder: str) -> dict[str, float]:
    """One run in a process of its own, for its time without imports, and its memory."""
    command = [sys.executable, __file__, "--run", what, folder]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600).stdout
    return json.loads(output.splitlines()[-1])


def run_here(what: str, folder: str) -> None:
    """Time one of the three, and print it."""
    from preprocess.config import CorpusConfig, PrepConfig

    # In memory, for a target that costs nothing: what is measured is reading and deciding.
    with tempfile.TemporaryDirectory(prefix="bench-plan-out-") as out:
        config = PrepConfig(output=out, corpus=CorpusConfig(location=folder))
        work = {"bare": bare, "scan": scan, "plan": plan}[what]
        start = time.perf_counter()
        work(config)
        seconds = time.perf_counter() - start
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    # The largest child, once a worker: an upper bound of what is resident together.
    kib = own.ru_maxrss + children.ru_maxrss * (len(os.sched_getaffinity(0)) if children.ru_maxrss else 0)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    print(json.dumps({"seconds": seconds, "mib": kib / 1024, "cpu_seconds": cpu}))


def bare(config) -> None:
    """Read and parse every file, keep nothing."""
    for folder, _, names in os.walk(config.corpus.location):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:  # noqa: PTH118, PTH123
                json.loads(file.read())


def scan(config) -> None:
    """`wanprep scan`, tokens not counted."""
    from preprocess.plan.scan import scan_corpus

    scan_corpus(config)


def plan(config) -> None:
    """`wanprep plan`."""
    from preprocess.plan.freeze import freeze_plan
    from shards.storage import open_storage

    freeze_plan(open_storage(config.output), config)


def generate(root: Path, num_files: int) -> int:
    """Annotations like the corpus's: half images, half videos, a thousand a folder; the bytes written."""
    rng = random.Random(1)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(4000)]
    sentences = [" ".join(rng.choices(words, k=rng.randint(8, 14))) + "." for _ in range(2000)]
    num_bytes = 0
    for number in range(num_files):
        kind = ("image", "video")[number % 2]
        folder = root / kind / f"batch_{number // 2000:04d}"
        if number % 2000 < 2:
            folder.mkdir(parents=True)
        data = json.dumps(annotation(rng, kind, 3_000_000 + number, sentences), ensure_ascii=False, indent=1).encode()
        (folder / f"{3_000_000 + number}.json").write_bytes(data)
        num_bytes += len(data)
    return num_bytes


def annotation(rng: random.Random, kind: str, number: int, sentences: list[str]) -> dict:
    """One record in the MBC layout."""
    cdn = "https://dxxxxxxxx.cloudfront.net/archive"

    def span(at: int) -> dict[str, str]:
        return {
            f"tc_{end}": f"00:00:{at + 5 * late:02d};{rng.randrange(2, 30):02d}"
            for late, end in enumerate(("in", "out"))
        }

    def plain() -> dict:
        return {"text": rng.choice(sentences), "token": 13, "sentences": 1}

    return {
        "file_id": str(number),
        "source_data_info": {
            "clip_id": str(number),
            "clip_proxy_url": f"{cdn}/proxy/{number}.mp4",
            "clip_proxy_thumbnail_url": [f"{cdn}/thumbnail/{number}_{n}.jpg" for n in range(3)],
            "ai_generated_info": {
                "keyword": "시장, 골목, 사람",
                "mid_category": rng.choice(("생활/문화", "역사/사회", "자연/풍경", "공간/건축")),
                "stt_script": " ".join(rng.choices(sentences, k=3)),
                "scene_description_auto": [{**span(5 * n), "description": rng.choice(sentences)} for n in range(4)],
            },
        },
        "labeling_data_info": {
            "caption_info": {
                "object_level": [{**plain(), **span(5 * n)} for n in range(3)],
                "semantic_level": [plain()],
                "application_level": [plain()],
            }
        },
        "raw_data_info": {
            "source_media_info": {
                "media_type": kind,
                "resolution": rng.choice(("1920, 1080", "720, 512", "1280, 720")),
                "details": {"length": f"00:00:{rng.uniform(3, 34):05.2f}", "frame_rate": 29.97, "resolution": ""},
            }
        },
    }


if __name__ == "__main__":
    sys.exit(main())
