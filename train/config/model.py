"""What decides the model's shape and its LoRA. Importing it imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from shards.config import Config

Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class DiTConfig(Config):
    """Sizes of a Wan2.2 diffusion transformer: `TI2V_5B` is the published one, smaller ones are for tests and demo."""

    dim: Positive
    """Width of the residual stream, in channels."""
    num_heads: Positive
    """Attention heads; each has dim / num_heads channels."""
    num_layers: Positive
    """Transformer blocks."""
    ffn_dim: Positive
    """Inner width of the feed-forward, in channels."""
    in_channels: Positive = 48
    """Latent channels of the input."""
    out_channels: Positive = 48
    """Velocity channels of the output."""
    patch: tuple[Positive, Positive, Positive] = (1, 2, 2)
    """Latent frames × rows × columns that make one token."""
    text_len: Positive = 512
    """Text tokens attended; shorter text is padded with zero rows, which are attended too."""
    text_dim: Positive = 4096
    """Width of the text encoder's embeddings."""
    freq_dim: Annotated[int, Field(gt=0, multiple_of=2)] = 256
    """Width of the timestep's sinusoids."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to variances in every norm."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @model_validator(mode="after")
    def _whole_heads(self) -> DiTConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} does not divide by num_heads {self.num_heads}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"dim / num_heads is {self.head_dim}; rotary positions need an even number, at least 6")
        if self.patch[0] != 1:
            raise ValueError(
                f"patch {list(self.patch)}: the first latent frame must be its own tokens, so patch[0] is 1"
            )
        return self


TI2V_5B = DiTConfig(dim=3072, num_heads=24, num_layers=30, ffn_dim=14336)
"""Wan2.2-TI2V-5B (Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py)."""


class LoRAConfig(Config):
    """A low-rank update beside frozen linears: W x + scale · B A x."""

    rank: Positive = 32
    """Inner width of the update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Numerator of the scale; null takes the rank, that is scale 1 (√rank with rs_lora)."""
    rs_lora: bool = False
    """Scale by alpha / √rank in place of alpha / rank (rank-stabilised LoRA, arXiv:2312.03732)."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("self_attn", "cross_attn")
    """Linears of the blocks to adapt: parts of a module's name (self_attn, cross_attn, ffn, q, k, v, o, ffn.0, ffn.2,
    or diffusers' attn1, to_q, net.0.proj), or a pattern of complete names (blocks.1?.self_attn.*). A list, or a text
    with commas: q,k,v,o,ffn.0,ffn.2. One that matches nothing is an error."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs zeroed in training."""

    start_from: str | None = None
    """A LoRA file of any tool, a run or a checkpoint to continue from; its rank must be `rank`, its modules
    `targets`."""

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return tuple(value) if isinstance(value, list) else value

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return alpha / math.sqrt(self.rank) if self.rs_lora else alpha / self.rank
