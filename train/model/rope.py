"""Rotary positions over (frame, row, column), in real arithmetic.

Shapes: B slots, L tokens, N heads, K channels a head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

THETA = 10_000.0
MAX_POSITIONS = 1024


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with frame, row and column: 44, 42, 42 of 128 (Wan model.py, rope_params)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=8)
def rope_table(
    head_dim: int, grid: tuple[int, int, int], offset: int, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of tokens `offset … offset + num_tokens - 1` of a grid of frames × rows × columns.

    Angles are computed in float64 and kept in float32. The index is global, so a rank that holds a part of the
    sequence passes where its part begins. Channels 2j and 2j+1 are one pair; the sine of channel 2j carries the minus
    sign of the rotation, as `rotate` wants it.

    Returns: two tensors L × 1 × K, float32.
    Raises: ValueError when a position lies beyond the grid or the 1,024 trained positions of an axis.
    """
    if max(grid) > MAX_POSITIONS:
        raise ValueError(f"grid {grid} has more than {MAX_POSITIONS} positions on an axis")
    frames, rows, columns = grid
    if offset < 0 or offset + num_tokens > frames * rows * columns:
        raise ValueError(f"tokens {offset}…{offset + num_tokens} lie outside a grid of {frames * rows * columns}")
    # The table is cached: made under inference_mode it could not be used in training later.
    with torch.inference_mode(False):
        return _table(head_dim, (rows, columns), offset, num_tokens, device)


def _table(
    head_dim: int, picture: tuple[int, int], offset: int, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows, columns = picture
    token = torch.arange(offset, offset + num_tokens, dtype=torch.int64)
    places = (token // (rows * columns), token // columns % rows, token % columns)
    angles = torch.cat([_angles(place, size) for place, size in zip(places, axis_sizes(head_dim), strict=True)], dim=1)
    cos = angles.cos().repeat_interleave(2, dim=1)
    sin = torch.stack([-angles.sin(), angles.sin()], dim=2).flatten(1)
    return cos[:, None].float().to(device), sin[:, None].float().to(device)


def _angles(place_L: Tensor, size: int) -> Tensor:
    frequency = THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return place_L.double()[:, None] * frequency


def rotate(
    x_BLNK: Float[Tensor, "b l n k"], cos: Float[Tensor, "l 1 k"], sin: Float[Tensor, "l 1 k"]
) -> Float[Tensor, "b l n k"]:
    """Rotate each pair of channels by its token's angle, float32 (Wan model.py, rope_apply, in real numbers)."""
    even, odd = x_BLNK.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([odd, even], dim=-1).flatten(-2)
    return torch.addcmul(x_BLNK * cos, swapped, sin)
