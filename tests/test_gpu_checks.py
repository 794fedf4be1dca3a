"""`make gpu`: its script runs through on a CPU in every suite, and stage by stage as tests where there is a GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu_checks.py"
STAGES = [
    node.name
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and any("stage(" in ast.unparse(mark) for mark in node.decorator_list)
]
# As on a machine that was given a checkout and torch: none of what only other parts of the project need.
BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {absent!r} else found(name, package)
sys.path = [path for path in sys.path if "__editable__" not in path]
import importlib.metadata
def version(name, found=importlib.metadata.version):
    if name == "wan-broadcast-lora":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
import runpy
sys.argv = ["gpu_checks.py", *{arguments!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def run(*arguments: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    code = BARE.format(absent=set(absent), arguments=list(arguments), script=str(SCRIPT))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd="/")


def test_every_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    """The decorated stages, in their order, each with a result; and results are written as they come."""
    done = run("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is wrong" in done.stdout
    places = [done.stdout.index(f"-- {name} took") for name in STAGES]
    assert len(STAGES) >= 11 and places == sorted(places)
    results = {result["name"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    assert results["decision 058"]["faster"] > 0 and results["fit fp32 adamw"]["status"] == "ok"
    assert {result["status"] for result in results.values()} == {"ok", "skipped"}


def test_a_bare_checkout_runs_what_it_can(tmp_path: Path) -> None:
    """No installed project, no encoders, no S3, no test tools: what is absent is said, and the rest runs."""
    absent = ("boto3", "webdataset", "diffusers", "transformers", "peft", "bitsandbytes", "av", "pytest", "ftfy")
    done = run("--tiny", "--out", str(tmp_path), "--only", "kernels,fit,vae,optimizers", absent=absent)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["name"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    assert results["fit fp32 adamw"]["status"] == "ok" and "exported: True" in results["fit fp32 adamw"]["text"]
    assert results["vae"]["text"] == "no module diffusers, transformers"
    assert results["optimizers"]["status"] == "skipped"


def test_a_stage_that_fails_costs_no_other_and_the_exit_says_so(tmp_path: Path) -> None:
    done = run("--tiny", "--out", str(tmp_path), "--only", "plain_block,facts", absent=("train",))
    assert done.returncode == 1 and "to look at: plain_block" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["name"] for result in results if result["status"] == "FAILED"] == ["plain_block"]
    assert any(result["name"] == "torch" for result in results)


def test_what_is_missing_is_named_with_the_way_to_bring_it_without_a_network(tmp_path: Path) -> None:
    done = run("--tiny", "--out", str(tmp_path), absent=("zstandard", "rich"))
    assert done.returncode == 2 and "not installed: zstandard rich" in done.stdout and "--no-index" in done.stdout


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_finds_nothing_wrong_on_this_gpu(stage: str, tmp_path: Path) -> None:
    done = run("--only", stage, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
