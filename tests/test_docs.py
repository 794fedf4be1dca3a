"""The documents say what the program does: generated references, commands that parse, messages, links."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from preprocess.cli.main import main as wanprep
from preprocess.config import PrepConfig
from shards.cli import main as wanshards
from shards.config import load_config
from train.cli.main import main as wantrain
from train.cli.sample_commands import SampleRun
from train.config.train import TrainConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "README.ko.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = {"wanprep": wanprep, "wanshards": wanshards, "wantrain": wantrain}
CONFIGS = {
    "wanprep": PrepConfig,
    "fit": TrainConfig,
    "plan": TrainConfig,
    "doctor": TrainConfig,
    "show-step": TrainConfig,
    "sample": SampleRun,
}
# Commands that `test_the_documents_commands_run` runs after the tutorial's: as they stand, or with the small corpus'
# paths in place of a real one's.
RUN = {
    "wantrain report demo/run": None,
    "wantrain report demo/run --json": None,
    "wantrain show-clip demo/run *@0-17-*": "wantrain show-clip demo/run '*@0-17-*'",
    "wanshards show demo/shards KEY --preview strip.jpg": (
        "wanshards show demo/shards $(wanshards ls demo/shards --keys | head -n 1) --preview strip.jpg"
    ),
    "wantrain sample configs/demo/sample.yaml -o sampler.steps=50": None,
    "wanprep decode demo/samples/image-to-video.safetensors video.mp4 -c configs/demo/prep.yaml": None,
    "wanprep embed 바닷가를 걷는 사람 A market at night --out prompts.safetensors -c configs/mbc_832x480.yaml": (
        "wanprep embed '바닷가를 걷는 사람' 'A market at night' --out prompts.safetensors -c configs/demo/prep.yaml"
    ),
    "wanprep encode-image still.jpg first.safetensors --width 832 --height 480 -c configs/mbc_832x480.yaml": (
        "wanprep encode-image still.jpg first.safetensors --width 832 --height 480 -c configs/demo/prep.yaml"
    ),
    "wantrain export RUN lora-16.safetensors --dtype float16 --licence CC BY-NC 4.0": (
        "wantrain export demo/run lora-16.safetensors --dtype float16 --licence 'CC BY-NC 4.0'"
    ),
    "wantrain export RUN at-500.safetensors --step 500": "wantrain export demo/run at-200.safetensors --step 200",
    "wantrain export RUN shared/lora.safetensors --card": "wantrain export demo/run shared/lora.safetensors --card",
    "wantrain lora convert lora.safetensors for-musubi.safetensors --format musubi": (
        "wantrain lora convert demo/run/lora.safetensors for-musubi.safetensors --format musubi"
    ),
    "wantrain evaluate demo/run": None,
    "wantrain evaluate demo/run demo/shards --against theirs.safetensors": (
        "wantrain evaluate demo/run demo/shards --against for-musubi.safetensors"
    ),
    "wantrain evaluate theirs.safetensors demo/shards -c configs/demo/train.yaml": (
        "wantrain evaluate for-musubi.safetensors demo/shards -c configs/demo/train.yaml"
    ),
    "wantrain sample configs/demo/sample.yaml --compare -o output=demo/compared": (
        "wantrain sample configs/demo/sample.yaml --compare -o output=demo/compared -o sampler.steps=2"
    ),
    "wanprep decode --watch demo/compared --once -c configs/demo/prep.yaml": None,
    "wantrain lora info lora-16.safetensors": None,
    "wantrain merge /models/Wan2.2-TI2V-5B lora.safetensors /models/merged --layout diffusers --dtype bfloat16": (
        "wantrain merge demo/base/model.safetensors demo/run/lora.safetensors merged --layout diffusers"
        " --dtype bfloat16"
    ),
    "wantrain unmerge /models/merged lora.safetensors /models/base-again": (
        "wantrain unmerge merged demo/run/lora.safetensors base-again"
    ),
    "wanprep scan configs/mbc_832x480.yaml -o corpus.location=/data/mbc": (
        "wanprep scan configs/mbc_832x480.yaml -o corpus.location=demo/corpus -o encoders.checkpoint=null"
    ),
    "wanshards verify /data/shards": "wanshards verify demo/shards",
    "wanprep plan configs/mbc_832x480.yaml -o corpus.location=/data/mbc -o output=/data/shards": (
        "wanprep plan configs/mbc_832x480.yaml -o corpus.location=demo/corpus -o output=data/shards"
    ),
    "wanprep plan configs/mbc_832x480.yaml -o corpus.location=/data/mbc -o output=/data/shards"
    " --gpu v100-32gb --gpus 2": (
        "wanprep plan configs/mbc_832x480.yaml -o corpus.location=demo/corpus -o output=data/shards"
        " --gpu v100-32gb --gpus 2"
    ),
    "wanprep status configs/mbc_832x480.yaml -o corpus.location=/data/mbc -o output=/data/shards": (
        "wanprep status configs/mbc_832x480.yaml -o corpus.location=demo/corpus -o output=data/shards"
    ),
    "wantrain plan configs/ti2v_5b_8xh100.yaml --gpu h100 --gpus 8": None,
    "wantrain doctor": "wantrain doctor || test $? = 1",  # 1: it found something, such as no GPU
    # A project over a few clips and a small checkpoint in the official layout; the run is cut to twenty steps.
    "wanprep init trial --corpus clips": None,
    "wanprep init project --corpus clips --checkpoint /models/Wan2.2-TI2V-5B --gpu h200": (
        "wanprep init project --corpus clips --checkpoint models/Wan2.2-TI2V-5B --gpu h200"
    ),
    "wanprep scan project/prep.yaml": None,
    "wanprep plan project/prep.yaml --gpu h200": None,
    "wanprep plan project/prep.yaml --probe 50": None,
    "wanprep build-shards project/prep.yaml": None,
    "wanprep status project/prep.yaml": None,
    "wanprep retry project/prep.yaml --reason fetch-timeout": None,
    "wanshards verify project/shards": None,
    "wantrain fit project/train.yaml": "wantrain fit project/train.yaml -o max_steps=20",
}
# What else a command would need, by a mark in it; its options and its config's keys are checked all the same.
NEEDS = {
    "/models/": "the published checkpoint, 34 GB",
    "/data/": "the real corpus, or shards of it",
    "configs/ti2v_5b_": "the published checkpoint and a GPU",
    "configs/mbc_": "the published encoders and the real corpus",
    "--watch": "watches until Ctrl-C; tests/preprocess/test_decode_latents.py runs it",
}


def _commands(path, with_make=False):
    """Commands of a document's shell blocks, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [" ".join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and (with_make or line.startswith(tuple(PROGRAMS)))]


ALL_COMMANDS = sorted({(path.name, line) for path in DOCUMENTS for line in _commands(path)})


def _generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/reference/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli", "config"])
def test_the_reference_is_what_the_program_says(name):
    written = (ROOT / "docs/reference" / f"{name}.md").read_text(encoding="utf-8")
    assert written == getattr(_generator(), f"{name}_text")(), "run: python docs/reference/generate.py"


def test_the_list_of_folders_is_what_the_files_say():
    written = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert written == _generator().architecture_text(), "run: python docs/reference/generate.py"


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_source_file_that_a_document_names_is_there(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:preprocess|shards|train|tests|configs)/[\w/.-]+\.(?:py|yaml|sh)\b", text)
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize(("document", "line"), ALL_COMMANDS, ids=[f"{d}: {c[:60]}" for d, c in ALL_COMMANDS])
def test_every_command_in_the_documents_parses_and_its_config_loads(document, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = next(
        shlex.split(one, comments=True)
        for path in DOCUMENTS if path.name == document
        for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for one in block.splitlines() if " ".join(shlex.split(one, comments=True)) == line
    )  # fmt: skip
    command = PROGRAMS[program]
    # As under its group: click keeps the help option that a command was first asked for.
    context = click.Context(command, info_name=program, **command.context_settings)
    path = []
    while isinstance(command, click.Group):
        assert words, f"{line}: a group without a command"
        path.append(words[0])
        assert words[0] in command.commands, f"{line}: no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(path[-1], list(words), parent=context)
    config = context.params.get("config")
    cls = CONFIGS.get(program) or CONFIGS.get(path[-1])
    # A project's configs are written by `init`, which `test_the_documents_commands_run` types.
    if config is not None and cls is not None and Path(config).parts[0] != "project":
        load_config(cls, config, context.params.get("overrides", ()))


def test_the_korean_readme_has_the_same_commands():
    english, korean = (_commands(ROOT / name, with_make=True) for name in ("README.md", "README.ko.md"))
    assert korean == english


def test_every_command_is_run_by_a_test_or_needs_what_tests_lack():
    run = {*_tutorial(), *RUN}
    for document, line in ALL_COMMANDS:
        if line not in run:
            assert any(mark in line for mark in NEEDS), f"{document}: {line}: nothing runs it; see RUN and NEEDS"
    documented = {line for _, line in ALL_COMMANDS}
    assert not set(RUN) - documented, "RUN lists what no document says"
    assert all(any(mark in line for line in documented - run) for mark in NEEDS), "NEEDS lists what is not needed"


# Command lines of other programs: by their beginning, why no test runs them as they stand.
OTHERS = {
    "make ": "CI runs `make lint` and `make test`; the others take minutes, or a GPU",
    "python3 -m venv": "CI and tests/test_wheel.py make environments",
    ". .venv/bin/activate": "it changes the user's shell",
    "pip install": "a network; tests/test_wheel.py installs the wheel",
    ".venv/bin/pip install": "a network; tests/test_wheel.py installs the wheel",
    ".venv/bin/python -m pytest": "the tests themselves",
    "WRITE_GOLDEN=1 ": "it would write the golden losses",
    "sbatch ": "Slurm; tests/train/test_many.py runs the script; parsed below",
    "srun ": "Slurm",
    "LOCAL_WORLD_SIZE": "Slurm; the second line of `srun`",
    "export ": "it changes the user's shell",
}


def _others():
    """Command lines of other programs, in blocks of any kind."""
    first = "|".join(
        sorted({re.escape(mark.split()[0]) for mark in OTHERS} | {"docker", "kubectl", "sky", "hf", "git"})
    )
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:sh|text|)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if re.match(rf"\s*(?:{first})(?:[ =]|$)", line):
                    yield path.name, line.strip()


def test_every_line_of_another_program_has_a_reason_and_names_what_there_is():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    seen = set()
    for document, line in _others():
        marks = [mark for mark in OTHERS if line.startswith(mark)]
        assert marks, f"{document}: {line}: neither run nor listed in OTHERS"
        seen |= set(marks)
        words = [] if line.startswith(("srun", "LOCAL_WORLD")) else shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, f"{document}: {line}"
        for name in re.findall(r"\[([\w,]+)\]", line) if "pip install" in line else ():
            assert set(name.split(",")) <= extras, f"{document}: {line}"
        assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "configs/"))), line
        if words[:1] == ["sbatch"]:
            place = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
            wantrain.commands["fit"].make_context("fit", words[place + 1 :])
    assert seen == set(OTHERS), "OTHERS lists what no document says"


def _tutorial():
    """The tutorial's commands on the small corpus."""
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8").split("## On the real corpus")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {" ".join(shlex.split(line, comments=True)): line for line in "".join(blocks).splitlines()}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_documents_commands_run(tmp_path):
    from PIL import Image
    from small_checkpoint import write_checkpoint

    from preprocess.demo.media import Media, make_media

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.new("RGB", (832, 480), "navy").save(tmp_path / "still.jpg")
    (tmp_path / "clips").mkdir()
    for number in range(6):
        make_media(tmp_path / "clips", Media(f"{number}.mp4", 96, 64, "25", 1.0, number))
        (tmp_path / f"clips/{number}.txt").write_text(f"A coloured shape number {number}.")
    write_checkpoint(tmp_path / "models/Wan2.2-TI2V-5B")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in (*_tutorial().values(), *(stand_in or line for line, stand_in in RUN.items())):
        shell = ["sh", "-c", line]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for made in ("samples/text-to-video.mp4", "prompts.safetensors", "lora-16.safetensors", "merged/transformer"):
        assert (tmp_path / "demo" / made).exists(), made
    for made in (
        "project/run/lora.safetensors",
        "demo/run/report.html",
        "first.safetensors",
        "for-musubi.safetensors",
        "merged/transformer",
    ):
        assert (tmp_path / made).exists(), made


def test_quoted_messages_are_the_programs():
    source = "\n".join(path.read_text(encoding="utf-8") for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    rows = re.findall(r"^\| (`.+?`[^|]*) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for quoted in (piece for row in rows for piece in re.findall(r"`([^`]+)`", row)):
        for part in quoted.split(" … "):
            assert part in source, f"no message says {part!r}"


PACKAGES = ("shards", "preprocess", "train")


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


ARCHAIC = re.compile(r"\b(mend|mends|mended|mending|anew|gone on with|hush|hushed|dealt|(?<!`)owed)\b", re.IGNORECASE)


def test_nothing_that_a_user_reads_uses_archaic_words():
    """Messages, help and docstrings (every string of the code), the documents, and the comments of configs."""
    found = []
    for path in [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and ARCHAIC.search(node.value):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ARCHAIC.search(node.value)[0]}")
    texts = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "Makefile"]
    texts += [path for path in (ROOT / "configs").rglob("*.*") if path.is_file()]
    for path in texts:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := ARCHAIC.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found


def test_the_korean_tutorial_has_the_commands_of_the_english_one():
    assert _commands(ROOT / "docs/tutorial.ko.md") == _commands(ROOT / "docs/tutorial.md")


def test_the_index_of_decisions_lists_every_page_with_its_title_date_and_status():
    folder = ROOT / "docs/decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for path in sorted(folder.glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        number, title = re.match(r"# (\d{3})\. (.+)\n", text).groups()
        date, status = re.search(r"^Date: (\S+)$", text, re.M)[1], re.search(r"^Status: (.+)$", text, re.M)[1]
        assert path.name.startswith(number)
        row = f"[{number}]({path.name}) | {title} | {date} | {status} |"
        assert row in index, row
