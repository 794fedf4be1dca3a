"""Latents to tokens and back.

Shapes: B slots, C channels, T H W latent frames, rows, columns, L tokens, P channels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from train.config.model import DiTConfig


def num_patch_channels(config: DiTConfig, channels: int) -> int:
    """Numbers in one token's patch."""
    return channels * config.patch[0] * config.patch[1] * config.patch[2]


def token_grid(config: DiTConfig, shape: Sequence[int]) -> tuple[int, int, int]:
    """Tokens along frames, rows and columns of a latent B × C × T × H × W."""
    return shape[2] // config.patch[0], shape[3] // config.patch[1], shape[4] // config.patch[2]


def patchify(latent_BCTHW: Float[Tensor, "b c t h w"], patch: tuple[int, int, int]) -> Float[Tensor, "b l p"]:
    """Latent to tokens in (frame, row, column) order; a patch is flattened channels first, as the weight is."""
    x = latent_BCTHW
    for axis, size in zip((2, 4, 6), patch, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(
    tokens_BLP: Float[Tensor, "b l p"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Float[Tensor, "b c t h w"]:
    """Tokens to latent; here a patch is flattened channels last (Wan model.py, unpatchify)."""
    x = tokens_BLP.unflatten(1, grid).unflatten(4, (*patch, -1))
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
