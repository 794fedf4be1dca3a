"""LoRA files as other tools write and read them, and one neutral form between.

    format      a tensor's name                                              scale of B·A
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_A.weight           .alpha ÷ rank; 1 without .alpha
                (or lora_down / lora_up)
    musubi      lora_unet_blocks_0_self_attn_q.lora_down.weight              .alpha ÷ rank
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight                lora_adapter_metadata in the header; else 1
    diffsynth   blocks.0.self_attn.q.lora_A.default.weight                   1
    peft        base_model.model.blocks.0.self_attn.q.lora_A.weight          adapter_config.json beside the file
    run         blocks.0.self_attn.q.lora_A.weight (a checkpoint's raw       the run's own config
                tensors)

`comfyui` with the scale folded into B and .alpha equal to the rank is the one that diffusers, ComfyUI,
DiffSynth-Studio and musubi's converter all read alike; it is what a run exports.

Shapes: r rank, I input channels, O output channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shards.config import parse_yaml, validate_config
from shards.errors import UserError
from train.config.model import LoRAConfig
from train.lora.lora import inject, load_lora_state
from train.model.dit import WanDiT
from train.model.load import diffusers_key

Format = Literal["comfyui", "musubi", "diffusers", "diffsynth", "peft", "run"]
EXPORT_FORMATS: tuple[Format, ...] = ("comfyui", "musubi", "diffusers", "diffsynth")

_BLOCK_LINEARS = (*(f"{kind}.{letter}" for kind in ("self_attn", "cross_attn") for letter in "qkvo"), "ffn.0", "ffn.2")
_OTHER_LINEARS = (
    "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head",
)  # fmt: skip
_OFFICIAL = {linear: linear for linear in (*_BLOCK_LINEARS, *_OTHER_LINEARS)}
_OFFICIAL |= {linear.replace(".", "_"): linear for linear in _OFFICIAL}
BLOCK_NAME = re.compile(r"blocks[._](\d+)[._](.+)")
_PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<a>lora_A|lora_down)|(?P<b>lora_B|lora_up))(?:\.default)?\.weight|(?P<owner>.+)\.alpha"
)
_PREFIXES: tuple[tuple[str, Format], ...] = (
    ("diffusion_model.", "comfyui"),
    ("lora_unet_", "musubi"),
    ("transformer.", "diffusers"),
    ("base_model.model.", "peft"),
)
_NAMINGS = (*(prefix + "…" for prefix, _ in _PREFIXES), "blocks.….lora_A.default.weight")


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


def read_lora(path: str | Path) -> LoRAFile:
    """Read a LoRA written by any tool of the table above.

    Raises UserError naming the file and the key for: a file that is cut short, a tensor that is no part of a plain LoRA
    (DoRA, full differences, biases), half a pair, ranks that disagree, a module that Wan does not have, a scale that
    cannot be known.
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
            alphas[module] = float(tensor)
        else:
            (downs if match["a"] else ups)[module] = tensor
    _refuse_halves(path, downs, ups, alphas)
    scales = _scales(path, found, metadata, {module: int(down.shape[0]) for module, down in downs.items()}, alphas)
    pairs = {module: Pair(downs[module], ups[module], scales[module]) for module in sorted(downs, key=module_order)}
    return LoRAFile(str(path), found, pairs, metadata)


def detect_format(keys: list[str], origin: str) -> Format:
    """Which tool's naming the keys follow. Raises UserError when none, or more than one."""
    found = {_format_of(key) for key in keys}
    if len(found) == 1 and None not in found:
        return next(found for found in found if found)
    if None in found:
        odd = next(key for key in keys if _format_of(key) is None)
        raise UserError(f"{origin}: {odd}: no LoRA naming that is known here", expected=", ".join(_NAMINGS))
    raise UserError(f"{origin}: names of several tools in one file: {', '.join(sorted(str(name) for name in found))}")


def _format_of(key: str) -> Format | None:
    for prefix, name in _PREFIXES:
        if key.startswith(prefix):
            return name
    if _PART.fullmatch(key):
        return "diffsynth" if ".default.weight" in key else "run"
    return None


def _official_module(name: str, path: Path) -> str:
    for prefix, _ in _PREFIXES:
        name = name.removeprefix(prefix)
    match = BLOCK_NAME.fullmatch(name)
    inner, allowed = (match[2], _BLOCK_LINEARS) if match else (name, _OTHER_LINEARS)
    official = _OFFICIAL.get(inner) or _from_diffusers(inner, allowed)
    if official not in allowed:
        image = " (an image-to-video module of Wan2.1)" if "img" in name else ""
        raise UserError(
            f"{path}: {name}: Wan2.2-TI2V-5B has no such linear{image}",
            expected="a LoRA of Wan2.2-TI2V-5B, " + ", ".join(f"blocks.N.{linear}" for linear in _BLOCK_LINEARS),
        )
    return f"blocks.{match[1]}.{official}" if match else str(official)


def _from_diffusers(inner: str, linears: tuple[str, ...]) -> str | None:
    return next((linear for linear in linears if _to_diffusers(linear) == inner), None)


def _to_diffusers(linear: str) -> str:
    if linear in _OTHER_LINEARS:
        return diffusers_key(linear + ".").removesuffix(".")
    return diffusers_key(f"blocks.0.{linear}.").removeprefix("blocks.0.").removesuffix(".")


def _refuse_halves(
    path: Path, downs: Mapping[str, Tensor], ups: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> None:
    for module in sorted({*downs, *ups, *alphas}, key=module_order):
        if module not in downs or module not in ups:
            missing = "A (lora_down)" if module not in downs else "B (lora_up)"
            raise UserError(f"{path}: {module}: {missing} is missing", fix="write the file again, or download it again")
        down, up = downs[module], ups[module]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise UserError(
                f"{path}: {module}: A is {tuple(down.shape)} and B {tuple(up.shape)}",
                expected="r × I and O × r of one rank",
            )


def _scales(
    path: Path, found: Format, metadata: Mapping[str, str], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, float]:
    if found == "peft":
        return _adapter_scales(_adapter_config(path), "", path, ranks)
    if found == "run":
        config = _run_lora_config(path)
        return dict.fromkeys(ranks, config.scale)
    if found == "diffusers" and "lora_adapter_metadata" in metadata:
        try:
            config_of_adapter = json.loads(metadata["lora_adapter_metadata"])
        except ValueError as error:
            raise UserError(f"{path}: lora_adapter_metadata is not JSON: {error}") from None
        return _adapter_scales(config_of_adapter, "transformer.", path, ranks)
    return {module: alphas[module] / rank if module in alphas else 1.0 for module, rank in ranks.items()}


def _adapter_scales(
    config: Mapping[str, object], prefix: str, path: Path, ranks: Mapping[str, int]
) -> dict[str, float]:
    """Scales from peft's own configuration. Per-module patterns are refused: their rules have changed over time."""
    for key in ("alpha_pattern", "rank_pattern"):
        if config.get(prefix + key):
            raise UserError(
                f"{path}: {key} differs by module", fix="save it with one rank and one alpha, or merge it there"
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
    beside = path.with_name("adapter_config.json")
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the scale cannot be known: {beside.name}: {error}",
            fix="keep adapter_config.json beside the file",
        ) from None
    return dict(config)


def _run_lora_config(path: Path) -> LoRAConfig:
    """The LoRA section of the run that a checkpoint's file belongs to: RUN/checkpoints/step-N/lora.safetensors."""
    place = path.resolve().parent.parent.parent / "config.yaml"
    if not place.is_file():
        raise UserError(
            f"{path}: raw tensors of a run, and no run around them: their scale cannot be known",
            fix="give the file inside its run folder, or RUN/lora.safetensors",
        )
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
            fix="download it again: it is cut short or another format",
        ) from None


def module_order(module: str) -> tuple[int, str]:
    match = BLOCK_NAME.fullmatch(module)
    return (int(match[1]), match[2]) if match else (-1, module)


def to_raw_state(lora: LoRAFile, config: LoRAConfig) -> dict[str, Tensor]:
    """A and B by official name, float32, as `lora.load_lora_state` takes them, so that training continues from a file.

    A stays; B takes up the ratio of the file's scale to the config's, so that scale · B A is what it was.
    Raises UserError when the file's rank is not the config's.
    """
    state: dict[str, Tensor] = {}
    for module, pair in lora.pairs.items():
        if pair.rank != config.rank:
            raise UserError(
                f"{lora.origin}: {module} has rank {pair.rank}, lora.rank is {config.rank}",
                fix=f"lora.rank={pair.rank}",
            )
        state[f"{module}.lora_A.weight"] = pair.down_rI.float()
        state[f"{module}.lora_B.weight"] = pair.up_Or.float() * (pair.scale / config.scale)
    return state


def raw_pairs(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Pair]:
    """The pairs of a raw state (`lora.lora_state`, a checkpoint's file), the config's scale beside them."""
    modules = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {m: Pair(state[f"{m}.lora_A.weight"], state[f"{m}.lora_B.weight"], config.scale) for m in modules}


def save_lora(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what `name_tensors` gave as safetensors.

    A `lora_adapter_metadata` of the source is left out: its scale is in B now, and diffusers would apply it twice.
    """
    from safetensors.torch import save_file

    kept = {name: value for name, value in metadata.items() if name != "lora_adapter_metadata"}
    save_file(tensors, path, metadata={"format": "pt", **kept})


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
        if written in ("comfyui", "musubi"):
            tensors[f"{stem}.alpha"] = torch.tensor(float(pair.rank))
    return tensors


def _stem(module: str, written: Format) -> tuple[str, str, str]:
    match = BLOCK_NAME.fullmatch(module)
    if written == "musubi":
        return "lora_unet_" + module.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"
    if written == "diffsynth":
        return module, ".lora_A.default.weight", ".lora_B.default.weight"
    if written == "comfyui":
        return f"diffusion_model.{module}", ".lora_A.weight", ".lora_B.weight"
    theirs = f"blocks.{match[1]}.{_to_diffusers(match[2])}" if match else _to_diffusers(module)
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


def attach_lora(model: WanDiT, lora: LoRAFile, strength: float = 1.0) -> None:
    """Put a file's LoRA beside the model's weights, for inference. Pairs of several ranks are padded with zeros.

    Raises UserError when a module is not there or has another size.
    """
    weights = {name.removesuffix(".weight"): w for name, w in model.named_parameters() if w.ndim == 2}
    refuse_other_model(lora, {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}, "the model")
    rank = max(pair.rank for pair in lora.pairs.values())
    config = LoRAConfig(rank=rank, targets=tuple(lora.pairs))
    inject(model, config, seed=0)
    state = {}
    for module, pair in lora.pairs.items():
        room = rank - pair.rank
        state[f"{module}.lora_A.weight"] = torch.nn.functional.pad(pair.down_rI.float(), (0, 0, 0, room))
        up_Or = pair.up_Or.float() * (pair.scale * strength)
        state[f"{module}.lora_B.weight"] = torch.nn.functional.pad(up_Or, (0, room))
    load_lora_state(model, state, lora.origin)
