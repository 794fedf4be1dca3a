"""Put a LoRA into a checkpoint's weights, or take it out again, without holding the model: W ± scale · B A.

Every output tensor is one input tensor, read, changed in float32, rounded once, and written. A model that a run trained
is written in the same way, unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shards.config import validate_config
from shards.errors import UserError
from shards.files.safetensors_index import CheckpointLayout
from train.checkpoint import read_checkpoint
from train.config.model import DiTConfig
from train.lora.export import digest_file, locate_model
from train.lora.formats import LoRAFile, Pair, refuse_other_model
from train.model.dit import build_model
from train.model.load import base_parameters, find_tensors, match_tensors, read_dit_config
from train.model.save import TensorSpec, plan_shards, write_layout

MERGED_KEY = "wan_merged_loras"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Places = Mapping[str, tuple[Path, tuple[int, ...]]]


class Merged(NamedTuple):
    """What `merge` did."""

    files: list[Path]
    num_changed: int
    """Tensors that the LoRA changed."""
    num_tensors: int


def merge_checkpoint(
    base: Path,
    lora: LoRAFile,
    out: Path,
    layout: CheckpointLayout = "official",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Merged:
    """Write `base` with a LoRA in its weights to `out`.

    Args:
        scale: strength of the LoRA on top of its own scale.

    The header of every file records the LoRA's digest and the strength, which `unmerge_checkpoint` insists on.
    Raises UserError for a LoRA of another model, a checkpoint with missing or unexpected keys, weights that overflow
    the dtype, no room, an output that is there.
    """
    record = [*merged_loras(base), {"sha256": digest_file(Path(lora.origin)), "scale": scale}]
    return _rewrite(base, lora, out, layout, dtype, scale, record)


def unmerge_checkpoint(
    merged: Path,
    lora: LoRAFile,
    out: Path,
    layout: CheckpointLayout = "official",
    dtype: torch.dtype = torch.float32,
    *,
    unrecorded_scale: float | None = None,
) -> Merged:
    """Take a LoRA out of a checkpoint again. Exact to float32's rounding where it was merged in float32; rounding to 16
    bits at the merge cannot be undone.

    Args:
        unrecorded_scale: the strength at which another tool merged it; None: as the header records.

    Raises UserError when the header does not record this LoRA.
    """
    records = merged_loras(merged)
    digest = digest_file(Path(lora.origin))
    if unrecorded_scale is not None:
        return _rewrite(merged, lora, out, layout, dtype, -unrecorded_scale, records)
    mine = [record for record in records if record["sha256"] == digest]
    if not mine:
        held = ", ".join(str(record["sha256"])[:8] for record in records) or "none"
        raise UserError(
            f"{merged}: its header does not say that {lora.origin} (sha256 {digest[:8]}…) is merged into it",
            expected=f"a LoRA with the sha256 of one that it records: {held}",
            fix="if another tool merged it, give the strength it used: --unrecorded-scale 1.0",
        )
    records.remove(mine[-1])
    return _rewrite(merged, lora, out, layout, dtype, -float(mine[-1]["scale"]), records)


def export_model(
    source: Path,
    out: Path,
    layout: CheckpointLayout = "official",
    dtype: torch.dtype = torch.float32,
    *,
    step: int | None = None,
    licence: str | None = None,
) -> list[Path]:
    """Write the model that a run trained to `out`, one tensor at a time; what did not train is its base's.

    Raises UserError for a run of a LoRA, a damaged checkpoint, a base that is not here, no room, an output that is
    there.
    """
    model = locate_model(source, step, licence)
    config = validate_config(DiTConfig, read_checkpoint(model.file.parent).identity["dims"], origin=str(model.file))
    targets = base_parameters(build_model(config, device="meta"))
    places = find_tensors(model.file)
    names = {name: name for name in targets}
    if missing := sorted(targets.keys() - places.keys()):
        if model.base is None:
            raise UserError(
                f"{model.file}: has not {missing[0]}, which did not train, and the base was random weights",
                fix="`wantrain export` cannot draw them; RUN/model.safetensors is the complete model",
            )
        others, named = match_tensors(model.base, targets)
        names |= {name: named[name] for name in missing}
        places |= {named[name]: others[named[name]] for name in missing}
    shards = plan_shards({name: tuple(weight.shape) for name, weight in targets.items()}, layout, dtype)
    return write_layout(out, layout, shards, config, _changed(shards, places, names, {}, 0.0), model.metadata)


def _rewrite(
    base: Path,
    lora: LoRAFile,
    out: Path,
    layout: CheckpointLayout,
    dtype: torch.dtype,
    scale: float,
    record: list[dict],
) -> Merged:
    config = read_dit_config(base)
    targets = base_parameters(build_model(config, device="meta"))
    places, names = match_tensors(base, targets)
    sizes = {name.removesuffix(".weight"): (w.shape[0], w.shape[1]) for name, w in targets.items() if w.ndim == 2}
    refuse_other_model(lora, sizes, str(base))
    shards = plan_shards({name: tuple(weight.shape) for name, weight in targets.items()}, layout, dtype)
    tensors = _changed(shards, places, names, lora.pairs, scale)
    metadata = {MERGED_KEY: json.dumps(record)} if record else {}
    files = write_layout(out, layout, shards, config, tensors, metadata)
    return Merged(files, len(lora.pairs), len(targets))


def _changed(
    shards: list[list[TensorSpec]], places: Places, names: Mapping[str, str], pairs: Mapping[str, Pair], scale: float
) -> Iterator[tuple[TensorSpec, Tensor]]:
    from safetensors import safe_open

    for spec in (spec for shard in shards for spec in shard):
        file, name = places[names[spec.official]][0], names[spec.official]
        # Opened for each tensor: an open file keeps every page mapped that was read through it.
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        if pair := pairs.get(spec.official.removesuffix(".weight")):
            tensor = torch.addmm(tensor.float(), pair.up_Or.float(), pair.down_rI.float(), alpha=scale * pair.scale)
        rounded = tensor.to(spec.dtype)
        if not torch.isfinite(rounded).all():
            raise UserError(
                f"{file}: {spec.official} is not finite as {spec.dtype}".replace("torch.", ""),
                fix="--dtype float32 or bfloat16; `wantrain lora info` shows a LoRA's broken modules",
            )
        yield spec, rounded


def merged_loras(checkpoint: Path) -> list[dict]:
    """LoRAs that a checkpoint's header says are in its weights: digest and strength, in order."""
    from safetensors import safe_open

    from train.model.load import find_tensors

    file = next(iter(find_tensors(checkpoint).values()))[0]
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(MERGED_KEY, "[]")
    records: list[dict] = json.loads(text)
    return records
