"""Weights of the DiT in and out: official and Diffusers layouts, tensor by tensor, every key accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.config import validate_config
from shards.errors import UserError
from shards.files.safetensors_index import indexed_files, read_object
from train.checkpoint import write_tensors
from train.config.model import DiTConfig
from train.model.quantise import quantised_weights
from train.parallel.fsdp import local_shard

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
CONFIG_KEY = "wan_dit_config"
TI2V_NAME = "Wan2.2-TI2V-5B"

_TO_DIFFUSERS = (
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.([qkv])\.", r".attn1.to_\1."),
    (r"\.cross_attn\.([qkv])\.", r".attn2.to_\1."),
    (r"\.self_attn\.o\.", ".attn1.to_out.0."),
    (r"\.cross_attn\.o\.", ".attn2.to_out.0."),
    (r"\.self_attn\.norm_", ".attn1.norm_"),
    (r"\.cross_attn\.norm_", ".attn2.norm_"),
    # The official norm3 comes before the cross-attention; Diffusers calls that one norm2.
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)
"""Official name → Diffusers name (diffusers scripts/convert_wan_to_diffusers.py, TRANSFORMER_KEYS_RENAME_DICT)."""


def diffusers_key(official: str) -> str:
    """The name of a parameter in `diffusers.WanTransformer3DModel`."""
    for pattern, replacement in _TO_DIFFUSERS:
        official = re.sub(pattern, replacement, official)
    return official


def load_dit(model: nn.Module, path: str | Path) -> None:
    """Copy a checkpoint into a model that exists, one tensor at a time, into each parameter's own dtype and device.

    Of a base that is sharded over ranks (train/parallel/fsdp.py) each rank reads only its own rows.

    Args:
        path: an official folder (`Wan2.2-TI2V-5B`: shards with an index), a Diffusers one (with or without its
            `transformer/`), or one `.safetensors` file of either naming.

    Raises: UserError naming every missing, unexpected and wrongly shaped key, and its file; nothing is copied then.
    """
    targets = base_parameters(model)
    places, names = match_tensors(path, targets)
    ours = {theirs: official for official, theirs in names.items()}
    quantised = quantised_weights(model)
    with torch.no_grad():
        for theirs, stored in _stream(places):
            local, rows = local_shard(targets[ours[theirs]])
            if ours[theirs] in quantised:
                quantised[ours[theirs]].fill(stored[rows])
            elif local.numel():  # the last ranks may hold no row of a short one
                local.copy_(stored[rows])


def match_tensors(
    path: str | Path, targets: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Path, tuple[int, ...]]], dict[str, str]]:
    """Find a checkpoint's tensors and match them with a model's by official name.

    Returns: the checkpoint's name → file and shape, and the official name → the checkpoint's name.
    Raises: UserError naming every missing, unexpected and wrongly shaped key, and its file.
    """
    places = find_tensors(Path(path))
    names = _names_in(places, targets)
    _check_keys(path, places, names, targets)
    refuse_other_wan(path, places)
    return places, names


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by official name, without a LoRA's."""
    return {name: weight for name, weight in model.named_parameters() if not name.endswith((".lora_A", ".lora_B"))}


def find_tensors(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every tensor of a checkpoint: name → its file and shape, from the files' headers alone.

    Raises: UserError when there is no checkpoint, a shard is missing or cut short, or index and shards disagree.
    """
    files, indexed = _files_of(path)
    places: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        for name, shape in _header(file).items():
            if indexed is not None and indexed.get(name) != file.name:
                where = indexed.get(name, "nowhere")
                raise UserError(f"{file}: holds {name}, which the index places in {where}", expected="one revision")
            places[name] = (file, shape)
    lost = sorted(set(indexed or ()) - places.keys())
    if lost and indexed is not None:
        raise UserError(f"{path}: the index places {lost[0]} in {indexed[lost[0]]}, which does not hold it")
    return places


def _files_of(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    if path.is_file():
        return [path], None
    if (path / "high_noise_model").is_dir() or (path / "transformer_2").is_dir():
        fix = "`wanprep fetch-model FOLDER` fetches it"
        raise UserError(f"model.checkpoint: {path}: this is Wan2.2-A14B (two experts)", expected=TI2V_NAME, fix=fix)
    for folder in (path, path / "transformer"):
        if (folder / INDEX).is_file():
            return indexed_files(folder / INDEX)
        for name in (SINGLE, "model.safetensors"):
            if (folder / name).is_file():
                return [folder / name], None
    raise UserError(
        f"model.checkpoint: {path}: no DiT checkpoint here",
        expected=f"a folder with {INDEX} (official), transformer/ (Diffusers), or one .safetensors file",
    )


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a complete safetensors file: {error}", fix="download or write the file again"
        ) from None


def _stream(places: Mapping[str, tuple[Path, tuple[int, ...]]]) -> Iterator[tuple[str, Any]]:
    """Names, and slices of the files: nothing is read before rows are taken of one."""
    from safetensors import safe_open

    for file in sorted({file for file, _ in places.values()}):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_slice(name)


def _names_in(places: Mapping[str, Any], targets: Mapping[str, Tensor]) -> dict[str, str]:
    """Official name → the checkpoint's name, by the naming that the checkpoint uses."""
    if any(name.startswith("condition_embedder.") for name in places):
        return {name: diffusers_key(name) for name in targets}
    return {name: name for name in targets}


def _check_keys(
    path: str | Path,
    places: Mapping[str, tuple[Path, tuple[int, ...]]],
    names: Mapping[str, str],
    targets: Mapping[str, Tensor],
) -> None:
    missing = sorted(set(names.values()) - places.keys())
    unexpected = sorted(places.keys() - set(names.values()))
    shapes = [
        f"{theirs} in {places[theirs][0].name} is {places[theirs][1]}, not {tuple(targets[ours].shape)}"
        for ours, theirs in names.items()
        if theirs in places and places[theirs][1] != tuple(targets[ours].shape)
    ]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unexpected {name} in {places[name][0].name}" for name in unexpected]
    problems += shapes
    if not problems:
        return
    other = recognise(places)
    shown = problems if len(problems) <= 20 else [*problems[:20], f"… and {len(problems) - 20} more"]
    raise UserError(
        f"{path}: {len(missing)} keys missing, {len(unexpected)} unexpected, {len(shapes)} wrongly shaped"
        + (f"; this looks like {other}" if other else "")
        + "".join(f"\n    {line}" for line in shown),
        expected=f"the {len(targets)} tensors of the configured model",
        fix="name the checkpoint that the config's sizes belong to",
    )


def recognise(places: Mapping[str, tuple[Path, tuple[int, ...]]]) -> str | None:
    """The Wan model that a checkpoint belongs to, by its patch embedding's shape; None for an unknown one."""
    if "patch_embedding.weight" not in places:
        return None
    dim, channels = places["patch_embedding.weight"][1][:2]
    return {
        (3072, 48): TI2V_NAME,
        (1536, 16): "Wan2.1-T2V-1.3B",
        (5120, 16): "Wan2.1-T2V-14B or Wan2.2-T2V-A14B",
        (5120, 36): "Wan2.1-I2V-14B or Wan2.2-I2V-A14B",
    }.get((dim, channels))


def refuse_other_wan(path: str | Path, places: Mapping[str, tuple[Path, tuple[int, ...]]]) -> None:
    """Raise UserError for a checkpoint that is another Wan's: its latents and its text are not the shards'."""
    other = recognise(places)
    if other not in (None, TI2V_NAME):
        raise UserError(f"{path}: this is {other}", expected=TI2V_NAME, fix="`wanprep fetch-model FOLDER` fetches it")


def save_dit(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a model's weights as one safetensors file with official names, each in the dtype it is kept in.

    A LoRA is left out unless it is merged (`lora.merge`), then it is in the weights.

    The model's sizes go into the file's metadata, where `read_dit_config` finds them.
    """
    config: DiTConfig = model.config  # type: ignore[assignment]
    write_tensors(path, base_parameters(model), dit_header(config, metadata or {}))


def dit_header(config: DiTConfig, metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file of a model says of itself: its sizes, and `metadata`."""
    return {"format": "pt", CONFIG_KEY: config.model_dump_json(), **metadata}


def read_dit_config(path: str | Path) -> DiTConfig:
    """Sizes of the model in a checkpoint: from our own metadata, or the `config.json` of either layout, and the shapes
    for what the official config leaves out (patch, text width).

    Raises: UserError when neither is there or they are not a Wan transformer's.
    """
    from safetensors import safe_open

    path = Path(path)
    files, _ = _files_of(path)
    _header(files[0])
    with safe_open(files[0], framework="pt") as opened:
        own = (opened.metadata() or {}).get(CONFIG_KEY)
    if own is not None:
        return validate_config(DiTConfig, json.loads(own), origin=str(files[0]))
    config_file = files[0].parent / "config.json"
    if not config_file.is_file():
        raise UserError(f"{path}: no config.json beside the weights", expected="the checkpoint's complete folder")
    places = find_tensors(path)
    refuse_other_wan(path, places)
    return _parse_config(read_object(config_file), places, config_file)


def _parse_config(values: dict[str, Any], places: Mapping[str, tuple[Path, tuple[int, ...]]], file: Path) -> DiTConfig:
    try:
        patch = list(places["patch_embedding.weight"][1][2:])
        if values.get("_class_name") == "WanTransformer3DModel":
            heads = values["num_attention_heads"]
            sizes = {
                "dim": heads * values["attention_head_dim"],
                "num_heads": heads,
                "in_channels": values["in_channels"],
                "out_channels": values["out_channels"],
                "text_dim": values["text_dim"],
            }
        else:
            sizes = {
                "dim": values["dim"],
                "num_heads": values["num_heads"],
                "in_channels": values["in_dim"],
                "out_channels": values["out_dim"],
                "text_dim": places["text_embedding.0.weight"][1][1],
            }
            sizes["text_len"] = values["text_len"]
        sizes |= {key: values[key] for key in ("num_layers", "ffn_dim", "freq_dim", "eps")}
    except KeyError as error:
        raise UserError(f"{file}: lacks {error.args[0]!r}", expected="the config of a Wan transformer") from None
    return validate_config(DiTConfig, {**sizes, "patch": patch}, origin=str(file))
