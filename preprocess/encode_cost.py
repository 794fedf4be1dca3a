"""What encoding costs before it runs: FLOPs of the VAE in closed form, and what GPUs have been found to make of them.

The FLOPs are counted of the architecture (2 a multiply-add): a first chunk of one frame, then chunks of four; both
scale with the picture's area. The speeds are estimates for planning (docs/performance.md says what is measured), since
no speed of this VAE has been published.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

from shards.errors import UserError

Mode = Literal["fp32", "bf16", "fp16"]

_AREA = 1280 * 704
_FIRST_TFLOP = 4.2
"""The first frame, at 1280×704."""
_CHUNK_TFLOP = 12.617
"""Every four frames more, at 1280×704."""


def vae_encode_tflop(width: int, height: int, num_frames: int) -> float:
    """10¹² floating-point operations of encoding one window of 4k+1 frames."""
    return (_FIRST_TFLOP + _CHUNK_TFLOP * ((num_frames - 1) // 4)) * width * height / _AREA


class EncodeSpeed(NamedTuple):
    """What one kind of GPU makes of the VAE's encoder, 10¹² FLOP/s."""

    fp32: float
    fast: float | None
    """In its fast 16-bit mode; None: it has none."""
    fast_mode: str
    note: str = ""


# 155.6 TFLOP are one clip of 1280×704×49: a V100's 13 to 15 s in fp32 are 11.1 TFLOP/s, 71 % of its peak, and the same
# share is taken for other cards' fp32 (without TF32, which is off). In 16 bits: V100 5 s, A100 1.2 s, H100 0.4 s.
SPEEDS = {
    "v100-32gb": EncodeSpeed(11.1, 31.0, "fp16", "PCIe"),
    "v100-sxm": EncodeSpeed(12.0, 34.0, "fp16", "NVLink, 32 GB"),
    "a100-40gb": EncodeSpeed(13.8, 130.0, "fp16 or bf16", "SXM"),
    "a100-80gb": EncodeSpeed(13.8, 130.0, "fp16 or bf16", "SXM"),
    "h100": EncodeSpeed(47.0, 389.0, "fp16 or bf16", "SXM, 80 GB"),
    "h200": EncodeSpeed(47.0, 389.0, "fp16 or bf16", "SXM"),
    "rtx4090": EncodeSpeed(58.0, 62.0, "fp16 or bf16", "PCIe"),
}


def find_speed(name: str) -> EncodeSpeed:
    """The figures of a GPU by its name here. Raises UserError for an unknown one."""
    if name in SPEEDS:
        return SPEEDS[name]
    near = difflib.get_close_matches(name, SPEEDS, n=1, cutoff=0.4)
    raise UserError(
        f"--gpu {name}: not known" + (f"; did you mean {near[0]}?" if near else ""), expected=", ".join(SPEEDS)
    )


def encode_seconds(speed: EncodeSpeed, mode: Mode, tflop: float) -> float:
    """Seconds of encoding so many TFLOP on one GPU in a mode."""
    rate = speed.fp32 if mode == "fp32" or speed.fast is None else speed.fast
    return tflop / rate
