"""What a LoRA file says of itself and what its numbers say: the body of `wantrain lora info`."""

from __future__ import annotations

import math
from typing import Any

from train.lora.formats import BLOCK_NAME, LoRAFile, Pair
from train.lora.targets import BLOCK_LINEARS, describe_targets

# Width of the residual stream -> the Wan model that has it.
_MODELS = {3072: "Wan2.2-TI2V-5B", 1536: "Wan2.1-T2V-1.3B", 5120: "a Wan 14B model (2.1-14B or 2.2-A14B)"}
_TOOLS = {"comfyui": "ComfyUI", "musubi": "musubi-tuner", "videox": "VideoX-Fun", "diffsynth": "DiffSynth-Studio"}


def describe_lora(lora: LoRAFile) -> dict[str, Any]:
    """What `wantrain lora info` prints: rank, alpha, targets, norms, tool, model, metadata."""
    norms = {module: update_norm(pair) for module, pair in lora.pairs.items()}
    by_target: dict[str, list[float]] = {}
    for module, norm in norms.items():
        match = BLOCK_NAME.fullmatch(module)
        by_target.setdefault(match[2] if match else module, []).append(norm)
    ranks = sorted({pair.rank for pair in lora.pairs.values()})
    blocks = sorted({int(match[1]) for module in lora.pairs if (match := BLOCK_NAME.fullmatch(module))})
    every = {f"blocks.{n}.{linear}" for n in blocks for linear in BLOCK_LINEARS} | lora.pairs.keys()
    return {
        "file": lora.origin,
        "format": lora.format,
        "written_by": written_by(lora),
        "model": base_model(lora),
        "ranks": ranks,
        "alphas": sorted({round(pair.scale * pair.rank, 6) for pair in lora.pairs.values()}),
        "scale_from": lora.scale_from,
        "targets": describe_targets(every, lora.pairs),
        "scales": sorted({round(pair.scale, 6) for pair in lora.pairs.values()}),
        "num_modules": len(lora.pairs),
        "blocks": f"{blocks[0]}–{blocks[-1]} ({len(blocks)})" if blocks else "none",
        "dtypes": sorted({str(pair.down_rI.dtype).removeprefix("torch.") for pair in lora.pairs.values()}),
        "num_parameters": sum(pair.down_rI.numel() + pair.up_Or.numel() for pair in lora.pairs.values()),
        "update_norms": {
            target: {"mean": sum(values) / len(values), "max": max(values)}
            for target, values in sorted(by_target.items())
        },
        "zero_modules": [module for module, norm in norms.items() if norm == 0],
        "not_finite_modules": [module for module, norm in norms.items() if not math.isfinite(norm)],
        "metadata": lora.metadata,
    }


def update_norm(pair: Pair) -> float:
    """Frobenius norm of scale · B A, from the two small Gram matrices: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ)."""
    down, up = pair.down_rI.double(), pair.up_Or.double()
    square = ((up.T @ up) * (down @ down.T)).sum().item()
    return square if math.isnan(square) else abs(pair.scale) * max(square, 0.0) ** 0.5


def written_by(lora: LoRAFile) -> str:
    """The tool, by what it leaves in the header, else by its naming."""
    if lora.metadata.get("software"):
        return lora.metadata["software"]
    if "ss_network_module" in lora.metadata:
        return f"musubi-tuner or sd-scripts ({lora.metadata['ss_network_module']})"
    if lora.format == "run":
        return "a checkpoint of wantrain"
    return f"not said (the naming of {_TOOLS.get(lora.format, lora.format)})"


def base_model(lora: LoRAFile) -> str:
    """The Wan model a LoRA is for, by the width of its attention."""
    widths = {int(pair.up_Or.shape[0]) for module, pair in lora.pairs.items() if module.endswith("attn.q")}
    widths |= {
        int(pair.down_rI.shape[1]) for module, pair in lora.pairs.items() if module.endswith(("attn.q", "ffn.0"))
    }
    if len(widths) != 1:
        return "unknown"
    width = next(iter(widths))
    return _MODELS.get(width, f"a model of width {width}")


def lines_of(facts: dict[str, Any]) -> list[str]:
    """`describe_lora`'s facts for people."""
    lines = [
        f"{name.replace('_', ' ')}: {_words(value)}" for name, value in facts.items() if not isinstance(value, dict)
    ]
    lines.append("update norms (mean, largest):")
    lines += [f"  {name}: {norm['mean']:.4g}, {norm['max']:.4g}" for name, norm in facts["update_norms"].items()]
    lines.append("header:")
    lines += [f"  {name}: {value[:200]}" for name, value in sorted(facts["metadata"].items())]
    return lines


def _words(value: Any) -> str:
    if isinstance(value, list):
        shown = [str(item) for item in value[:8]]
        return ", ".join(shown) + (f" and {len(value) - 8} more" if len(value) > 8 else "") if shown else "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
