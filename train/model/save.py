"""Write a DiT in the official or in the Diffusers layout, one tensor at a time.

    official     OUT/config.json, diffusion_pytorch_model-0000x-of-0000y.safetensors, …index.json
    diffusers    OUT/transformer/ with the same names in it and Diffusers' keys

At the published sizes the official layout comes out in the published files: 825 keys, three shards, to the byte.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from shards.errors import UserError
from shards.files.safetensors_index import CheckpointLayout
from train.config.model import DiTConfig
from train.model.load import CONFIG_KEY, INDEX, SINGLE, diffusers_key

MAX_SHARD_BYTES = 10_000_000_000
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorSpec(NamedTuple):
    """A tensor to be written: its name in the file, and what its bytes will be."""

    official: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]],
    layout: CheckpointLayout,
    dtype: torch.dtype,
    max_bytes: int = MAX_SHARD_BYTES,
) -> list[list[TensorSpec]]:
    """Cut a model into files: in the model's order, each as full as `max_bytes` allows, by name within a file."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for official, shape in shapes.items():
        name = diffusers_key(official) if layout == "diffusers" else official
        spec = TensorSpec(official, name, tuple(shape), dtype)
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return [sorted(shard, key=lambda spec: spec.name) for shard in shards]


def file_names(num_shards: int) -> list[str]:
    """Names of the weight files: one plain name, or a numbered series."""
    if num_shards == 1:
        return [SINGLE]
    stem = SINGLE.removesuffix(".safetensors")
    return [f"{stem}-{place:05d}-of-{num_shards:05d}.safetensors" for place in range(1, num_shards + 1)]


def header_bytes(specs: list[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file, padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_text(shards: list[list[TensorSpec]]) -> str:
    """The index of a series of files: which name lies in which file."""
    names = file_names(len(shards))
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    total = sum(spec.num_bytes for shard in shards for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def config_text(config: DiTConfig, layout: CheckpointLayout) -> str:
    """`config.json` as each layout has it."""
    values: dict[str, Any]
    if layout == "official":
        values = {
            "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": config.dim, "eps": config.eps,
            "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "in_dim": config.in_channels, "model_type": "ti2v",
            "num_heads": config.num_heads, "num_layers": config.num_layers, "out_dim": config.out_channels,
            "text_len": config.text_len,
        }  # fmt: skip
    else:
        values = {
            "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0", "added_kv_proj_dim": None,
            "attention_head_dim": config.head_dim, "cross_attn_norm": True, "eps": config.eps,
            "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "image_dim": None,
            "in_channels": config.in_channels, "num_attention_heads": config.num_heads,
            "num_layers": config.num_layers, "out_channels": config.out_channels, "patch_size": list(config.patch),
            "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
            "text_dim": config.text_dim,
        }  # fmt: skip
    return json.dumps(values, indent=2) + "\n"


def write_layout(
    folder: Path,
    layout: CheckpointLayout,
    shards: list[list[TensorSpec]],
    config: DiTConfig,
    tensors: Iterator[tuple[TensorSpec, Tensor]],
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write a model as the tensors come, in the order of `shards`; at most one tensor is held.

    The index comes last, so that a folder cut short is not mistaken for a complete one. The model's sizes are in every
    file's header, where `read_dit_config` (load.py) finds what a config.json of the layout leaves out.

    Raises UserError when the folder holds weights already or the disk has too little room.
    """
    place = folder / "transformer" if layout == "diffusers" else folder
    _check_place(place, sum(spec.num_bytes for shard in shards for spec in shard))
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(config_text(config, layout), encoding="utf-8")
    written = []
    header = {"format": "pt", CONFIG_KEY: config.model_dump_json(), **metadata}
    for name, shard in zip(file_names(len(shards)), shards, strict=True):
        temporary = place / f".writing-{name}.partial"
        with temporary.open("wb") as file:
            file.write(header_bytes(shard, header))
            for spec in shard:
                _write_next(file, spec, tensors)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(place / name)
        written.append(place / name)
    if len(shards) > 1:
        (place / INDEX).write_text(index_text(shards), encoding="utf-8")
    return written


def _write_next(file: BinaryIO, spec: TensorSpec, tensors: Iterator[tuple[TensorSpec, Tensor]]) -> None:
    came, tensor = next(tensors)
    if came != spec or tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise ValueError(f"{came.name} came where {spec.name} {spec.shape} {spec.dtype} was to be written")
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _check_place(place: Path, num_bytes: int) -> None:
    if any(place.glob("*.safetensors")):
        raise UserError(f"{place} holds weights already", fix="name another folder, or remove that one")
    parent = place
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"{parent}: {free / 2**30:.1f} GiB are free, {num_bytes / 2**30:.1f} GiB are to be written",
            fix="free some room, another disk, or --dtype bfloat16",
        )
