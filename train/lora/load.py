"""`load`: a LoRA of any tool into a model of any of the three kinds that `lora.linears` knows."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from train.lora.export import locate_lora
from train.lora.formats import LoRAFile, read_lora
from train.lora.lora import attach_lora


def load(model: nn.Module, source: str | Path, strength: float = 1.0) -> LoRAFile:
    """Load a LoRA of any tool into a model: beside its weights, in float32, or into the LoRA that `inject` made.

    Args:
        source: a file, a folder of peft or diffusers, a run or a checkpoint.
        strength: on top of the LoRA's own scale.

    Raises: UserError for a LoRA of another model, or of other targets or another rank than what was injected; nothing
    is changed then.
    """
    lora = read_lora(locate_lora(Path(source))[0])
    attach_lora(model, lora, strength)
    return lora
