"""A circle drawn in display geometry stays a circle, on every road to a picture's shape."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from clips import LOSSLESS, ffmpeg_run, only_bucket, prep_config, probed, write_clip

from preprocess.config import PictureSize
from preprocess.facts import ClipFacts
from preprocess.rejection import Rejection
from preprocess.video.aspect import Raster, decide_aspect
from preprocess.video.bucket import choose_bucket
from preprocess.video.decode import decode_window
from preprocess.video.window import Window

WIDE, NARROW = 16 / 9, 4 / 3


class Scene(NamedTuple):
    """A raster, what of it is picture, and the shape that this picture is shown in."""

    width: int
    height: int
    aspect: float
    """Of the raster below the VBI lines."""
    vbi: int = 0
    bars: tuple[int, int] = (0, 0)
    """Black at each side, black above and below."""
    flags: str = ""
    """Filters that set the sample aspect."""
    declared: tuple[int, int] | None = None
    sd: str = "4:3"
    rotate: int = 0
    """Degrees counter-clockwise in the display matrix."""


SCENES = {
    "flagged-wide": Scene(720, 480, WIDE, flags="setsar=32/27"),
    "flagged-narrow": Scene(720, 480, NARROW, flags="setsar=8/9"),
    "flagged-pal-wide": Scene(720, 576, WIDE, flags="setsar=64/45"),
    "flagged-over-a-lying-declaration": Scene(720, 480, NARROW, flags="setsar=8/9", declared=(1920, 1080)),
    "declared-1080": Scene(720, 480, WIDE, flags="setsar=1", declared=(1920, 1080)),
    "declared-720-unflagged": Scene(720, 480, WIDE, declared=(1280, 720)),
    "declared-square": Scene(720, 480, 1.0, declared=(640, 640)),
    "declared-portrait": Scene(720, 480, 9 / 16, declared=(1080, 1920)),
    "declared-portrait-pillarboxed": Scene(720, 480, WIDE, bars=(246, 0), declared=(1080, 1920)),
    "declared-sd": Scene(720, 480, NARROW, declared=(720, 486)),
    "sd-narrow": Scene(720, 480, NARROW),
    "sd-wide": Scene(720, 480, WIDE, sd="16:9"),
    "sd-704": Scene(704, 480, NARROW),
    "sd-narrow-vbi": Scene(720, 512, NARROW, vbi=32),
    "sd-wide-vbi": Scene(720, 512, WIDE, vbi=32, sd="16:9"),
    "sd-narrow-vbi-flagged": Scene(720, 512, NARROW, vbi=32, flags="setdar=4/3"),
    "sd-wide-vbi-flagged": Scene(720, 512, WIDE, vbi=32, flags="setdar=16/9"),
    "sd-486-vbi": Scene(720, 486, NARROW, vbi=6),
    "sd-pal-vbi": Scene(720, 608, NARROW, vbi=32),
    "proxy-480-vbi-declared": Scene(720, 480, WIDE, vbi=30, declared=(1920, 1080)),
    "proxy-480-vbi": Scene(720, 480, NARROW, vbi=30),
    "letterbox": Scene(720, 480, NARROW, bars=(0, 60)),
    "letterbox-vbi": Scene(720, 512, NARROW, vbi=32, bars=(0, 60)),
    "pillarbox-vbi": Scene(720, 512, WIDE, vbi=32, bars=(90, 0)),
    "pillarbox": Scene(720, 480, WIDE, bars=(90, 0)),
    "letterbox-hd": Scene(1280, 720, WIDE, bars=(0, 92)),
    "pillarbox-hd": Scene(1280, 720, WIDE, bars=(160, 0)),
    "square-hd": Scene(1280, 720, WIDE),
    "square-odd": Scene(640, 272, 640 / 272),
    "portrait": Scene(720, 1280, 9 / 16),
    "rotated-90": Scene(1280, 720, WIDE, rotate=90),
    "rotated-270": Scene(1280, 720, WIDE, rotate=270, declared=(720, 1280)),
    "rotated-180": Scene(1280, 720, WIDE, rotate=180),
    "rotated-flagged": Scene(720, 480, WIDE, flags="setsar=32/27", rotate=90),
    "rotated-declared": Scene(720, 480, WIDE, rotate=90, declared=(1080, 1920)),
}


def draw(scene: Scene, num_frames: int = 6) -> np.ndarray:
    """A bright disc on a dim gradient, VBI lines above and black bars around, as T×H×W luma."""
    rng = np.random.default_rng(0)
    lines = scene.height - scene.vbi
    x = (np.arange(scene.width) + 0.5) / scene.width * scene.aspect
    y = (np.arange(lines) + 0.5) / lines
    beside, above = scene.bars
    shown_height = 1 - 2 * above / lines
    shown_width = scene.aspect * (1 - 2 * beside / scene.width)
    radius = 0.35 * min(shown_height, shown_width)
    away = np.hypot(x[None, :] - scene.aspect / 2, y[:, None] - 0.5) - radius
    disc = np.clip(0.5 - away * lines, 0, 1)
    ground = 70 + 20 * (x[None, :] / scene.aspect) + 10 * y[:, None]
    picture = np.clip(ground * (1 - disc) + 230 * disc, 0, 255).astype(np.uint8)
    if above:
        picture[:above] = picture[-above:] = 16
    if beside:
        picture[:, :beside] = picture[:, -beside:] = 16
    frames = []
    for _ in range(num_frames):
        blanking = np.full((scene.vbi, scene.width), 16, np.uint8)
        for line in {1, scene.vbi // 3, scene.vbi // 2} if scene.vbi else ():
            blanking[line] = np.repeat(rng.choice(np.array([16, 180], np.uint8), scene.width // 16), 16)[: scene.width]
        frames.append(np.vstack([blanking, picture]))
    return np.stack(frames)


def axes_of(frame: np.ndarray) -> tuple[float, float]:
    """Standard deviations of the disc's pixels across and down: equal for a circle."""
    weight = np.clip((frame.astype(np.float64).mean(axis=2) - 120) / 100, 0, 1)
    across, down = weight.sum(axis=0), weight.sum(axis=1)
    return _spread(across), _spread(down)


def _spread(weights: np.ndarray) -> float:
    places = np.arange(len(weights))
    mean = (weights * places).sum() / weights.sum()
    return float(np.sqrt((weights * (places - mean) ** 2).sum() / weights.sum()))


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


def clip_of(folder: Path, name: str) -> Path:
    scene = SCENES[name]
    path = write_clip(folder / f"{name}.mp4", draw(scene), 24, *LOSSLESS, filters=scene.flags or "setsar=0/1")
    if not scene.rotate:
        return path
    turned = folder / f"{name}-turned.mp4"
    ffmpeg_run("-display_rotation", str(scene.rotate), "-i", path, "-c", "copy", turned)
    return turned


def facts_of(folder: Path, name: str, **more: Any) -> ClipFacts:
    scene = SCENES[name]
    config = prep_config(decode={"sd_display_aspect": scene.sd}, **more)
    declared = (
        {} if scene.declared is None else dict(zip(("declared_width", "declared_height"), scene.declared, strict=True))
    )
    return probed(clip_of(folder, name), config, **declared)


@pytest.mark.parametrize("name", SCENES)
def test_a_circle_stays_a_circle(scene_folder: Path, name: str) -> None:
    scene = SCENES[name]
    facts = facts_of(scene_folder, name)
    shape = facts.display_width / facts.display_height
    size = (640, 640) if 0.9 < shape < 1.1 else (832, 480) if shape > 1 else (480, 832)
    config = prep_config((size,), window={"num_frames": 1})
    frame = decode_window(clip_of(scene_folder, name), facts, Window(0.1, 1, "test"), only_bucket(config), config)[0]
    across, down = axes_of(frame)
    assert across / down == pytest.approx(1, abs=0.01)
    assert facts.decisions["vbi_lines"]["value"] == scene.vbi
    beside, above = scene.bars
    left, top, right, bottom = facts.decisions["bars"]["value"]
    assert max(abs(left - beside), abs(right - beside), abs(top - above), abs(bottom - above)) <= 2
    assert frame.min() > 40, "no black line of a bar or of the blanking interval is left"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flagged-wide", "flagged sample aspect 32:27"),
        ("flagged-over-a-lying-declaration", "flagged sample aspect 8:9"),
        ("declared-1080", "declared 1920×1080, square pixels of another shape"),
        ("declared-sd", "SD raster, decode.sd_display_aspect 4:3"),
        ("letterbox", "a 16:9 picture in a 4:3 raster"),
        ("pillarbox", "a 16:9 raster"),
        ("declared-portrait-pillarboxed", "between the black bars"),
        ("square-hd", "square pixels"),
    ],
)
def test_the_ground_of_each_decision_is_recorded(scene_folder: Path, name: str, words: str) -> None:
    facts = facts_of(scene_folder, name)
    assert words in facts.decisions["aspect"]["ground"]
    if SCENES[name].declared:
        assert "size" in facts.decisions["differences"]


def test_a_proxy_of_a_wide_source_needs_no_enlargement(scene_folder: Path) -> None:
    facts = facts_of(scene_folder, "declared-1080")
    assert (round(facts.display_width), facts.display_height) == (853, 480)
    config = prep_config(((832, 480), (480, 832), (1280, 704), (704, 1280)), max_upscale=1.0)
    assert choose_bucket(facts, config.buckets) == PictureSize(width=832, height=480)
    config = prep_config(((832, 480), (1280, 704)), max_upscale=1.5)
    assert choose_bucket(facts, config.buckets) == PictureSize(width=1280, height=704)


def test_a_narrow_picture_is_refused_by_the_enlargement_it_would_need(scene_folder: Path) -> None:
    facts = facts_of(scene_folder, "sd-narrow")
    refused = choose_bucket(facts, prep_config(max_upscale=1.0).buckets)
    assert isinstance(refused, Rejection)
    assert (refused.stage, refused.reason) == ("bucket", "too-small")
    assert "640×480" in refused.detail and "1.300" in refused.detail
    assert choose_bucket(facts, prep_config(max_upscale=1.3).buckets) == PictureSize(width=832, height=480)


def test_portrait_goes_to_a_portrait_bucket(scene_folder: Path) -> None:
    config = prep_config(((832, 480), (480, 832), (1280, 704), (704, 1280)), max_upscale=1.0)
    for name in ("portrait", "rotated-90", "rotated-270"):
        assert choose_bucket(facts_of(scene_folder, name), config.buckets) == PictureSize(width=704, height=1280)


def test_rotated_frames_stand_upright(tmp_path: Path) -> None:
    upright = np.full((6, 96, 160, 3), 90, np.uint8)
    upright[:, :24, :40] = (250, 40, 40)  # a red corner at the top left
    for degrees, axes in ((90, 1), (180, 2), (270, 3)):
        # The stored picture is the upright one turned clockwise by `degrees`; the matrix turns it back.
        stored = np.rot90(upright, k=-axes, axes=(1, 2))
        path = write_clip(tmp_path / f"{degrees}.mp4", stored, 24)
        turned = tmp_path / f"{degrees}-flagged.mp4"
        ffmpeg_run("-display_rotation", str(degrees), "-i", path, "-c", "copy", turned)
        config = prep_config(((160, 96),), window={"num_frames": 1})
        facts = probed(turned, config)
        frame = decode_window(turned, facts, Window(0.0, 1, "test"), only_bucket(config), config)[0]
        assert frame[6:18, 10:30].mean(axis=(0, 1)) == pytest.approx((250, 40, 40), abs=12), degrees


def test_a_night_scene_is_no_letterbox(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = np.full((6, 480, 720), 18, np.uint8)
    frames[:, 200:300, 100:700] = 200
    frames[:, 150:200, 300:420] = 120  # lights without a straight edge
    frames = np.clip(frames + rng.integers(0, 8, frames.shape), 0, 255).astype(np.uint8)
    facts = probed(write_clip(tmp_path / "night.mp4", frames, 24))
    assert facts.decisions["bars"]["value"] == [0, 0, 0, 0]
    assert facts.decisions["vbi_lines"]["value"] == 0


def test_a_flag_of_true_pixel_aspect_outlives_the_blanking_crop() -> None:
    """10:11 is a pixel's shape, not a display aspect spread over all lines: 486 lines of it are no exact 4:3."""
    raster = Raster(720, 486, 6, Fraction(10, 11), None, False, (0, 0, 0, 0))
    aspect, _ = decide_aspect(raster, "4:3")
    assert aspect == Fraction(10, 11) * Fraction(720, 480)


@pytest.mark.parametrize("declared", [(1440, 1080), (960, 720)])
def test_anamorphic_tape_formats_are_wide(declared: tuple[int, int]) -> None:
    aspect, ground = decide_aspect(Raster(720, 480, 0, None, declared, False, (0, 0, 0, 0)), "4:3")
    assert aspect == Fraction(16, 9)
    assert "16:9" in ground


def test_a_declaration_turned_against_the_file_does_not_squeeze_it() -> None:
    aspect, ground = decide_aspect(Raster(1080, 1920, 0, None, (1920, 1080), False, (0, 0, 0, 0)), "4:3")
    assert aspect == Fraction(1080, 1920)
    assert "turned" in ground
