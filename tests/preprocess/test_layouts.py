"""Folders and tables of clips: every layout becomes the same records; bad input is rows or one clear error."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from peak import PEAK_KIB
from prep_runs import TINY, prep

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.archives import Document
from preprocess.corpus.corpus import read_chunk
from preprocess.corpus.layouts import find_layout, open_corpus
from preprocess.corpus.records import Record
from preprocess.demo.media import Media, make_media
from preprocess.fetch.fetcher import Fetcher
from preprocess.pipeline import build_shards
from preprocess.plan.freeze import freeze_plan
from preprocess.plan.plan import Plan
from preprocess.rejection import ClipRejected
from shards.errors import UserError
from shards.read.dataset import open_dataset
from shards.storage import open_storage

CAPTIONS = {"a.mp4": "A man walks.", "inner/b.mp4": "사람이 걷는다.", "inner/c d.mp4": "A red car. It turns."}


def documents_of(location: Path, **keys: Any) -> list[Document]:
    corpus = CorpusConfig(location=str(location), **keys)
    return [document for chunk in open_corpus(corpus) for document in read_chunk(chunk)]


def fields_of(location: Path, **keys: Any) -> dict[str, Any]:
    """Fields, or the reason of the rejection, by source."""
    documents = documents_of(location, **keys)
    assert len({document.source for document in documents}) == len(documents)
    return {doc.source: doc.rejection.reason if doc.rejection else doc.fields for doc in documents}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def write_csv(path: Path, rows: list[list[Any]], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


def plan_of(location: Path, output: Path, **keys: Any) -> Plan:
    config = prep(location, output)
    corpus = CorpusConfig(location=str(location), **keys)
    return freeze_plan(open_storage(str(output)), config.model_copy(update={"corpus": corpus}), num_workers=1)


def test_a_folder_of_clips_with_text_beside_them(tmp_path):
    touch(tmp_path, *CAPTIONS, "no-words.mp4", "still.JPG", ".hidden/x.mp4", "notes.md", "orphan.txt")
    for name, text in CAPTIONS.items():
        (tmp_path / name).with_suffix(".txt").write_text(f"\ufeff{text}\n", encoding="utf-8")
    (tmp_path / "no-words.txt").write_bytes(b"\xff\xfa not text")
    found = fields_of(tmp_path)
    assert set(found) == {*CAPTIONS, "no-words.mp4", "still.JPG", "orphan.txt"}
    assert {name: found[name]["object"] for name in CAPTIONS} == {
        name: ({"text": text},) for name, text in CAPTIONS.items()
    }
    assert found["inner/c d.mp4"]["clip_id"] == "inner/c d.mp4" and found["a.mp4"]["url"] == "file:a.mp4"
    assert found["still.JPG"]["media_type"] == "image" and found["still.JPG"]["object"] == ()
    assert (found["no-words.mp4"], found["orphan.txt"]) == ("not-utf8", "no-media")


def test_a_caption_whose_ending_is_spelled_otherwise_is_read_or_is_a_row(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.TXT").write_text("words")
    (tmp_path / "b.Txt").write_text("words")
    found = fields_of(tmp_path)
    assert found["a.mp4"]["object"] == ({"text": "words"},)
    assert found["b.mp4"]["object"] == () and found["b.Txt"] == "no-media"


def test_another_ending_for_captions(tmp_path):
    touch(tmp_path, "a.mp4", "a.txt")
    (tmp_path / "a.caption").write_text("words")
    assert fields_of(tmp_path, caption_suffix=".caption")["a.mp4"]["object"] == ({"text": "words"},)


def test_a_clip_without_a_caption_is_a_row_with_its_reason(tmp_path):
    touch(tmp_path / "clips", "a.mp4", "b.mp4")
    (tmp_path / "clips/a.txt").write_text("words")
    plan = plan_of(tmp_path / "clips", tmp_path / "out")
    assert [candidate.record.clip_id for candidate in plan.candidates()] == ["a.mp4"]
    assert [(row.source, row.reason) for row in plan.ledger()] == [("b.mp4", "no-caption")]


def test_nothing_outside_a_folder_is_opened(tmp_path):
    outside = touch(tmp_path / "outside", "a.mp4", "secret.txt")
    (outside / "secret.txt").write_text("secret")
    clips = touch(tmp_path / "clips", "b.mp4", "c.mp4")
    (clips / "a.mp4").symlink_to(outside / "a.mp4")
    (clips / "b.txt").symlink_to(outside / "secret.txt")
    (clips / "c.txt").write_text("words")
    found = fields_of(clips)
    assert (found["a.mp4"], found["b.mp4"]) == ("symlink", "symlink") and len(found) == 3
    assert found["c.mp4"]["object"] == ({"text": "words"},) and "secret" not in str(found)


ROWS: list[list[Any]] = [
    ["file_name", "Caption", "id", "mood", "duration", "fps", "width", "height", "label"],
    ["a.mp4", "A man, \"old\",\nwalks.", "one", "calm", "4.5", "25", "640", "360", "news"],
    ["inner/b.mp4", "", "two", "", "", "", "", "", ""],
    ["inner/b.mp4", "NaN", "three", "", "", "", "", "", ""],
    ["../b.mp4", "x", "four", "", "", "", "", "", ""],
    ["https://media.example.org/v/d.mp4?name=1", "x", "", "", "", "", "", "", ""],
    ["s3://bucket/e.mp4", "x", "", "", "", "", "", "", ""],
]  # fmt: skip


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "metadata.csv", "semicolons.csv"])
def test_every_kind_of_table_gives_the_same_records(tmp_path, name):
    path, (header, *rows) = tmp_path / name, ROWS
    dicts = [dict(zip(header, row, strict=True)) for row in rows]
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in dicts))
    elif name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(dicts), path)
    else:
        write_csv(path, ROWS, delimiter="\t" if name == "t.tsv" else ";" if "semi" in name else ",")
    found = fields_of(tmp_path if name.startswith("metadata") else path)
    place = {"t.csv": 6, "metadata.csv": 6, "semicolons.csv": 6, "t.tsv": 6}.get(name, 4)  # a caption of two lines
    assert set(found) == {
        f"{name}#one", f"{name}#two", f"{name}#three", f"{name}:{place}",
        f"{name}#https://media.example.org/v/d.mp4?name=1", f"{name}#s3://bucket/e.mp4",
    }  # fmt: skip
    one = found[f"{name}#one"]
    assert one["object"] == ({"text": 'A man, "old",\nwalks.'},) and one["url"] == "file:a.mp4"
    assert (one["declared_seconds"], one["declared_fps"], one["declared_width"]) == (4.5, 25.0, 640)
    assert (one["category"], one["keywords"]) == ("news", ("mood=calm",))
    assert found[f"{name}#two"]["object"] == found[f"{name}#three"]["object"] == ()
    assert found[f"{name}#three"]["defects"] == ("no-text-object",)
    assert found[f"{name}:{place}"] == "outside-corpus"


def test_columns_by_name_levels_and_stretches(tmp_path):
    rows = [
        ["clip file", "text_en", "scene", "speech", "start", "end"],
        ["a.mp4", "words", "a street", "hello", "00:00:01.5", 3],
        ["a.mp4", "words", "", "", "2", "1"],
        ["a.mp4", "words", "", "", "soon", ""],
    ]
    keys = {"columns": {"path": "clip file", "caption": "text_en"}}
    found = fields_of(write_csv(tmp_path / "t.csv", rows), **keys)
    assert found["t.csv#a.mp4@1.5-3"]["object"] == ({"text": "words", "start_seconds": 1.5, "end_seconds": 3.0},)
    assert found["t.csv#a.mp4@1.5-3"]["speech"] == "hello" and len(found["t.csv#a.mp4@1.5-3"]["scene"]) == 1
    assert (found["t.csv:3"], found["t.csv:4"]) == ("reversed-timecode", "bad-timecode")
    with pytest.raises(UserError, match=r"no column 'text_ko'[\s\S]*text_en"):
        fields_of(tmp_path / "t.csv", columns={"path": "clip file", "caption": "text_ko"})


def test_local_paths_stay_within_the_root(tmp_path):
    root = touch(tmp_path / "media", "a.mp4")
    paths = [str(root / "a.mp4"), f"file://{root}/a.mp4", "./x/../a.mp4", "/etc/passwd", "file:///etc/passwd", "..", ""]
    path = write_csv(tmp_path / "t.csv", [["path", "id"], *([each, n] for n, each in enumerate(paths))])
    found = fields_of(path, root=str(root))
    assert [found[f"t.csv#{n}"]["url"] for n in range(3)] == ["file:a.mp4"] * 3
    assert [found[f"t.csv:{n + 2}"] for n in range(3, 7)] == ["outside-corpus"] * 3 + ["no-media-path"]
    urls = fields_of(write_csv(tmp_path / "u.csv", [["path"], ["a/b.mp4"]]), root="s3://bucket/clips/")
    assert urls["u.csv#a/b.mp4"]["url"] == "s3://bucket/clips/a/b.mp4"


def test_sorting_adding_and_moving_rows_changes_no_key_and_no_order(tmp_path):
    rows = [[f"{n}.mp4", f"words {n}" if n % 5 else ""] for n in range(40)]
    (tmp_path / "one").mkdir()
    one = write_csv(tmp_path / "one/t.csv", [["file", "text"], *rows])
    two = write_csv(tmp_path / "t.csv", [["file", "text"], *reversed(rows)])
    plans = [plan_of(path, tmp_path / f"out-{n}") for n, path in enumerate((one, two))]
    lists = [[candidate.record for candidate in plan.candidates()] for plan in plans]
    assert lists[0] == lists[1] and len(lists[0]) == 32
    more = write_csv(one, [["file", "text"], ["new.mp4", "words"], *reversed(rows)])
    grown = plan_of(more, tmp_path / "out-0")
    assert [candidate.record for candidate in grown.candidates()][:32] == lists[0]
    assert (grown.num_candidates, grown.num_refused) == (33, 8)


BAD_TABLES = {
    "no path column": (b"caption,mood\nx,y\n", "no column says where the clip is; its columns: caption, mood"),
    "columns twice": (b"file,file\na,b\n", "columns given twice: ['file']"),
    "utf-16": ("file,text\na.mp4,x\n".encode("utf-16"), "its first line cannot be read"),
    "many columns": (b",".join(b"c%d" % n for n in range(100_000)) + b"\nx\n", "100,000 columns"),
    "empty": (b"", "no columns"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_cannot_be_read_is_one_clear_error(tmp_path, name):
    data, message = BAD_TABLES[name]
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError) as caught:
        fields_of(tmp_path / "t.csv")
    assert message in str(caught.value)


def test_bad_rows_are_rows(tmp_path):
    lines = [
        b"file,text", b"a.mp4,good", b"b.mp4,\xc7\xd1\xb1\xdb", b"c.mp4", b"d.mp4,x,y", b'e.mp4,"x"y', b"",
        b"f.mp4,good", b"a.mp4,again",
    ]  # fmt: skip
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines) + b'\ng.mp4,"never closed')
    documents = documents_of(tmp_path / "t.csv")
    reasons = [document.rejection.reason if document.rejection else document.source for document in documents]
    assert reasons == [
        "t.csv#a.mp4", "not-utf8", "bad-row", "bad-row", "bad-row", "t.csv#f.mp4", "t.csv#a.mp4", "bad-row",
    ]  # fmt: skip
    plan = plan_of(tmp_path / "t.csv", tmp_path / "out")
    assert (plan.num_candidates, plan.num_refused) == (2, 6)
    assert plan.refused_by() == {"read/bad-row": 4, "read/duplicate-clip": 1, "read/not-utf8": 1}


def test_a_row_that_swallows_others_says_which(tmp_path):
    (tmp_path / "t.csv").write_text('file,text\na.mp4,"never closed\nb.mp4,x\nc.mp4,y\n')
    ((_, row),) = [(document.source, document.rejection) for document in documents_of(tmp_path / "t.csv")]
    assert row.reason == "bad-row" and row.detail.endswith("; lines 2 to 4 are in it")


def test_rows_of_json_that_are_none(tmp_path):
    lines = ['{"file": "a.mp4", "text": ["one", "two", null, 3]}', "[]", "{", '{"text": "x"}', '{"file": NaN}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found = fields_of(tmp_path / "t.jsonl")
    assert [caption["text"] for caption in found["t.jsonl#a.mp4"]["object"]] == ["one", "two", "3"]
    assert [found[f"t.jsonl:{n}"] for n in (2, 3, 4, 5)] == ["not-object", "not-json", "no-media-path", "no-media-path"]


def test_a_parquet_file_cut_short_is_one_clear_error(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    values = [os.urandom(40).hex() for _ in range(2000)]
    parquet.write_table(pyarrow.table({"path": values, "picture": [b"x"] * 2000}), path, row_group_size=500)
    assert len(fields_of(path)) == 2000
    data = path.read_bytes()
    middle = len(data) // 2
    for damaged in (data[:middle], data[:200] + b"\xff" * 5000 + data[5200:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            fields_of(path)


LONG_LINE = f"""
import sys
from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.corpus import read_chunk
from preprocess.corpus.layouts import open_corpus
before = {PEAK_KIB}
rows = [d for chunk in open_corpus(CorpusConfig(location=sys.argv[1])) for d in read_chunk(chunk)]
print([d.rejection.reason if d.rejection else d.source for d in rows])
print(({PEAK_KIB} - before) // 1024)
"""


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_line_of_two_gigabytes_takes_no_memory(tmp_path, name):
    first, last = (
        (b"file,text\n", b"\nb.mp4,x\n") if name == "t.csv" else (b'{"file":"a.mp4"}\n', b'\n{"file":"b.mp4"}\n')
    )
    with (tmp_path / name).open("wb") as file:
        file.write(first)
        file.truncate(2**31)  # a sparse file: one line of zero bytes
        file.seek(0, os.SEEK_END)
        file.write(last)
    done = subprocess.run(
        [sys.executable, "-c", LONG_LINE, tmp_path / name], capture_output=True, text=True, check=True
    )
    reasons, mib = done.stdout.splitlines()
    assert "'too-large'" in reasons and f"{name}#b.mp4" in reasons
    assert int(mib) < 120


def test_auto_says_what_it_took_and_why(tmp_path, caplog):
    touch(tmp_path / "clips", "a.mp4", "b.mp4", "a.txt")
    layout = find_layout(CorpusConfig(location=str(tmp_path / "clips")))
    assert layout[:2] == ("folder", "of its first 2 clips 1 has a .txt file beside it")
    write_csv(tmp_path / "clips/metadata.csv", [["file_name"], ["a.mp4"]])
    assert find_layout(CorpusConfig(location=str(tmp_path / "clips")))[:2] == ("table", "metadata.csv is in it")
    mbc = touch(tmp_path / "mbc", "a.mp4", "a.txt", "bad.json")
    (mbc / "a.json").write_text('{"file_id": "a"}')
    assert find_layout(CorpusConfig(location=str(mbc))).kind == "mbc"
    (tmp_path / "mbc.jsonl").write_text('{"file_id": "a"}\n')
    assert find_layout(CorpusConfig(location=str(tmp_path / "mbc.jsonl"))).kind == "mbc"
    notes = touch(tmp_path / "notes", "a.mp4", "a.txt")
    write_csv(notes / "notes.csv", [["day", "who"], ["1", "me"]])
    with pytest.raises(UserError, match=r"notes.csv: no column says[\s\S]*beside them: corpus.format: folder"):
        documents_of(notes)
    assert len(documents_of(notes, format="folder")) == 1
    odd = touch(tmp_path / "odd", "a.mp4", "a.json")
    for folder, message in ((odd, "1 clip and 1 JSON"), (touch(tmp_path / "none", "x.pdf"), "no annotation in it")):
        with pytest.raises(UserError) as caught:
            find_layout(CorpusConfig(location=str(folder)))
        assert message in str(caught.value)
        assert all(word in str(caught.value) for word in ("walk.txt", "metadata.csv", "source_data_info"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(CAPTIONS):
        media = Media(Path(name).name, 96, 64, "25", 1.2, number)
        (folder / name).parent.mkdir(exist_ok=True)
        make_media((folder / name).parent, media)
        (folder / name).with_suffix(".txt").write_text(CAPTIONS[name])
    return folder


def arrays_of(location: Path, output: Path) -> dict[str, Any]:
    """Latents and embeddings by key of a build over `location`."""
    small = {**TINY, "corpus": {"location": str(location)}, "sieve": {"min_seconds": 0.5}}
    build_shards(prep(location, output, **small), quiet=True)
    dataset = open_dataset(str(output))
    return {
        key: (dataset.latent(key).tobytes(), dataset.text(key).tobytes())
        for key in (sample.key for sample in dataset.samples)
    }


@pytest.mark.parametrize("kind", ["t.csv", "t.jsonl", "t.parquet", "mbc"])
def test_the_same_clips_give_equal_latents_and_texts(clips, kind, tmp_path):
    expected = _folder_arrays(clips)
    assert len(expected) == len(CAPTIONS)
    rows = [{"file_name": name, "caption": text} for name, text in CAPTIONS.items()]
    location = clips / kind
    if kind == "t.csv":
        write_csv(location, [list(rows[0]), *(list(row.values()) for row in rows)])
    elif kind == "t.jsonl":
        location.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "t.parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), location)
    else:
        location.mkdir()
        for name, text in CAPTIONS.items():
            made = location / Path(name).with_suffix(".json")
            made.parent.mkdir(exist_ok=True)
            made.with_suffix(".mp4").symlink_to(clips / name)
            levels = {"object_level": [{"text": text}]}
            made.write_text(json.dumps({"file_id": name, "labeling_data_info": {"caption_info": levels}} | MEDIA))
    assert arrays_of(location, tmp_path / "out") == expected


MEDIA = {"raw_data_info": {"source_media_info": {"media_type": "video"}}}


@functools.cache
def _folder_arrays(clips: Path) -> dict[str, Any]:
    return arrays_of(clips, clips.parent / f"{clips.name}-out")


def test_a_link_out_of_the_corpus_is_not_opened_by_a_build(tmp_path):
    """The table's text stays within the root; where the path leads is seen when the clip is opened."""
    outside = touch(tmp_path / "outside", "b.mp4")
    root = touch(tmp_path / "media", "x")
    (root / "linked").symlink_to(outside)
    rows = [["path", "text"], ["linked/b.mp4", "words"], ["gone.mp4", "words"]]
    corpus = CorpusConfig(location=str(write_csv(root / "t.csv", rows)))
    records = [Record.model_validate(fields) for fields in fields_of(root / "t.csv").values()]
    with Fetcher(FetchConfig(), corpus, tmp_path, threading.Event()) as fetcher:
        reasons = []
        for record in records:
            with pytest.raises(ClipRejected) as caught, fetcher.fetched(record):
                pass
            reasons.append((caught.value.rejection.reason, caught.value.rejection.retryable))
    assert reasons == [("fetch-outside-corpus", False), ("no-source", True)]


def test_a_folder_on_s3(monkeypatch):
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="archive")
        named = {"a.mp4": b"x", "a.txt": b"words", "in/b.mp4": b"x", "in.x/c.d.mp4": b"x", "in.x/c.d.TXT": b"more"}
        for name, data in {**named, "notes.md": b"x", "orphan.txt": b"words"}.items():
            client.put_object(Bucket="archive", Key=f"clips/{name}", Body=data)
        found = fields_of(f"s3://archive/clips?endpoint={endpoint}")
    finally:
        server.stop()
    assert found["a.mp4"]["object"] == ({"text": "words"},) and found["in/b.mp4"]["object"] == ()
    assert found["in.x/c.d.mp4"]["object"] == ({"text": "more"},) and found["orphan.txt"] == "no-media"
    assert found["a.mp4"]["url"] == "s3://archive/clips/a.mp4"
    assert set(found) == {"a.mp4", "in/b.mp4", "in.x/c.d.mp4", "orphan.txt"}
