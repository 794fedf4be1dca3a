"""Small clips made for tests: pictures from numpy, encoded by the ffmpeg in use."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.config import PictureSize, PrepConfig
from preprocess.corpus.records import Record
from preprocess.facts import ClipFacts
from preprocess.video.ffmpeg import find_ffmpeg
from preprocess.video.probe import probe_clip
from shards.config import validate_config

LOSSLESS = ("-c:v", "libx264", "-preset", "ultrafast", "-qp", "0", "-pix_fmt", "yuv420p")
SMALL = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "12", "-pix_fmt", "yuv420p", "-g", "30")


def write_clip(path: Path, frames: np.ndarray, fps: Fraction | int, *output: str, filters: str = "") -> Path:
    """Encode frames (T×H×W luma-like gray, or T×H×W×3 RGB, uint8) into `path`; kept if it is already there."""
    if path.exists():
        return path
    kind = "gray" if frames.ndim == 3 else "rgb24"
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    partial = path.with_name(f"partial-{path.name}")
    command = [find_ffmpeg(), "-nostdin", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", kind, "-s", size]
    command += [
        "-r",
        str(fps),
        "-i",
        "pipe:0",
        *(("-vf", filters) if filters else ()),
        *(output or SMALL),
        str(partial),
    ]
    subprocess.run(command, input=np.ascontiguousarray(frames).tobytes(), check=True, timeout=120)
    return partial.rename(path)


def ffmpeg_run(*arguments: str | Path) -> None:
    """Run ffmpeg; a failure of it is the test's."""
    command = [find_ffmpeg(), "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=120)


def prep_config(
    sizes: Sequence[tuple[int, int]] = ((832, 480),), max_upscale: float = 100.0, **sections: Any
) -> PrepConfig:
    """A configuration for one-clip tests: sizes as (width, height), other sections as plain values."""
    values = {
        "output": "unused",
        "corpus": {"location": "unused"},
        "sieve": {"min_seconds": 0.1, "max_seconds": 60.0},
        "buckets": {"sizes": [{"width": w, "height": h} for w, h in sizes], "max_upscale": max_upscale},
    }
    return validate_config(PrepConfig, values | sections, origin="test")


def a_record(**fields: Any) -> Record:
    """An annotation that says nothing but what is given."""
    return Record(clip_id="clip", source="clip.json", **fields)


def probed(path: Path, config: PrepConfig | None = None, **fields: Any) -> ClipFacts:
    """The facts of a clip under a record of `fields`."""
    return probe_clip(path, a_record(**fields), config or prep_config())


def only_bucket(config: PrepConfig) -> PictureSize:
    """The one size of a configuration."""
    (size,) = config.buckets.sizes
    return size


NUM_BITS = 10


def number_picture(number: int, width: int = 160, height: int = 96) -> np.ndarray:
    """A gray picture that carries `number` in Gray code as ten upright stripes, dark or light."""
    code = number ^ (number >> 1)
    stripes = [200 if code >> bit & 1 else 50 for bit in range(NUM_BITS)]
    row = np.repeat(np.array(stripes, np.uint8), width // NUM_BITS)
    return np.broadcast_to(np.pad(row, (0, width - len(row)), "edge"), (height, width)).copy()


def read_number(frame: np.ndarray) -> int:
    """The number in a decoded frame (H×W×3) of the same shape as `number_picture`'s, whatever its size."""
    gray = frame.astype(np.float32).mean(axis=(0, 2))
    stripe = len(gray) / NUM_BITS
    code = 0
    for bit in range(NUM_BITS):
        middle = gray[int((bit + 0.3) * stripe) : int((bit + 0.7) * stripe)].mean()
        code |= int(middle > 125) << bit
    number = 0
    while code:
        number ^= code
        code >>= 1
    return number


def weave(pictures: np.ndarray, *, top_first: bool = True) -> np.ndarray:
    """Interlace T pictures, one a field, into T/2 frames."""
    frames = pictures[0::2].copy()
    later = 1 if top_first else 0
    frames[:, later::2] = pictures[1::2, later::2]
    return frames


def interlaced(top_first: bool = True, quality: Sequence[str] = ("-crf", "10")) -> tuple[str, ...]:
    """Output options of an interlaced H.264 stream."""
    order = "tff=1" if top_first else "bff=1"
    flags = ("-flags", "+ilme+ildct", "-x264-params", order)
    return ("-c:v", "libx264", "-preset", "veryfast", *quality, "-pix_fmt", "yuv420p", "-g", "30", *flags)


def with_audio(source: Path, path: Path, *output: str) -> Path:
    """`source`, muxed again with a tone beside it."""
    ffmpeg_run("-i", source, "-f", "lavfi", "-i", "sine=duration=5", "-c:v", "copy", *output, path)
    return path
