"""The tree is the architecture: who may import whom, and what never enters a process that trains or prints help."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("preprocess", "shards", "train")
ENCODER_LIBRARIES = {"diffusers", "transformers", "av", "ffmpeg", "sentencepiece", "tokenizers"}


def imported_by(package: str) -> set[str]:
    """Top-level names that any file of `package` imports, at any depth of the code."""
    names: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded in a fresh interpreter after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def every_module(package: str) -> list[str]:
    return [f"{package}.{path.stem}" for path in sorted((ROOT / package).glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize(
    ("package", "strangers"),
    [("shards", ("preprocess", "train")), ("train", ("preprocess",)), ("preprocess", ("train",))],
)
def test_data_flows_one_way(package: str, strangers: tuple[str, ...]) -> None:
    assert not imported_by(package) & set(strangers)


@pytest.mark.parametrize(
    ("package", "strangers"),
    [("shards", ("preprocess", "train")), ("train", ("preprocess",)), ("preprocess", ("train",))],
)
def test_data_flows_one_way_at_run_time(package: str, strangers: tuple[str, ...]) -> None:
    loaded = modules_after("\n".join(f"import {name}" for name in every_module(package)))
    assert not loaded & set(strangers)


def test_training_knows_no_encoder() -> None:
    assert not imported_by("train") & ENCODER_LIBRARIES
    loaded = modules_after("\n".join(f"import {name}" for name in every_module("train")))
    assert "torch" in loaded
    assert not loaded & (ENCODER_LIBRARIES - {"av"})


@pytest.mark.parametrize("package", PACKAGES)
def test_configuration_and_help_import_no_torch(package: str) -> None:
    code = f"from {package}.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not modules_after(code) & {
        "torch",
        "boto3",
        "diffusers",
        "transformers",
        "av",
        "ray",
        "pandas",
        "webdataset",
    }


@pytest.mark.parametrize("package", ("preprocess", "train"))
def test_loading_a_config_imports_no_torch(package: str) -> None:
    assert "torch" not in modules_after(f"import {package}.config")


def test_every_source_file_stays_small() -> None:
    large = {
        str(path.relative_to(ROOT)): path.stat().st_size
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.stat().st_size > 20_000
    }
    assert not large


def test_no_pickle_and_no_unsafe_load() -> None:
    """`weights_only=True`, safe YAML, no pickles: a dataset or a checkpoint from elsewhere must not run code."""
    for package in PACKAGES:
        assert not imported_by(package) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
