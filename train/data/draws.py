"""Every random number of training, as a function of (seed, step, slot, purpose) alone.

Philox 4×64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is counter-based: a draw is
looked up, not generated in turn, so that processes, workers, resumes and micro-batches cannot change it. NumPy
guarantees the raw stream of its bit generators but not its distributions, hence the uniform and normal transforms
are our own and use only operations that IEEE 754 rounds exactly (+ − × ÷ √): the bits are the same on every machine.

Counter words, low to high: block within the stream, slot, step, purpose. Key words: seed, DRAWS_VERSION.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from shards.errors import UserError

DRAWS_VERSION = 1
CHUNK_ELEMENTS = 1 << 15  # keeps the temporaries of the normal transform in a core's cache


class Purpose(enum.IntEnum):
    """What a stream of draws is for. Values are part of DRAWS_VERSION: never reuse one."""

    NOISE = 1
    SIGMA = 2
    MODE = 3
    CAPTION = 4
    CAPTION_DROPOUT = 5
    LORA_DROPOUT = 6
    SUBSTITUTE = 7
    HELD_OUT_NOISE = 8
    STRATUM = 9


class SlotDraws(NamedTuple):
    """The small choices of one slot of one step."""

    sigma_quantile: float
    """Uniform in (0, 1): the objective turns it into a noise level."""
    image_to_video: bool
    """Train with a clean first frame."""
    caption: int
    """Index of the caption variant."""
    drop_caption: bool
    """Give the null caption instead."""
    dropout_key: int
    """Non-negative int63 that keys the LoRA dropout of the slot."""


def draw_slot(
    seed: int,
    step: int,
    slot: int,
    *,
    image_to_video_share: float,
    num_captions: int,
    caption_dropout: float,
    num_strata: int = 1,
) -> SlotDraws:
    """The small choices of `slot` at `step`. Shares of 0 and 1 are exact. `num_strata`: see `draw_quantile`."""
    return SlotDraws(
        sigma_quantile=draw_quantile(seed, step, slot, num_strata),
        image_to_video=draw_uniform(seed, step, slot, Purpose.MODE) < image_to_video_share,
        caption=draw_integer(seed, step, slot, Purpose.CAPTION, num_captions),
        drop_caption=draw_uniform(seed, step, slot, Purpose.CAPTION_DROPOUT) < caption_dropout,
        dropout_key=int(raw_bits(seed, step, slot, Purpose.LORA_DROPOUT, 1)[0] >> np.uint64(1)),
    )


def draw_quantile(seed: int, step: int, slot: int, num_strata: int = 1) -> float:
    """A float64 in (0, 1), uniform over steps. Of `num_strata` slots of a step each takes another of as many equal
    parts of it: which one, is a permutation by (seed, step); where in it, the slot's own draw."""
    if num_strata == 1:
        return draw_uniform(seed, step, slot, Purpose.SIGMA)
    within = (int(raw_bits(seed, step, slot, Purpose.SIGMA, 1)[0] >> np.uint64(32)) + 0.5) * 2.0**-32
    return float((_strata(seed, step, num_strata)[slot] + within) / num_strata)


@lru_cache(maxsize=64)
def _strata(seed: int, step: int, num_strata: int) -> list[int]:
    order: list[int] = np.argsort(raw_bits(seed, step, 0, Purpose.STRATUM, num_strata), kind="stable").tolist()
    return order


def draw_noise(
    seed: int, step: int, slot: int, shape: Sequence[int], purpose: Purpose = Purpose.NOISE
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Standard normal float32 of `shape` (C×T×H×W), always all of it: for a part, slice the result."""
    count = math.prod(shape)
    bits = raw_bits(seed, step, slot, purpose, (count + 1) // 2)
    halves = bits.astype("<u8", copy=False).view("<u4")[:count]
    noise = np.empty(count, dtype=np.float32)
    for start in range(0, count, CHUNK_ELEMENTS):
        part = halves[start : start + CHUNK_ELEMENTS].astype(np.float64)
        noise[start : start + CHUNK_ELEMENTS] = normal_from_uniform((part + 0.5) * 2.0**-32)
    return noise.reshape(tuple(shape))


def draw_uniform(seed: int, step: int, slot: int, purpose: Purpose) -> float:
    """A float64 in the open interval (0, 1)."""
    return (int(raw_bits(seed, step, slot, purpose, 1)[0] >> np.uint64(12)) + 0.5) * 2.0**-52


def draw_integer(seed: int, step: int, slot: int, purpose: Purpose, below: int) -> int:
    """An integer in [0, below), without the modulo's bias."""
    return int(raw_bits(seed, step, slot, purpose, 1)[0]) * below >> 64


def raw_bits(
    seed: int, step: int, slot: int, purpose: Purpose, count: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """`count` uint64 of the stream (seed, step, slot, purpose). Streams never overlap."""
    counter = np.array([0, slot, step, purpose], dtype=np.uint64)
    key = np.array([seed, DRAWS_VERSION], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def check_draws_version(version: int) -> None:
    """Raise UserError when a checkpoint's draws were made by another version of this file."""
    if version != DRAWS_VERSION:
        raise UserError(
            f"the checkpoint's random draws are version {version}, this program's are {DRAWS_VERSION}",
            expected="the same version, or the run would see other noise after the resume than before",
            fix="resume with the program that began the run, or begin a new run",
        )


# Wichura 1988, algorithm AS 241, PPND7: the inverse normal distribution to about 1e-7 relative.
_A = (3.3871327179e0, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1)
_B = (1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1)
_C = (1.4234372777e0, 2.7568153900e0, 1.3067284816e0, 1.7023821103e-1)
_D = (1.0, 7.3700164250e-1, 1.2021132975e-1)
_E = (6.6579051150e0, 3.0812263860e0, 4.2868294337e-1, 1.7337203997e-2)
_F = (1.0, 2.4197894225e-1, 1.2258202635e-2)


def normal_from_uniform(uniform: np.ndarray) -> np.ndarray:
    """Quantiles of the standard normal, float64 in (0, 1) to float64 (AS 241, PPND7)."""
    centred = uniform - 0.5
    inner = 0.180625 - centred * centred
    normal = centred * _polynomial(_A, inner) / _polynomial(_B, inner)
    outside = np.flatnonzero(np.abs(centred) > 0.425)
    tail = uniform[outside]
    root = np.sqrt(-_logarithm(np.minimum(tail, 1.0 - tail)))
    near, far = root - 1.6, root - 5.0
    middle = _polynomial(_C, near) / _polynomial(_D, near)
    extreme = _polynomial(_E, far) / _polynomial(_F, far)
    normal[outside] = np.copysign(np.where(root <= 5.0, middle, extreme), centred[outside])
    return normal


def _logarithm(values: np.ndarray) -> np.ndarray:
    """Natural logarithm to 1e-14 from exact operations only: a C library's differs by machine in the last bit."""
    mantissa, exponent = np.frexp(values)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = np.where(low, exponent - 1, exponent)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = np.full_like(ratio, 1.0 / 17.0)
    for odd in (15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / odd
    return 2.0 * ratio * series + exponent * 0.6931471805599453


def _polynomial(coefficients: Sequence[float], values: np.ndarray) -> np.ndarray:
    result = np.full_like(values, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result *= values
        result += coefficient
    return result
