"""What a latent's statistics say: per-channel mean, deviation and smoothness, and a fingerprint of its pictures.

    C channels   T frames   H, W of the latent's grid   R rows that are looked at

Statistics are taken from every k-th row of the grid, at most 65,536 elements a latent and k coprime to H, so that rows
of all heights enter: float16 converts slowly, and thousands of samples leave no doubt about a channel. Whether a latent
is finite and whether it is constant is asked of all its elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from shards.codec import DTYPES

MAX_ELEMENTS = 2**16
FEATURES = ("mean", "std", "smoothness")
"""Of each channel; smoothness is the correlation of neighbours in a row, which a VAE's pictures have in common."""
GRID = 4
"""The fingerprint's cells along height and along width."""
CONSTANT_STD = 1e-3


class LatentFeatures(NamedTuple):
    """One latent's features."""

    values: np.ndarray
    """float32 [3, C], in the order of FEATURES."""
    fingerprint: np.ndarray
    """uint8 [C × 16 / 8]: whether each cell of a channel, over all frames, lies above the channel's median cell."""
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
        x_CRW = np.nan_to_num(x_CRW, nan=0.0, posinf=0.0, neginf=0.0)
    mean, variance, smoothness = _moments(x_CRW)
    std = np.sqrt(variance)
    is_constant = bool((std < CONSTANT_STD).all()) and _is_constant(latent)
    cells = _pool(x_CRW, np.arange(0, rows_CRW.shape[1], step) % height, height)
    bits = cells > np.median(cells, axis=1, keepdims=True)
    return LatentFeatures(np.stack([mean, std, smoothness]), np.packbits(bits), is_finite, is_constant)


def row_step(num_elements: int, height: int) -> int:
    """Every how many rows are looked at: enough to stay under MAX_ELEMENTS, and coprime to the grid's height."""
    step = max(1, math.ceil(num_elements / MAX_ELEMENTS))
    while math.gcd(step, height) > 1:
        step += 1
    return step


def as_float32(values: np.ndarray) -> np.ndarray:
    """Stored values as contiguous float32; uint16 is bfloat16's bits."""
    if values.dtype == DTYPES["bfloat16"]:
        return np.ascontiguousarray((values.astype(np.uint32) << 16).view(np.float32))
    return np.ascontiguousarray(values, np.float32)


def _moments(x_CRW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and correlation of horizontal neighbours, each float32 [C]."""
    flat = x_CRW.reshape(len(x_CRW), -1)
    mean = flat.mean(axis=1)
    # Centred first: float32 sums of squares would lose a small deviation around a large mean.
    x_CRW = x_CRW - mean[:, None, None]
    flat = x_CRW.reshape(len(x_CRW), -1)
    variance = np.vecdot(flat, flat) / flat.shape[1]
    left, right = x_CRW[..., :-1], x_CRW[..., 1:]
    if not left.size:
        return mean, variance, np.zeros_like(mean)
    neighbours = np.einsum("crw,crw->c", left, right) / left[0].size
    return mean, variance, neighbours / np.maximum(variance, CONSTANT_STD**2)


def _pool(x_CRW: np.ndarray, heights: np.ndarray, height: int) -> np.ndarray:
    """Means of 4×4 cells of the picture over all frames, float32 [C, 16]."""
    _, num_rows, width = x_CRW.shape
    across = _cells(np.arange(width), width)
    down = _cells(heights, height)
    # Two small products; an einsum of three operands would not be one.
    of_rows = x_CRW.reshape(-1, width) @ across
    cells = down.T @ of_rows.reshape(-1, num_rows, GRID)
    result: np.ndarray = cells.reshape(-1, GRID * GRID)
    return result


def _cells(places: np.ndarray, size: int) -> np.ndarray:
    """float32 [places, 4]: each place's weight in the mean of its cell."""
    one_hot = (places * GRID // size)[:, None] == np.arange(GRID)
    weights: np.ndarray = (one_hot / np.maximum(1, one_hot.sum(axis=0))).astype(np.float32)
    return weights


def _is_finite(latent: np.ndarray) -> bool:
    """By the exponent's bits: to ask float16 itself takes ten times as long."""
    bits, mask = {
        "float16": (np.uint16, 0x7C00),
        "bfloat16": (np.uint16, 0x7F80),
        "float32": (np.uint32, 0x7F800000),
    }[next(name for name, dtype in DTYPES.items() if dtype == latent.dtype)]
    return bool((latent.view(bits) & mask).max(initial=0) != mask)


def _is_constant(latent: np.ndarray) -> bool:
    values = as_float32(latent).reshape(len(latent), -1)
    return bool((np.ptp(values, axis=1) < CONSTANT_STD).all())
