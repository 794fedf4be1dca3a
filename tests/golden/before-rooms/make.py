"""Write the fixtures of this folder. They were made on the commit before the packages were moved into sub-packages.

Do not rewrite them: they prove that later code continues what that code began, with identical bytes. This script says
how they came about; it uses the console commands, config keys and files on disk only.

    python tests/golden/before-rooms/make.py NEW_FOLDER

corpus/                 sixteen records and their clips, from `wanprep demo-corpus`
undisturbed/            the dataset of prep.yaml, built without a stop
half-built/             the same build, killed: latents of units 0 and 1, text of unit 0, unit 2 begun, unit 3 not
checkpoints/LAYOUT/     a run of train.yaml after 3 steps on that layout, with 8-bit optimizer state
checkpoints/LAYOUT-6/   the last checkpoint and the metrics of the same run that went to 6 steps without a stop
ledger/                 the dataset of ledger.yaml: rejected records of every stage that fails cheaply, and a retry
reports.json            what `status`, `stats` and `ls` said of `ledger` and of `half-built`
machine.json            versions and a digest of float results: where they are the same, so are the bytes of new samples
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"}
GOOD = [f"base-{number:03d}" for number in (1, 2, 4, 5, 7, 10, 11, 13, 14, 16, 17, 23)]
BAD = ["3338996", "3338999", "3339000", "3339002"]
LAYOUTS = {
    "one": [],
    "replicate-2": ["--nproc-per-node", "2", "-o", "parallel.shard=none", "-o", "parallel.ulysses=1"],
    "shard-2": ["--nproc-per-node", "2", "-o", "parallel.shard=full", "-o", "parallel.ulysses=1"],
    "ulysses-2": ["--nproc-per-node", "2", "-o", "parallel.shard=none", "-o", "parallel.ulysses=2"],
}
REPORTS = {
    "half-built": [
        ["wanprep", "status", "prep.yaml", "--json", "-o", "output=half-built"],
        ["wanshards", "ls", "half-built", "--json"],
    ],
    "ledger": [
        ["wanprep", "status", "ledger.yaml", "--json"],
        ["wanprep", "retry", "ledger.yaml", "--retryable", "--dry-run", "--json"],
        ["wanshards", "ls", "ledger", "--json"],
        ["wanshards", "stats", "ledger", "--json", "--no-cache"],
    ],
}


LIBRARIES = ["torch", "numpy", "diffusers", "transformers", "sentencepiece", "bitsandbytes"]
LIBRARIES += ["pillow", "imageio-ffmpeg", "zstandard"]


def command(folder: Path, *words: str) -> str:
    """Run one of the console commands beside this Python in `folder`; what it printed."""
    program = Path(sys.executable).with_name(words[0])
    print("$", *words, flush=True)
    return subprocess.run(
        [program, *words[1:]], cwd=folder, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def copy_records(demo: Path, corpus: Path, clip_ids: list[str]) -> None:
    """Copy records and, where there are any, their media."""
    for clip_id in clip_ids:
        for path in [*demo.glob(f"*/batch_0001/{clip_id}.json"), *demo.glob(f"media/{clip_id}.*")]:
            target = corpus / path.relative_to(demo)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def make_half_built(out: Path) -> None:
    """Build in parts, then kill the rest of the build while the tar of unit 2 grows."""
    build = ["build-shards", "prep.yaml", "--serve", "corpus", "--quiet", "-o", "output=half-built"]
    command(out, "wanprep", *build, "--unit-range", "0:1")
    command(out, "wanprep", *build, "--unit-range", "1:2", "--only", "latents")
    process = subprocess.Popen([Path(sys.executable).with_name("wanprep"), *build], cwd=out, env=ENVIRONMENT)
    while not list((out / "half-built").glob(".tmp-build-*/.tmp-latents-shard-000002-*.tar")):
        time.sleep(0.001)
        assert process.poll() is None, "the build ended too early"
    process.send_signal(signal.SIGKILL)
    process.wait()
    names = {str(path.relative_to(out / "half-built")) for path in (out / "half-built").rglob("*.json")}
    assert {"latents/shard-000001.json", "text/default/shard-000000.json"} <= names
    assert not {"latents/shard-000002.json", "text/default/shard-000001.json"} & names


def make_checkpoints(out: Path) -> None:
    """Each layout's run with a stop after 3 steps, and without."""
    shutil.copytree(out / "undisturbed", out / "shards")
    (out / "checkpoints").mkdir()
    for name, words in LAYOUTS.items():
        for steps, folder in ((3, name), (6, f"{name}-6")):
            command(out, "wantrain", "fit", "train.yaml", *words, "-o", f"max_steps={steps}")
            run = out / "run"
            kept = ["config.yaml", "dataset-pin.json", "metrics.jsonl", "held_out.jsonl"]
            (out / "checkpoints" / folder).mkdir()
            for file in kept if steps == 3 else kept[2:]:
                shutil.copyfile(run / file, out / "checkpoints" / folder / file)
            shutil.copytree(
                run / f"checkpoints/step-000000{steps}",
                out / "checkpoints" / folder / f"checkpoints/step-000000{steps}",
            )
            shutil.rmtree(run)
    shutil.rmtree(out / "shards")


def make_ledger(out: Path, demo: Path) -> None:
    """Records that fail at every stage; then a retry that helps some of what a retry can help."""
    corpus = out / "ledger-corpus"
    archive = [path.stem for path in demo.glob("*/batch_0001/3*.json")]
    copy_records(demo, corpus, [*archive, *GOOD[:10]])
    batch, media = corpus / "video/batch_0001", corpus / "media"
    (batch / "not-object.json").write_text("[]")
    (batch / "not-utf8.json").write_bytes(b'{"file_id": "\xff"}')
    (batch / "duplicate.json").write_bytes((batch / "base-001.json").read_bytes())

    def edit(clip_id: str, text: str) -> None:
        path = batch / f"{clip_id}.json"
        record = json.loads(path.read_text())
        record["labeling_data_info"]["caption_info"]["object_level"][0]["text"] = text
        path.write_text(json.dumps(record, ensure_ascii=False))

    edit("base-002", "파도 " * 12)
    edit("base-004", "파" + "아" * 20)
    edit("base-005", "긴 자막이다. " * 300)
    good = {clip_id: (media / f"{clip_id}.mp4").read_bytes() for clip_id in GOOD[4:10]}
    for clip_id in ("base-007", "base-010"):
        (media / f"{clip_id}.mp4").write_bytes(b"")
    (media / "base-011.mp4").write_text("<html>not a clip</html>")
    (media / "base-013.mp4").write_bytes(good["base-013"][:64])
    (media / "base-014.mp4").write_bytes(good["base-014"][:3000] + b"\xff" * 3000 + good["base-014"][6000:])
    build = ["build-shards", "ledger.yaml", "--serve", "ledger-corpus", "--quiet"]
    # First without the time that a unit needs, then as it should be.
    command(out, "wanprep", *build, "--unit-range", "0:1", "-o", "decode.timeout_seconds=0.001")
    command(out, "wanprep", *build, "--unit-range", "1:2", "-o", "fetch.deadline_seconds=0.001")
    command(out, "wanprep", *build)
    (media / "base-010.mp4").write_bytes(good["base-010"])
    reasons = ["--reason", "fetch-empty", "--reason", "fetch-not-media"]
    command(out, "wanprep", "retry", "ledger.yaml", *reasons, "--serve", "ledger-corpus", "--quiet")
    shutil.rmtree(corpus)


def reports(folder: Path, dataset: str) -> dict[str, Any]:
    """What the commands say of one of the datasets, without the place where it is."""
    said = {" ".join(words): json.loads(command(folder, *words)) for words in REPORTS[dataset]}
    return {words: {name: value for name, value in answer.items() if name != "root"} for words, answer in said.items()}


def machine() -> dict[str, str]:
    """What decides the last bits of an encoder's output here, found without the project's code."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-999, 1000, shape, generator=generator) / 997

    results = [functional.conv3d(draw(1, c, 5, 16, 32), draw(24, c, 3, 3, 3), padding=1) for c in (12, 40)]
    for size in (32, 64, 160):
        x, weight = draw(2, 75, size), draw(size, size)
        results += [x @ weight, (x.bfloat16() @ weight.bfloat16()).float(), functional.layer_norm(x, (size,))]
        results += [functional.scaled_dot_product_attention(*(draw(2, 2, 75, size // 2) for _ in range(3)))]
        results += [
            functional.silu(x),
            functional.gelu(x, approximate="tanh"),
            x.softmax(-1),
            x.exp(),
            x.sin(),
            x.abs().sqrt(),
        ]
    digest = hashlib.sha256(b"".join(result.contiguous().numpy().tobytes() for result in results)).hexdigest()
    versions = {name: version(name) for name in LIBRARIES}
    return {**versions, "machine": platform.machine(), "float results": digest}


def main(out: Path, demo: Path) -> None:
    """Write everything into the new folder `out`; `demo` holds the demo corpus or will."""
    out.mkdir()
    for name in ("prep.yaml", "ledger.yaml", "train.yaml"):
        shutil.copyfile(HERE / name, out / name)
    command(demo.parent, "wanprep", "demo-corpus", str(demo), "--quiet")
    copy_records(demo, out / "corpus", [*GOOD, *BAD])
    command(out, "wanprep", "build-shards", "prep.yaml", "--serve", "corpus", "--quiet", "-o", "output=undisturbed")
    make_half_built(out)
    make_checkpoints(out)
    make_ledger(out, demo)
    said = {dataset: reports(out, dataset) for dataset in REPORTS}
    (out / "reports.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
    (out / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--machine":
        print(json.dumps(machine()))
    else:
        folder = Path(sys.argv[1]).resolve()
        main(folder, folder.with_name(f"{folder.name}-demo"))
