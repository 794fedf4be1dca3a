"""What a latent's statistics say: per-channel mean, deviation and smoothness, and a fingerprint of its pictures.

    C channels   T frames   H, W of the latent's grid   R rows that are looked at

Statistics are taken from every k-th row of the grid, at most 65,536 elements a latent and k coprime to H, so that rows
of all heights enter: float16 converts slowly, and thousands of samples leave no doubt about a channel. Whether a latent
is finite and whether it is constant is asked of all its elements.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from shards.codec import DTYPES

MAX_ELEMENTS = 2**16
FEATURES = ("mean", "std", "smoothness")
"""Of each channel; smoothness is the correlation of neighbours in a row, which a VAE's pictures have in common."""
GRID = 4
"""The fingerprint's cells along height and along width."""
CONSTANT_STD = 1e-3
_BEYOND_FLOAT16 = 2.0**16


class LatentFeatures(NamedTuple):
    """One latent's features."""

    values: np.ndarray
    """float32 [3, C], in the order of FEATURES."""
    fingerprint: np.ndarray
    """uint8 [C × 16 / 8]: whether each cell of a channel, over all frames, lies above the mean of the channel's."""
    is_finite: bool
    is_constant: bool
    """No channel varies: one value everywhere, or one a channel. No picture gives that."""


def latent_features(latent: np.ndarray) -> LatentFeatures:
    """Features of a C×T×H×W latent in a stored type (uint16: bfloat16's bits)."""
    num_channels, _, height, width = latent.shape
    rows_CRW = latent.reshape(num_channels, -1, width)
    step = row_step(latent.size, height)
    x_CRW = as_float32(rows_CRW[:, ::step])
    is_finite = _is_finite(latent)
    if not is_finite:
        x_CRW[~(np.abs(x_CRW) < _BEYOND_FLOAT16)] = 0
    mean, variance, smoothness = _moments(x_CRW)
    std = np.sqrt(variance)
    is_constant = bool((std < CONSTANT_STD).all()) and _is_constant(latent)
    cells = _pool(x_CRW, step, height)
    bits = cells > cells.mean(axis=1, keepdims=True)
    return LatentFeatures(np.stack([mean, std, smoothness]), np.packbits(bits), is_finite, is_constant)


def row_step(num_elements: int, height: int) -> int:
    """Every how many rows are looked at: enough to stay under MAX_ELEMENTS, and coprime to the grid's height."""
    step = max(1, math.ceil(num_elements / MAX_ELEMENTS))
    while math.gcd(step, height) > 1:
        step += 1
    return step


def as_float32(values: np.ndarray) -> np.ndarray:
    """Stored values as contiguous float32; uint16 is bfloat16's bits. Infinities and NaN of float16 are 2¹⁶ or more."""
    if values.dtype == DTYPES["bfloat16"]:
        return np.ascontiguousarray((values.astype(np.uint32) << 16).view(np.float32))
    if values.dtype != DTYPES["float16"]:
        return np.ascontiguousarray(values, np.float32)
    # By its bits, which is four times as fast as NumPy's conversion: sign to the top, the rest up by 13, and the
    # exponent's bias made good by 2^(127 − 15); exact for all finite values, those below the normal ones included.
    bits = np.ascontiguousarray(values).view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)
    floats = bits.view(np.float32)
    result: np.ndarray = np.multiply(floats, np.float32(2.0**112), out=floats)
    return result


def _moments(x_CRW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and correlation of horizontal neighbours, each float32 [C]."""
    flat = x_CRW.reshape(len(x_CRW), -1)
    mean = np.add.reduce(flat, axis=1) / np.float32(flat.shape[1])
    # Centred first: float32 sums of squares would lose a small deviation around a large mean.
    x_CRW = x_CRW - mean[:, None, None]
    flat = x_CRW.reshape(len(x_CRW), -1)
    variance = np.vecdot(flat, flat) / flat.shape[1]
    left, right = x_CRW[..., :-1], x_CRW[..., 1:]
    if not left.size:
        return mean, variance, np.zeros_like(mean)
    neighbours = np.einsum("crw,crw->c", left, right) / left[0].size
    return mean, variance, neighbours / np.maximum(variance, CONSTANT_STD**2)


def _pool(x_CRW: np.ndarray, step: int, height: int) -> np.ndarray:
    """Means of 4×4 cells of the picture over all frames, float32 [C, 16]."""
    _, num_rows, width = x_CRW.shape
    across, down = _cells(width, 1, width), _cells(num_rows, step, height)
    # Two small products; an einsum of three operands would not be one.
    of_rows = x_CRW.reshape(-1, width) @ across
    cells = down.T @ of_rows.reshape(-1, num_rows, GRID)
    result: np.ndarray = cells.reshape(-1, GRID * GRID)
    return result


@lru_cache(maxsize=256)
def _cells(num: int, step: int, size: int) -> np.ndarray:
    """float32 [num, 4]: weights of the places 0, step, 2 step … (modulo size) in the means of four cells."""
    places = np.arange(num) * step % size
    one_hot = (places * GRID // size)[:, None] == np.arange(GRID)
    weights: np.ndarray = (one_hot / np.maximum(1, one_hot.sum(axis=0))).astype(np.float32)
    return weights


def _is_finite(latent: np.ndarray) -> bool:
    """By the largest bit patterns of either sign: to ask float16 itself takes ten times as long."""
    signed, unsigned, infinity = {
        "float16": (np.int16, np.uint16, 0x7C00),
        "bfloat16": (np.int16, np.uint16, 0x7F80),
        "float32": (np.int32, np.uint32, 0x7F800000),
    }[next(name for name, dtype in DTYPES.items() if dtype == latent.dtype)]
    sign = 1 << (8 * latent.itemsize - 1)
    largest_positive, largest_negative = latent.view(signed).max(), latent.view(unsigned).max()
    return bool(largest_positive < infinity and largest_negative < sign + infinity)


def _is_constant(latent: np.ndarray) -> bool:
    values = as_float32(latent).reshape(len(latent), -1)
    return bool((np.ptp(values, axis=1) < CONSTANT_STD).all())
