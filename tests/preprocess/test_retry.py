"""`wanprep retry`: it adds, never rewrites, and the latest attempt counts wherever anything is counted."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from prep_runs import TINY, files_of, prep, prep_values

from preprocess.cli.main import main
from preprocess.demo.corpus import BASE_URL
from preprocess.demo.server import served
from preprocess.pipeline import build_shards
from preprocess.pipeline import retry as retry_build
from preprocess.plan.freeze import freeze_plan
from preprocess.plan.plan import open_plan
from preprocess.plan.retry import Wanted
from shards.check.orphans import find_orphans
from shards.check.verify import verify
from shards.cli import main as shards_main
from shards.errors import UserError
from shards.format.commit import committed_units
from shards.format.dataset_info import read_info
from shards.read.dataset import open_dataset
from shards.read.index import write_index
from shards.read.outcomes import read_outcomes
from shards.stats.stats import dataset_stats
from shards.storage import open_storage

CLIPS = ("3338987", "3338988", "3338989", "3338991", "3338993")
GONE = ("3338988", "3338989", "3338991")
FOR_404 = Wanted(frozenset({"fetch-404"}), retryable=False)


@pytest.fixture
def corpus(demo_corpus, tmp_path):
    """Five records; the media of three are not there. `put(clip)` puts one there."""
    folder = tmp_path / "corpus"
    for clip in CLIPS:
        _copy(demo_corpus / f"video/batch_0001/{clip}.json", folder / f"video/{clip}.json")
    (folder / "media").mkdir()
    for clip in set(CLIPS) - set(GONE):
        _copy(demo_corpus / f"media/{clip}.mp4", folder / f"media/{clip}.mp4")
    return folder


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _put(demo_corpus: Path, corpus: Path, clip: str) -> None:
    _copy(demo_corpus / f"media/{clip}.mp4", corpus / f"media/{clip}.mp4")


def _run(work, corpus: Path, output: Path, *arguments, **sections):
    with served(corpus) as url:
        fetch = {"mirrors": {BASE_URL: url}, **sections.pop("fetch", {})}
        config = prep(corpus, output, fetch=fetch, **(TINY | sections))
        return work(config, *arguments, quiet=True)


def _outcomes(output: Path):
    """(clip, unit, status) of the attempts that count, by clip."""
    return sorted(
        (row.clip_id, unit, row.status) for unit, row, is_latest in read_outcomes(open_storage(output)) if is_latest
    )


def test_a_retry_adds_shards_and_the_latest_attempt_counts(demo_corpus, corpus, tmp_path):
    output = tmp_path / "out"
    counts = _run(build_shards, corpus, output)
    assert (counts["accepted"], counts["rejected"], counts["rejected_by"]) == (2, 3, {"fetch/fetch-404": 3})
    sealed = {name: data for name, data in files_of(output).items() if name != "dataset.json"}
    pin = open_dataset(output).pin()

    _put(demo_corpus, corpus, GONE[0])
    first = _run(retry_build, corpus, output, FOR_404)
    assert first.choice.reasons == {"fetch/fetch-404": 3}
    assert (first.counts["accepted"], first.counts["rejected"], first.counts["waiting"]) == (3, 2, 0)
    assert (first.counts["rejected_by"], first.counts["retried"]) == ({"fetch/fetch-404": 2}, 3)

    _put(demo_corpus, corpus, GONE[1])
    second = _run(retry_build, corpus, output, FOR_404)  # a retry of a retry
    assert len(second.choice.ordinals) == 2 and set(second.choice.ordinals) < set(first.choice.ordinals)
    assert (second.counts["accepted"], second.counts["rejected"], second.counts["retried"]) == (4, 1, 5)
    assert second.counts["records"] == 5 == second.counts["accepted"] + second.counts["rejected"]
    assert second.counts["samples"] == second.counts["text"]["samples"] == 4
    funnel = dataset_stats(output)["funnel"]  # another way to the same counts
    assert [funnel[name] for name in ("records", "accepted", "waiting", "samples")] == [5, 4, 0, 4]
    assert (funnel["rejected"] + funnel["refused_before"], funnel["superseded_attempts"]) == (1, 5)

    now = files_of(output)
    assert {name: now[name] for name in sealed} == sealed  # nothing that was there is another
    storage = open_storage(output)
    latest = _outcomes(output)
    assert [clip for clip, _, _ in latest] == sorted(CLIPS)
    assert {clip for clip, _, status in latest if status == "rejected"} == {GONE[2]}
    assert not verify(storage, "deep").problems and not list(find_orphans(storage, -60.0))
    assert read_info(storage).totals["accepted"] == 4
    write_index(storage)
    dataset = open_dataset(output)
    assert sorted(sample.clip_id for sample in dataset.samples) == sorted(set(CLIPS) - {GONE[2]})
    assert all(len(dataset.text(sample.key)) for sample in dataset.samples)
    pinned = open_dataset(output, pin=pin)
    assert len(pinned) == 2 and pinned.revision == pin["revision"] != dataset.revision


def test_a_retry_with_nothing_to_do_says_so_and_what_there_is(demo_corpus, corpus, tmp_path):
    output, path = tmp_path / "out", tmp_path / "config.yaml"
    _run(build_shards, corpus, output)
    path.write_text(yaml.safe_dump(prep_values(corpus, output), allow_unicode=True))
    before = files_of(output)
    told = CliRunner().invoke(main, ["retry", str(path), "--reason", "fetch-timeout", "--quiet"])
    assert told.exit_code == 0, told.output
    assert "no further candidate is rejected for fetch-timeout: nothing to retry" in told.output
    assert "3  fetch/fetch-404 is there" in told.output
    dry = CliRunner().invoke(main, ["retry", str(path), "--reason", "fetch-404", "--dry-run", "--json", "--quiet"])
    assert json.loads(dry.stdout)["retry"]["by_reason"] == {"fetch/fetch-404": 3}
    assert json.loads(dry.stdout)["retry"]["dry_run"] is True
    assert files_of(output) == before
    none = CliRunner().invoke(main, ["retry", str(path)])
    assert none.exit_code == 2 and "--reason CODE, or --retryable" in none.output


def test_a_retry_stopped_half_way_is_gone_on_with(demo_corpus, corpus, tmp_path):
    """The units that were done stay; those that failed again are not taken up a third time by going on."""
    output = tmp_path / "out"
    _run(build_shards, corpus, output)
    _put(demo_corpus, corpus, GONE[0])
    _run(retry_build, corpus, output, FOR_404)
    straight = files_of(output, "**/*.tar")
    for name in ("latents/shard-000004.json", "text/default/shard-000003.json"):
        (output / name).unlink()
    gone_on = _run(retry_build, corpus, output, FOR_404)
    assert (gone_on.choice.open_units, gone_on.choice.ordinals) == ((4,), ())
    assert open_plan(open_storage(output)).num_units == 5
    assert files_of(output, "**/*.tar") == straight
    assert gone_on.counts["waiting"] == gone_on.counts["retries_waiting"] == 0
    assert not verify(open_storage(output), "deep").problems


def test_a_unit_made_anew_after_a_retry_repeats_its_tar(demo_corpus, corpus, tmp_path):
    """Its rejected clip can be had now, and is a sample of the retry: it must not come in twice."""
    output = tmp_path / "out"
    _run(build_shards, corpus, output)
    for clip in GONE:
        _put(demo_corpus, corpus, clip)
    _run(retry_build, corpus, output, FOR_404)
    tars, outcomes = files_of(output, "**/*.tar"), _outcomes(output)
    plan = open_plan(open_storage(output))
    assert [plan.unit_length(unit) for unit in range(plan.num_units)].count(0) == 1  # both of its clips were retried
    assert {status for _, _, status in outcomes} == {"accepted"}
    for unit in (0, 1, 2):
        (output / f"latents/shard-{unit:06d}.json").unlink()
    counts = _run(build_shards, corpus, output)
    assert files_of(output, "**/*.tar") == tars and _outcomes(output) == outcomes
    assert (counts["accepted"], counts["waiting"]) == (5, 0)
    assert len(open_dataset(output)) == 5


def test_records_that_come_after_a_retry_make_a_generation_of_their_own(demo_corpus, corpus, tmp_path):
    output = tmp_path / "out"
    _run(build_shards, corpus, output)
    _put(demo_corpus, corpus, GONE[0])
    _run(retry_build, corpus, output, FOR_404)
    assert _run(build_shards, corpus, output)["records"] == 5  # a retry changes nothing for a plain build
    _copy(demo_corpus / "video/batch_0001/3338994.json", corpus / "video/3338994.json")
    _put(demo_corpus, corpus, "3338994")
    before = files_of(output)
    plan = freeze_plan(open_storage(output), prep(corpus, output, shards={"unit_size": 2}))
    assert [each.num_new for each in plan.generations] == [5, 0, 1] and plan.num_candidates == 6
    counts = _run(build_shards, corpus, output)
    assert (counts["records"], counts["accepted"], counts["waiting"]) == (6, 4, 0)
    after = files_of(output)
    assert all(after[name] == data for name, data in before.items() if name != "dataset.json")
    storage = open_storage(output)
    assert committed_units(storage, "latents") == committed_units(storage, "text/default") == set(range(6))
    assert [gen.num_records for gen in read_info(storage).generations] == [5, 0, 1]
    assert open_plan(storage).unit(5)[0].ordinal == 5
    assert not verify(storage, "deep").problems


def test_a_latent_that_is_not_finite_is_a_row_and_a_retry_fixes_it(demo_corpus, corpus, tmp_path, monkeypatch):
    """The encoder gives a NaN once, and constants always: both are refused with a reason, neither is stored."""
    from preprocess.encoders.encoders import VaeEncoder

    encode, seen = VaeEncoder.encode, []

    def failing(self, frames):
        latent = encode(self, frames)
        seen.append(len(seen))
        if seen[-1] == 0:
            latent[0, 0, 0, 0] = float("nan")
        return latent * 0 if seen[-1] == 1 else latent

    monkeypatch.setattr(VaeEncoder, "encode", failing)
    output = tmp_path / "out"
    for clip in GONE:
        _put(demo_corpus, corpus, clip)
    counts = _run(build_shards, corpus, output)
    assert counts["rejected_by"] == {"encode/latent-constant": 1, "encode/latent-not-finite": 1}
    assert (counts["accepted"], counts["retryable"]) == (3, 1)
    assert not verify(open_storage(output), "deep").problems
    counts = _run(retry_build, corpus, output, Wanted(frozenset(), retryable=True)).counts
    assert counts["rejected_by"] == {"encode/latent-constant": 1} and counts["accepted"] == 4


def test_why_tells_every_attempt_at_a_clip_and_whether_a_retry_helps(demo_corpus, corpus, tmp_path):
    output, path = tmp_path / "out", tmp_path / "config.yaml"
    sieve = {"sieve": {"min_seconds": 4.5}}
    _run(build_shards, corpus, output, **sieve)
    path.write_text(yaml.safe_dump(prep_values(corpus, output, **(TINY | sieve))))

    def why(clip, *arguments):
        result = CliRunner().invoke(main, ["why", clip, str(path), *arguments])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if "--json" in arguments else result.stdout

    rows = {row.clip_id: row for row in open_plan(open_storage(output)).ledger()}
    assert rows  # refused by the plan
    refused = why(next(iter(rows)), "--json")
    assert refused["status"] == "rejected" and refused["attempts"][0]["stage"] == "sieve" and not refused["planned"]
    gone = next(clip for clip in GONE if clip not in rows)
    found = why(gone, "--json")
    assert [attempt["reason"] for attempt in found["attempts"]] == ["fetch-404"] and not found["samples"]
    assert found["planned"]["record"]["clip_id"] == gone and found["planned"]["unit"] == found["attempts"][0]["unit"]
    assert found["retry"]["can_help"] == found["attempts"][0]["retryable"]
    assert "rejected at fetch: fetch-404" in why(gone)

    _put(demo_corpus, corpus, gone)
    _run(retry_build, corpus, output, FOR_404, **sieve)
    found = why(found["source"], "--json")  # by its annotation
    assert [attempt["status"] for attempt in found["attempts"]] == ["rejected", "accepted"]
    assert found["status"] == "accepted" and found["samples"][0]["json"]["decisions"]
    text = why(gone)
    assert "attempt 1" in text and "attempt 2" in text and "decisions." in text and "declared.declared_seconds" in text
    shown = CliRunner().invoke(shards_main, ["show", str(output), gone, "--json"])
    assert json.loads(shown.stdout)["attempts"] == found["attempts"]

    nameless = CliRunner().invoke(main, ["why", "", str(path)])
    assert nameless.exit_code == 2 and "the clip is empty" in nameless.output
    unknown = CliRunner().invoke(main, ["why", "nobody", str(path)])
    assert unknown.exit_code == 2 and "no record of clip 'nobody'" in unknown.output
    unknown = CliRunner().invoke(shards_main, ["show", str(output), "nobody"])
    assert unknown.exit_code == 2 and "wanprep why" in unknown.output


def test_why_tells_what_the_file_of_a_refused_clip_says(corpus, tmp_path):
    """An accepted one has it in its sample."""
    output, path = tmp_path / "out", tmp_path / "config.yaml"
    still = {"window": TINY["window"] | {"min_motion": 1.0}}
    path.write_text(yaml.safe_dump(prep_values(corpus, output, **(TINY | still))))
    with pytest.raises(UserError, match="window/no-motion"):
        _run(build_shards, corpus, output, **still)
    outcomes = [row for _, row, _ in read_outcomes(open_storage(output))]
    row = next(row for row in outcomes if row.reason == "no-motion")
    assert row.facts["codec"] == "h264" and row.facts["decisions"]["matrix"]["ground"]
    assert not row.facts.keys() & {"picture_seconds", "key_seconds", "pictures"}
    said = CliRunner().invoke(main, ["why", row.clip_id, str(path)]).stdout
    assert "probed.codec: h264" in said and "decisions.matrix: {" in said and "decisions.aspect: {" in said
    assert all(row.facts is None for row in outcomes if row.stage == "fetch")


def test_why_of_a_planned_clip_says_that_it_waits(corpus, tmp_path):
    output, path = tmp_path / "out", tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prep_values(corpus, output, **TINY)))
    freeze_plan(open_storage(output), prep(corpus, output, **TINY))
    result = CliRunner().invoke(main, ["why", CLIPS[0], str(path)])
    assert result.exit_code == 0 and "waiting" in result.stdout and "build-shards" in result.stdout
