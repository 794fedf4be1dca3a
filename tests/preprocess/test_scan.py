"""`wanprep scan`: the figures against a corpus whose figures are known."""

import json

import pytest
from annotations import annotation, numbered, write_tree
from click.testing import CliRunner

from preprocess.cli.main import main
from preprocess.config import PrepConfig
from preprocess.corpus import corpus as corpus_module
from preprocess.plan.scan import describe_scan, scan_corpus
from shards.config import validate_config
from shards.errors import UserError

DETAILS = "raw_data_info__source_media_info__details"


@pytest.fixture
def corpus(tmp_path):
    documents = numbered(10)
    documents |= {
        f"image/{n}.json": annotation(f"i{n}", raw_data_info__source_media_info__media_type="image") for n in range(4)
    }
    documents |= {
        "a.json": annotation("a", **{f"{DETAILS}__length": "00:02:00.00", f"{DETAILS}__frame_rate": "often"}),
        "b.json": annotation("b", **{f"{DETAILS}__length": "", f"{DETAILS}__resolution": "720, 512"}),
        "c.json": b"{",
        "d.json": annotation("b"),
    }
    return write_tree(tmp_path / "corpus", documents)


def config(location):
    return validate_config(PrepConfig, {"output": "unused", "corpus": {"location": str(location)}}, origin="test")


def test_the_figures(corpus):
    told = []
    report = scan_corpus(config(corpus), count_tokens=lambda text: len(text.split()) + 1, progress=told.append)
    assert (report.documents, report.passed, report.refused, report.unreadable) == (18, 12, 5, 1)
    assert sum(told) == 18
    assert report.unreadable_by == {"read/not-json": 1}
    assert report.refused_by == {"sieve/image": 4, "sieve/too-long": 1}
    assert report.media_types == {"video": 13, "image": 4}
    assert report.duplicate_clip_ids == 1
    assert report.declared_sizes == {"1920×1080": 17}
    assert report.declared_fps == {"29.97": 16, "not declared": 1}
    assert report.defects == {"bad-frame-rate": 1, "resolution-conflict": 1}
    assert report.categories == {"생활/문화": 17}
    assert report.records_with["speech"] == 17
    assert (report.video_seconds.count, report.video_seconds_not_declared) == (12, 1)
    assert report.video_seconds.largest == 120
    in_bin = dict(zip((0, *report.video_seconds.edges), report.video_seconds.histogram, strict=True))
    assert (in_bin[20], in_bin[120], sum(in_bin.values())) == (11, 1, 12)
    assert report.caption_characters["image"].count == 4
    characters = len(
        "상인이 시장에서 과일을 판다.\n사람들이 골목을 걷는다.\n활기찬 시장의 아침이다.\n관광 홍보에 쓸 수 있다."
    )
    assert report.caption_characters["video"].mean == characters
    assert report.caption_tokens.count == 17
    assert report.caption_tokens.mean == 16.0


def test_several_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(corpus_module, "SERIAL_CHUNKS", 1)
    location = write_tree(tmp_path / "corpus", numbered(20))
    assert scan_corpus(config(location), num_workers=2) == scan_corpus(config(location), num_workers=1)


def test_many_values_are_summed_and_not_dropped(tmp_path):
    path = "source_data_info__ai_generated_info__mid_category"
    documents = {f"{n}.json": annotation(str(n), **{path: f"분류 {n:02d}"}) for n in range(50)}
    report = scan_corpus(config(write_tree(tmp_path, documents)))
    assert report.categories["others (10)"] == 10
    assert sum(report.categories.values()) == 50


def test_an_empty_corpus(tmp_path):
    with pytest.raises(UserError, match="no annotation"):
        scan_corpus(config(tmp_path))


def test_the_table_names_every_figure(corpus):
    report = scan_corpus(config(corpus))
    text = "\n".join(describe_scan(report))
    for word in ("18 = 12 pass the sieve + 5 refused + 1 unreadable", "read/not-json", "sieve/image", "1920×1080"):
        assert word in text
    assert "not counted" in text


def test_the_command_prints_and_writes(corpus, tmp_path):
    path = tmp_path / "prep.yaml"
    path.write_text(f"output: {tmp_path}/out\ncorpus:\n  location: {corpus}\n", encoding="utf-8")
    out = tmp_path / "scan.json"
    result = CliRunner().invoke(main, ["scan", str(path), "--out", str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "18 = 12 pass the sieve" in result.output
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["passed"] == 12
    assert written["caption_tokens"]["count"] == 17
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, ["scan", str(path), "--out", str(tmp_path / "no" / "scan.json"), "--quiet"])
    assert result.exit_code == 2
    assert "cannot be written" in result.output
