"""A table in shards, on S3 and behind HTTP: the same records as one file here; what is not complete is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from odd_server import body, cut, odd_server, reset, status
from pyarrow import parquet
from s3_servers import serve

from preprocess.config import CorpusConfig
from preprocess.corpus.corpus import read_chunk
from preprocess.corpus.layouts import find_layout, open_corpus
from shards.errors import StorageOutage, UserError
from shards.storage import open_storage

ROWS = [{"file_name": f"videos/{n}.mp4", "caption": f"Number {n}."} for n in range(10)]
PARTS = (ROWS[:4], ROWS[4:7], ROWS[7:])
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def records_of(location: Any, **keys: Any) -> dict[str, Any]:
    """Fields by source, without what a source is part of."""
    corpus = CorpusConfig(location=str(location), **keys)
    documents = [document for chunk in open_corpus(corpus) for document in read_chunk(chunk)]
    assert not any(document.rejection for document in documents)
    return {doc.source: {**(doc.fields or {}), "source": None} for doc in documents}


def error_of(location: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        records_of(location, **keys)
    return str(caught.value)


def write_shards(folder: Path, name: str = "train-{}-of-00003.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(PARTS):
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name.format(f"{number:05d}"))
    return folder


def one_file(folder: Path) -> list[dict[str, Any]]:
    (folder / "one.jsonl").write_bytes(LINES)
    return list(records_of(folder / "one.jsonl").values())


def test_the_shards_of_a_table_are_one_table(tmp_path):
    expected, root = one_file(tmp_path), tmp_path / "set"
    data = write_shards(root / "data")
    for location in (root, f"{root}/data/train-*.parquet", f"{root}/*/*.parquet", data):
        found = records_of(location)
        assert list(found.values()) == expected
        assert list(found)[9] == "train-*-of-*.parquet#videos/9.mp4", "it does not say which shard a row is in"
    assert find_layout(CorpusConfig(location=str(root)))[:2] == ("table", "3 × train-*-of-*.parquet are in it")
    # Relative paths start where the location's own name ends.
    assert (
        CorpusConfig(location=str(root)).media_root == root == CorpusConfig(location=f"{root}/*/*.parquet").media_root
    )
    assert CorpusConfig(location=f"{root}/data/train-*.parquet").media_root == data


def test_a_shard_that_is_missing_or_damaged_is_one_clear_error(tmp_path):
    data = write_shards(tmp_path / "data")
    middle = data / "train-00001-of-00003.parquet"
    whole = middle.read_bytes()
    middle.write_bytes(whole[: len(whole) // 2])
    assert "train-00001-of-00003.parquet: damaged" in error_of(tmp_path)
    middle.unlink()
    for location in (tmp_path, f"{data}/*.parquet"):
        assert "2 of 3 shards of" in error_of(location) and "number 1 is missing" in error_of(location)


def test_two_tables_in_a_folder_are_asked_about(tmp_path):
    write_shards(tmp_path)
    write_shards(tmp_path, "test-{}-of-00003.parquet")
    message = error_of(tmp_path)
    assert "6 tables: test-*-of-*.parquet, train-*-of-*.parquet" in message
    location = message.split("corpus.location: ")[-1]
    assert location.endswith("/test-*-of-*.parquet") and len(records_of(location)) == 10
    assert "no file matches" in error_of(f"{tmp_path}/none-*.parquet")
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt is no table" in error_of(f"{tmp_path}/*")


def test_clips_within_a_table_are_found_by_the_path_beside_them(tmp_path, caplog):
    rows = [{"video": {"path": "a.mp4", "bytes": b"x"}, "poster": b"y", "caption": "words"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text('{"video": {"path": "a.mp4"}, "caption": "words"}')
    with caplog.at_level("INFO", "wan"):
        found = records_of(tmp_path / "t.parquet")
    assert found["t.parquet#a.mp4"] == records_of(tmp_path / "t.jsonl")["t.jsonl#a.mp4"]
    assert "not read: poster, which holds files themselves" in caplog.text
    parquet.write_table(pyarrow.table({"video": [b"x"], "caption": ["words"]}), tmp_path / "t.parquet")
    assert "no column says where the clip is; its columns: caption" in error_of(tmp_path / "t.parquet")


def test_a_pipe_in_place_of_a_table_is_not_waited_for(tmp_path):
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        os.mkfifo(tmp_path / name)
        assert "neither a file nor a folder" in error_of(tmp_path / name)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serve("moto", tmp_path / "s3") as endpoint:
        yield lambda path: f"s3://bucket/{path}?endpoint={endpoint}"


def test_a_table_on_s3(bucket, tmp_path):
    storage = open_storage(bucket("set"))
    storage.put("metadata.jsonl", LINES)
    for shard in sorted(write_shards(tmp_path / "data").iterdir()):
        storage.put(f"shards/data/{shard.name}", shard)
    storage.put("mbc.jsonl", b'{"file_id": "a"}\n')
    local = one_file(tmp_path)
    for path, start in (
        ("set/metadata.jsonl", "set"), ("set", "set"), ("set/shards", "set/shards"),
        ("set/shards/data/train-*.parquet", "set/shards/data"),
    ):  # fmt: skip
        found = list(records_of(bucket(path)).values())
        assert [one["object"] for one in found] == [one["object"] for one in local]
        assert found[3]["url"] == f"s3://bucket/{start}/videos/3.mp4" and found[3]["clip_id"] == "videos/3.mp4"
    assert "an archive of annotations is read from this machine" in error_of(bucket("set/mbc.jsonl"))
    open_storage(bucket("set/shards")).delete("data/train-00002-of-00003.parquet")
    assert "number 2 is missing" in error_of(bucket("set/shards"))
    storage.put("metadata.jsonl", b'{"caption": "no clip"}\n')
    message = error_of(bucket("set/metadata.jsonl"))
    assert "s3://bucket/set/metadata.jsonl: no column says where" in message, "the copy's own path helps nobody"


def test_a_table_behind_http_is_copied_completely_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answers = {
        "t.jsonl": [status(503), reset(10), cut(20, len(LINES)), body(LINES)],
        "gone.csv": [status(404)],
        "ftp.csv": [status(302, Location="ftp://127.0.0.1/t.csv")],
        "moved.jsonl": [status(302, Location="/t.jsonl")],
    }
    with odd_server(**answers) as server:
        found = records_of(f"{server.url}/t.jsonl?token=secret")
        assert [one["object"] for one in found.values()] == [one["object"] for one in one_file(tmp_path)]
        assert found["t.jsonl#videos/0.mp4"]["url"] == f"{server.url}/videos/0.mp4"
        assert len([path for path, _ in server.requests if path == "/t.jsonl"]) == 4
        assert len(records_of(f"{server.url}/moved.jsonl")) == 10
        message = error_of(f"{server.url}/gone.csv?token=secret")
        assert "the server answers 404" in message and "secret" not in message
        assert "302 a redirect to ftp://127.0.0.1/t.csv" in error_of(f"{server.url}/ftp.csv")


def test_a_host_that_stays_away_is_an_outage(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("shards.storage.patience._process.limit_seconds", 0.5)
    with odd_server(**{"t.csv": [status(503)]}) as server, pytest.raises(StorageOutage, match="503"):
        records_of(f"{server.url}/t.csv")
