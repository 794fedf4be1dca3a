"""Find what a run trained; export its LoRA, or any LoRA file, under another tool's names.

The header of an exported file says where it comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shards import __version__
from shards.config import parse_yaml
from shards.console import LOG
from shards.errors import UserError
from shards.files.write_file import named_errors
from shards.format.sealed_json import canonical_digest
from train.checkpoint import (
    AVERAGE_FILE,
    LORA_FILE,
    MODEL_FILE,
    STATE_FILE,
    check_files,
    checkpoint_name,
    find_checkpoints,
    read_checkpoint,
)
from train.config.model import TI2V_5B
from train.lora.formats import Format, name_tensors, read_lora, save_lora

BASE_MODEL = "Wan-AI/Wan2.2-TI2V-5B"
BASE_FILES = {
    "diffusion_pytorch_model-00001-of-00003.safetensors": (
        9_825_014_472, "720b06c4ade5e87c1246bba8ac95b664c638749cd9b102cf84d823bb44c026a1"),
    "diffusion_pytorch_model-00002-of-00003.safetensors": (
        9_995_661_736, "09ec5ef720d8396f6cfa51fbdcbdb2327e37722afd6e89fd38f1e7e5e782c283"),
    "diffusion_pytorch_model-00003-of-00003.safetensors": (
        178_558_176, "6306f7894c345de9093ad588771c2abfaeb668a81f7a6d9a918bd26ba3568e49"),
}  # fmt: skip
"""Bytes and sha256 of the published weights, official layout (revision 921dbaf3)."""
SOFTWARE = "wan-broadcast-lora"
NOT_STATED = "not stated"
PEFT_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What peft's and diffusers' savers call the file in the folder that they are given."""


def export_metadata(identity: Mapping[str, Any], step: int, licence: str | None, base: str | None) -> dict[str, str]:
    """What an exported LoRA says of itself: base model, dataset, step, configuration, licence. Values are text.

    Args:
        identity: a run's identity, as in its checkpoints' state.json.
        licence: of the LoRA, as its owner states it; it follows from the training material, so nothing is assumed.
        base: where the run's base is. `base_model` is written only where its files are the published ones.
    """
    dataset = identity.get("dataset", {})
    metadata = {
        "software": f"{SOFTWARE} {__version__}",
        "base_weights": str(identity.get("weights")),
        "dataset_identity": str(dataset.get("identity")),
        "dataset_revision": str(dataset.get("revision")),
        "config_digest": canonical_digest(identity.get("config", {})),
        "step": str(step),
        **({"base_dtype": str(identity["base_dtype"])} if "base_dtype" in identity else {}),
        "licence": licence or NOT_STATED,
        "modelspec.license": licence or NOT_STATED,
    }
    if identity.get("dims") == TI2V_5B.model_dump(mode="json"):
        metadata["modelspec.architecture"] = "wan2.2-ti2v-5b/lora"
    if base is not None and is_published(Path(base)):
        metadata["base_model"] = BASE_MODEL
    return metadata


def is_published(base: Path) -> bool:
    """Whether the files of a base are the published weights, by sha256. They are read only if their sizes are right."""
    if any(
        not (base / name).is_file() or (base / name).stat().st_size != size for name, (size, _) in BASE_FILES.items()
    ):
        return False
    LOG.info("comparing the digests of %s with the published ones (20 GB are read)", base)
    return all(digest_file(base / name) == sha256 for name, (_, sha256) in BASE_FILES.items())


def digest_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export_lora(
    source: Path, out: Path, written: Format, dtype: torch.dtype, *, step: int | None = None, licence: str | None = None
) -> dict[str, str]:
    """Write the LoRA of a run, a checkpoint or a file to `out` under a tool's names; return its header.

    Raises UserError when the source has no LoRA, `out` is there, or a value does not fit the dtype.
    """
    file, identity, found_step = locate_lora(source, step)
    if out.exists():
        raise UserError(f"{out} is there already", fix="name another file, or remove this one")
    lora = read_lora(file)
    tensors = name_tensors(lora.pairs, written, dtype)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{lora.origin}: {name} is not finite as {str(dtype).removeprefix('torch.')}",
                fix="--dtype float32, or an earlier checkpoint: `wantrain lora info` shows broken modules",
            )
    metadata = _carried_over(lora.metadata)
    if identity is not None and found_step is not None:
        metadata |= export_metadata(identity, found_step, licence, base_of(file))
    elif licence is not None:
        metadata |= {"licence": licence, "modelspec.license": licence}
    with named_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_lora(out, tensors, metadata)
    return metadata


def _carried_over(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's header without what the new file would say wrongly: hashes, an alpha that is folded into B now, and a
    base model that nobody here has compared."""
    own = metadata.get("software", "").startswith(SOFTWARE)
    wrong = {"lora_adapter_metadata", "ss_network_alpha"} | (set() if own else {"base_model"})
    return {name: value for name, value in metadata.items() if name not in wrong and "hash" not in name.lower()}


def base_of(checkpoint_file: Path) -> str | None:
    """Where the base of a checkpoint's run is, by the run's config; None where none is known."""
    settings = checkpoint_file.resolve().parents[2] / "config.yaml"
    if not settings.is_file():
        return None
    model = parse_yaml(settings.read_text(encoding="utf-8"), str(settings)).get("model") or {}
    return model.get("checkpoint")


def locate_lora(source: Path, step: int | None = None) -> tuple[Path, dict[str, Any] | None, int | None]:
    """The LoRA file that a path means, and the identity and step of its run where they are known.

    A run means its newest checkpoint, or that of `step`; a checkpoint its moving average where it has one; a folder of
    peft or diffusers the file in it.
    """
    if source.is_file():
        return source, None, None
    for name in PEFT_FILES:
        if (source / name).is_file():
            return source / name, None, None
    folder = _find_checkpoint(source, step)
    state = read_checkpoint(folder)
    name = AVERAGE_FILE if (folder / AVERAGE_FILE).is_file() else LORA_FILE
    if not (folder / LORA_FILE).is_file():
        raise UserError(
            f"{folder}: no {LORA_FILE}: this run trained the model's weights, not a LoRA",
            expected="a run with a lora section",
            fix="`wantrain export RUN FOLDER --layout official` writes the model",
        )
    return folder / name, state.identity, state.step


def _find_checkpoint(source: Path, step: int | None) -> Path:
    if (source / STATE_FILE).is_file():
        return source
    found = find_checkpoints(source / "checkpoints")
    if not found:
        raise UserError(
            f"{source}: no LoRA file, no checkpoint and no run",
            expected="RUN, RUN/checkpoints/step-…, FILE, or a folder of peft or diffusers",
        )
    folder = found[-1] if step is None else source / "checkpoints" / checkpoint_name(step)
    if folder not in found:
        there = ", ".join(path.name.removeprefix("step-").lstrip("0") or "0" for path in found)
        raise UserError(f"{source}: no checkpoint of step {step}", expected=f"one of {there}")
    return folder


class TrainedModel(NamedTuple):
    """Where the weights are of a run that trained the model's own."""

    file: Path
    """Those that were trained."""
    base: str | None
    """Where the others are, if any."""
    metadata: dict[str, str]
    """For the header of what is made of it."""


def locate_model(source: Path, step: int | None = None, licence: str | None = None) -> TrainedModel:
    """The weights that a run or a checkpoint trained: the moving average where it has one.

    Raises UserError for a run that trained a LoRA.
    """
    folder = _find_checkpoint(source, step)
    state, base = read_checkpoint(folder), base_of(folder / MODEL_FILE)
    if not (folder / MODEL_FILE).is_file():
        raise UserError(
            f"{folder}: no {MODEL_FILE}: this run trained a LoRA", fix="`wantrain merge BASE RUN FOLDER` writes a model"
        )
    if problems := check_files(folder, state):
        raise UserError(f"{folder}: {'; '.join(problems)}")
    name = AVERAGE_FILE if (folder / AVERAGE_FILE).is_file() else MODEL_FILE
    return TrainedModel(folder / name, base, export_metadata(state.identity, state.step, licence, base))
