"""Export a run's LoRA, or any LoRA file, under another tool's names, with a header that says where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shards import __version__
from shards.errors import UserError
from shards.format.sealed_json import canonical_digest
from train.checkpoint import AVERAGE_FILE, LORA_FILE, STATE_FILE, checkpoint_name, find_checkpoints, read_checkpoint
from train.lora.formats import Format, LoRAFile, name_tensors, read_lora, save_lora

BASE_MODEL = "Wan-AI/Wan2.2-TI2V-5B"
SOFTWARE = "wan-broadcast-lora"
NOT_STATED = "not stated"


def export_metadata(identity: Mapping[str, Any], step: int, licence: str | None) -> dict[str, str]:
    """What an exported LoRA says of itself: base model, dataset, step, configuration, licence. Values are text.

    Args:
        identity: a run's identity, as in its checkpoints' state.json.
        licence: of the LoRA, as its owner states it; it follows from the training material, so nothing is assumed.
    """
    dataset = identity.get("dataset", {})
    return {
        "software": f"{SOFTWARE} {__version__}",
        "base_model": BASE_MODEL,
        "base_weights": str(identity.get("weights")),
        "dataset_identity": str(dataset.get("identity")),
        "dataset_revision": str(dataset.get("revision")),
        "config_digest": canonical_digest(identity.get("config", {})),
        "step": str(step),
        "licence": licence or NOT_STATED,
        "modelspec.architecture": "wan2.2-ti2v-5b/lora",
        "modelspec.license": licence or NOT_STATED,
    }


def export_lora(
    source: Path, out: Path, written: Format, dtype: torch.dtype, *, step: int | None = None, licence: str | None = None
) -> dict[str, str]:
    """Write the LoRA of a run, a checkpoint or a file to `out` under a tool's names; return its header.

    Raises UserError when the source has no LoRA, `out` is there, or a value does not fit the dtype.
    """
    file, identity, found_step = locate_lora(source, step)
    if out.exists():
        raise UserError(f"{out} is there already", fix="name another file, or remove that one")
    lora = read_lora(file)
    tensors = name_tensors(lora.pairs, written, dtype)
    _refuse_overflow(tensors, lora, dtype)
    metadata = dict(lora.metadata)
    metadata.pop("lora_adapter_metadata", None)  # `save_lora` leaves it out
    if identity is not None and found_step is not None:
        metadata |= export_metadata(identity, found_step, licence)
    elif licence is not None:
        metadata |= {"licence": licence, "modelspec.license": licence}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".writing-{out.name}")
    save_lora(temporary, tensors, metadata)
    temporary.rename(out)
    return metadata


def locate_lora(source: Path, step: int | None = None) -> tuple[Path, dict[str, Any] | None, int | None]:
    """The LoRA file that a path stands for, and the identity and step of its run where they are known.

    A run stands for its newest checkpoint, or that of `step`; a checkpoint for its moving average where it has one.
    """
    if source.is_file():
        return source, None, None
    folder = source
    if not (source / STATE_FILE).is_file():
        found = find_checkpoints(source / "checkpoints")
        if not found:
            raise UserError(
                f"{source}: no LoRA file, no checkpoint and no run", expected="RUN, RUN/checkpoints/step-…, FILE"
            )
        folder = found[-1] if step is None else source / "checkpoints" / checkpoint_name(step)
        if folder not in found:
            there = ", ".join(path.name.removeprefix("step-").lstrip("0") or "0" for path in found)
            raise UserError(f"{source}: no checkpoint of step {step}", expected=f"one of {there}")
    state = read_checkpoint(folder)
    name = AVERAGE_FILE if (folder / AVERAGE_FILE).is_file() else LORA_FILE
    if not (folder / LORA_FILE).is_file():
        raise UserError(
            f"{folder}: no {LORA_FILE}: this run trained the whole model", expected="a run with a lora section"
        )
    return folder / name, state.identity, state.step


def _refuse_overflow(tensors: Mapping[str, torch.Tensor], lora: LoRAFile, dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{lora.origin}: {name} is not finite as {str(dtype).removeprefix('torch.')}",
                fix="--dtype float32, or an earlier checkpoint: `wantrain lora info` shows broken modules",
            )
