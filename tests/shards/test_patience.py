"""Outages of a storage: waited for, reported, and told from damage and refusal. Real servers behind a fault proxy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fault_proxy import FaultProxy, Request, proxied
from s3_servers import BUCKET, serve
from shards_data import write_dataset

import shards.storage.s3
from shards.cli import main
from shards.config import StorageConfig
from shards.errors import ShardDamage, StorageFailure, StorageOutage, UserError
from shards.read.dataset import open_dataset
from shards.read.index import write_index
from shards.storage import open_storage, patience
from shards.storage.patience import Waiting, abandon_waits, on_wait, result_within, set_patience
from shards.storage.s3 import S3Root, S3Storage

Injected = str | int
CREDENTIALS = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module", params=["moto", "rclone"])
def endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(request.param, tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def proxy(endpoint: str) -> Iterator[FaultProxy]:
    with proxied(endpoint) as found:
        yield found


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(shards.storage.s3, "_DENIED_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(patience, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(patience, "_process", patience._Process())
    set_patience(StorageConfig(patience_minutes=0.5))


class Outage:
    """Faults for `seconds` from the first request that `concerns` on."""

    def __init__(self, fault: Injected, seconds: float, concerns: Callable[[Request], bool]) -> None:
        self.fault, self.seconds, self.concerns = fault, seconds, concerns
        self.begun: float | None = None

    def __call__(self, request: Request) -> Injected | None:
        if self.begun is None and self.concerns(request):
            self.begun = time.monotonic()
        hit = self.begun is not None and time.monotonic() < self.begun + self.seconds and self.concerns(request)
        return self.fault if hit else None


PLACES: dict[str, tuple[Injected, Callable[[Request], bool]]] = {
    "open": ("reset", lambda request: "dataset.json" in request.path),
    "body": ("break", lambda request: request.method == "GET" and ".tar" in request.path),
    "end-of-body": ("cut", lambda request: request.method == "GET" and ".tar" in request.path),
    "listing": (503, lambda request: "list-type" in request.path),
    "head": (500, lambda request: request.method == "HEAD"),
    "index": ("reset", lambda request: "index.jsonl" in request.path),
    "put": ("reset", lambda request: request.method == "PUT"),
    "lost-put": ("lost", lambda request: request.method == "PUT"),
    "everything": ("reset", lambda request: True),
    "page": ("page", lambda request: True),
    "page-of-a-listing": ("page", lambda request: "list-type" in request.path),
    "page-of-a-body": ("page", lambda request: request.method == "GET" and ".tar" in request.path),
    "too-many": (429, lambda request: True),
    "refused-for-a-moment": (403, lambda request: request.method == "GET"),
}


def _use(root: str, scratch: Path, seconds: float, proxy: FaultProxy, place: str) -> tuple[str, list[np.ndarray]]:
    """Write a dataset and its index, open it and read it, with an outage at one place; what was read."""
    fault, concerns = PLACES[place]
    proxy.fault = outage = Outage(fault, seconds, concerns)
    write_dataset(root, num_units=2, scratch=scratch)
    write_index(open_storage(root))
    dataset = open_dataset(root)
    arrays = [dataset.latent(ordinal) for ordinal in range(len(dataset))]
    assert outage.begun is not None
    return dataset.revision, arrays


@pytest.mark.parametrize("place", PLACES)
def test_an_outage_changes_nothing_but_the_time(proxy: FaultProxy, tmp_path: Path, place: str) -> None:
    expected = write_and_read(tmp_path / "local", tmp_path / "scratch")
    seconds = 0.15 if place == "refused-for-a-moment" else 0.6
    found = _use(f"s3://{BUCKET}/{place}?endpoint={proxy.url}", tmp_path / "scratch", seconds, proxy, place)
    assert found[0] == expected[0]
    assert all(np.array_equal(one, other) for one, other in zip(found[1], expected[1], strict=True))


def write_and_read(root: Path, scratch: Path) -> tuple[str, list[np.ndarray]]:
    """The same on a disk."""
    write_dataset(root, num_units=2, scratch=scratch)
    dataset = open_dataset(root)
    return dataset.revision, [dataset.latent(ordinal) for ordinal in range(len(dataset))]


def _with_default_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "place", [place for place in PLACES if not {"page", "refused", "many"} & set(place.split("-"))]
)
def test_two_minutes_of_outage_at_each_place(
    proxy: FaultProxy, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default limits, in real time."""
    _with_default_limits(monkeypatch)
    expected = write_and_read(tmp_path / "local", tmp_path / "scratch")
    found = _use(f"s3://{BUCKET}/two-{place}?endpoint={proxy.url}", tmp_path / "scratch", 120, proxy, place)
    assert found[0] == expected[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_outage_with_the_default_limits(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_default_limits(monkeypatch)
    root = f"s3://{BUCKET}/ten?endpoint={proxy.url}"
    write_dataset(root, num_units=1, scratch=tmp_path)
    proxy.fault = Outage("reset", 600, lambda request: True)
    start = time.monotonic()
    assert len(open_dataset(root)) == 8 and time.monotonic() - start > 590


@pytest.mark.parametrize("fault", ["reset", "lost", 503])
@pytest.mark.parametrize("step", ["uploads", "partNumber", "uploadId"])
def test_an_upload_in_parts_survives_faults_at_each_request(
    proxy: FaultProxy, tmp_path: Path, step: str, fault: Injected
) -> None:
    """Begin, a part, completion: the answer of a completion can be lost, and repeating it finds no upload."""
    storage = S3Storage(S3Root(BUCKET, f"{step}-{fault}/", proxy.url), part_bytes=5 * 2**20)
    data = tmp_path / "data"
    data.write_bytes(np.random.default_rng(0).bytes(7 * 2**20))

    def concerns(request: Request) -> bool:
        query = request.path.partition("?")[2]
        return request.method in ("PUT", "POST") and step in query and (step == "partNumber") == ("partNumber" in query)

    proxy.fault = Outage(fault, 0.15, concerns)
    assert storage.put("a.tar", data)
    assert storage.get("a.tar") == data.read_bytes()
    if step != "uploads":  # a second upload, whose first answer was lost, is the sweep's
        assert list(storage.uploads(older_than=2**40)) == []


def test_waiting_is_reported_once_for_all_threads(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(patience.LOG, "warning", lambda text, *values: messages.append(text % values))
    storage = open_storage(f"s3://{BUCKET}/reported?endpoint={proxy.url}")
    storage.put("x", b"1")
    proxy.fault = Outage("reset", 0.7, lambda request: True)
    heard: list[Waiting] = []
    remove = on_wait(heard.append)
    before = patience.waited_seconds()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: storage.get("x"), range(8))) == [b"1"] * 8
    remove()
    assert [waiting.is_over for waiting in heard] == [False, True]
    assert "reported/x" in heard[0].what and heard[1].seconds >= 0.5
    assert 0.5 <= patience.waited_seconds() - before < 5  # the outage's length, not a sum over threads
    assert len(messages) == 2 and "s3://bucket/reported/x" in messages[0]


def test_patience_that_ends_is_an_outage_with_exit_code_75(proxy: FaultProxy, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/ends?endpoint={proxy.url}"
    write_dataset(root, num_units=1, scratch=tmp_path)
    set_patience(StorageConfig(patience_minutes=0.01))
    proxy.fault = lambda request: 503
    start = time.monotonic()
    result = CliRunner().invoke(main, ["ls", root])
    assert result.exit_code == 75 and 0.4 < time.monotonic() - start < 30
    assert "failed for" in result.output and "storage.patience_minutes" in result.output
    assert "damage" not in result.output and "Traceback" not in result.output


def test_damage_outage_and_refusal_are_three_errors(proxy: FaultProxy, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/three?endpoint={proxy.url}"
    write_dataset(root, num_units=1, scratch=tmp_path)
    dataset = open_dataset(root)
    set_patience(StorageConfig(patience_minutes=0.005))
    for fault, error in (("flip", ShardDamage), ("reset", StorageOutage), (403, StorageFailure)):
        proxy.fault = lambda request, fault=fault: fault  # type: ignore[misc]
        before = len(proxy.log)
        with pytest.raises(error):
            dataset.latent(0)
        if fault in ("flip", 403):
            assert len(proxy.log) - before == 2  # read twice; asked again once, with fresh credentials


@pytest.mark.parametrize("code", [403, 400])  # HEAD of an expired token is 400 without a word
def test_a_refused_request_is_repeated_with_fresh_credentials(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    storage = open_storage(f"s3://{BUCKET}/fresh?endpoint={proxy.url}")
    storage.put("x", b"1")
    client = storage._s3()  # type: ignore[attr-defined]
    proxy.fault = Outage(code, 0.1, lambda request: True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    assert storage.get("x") == b"1" and storage._s3() is not client  # type: ignore[attr-defined]


def test_time_spent_waiting_does_not_count_against_a_limit(proxy: FaultProxy) -> None:
    storage = open_storage(f"s3://{BUCKET}/limit?endpoint={proxy.url}")
    storage.put("x", b"1")
    proxy.fault = Outage("reset", 1.2, lambda request: True)
    with ThreadPoolExecutor(1) as pool:
        assert result_within(pool.submit(storage.get, "x"), 0.5) == b"1"
        with pytest.raises(TimeoutError):
            result_within(pool.submit(time.sleep, 1.0), 0.2)


def test_a_server_that_hangs_is_asked_again(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The silence before the first failure counts as waiting too."""
    monkeypatch.setattr(shards.storage.s3, "_READ_SECONDS", 0.7)
    storage = open_storage(f"s3://{BUCKET}/hangs?endpoint={proxy.url}")
    storage.put("x", b"1")
    proxy.fault = Outage("hang", 0.5, lambda request: True)
    assert storage.get("x") == b"1" and patience.waited_seconds() > 0.6


def test_an_upload_that_is_gone_is_aborted_without_an_error(proxy: FaultProxy) -> None:
    storage = S3Storage(S3Root(BUCKET, "gone/", proxy.url), part_bytes=5 * 2**20)
    real = storage._call

    def call(operation: str, name: str, **arguments: object) -> object:
        if operation == "complete_multipart_upload":  # somebody else has aborted it; then the server refuses
            real("abort_multipart_upload", name, UploadId=arguments["UploadId"])
            proxy.fault = lambda request: 403 if request.method == "POST" else None
        return real(operation, name, **arguments)

    storage._call = call  # type: ignore[method-assign]
    with pytest.raises(StorageFailure, match="complete_multipart_upload refused"):
        storage.put("a.tar", bytes(6 * 2**20))


def test_waits_are_abandoned_on_request(proxy: FaultProxy) -> None:
    """A run that stops does not wait for its reading threads."""
    storage = open_storage(f"s3://{BUCKET}/abandoned?endpoint={proxy.url}")
    proxy.fault = lambda request: "reset"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(storage.get, "x")
        while not patience._process.active:
            time.sleep(0.01)
        abandon_waits()
        with pytest.raises(StorageOutage):
            future.result(timeout=20)
    assert not patience._process.active


def test_pauses_grow_with_jitter_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(threading.Condition, "wait_for", lambda self, predicate, timeout=None: pauses.append(timeout))
    set_patience(StorageConfig(patience_minutes=15))
    with patience.Attempts("x") as attempts:
        for _ in range(30):
            attempts.failed("no")
    assert pauses[0] <= 0.05 and max(pauses) <= 30 and len(set(pauses[-10:])) == 10 and min(pauses[-10:]) >= 15


@pytest.mark.parametrize("code", [302, 412, 416, 501])
def test_an_answer_with_an_odd_status_is_one_line(proxy: FaultProxy, code: int) -> None:
    """boto3 follows redirects without end; the others have a meaning for some operations alone."""
    storage = open_storage(f"s3://{BUCKET}/odd?endpoint={proxy.url}")
    storage.put("x", b"1")
    set_patience(StorageConfig(patience_minutes=0.005))
    proxy.fault = lambda request: code
    operations: list[Callable[[], object]] = [
        lambda: storage.get("x"), lambda: list(storage.list()), lambda: storage.exists("x"),
        lambda: storage.put("x", b"2"), lambda: storage.delete("x"), lambda: list(storage.uploads(0)),  # type: ignore[attr-defined]
    ]  # fmt: skip
    for operation in operations:
        with pytest.raises(StorageOutage if code == 302 else StorageFailure):
            operation()
    if code != 412:  # which says that the name is taken
        with pytest.raises(StorageOutage if code == 302 else UserError):
            storage.put("y", b"2", if_absent=True)
