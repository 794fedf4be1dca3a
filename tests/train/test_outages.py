"""A training run from a bucket whose server fails, in one place for long or everywhere now and then: the same run.

python tests/train/test_outages.py 60 [SEED]      so many runs under 15 % of mixed faults; the seed is printed
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from fault_proxy import FaultProxy, Request, proxied
from s3_servers import BUCKET, serve
from shards_data import write_dataset
from train_runs import checkpoint_bytes, make_config, read_metrics

import shards.storage.s3
from shards.config import StorageConfig
from shards.read.index import write_index
from shards.storage import open_storage, patience
from train.loop import fit

SHARE = 0.15
KINDS = ("reset", "lost", "cut", "break", "hang", "page", 500, 503)
PLACES: dict[str, tuple[str | int, Callable[[Request], bool]]] = {
    "open": ("reset", lambda request: "dataset.json" in request.path),
    "body": ("break", lambda request: request.method == "GET" and ".tar" in request.path),
    "listing": (503, lambda request: "list-type" in request.path),
    "head": (500, lambda request: request.method == "HEAD"),
    "index": ("reset", lambda request: "index.jsonl" in request.path),
}


class Bucket(NamedTuple):
    """A dataset behind a proxy, and the run that nothing disturbed."""

    proxy: FaultProxy
    root: str
    undisturbed: Path


@contextlib.contextmanager
def a_bucket(folder: Path) -> Iterator[Bucket]:
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys)
    with serve("moto", folder / "s3") as endpoint, proxied(endpoint) as proxy:
        root = f"s3://{BUCKET}/data?endpoint={proxy.url}"
        write_dataset(root, scratch=folder / "scratch")
        write_index(open_storage(root))
        run(root, folder / "undisturbed")
        yield Bucket(proxy, root, folder / "undisturbed")


def run(root: str, output: Path) -> None:
    fit(make_config(root, output))


def check_same(bucket: Bucket, output: Path) -> None:
    assert read_metrics(output) == read_metrics(bucket.undisturbed)
    assert checkpoint_bytes(output, 10) == checkpoint_bytes(bucket.undisturbed, 10)
    assert (output / "lora.safetensors").read_bytes() == (bucket.undisturbed / "lora.safetensors").read_bytes()


def run_under_faults(bucket: Bucket, output: Path, seed: int | str) -> int:
    """A run of whose requests 15 % fail, each in a way that is drawn; how many failed."""
    draw, begun = random.Random(seed), len(bucket.proxy.log)
    bucket.proxy.fault = lambda _: draw.choice(KINDS) if draw.random() < SHARE else None
    try:
        run(bucket.root, output)
    finally:
        bucket.proxy.fault = lambda _: None
    check_same(bucket, output)
    return sum(fault is not None for _, fault in bucket.proxy.log[begun:])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    before = dict(os.environ)
    with a_bucket(tmp_path_factory.mktemp("outages")) as found:
        yield found
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and a server that hangs is given up after a second."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(shards.storage.s3, "_READ_SECONDS", 1.0)
    monkeypatch.setattr(patience, "_process", patience._Process())


@pytest.mark.usefixtures("hasty")
def test_a_run_under_mixed_faults_is_the_same_run(bucket: Bucket, tmp_path: Path) -> None:
    assert run_under_faults(bucket, tmp_path / "run", seed=1) > 5


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_six_runs_under_mixed_faults_are_the_same_run(bucket: Bucket, tmp_path: Path) -> None:
    num_faults = [run_under_faults(bucket, tmp_path / f"run-{seed}", f"six {seed}") for seed in range(6)]
    assert min(num_faults) > 0 and sum(num_faults) > 50


@pytest.mark.usefixtures("hasty")
def test_an_outage_is_no_late_batch(bucket: Bucket, tmp_path: Path) -> None:
    """In the middle of the run, and longer than `data.read_timeout_seconds`."""
    begun: list[float] = []

    def outage(request: Request) -> str | None:
        if ".tar" not in request.path:
            return None
        begun.append(time.monotonic())
        return "break" if len(begun) >= 4 and begun[-1] < begun[3] + 6 else None

    bucket.proxy.fault = outage
    try:
        fit(make_config(bucket.root, tmp_path / "run", data__read_timeout_seconds=3.0))
    finally:
        bucket.proxy.fault = lambda _: None
    assert begun[-1] > begun[3] + 6
    check_same(bucket, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_through_two_minutes_of_outage_in_one_place_is_the_same_run(
    bucket: Bucket, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default limits, in real time; samples are cut off in the middle of the run."""
    monkeypatch.setattr(patience, "_process", patience._Process())
    begun: list[float] = []
    num_hits = 0
    fault, concerns = PLACES[place]

    def outage(request: Request) -> str | int | None:
        nonlocal num_hits
        if not concerns(request):
            return None
        num_hits += 1
        if not begun and num_hits >= (4 if place == "body" else 1):
            begun.append(time.monotonic())
        return fault if begun and time.monotonic() < begun[0] + seconds else None

    seconds = float(os.environ.get("OUTAGE_SECONDS", "120"))
    bucket.proxy.fault = outage
    start = time.monotonic()
    run(bucket.root, tmp_path / "run")
    bucket.proxy.fault = lambda _: None
    assert begun and time.monotonic() - start > seconds
    check_same(bucket, tmp_path / "run")


if __name__ == "__main__":
    number = int(sys.argv[1])
    chosen = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 10**9
    print(f"seed {chosen}")
    patience.FIRST_PAUSE_SECONDS, shards.storage.s3._READ_SECONDS = 0.02, 1.0
    patience.set_patience(StorageConfig())
    with tempfile.TemporaryDirectory() as temporary, a_bucket(Path(temporary)) as under_test:
        for each in range(number):
            failed = run_under_faults(under_test, Path(temporary) / f"run-{each}", f"{chosen} {each}")
            print(f"run {each}: {failed} faults, the same run", flush=True)
