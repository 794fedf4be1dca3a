"""The command line as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from train_runs import make_config, read_metrics

from shards.config import dump_config, load_config
from train.cli.main import main
from train.config.train import TrainConfig, run_identity
from train.launch.launch import own_command

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "max_steps:" in path.read_text())


def run(*arguments: str | Path, expect: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def config_file(tiny_shards, tmp_path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(dump_config(make_config(tiny_shards, tmp_path / "run", max_steps=4)))
    return path


def test_fit_show_step_and_doctor(config_file, tmp_path):
    run("fit", config_file, "-o", "max_steps=3")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        slots = json.loads(run("show-step", config_file, line["step"], "--json"))
        assert [slot["key"] for slot in slots] == line["keys"]
        assert sum(slot["mode"] == "i2v" for slot in slots) == line["num_image_to_video"]
        assert all(0 < slot["timestep"] < 1000 for slot in slots)
    assert slots[0]["clip"] in run("show-step", config_file, 3)
    assert any(words in run("doctor", config_file) for words in ("this machine has no GPU", "nothing is wrong"))
    findings = {finding["subject"]: finding for finding in json.loads(run("doctor", config_file, "--json"))}
    assert findings["one step"]["status"] == "ok" and "identity" in findings["text set"]["found"]
    ranges = json.loads(run("doctor", config_file, "--ranges", "--json"))
    assert ranges["blocks.1.ffn.2"] > 0 and "fp16 fits" in run("doctor", config_file, "--ranges")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "optim.learning_rate=1"], ["optim.learning_rate", "unknown key"]),
        (["-o", "data.global_bach=1"], ["data.global_bach", "did you mean global_batch"]),
        (["-o", "max_steps=many"], ["max_steps", "'many'"]),
        (["-o", "data.root=/nowhere"], ["/nowhere", "no dataset here"]),
        (["-o", "data.global_batch=5"], ["data.micro_batch", "expected"]),
        (["-o", "lora.targets=[self_atn]"], ["self_atn", "did you mean"]),
        (["-o", "precision.device=cuda:7"], ["cuda:7"]),
        (["-o", "data.text_set=other"], ["other"]),
        (["-o", "data.revision=abc"], ["abc"]),
        (["-o", "eval={}", "-o", "data.validation_fraction=0.0"], ["validation_fraction"]),
        (["--resume", "/nowhere"], ["no such checkpoint"]),
    ],
)
def test_mistakes_are_told_in_one_message(config_file, arguments, words):
    output = run("fit", config_file, *arguments, expect=2)
    said = re.sub(r"^[0-9:]{8} (loading|opening) .*\n", "", output, flags=re.MULTILINE)
    assert said.startswith("error: ") and all(word in said for word in words), output


def test_doctor_fails_on_a_problem(config_file, tmp_path):
    assert "/nowhere" in run("doctor", config_file, "-o", "data.root=/nowhere", expect=1)
    assert "need a CONFIG" in run("doctor", "--ranges", expect=2)


def test_bitsandbytes_missing_is_an_error_with_the_fix(config_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    output = run("fit", config_file, "-o", "optim.name=adamw8bit", expect=2)
    assert "bitsandbytes" in output and "pip install" in output


def test_wandb_missing_is_an_error_with_the_fix(config_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    output = run("fit", config_file, "-o", "log.wandb_project=x", expect=2)
    assert "wandb" in output and "pip install" in output


def test_sigterm_ends_a_run_of_the_command_with_a_checkpoint(config_file, tmp_path):
    command = [sys.executable, "-m", "train.cli", "fit", str(config_file), "-o", "max_steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads(path):
    config = load_config(TrainConfig, path)
    assert load_config(TrainConfig, path, ["max_steps=7000"]).max_steps == 7000
    assert run_identity(config)["data"]["global_batch"] == config.data.global_batch


def test_training_loads_no_encoder_library(config_file):
    script = (
        "import sys; from train.cli.main import main\n"
        f"main(['fit', {str(config_file)!r}], standalone_mode=False)\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "bad = {'diffusers', 'transformers', 'av', 'ffmpeg', 'preprocess'} & loaded\n"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_password_in_an_endpoint_is_refused_and_not_repeated(config_file):
    result = CliRunner().invoke(
        main, ["fit", str(config_file), "-o", "data.root=s3://b/x?endpoint=http://me:hidden@host:9"]
    )
    assert result.exit_code == 2 and "user or a password" in result.output and "hidden" not in result.output


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_what_an_encoding_cannot_hold_is_escaped(config_file, environment):
    done = subprocess.run(
        own_command(["show-step", str(config_file), "1"]),
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"\\u2013" in done.stdout  # the dash of a window


def test_weights_and_biases_without_a_key_is_one_line(config_file, tmp_path):
    """By a package of that name that refuses as the real one does: it is no dependency of the tests."""
    (tmp_path / "wandb.py").write_text(
        "class Error(Exception): pass\ndef init(**_): raise Error('No API key configured. Use `wandb login`.')\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        own_command(["fit", str(config_file), "-o", "log.wandb_project=x"]), env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "does not start: No API key configured" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("asked", "spins"), [(None, "0"), ("ACTIVE", "30000000000")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(asked, spins):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    done = subprocess.run(
        own_command(["doctor"]), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    # As the library itself read it when torch was imported; 300000 without either.
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
