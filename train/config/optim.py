"""Configuration of the optimizer. Importing it imports no torch."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shards.config import Config
from train.config.model import Positive, PositiveNumber, Share

_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
OPTIMIZERS = ("adamw", "adamw8bit")
"""Optimizers with a name of their own."""
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """How the weights move."""

    name: str = "adamw"
    """`adamw` with fp32 state, `adamw8bit` of bitsandbytes, or the path of any torch.optim.Optimizer, such as
    `schedulefree.AdamWScheduleFree`; docs/how-to/optimizers.md."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the class at `name`, all but the parameters and `lr`."""
    lr: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: PositiveNumber = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up, down to `final_lr_share` at `max_steps`."""
    final_lr_share: Share = 0.0
    """Share of `lr` that `cosine` and `linear` end at."""
    max_grad_norm: PositiveNumber | None = 1.0
    """Gradients longer than this are scaled down to it; null: never."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the trained weights, used by the held-out loss and the export."""
    min_8bit_size: Positive = 4096
    """Tensors of fewer elements keep fp32 state under `adamw8bit`."""

    @property
    def is_own(self) -> bool:
        """Whether the optimizer is one of those with a name of their own."""
        return self.name in OPTIMIZERS

    @model_validator(mode="after")
    def _of_its_class(self) -> Self:
        if self.is_own:
            if self.args:
                raise ValueError(f"args are for a class by its path, and name is {self.name}")
            return self
        if not _CLASS_PATH.fullmatch(self.name):
            near = difflib.get_close_matches(self.name, OPTIMIZERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"name {self.name!r} is not {', '.join(OPTIMIZERS)} or a path such as package.Class{hint}")
        if "lr" in self.args:
            raise ValueError("args.lr: the learning rate is optim.lr, which the schedule moves")
        for name in ("betas", "eps", "weight_decay", "min_8bit_size"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for {' and '.join(OPTIMIZERS)}; for {self.name} put it into args")
        return self
