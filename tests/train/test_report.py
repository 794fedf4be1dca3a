"""`wantrain report`: a run's numbers and its page, whole, cut short, long, odd; in a real browser."""

import html
import json
import logging
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from browser import (
    DESKTOP,
    PHONE,
    accessibility_problems,
    browser,
    console,
    open_page,
    prefer,
    requests,
    scrolls_sideways,
)
from click.testing import CliRunner
from train_runs import make_config

from shards.console import LOG
from shards.errors import UserError
from shards.files.tensor_files import read_latent_file, write_latent
from shards.read.dataset import open_dataset
from train.cli.main import main
from train.doctor.tables import describe_slots
from train.loop import fit
from train.report import page
from train.report.curves import hard_samples, look_up_levels, smooth, thin
from train.report.page import summarise, write_run_report
from train.report.read_run import read_history, read_run, read_steps
from train.run.events import EVENTS_FILE, write_event

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
JPEG, MP4 = b"\xff\xd8\xff picture ", b"video "


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory):
    """Stopped after six steps and resumed; evaluated, sampled."""
    folder = tmp_path_factory.mktemp("report") / "run"

    def config(steps):
        return make_config(
            tiny_shards, folder, max_steps=steps, eval={"num_clips": 2, "every_steps": 3},
            sample={"every_steps": 6, "prompts": [{"name": "sea", "key": "*"}], "sampler": {"steps": 1}},
        )  # fmt: skip

    level = LOG.level
    LOG.setLevel(logging.INFO)  # as the command does
    fit(config(6))
    fit(config(12))
    LOG.setLevel(level)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def _page(folder, **options):
    out = folder / "report.html"
    write_run_report(read_run(folder), out, **options)
    return out.read_text(encoding="utf-8")


def test_the_numbers_are_the_runs(run):
    found = read_run(run)
    levels = look_up_levels(found.steps, found.config)
    summary = summarise(found, levels)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [json.loads(line)["mean"] for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert summary["step"] == 12
    assert summary["samples_seen"] == 48
    assert summary["loss"] == lines[-1]["loss"]
    assert summary["tokens_seen"] == sum(line["tokens"] for line in lines)
    names = ("first", "last", "best")
    assert [summary[f"held_out_{name}"] for name in names] == [
        held_out[0],
        held_out[-1],
        min(held_out),
    ]
    events = [(event["what"], event["step"]) for event in summary["events"]]
    assert events == [("began", 0), ("finished", 6), ("resumed", 6), ("finished", 12)]
    assert summary["planned_gib"] > 0
    assert summary["checkpoints"][-1].endswith("step-0000012")
    result = CliRunner().invoke(main, ["report", str(run), "--json"])
    assert json.loads(result.stdout) == json.loads(json.dumps(summary))


def test_noise_level_and_mode_are_what_the_step_drew(run):
    """They are looked up, not recorded: as `show-step` says them."""
    found = read_run(run)
    slots, levels = found.steps.slots, look_up_levels(found.steps, found.config)
    for step in (1, 7, 12):
        for drawn in describe_slots(found.config, step):
            (row,) = np.flatnonzero((slots.step == step) & (slots.slot == drawn["slot"]))
            assert found.steps.keys[slots.key[row]] == drawn["key"]
            (place,) = np.flatnonzero(levels.rows == row)
            assert ("i2v" if levels.image_to_video[place] else "t2v") == drawn["mode"]
            u = levels.quantile[place]
            assert 5 * u / (1 + 4 * u) == pytest.approx(drawn["sigma"])


def test_curves_keep_their_extremes():
    rng = np.random.default_rng(0)
    y = rng.normal(size=10_000)
    y[[17, 5_000, 9_998]] = 50, -40, math.nan
    curve = thin(np.arange(10_000.0), y)
    assert len(curve.x) <= 400
    assert curve.x == sorted(curve.x)
    assert (max(curve.y), min(curve.y)) == (50, -40)
    assert curve.y[curve.x.index(17)] == 50
    assert thin(np.arange(3.0), np.array([1.0, math.nan, 2.0])).x == [0, 1, 2]
    assert all(math.isnan(value) for value in thin(np.arange(1000.0), np.full(1000, math.nan)).y)
    assert smooth(np.arange(4.0), np.array([1.0, 3.0, math.nan, 5.0]), 2).y == [2, 5]


def test_the_hardest_samples_are_those_hard_for_their_noise(copy):
    """One sample's losses tripled: it leads, and the others are not said to be hard."""
    path = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    victim = lines[0]["keys"][0]
    many = []
    for step in range(1, 801):  # a long run from a short one
        line = dict(lines[step % 12], step=step)
        rng = np.random.default_rng(step)
        losses = rng.uniform(0.9, 1.1, len(line["keys"]))
        line["slot_losses"] = [
            float(x) * (3 if key == victim else 1) for x, key in zip(losses, line["keys"], strict=True)
        ]
        many.append(json.dumps(line))
    path.write_text("\n".join(many) + "\n")
    found = read_run(copy)
    first, second, *_ = hard_samples(found.steps, look_up_levels(found.steps, found.config), 5)
    assert first.key == victim
    assert first.ratio > 2
    assert second.ratio < 1.2
    assert first.worst_step in [line["step"] for line in map(json.loads, many) if victim in line["keys"]]


def test_a_half_written_last_line_is_left_for_later_and_a_bad_one_is_named(copy):
    whole = summarise(read_run(copy), look_up_levels(read_steps(copy), read_run(copy).config))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    with (copy / "held_out.jsonl").open("a") as file:
        file.write('{"step"')
    found = read_run(copy)
    assert summarise(found, look_up_levels(found.steps, found.config)) == whole
    with (copy / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 13"):
        read_run(copy)
    result = CliRunner().invoke(main, ["report", str(copy)])
    assert result.exit_code == 2


def test_no_run_and_a_run_without_steps(tmp_path, copy):
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no run: it has no config.yaml" in result.output
    for name in ("metrics.jsonl", "held_out.jsonl", "events.jsonl"):
        (copy / name).unlink()
    assert "No step is finished yet" in _page(copy)


def test_a_command_on_the_page_can_be_typed():
    run = SimpleNamespace(folder=Path("my run"), states=[], history=SimpleNamespace(events=[]))
    assert "wantrain fit 'my run/config.yaml'" in html.unescape(str(page._resume(run)))


def test_a_run_of_an_earlier_version_has_no_losses_by_slot(copy):
    path = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "slot_losses"}) + "\n" for line in lines))
    assert "has no losses by slot" in _page(copy)


def test_what_went_wrong_stands_at_the_top(copy):
    path = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3] |= {"overflow": "blocks.1", "grad_norm": None, "loss": None, "loss_scale": 512.0}
    lines[5]["substituted"] = [["bad@0-1-96x160", lines[5]["keys"][0]]]
    for line in lines:
        line["data_wait_seconds"] = line["seconds"] / 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    notes = write_run_report(read_run(copy), copy / "report.html")
    words = " ".join(notes)
    for expected in ("1 update was skipped", "blocks.1", "not a finite number in 1 step.", "1 sample could not be",
                     "50 % of the time went into waiting"):  # fmt: skip
        assert expected in words
    text = (copy / "report.html").read_text()
    assert "bad@0-1-96x160" in text


def test_the_history_is_read_from_the_events_and_not_from_the_log(copy):
    (copy / "logs/rank-0.log").unlink()
    with (copy / "events.jsonl").open("a") as file:
        for line in (
            {"event": "waiting", "step": 12, "what": "get x", "reason": "503", "seconds": 9.1, "is_over": True},
            {"event": "stop", "step": 12, "reason": "signal", "signal": 15},
        ):
            file.write(json.dumps({"time": "2026-01-01T00:00:00+00:00", **line}) + "\n")
        file.write('{"event": "st')  # a kill in the middle of a line
    history = read_history(copy)
    assert history.device.startswith("cpu")
    assert history.base.startswith("random weights")
    assert history.planned_gib > 0
    assert [event.what for event in history.events[-2:]] == [
        "waited for storage for 9 s: get x",
        "stopped by signal 15",
    ]
    write_event(copy, "checkpoint", 12, path="after the kill")
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines[-3:]] == ["waiting", "stop", "checkpoint"]
    with (copy / "events.jsonl").open("a") as file:
        file.write('{"event": "stop", "step": "many", "time": ""}\n')
    with pytest.raises(UserError, match=rf"events\.jsonl, line {len(lines) + 1}"):
        read_history(copy)
    (copy / "events.jsonl").unlink()
    assert "The run has no events.jsonl" in " ".join(write_run_report(read_run(copy), copy / "report.html"))


def test_pictures_are_inside_within_the_budget_and_linked_beyond(copy, tmp_path):
    videos = []
    for latent in sorted((copy / "samples").glob("step-*/*.safetensors")):
        latent.with_suffix(".jpg").write_bytes(JPEG + latent.parent.name.encode())
        latent.with_suffix(".mp4").write_bytes(MP4 * 20_000)
        videos.append(latent.with_suffix(".mp4"))
    (copy / "samples/contact-sheet.jpg").write_bytes(JPEG)
    text = _page(copy, open_data=False)
    assert text.count("data:image/jpeg;base64") == len(videos) - 1
    assert text.count("data:video/mp4;base64") == 1  # the newest
    text = _page(copy, open_data=False, budget_bytes=100_000)
    assert text.count("data:image/jpeg;base64") == len(videos)
    assert "data:video" not in text
    assert 'href="samples/step-0000012/sea.mp4"' in text
    text = _page(copy, open_data=False, budget_bytes=0)
    assert "data:image" not in text
    write_run_report(read_run(copy), tmp_path / "elsewhere" / "page.html", budget_bytes=0, open_data=False)
    assert 'href="../run/samples/step-0000012/sea.mp4"' in (tmp_path / "elsewhere/page.html").read_text()


def test_the_samples_side_by_side_are_the_first_thing_of_the_page(copy):
    (copy / "samples/side-by-side.mp4").write_bytes(MP4 * 10_000)
    text = _page(copy, open_data=False)
    assert text.count("data:video/mp4;base64") == 1 and 'class="wide"' in text
    first = re.search(r'<section[^>]* id="(\w+)"', text)[1]
    assert first == "pictures"
    assert "data:video" not in _page(copy, open_data=False, budget_bytes=0)
    assert 'href="samples/side-by-side.mp4"' in text


def test_a_dataset_that_is_gone_is_said_and_hides_nothing_else(copy):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["root"] = str(copy / "nowhere")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    text = _page(copy)
    assert "the dataset could not be opened" in text
    assert "typical" in text


@pytest.mark.timeout(600)
def test_in_a_browser_the_page_is_whole_and_foreign_markup_is_text(copy, tmp_path):
    newest = copy / "samples/step-0000012/sea.safetensors"
    latent = read_latent_file(newest)
    write_latent(newest, latent.values, {**latent.facts, "prompt": EVIL})
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines()
    key = json.loads(lines[0])["keys"][0]
    odd = json.loads(lines[-1])
    odd |= {"keys": [EVIL, *odd["keys"][1:]], "overflow": EVIL, "slot_losses": [99.0, *odd["slot_losses"][1:]]}
    path.write_text("\n".join([*lines[:-1], json.dumps(odd)]) + "\n")
    out = copy / "report.html"
    write_run_report(read_run(copy), out, num_hard=6)
    with browser(tmp_path) as driver:
        for dark, size in ((False, DESKTOP), (True, PHONE)):
            prefer(driver, dark=dark)
            open_page(driver, out, size)
            assert driver.title.startswith("Training run")
            assert driver.find_element("css selector", "#hard li h3").text == f"1 · {EVIL}"
            assert driver.find_element("css selector", "#pictures .prompt").text == EVIL
            assert EVIL in driver.find_element("css selector", "#memory > .scroll table").text
            assert not scrolls_sideways(driver)
            assert driver.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert len(driver.find_elements("css selector", "#hard img")) == 5  # the forged key has no strip
            assert accessibility_problems(driver) == []
        assert console(driver) == []
        assert requests(driver) == []
        heading = driver.find_elements("css selector", "section h2")
        assert [h.text for h in heading][:3] == ["Sampled videos", "Overview", "Loss"]
    assert open_dataset(read_run(copy).config.data.root).ordinal(key) >= 0


CLIPPED = """
return [...document.querySelectorAll('svg.chart')].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter((text) => {
    const at = text.getBoundingClientRect();
    const wide = at.left < frame.left - .5 || at.right > frame.right + .5;
    return wide || at.top < frame.top - .5 || at.bottom > frame.bottom + .5;
  }).map((text) => `${svg.getAttribute('aria-label')}: ${text.textContent}`);
});
"""
ROWS = """
return [...document.querySelectorAll('.charts, .hard, .facts')].map((group) => {
  const rows = {};
  for (const card of group.children) { const top = Math.round(card.offsetTop / 4); rows[top] = (rows[top] ?? 0) + 1; }
  return Object.values(rows);
});
"""
POINTED = """
const svg = document.querySelector('#loss svg.chart'), at = svg.getBoundingClientRect();
const place = {clientX: at.left + .6 * at.width, clientY: at.top + 50, bubbles: true};
svg.dispatchEvent(new PointerEvent('pointermove', place));
return document.querySelector('.values').textContent;
"""


@pytest.mark.timeout(300)
def test_labels_are_complete_rows_are_full_and_values_are_under_the_pointer(copy, tmp_path):
    """On a desktop and on a phone; a run that was resumed at its last steps has its mark at the right edge."""
    events = [json.loads(line) for line in (copy / EVENTS_FILE).read_text().splitlines()]
    late = [{**event, "step": 11} if event["event"] == "resume" else event for event in events]
    (copy / EVENTS_FILE).write_text("".join(json.dumps(event) + "\n" for event in late))
    write_run_report(read_run(copy), tmp_path / "run.html")
    with browser(tmp_path) as driver:
        for size in (DESKTOP, PHONE):
            open_page(driver, tmp_path / "run.html", size)
            assert driver.execute_script(CLIPPED) == [] and not scrolls_sideways(driver)
            if size == DESKTOP:
                assert [rows for rows in driver.execute_script(ROWS) if sum(rows) > 1 and 1 in rows] == []
            at, *values = driver.execute_script(POINTED).split("\n")
            assert re.fullmatch(r"step \d+", at) and re.fullmatch(r"each step: \d\.\d+", values[0])
            step = int(at.split()[1])
            lines = map(json.loads, (copy / "metrics.jsonl").read_text().splitlines())
            losses = {line["step"]: line["loss"] for line in lines}
            assert float(values[0].split()[-1]) == pytest.approx(losses[step], rel=1e-3)
        assert not console(driver)
    text = (tmp_path / "run.html").read_text()
    assert text.count(">resumed</text>") >= 4
    never = [event for event in events if event["event"] != "resume"]
    (copy / EVENTS_FILE).write_text("".join(json.dumps(event) + "\n" for event in never))
    write_run_report(read_run(copy), tmp_path / "run.html")
    assert ">resumed</text>" not in (tmp_path / "run.html").read_text()


def test_from_a_clip_to_its_steps_and_back(run):
    """As the steps themselves say which samples they train on."""
    found = read_run(run)
    drawn = {step: describe_slots(found.config, step) for step in range(1, 13)}
    key = drawn[3][0]["key"]
    result = CliRunner().invoke(main, ["show-clip", str(run), key, "--json"])
    uses = [(use["step"], use["slot"], use["mode"]) for use in json.loads(result.stdout)]
    assert uses == [(n, s["slot"], s["mode"]) for n, slots in drawn.items() for s in slots if s["key"] == key]
    assert (
        f"step       3  slot   0  {drawn[3][0]['mode']}"
        in CliRunner().invoke(main, ["show-clip", str(run), key]).output
    )
    assert len(json.loads(CliRunner().invoke(main, ["show-clip", str(run), "*", "--json"]).stdout)) == 48
    result = CliRunner().invoke(main, ["show-clip", str(run), "nothing"])
    assert result.exit_code == 2
    assert "no step of" in result.output


def test_a_samples_strip_is_written(tiny_shards, tmp_path):
    from shards.cli import main as wanshards
    from shards.show.member import member_bytes

    key = open_dataset(tiny_shards).samples[0].key
    result = CliRunner().invoke(wanshards, ["show", str(tiny_shards), key, "--preview", str(tmp_path / "strip.jpg")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "strip.jpg").read_bytes() == member_bytes(str(tiny_shards), f"{key}.preview.jpg")
    result = CliRunner().invoke(wanshards, ["show", str(tiny_shards), key, "--preview", str(tmp_path / "no/strip.jpg")])
    assert result.exit_code == 2


@pytest.mark.slow
def test_ten_thousand_steps_make_a_page_of_a_few_megabytes(copy):
    path = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for step in range(1, 10_001):
            line = dict(lines[step % 12], step=step)
            line["loss"] = 77.0 if step == 4321 else float(rng.uniform(0.5, 1.5))
            line["keys"] = [f"{key}" for key in line["keys"]] * 4
            line["slot_losses"] = rng.uniform(0.5, 1.5, len(line["keys"])).round(5).tolist()
            file.write(json.dumps(line) + "\n")
    evaluations = (copy / "held_out.jsonl").read_text().splitlines()
    with (copy / "held_out.jsonl").open("w") as file:
        for step in range(0, 10_001, 50):
            file.write(json.dumps({**json.loads(evaluations[-1]), "step": step}) + "\n")
    text = _page(copy)
    assert len(text.encode()) < 3 << 20
    assert "77" in text  # the spike
