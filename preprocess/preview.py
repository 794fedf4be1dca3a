"""A strip of a few small frames of a sample, for eyes."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8

STRIP_HEIGHT = 128


def preview_strip(frames: UInt8[np.ndarray, "T H W 3"], num: int) -> bytes:
    """`num` evenly spaced frames side by side, 128 pixels high, as a JPEG. The same frames give the same bytes."""
    from PIL import Image

    num_frames, height, width, _ = frames.shape
    num = min(num, num_frames)
    small_width = max(1, round(width * STRIP_HEIGHT / height))
    strip = Image.new("RGB", (num * small_width, STRIP_HEIGHT))
    for place in range(num):
        frame = frames[round(place * (num_frames - 1) / max(1, num - 1))]
        small = Image.fromarray(np.ascontiguousarray(frame)).resize((small_width, STRIP_HEIGHT), Image.Resampling.BOX)
        strip.paste(small, (place * small_width, 0))
    with io.BytesIO() as file:
        strip.save(file, "JPEG", quality=80, subsampling="4:2:0", optimize=False)
        return file.getvalue()
