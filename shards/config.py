"""Strict configuration: read from YAML, overridden by `-o a.b=c`, checked by pydantic.

Unknown keys are refused with a suggestion; every problem is reported by its dotted key, its value and what was
expected, all problems at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import pydantic
import yaml

from shards.errors import UserError

MAX_CONFIG_BYTES = 1_000_000
_MAX_DEPTH = 100
_MAX_NODES = 100_000


Number = Annotated[int, pydantic.Field(ge=0, lt=2**62)]
"""A count, size or offset that fits the readers' 64-bit columns."""


class Config(pydantic.BaseModel):
    """Base of every configuration and every document of the contract: strict, frozen, no unknown keys."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class StorageConfig(Config):
    """How a remote storage that fails is treated. Nothing here changes a byte of shards or a number of a run."""

    patience_minutes: Annotated[float, pydantic.Field(ge=0)] = 15.0
    """Longest that one read or write waits for an S3 server that does not answer; then exit code 75. 0: not at all."""


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str, *, quoted: bool = True) -> Any:
    """Parse YAML safely. Raises UserError naming `origin` and, where `quoted`, line, column and a part of the text."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_nodes(node, {}) > _MAX_NODES:
            raise UserError(
                f"{origin}: its aliases stand for more than {_MAX_NODES:,} values", expected="a configuration file"
            )
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as the date 2024-13-45, or 1,000 brackets
        problem = str(error) if quoted else getattr(error, "problem", None) or str(error)
        raise UserError(f"{origin}: not valid YAML: {' '.join(problem.split())}") from None


def shipped_configs() -> Path:
    """The folder of the YAML files that ship: inside an installed package, beside the packages in a checkout."""
    installed = Path(__file__).with_name("configs")
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for when every alias in it is written out: a short file can name billions."""
    if id(node) not in known:
        known[id(node)] = 1  # while it is counted: a node may hold itself
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        inner = () if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = min(_MAX_NODES + 1, 1 + sum(_num_nodes(part, known) for part in inner))
    return known[id(node)]


def refuse_source_folder(folder: Path, name: str) -> None:
    """Raise UserError where `folder` is inside a package of source code: an output there would travel with it."""
    place = folder.absolute().resolve()
    package = next((each for each in (place, *place.parents) if (each / "__init__.py").is_file()), None)
    if package is not None:
        raise UserError(
            f"{name}: {folder} is inside the source package {package}",
            expected="a folder outside the code",
            fix=f"name another one, such as {package.parent / 'project'}",
        )


def load_config(cls: type[ConfigT], path: str | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML file into `cls`, apply `a.b=c` overrides, validate. Raises UserError naming every bad key."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes", expected="a configuration file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        fix = f"name a file of your own, or one of those that ship with the package: {shipped_configs()}/*.yaml"
        raise UserError(f"{path}: no such file", expected="a YAML configuration file", fix=fix) from None
    except IsADirectoryError:
        inside = sorted(found.name for found in path.glob("*.yaml"))
        fix = f"name a file in it: {', '.join(inside)}" if inside else "name a YAML file"
        raise UserError(f"{path}: a folder", expected="a YAML configuration file", fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level is {type(values).__name__}", expected="a mapping of keys to values")
    _refuse_other_stage(cls, values, path)
    return validate_config(cls, apply_overrides(values, overrides), origin=str(path))


_STAGES = {"PrepConfig": ("wanprep", "corpus"), "TrainConfig": ("wantrain", "data")}
"""Each stage's command, and a key that only its config has."""


def _refuse_other_stage(cls: type[Config], values: dict[str, Any], path: Path) -> None:
    """One sentence instead of a list of unknown keys where the config of the other stage is named."""
    _, own_key = _STAGES.get(cls.__name__, ("", ""))
    for name, (command, key) in _STAGES.items():
        if own_key and name != cls.__name__ and key in values and own_key not in values:
            raise UserError(
                f"{path}: this is a config of `{command}`: it has the key {key!r}",
                expected=f"a config with the key {own_key!r}",
                fix="name the other file; `wanprep init` writes prep.yaml and train.yaml",
            )


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`values` after `a.b=c` overrides, changed in place. Raises UserError."""
    for override in overrides:
        _apply_override(values, override)
    return values


def validate_config(cls: type[ConfigT], values: Mapping[str, Any], origin: str) -> ConfigT:
    """Validate plain values (as from YAML or JSON) into `cls`. Raises UserError naming every bad key."""
    try:
        # JSON mode keeps strictness and still turns lists into tuples and strings into paths.
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        problem = _first_that_json_lacks(values) or str(error)
        raise UserError(
            f"{origin}: {problem}",
            expected="text, numbers, true or false, lists and mappings",
            fix="put a date or a time that is meant as text in quotes",
        ) from None
    if "\\u0000" in text.replace("\\\\", ""):  # no path may hold one
        raise UserError(f"{origin}: a text that holds the character NUL (\\0)", expected="text without it")
    try:
        return cls.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise UserError(_describe(cls, error, origin)) from None


def _first_that_json_lacks(values: Any) -> str | None:
    """The first value that JSON cannot hold, with its dotted key: a date, bytes, a list that holds itself."""
    left: list[tuple[Any, tuple[Any, ...], tuple[int, ...]]] = [(values, (), ())]
    while left:
        value, location, above = left.pop()
        key = ".".join(str(part) for part in location) or "(top level)"
        if id(value) in above:
            return f"{key}: {_short(value)}: a {type(value).__name__} that holds itself"
        if len(above) > _MAX_DEPTH:
            return f"{key[:80]}…: nested more than {_MAX_DEPTH} deep"
        if isinstance(value, Mapping):
            if odd := next((name for name in value if not isinstance(name, str | int | float | None)), None):
                return f"{key}: {odd}: a {type(odd).__name__} as a key"
            inner = list(value.items())
        elif isinstance(value, list | tuple):
            inner = list(enumerate(value))
        elif isinstance(value, str | int | float | None):
            continue
        else:
            return f"{key}: {value}: a {type(value).__name__}"
        left += [(item, (*location, part), (*above, id(value))) for part, item in reversed(inner)]
    return None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"-o {override}: not an override", expected="dotted.key=value, such as optim.lr=2e-4")
    *parents, leaf = key.split(".")
    place = values
    for parent in parents:
        inner = place.setdefault(parent, {})
        if inner is None:
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"-o {override}: {parent} is {inner!r}, not a group of keys")
        place = inner
    if text.startswith("{") and re.fullmatch(r"(\{\w+\}[^:]*)+", text):  # YAML reads {object} as a mapping
        raise UserError(f"-o {override}: a text that begins with {{", fix=f"put it in quotes: -o '{key}=\"{text}\"'")
    place[leaf] = parse_yaml(text, f"-o {override}", quoted=False)  # a part of it may be half a password


def _describe(cls: type[Config], error: pydantic.ValidationError, origin: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        location = [part for part in problem["loc"] if not _is_union_tag(part)]
        key = ".".join(str(part) for part in location) or "(top level)"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), sorted(_names_at(cls, location[:-1])), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{key}: unknown key{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing, and it has no default")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {_short(problem.get('input'))}: {message[:1].lower()}{message[1:]}")
    return "\n  ".join([f"{origin}:", *dict.fromkeys(lines)]) if len(lines) > 1 else f"{origin}: {lines[0]}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and not part.isidentifier() and ("[" in part or "-" in part)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _names_at(cls: type[pydantic.BaseModel], location: list[int | str]) -> set[str]:
    """Field names of the model that `location` (without its last part) leads to."""
    models: list[type[pydantic.BaseModel]] = [cls]
    for part in location:
        inner: list[type[pydantic.BaseModel]] = []
        for model in models:
            field = model.model_fields.get(str(part))
            inner += _models_in(field.annotation) if field else []
        models = inner or models if isinstance(part, int) else inner
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
