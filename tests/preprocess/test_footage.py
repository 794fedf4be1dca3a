"""Real footage on the whole road: it comes out the same picture however an archive kept it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from clips import a_record, prep_config
from footage import CASES, footage, make, through
from PIL import Image

from preprocess.video.decode import preview_strip
from preprocess.video.probe import probe_clip


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two frames' luma, both shrunk eightfold: the same picture in the same place."""
    small = [f[: f.shape[0] // 8 * 8, : f.shape[1] // 8 * 8].mean(axis=2) for f in (one, other)]
    flat = [s.reshape(s.shape[0] // 8, 8, -1, 8).mean(axis=(1, 3)).ravel() for s in small]
    return float(np.corrcoef(flat[0], flat[1])[0, 1])


@pytest.fixture(scope="session")
def as_shot() -> np.ndarray:
    return through(footage("bigbuckbunny.mp4"))[1]


@pytest.mark.parametrize("name", ["proxy", "letterboxed", "archive"])
def test_footage_comes_out_the_same_however_it_was_kept(tmp_path: Path, as_shot: np.ndarray, name: str) -> None:
    case = CASES[name]
    facts, frames = through(make(case, footage("bigbuckbunny.mp4"), tmp_path / "clip.mp4"), **case.record)
    assert frames.shape == as_shot.shape == (49, 480, 832, 3)
    # The archive copy has half the frames: one field each 1/25 s, as the source's frames are.
    assert min(likeness(frames[n], as_shot[n]) for n in range(0, 49, 8)) > 0.99
    assert facts.deinterlace == ("tff" if name == "archive" else "none")
    squeezed = np.repeat(frames, 2, axis=2)[:, :, 416:1248]
    assert likeness(squeezed[0], as_shot[0]) < 0.9, "the measure does see a wrong shape"


@pytest.mark.parametrize(
    ("name", "width", "height", "seconds"),
    [("bigbuckbunny.mp4", 1280, 720, 5.28), ("bikes.mp4", 640, 272, 10.0), ("carphone_pristine.mp4", 176, 144, 4.0)],
)
def test_footage_is_read_as_what_it_is(name: str, width: int, height: int, seconds: float) -> None:
    facts = probe_clip(footage(name), a_record(), prep_config())
    assert (facts.width, facts.height) == (width, height)
    assert facts.duration_seconds == pytest.approx(seconds, abs=0.1)
    assert (facts.deinterlace, facts.rotation, facts.is_constant_rate) == ("none", 0, True)
    assert facts.decisions["bars"]["value"] == [0, 0, 0, 0]


def test_the_cuts_of_footage_are_found() -> None:
    facts = probe_clip(footage("bikes.mp4"), a_record(), prep_config(window={"max_scene_score": 0.4}))
    assert len(facts.cuts) >= 2
    assert probe_clip(footage("bigbuckbunny.mp4"), a_record(), prep_config(window={"max_scene_score": 0.4})).cuts == ()


def test_previews_repeat_byte_for_byte(as_shot: np.ndarray) -> None:
    strip = preview_strip(as_shot, 4)
    assert strip == preview_strip(as_shot.copy(), 4)
    assert Image.open(io.BytesIO(strip)).size == (4 * 222, 128)
    assert len(preview_strip(as_shot[:1], 4)) > 500
