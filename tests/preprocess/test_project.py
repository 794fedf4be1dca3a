"""`wanprep init`: from a folder of clips to a LoRA by three commands, with no line edited."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from prep_runs import prep
from small_checkpoint import DIMS, write_checkpoint

from preprocess.build.text_pass import _caption_identity
from preprocess.cli.main import main
from preprocess.config import CaptionsConfig, CorpusConfig
from preprocess.corpus.layouts import CorpusLayout
from preprocess.corpus.records import Caption, Record
from preprocess.demo.media import Media, make_media
from preprocess.project.choose import choose, fitting_sizes
from preprocess.project.survey import ClipShape, Survey, survey_corpus
from preprocess.text.captions import compose_all
from shards.format.keys import is_validation


def make_clips(folder: Path, number: int, width: int = 96, height: int = 64) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(number):
        # Some clips are portrait: both shapes get a size.
        size = (width, height) if n % 4 else (height, width)
        make_media(folder, Media(f"clip-{n:02d}.mp4", *size, "25", 1.0 + 0.2 * (n % 3), n % 6))
        (folder / f"clip-{n:02d}.txt").write_text(f"A coloured shape number {n} moves. The background is dark.")
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def type_commands(told: str, cwd: Path) -> None:
    """Run the two commands that `init` printed, as printed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in told.partition("next:")[2].split("\n"):
        if line.strip():
            shell = ["sh", "-c", line]
            done = subprocess.run(shell, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_a_folder_of_clips_becomes_a_lora_by_three_commands(tmp_path):
    told = run("init", tmp_path / "project", "--corpus", make_clips(tmp_path / "clips", 8), "--quiet")
    assert told.exit_code == 0, told.output
    assert "folder, because of its first 8 clips 8 have a .txt" in told.output
    type_commands(told.output, tmp_path)
    assert (tmp_path / "project/run/lora.safetensors").exists()
    held_out = (tmp_path / "project/run/held_out.jsonl").read_text().splitlines()
    assert len(held_out) > 1


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_fifty_clips_and_a_checkpoint_in_the_official_layout(tmp_path):
    clips, checkpoint = make_clips(tmp_path / "clips", 50), write_checkpoint(tmp_path / "model")
    told = run("init", "project", "--corpus", clips, "--checkpoint", checkpoint, "--gpu", "rtx4090", "--quiet")
    assert told.exit_code == 0, told.output
    train = yaml.safe_load(Path("project/train.yaml").read_text())
    assert train["model"] == {"checkpoint": str(checkpoint)} and train["max_steps"] >= 500
    type_commands(told.output, Path.cwd())
    assert Path("project/run/lora.safetensors").exists()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_the_configs_fit_the_checkpoint_and_the_card(tmp_path):
    clips, checkpoint = make_clips(tmp_path / "clips", 8), tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"text_len": DIMS.text_len}))
    words = ["--corpus", clips, "--quiet", "--gpus", "2"]
    told = run("init", "trial", *words, "--gpu", "v100-32gb")
    assert told.exit_code == 0, told.output
    assert "GiB on each of 2 × v100-32gb" in told.output and "for stage 1 (encoding)" in told.output
    assert "wantrain fit" in told.output and "--nproc-per-node 2" in told.output
    prep, train = (yaml.safe_load(Path("trial", name).read_text()) for name in ("prep.yaml", "train.yaml"))
    assert prep["corpus"] == {"location": str(clips), "format": "folder"}
    assert prep["buckets"]["sizes"] == [{"width": 96, "height": 64}, {"width": 64, "height": 96}]
    assert prep["window"]["num_frames"] == 21 and train["optim"]["name"] == "adamw8bit"
    assert train["data"]["global_batch"] % 2 == 0 and train["data"]["root"] == prep["output"]
    told = run("init", "real", *words, "--checkpoint", checkpoint)
    assert told.exit_code == 0, told.output
    assert yaml.safe_load(Path("real/prep.yaml").read_text())["captions"]["max_tokens"] == DIMS.text_len


def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path):
    clips = make_clips(tmp_path / "clips", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "done").mkdir()
    (tmp_path / "done/prep.yaml").write_text("mine")
    package = Path(__file__).parents[2] / "preprocess"
    for words, message in (
        ((tmp_path / "done", "--corpus", clips), "exists already"),
        ((package / "project/mine", "--corpus", clips), "is inside the source package"),
        ((clips, "--corpus", clips), "is within the corpus"),
        ((tmp_path / "new", "--corpus", clips, "--checkpoint", tmp_path / "none"), "no such folder"),
        ((tmp_path / "new", "--corpus", clips, "--gpu", "rtx409"), "did you mean rtx4090"),
        ((tmp_path / "new", "--corpus", tmp_path / "empty"), "walk.txt"),
        ((tmp_path / "new", "--corpus", clips, "-o", "corpus.caption_sufix=.cap"), "did you mean caption_suffix"),
        ((tmp_path / "new", "--corpus", clips, "-o", "corpus.caption_suffix=.cap"), "1 × sieve/no-caption"),
    ):
        told = run("init", *words, "--quiet")
        assert told.exit_code == 2 and message in told.output, told.output
    assert not (tmp_path / "new").exists() and (tmp_path / "done/prep.yaml").read_text() == "mine"


def survey(shapes: list[ClipShape], num_clips: int = 50, **changes: object) -> Survey:
    ids = tuple(f"{n}.mp4" for n in range(num_clips))
    found = Survey(CorpusLayout("folder", ""), num_clips, {}, ids, tuple(shapes), True, {}, (), False, False)
    return found._replace(**changes)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1920, 1080), (1280, 704)), ((853, 480), (832, 480)), ((480, 853), (480, 832)), ((700, 700), (608, 608))],
)
def test_sizes_enlarge_nothing(shape, size):
    sizes = fitting_sizes(survey([ClipShape(*shape, 5.0)] * 10))[0]
    assert [(each.width, each.height) for each in sizes.buckets] == [size] and sizes.max_upscale == 1.0


def test_a_batch_fits_the_rarest_size_and_short_clips_shorten_the_window():
    shapes = [ClipShape(853, 480, 1.0)] * 9 + [ClipShape(480, 853, 1.5)]
    found = survey(shapes, 100)
    choice = choose(found, fitting_sizes(found)[0], 1)
    assert (choice.num_frames, choice.global_batch, choice.max_seconds) == (21, 4, 30.0)
    assert choice.min_seconds <= choice.num_frames / 24 < choice.min_seconds + 0.01
    # Of twenty clips one is held out, and some are refused when they are decoded: sixteen would then be too many.
    few = survey([ClipShape(853, 480, 2.0)], 20)
    assert choose(few, fitting_sizes(few)[0], 1).global_batch == 8


@pytest.mark.parametrize(("num_clips", "num_gpus"), [(1, 4), (3, 2), (5, 8), (100, 64), (100, 8)])
def test_a_few_clips_are_trained_on_as_many_gpus_as_they_fill_a_batch_for(num_clips, num_gpus):
    found = survey([ClipShape(853, 480, 2.0)], num_clips)
    choice = choose(found, fitting_sizes(found)[0], num_gpus)
    assert 1 <= choice.num_gpus <= num_gpus and choice.global_batch % choice.num_gpus == 0
    assert choice.global_batch <= max(1, choice.num_samples - choice.num_held_out)
    assert choice.num_gpus == min(num_gpus, max(1, choice.num_samples // 2))


def test_commands_are_printed_as_they_can_be_typed(tmp_path):
    clips = make_clips(tmp_path / "my clips", 2)
    told = run("init", "a project", "--corpus", clips, "--gpus", "4", "--quiet")
    assert told.exit_code == 0, told.output
    commands = [shlex.split(line) for line in told.output.partition("next:")[2].splitlines() if line.strip()]
    assert commands == [["wanprep", "build-shards", "a project/prep.yaml"], ["wantrain", "fit", "a project/train.yaml"]]
    assert "GPUs       1 of 4: about 2 samples are too few for more" in told.output
    assert "random weights, small: a trial" in told.output
    comment = Path("a project/prep.yaml").read_text().splitlines()
    assert [line for line in comment if "build-shards" in line] == [
        f"#   wanprep build-shards '{Path.cwd()}/a project/prep.yaml'"
    ]


@pytest.mark.parametrize("num_clips", [2, 5, 33, 100, 3000])
def test_at_least_one_clip_is_held_out_and_stays(num_clips):
    found = survey([ClipShape(853, 480, 5.0)], num_clips)
    choice = choose(found, fitting_sizes(found)[0], 1)
    sides = {clip_id for clip_id in found.clip_ids if is_validation(clip_id, choice.validation_fraction)}
    assert 1 <= len(sides) < num_clips and len(sides) == choice.num_held_out
    assert choose(survey([], 1), fitting_sizes(survey([], 1))[0], 1).validation_fraction == 0.0


def test_a_survey_of_a_table_says_its_hosts(tmp_path):
    path = tmp_path / "t.csv"
    rows = ["url,text,width,height,seconds", "http://127.0.0.1:1/a.mp4,x,1920,1080,9"]
    path.write_text("\n".join([*rows, "http://127.0.0.1:1/c.mp4,x,640,480,3"]))
    found = survey_corpus(CorpusConfig(location=str(path)))
    assert found.hosts == ("127.0.0.1",) and not found.is_probed and found.unread_by == {"fetch/fetch-connection": 2}
    assert sorted(shape.width for shape in found.shapes) == [640, 1920]


CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_scan_needs_no_checkpoint(tmp_path):
    clips = make_clips(tmp_path / "clips", 2)
    told = run("scan", CONFIGS / "mbc_832x480.yaml", "-o", f"corpus.location={clips}", "--quiet")
    assert told.exit_code == 0, told.output
    assert "checkpoints/Wan2.2-TI2V-5B is not here" in told.output and "caption tokens, a sample of 2" in told.output


def test_a_plan_is_read_at_80_columns(tmp_path, monkeypatch):
    clips = make_clips(tmp_path / "clips", 1)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
    words = ["-o", f"corpus.location={clips}", "-o", f"output={tmp_path / 'shards'}", "--gpu", "h200", "--quiet"]
    told = run("plan", CONFIGS / "demo/prep.yaml", *words)
    assert told.exit_code == 0 and "assumed" in told.output
    assert not [line for line in told.stdout.splitlines() if len(line) > 80]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("captions.template={object}", "put it in quotes: -o 'captions.template=\"{object}\"'"),
        ("buckets.sizes=[832x480]", "a size is written {width: 832, height: 480}"),
        (f"output={CONFIGS.parent / 'shards' / 'mine'}", "is inside the source package"),
        ("corpus.columns={pth: a}", "did you mean path?"),
    ],
)
def test_mistakes_are_told_with_the_remedy(tmp_path, override, message):
    clips = make_clips(tmp_path / "clips", 1)
    told = run("plan", CONFIGS / "demo/prep.yaml", "-o", f"corpus.location={clips}", "-o", override, "--quiet")
    assert told.exit_code == 2 and message in told.output, told.output


def test_a_config_of_the_other_stage_is_recognised():
    told = run("plan", CONFIGS / "demo/train.yaml")
    assert told.exit_code == 2 and "this is a config of `wantrain`" in told.output and "unknown" not in told.output


def test_watching_a_run_without_samples_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("output: run\nsample: null\n")
    told = run("decode", "--watch", tmp_path / "run", "-c", CONFIGS / "demo/prep.yaml")
    assert told.exit_code == 2 and "makes no samples" in told.output and "sample: {" in told.output


def test_a_trigger_word_is_before_every_caption_and_in_the_identity():
    record = Record(clip_id="a", source="a", object=(Caption(text="A man walks. He stops."),))
    count = {"count_tokens": lambda text: len(text.split()) + 1}
    plain, prefixed = CaptionsConfig(), CaptionsConfig(prefix="sks {x}", variants=("{object}",), max_tokens=6)
    made = compose_all(record, 0, 2, prefixed, *count.values())
    assert made.composed[0].text == "sks {x} A man walks." and made.skipped[0].why == "same-text"
    assert compose_all(record, 0, 2, plain, *count.values()).composed[0].text == "A man walks. He stops."
    config = prep(Path("x"), Path("y"))
    assert _caption_identity(config)["templates"] == [plain.template]
    changed = config.model_copy(update={"captions": prefixed})
    assert _caption_identity(changed)["templates"][1] == "sks {{x}} {object}"
    empty = Record(clip_id="a", source="a")
    assert compose_all(empty, 0, 2, prefixed, *count.values()).reason == "no-caption"
