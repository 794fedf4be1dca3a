"""Pictures whose times cannot be told, and pictures that the file itself has lost: no window shows others instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import SMALL, a_record, ffmpeg_run, number_picture, only_bucket, prep_config, probed, read_number, write_clip

from preprocess.rejection import ClipRejected
from preprocess.video.decode import decode_window
from preprocess.video.lost import step_back
from preprocess.video.window import Window, choose_windows

CONFIG = prep_config(((160, 96),))
TOLERANT = prep_config(((160, 96),), decode={"policy": "tolerant"})
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "0", "-g", "12", "-pix_fmt", "yuv420p")


def clip(path: Path, *output: str) -> Path:
    """200 numbered pictures, 25 a second."""
    return write_clip(path, np.stack([number_picture(n) for n in range(200)]), 25, *output)


@pytest.mark.parametrize("seconds", ["-0.08", "-0.5"])
def test_pictures_before_the_zero_of_a_matroska_file_are_not_shown_as_others(tmp_path: Path, seconds: str) -> None:
    """They have no time there; ffmpeg makes one up, which pictures after the zero have too."""
    whole, path = clip(tmp_path / "whole.mp4", *SMALL), tmp_path / "early.mkv"
    ffmpeg_run("-itsoffset", seconds, "-i", whole, "-c", "copy", "-avoid_negative_ts", "disabled", path)
    start = prep_config(((160, 96),), window={"policy": "start"})
    facts = probed(path, start)
    (window,) = choose_windows(facts, a_record(), start)
    with pytest.raises(ClipRejected) as caught:
        decode_window(path, facts, window, only_bucket(start), start)
    assert caught.value.rejection[:2] == ("decode", "odd-timestamps")
    (later,) = choose_windows(facts, a_record(), CONFIG)
    frames = decode_window(path, facts, later, only_bucket(CONFIG), CONFIG)
    first = round((facts.zero_seconds + later.start_seconds - float(seconds)) * 25)
    assert abs(read_number(frames[0]) - first) <= 1


def test_times_that_go_back_beside_a_window_cost_it_nothing(tmp_path: Path) -> None:
    facts = probed(clip(tmp_path / "whole.mp4", *SMALL)).model_copy(update={"zero_seconds": 0.0})
    needed = (1.0, 1.04, 1.08)
    assert step_back([0.5, 0.54, 0.5, 0.54, 1.0, 1.04, 1.08], facts, needed) is None, "before it"
    assert step_back([1.0, 1.04, 1.08, 1.2, 1.1], facts, needed) is None, "after it"
    assert step_back([0.92, 0.96, 1.04, 1.0, 1.08], facts, needed) is None, "two neighbours"
    assert step_back([0.9, 0.94, 1.2, 0.92, 0.96, 1.0, 1.04, 1.08], facts, needed) == (1.2, 0.92)


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_pictures_that_the_file_has_lost_are_not_replaced_by_copies(tmp_path: Path, suffix: str) -> None:
    """Half a second is overwritten. The container lists no pictures there, so none of its list is missing."""
    path = clip(tmp_path / f"whole.{suffix}", *MPEG2)
    data = bytearray(path.read_bytes())
    first, last = (int(share * len(data)) // 188 * 188 for share in (0.48, 0.54))
    data[first:last] = bytes(last - first)
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(data)
    facts = probed(path, TOLERANT)
    with pytest.raises(ClipRejected) as caught:
        decode_window(path, facts, Window(3.0, 49, "test"), only_bucket(TOLERANT), TOLERANT)
    assert caught.value.rejection[:2] == ("decode", "missing-frames")
    frames = decode_window(path, facts, Window(1.0, 49, "test"), only_bucket(TOLERANT), TOLERANT)
    assert abs(read_number(frames[0]) - 25) <= 1
