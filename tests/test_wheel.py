"""What a user installs: the wheel holds every module of the three packages and every config that ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import importlib, pkgutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
for package in ("preprocess", "shards", "train"):
    root = importlib.import_module(package)
    assert Path(root.__file__).is_relative_to(sys.argv[1]), root.__file__
    print(package)
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        if not found.name.endswith("__main__") and found.name != "shards.configs":
            importlib.import_module(found.name)
            print(found.name)
from shards.config import shipped_configs
for path in sorted(shipped_configs().rglob("*.*")):
    print("config", path.relative_to(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, unpacked without its dependencies, which are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("preprocess", "shards", "train", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(copy)], check=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "installed"), str(wheel)], check=True)
    return folder / "installed"


def test_every_module_and_every_config_is_in_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", SCRIPT, str(unpacked)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    ours = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("preprocess", "shards", "train")
        for path in (ROOT / package).rglob("*.py")
        if path.stem != "__main__"
    }
    configs = {
        f"config shards/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.*")
    }
    assert set(done.stdout.splitlines()) == ours | configs
    assert {path.name for path in (unpacked / "shards/web").iterdir()} == {
        path.name for path in (ROOT / "shards/web").iterdir()
    }
