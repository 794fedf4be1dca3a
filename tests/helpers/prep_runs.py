"""Builds in small: a config over the demo corpus, the files of a dataset, a build in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from preprocess.config import PrepConfig
from preprocess.demo.server import served
from shards.config import validate_config

ROOT = Path(__file__).parents[2]


TINY: dict[str, dict[str, Any]] = {
    "corpus": {"limit": 6}, "shards": {"unit_size": 2}, "window": {"num_frames": 5},
    "buckets": {"sizes": [{"width": 64, "height": 32}, {"width": 32, "height": 64}]},
}  # fmt: skip
"""Three units of two candidates, good and bad, which are encoded in no time."""


def prep_values(corpus: Path, output: Path, /, **sections: Any) -> dict[str, Any]:
    """A config as plain values: the demo's, one window a clip, small units."""
    values = yaml.safe_load((ROOT / "configs/demo/prep.yaml").read_text())
    values |= {"output": str(output), "corpus": {"location": str(corpus)}}
    values["window"] |= {"max_windows": 1}
    values["shards"] |= {"unit_size": 4}
    values["fetch"] |= {"attempts": 1, "timeout_seconds": 10.0}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def prep(corpus: Path, output: Path, /, **sections: Any) -> PrepConfig:
    return validate_config(PrepConfig, prep_values(corpus, output, **sections), origin="test")


def build(corpus: Path, output: Path, /, *, part: Any = None, **sections: Any) -> dict[str, Any]:
    """Build in this process (or `part` of it), the corpus served on a free port."""
    from preprocess.demo.corpus import BASE_URL
    from preprocess.pipeline import WHOLE, build_shards

    with served(corpus) as url:
        sections["fetch"] = {"mirrors": {BASE_URL: url}, **sections.get("fetch", {})}
        return build_shards(prep(corpus, output, **sections), quiet=True, part=part or WHOLE)


def files_of(root: Path, pattern: str = "**/*") -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob(pattern)) if path.is_file()}


def start_build(corpus: Path, output: Path, config: Path, /, **sections: Any) -> subprocess.Popen[str]:
    """`wanprep build-shards` in a process of its own."""
    config.write_text(yaml.safe_dump(prep_values(corpus, output, **sections), allow_unicode=True))
    command = [sys.executable, "-m", "preprocess.cli", "build-shards", str(config), "--serve", str(corpus)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
