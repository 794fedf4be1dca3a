"""A build into a bucket whose server fails now and then, or for good."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from fault_proxy import FaultProxy, Request, proxied
from prep_runs import TINY, build, prep_values
from s3_servers import BUCKET, serve

from preprocess.cli.main import main
from shards.check.verify import verify
from shards.storage import open_storage, patience
from shards.storage.s3 import PART_BYTES, S3Storage


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    names = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}
    monkeypatch.setenv("S3_UPLOAD_PART_MIN_SIZE", "1")  # moto's limit on the size of a part
    for name, value in names.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(patience, "_process", patience._Process())
    with serve("moto", tmp_path / "moto") as endpoint, proxied(endpoint) as found:
        yield found


def test_a_build_through_faults_gives_the_same_dataset(demo_corpus: Path, tmp_path: Path, proxy: FaultProxy) -> None:
    """A third of all requests fail, each kind of fault among them."""
    counts = build(demo_corpus, tmp_path / "out", **TINY)
    draw = random.Random(0)
    kinds = ("reset", "lost", "cut", "break", 500, 503)

    def fault(request: Request) -> str | int | None:
        return draw.choice(kinds) if draw.random() < 1 / 3 else None

    proxy.fault = fault
    root = f"s3://{BUCKET}/out?endpoint={proxy.url}"
    assert build(demo_corpus, root, **TINY) == counts  # type: ignore[arg-type]
    assert {fault for _, fault in proxy.log} == {*kinds, None}
    proxy.fault = lambda _: None
    check_same(tmp_path / "out", root)


PLACES: dict[str, tuple[str | int, Callable[[Request], bool]]] = {
    "put": ("reset", lambda request: request.method == "PUT"),
    "lost-put": ("lost", lambda request: request.method == "PUT" and "/latents/" in request.path),
    "head": (500, lambda request: request.method == "HEAD"),
    "listing": (503, lambda request: "list-type" in request.path),
    "body": ("break", lambda request: request.method == "GET" and "/latents/" in request.path),
    "everything": ("page", lambda request: True),
    "complete": ("reset", lambda request: request.method == "POST" and "uploadId" in request.path),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", PLACES)
def test_a_build_through_two_minutes_of_outage_in_one_place_gives_the_same_dataset(
    demo_corpus: Path, tmp_path: Path, proxy: FaultProxy, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In real time, from the third request of that kind on."""
    # Parts of a few kilobytes, so that the tars of this corpus are uploaded in parts.
    monkeypatch.setattr(S3Storage.__init__, "__defaults__", (20_000 if place == "complete" else PART_BYTES,))
    counts = build(demo_corpus, tmp_path / "out", **TINY)
    seconds, hits, begun = float(os.environ.get("OUTAGE_SECONDS", "120")), [], []
    kind, concerns = PLACES[place]

    def fault(request: Request) -> str | int | None:
        if not concerns(request):
            return None
        hits.append(request)
        if len(hits) == 3:
            begun.append(time.monotonic())
        return kind if begun and time.monotonic() < begun[0] + seconds else None

    proxy.fault = fault
    root = f"s3://{BUCKET}/out?endpoint={proxy.url}"
    start = time.monotonic()
    assert build(demo_corpus, root, **TINY) == counts  # type: ignore[arg-type]
    assert begun and time.monotonic() - start > seconds
    proxy.fault = lambda _: None
    check_same(tmp_path / "out", root)


def check_same(folder: Path, root: str) -> None:
    local, remote = open_storage(folder), open_storage(root)
    names = [entry.name for entry in local.list() if entry.name.endswith((".tar", "dataset.json"))]
    assert {name for name in names if remote.exists(name)} == set(names)
    assert all(remote.get(name) == local.get(name) for name in names)
    assert not verify(remote, "deep").problems


def test_an_outage_that_lasts_ends_a_build_with_exit_code_75(
    demo_corpus: Path, tmp_path: Path, proxy: FaultProxy
) -> None:
    proxy.fault = lambda _: "reset"
    values = prep_values(demo_corpus, tmp_path, storage={"patience_minutes": 0.01})
    path = tmp_path / "prep.yaml"
    path.write_text(yaml.safe_dump({**values, "output": f"s3://{BUCKET}/gone?endpoint={proxy.url}"}))
    result = CliRunner().invoke(main, ["build-shards", str(path), "--quiet"])
    assert result.exit_code == 75 and "storage.patience_minutes" in result.output
