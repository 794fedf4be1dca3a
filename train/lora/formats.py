"""LoRA files as other tools write and read them, and one neutral form between.

    format      a tensor's name                                              scale of B·A
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_A.weight           .alpha ÷ rank; 1 without .alpha
                (or lora_down / lora_up)
    musubi      lora_unet_blocks_0_self_attn_q.lora_down.weight              .alpha ÷ rank
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight                lora_adapter_metadata in the header; else 1
    diffsynth   blocks.0.self_attn.q.lora_A.default.weight                   1
                (or behind pipe.dit.)
    videox      lora_unet__blocks_0_self_attn_q.lora_down.weight             .alpha ÷ rank; 1 without .alpha
    peft        base_model.model.blocks.0.self_attn.q.lora_A.weight          adapter_config.json beside the file
    bare        blocks.0.self_attn.q.lora_A.weight, or diffusers' names      lora_adapter_metadata in the header
                                                                             (diffusers' save_lora_adapter); the run's
                                                                             config around a checkpoint ("run");
                                                                             adapter_config.json; else 1, with a warning

`comfyui` with the scale folded into B and .alpha equal to the rank is the one that diffusers, ComfyUI,
DiffSynth-Studio and musubi's converter all read alike; it is what a run exports.

Shapes: r rank, I input channels, O output channels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shards.config import parse_yaml, validate_config
from shards.console import LOG
from shards.errors import UserError
from train.checkpoint import write_tensors
from train.config.model import LoRAConfig
from train.lora.targets import BLOCK_LINEARS
from train.model.load import diffusers_key

Format = Literal["comfyui", "musubi", "videox", "diffusers", "diffsynth", "peft", "run", "bare"]
EXPORT_FORMATS: tuple[Format, ...] = ("comfyui", "musubi", "videox", "diffusers", "diffsynth")

_OTHER_LINEARS = (
    "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head",
)  # fmt: skip
_BLOCK = "blocks.0."
_DIFFUSERS = {linear: diffusers_key(f"{_BLOCK}{linear}.").removeprefix(_BLOCK)[:-1] for linear in BLOCK_LINEARS}
_DIFFUSERS |= {linear: diffusers_key(f"{linear}.")[:-1] for linear in _OTHER_LINEARS}
_OFFICIAL = {name: linear for linear, theirs in _DIFFUSERS.items() for name in (linear, theirs)}
_OFFICIAL |= {name.replace(".", "_"): linear for name, linear in _OFFICIAL.items()}
ADAPTER_CONFIG = "adapter_config.json"
BLOCK_NAME = re.compile(r"blocks[._](\d+)[._](.+)")
_PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<a>lora_A|lora_down)|(?P<b>lora_B|lora_up))(?:\.default)?\.weight|(?P<owner>.+)\.alpha"
)
_PREFIXES: tuple[tuple[str, Format], ...] = (
    ("diffusion_model.", "comfyui"),
    ("lora_unet__", "videox"),
    ("lora_unet_", "musubi"),
    ("transformer.", "diffusers"),
    ("pipe.dit.", "diffsynth"),
    ("base_model.model.", "peft"),
)
_NAMINGS = (*(prefix + "…" for prefix, _ in _PREFIXES), "blocks.….lora_A.weight")


class Pair(NamedTuple):
    """One adapted linear: W + scale · B A."""

    down_rI: Tensor
    up_Or: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner width."""
        return int(self.down_rI.shape[0])


class LoRAFile(NamedTuple):
    """A LoRA in the neutral form: pairs by official module name, and what the file said of itself."""

    origin: str
    format: Format
    pairs: dict[str, Pair]
    metadata: dict[str, str]
    scale_from: str
    """Where the scale was found, for people."""


def read_lora(path: str | Path) -> LoRAFile:
    """Read a LoRA written by any tool of the table above.

    Raises UserError naming the file and the key for: a file that is cut short, a tensor that is no part of a plain LoRA
    (DoRA, full differences, biases), half a pair or two of one, ranks that disagree, a module that Wan does not have, a
    scale that cannot be known.
    """
    path = Path(path)
    tensors, metadata = _read_tensors(path)
    if not tensors:
        raise UserError(f"{path}: holds no tensors", expected="a LoRA")
    found = detect_format(list(tensors), str(path))
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        if match is None:
            raise UserError(
                f"{path}: {key}: not a part of a plain LoRA",
                expected="lora_A, lora_B (or lora_down, lora_up) and alpha",
            )
        module = _official_module(match["module"] or match["owner"], path)
        if match["owner"]:
            alphas[module] = _read_alpha(tensor, f"{path}: {key}")
            continue
        if not tensor.is_floating_point():
            raise UserError(
                f"{path}: {key}: numbers of {tensor.dtype}".replace("torch.", ""), expected="floating point"
            )
        held = downs if match["a"] else ups
        if module in held:
            raise UserError(f"{path}: {key}: a second tensor for the same matrix of {module}", expected="one")
        held[module] = tensor
    _refuse_halves(path, downs, ups, alphas)
    ranks = {module: int(down.shape[0]) for module, down in downs.items()}
    found, scales, scale_from = _scales(path, found, metadata, ranks, alphas)
    pairs = {module: Pair(downs[module], ups[module], scales[module]) for module in sorted(downs, key=module_order)}
    return LoRAFile(str(path), found, pairs, metadata, scale_from)


def _read_alpha(tensor: Tensor, origin: str) -> float:
    if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor)):
        raise UserError(f"{origin}: {tensor.tolist()}", expected="one finite number")
    return alpha


def detect_format(keys: list[str], origin: str) -> Format:
    """Which tool's naming the keys follow. Raises UserError when none, or more than one."""
    found: set[Format] = set()
    for key in keys:
        name = _format_of(key)
        if name is None:
            raise UserError(f"{origin}: {key}: no LoRA naming that is known here", expected=", ".join(_NAMINGS))
        found.add(name)
    if len(found) > 1:
        raise UserError(f"{origin}: names of several tools in one file: {', '.join(sorted(found))}")
    return found.pop()


def _format_of(key: str) -> Format | None:
    for prefix, name in _PREFIXES:
        if key.startswith(prefix):
            return name
    if _PART.fullmatch(key):
        return "diffsynth" if ".default.weight" in key else "bare"
    return None


def _official_module(name: str, path: Path) -> str:
    for prefix, _ in _PREFIXES:
        name = name.removeprefix(prefix)
    official = official_name(name)
    if official is None:
        image = " (an image-to-video module of Wan2.1)" if "img" in name else ""
        raise UserError(
            f"{path}: {name}: Wan2.2-TI2V-5B has no linear layer of this name{image}",
            expected="a LoRA of Wan2.2-TI2V-5B, " + ", ".join(f"blocks.N.{linear}" for linear in BLOCK_LINEARS),
        )
    return official


def official_name(name: str) -> str | None:
    """The official name of a linear that is called as in the official model, in diffusers, or with underscores."""
    match = BLOCK_NAME.fullmatch(name)
    inner, allowed = (match[2], BLOCK_LINEARS) if match else (name, _OTHER_LINEARS)
    official = _OFFICIAL.get(inner)
    if official not in allowed:
        return None
    return f"blocks.{match[1]}.{official}" if match else official


def _refuse_halves(
    path: Path, downs: Mapping[str, Tensor], ups: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> None:
    for module in sorted({*downs, *ups, *alphas}, key=module_order):
        if module not in downs or module not in ups:
            missing = "A (lora_down)" if module not in downs else "B (lora_up)"
            raise UserError(f"{path}: {module}: {missing} is missing", fix="write the file again, or download it again")
        down, up = downs[module], ups[module]
        if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] > 0:
            raise UserError(
                f"{path}: {module}: A is {tuple(down.shape)} and B {tuple(up.shape)}",
                expected="A of shape (rank, inputs) and B of shape (outputs, rank), with the same rank",
            )


def _scales(
    path: Path, found: Format, metadata: Mapping[str, str], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> tuple[Format, dict[str, float], str]:
    """The format as it is now known, each module's scale, and where that was found."""
    if found in ("diffusers", "bare") and "lora_adapter_metadata" in metadata:
        config = _read_object(metadata["lora_adapter_metadata"], f"{path}: lora_adapter_metadata")
        # A pipeline's saver puts "transformer." before the keys, a model's own `save_lora_adapter` does not.
        prefix = "transformer." if found == "diffusers" else ""
        return "diffusers", _adapter_scales(config, prefix, path, ranks), "lora_adapter_metadata in the header"
    if found == "peft" or (found == "bare" and path.with_name(ADAPTER_CONFIG).is_file()):
        return "peft", _adapter_scales(_adapter_config(path), "", path, ranks), ADAPTER_CONFIG
    if found == "bare" and (run := _run_lora_config(path)) is not None:
        return "run", dict.fromkeys(ranks, run.scale), "the run's config"
    if found == "bare" and not alphas:
        LOG.warning(
            "%s: neither the header nor a file beside it gives an alpha: scale 1 is assumed (right for most tools; "
            "a checkpoint of `wantrain` is read at its scale inside its run folder only)",
            path,
        )
        return found, dict.fromkeys(ranks, 1.0), "assumed: nothing gives an alpha"
    scales = {module: alphas[module] / rank if module in alphas else 1.0 for module, rank in ranks.items()}
    return found, scales, ".alpha ÷ rank" if alphas else "the format: always 1"


def _adapter_scales(
    config: Mapping[str, object], prefix: str, path: Path, ranks: Mapping[str, int]
) -> dict[str, float]:
    """Scales from peft's own configuration. Per-module patterns are refused: their rules have changed over time."""
    for key in ("alpha_pattern", "rank_pattern"):
        if config.get(prefix + key):
            raise UserError(
                f"{path}: {key} differs by module",
                fix="save it with one rank and one alpha, or merge it with the tool that wrote it",
            )
    if config.get(prefix + "use_dora"):
        raise UserError(f"{path}: a DoRA, not a plain LoRA")
    alpha = config.get(prefix + "lora_alpha")
    if not isinstance(alpha, int | float):
        raise UserError(
            f"{path}: the scale cannot be known: no {prefix}lora_alpha", expected="the adapter's configuration"
        )
    root = bool(config.get(prefix + "use_rslora"))
    return {module: float(alpha) / (rank**0.5 if root else rank) for module, rank in ranks.items()}


def _adapter_config(path: Path) -> dict[str, object]:
    beside = path.with_name(ADAPTER_CONFIG)
    try:
        text = beside.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the scale cannot be known: {beside.name}: {error}",
            fix="keep adapter_config.json beside the file",
        ) from None
    return _read_object(text, str(beside))


def _read_object(text: str, origin: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{origin}: the scale cannot be known: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{origin}: the scale cannot be known: {type(value).__name__}", expected="a JSON object")
    return value


def _run_lora_config(path: Path) -> LoRAConfig | None:
    """The LoRA section of the run that a checkpoint's file belongs to, RUN/checkpoints/step-N/lora.safetensors; None
    for a file elsewhere."""
    place = path.resolve().parent.parent.parent / "config.yaml"
    if path.resolve().parent.parent.name != "checkpoints" or not place.is_file():
        return None
    values = parse_yaml(place.read_text(encoding="utf-8"), str(place))
    return validate_config(LoRAConfig, values.get("lora") or {}, origin=str(place))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", expected="a LoRA as .safetensors") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors: {error}",
            fix="download it again: it is cut short, or not a safetensors file",
        ) from None


def module_order(module: str) -> tuple[int, str]:
    match = BLOCK_NAME.fullmatch(module)
    return (int(match[1]), match[2]) if match else (-1, module)


def raw_pairs(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Pair]:
    """The pairs of a raw state (`lora.lora_state`, a checkpoint's file), the config's scale beside them."""
    modules = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {m: Pair(state[f"{m}.lora_A.weight"], state[f"{m}.lora_B.weight"], config.scale) for m in modules}


def save_lora(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what `name_tensors` gave as safetensors.

    A `lora_adapter_metadata` of the source is left out: its scale is in B now, and diffusers would apply it twice.
    """
    kept = {name: value for name, value in metadata.items() if name != "lora_adapter_metadata"}
    write_tensors(path, tensors, {"format": "pt", **kept})


def name_tensors(
    pairs: Mapping[str, Pair], written: Format = "comfyui", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Pairs under a tool's names, contiguous, on the CPU; the scale is folded into B in every format, so that readers
    cannot disagree on it.

    Raises UserError for a format that is read here and not written.
    """
    if written not in EXPORT_FORMATS:
        raise UserError(f"--format {written}: not written here", expected=", ".join(EXPORT_FORMATS))
    tensors: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        stem, down, up = _stem(module, written)
        tensors[stem + down] = pair.down_rI.to("cpu", dtype).contiguous()
        tensors[stem + up] = (pair.up_Or.float() * pair.scale).to("cpu", dtype).contiguous()
        if written in ("comfyui", "musubi", "videox"):
            tensors[f"{stem}.alpha"] = torch.tensor(float(pair.rank))
    return tensors


def _stem(module: str, written: Format) -> tuple[str, str, str]:
    match = BLOCK_NAME.fullmatch(module)
    if written in ("musubi", "videox"):
        prefix = "lora_unet_" if written == "musubi" else "lora_unet__"
        return prefix + module.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"
    if written == "diffsynth":
        return module, ".lora_A.default.weight", ".lora_B.default.weight"
    if written == "comfyui":
        return f"diffusion_model.{module}", ".lora_A.weight", ".lora_B.weight"
    theirs = f"blocks.{match[1]}.{_DIFFUSERS[match[2]]}" if match else _DIFFUSERS[module]
    return f"transformer.{theirs}", ".lora_A.weight", ".lora_B.weight"


def refuse_other_model(lora: LoRAFile, sizes: Mapping[str, tuple[int, int]], origin: str) -> None:
    """Raise UserError unless every module of the LoRA is in `sizes` (module → (O, I)) and fits it."""
    for module, pair in lora.pairs.items():
        ours = sizes.get(module)
        theirs = (int(pair.up_Or.shape[0]), int(pair.down_rI.shape[1]))
        if ours != theirs:
            there = f"is {ours[0]} × {ours[1]}" if ours else "does not exist"
            raise UserError(
                f"{lora.origin}: {module} adapts a {theirs[0]} × {theirs[1]} linear, which {there} in {origin}",
                expected="a LoRA for this model",
            )
