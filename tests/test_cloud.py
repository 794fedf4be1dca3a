"""The container, the SkyPilot file and the Kubernetes job, as far as they can be checked without those services."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from shards.config import load_config
from train.cli.main import main as wantrain
from train.config.train import TrainConfig

ROOT = Path(__file__).parents[1]
CLOUD = ROOT / "configs/cloud"
SKY = yaml.safe_load((CLOUD / "fit.sky.yaml").read_text())
JOB = yaml.safe_load((CLOUD / "fit.k8s.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]


def _instructions():
    text = re.sub(r"\\\n", " ", (CLOUD / "Dockerfile").read_text())
    return [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]


def _fit(words):
    """The config that `wantrain fit …` would load; the words are parsed by the command itself."""
    assert words[0].endswith("wantrain") and words[1] == "fit"
    words = [re.sub(r"\$\w+", "s3://bucket", word).removeprefix("/opt/wan-lora/") for word in words[2:]]
    context = wantrain.commands["fit"].make_context(
        "fit", words, parent=click.Context(wantrain, **wantrain.context_settings)
    )
    return load_config(TrainConfig, ROOT / context.params["config"], context.params["overrides"])


def test_the_job_and_the_sky_file_train_with_a_config_that_loads():
    container = POD["containers"][0]
    config = _fit([*container["command"], *container["args"]])
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for path in (config.model.checkpoint, config.data.root, config.output):
        assert any(path.startswith(mount + "/") for mount in mounts)
    assert {volume["name"] for volume in POD["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    sky = _fit(shlex.split(SKY["run"].strip().removeprefix("exec ")))
    assert any(sky.output.startswith(mount + "/") for mount in SKY["file_mounts"])
    assert SKY["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"  # MOUNT knows neither append nor random writes
    used = set(re.findall(r"\$\{?(\w+)\}?", SKY["run"] + str(SKY["file_mounts"])))
    assert used - {"HOME", "SKYPILOT_NUM_GPUS_PER_NODE"} == set(SKY["envs"])


def test_an_eviction_leaves_time_for_the_checkpoint_and_a_mistake_is_not_tried_again():
    grace = load_config(TrainConfig, ROOT / "configs/ti2v_5b_8xh100.yaml").parallel.grace_seconds
    assert POD["terminationGracePeriodSeconds"] > grace
    assert POD["restartPolicy"] == "Never"  # podFailurePolicy demands it
    assert JOB["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    copied = {word for name, rest in _instructions() if name == "COPY" for word in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert {"preprocess", "shards", "train", "configs", "pyproject.toml", "setup.py", "constraints.txt"} <= copied
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    runs = " ".join(rest for name, rest in _instructions() if name == "RUN")
    for text in (runs, SKY["setup"]):
        asked = re.search(r"\.\[([\w,]+)\]", text)[1]
        assert set(asked.split(",")) <= extras.keys()
    arguments = {rest.split("=")[0] for name, rest in _instructions() if name == "ARG"}
    assert arguments == {"PYTHON", "CUDA", "TORCH_INDEX"}


@pytest.mark.parametrize(("cuda", "code"), [("", 0), ("99.9", 1)])
def test_the_image_is_refused_with_a_torch_of_another_cuda(cuda, code):
    """The line of the Dockerfile that compares, run here."""
    check = next(rest for name, rest in _instructions() if name == "RUN" and "python -c" in rest).split("&&")[1]
    words = [word if word != "$CUDA" else cuda for word in shlex.split(check)]
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert bool(code) == ("not 99.9" in done.stderr)
