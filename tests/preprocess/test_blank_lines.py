"""Lines above the picture that carry nothing are cut, whatever their luma; a picture up to the edge is left alone."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from clips import LOSSLESS, ffmpeg_run, prep_config, probed, write_clip
from footage import footage

from preprocess.video.ffmpeg import find_ffmpeg
from preprocess.video.measure import find_lines_below, find_vbi

NUM_FUZZED = int(os.environ.get("NUM_FUZZED_BANDS", "150"))
SEED = int(os.environ.get("FUZZ_SEED", "7"))
FILMS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


@lru_cache
def pictures(name: str, height: int) -> np.ndarray:
    """Six pictures of real footage, spread over the clip, as 720×`height` luma of limited range."""
    command = [find_ffmpeg(), "-v", "error", "-i", str(footage(name)), "-vf", f"scale=720:{height},fps=1", "-frames:v"]
    command += ["6", "-f", "rawvideo", "-pix_fmt", "gray", "-color_range", "tv", "-"]
    data = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, height, 720)


def with_band(
    name: str, lines: int, luma: int, noise: float, seed: int, height: int = 512, borders: tuple[int, int] = (0, 0)
) -> list[np.ndarray]:
    """Lines of one luma above pictures, and black borders of so many pixels at the left and right of both."""
    rng = np.random.default_rng(seed)
    shown = pictures(name, height)[:, : height - lines]
    band = np.full((len(shown), lines, 720), luma)
    frames = np.concatenate([band, shown], axis=1)
    frames[..., : borders[0]] = frames[..., 720 - borders[1] :] = 16
    frames = frames + rng.normal(0, noise, frames.shape)
    return list(np.clip(np.rint(frames), 0, 255).astype(np.uint8))


def test_bands_of_any_height_luma_and_noise_are_found_to_the_line() -> None:
    """With and without black borders. No more than the band is cut, and less only where it has the picture's luma."""
    rng = np.random.default_rng(SEED)
    less = 0
    for number in range(NUM_FUZZED):
        lines, luma, noise = int(rng.integers(8, 44)), int(rng.integers(0, 256)), float(rng.uniform(0, 6))
        case = (FILMS[number % 3], lines, luma, noise, number)
        height, widest = (480, 512, 576, 608)[number % 4], (0, 16, 96)[number // 12 % 3]
        left, right = (int(border) for border in rng.integers(0, widest + 1, 2))
        frames = with_band(*case, height=height, borders=(left, right))
        found, _ = find_vbi(frames)
        assert found <= lines + 1, (SEED, case, found)
        if found < lines - 1:
            less += 1
            below = np.stack([frame[lines + 1 : lines + 3, left : 720 - right].mean(axis=0) for frame in frames])
            wide = below[:, : below.shape[1] // 24 * 24].reshape(len(frames), -1, 24).mean(axis=2)
            seen = (np.abs(wide - luma).max(axis=0) > 10).mean()
            assert seen < 0.95, (SEED, case, (left, right), found, seen)
    assert less <= NUM_FUZZED / 10, (SEED, less)


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("height", [480, 486, 512, 576, 608])
def test_a_picture_that_reaches_the_edge_is_left_alone(name: str, height: int) -> None:
    rng = np.random.default_rng(3)
    for noise in (0.0, 3.0):
        shown = pictures(name, height) + rng.normal(0, noise, (1, height, 720))
        assert find_vbi(list(np.clip(shown, 0, 255).astype(np.uint8))) == (0, "pictures")


def night(skyline: np.ndarray, noise: float, seed: int) -> list[np.ndarray]:
    """A dark flat sky over lit houses whose roofs make the given line, of 720 columns; 512 lines."""
    rng = np.random.default_rng(seed)
    sky = np.arange(512)[:, None] < skyline[None, :]
    frames = []
    for _ in range(6):
        houses = np.kron(rng.integers(30, 210, (32, 45)), np.ones((16, 16)))
        frames.append(np.where(sky, 18, houses) + rng.normal(0, noise, (512, 720)))
    return [np.clip(np.rint(frame), 0, 255).astype(np.uint8) for frame in frames]


@pytest.mark.parametrize("noise", [0.0, 2.0, 5.0])
def test_the_dark_top_of_a_night_scene_is_left_alone(noise: float) -> None:
    rng = np.random.default_rng(1)
    roofs = np.repeat(rng.integers(10, 90, 24), 30)
    gap = np.where(np.abs(np.arange(720) - 360) < 60, 120, 32)  # one straight roof with a street in it
    slope = 20 + np.arange(720) // 30
    for skyline in (roofs, gap, slope):
        assert find_vbi(night(skyline, noise, 2))[0] == 0


def test_a_letterbox_is_no_blank_line_and_lines_above_one_are_found() -> None:
    shown = pictures("bigbuckbunny.mp4", 360)
    bars = np.full((len(shown), 60, 720), 16, np.uint8)
    lines = np.full((len(shown), 32, 720), 16, np.uint8)
    assert find_vbi(list(np.concatenate([bars, shown, bars], axis=1)))[0] == 0
    assert find_vbi(list(np.concatenate([lines, bars, shown, bars], axis=1)))[0] == 32


KINDS = ("black", "white", "gray", "vitc", "teletext", "captions", "stripe", "noise")
CUT = [(kind, height, 0) for kind in KINDS for height in (512, 480)] + [(kind, 512, 8) for kind in KINDS]


def lines_of(kind: str) -> np.ndarray:
    """32 lines of the blanking interval as 720 pixels of luma each."""
    rng = np.random.default_rng(0)
    luma = np.full((32, 720), {"white": 235, "gray": 126}.get(kind, 16), np.uint8)
    if kind == "vitc":
        luma[12] = luma[14] = np.repeat(np.where(rng.integers(0, 2, 90), 180, 16), 8)
    elif kind == "teletext":
        luma[6:28] = np.repeat(np.where(rng.integers(0, 2, (22, 360)), 140, 16), 2, axis=1)
    elif kind == "captions":
        luma[21] = np.repeat(np.where(rng.integers(0, 2, 45), 120, 16), 16)
    elif kind == "stripe":
        luma[10:14] = 200  # a reference level
    elif kind == "noise":
        luma += rng.integers(0, 9, luma.shape, dtype=np.uint8)
    return luma


@pytest.mark.parametrize(("kind", "height", "border"), CUT)
def test_each_kind_is_cut_and_the_picture_keeps_its_shape(tmp_path: Path, kind: str, height: int, border: int) -> None:
    """32 lines above 480, kept or scaled to 480 with them, as proxies do; 720 or 704 pixels wide; coded with loss."""
    shown = pictures("bikes.mp4", 480)[:4]
    frames = np.concatenate([np.broadcast_to(lines_of(kind), (4, 32, 720)), shown], axis=1)
    frames[..., :border] = frames[..., 720 - border :] = 16
    moving = np.repeat(frames, 12, axis=0)
    lossless = write_clip(tmp_path / "whole.mp4", moving, 24, *LOSSLESS)
    path = tmp_path / "proxy.mp4"
    output = ("-c:v", "libx264", "-preset", "veryfast", "-g", "12")
    ffmpeg_run("-i", lossless, "-vf", f"scale=720:{height},setsar=1", *output, path)
    facts = probed(path, prep_config())
    lines = facts.decisions["vbi_lines"]["value"]
    assert abs(lines - 32 * height // 512) <= 1
    assert "lines" in facts.decisions["vbi_lines"]["ground"]
    assert facts.raster.y >= lines and facts.raster.y <= lines + 2
    assert facts.display_width / facts.display_height == pytest.approx(4 / 3, abs=0.02)


@pytest.mark.parametrize("lines", [0, 30, 32, 33])
@pytest.mark.parametrize("luma", [16, 126, 235])
def test_lines_below_the_picture_of_a_raster_that_is_too_high_are_found(lines: int, luma: int) -> None:
    for name in FILMS:
        frames = [frame[::-1] for frame in with_band(name, lines, luma, 2.0, lines)]
        assert abs(find_lines_below(frames) - lines) <= 1
        assert find_vbi(frames)[0] == 0
        other = with_band(name, lines, luma, 2.0, lines, height=576)
        assert find_lines_below([frame[::-1] for frame in other]) == 0, "576 lines are a picture's"


def test_a_clip_with_lines_below_keeps_its_shape(tmp_path: Path) -> None:
    shown = pictures("bikes.mp4", 480)[:4]
    frames = np.concatenate([shown, np.full((4, 32, 720), 16, np.uint8)], axis=1)
    path = write_clip(tmp_path / "below.mp4", np.repeat(frames, 12, axis=0), 24, "-c:v", "libx264", "-g", "12")
    facts = probed(path, prep_config())
    assert facts.decisions["lines_below"]["value"] == 32 and facts.decisions["vbi_lines"]["value"] == 0
    assert (facts.raster.y, facts.raster.height, facts.height) == (0, 480, 512)
    assert facts.display_width / facts.display_height == pytest.approx(4 / 3, abs=0.01)
