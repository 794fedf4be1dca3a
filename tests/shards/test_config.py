"""A config is strict: every mistake is named by its dotted key, with the value and what was expected."""

import time
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from shards.config import Config, dump_config, load_config, parse_yaml
from shards.errors import UserError


class Optim(Config):
    """A section."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    name: str | None = None


class Part(Config):
    """An element of a list."""

    width: int


class Run(Config):
    """A whole file."""

    output: str
    steps: int = 10
    optim: Optim = Optim()
    parts: tuple[Part, ...] = ()


@pytest.fixture
def write(tmp_path: Path):
    def write_text(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "1_0e-5"])
def test_every_way_to_write_a_small_number_is_a_number(write, text: str) -> None:
    assert load_config(Run, write(f"output: x\noptim: {{lr: {text}}}")).optim.lr == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("output: x\nstesp: 3", (), ["stesp", "unknown key", "did you mean steps"]),
        ("output: x\noptim: {lrr: 3}", (), ["optim.lrr", "did you mean lr"]),
        ("output: x\nparts: [{width: 1}, {widht: 2}]", (), ["parts.1.widht", "did you mean width"]),
        ("steps: 3", (), ["output", "missing"]),
        ("output: x\nsteps: three", (), ["steps", "'three'", "integer"]),
        ("output: x\nsteps: 3.5", (), ["steps", "3.5", "integer"]),
        ("output: x\nsteps: yes", (), ["steps", "True", "integer"]),
        ("output: x\noptim: {lr: '1e-4'}", (), ["optim.lr", "'1e-4'", "number"]),
        ("output: x\noptim: {lr: .nan}", (), ["optim.lr", "finite"]),
        ("output: x\noptim: {lr: -1.0}", (), ["optim.lr", "-1.0", "greater than 0"]),
        ("output: x\nsteps: 1\nsteps: 2", (), ["'steps' is given twice"]),
        ("output: [", (), ["not valid YAML"]),
        ("- a", (), ["top level is list"]),
        ("output: !!python/object/apply:os.system [ls]", (), ["not valid YAML"]),
        ("output: &a [*a]", (), ["output.0", "holds itself"]),
        ("output: x\noptim: &a {lr: 1.0, name: *a}", (), ["optim.name", "holds itself"]),
        ("output: 2024-01-01", (), ["output: 2024-01-01: a date", "in quotes"]),
        ("output: x\nparts: [{width: 1}, {width: !!binary aGk=}]", (), ["parts.1.width", "bytes"]),
        ("output: x\noptim: {2024-01-01: 1}", (), ["optim", "2024-01-01: a date as a key"]),
        ("output: 2024-13-45", (), ["not valid YAML", "month"]),
        (f"output: {'[' * 5000}", (), ["not valid YAML"]),
        ("output: x", ("optim.name=2024-01-01",), ["optim.name: 2024-01-01"]),
        ("output: x", ("optim.lr",), ["optim.lr", "not an override"]),
        ("output: x", ("steps=2", "steps.a=1"), ["steps is 2"]),
        ("output: x", ("optim.lrr=1",), ["optim.lrr", "did you mean lr"]),
    ],
)
def test_a_mistake_is_named(write, text: str, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Run, write(text), overrides)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_at_once(write) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Run, write("steps: x\noptim: {lr: y, foo: 1}"))
    assert all(key in str(caught.value) for key in ("output", "steps", "optim.lr", "optim.foo"))


def test_overrides_reach_into_groups(write) -> None:
    config = load_config(Run, write("output: x"), ["optim.lr=2e-4", "steps=7", "optim.betas=[0.8, 0.9]", "output=a=b"])
    assert (config.optim.lr, config.steps, config.optim.betas, config.output) == (2e-4, 7, (0.8, 0.9), "a=b")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(Run, tmp_path / "nothing.yaml")
    (tmp_path / "train.yaml").write_text("output: x")
    with pytest.raises(UserError, match=r": a folder[\s\S]*name a file in it: train\.yaml"):
        load_config(Run, tmp_path)


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = Run(output="그림", optim=Optim(lr=1e-5, name="x"), parts=(Part(width=3),))
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Run, path) == config


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run(output="x").steps = 3


def test_yaml_stays_safe() -> None:
    with pytest.raises(UserError):
        parse_yaml("!!python/name:os.system", "here")


@pytest.mark.parametrize("part", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path: Path, part: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {part.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 30)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    start = time.monotonic()
    with pytest.raises(UserError, match="aliases stand for more than"):
        parse_yaml((tmp_path / "bomb.yaml").read_text(), "bomb.yaml")
    assert time.monotonic() - start < 5
    assert parse_yaml("a: &a [1, 2]\nb: *a", "x") == {"a": [1, 2], "b": [1, 2]}


def test_a_text_with_nul_is_named(write) -> None:
    """No path may hold one; a backslash before u0000 is only text."""
    with pytest.raises(UserError, match=r"config.yaml: a text that holds the character NUL"):
        load_config(Run, write('output: "a\\0b"'))
    assert load_config(Run, write("output: 'a\\u0000b'")).output == r"a\u0000b"
