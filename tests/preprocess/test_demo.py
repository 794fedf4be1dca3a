"""The demonstration's corpus and the server that stands in for the CDN."""

import json
import re
import urllib.error
import urllib.request

import pytest
from prep_runs import files_of

from preprocess.corpus.records import Record, parse_record
from preprocess.demo.clips import archive_clips, base_clips
from preprocess.demo.corpus import BASE_URL, write_corpus
from preprocess.demo.media import Media, make_media
from preprocess.demo.server import FolderServer, served
from preprocess.rejection import Rejection
from shards.errors import UserError


def _records(corpus):
    return {path.stem: parse_record(path.read_bytes(), path.name) for path in corpus.rglob("*.json")}


def test_the_corpus_holds_each_kind_of_record(demo_corpus):
    records = _records(demo_corpus)
    assert len(records) == 16
    assert isinstance(records["3339002"], Rejection) and records["3339002"].reason == "not-json"
    good = {name: record for name, record in records.items() if isinstance(record, Record)}
    assert all(not record.defects for record in good.values()), {n: r.defects for n, r in good.items()}
    assert good["3338998"].media_type == "image"
    assert (good["3338996"].declared_seconds, good["3338997"].declared_seconds) == (2.0, 40.0)
    assert not (demo_corpus / "media/3338999.mp4").exists()
    assert not good["3339001"].object and not good["3339001"].semantic and not good["3339001"].scene
    clip = good["3338987"]
    assert (clip.declared_width, clip.declared_height, clip.declared_fps) == (1920, 1080, 29.97)
    assert clip.url == f"{BASE_URL}media/3338987.mp4"
    for level in (clip.object, clip.scene, clip.semantic, clip.application):
        assert level and all(re.search("[가-힣]", caption.text) for caption in level)
    assert [caption.start_seconds for caption in clip.object] == pytest.approx([0, 1, 2, 3], abs=0.04)


def test_written_again_it_makes_nothing_and_elsewhere_the_same_bytes(demo_corpus, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (demo_corpus / "media").iterdir()}
    assert write_corpus(demo_corpus, with_base=False).num_made == 0
    assert {path: path.stat().st_mtime_ns for path in (demo_corpus / "media").iterdir()} == before
    for clip in archive_clips()[5:7]:
        make_media(tmp_path, clip.media)
        assert (tmp_path / clip.media.name).read_bytes() == (demo_corpus / "media" / clip.media.name).read_bytes()


def test_a_damaged_file_is_made_again(demo_corpus, tmp_path):
    media = archive_clips()[9].media
    make_media(tmp_path, media)
    path = tmp_path / media.name
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert make_media(tmp_path, media) and path.read_bytes() == whole
    assert not make_media(tmp_path, media)
    assert make_media(tmp_path, media._replace(seconds=1.0)) and path.read_bytes() != whole


def test_base_clips_are_told_apart_by_their_names():
    clips = list(base_clips())
    assert len(clips) == 24 and all(clip.clip_id.startswith("base-") for clip in clips)
    assert not any(clip.media.graphics for clip in clips)
    assert len({clip.media.recipe() for clip in clips}) == 24


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="not a demo corpus"):
        write_corpus(tmp_path)
    assert files_of(tmp_path) == {"holiday.jpg": b"x"}


def test_own_clips_claim_nothing(demo_corpus, tmp_path, monkeypatch):
    own = tmp_path / "Ferien & Berge (2).MP4"
    own.write_bytes((demo_corpus / "media/3338996.mp4").read_bytes())
    monkeypatch.setattr("preprocess.demo.corpus.archive_clips", lambda: ())
    corpus = tmp_path / "corpus"
    write_corpus(corpus, [own], with_base=False)
    (record,) = _records(corpus).values()
    assert (
        record.clip_id == "clip-Ferien-Berge-2-" and record.declared_seconds is None and record.declared_width is None
    )
    assert (corpus / "media/clip-Ferien-Berge-2-.mp4").read_bytes() == own.read_bytes()
    with pytest.raises(UserError, match="no such file"):
        write_corpus(corpus, [tmp_path / "nowhere.mp4"], with_base=False)


def test_an_ffmpeg_that_cannot_draw_is_named(tmp_path):
    with pytest.raises(UserError, match=r"could not draw x\.mp4"):
        make_media(tmp_path, Media("x.mp4", 320, 180, "24", 1, 0, filters="nonsense"))
    assert not list(tmp_path.iterdir())


def _get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:  # noqa: S310 - loopback
        return response.status, dict(response.headers), response.read()


def test_the_server_gives_files_and_parts_of_them(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/한 글.bin").write_bytes(bytes(range(200)))
    with served(tmp_path) as url:
        name = f"{url}media/%ED%95%9C%20%EA%B8%80.bin?Signature=x"
        status, headers, body = _get(name)
        assert (status, body, headers["Content-Length"]) == (200, bytes(range(200)), "200")
        tag = headers["ETag"]
        status, headers, body = _get(name, Range="bytes=150-", **{"If-Range": tag})
        assert (status, body, headers["Content-Range"]) == (206, bytes(range(150, 200)), "bytes 150-199/200")
        assert _get(name, Range="bytes=10-19")[2] == bytes(range(10, 20))
        assert _get(name, Range="bytes=150-", **{"If-Range": '"other"'})[0] == 200
        with pytest.raises(urllib.error.HTTPError, match="416"):
            _get(name, Range="bytes=200-")


ODD_PATHS = [
    "nowhere", "../secret", "%2e%2e/secret", "..%2fsecret", ".hidden", "", "media", ".git/config", "media/.git/config",
    "media/%2egit/config", "a%00b", "x" * 5000, "%ff%fe", "loop", "loop/x", "link", "media/clip/x",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD_PATHS, ids=[path[:20] for path in ODD_PATHS])
def test_the_server_gives_nothing_else(tmp_path, path):
    root = tmp_path / "root"
    for folder in (".git", "media/.git"):
        (root / folder).mkdir(parents=True)
        (root / folder / "config").write_text("x")
    (root / ".hidden").write_text("x")
    (root / "media/clip").write_text("x")
    (root / "loop").symlink_to("loop")
    (root / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("x")
    with served(root) as url, pytest.raises(urllib.error.HTTPError, match="404"):
        _get(url + path)


@pytest.mark.parametrize("asked", ["bytes=5-2", f"bytes={'9' * 5000}-", "bytes=\u0663-", "bytes=-3", "bytes=1-2,4-5"])
def test_an_odd_range_is_answered_with_the_file(tmp_path, asked):
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    with served(tmp_path) as url:
        status, _, body = _get(f"{url}a.txt", Range=asked.encode().decode("latin-1"))
        assert (status, body) == (200, b"0123456789")


def test_a_taken_port_and_a_missing_folder_are_named(tmp_path):
    with FolderServer(tmp_path) as server, pytest.raises(UserError, match=r"port \d+ on 127.0.0.1"):
        FolderServer(tmp_path, server.server_address[1])
    with pytest.raises(UserError, match="no such folder"):
        FolderServer(tmp_path / "nowhere")


def test_the_json_is_of_the_corpus_layout(demo_corpus):
    record = json.loads((demo_corpus / "video/batch_0001/3338987.json").read_text())
    assert set(record) == {"file_id", "source_data_info", "labeling_data_info", "raw_data_info"}
    assert record["raw_data_info"]["source_media_info"]["details"]["length"] == "00:00:04.00"
    assert record["labeling_data_info"]["caption_info"]["object_level"][0]["tc_in"] == "00:00:00;00"
