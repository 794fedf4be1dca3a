"""A benchmark that prints a promise ends with 1 where the promise is broken."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from shards_scale import write_commits

BENCHMARKS = sorted((Path(__file__).parent / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_its_exit_code_is_decided_by_what_it_prints(path: Path) -> None:
    """The last statement hands over what `main` returns, or `main` ends with `sys.exit(BROKEN)` itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    main = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"), None)
    ends = [tree.body[-1].body[-1], *([main.body[-1]] if main is not None else [])]
    calls = [ast.unparse(node) for node in ends]
    assert any(call.startswith(("sys.exit(", "raise SystemExit(")) for call in calls), calls
    if calls[0] == "sys.exit(main())":
        returned = [node.value for node in ast.walk(main) if isinstance(node, ast.Return)]
        assert any(value is not None and not isinstance(value, ast.Constant) for value in returned), "nothing decides"


def _load(name: str) -> ModuleType:
    path = next(path for path in BENCHMARKS if path.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_build_started_again_is_timed() -> None:
    """It stands in for a method of the build; a name that is gone ends it."""
    command = [sys.executable, str(BENCHMARKS[0].with_name("bench_preprocess_restart.py")), "--units", "10"]
    assert "10 units missing" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("image_first", [False, True])
def test_a_block_has_no_more_operators_than_promised(image_first: bool) -> None:
    count = _load("bench_train_counts").count_operators
    for dtype, most in ((torch.float32, 185), (torch.bfloat16, 200)):
        assert 100 < count(4, dtype, image_first) - count(3, dtype, image_first) <= most


def test_an_opening_that_takes_too_long_or_too_much_ends_with_1(tmp_path: Path, monkeypatch, capsys) -> None:
    bench = _load("bench_shards_open")
    write_commits(tmp_path / "shards", 2, 64)
    monkeypatch.setattr(sys, "argv", ["bench_shards_open.py", "million", str(tmp_path / "shards")])
    assert bench.main() == 0
    assert "open_dataset, order and pin with index" in (said := capsys.readouterr().out) and "BROKEN" not in said
    assert bench.PROMISES[True] == {
        "open_dataset, order and pin with index": (float("inf"), 14, 1200),
        "open_dataset, order and pin without index": (float("inf"), 180, float("inf")),
    }
    for name, most in (("with index", bench.Cost(memory=1)), ("without index", bench.Cost(cpu=0.001))):
        broken = {f"{bench.OPENED} {name}": most}
        assert bench.report("one", [sys.executable, "-c", ""], 1, most)
        monkeypatch.setitem(bench.PROMISES, True, broken)
        assert bench.main() == 1
        assert capsys.readouterr().out.count("BROKEN") == 2
