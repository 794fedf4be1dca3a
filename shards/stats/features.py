"""A latent's features: per-channel mean, deviation and smoothness, and a fingerprint of its pictures.

    C channels   T frames   H, W of the latent's grid   R rows that are read

Statistics are taken from every k-th row of the grid over all frames, at most 32,768 elements a latent, k such that all
heights of the picture enter: float16 converts slowly, and thousands of samples leave no doubt about a channel. Whether
a latent is finite and whether it is constant is decided on all its elements.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from shards.format.arrays import DTYPES, largest_magnitude

MAX_ELEMENTS = 2**15
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
    """uint8 [C × 16 / 8]: whether each cell of a channel, over all frames, is above the mean of the channel's."""
    is_finite: bool
    is_constant: bool
    """No channel varies: one value everywhere, or one a channel. No picture gives that."""


def latent_features(latent: np.ndarray) -> LatentFeatures:
    """Features of a C×T×H×W latent in a stored type (uint16: bfloat16's bits)."""
    num_channels, num_frames, height, width = latent.shape
    step = row_step(num_frames * height, height, latent.size)
    # `take` copies complete rows: four times as fast as a slice with a step made contiguous.
    rows_CRW = latent.reshape(num_channels, -1, width).take(np.arange(0, num_frames * height, step), axis=1)
    x_CRW = as_float32(rows_CRW)
    is_finite = math.isfinite(largest_magnitude(latent))
    if not is_finite:
        x_CRW[~(np.abs(x_CRW) < _BEYOND_FLOAT16)] = 0
    values = _centre(x_CRW)
    is_constant = bool(values[1].max() < CONSTANT_STD)
    if is_constant:  # all elements are read only where the chosen rows do not vary
        is_constant = bool((np.ptp(as_float32(latent).reshape(num_channels, -1), axis=1) < CONSTANT_STD).all())
    cells = _pool(x_CRW, step, height)
    above = cells > np.add.reduce(cells, axis=1, keepdims=True) / np.float32(GRID * GRID)
    # What does not vary has no pictures to be alike in: rounding alone would set its bits.
    return LatentFeatures(values, np.packbits(above & (not is_constant)), is_finite, is_constant)


@lru_cache(maxsize=256)
def row_step(num_rows: int, height: int, num_elements: int) -> int:
    """The step over the latent's rows: every so many is read, to stay under MAX_ELEMENTS.

    Of the steps up to half as large again, the one whose rows are spread most evenly over the grid's height: one more
    than the height would go down it once, a row a frame, and never reach the lower half.
    """
    least = max(1, math.ceil(num_elements / MAX_ELEMENTS))

    def widest_gap(step: int) -> int:
        seen = sorted({row % height for row in range(0, num_rows, step)})
        return max(b - a for a, b in zip([-1, *seen], [*seen, height], strict=True))

    return min(range(least, least + least // 2 + 4), key=widest_gap)


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


def _centre(x_CRW: np.ndarray) -> np.ndarray:
    """Mean, deviation and correlation of horizontal neighbours, float32 [3, C]; the means are taken off in place."""
    flat = x_CRW.reshape(len(x_CRW), -1)
    values = np.zeros((len(FEATURES), len(flat)), np.float32)
    mean = np.divide(np.add.reduce(flat, axis=1), np.float32(flat.shape[1]), out=values[0])
    # Centred first: float32 sums of squares would lose a small deviation around a large mean.
    flat -= mean[:, None]
    variance = np.vecdot(flat, flat) / np.float32(flat.shape[1])
    np.sqrt(variance, out=values[1])
    left, right = x_CRW[..., :-1], x_CRW[..., 1:]
    if left.size:
        neighbours = np.einsum("crw,crw->c", left, right) / np.float32(left[0].size)
        np.divide(neighbours, np.maximum(variance, np.float32(CONSTANT_STD**2)), out=values[2])
    return values


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
