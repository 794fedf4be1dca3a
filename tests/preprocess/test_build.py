"""The build from end to end: bytes that repeat, every record accounted for, stopped and started anywhere."""

import json
import re
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from footage import footage
from prep_runs import TINY, build, files_of, prep, prep_values, start_build

from preprocess.cli.main import main
from preprocess.config import CaptionsConfig, frozen_choices
from preprocess.demo.corpus import write_corpus
from preprocess.forecast.forecast import Hardware, count_plan, describe_plan, forecast
from preprocess.pipeline import recaption, retry
from preprocess.plan.plan import open_plan
from preprocess.plan.retry import Wanted
from preprocess.video.decode import transform_identity
from shards.check.verify import verify
from shards.errors import UserError
from shards.format.commit import committed_units, read_commit
from shards.format.dataset_info import read_info
from shards.format.identity import IdentityMismatch
from shards.format.ledger import read_ledger
from shards.format.sealed_json import seal_document
from shards.gpus import find_gpu
from shards.read.dataset import open_dataset
from shards.read.tags import clip_tags
from shards.storage import open_storage

ALL = Wanted(frozenset({"truncated"}), retryable=True)
REASONS = {
    "3338996": "sieve/too-short",
    "3338997": "sieve/too-long",
    "3338998": "sieve/image",
    "3338999": "fetch/fetch-404",
    "3339000": "probe/truncated",
    "3339001": "sieve/no-caption",
    "": "read/not-json",
}


@pytest.fixture(scope="module")
def built(demo_corpus, tmp_path_factory):
    """A dataset built from the demo corpus, not to be written to."""
    output = tmp_path_factory.mktemp("built")
    counts = build(demo_corpus, output)
    return output, counts


@pytest.fixture
def copy(built, tmp_path):
    return Path(shutil.copytree(built[0], tmp_path / "copy"))


def ledger_rows(root):
    storage = open_storage(root)
    rows = list(open_plan(storage).ledger())
    for unit in sorted(committed_units(storage, "latents")):
        rows += read_ledger(storage.get(read_commit(storage, "latents", unit).commit.ledger.name))
    return rows


def test_every_record_is_accounted_for(built, demo_corpus):
    output, counts = built
    rows = ledger_rows(output)
    assert counts["records"] == len(list(demo_corpus.rglob("*.json"))) == len(rows) == 16
    assert counts["accepted"] + counts["rejected"] == counts["records"] and counts["waiting"] == 0
    assert sorted({row.candidate for row in rows if row.candidate >= 0}) == list(range(11))


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "text"])
def test_the_summary_names_the_pool_that_limited_the_build(demo_corpus, tmp_path, options):
    config = tmp_path / "prep.yaml"
    config.write_text(yaml.safe_dump(prep_values(demo_corpus, tmp_path / "out", **TINY), allow_unicode=True))
    told = CliRunner().invoke(main, ["build-shards", str(config), "--serve", str(demo_corpus), "--quiet", *options])
    if not options:
        (line,) = [line for line in told.stdout.splitlines() if line.startswith("pools ")]
        assert re.fullmatch(r"pools +encoder at work \d+%, waiting .* for write: bound by \w+", line)
        return
    latents = json.loads(told.stdout)["latent_pass"]
    assert sum(latents["pools"].values()) == pytest.approx(1, abs=0.01) and latents["bottleneck"] in latents["pools"]


def test_each_bad_clip_has_a_row_with_its_own_reason(built):
    rows = ledger_rows(built[0])
    refused = {row.clip_id: f"{row.stage}/{row.reason}" for row in rows if row.status == "rejected"}
    assert refused == REASONS
    assert built[1]["rejected_by"] == dict.fromkeys(sorted(REASONS.values()), 1)
    assert all(row.source and row.detail for row in rows if row.status == "rejected")


def test_each_good_clip_is_a_sample_in_the_bucket_of_its_shape(built):
    dataset = open_dataset([str(built[0])])
    shapes = {sample.clip_id: (sample.width, sample.height) for sample in dataset.samples}
    portrait, wide = (96, 160), (160, 96)
    assert shapes == {
        **dict.fromkeys(("3338987", "3338988", "3338989", "3338990", "3338991", "3338993", "3338994"), wide),
        **dict.fromkeys(("3338992", "3338995"), portrait),
    }
    for sample in dataset.samples:
        latent = dataset.latent(sample.key)
        assert latent.shape == (48, 5, sample.height // 16, sample.width // 16) and latent.dtype == np.float16
        assert dataset.text(sample.key).shape[1] == 64


def test_the_sample_says_what_was_decided_and_why(built):
    dataset = open_dataset([str(built[0])])
    metas = {meta["clip"]: meta for meta in (dataset.meta(sample.key) for sample in dataset.samples)}
    assert metas["3338989"]["decisions"]["aspect"]["ground"].startswith("declared 1920×1080")
    assert "32:27" in metas["3338990"]["decisions"]["aspect"]["ground"]
    assert metas["3338991"]["probed"]["deinterlace"] != "none"
    assert metas["3338987"]["window"]["fps"] == 24 and metas["3338987"]["window"]["num_frames"] == 17
    assert metas["3338987"]["bucket"] == {"width": 160, "height": 96}
    cut = {clip: text["cut"] for clip, text in _texts(dataset).items()}
    assert any(each["why"] == "over-limit" for each in cut["3338994"][0])
    assert max(text["tokens"][0] for text in _texts(dataset).values()) <= 512


def _texts(dataset):
    return {sample.clip_id: dataset.text_meta(sample.key) for sample in dataset.samples}


def test_no_url_path_or_time_is_in_a_shard(built, demo_corpus):
    for name, data in files_of(built[0], "**/*.tar").items():
        for secret in (b"http", b"127.0.0.1", b"media/", str(demo_corpus).encode(), str(built[0]).encode()):
            assert secret not in data, (name, secret)
        with tarfile.open(built[0] / name) as tar:
            assert {member.mtime for member in tar} == {0}


def test_random_weights_are_said_where_a_program_looks(built):
    info = read_info(open_storage(built[0]))
    assert info.notes["encoders"] == info.text_sets["default"].notes["encoders"] == "random weights"
    assert info.totals["accepted"] == 9


def test_the_dataset_verifies_and_nothing_is_left_over(built):
    assert not verify(open_storage(built[0]), "deep").problems
    assert not [name for name in files_of(built[0]) if "tmp" in name]
    assert not list(built[0].glob(".tmp*"))


def test_another_port_and_other_decoders_give_the_same_tars(built, demo_corpus, tmp_path):
    """The URLs in the records name another port, another server answers there, four decoders work instead of two."""
    from preprocess.demo.corpus import BASE_URL
    from preprocess.demo.server import served
    from preprocess.pipeline import build_shards

    corpus = tmp_path / "corpus"
    shutil.copytree(demo_corpus, corpus)
    with served(corpus) as url:
        write_corpus(corpus, base_url=url, with_base=False)
        assert url != BASE_URL and url in (corpus / "video/batch_0001/3338987.json").read_text()
        engine = {"decoders": 4, "max_queue_mib": 1}
        build_shards(prep(corpus, tmp_path / "again", engine=engine), quiet=True)
    tars = files_of(built[0], "**/*.tar")
    assert len(tars) == 7  # three units of latents, three of text, the null embeddings
    assert files_of(tmp_path / "again", "**/*.tar") == tars


def test_a_finished_build_does_nothing_again(copy, demo_corpus):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    counts = build(demo_corpus, copy)
    assert counts["accepted"] == 9
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_lost_units_are_done_again_to_the_byte(built, copy, demo_corpus):
    for name in ("latents/shard-000001.json", "text/default/shard-000000.json"):
        (copy / name).unlink()
    build(demo_corpus, copy)
    assert files_of(copy, "**/*.tar") == files_of(built[0], "**/*.tar")
    assert not verify(open_storage(copy), "deep").problems


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"shards": {"latent_dtype": "float32"}}, "latent_dtype"),
        ({"window": {"num_frames": 21}}, "window.num_frames"),
        ({"window": {"policy": "start"}}, "transform.window.policy"),
        ({"captions": {"template": "{object}"}}, "templates"),
        ({"captions": {"max_tokens": 100}}, "max_tokens"),
    ],
)
def test_a_changed_identity_is_refused(copy, demo_corpus, sections, field):
    before = files_of(copy)
    with pytest.raises(IdentityMismatch) as caught:
        build(demo_corpus, copy, **sections)
    assert field in str(caught.value)
    assert files_of(copy) == before


def test_other_weights_are_refused(copy, demo_corpus):
    (copy / "latents/shard-000001.json").unlink()
    with pytest.raises(IdentityMismatch, match="weights_sha256"):
        build(demo_corpus, copy, encoders={"random_seed": 1})


def test_recaption_writes_another_set_and_touches_no_latent(copy, demo_corpus):
    before = files_of(copy, "latents/*")
    short = prep(demo_corpus, copy).model_copy(
        update={"captions": CaptionsConfig(template="{semantic}", variants=("{object}",))}
    )
    counts = recaption(short, "short", quiet=True)
    assert counts["text"]["samples"] == 9 and counts["text"]["embeddings"] == 18
    assert files_of(copy, "latents/*") == before
    assert set(read_info(open_storage(copy)).text_sets) == {"default", "short"}
    dataset = open_dataset([str(copy)], text_set="short")
    assert {dataset.text_meta(sample.key)["captions"][0] for sample in dataset.samples} == {
        "차분하고 고른 움직임이 이어지는 느낌을 준다."
    }
    default = open_dataset([str(copy)])
    assert dataset.identity_digest == default.identity_digest
    assert dataset.text_identity_digest != default.text_identity_digest
    assert not np.array_equal(dataset.null_text("empty"), dataset.null_text("negative"))


def test_a_template_without_words_gives_the_empty_caption_and_says_so(copy, demo_corpus):
    silent = prep(demo_corpus, copy).model_copy(update={"captions": CaptionsConfig(template="{speech}")})
    recaption(silent, "speech", quiet=True)
    dataset = open_dataset([str(copy)], text_set="speech")
    meta = dataset.text_meta(0)
    assert meta["captions"] == [""] and meta["refused"].startswith("no-caption")
    assert np.array_equal(dataset.text(0), dataset.null_text("empty"))


def test_recaption_needs_latents(demo_corpus, tmp_path):
    with pytest.raises(UserError, match="no finished latents"):
        recaption(prep(demo_corpus, tmp_path / "empty"), "short")


def test_an_empty_dataset_says_why(demo_corpus, tmp_path):
    with pytest.raises(UserError, match=r"fetch-host-refused"):
        build(demo_corpus, tmp_path / "none", fetch={"allow_hosts": ["cdn.example"]})


def test_text_alone_is_what_the_encoder_gives(built, demo_corpus):
    from preprocess.encoders.encoders import load_text_encoder, load_tokenizer

    config = prep(demo_corpus, built[0]).encoders
    encoder = load_text_encoder(config, load_tokenizer(config))
    dataset = open_dataset([str(built[0])])
    caption = dataset.text_meta(0)["captions"][0]
    assert "다." in caption
    assert np.array_equal(dataset.text(0), encoder.embed(caption))


def test_a_window_without_a_caption_is_a_row(demo_corpus, tmp_path):
    """Captions of the last two seconds only; the window is at the start: nothing is trained without words."""
    corpus = tmp_path / "corpus"
    (corpus / "video").mkdir(parents=True)
    record = json.loads((demo_corpus / "video/batch_0001/3338988.json").read_text())
    record["labeling_data_info"]["caption_info"] = {
        "object_level": [{"text": "끝에만 있는 말이다.", "tc_in": "00:00:04:00", "tc_out": "00:00:06:00"}]
    }
    record["source_data_info"]["ai_generated_info"]["scene_description_auto"] = []
    (corpus / "video/3338988.json").write_text(json.dumps(record))
    shutil.copy(demo_corpus / "media/3338988.mp4", corpus / "video/3338988.mp4")
    with pytest.raises(UserError, match="caption/no-caption"):
        build(corpus, tmp_path / "out", window={"policy": "start"})
    (row,) = ledger_rows(tmp_path / "out")
    assert (row.stage, row.reason, row.windows[0].reason) == ("caption", "no-caption", "no-caption")
    assert row.attempts == 0 and row.bytes > 0  # it lay beside its JSON


def test_real_footage_becomes_samples(tmp_path):
    """The user's own files through `--clip`: nobody here made them."""
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    clips = [footage("bigbuckbunny.mp4"), footage("bikes.mp4")]
    write_corpus(corpus, clips, with_base=False)
    for path in (corpus / "video/batch_0001").glob("3*.json"):
        path.unlink()
    counts = build(corpus, output, window={"max_windows": 2})
    assert counts["accepted"] == 2 and counts["samples"] == 4
    dataset = open_dataset([str(output)])
    assert {sample.clip_id for sample in dataset.samples} == {"clip-bigbuckbunny", "clip-bikes"}
    latents = torch.tensor(np.stack([dataset.latent(sample.key) for sample in dataset.samples]).astype(np.float32))
    assert latents.isfinite().all() and latents.std() > 0.1
    for sample in dataset.samples:
        assert dataset.meta(sample.key)["declared"] == {"width": None, "height": None, "fps": None, "seconds": None}


def _wait_for(path: Path, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_drops_the_open_unit_cleanly(demo_corpus, tmp_path, number, code):
    output = tmp_path / "out"
    process = start_build(demo_corpus, output, tmp_path / "config.yaml")
    _wait_for(output / "latents/shard-000000.json", process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert ("the same command continues" if number == signal.SIGINT else "the next run does it again") in said
    assert not list(output.glob(".tmp*")) and not [name for name in files_of(output) if "tmp" in name]


def test_no_secret_of_a_url_is_kept_or_told(demo_corpus, tmp_path):
    """A signed query in the annotation itself: not in a ledger, a shard, dataset.json, nor on the terminal."""
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    (corpus / "video").mkdir(parents=True)
    for clip, query in (("3338987", ""), ("3338999", "gone.mp4")):
        record = json.loads((demo_corpus / f"video/batch_0001/{clip}.json").read_text())
        record["source_data_info"]["clip_proxy_url"] += f"{query}?Signature=hush-hush"
        (corpus / f"video/{clip}.json").write_text(json.dumps(record))
    shutil.copytree(demo_corpus / "media", corpus / "media")
    process = start_build(corpus, output, tmp_path / "config.yaml")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "fetch-404" in said and "hush" not in said
    for row in ledger_rows(output):
        assert "hush" not in row.model_dump_json()
    for name, data in files_of(output).items():
        assert b"hush" not in data, name


def test_a_dataset_of_an_older_transform_grows_no_more_and_says_so(copy, demo_corpus):
    storage = open_storage(copy)
    info = read_info(storage)
    older = {**info.identity, "transform": {"version": 1, "window": {"num_frames": 17, "policy": "captions"}}}
    storage.put("dataset.json", seal_document(info.model_copy(update={"identity": older}).model_dump(mode="json")))
    (copy / "latents/shard-000001.json").unlink()
    before = files_of(copy)
    for grow in (build, lambda corpus, output: retry(prep(corpus, output), ALL, quiet=True)):
        with pytest.raises(IdentityMismatch) as caught:
            grow(demo_corpus, copy)
        said = str(caught.value)
        assert "transform.version: there 1, expected 2" in said and "recaptioned" in said
        assert "policy" not in said, "only the version is named"
        assert files_of(copy) == before


def test_a_plan_keeps_the_thresholds_that_it_was_frozen_with(copy, demo_corpus):
    """They are in no identity: another one neither refuses the dataset nor changes what is planned already."""
    before = files_of(copy, "**/*.tar")
    (copy / "latents/shard-000001.json").unlink()
    build(demo_corpus, copy, window={"min_motion": 1.0}, buckets={"min_kept_share": 1.0})
    assert files_of(copy, "**/*.tar") == before
    (generation,) = open_plan(open_storage(copy)).generations
    assert generation.choices == {
        "window.num_frames": 17, "window.min_motion": 0.0001, "window.max_black_share": 0.999,
        "buckets.min_kept_share": 0.5,
    }  # fmt: skip


def test_every_window_is_measured_in_its_row_and_its_sample(built):
    dataset = open_dataset([str(built[0])])
    rows = {window.key: window for row in ledger_rows(built[0]) for window in row.windows}
    for sample in dataset.samples:
        measured = dataset.meta(sample.key)["measured"]
        assert measured == rows[sample.key].measured
        assert measured["motion"] > 0 and measured["black_share"] < 0.999 and 0.5 <= measured["kept_share"] <= 1


@pytest.fixture(scope="module")
def mixed(demo_corpus, tmp_path_factory):
    """Windows of 29 or 33 frames: the same clips as TINY's."""
    output = tmp_path_factory.mktemp("mixed") / "shards"
    build(demo_corpus, output, **MIXED)
    return output


MIXED = TINY | {"window": {"num_frames": [33, 29], "policy": "captions", "max_windows": 2}}


def test_a_dataset_of_several_lengths_has_the_identity_of_one(mixed, demo_corpus):
    dataset, info = open_dataset([str(mixed)]), read_info(open_storage(mixed))
    counts = Counter(sample.frames for sample in dataset.samples)
    assert counts.keys() == {29, 33}
    assert [bucket.frames for bucket in info.buckets] == [29, 29, 33, 33]
    for sample in dataset.samples:
        assert dataset.latent_shape(sample.key)[1] == (sample.frames - 1) // 4 + 1
        assert f"-{sample.frames}-" in sample.key
        assert dataset.text(sample.key).shape[0] > 0
    (generation,) = open_plan(open_storage(mixed)).generations
    assert generation.choices["window.num_frames"] == (29, 33)
    assert not verify(open_storage(mixed), "deep").problems
    before = files_of(mixed)
    summary = build(demo_corpus, mixed, **MIXED)
    by_frames = Counter(sample.frames for sample in dataset.samples)
    for frames, count in by_frames.items():
        assert sum(n for name, n in summary["buckets"].items() if name.endswith(f"×{frames}")) == count
    assert files_of(mixed) == before

    for lengths in (29, [29]):
        one = prep(demo_corpus, mixed, **(MIXED | {"window": {**MIXED["window"], "num_frames": lengths}}))
        assert transform_identity(one) == info.identity["transform"]
        assert frozen_choices(one)["window.num_frames"] == 29, "a list of one length is that length"
    with pytest.raises(IdentityMismatch, match=r"window\.num_frames: there \[29,33\], expected 97"):
        build(demo_corpus, mixed, **(MIXED | {"window": {**MIXED["window"], "num_frames": 97}}))


def test_tags_are_read_from_the_plan_that_stage_1_froze(mixed):
    storage = open_storage(mixed)
    planned = {candidate.record.clip_id: candidate.record.keywords for candidate in open_plan(storage).candidates()}
    assert clip_tags(storage) == {clip: words for clip, words in planned.items() if words} != {}


def test_a_later_generation_may_have_other_lengths(mixed, demo_corpus, tmp_path):
    """New records are frozen with the lengths of their time; what was built stays."""
    grown = shutil.copytree(mixed, tmp_path / "grown")
    before = files_of(grown, "latents/*.tar")
    build(demo_corpus, grown, **(MIXED | {"window": {**MIXED["window"], "num_frames": 25}, "corpus": {"limit": 8}}))
    plan, info = open_plan(open_storage(grown)), read_info(open_storage(grown))
    assert [generation.choices["window.num_frames"] for generation in plan.generations] == [(29, 33), 25]
    assert [bucket.frames for bucket in info.buckets] == [29, 29, 33, 33, 25, 25]
    assert before.items() < files_of(grown, "latents/*.tar").items()
    assert Counter(sample.frames for sample in open_dataset([str(grown)]).samples).keys() == {29, 33, 25}


def test_the_plan_counts_windows_of_each_length(mixed, demo_corpus):
    config = prep(demo_corpus, mixed, **MIXED)
    counts = count_plan(open_plan(open_storage(mixed)), config)
    made = Counter(str(sample.frames) for sample in open_dataset([str(mixed)]).samples)
    assert all(counts["windows_by_length"][frames] >= count for frames, count in made.items())
    assert any(line.endswith("  29") for line in describe_plan(counts))
    hardware = Hardware(find_gpu("v100-32gb"), 1, 1000.0, 8)
    one = prep(demo_corpus, mixed, **(MIXED | {"window": {**MIXED["window"], "num_frames": 33}}))
    plan = open_plan(open_storage(mixed))
    long, short = (forecast(plan, each, count_plan(plan, each), hardware, len) for each in (one, config))
    assert 0 < short["disk_bytes"]["latents"] / short["samples"] < long["disk_bytes"]["latents"] / long["samples"]
