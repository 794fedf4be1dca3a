"""A decoded window holds exactly the frames that the timestamps ask for."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import (
    SMALL,
    a_record,
    interlaced,
    number_picture,
    only_bucket,
    prep_config,
    probed,
    read_number,
    weave,
    with_audio,
    write_clip,
)
from PIL import Image

from preprocess.facts import ClipFacts
from preprocess.rejection import ClipRejected
from preprocess.video.decode import decode_window
from preprocess.video.window import Window, choose_windows

CONFIG = prep_config(((160, 96),))
RATES = {
    "24": Fraction(24),
    "23.976": Fraction(24000, 1001),
    "25": Fraction(25),
    "29.97": Fraction(30000, 1001),
    "30": Fraction(30),
    "50": Fraction(50),
    "59.94": Fraction(60000, 1001),
}
STARTS = (0.0, 0.417, 2.9)
SECONDS = 5


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbered")


def numbered(num: int) -> np.ndarray:
    return np.stack([number_picture(n) for n in range(num)])


def asked_for(times: list[Fraction], start: float, num_frames: int = 49) -> list[int]:
    """The `fps` filter's rule in exact arithmetic: the last picture whose time rounds (half up) to k / 24 or less."""
    begin = Fraction(round(start * 1000), 1000)
    asked = []
    for k in range(num_frames):
        early = [n for n, time in enumerate(times) if (time - begin) * 24 < k + Fraction(1, 2)]
        asked.append(early[-1] if early else 0)
    return asked


def decoded_numbers(path: Path, facts: ClipFacts, start: float) -> list[int]:
    frames = decode_window(path, facts, Window(start, 49, "test"), only_bucket(CONFIG), CONFIG)
    assert frames.shape == (49, 96, 160, 3)
    assert frames.dtype == np.uint8
    return [read_number(frame) for frame in frames]


@pytest.mark.parametrize("name", RATES)
def test_progressive_clips_give_the_frames_asked_for(clip_folder: Path, name: str) -> None:
    rate = RATES[name]
    num = int(SECONDS * rate)
    path = write_clip(clip_folder / f"p{name}.mp4", numbered(num), rate)
    facts = probed(path, CONFIG)
    assert facts.deinterlace == "none"
    assert facts.fps == pytest.approx(float(rate), abs=1e-6)
    assert facts.num_frames == num
    assert facts.is_constant_rate
    times = [n / rate for n in range(num)]
    for start in STARTS:
        assert decoded_numbers(path, facts, start) == asked_for(times, start), start


@pytest.mark.parametrize("order", ["tff", "bff"])
@pytest.mark.parametrize("name", ["50", "59.94"])
def test_interlaced_clips_give_one_frame_a_field(clip_folder: Path, name: str, order: str) -> None:
    rate = RATES[name]
    num = int(SECONDS * rate) // 2 * 2
    woven = weave(numbered(num), top_first=order == "tff")
    path = write_clip(clip_folder / f"i{name}{order}.mp4", woven, rate / 2, *interlaced(order == "tff"))
    facts = probed(path, CONFIG)
    assert facts.deinterlace == order
    times = [n / rate for n in range(num)]
    for start in STARTS:
        assert decoded_numbers(path, facts, start) == asked_for(times, start), start


def test_variable_frame_rate_follows_the_timestamps(clip_folder: Path) -> None:
    kept = [n for n in range(150) if n * 7 % 5 < 3 and not 40 < n < 58]
    keep = "not(gte(mod(n*7\\,5)\\,3))*not(between(n\\,41\\,57))"
    path = write_clip(
        clip_folder / "vfr.mp4", numbered(150), 30, *SMALL, "-fps_mode", "vfr", filters=f"select='{keep}'"
    )
    facts = probed(path, CONFIG)
    assert not facts.is_constant_rate
    assert facts.num_frames == len(kept)
    assert facts.max_gap_seconds == pytest.approx(18 / 30, abs=0.07)
    times = [Fraction(n, 30) for n in kept]
    for start in (0.0, 0.417, 1.5, 1.9, 2.7):  # 1.5 and 1.9 lie within the gap and just after it
        expected = [kept[n] for n in asked_for(times, start)]
        assert decoded_numbers(path, facts, start) == expected, start


CONTAINERS = {
    "open-gop.mp4": (*SMALL, "-bf", "3", "-x264-params", "open-gop=1:keyint=24:b-pyramid=normal"),
    "one-group.mp4": (*SMALL, "-g", "9999"),
    "clip.mkv": SMALL,
    "clip.ts": (*SMALL, "-x264-params", "keyint=24"),
    "mpeg2.ts": ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "15", "-pix_fmt", "yuv420p"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "15", "-pix_fmt", "yuv420p"),
    "clip.avi": ("-c:v", "mpeg4", "-q:v", "2", "-g", "30"),
    "clip.mxf": ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "15", "-pix_fmt", "yuv420p"),
    "clip.webm": ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime", "-b:v", "2M"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_seeking_is_exact_in_every_container(clip_folder: Path, name: str) -> None:
    rate = Fraction(30000, 1001)
    path = write_clip(clip_folder / name, numbered(150), rate, *CONTAINERS[name])
    facts = probed(path, CONFIG)
    first = Fraction(round(facts.start_seconds * 1_000_000), 1_000_000)
    times = [first + n / rate for n in range(150)]
    for start in (float(facts.start_seconds), 0.417, 1.234, 2.77):
        begin = np.ceil(start * 1000) / 1000
        assert decoded_numbers(path, facts, begin) == asked_for(times, begin), start


def test_audio_that_begins_before_the_pictures_does_not_move_the_window(clip_folder: Path) -> None:
    rate = Fraction(25)
    source = write_clip(clip_folder / "late-source.mp4", numbered(125), rate)
    path = with_audio(source, clip_folder / "late.mkv", "-output_ts_offset", "0")
    facts = probed(path, CONFIG)
    times = [Fraction(round(facts.start_seconds * 1000), 1000) + n / rate for n in range(125)]
    assert decoded_numbers(path, facts, 1.234) == asked_for(times, 1.234)


def test_the_last_window_of_a_clip_is_whole(clip_folder: Path) -> None:
    for name in ("25", "29.97", "59.94"):
        rate = RATES[name]
        num = int(SECONDS * rate)
        path = write_clip(clip_folder / f"p{name}.mp4", numbered(num), rate)
        facts = probed(path, CONFIG)
        start = np.floor((facts.end_seconds - 49 / 24) * 1000) / 1000
        assert decoded_numbers(path, facts, start) == asked_for([n / rate for n in range(num)], start)


def test_an_early_window_does_not_decode_the_rest_of_the_clip(clip_folder: Path, tmp_path: Path) -> None:
    """Damage after the window is never met under the strict policy; a window over it is."""
    noise = np.random.default_rng(0).integers(0, 40, (720, 96, 160), dtype=np.uint8)
    frames = np.repeat(numbered(120), 6, axis=0) + noise
    whole = write_clip(clip_folder / "long.mp4", frames, 24, *SMALL, "-movflags", "+faststart")
    data = bytearray(whole.read_bytes())
    begin = data.index(b"mdat") + 4
    for place in np.random.default_rng(1).integers(begin + (len(data) - begin) // 2, len(data) - 9, 3000):
        data[place] ^= 0xFF
    path = tmp_path / "damaged-later.mp4"
    path.write_bytes(data)
    facts = probed(path, CONFIG)
    assert facts.duration_seconds == pytest.approx(30.0)
    assert decoded_numbers(path, facts, 1.0)[0] == 4
    with pytest.raises(ClipRejected) as caught:
        decoded_numbers(path, facts, 20.0)
    assert caught.value.rejection[:2] == ("decode", "decode-errors")


def test_an_image_is_one_frame_in_its_own_colours(tmp_path: Path) -> None:
    colors = np.zeros((96, 160, 3), np.uint8)
    colors[:, :80], colors[:, 80:] = (200, 30, 40), (20, 60, 220)
    config = prep_config(((160, 96),), sieve={"images": True, "min_seconds": 3.0})
    for name in ("picture.png", "picture.jpg"):
        path = tmp_path / name
        Image.fromarray(colors).save(path, quality=98, subsampling=0)
        facts = probed(path, config)
        (window,) = choose_windows(facts, a_record(media_type="image"), config)
        frames = decode_window(path, facts, window, only_bucket(config), config)
        assert frames.shape == (1, 96, 160, 3)
        assert np.abs(frames[0].astype(int) - colors)[:, 4:76].max() <= 3, name
        with pytest.raises(ClipRejected) as caught:
            probed(path, CONFIG)
        assert caught.value.rejection[:2] == ("probe", "format-refused")
