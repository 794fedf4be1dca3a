"""No single clip ends a build: what goes wrong unexpectedly in one clip is a row, and the build continues."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
from prep_runs import TINY, build, prep, start_build

from preprocess.build import clip as parts
from preprocess.build import worker
from preprocess.build.summary import count_dataset
from preprocess.demo.corpus import BASE_URL
from preprocess.demo.server import served
from preprocess.encoders import encoders
from preprocess.plan.plan import open_plan
from preprocess.rejection import Rejection
from shards.console import LOG
from shards.errors import UserError
from shards.format.commit import committed_units, read_commit
from shards.format.ledger import LedgerRow, read_ledger
from shards.format.names import LATENTS, text_kind
from shards.storage import open_storage

STAGES = {
    "fetch": (parts.Fetcher, "fetched"),
    "probe": (parts, "probe_clip"),
    "bucket": (parts, "choose_bucket"),
    "window": (parts, "choose_windows"),
    "caption": (parts, "compose_all"),
    "decode": (parts, "decode_window"),
    "preview": (parts, "preview_strip"),
    "encode": (encoders.VaeEncoder, "encode"),
    "store": (parts, "store_latent"),
    "write": (parts, "sample_key"),
}
ROW_STAGES = {"preview": "decode", "store": "encode", "write": "encode"}


def rows_of(output: Path) -> list[LedgerRow]:
    storage = open_storage(output)
    rows = []
    for unit in sorted(committed_units(storage, "latents")):
        ledger = read_commit(storage, "latents", unit).commit.ledger
        assert ledger is not None
        rows += read_ledger(storage.get(ledger.name))
    return rows


def raise_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, times: int = 1) -> None:
    """The first `times` calls of `owner.name` raise; the others do what they did."""
    real, left = getattr(owner, name), [error] * times

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if left:
            raise left.pop()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("stages", [list(STAGES)[:5], list(STAGES)[5:]], ids=["first", "last"])
def test_an_exception_in_any_stage_of_one_clip_costs_one_row(
    demo_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stages: list[str],
) -> None:
    """Each stage fails once, and so each in another clip."""
    for stage in stages:
        raise_once(monkeypatch, *STAGES[stage], ZeroDivisionError("see http://a/b?Signature=hush"))
    monkeypatch.setattr(LOG, "propagate", True)
    with caplog.at_level(logging.ERROR):
        counts = build(demo_corpus, tmp_path / "out", **{**TINY, "corpus": {"limit": 11}})
    assert counts["internal_errors"] == 5 and counts["accepted"] >= 3 and counts["waiting"] == 0
    rows = [row for row in rows_of(tmp_path / "out") if row.reason == "internal-error"]
    assert sorted(str(row.stage) for row in rows) == sorted(ROW_STAGES.get(stage, stage) for stage in stages)
    for row in rows:
        assert row.retryable and "ZeroDivisionError in " in str(row.detail) and str(tmp_path) not in str(row.detail)
        assert row.clip_id in caplog.text
    said = {record.getMessage() for record in caplog.records}  # a handler of another test may say it twice
    assert sum(message.count("Traceback") for message in said) == 5 and "hush" not in caplog.text


def test_a_start_before_the_clip_s_zero_is_a_row_at_most(
    demo_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer refuses a sample with a user's error; that must not end the build either."""
    raise_once(monkeypatch, parts, "sample_key", UserError("start_ms is -80"))
    assert build(demo_corpus, tmp_path / "out", **TINY)["internal_errors"] == 1


def test_a_full_disk_and_a_user_s_mistake_still_end_the_build(
    demo_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, error in enumerate((OSError(errno.ENOSPC, "No space left"), UserError("no ffmpeg on this machine"))):
        with monkeypatch.context() as patch:
            raise_once(patch, parts, "decode_window", error)
            with pytest.raises(UserError, match=r"no space left|no ffmpeg"):
                build(demo_corpus, tmp_path / f"out{number}", **TINY)


def test_ten_in_a_row_stop_the_build_and_nine_do_not() -> None:
    def row(reason: str) -> LedgerRow:
        return LedgerRow(
            candidate=0, clip_id="c", source="c.json", status="rejected", stage="decode", reason=reason, detail="d",
            retryable=True, attempts=1, windows=(), seconds={}, bytes=0,
        )  # fmt: skip

    def count_all(reasons: list[str]) -> None:
        count = worker.ErrorsInARow()
        for reason in reasons:
            count.add("c", row(reason))

    count_all([*["internal-error"] * 9, "no-frames", *["internal-error"] * 9])
    with pytest.raises(UserError, match="10 clips in a row"):
        count_all(["internal-error"] * 10)
    texts = worker.ErrorsInARow()  # those of the text pass have no row
    for _ in range(9):
        texts.add("c", Rejection("text", "internal-error", "d"))
    texts.add("c", None)
    texts.add("c", Rejection("text", "internal-error", "d"))


def test_an_exception_in_a_text_costs_its_unit_until_the_next_run(
    demo_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its caption was composed and counted in the first pass: what fails here is the machine, and is tried again."""
    output, more_units = tmp_path / "out", {**TINY, "shards": {"unit_size": 2}}
    real, texts = encoders.TextEncoder.embed, []

    def embed(encoder: Any, text: str) -> Any:
        texts.append(text)
        if len(texts) == 3:  # after the two null embeddings
            raise ZeroDivisionError
        return real(encoder, text)

    monkeypatch.setattr(LOG, "propagate", True)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"'default': 1 unit has no texts yet") as failure,
        caplog.at_level(logging.ERROR),
    ):
        patch.setattr(encoders.TextEncoder, "embed", embed)
        build(demo_corpus, output, **more_units)
    assert failure.value.exit_code == 1
    assert "internal error in stage text" in caplog.text and "ZeroDivisionError" in caplog.text
    storage, kind = open_storage(output), text_kind("default")
    units, there = committed_units(storage, LATENTS), committed_units(storage, kind)
    assert len(units) > 2 and units - there == {min(units)}
    build(demo_corpus, output, **more_units)
    build(demo_corpus, tmp_path / "undisturbed", **more_units)
    undisturbed = open_storage(tmp_path / "undisturbed")
    for unit in units:
        commits = [read_commit(each, kind, unit).commit for each in (storage, undisturbed)]
        assert commits[0].tar == commits[1].tar


def test_the_command_says_how_many_and_exits_with_1_until_a_retry_helps(
    demo_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    raise_once(monkeypatch, parts, "decode_window", ZeroDivisionError())
    build(demo_corpus, output, **TINY)
    process = start_build(demo_corpus, output, tmp_path / "config.yaml", **TINY)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1, said
    assert "1 clip met an internal error" in said and "Traceback" not in said
    from preprocess.pipeline import retry
    from preprocess.plan.retry import Wanted

    with served(demo_corpus) as url:
        config = prep(demo_corpus, output, **TINY, fetch={"mirrors": {BASE_URL: url}})
        retry(config, Wanted(frozenset({"internal-error"}), False), quiet=True)
    storage = open_storage(output)
    assert count_dataset(storage, open_plan(storage), "default")["internal_errors"] == 0
