"""Colour bars come out as they went in, whatever matrix and range the file uses; HDR is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from clips import LOSSLESS, a_record, only_bucket, prep_config, probed

from preprocess.rejection import ClipRejected
from preprocess.video.decode import decode_window
from preprocess.video.ffmpeg import find_ffmpeg
from preprocess.video.probe import probe_clip
from preprocess.video.window import Window

WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
FLAGS = {"bt601": "smpte170m", "bt709": "bt709", "bt2020": "bt2020nc"}
HUES = np.array([(1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 1), (0, 0, 0)], np.uint8)
BARS = np.concatenate([191 * HUES, 255 * HUES[:7], np.full((1, 3), 128, np.uint8)])


def to_yuv(rgb: np.ndarray, matrix: str, full: bool) -> np.ndarray:
    """Y'CbCr of R'G'B' in 0–255 by the recommendations' own equations, rounded to 8 bits."""
    red_weight, blue_weight = WEIGHTS[matrix]
    red, green, blue = np.moveaxis(rgb.astype(np.float64) / 255, -1, 0)
    luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    cb, cr = (blue - luma) / (2 - 2 * blue_weight), (red - luma) / (2 - 2 * red_weight)
    luma_step, chroma_step, black = (255, 255, 0) if full else (219, 224, 16)
    planes = (luma_step * luma + black, chroma_step * cb + 128, chroma_step * cr + 128)
    return np.clip(np.rint(np.stack(planes)), 0, 255).astype(np.uint8)


def bars_clip(path: Path, matrix: str, full: bool, *, flagged: bool, width: int, height: int, subsampled: bool) -> Path:
    """Upright bars, six frames, lossless H.264."""
    row = np.repeat(BARS, width // len(BARS), axis=0)
    planes = to_yuv(row, matrix, full)  # 3×W
    frame = np.repeat(planes[:, None, :], height, axis=1)
    step = 2 if subsampled else 1
    data = b"".join([frame[0].tobytes(), frame[1][::step, ::step].tobytes(), frame[2][::step, ::step].tobytes()])
    kind = "yuv420p" if subsampled else "yuv444p"
    setting = f"setparams=range={'pc' if full else 'tv'}"
    if flagged:
        setting += f":colorspace={FLAGS[matrix]}"
    command = [find_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", kind, "-s", f"{width}x{height}"]
    command += ["-r", "24", "-i", "pipe:0", "-vf", setting, *LOSSLESS[:-1], kind, str(path)]
    subprocess.run(command, input=data * 6, check=True, timeout=60)
    return path


@pytest.mark.parametrize("subsampled", [False, True], ids=["444", "420"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_flagged_bars_are_exact(tmp_path: Path, matrix: str, full: bool, subsampled: bool) -> None:
    path = bars_clip(tmp_path / "b.mp4", matrix, full, flagged=True, width=640, height=320, subsampled=subsampled)
    assert_bars(path, matrix, full, "flagged")


@pytest.mark.parametrize(("matrix", "width", "height"), [("bt601", 640, 320), ("bt709", 1280, 704)])
def test_unflagged_bars_follow_the_raster(tmp_path: Path, matrix: str, width: int, height: int) -> None:
    path = bars_clip(tmp_path / "b.mp4", matrix, False, flagged=False, width=width, height=height, subsampled=True)
    assert_bars(path, matrix, False, "not flagged")


def assert_bars(path: Path, matrix: str, full: bool, ground: str) -> None:
    config = prep_config(((640, 320),), window={"num_frames": 1})
    facts = probed(path, config)
    assert (facts.matrix, facts.range) == (matrix, "full" if full else "limited")
    assert facts.decisions["matrix"]["ground"].startswith(ground)
    frame = decode_window(path, facts, Window(0.0, 1, "test"), only_bucket(config), config)[0]
    centres = frame[160, 20::40].astype(int)
    assert np.abs(centres - BARS).max() <= 2


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_refused_with_its_own_reason(tmp_path: Path, transfer: str) -> None:
    path = tmp_path / "hdr.mp4"
    tags = f"setparams=color_trc={transfer}:colorspace=bt2020nc:color_primaries=bt2020"
    command = [
        find_ffmpeg(),
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=160x96:d=1",
        "-vf",
        tags,
        *LOSSLESS,
        str(path),
    ]
    subprocess.run(command, check=True, timeout=60)
    with pytest.raises(ClipRejected) as caught:
        probe_clip(path, a_record(), prep_config())
    assert (caught.value.rejection.stage, caught.value.rejection.reason) == ("probe", "hdr")
    assert caught.value.facts["transfer"] in (16, 18) and caught.value.facts["width"] > 0
