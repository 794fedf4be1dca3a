"""S3 by two independent servers: moto, which honours `If-None-Match`, and rclone, which ignores it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_servers import BUCKET, serve
from shards_data import IDENTITY, PROVENANCE, write_dataset
from urllib3.exceptions import ProtocolError

import shards.storage.s3
from shards.check.orphans import sweep
from shards.check.verify import verify
from shards.errors import MissingObject, ShardDamage, StorageOutage, UserError
from shards.format.arrays import array_facts, encode_array
from shards.format.commit import Commit, is_committed, read_commit
from shards.format.keys import sample_key
from shards.format.ledger import LedgerRow, WindowRow
from shards.format.sealed_json import canonical_json
from shards.read.dataset import open_dataset
from shards.read.index import write_index
from shards.storage import open_storage, patience
from shards.storage.base import Storage
from shards.storage.cache import CachedStorage
from shards.storage.local import LocalStorage
from shards.storage.s3 import S3Root, S3Storage, open_s3
from shards.write.shard_writer import ShardWriter


@pytest.fixture(scope="module", params=["moto", "rclone"])
def endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(request.param, tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "testing",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(shards.storage.s3, "_DENIED_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(patience._process, "limit_seconds", 1.0)


@pytest.fixture
def root(endpoint: str, request: pytest.FixtureRequest) -> str:
    name = "".join(c for c in request.node.name if c.isalnum())
    return f"s3://{BUCKET}/{name}?endpoint={endpoint}"


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


@pytest.fixture(params=["local", "s3"])
def either(request: pytest.FixtureRequest, tmp_path: Path, storage: Storage) -> Storage:
    """Both implementations, to hold them to one behaviour."""
    return LocalStorage(tmp_path / "root") if request.param == "local" else storage


def test_both_storages_do_the_same(either: Storage, tmp_path: Path) -> None:
    assert list(either.list()) == [] and not either.exists("a/b.bin")
    data = bytes(range(256)) * 40
    assert either.put("a/b.bin", data)
    (tmp_path / "file").write_bytes(data + b"more")
    assert either.put("a/c d+é.bin", tmp_path / "file") and either.put("z.bin", b"")
    assert [tuple(entry) for entry in either.list()] == [("a/b.bin", 10240), ("a/c d+é.bin", 10244), ("z.bin", 0)]
    assert [entry.name for entry in either.list("a/c")] == ["a/c d+é.bin"]
    assert either.get("a/b.bin") == data and either.get("z.bin") == b""
    assert either.get_range("a/b.bin", 100, 50) == data[100:150]
    assert either.get_range("a/b.bin", 10_200, 500) == data[10_200:] and either.get_range("a/b.bin", 10_240, 5) == b""
    buffer = bytearray(300)
    assert either.read_into("a/b.bin", 5000, memoryview(buffer)) == 300 and buffer == data[5000:5300]
    assert either.size("a/b.bin") == 10240 and either.modified("a/b.bin") > 1.7e9
    with pytest.raises(ShardDamage, match="larger than 100"):
        either.get("a/b.bin", 100)
    either.delete("a/b.bin")
    either.delete("a/b.bin")
    assert not either.exists("a/b.bin")
    for read in (either.get, either.size, either.modified, lambda name: either.get_range(name, 0, 1)):
        with pytest.raises(MissingObject, match=r"a/b\.bin"):
            read("a/b.bin")


def test_many_objects_are_listed_over_pages(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(25):
        storage.put(f"x/{number:03d}", b"1")
    client = storage._s3()  # type: ignore[attr-defined]
    real = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **arguments: real(MaxKeys=10, **arguments))
    assert [entry.name for entry in storage.list("x/")] == [f"x/{number:03d}" for number in range(25)]


def test_a_dataset_on_s3_is_the_dataset_on_disk(root: str, tiny_shards: Path, tmp_path: Path) -> None:
    write_dataset(root, scratch=tmp_path / "scratch")
    remote, local = open_dataset(root), open_dataset(tiny_shards)
    assert remote.revision == local.revision
    cached = open_dataset(root, cache=tmp_path / "cache")
    for place in range(0, 24, 5):
        for dataset in (remote, cached):
            assert np.array_equal(dataset.latent(place), local.latent(place))
            assert np.array_equal(dataset.text(place), local.text(place))
            assert dataset.meta(place) == local.meta(place)
    assert np.array_equal(remote.null_text("negative"), local.null_text("negative"))
    assert verify(open_storage(root), "deep", jobs=4).problems == []
    write_index(open_storage(root))
    assert open_dataset(root).revision == local.revision
    # The cache holds what was read, and is read instead of the server.
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) == 6


def test_the_cache_is_bounded_and_checked(root: str, tmp_path: Path) -> None:
    write_dataset(root, scratch=tmp_path / "scratch")
    size = max(entry.size for entry in open_storage(root).list("latents/"))
    cache = tmp_path / "cache"
    dataset = open_dataset(root, cache=cache, cache_gib=1.5 * size / 2**30)
    expected = [dataset.latent(place).tobytes() for place in range(24)]
    held = list(cache.glob("*/*.tar"))
    assert len(held) == 1 and held[0].stat().st_size <= 1.5 * size
    held[0].write_bytes(bytes(held[0].stat().st_size))  # damaged on disk: fetched anew at the second try
    assert [dataset.latent(place).tobytes() for place in range(24)] == expected
    none = open_dataset(root, cache=tmp_path / "none", cache_gib=1e-6)
    assert none.latent(3).tobytes() == expected[3] and not list((tmp_path / "none").glob("*/*.tar"))


def test_a_shard_damaged_on_the_server_is_found(root: str, tmp_path: Path) -> None:
    write_dataset(root, num_units=1, scratch=tmp_path / "scratch")
    storage = open_storage(root)
    tar = read_commit(storage, "latents", 0).commit.tar
    data = bytearray(storage.get(tar.name))
    data[len(data) // 2] ^= 1
    storage.put(tar.name, bytes(data))
    found = verify(storage, "hash").problems
    assert [problem.file for problem in found] == [storage.url(tar.name)]
    dataset = open_dataset(root, cache=tmp_path / "cache")
    with pytest.raises(ShardDamage, match=tar.name):
        list(map(dataset.latent, range(8)))


def write_unit(storage: Storage, scratch: Path, value: float) -> Any:
    """One unit with one sample that is full of `value`."""
    array = np.full((2, 1, 2, 2), value, np.float16)
    scratch.mkdir(exist_ok=True)
    with ShardWriter(storage, "latents", 0, IDENTITY, scratch, PROVENANCE) as writer:
        key = sample_key("a", 0, 1, 32, 32)
        members = {"json": canonical_json({"latent": array_facts(array)}), "latent.npy.zst": encode_array(array)}
        summary = {"clip": "a", "start_ms": 0, "frames": 1, "height": 32, "width": 32}
        writer.add(key, members, {**summary, "source_media": "image", "category": None})
        return writer.seal([ledger_row(key, value)])


def ledger_row(key: str, seconds: float) -> LedgerRow:
    """A row of which two runs differ in their seconds, as they do."""
    window = WindowRow(key=key, start_seconds=0.0, status="accepted", reason=None, detail=None)
    return LedgerRow(
        candidate=0, clip_id="a", source="a.json", status="accepted", stage=None, reason=None, detail=None,
        retryable=False, attempts=1, windows=(window,), seconds={"fetch": seconds}, bytes=1,
    )  # fmt: skip


def assert_whole(storage: Storage, commit: Commit) -> None:
    """The tar and the ledger under a commit are its own."""
    for blob in (commit.tar, commit.ledger):
        assert blob and hashlib.sha256(storage.get(blob.name)).hexdigest() == blob.sha256


def test_a_race_of_two_writers_leaves_one_whole_unit(either: Storage, tmp_path: Path) -> None:
    """Two writers of one unit, of different bytes: one commit stands, its own tar and ledger lie under it."""
    for _ in range(4):
        threads = [threading.Thread(target=write_unit, args=(either, tmp_path / f"s{n}", float(n))) for n in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        commit = read_commit(either, "latents", 0).commit
        assert_whole(either, commit)
        for entry in list(either.list("latents/")):
            either.delete(entry.name)


def test_the_second_writer_is_told(either: Storage, tmp_path: Path, endpoint: str) -> None:
    first = write_unit(either, tmp_path / "s", 1.0)
    second = write_unit(either, tmp_path / "s", 2.0)
    stored = read_commit(either, "latents", 0).commit
    # Where conditions are honoured the first stands; where not, the last: either way a commit with its own tar.
    assert second == stored and stored in (first, second)
    assert_whole(either, stored)
    if isinstance(either, LocalStorage):
        assert stored == first


def test_conditional_puts(either: Storage, request: pytest.FixtureRequest) -> None:
    assert either.put("x", b"1", if_absent=True)
    won = either.put("x", b"2", if_absent=True)
    assert either.get("x") == (b"2" if won else b"1")
    if "rclone" not in request.node.name:
        assert not won


PARTS = 3


@pytest.mark.parametrize("part", range(PARTS + 2))
def test_a_put_that_fails_at_each_part_leaves_nothing(
    endpoint: str, tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin, each part, completion: a server error, for good. No object, no commit, no open upload; then it works."""
    from botocore.exceptions import ClientError

    size = 5 * 2**20  # the smallest part of S3
    storage = S3Storage(S3Root(BUCKET, f"parts-{part}/", endpoint), part_bytes=size)
    data = tmp_path / "data"
    data.write_bytes(np.random.default_rng(part).bytes(PARTS * size - 1))
    operations = ["create_multipart_upload", *["upload_part"] * PARTS, "complete_multipart_upload"]
    client, calls = storage._s3(), []
    real = {name: getattr(client, name) for name in set(operations)}

    def failing(name: str) -> Any:
        def call(**arguments: Any) -> Any:
            calls.append(name)
            if len(dict.fromkeys((n, i) for i, n in enumerate(calls))) > part:
                raise ClientError({"Error": {"Code": "500", "Message": "no"}}, name)
            return real[name](**arguments)

        return call

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(client, name, failing(name))
        with pytest.raises(StorageOutage, match=f"{operations[part]}: failed for"):
            storage.put("big.tar", data)
    assert calls[:part] == operations[:part] and set(calls[part:]) == {operations[part]} and len(calls) > part + 3
    assert not storage.exists("big.tar")
    assert list(storage.uploads(older_than=2**40)) == []
    assert S3Storage(S3Root(BUCKET, f"parts-{part}/", endpoint), size).put("big.tar", data)
    assert storage.get("big.tar") == data.read_bytes()


def test_errors_that_pass_are_retried(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError, ConnectionClosedError

    storage.put("x", b"0123456789")
    client = storage._s3()  # type: ignore[attr-defined]
    failures: list[Exception] = [
        ClientError({"Error": {"Code": "SlowDown"}}, "GetObject"),
        ConnectionClosedError(endpoint_url="x"),
        ClientError({"Error": {"Code": "503"}}, "GetObject"),
    ]
    real = client.get_object

    def flaky(**arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(**arguments)

    monkeypatch.setattr(client, "get_object", flaky)
    assert storage.get_range("x", 2, 4) == b"2345" and not failures
    monkeypatch.setattr(
        client, "get_object", lambda **_: (_ for _ in ()).throw(ConnectionClosedError(endpoint_url="x"))
    )
    with pytest.raises(StorageOutage, match="get_object: failed for"):
        storage.get_range("x", 2, 4)


@pytest.mark.parametrize("with_error", [False, True])
def test_a_read_that_breaks_off_goes_on(storage: Storage, monkeypatch: pytest.MonkeyPatch, with_error: bool) -> None:
    """Every answer ends after 100 bytes, in silence or with a broken connection."""
    data = bytes(range(256)) * 4
    storage.put("x", data)
    client = storage._s3()  # type: ignore[attr-defined]
    real, ranges = client.get_object, []

    class Broken:
        def __init__(self, body: Any) -> None:
            self.body, self.left = body, 100

        def read(self, length: int) -> bytes:
            found = self.body.read(min(length, self.left))
            self.left -= len(found)
            if not found and with_error:
                raise ProtocolError("broken")
            return found

        def close(self) -> None:
            self.body.close()

    def short(**arguments: Any) -> Any:
        ranges.append(arguments["Range"])
        answer = real(**arguments)
        return {**answer, "Body": Broken(answer["Body"])}

    monkeypatch.setattr(client, "get_object", short)
    assert storage.get_range("x", 0, 256) == data[:256]
    assert ranges == ["bytes=0-255", "bytes=100-255", "bytes=200-255"]
    assert storage.get_range("x", 0, 1024) == data  # an answer that brings something is progress


def test_a_server_that_ignores_ranges_is_read_rightly(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("x", bytes(range(256)))
    client = storage._s3()  # type: ignore[attr-defined]
    real = client.get_object

    def whole(Range: str, **arguments: Any) -> Any:
        answer = real(**arguments)
        assert "ContentRange" not in answer
        return answer

    monkeypatch.setattr(client, "get_object", whole)
    assert storage.get_range("x", 100, 50) == bytes(range(100, 150))


def test_a_killed_writer_leaves_orphans_that_the_sweep_takes(either: Storage, tmp_path: Path) -> None:
    root = either.url().removesuffix("/")
    target = root if isinstance(either, LocalStorage) else f"{root}?endpoint={either._root.endpoint}"  # type: ignore
    write_dataset(target, num_units=1, scratch=tmp_path / "scratch")
    before = {entry.name for entry in either.list()}
    orphans = ["latents/shard-000001-0123abcd.tar", "latents/shard-000000-0123abcd.ledger.jsonl.zst",
               "text/default/shard-000001-0123abcd.tar"]  # fmt: skip
    for name in orphans:
        either.put(name, b"half")
    either.put("latents/notes.txt", b"not ours")
    assert len(open_dataset(target)) == 8 and not is_committed(either, "latents", 1)
    assert sweep(either, 3600, delete=True) == []
    assert sorted(orphan.name for orphan in sweep(either, -5, delete=False)) == sorted(orphans)
    assert sorted(orphan.name for orphan in sweep(either, -5, delete=True)) == sorted(orphans)
    assert {entry.name for entry in either.list()} == before | {"latents/notes.txt"}
    assert verify(either, "hash").problems == []


def test_open_uploads_are_listed_over_pages_and_aborted(
    root: str, storage: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(root, num_units=1, scratch=tmp_path / "scratch")
    client, prefix = storage._s3(), storage._root.prefix
    names = [f"latents/shard-00000{number}-0123abcd.tar" for number in range(1, 4)]
    for name in names:
        client.create_multipart_upload(Bucket=BUCKET, Key=prefix + name)
    real = client.list_multipart_uploads

    def two_a_page(**where: Any) -> Any:
        """What S3 does from 1,000 uploads on, and neither of these servers in the same way."""
        marker = where.pop("KeyMarker", ""), where.pop("UploadIdMarker", "")
        found = sorted(real(**where).get("Uploads", ()), key=lambda item: (item["Key"], item["UploadId"]))
        left = [item for item in found if (item["Key"], item["UploadId"]) > marker]
        last = left[:2][-1]
        page = {"Uploads": left[:2], "IsTruncated": len(left) > 2}
        return {**page, "NextKeyMarker": last["Key"], "NextUploadIdMarker": last["UploadId"]}

    expected = [f"{name} (unfinished upload)" for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(client, "list_multipart_uploads", two_a_page)
        assert list(storage.uploads(10**9)) == []  # moto says that all were begun in 2010
        assert [orphan.name for orphan in sweep(storage, -5, delete=False)] == expected
        assert sorted(upload.name for upload in storage.uploads(2**40)) == names
        assert [orphan.name for orphan in sweep(storage, -5, delete=True)] == expected
    assert sweep(storage, -5, delete=False) == [] == list(storage.uploads(2**40))


def test_bad_roots_are_refused_in_words() -> None:
    for root in ("s3://", "s3://bucket/x?region=1", "s3:///x", "s3://b/x#y"):
        with pytest.raises(UserError, match="expected: s3://bucket/prefix"):
            open_s3(root)
    with pytest.raises(UserError, match="gs://"):
        open_storage("gs://bucket/x")


def test_one_bucket_on_two_endpoints_is_two_roots(root: str, tmp_path: Path) -> None:
    """Here both are one server, so the second root is refused for its samples, and not as named twice."""
    write_dataset(root, num_units=1, scratch=tmp_path / "scratch")
    other = root.replace("127.0.0.1", "localhost")
    with pytest.raises(ShardDamage, match=r"sample .* is in .* too"):
        open_dataset([root, other])
    assert CachedStorage(open_storage(root), tmp_path, 1)._folder != CachedStorage(open_s3(other), tmp_path, 1)._folder
    with pytest.raises(UserError, match="named twice"):
        open_dataset([root, root])


@pytest.mark.parametrize(
    ("root", "profile", "words"),
    [
        ("s3://b/x?endpoint=localhost:9000", None, "endpoint 'localhost:9000'"),
        ("s3://b/x", "nope", r"profile \(nope\)(.|\n)*AWS_PROFILE"),
        ("s3://Bad_Bucket!/x", None, r"Bad_Bucket!(.|\n)*check the bucket"),
    ],
)
def test_a_root_that_no_server_can_be_asked_for_is_a_users_error(
    monkeypatch: pytest.MonkeyPatch, root: str, profile: str | None, words: str
) -> None:
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(UserError, match=words):
        open_dataset(root)


def test_a_bucket_that_is_not_there_is_a_users_error(endpoint: str) -> None:
    with pytest.raises(UserError, match="absent"):
        open_dataset(f"s3://absent/x?endpoint={endpoint}")
