"""Weights out of `.pth` and safetensors files into a module that has none yet, every key accounted for.

Nothing is read before it is needed: files are mapped, tensors are views of them, and the module takes the views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shards.errors import UserError
from shards.files.safetensors_index import indexed_files

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHOWN = 12


class Weight(NamedTuple):
    """A tensor of a checkpoint: the name and the file it has there."""

    tensor: Tensor
    name: str
    file: Path


def read_pickle(path: Path, rename: Callable[[str], str | None]) -> dict[str, Weight]:
    """The tensors of a `.pth` by their new names; a name without one stays as it is, and will be unexpected.

    Only tensors are unpickled (`weights_only`), so a checkpoint from elsewhere cannot run code here.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, torch.serialization.pickle.UnpicklingError) as error:
        raise damaged(path, error) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: not a dictionary of tensors", expected="the published file")
    return {rename(name) or name: Weight(tensor, name, path) for name, tensor in state.items()}


def read_safetensors(folder: Path, stem: str) -> dict[str, Weight]:
    """The tensors of a Diffusers component folder: one `stem.safetensors`, or a series with its index.

    Raises UserError for a missing or cut file, and when index and files disagree (files of two revisions).
    """
    from safetensors import SafetensorError, safe_open

    files, indexed = _component_files(folder, stem)
    found: dict[str, Weight] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if indexed is not None and indexed.get(name) != file.name:
                        where = indexed.get(name, "no file")
                        raise UserError(f"{file}: holds {name}, which the index places in {where}", fix=_AGAIN)
                    found[name] = Weight(opened.get_tensor(name), name, file)
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from None
    lost = sorted((indexed or {}).keys() - found.keys())
    if lost and indexed is not None:
        raise UserError(f"{folder}: {lost[0]} is not in {indexed[lost[0]]}, where the index places it", fix=_AGAIN)
    return found


_AGAIN = "files of two revisions: `wanprep fetch-model` fetches one revision and checks every digest"


def _component_files(folder: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if not single.is_file():
            raise UserError(f"{folder}: no {single.name} and no {index.name}", fix="`wanprep fetch-model`")
        return [single], None
    return indexed_files(index)


def fill_module(module: nn.Module, weights: Mapping[str, Weight], origin: Path, what: str) -> None:
    """Give a module on the meta device the checkpoint's tensors, as they are.

    Raises UserError naming every missing, unexpected and wrongly shaped key with its file, and any that is not float.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    problems = [f"missing {name}" for name in missing]
    problems += [f"unexpected {weights[name].name} in {weights[name].file.name}" for name in unexpected]
    for name in sorted(expected.keys() & weights.keys()):
        tensor, theirs, file = weights[name]
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            problems.append(f"{theirs} in {file.name} is {shapes}")
        elif str(tensor.dtype).removeprefix("torch.") not in ("float32", "bfloat16", "float16"):
            problems.append(f"{theirs} in {file.name} is {tensor.dtype}: a quantised checkpoint")
    if problems:
        shown = problems if len(problems) <= _SHOWN else [*problems[:_SHOWN], f"… and {len(problems) - _SHOWN} more"]
        raise UserError(
            f"{origin}: {len(problems)} tensors are not those of {what}" + "".join(f"\n    {line}" for line in shown),
            expected=f"the {len(expected)} tensors of {what}, as published",
            fix="compare sizes and checksums with the publisher's, or fetch it again with `wanprep fetch-model`",
        )
    module.load_state_dict({name: weight.tensor for name, weight in weights.items()}, strict=True, assign=True)


def damaged(path: Path, error: Exception) -> UserError:
    """The error for a file that a library could not read."""
    text = " ".join(str(error).split())
    return UserError(
        f"{path}: cannot be loaded: {text[:400]}",
        expected="the files of Wan2.2-TI2V-5B as published",
        fix="the file is cut short or damaged: `wanprep fetch-model` resumes it and checks its digest",
    )
