"""Windows lie where the policy wants them, never beyond the end, never across a cut, and do not overlap."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from clips import SMALL, a_record, ffmpeg_run, prep_config, probed, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.corpus.records import Caption
from preprocess.facts import ClipFacts, Crop
from preprocess.rejection import ClipRejected
from preprocess.video.window import Window, choose_windows, declared_lengths
from shards.errors import UserError

LENGTH = 49 / 24
RASTER = Crop(x=0, y=0, width=64, height=64)


def facts_for(seconds: float, start: float = 0.0, cuts: tuple[float, ...] = (), media: str = "video") -> ClipFacts:
    values: dict[str, Any] = {
        "media": media, "format": "mov", "codec": "h264", "pixel_format": "yuv420p", "stream": 0, "width": 64,
        "height": 64, "raster": RASTER, "active": RASTER, "display_width": 64.0, "display_height": 64.0, "rotation": 0,
        "mirrored": False, "deinterlace": "none", "deinterlace_frames": "all", "matrix": "bt601", "range": "limited",
        "fps": 25.0, "is_constant_rate": True, "zero_seconds": 0.0, "start_seconds": start,
        "end_seconds": start + seconds, "duration_seconds": seconds, "max_gap_seconds": 0.04, "num_frames": 1,
        "cuts": cuts, "decisions": {},
    }  # fmt: skip
    return ClipFacts(**values)


def windows(facts: ClipFacts, policy: str, most: int = 1, seed: int = 0, **record: Any) -> tuple[Window, ...]:
    config = prep_config(window={"policy": policy, "max_windows": most}, seed=seed)
    return choose_windows(facts, a_record(**record), config)


def starts(found: tuple[Window, ...]) -> list[float]:
    return [window.start_seconds for window in found]


@settings(max_examples=300, deadline=None)
@given(
    seconds=st.floats(0.1, 60),
    begin=st.floats(0, 2),
    cuts=st.lists(st.floats(0, 62), max_size=6),
    policy=st.sampled_from(["captions", "start", "middle", "tile", "random"]),
    most=st.integers(1, 5),
    spans=st.lists(st.tuples(st.floats(0, 70), st.floats(0, 70)), max_size=4),
    seed=st.integers(0, 5),
)
def test_windows_stay_within_the_clip_and_its_shots(
    seconds: float,
    begin: float,
    cuts: list[float],
    policy: str,
    most: int,
    spans: list[tuple[float, float]],
    seed: int,
) -> None:
    facts = facts_for(seconds, begin, tuple(sorted(cuts)))
    captions = tuple(Caption(text="a", start_seconds=a, end_seconds=b) for a, b in spans)
    most = 1 if policy in ("start", "middle") else most
    try:
        found = windows(facts, policy, most, seed, object=captions)
    except ClipRejected as refused:
        assert refused.rejection.stage == "window"
        inner = [c for c in sorted(cuts) if begin < c < begin + seconds]
        borders = [begin, *inner, begin + seconds]
        longest = max(b - a for a, b in itertools.pairwise(borders))
        assert longest < LENGTH + 0.001
        assert refused.rejection.reason == ("too-short" if seconds < LENGTH else "scene-cuts") or longest >= LENGTH
        return
    assert 1 <= len(found) <= most
    for window in found:
        start, end = window.start_seconds, window.start_seconds + LENGTH
        assert round(start * 1000) / 1000 == start, "whole milliseconds: keys are made of them"
        assert start >= begin - 1e-6 and end <= begin + seconds + 1e-6
        assert not [cut for cut in cuts if start + 1e-6 < cut < end - 1e-6]
    for a, b in itertools.pairwise(sorted(starts(found))):
        assert b - a >= LENGTH


@settings(max_examples=300, deadline=None)
@given(
    seconds=st.floats(0.2, 20),
    begin=st.floats(0, 1),
    cuts=st.lists(st.floats(0, 21), max_size=3),
    policy=st.sampled_from(["captions", "start", "middle", "tile", "random"]),
    lengths=st.lists(st.sampled_from([1, 5, 17, 49, 97, 121]), min_size=1, max_size=4, unique=True),
    span=st.tuples(st.floats(0, 21), st.floats(0, 21)),
)
def test_no_longer_configured_length_would_have_fitted(
    seconds: float,
    begin: float,
    cuts: list[float],
    policy: str,
    lengths: list[int],
    span: tuple[float, float],
) -> None:
    """Any start of every longer window is tried: in the clip, its shots, and the times of its caption."""
    facts = facts_for(seconds, begin, tuple(sorted(cuts)))
    captions = (Caption(text="a", start_seconds=span[0], end_seconds=span[1]),)
    config = prep_config(window={"policy": policy, "num_frames": lengths})
    borders = [begin, *(cut for cut in sorted(cuts) if begin < cut < begin + seconds), begin + seconds]
    shots = [(math.ceil(round(a * 1000, 3)), round(b * 1000, 3)) for a, b in itertools.pairwise(borders)]

    def fits(frames: int, low: float = 0.0, high: float = 1e9) -> bool:
        length = 1000 * frames / 24
        return any(math.ceil(max(a, low)) + length <= min(b, high) + 1e-3 for a, b in shots)

    try:
        (window,) = choose_windows(facts, a_record(object=captions), config)
    except ClipRejected:
        assert not any(fits(frames) for frames in lengths)
        return
    start, end = 1000 * window.start_seconds, 1000 * (window.start_seconds + window.num_frames / 24)
    assert window.num_frames in lengths and any(a - 0.01 <= start and end <= b + 0.01 for a, b in shots)
    longer = [frames for frames in lengths if frames > window.num_frames]
    if not window.ground.startswith("object caption"):
        assert not any(fits(frames) for frames in longer)
        return
    low, high = 1000 * max(begin, span[0]), 1000 * min(begin + seconds, span[1])
    assert not any(fits(frames, low, high) for frames in longer)
    if window.num_frames > min(frames for frames in lengths if fits(frames)):
        assert low - 1.5 <= start and end <= high + 1.5, "only the shortest is longer than its caption"


def test_shorter_windows_take_what_longer_ones_leave() -> None:
    """10 s: four windows of 49 frames, then two of 17; a caption of 1 s is given 17 frames, one of 5 s 97."""
    config = prep_config(window={"policy": "tile", "max_windows": 9, "num_frames": [17, 49]})
    found = choose_windows(facts_for(10.0), a_record(), config)
    assert [(window.start_seconds, window.num_frames) for window in found] == [
        (0.0, 49), (2.042, 49), (4.084, 49), (6.126, 49), (8.168, 17), (8.877, 17),
    ]  # fmt: skip
    record = a_record(
        object=(
            Caption(text="a", start_seconds=1.0, end_seconds=2.0),
            Caption(text="b", start_seconds=3.0, end_seconds=8.0),
        )
    )
    config = prep_config(window={"max_windows": 9, "num_frames": [97, 17, 49]})
    found = choose_windows(facts_for(10.0), record, config)
    assert [window.num_frames for window in found] == [17, 97]
    assert declared_lengths(10.0, record, config) == [17, 97]
    assert declared_lengths(0.5, record, config) == []


def test_a_caption_whose_place_is_taken_gets_no_longer_window_elsewhere() -> None:
    """Two captions of one stretch, in a shot with room for the shortest alone: 49 frames fit only the shot after it."""
    captions = tuple(Caption(text=text, start_seconds=0.0, end_seconds=1.0) for text in "ab")
    config = prep_config(window={"max_windows": 9, "num_frames": [17, 49]})
    found = choose_windows(facts_for(10.0, cuts=(1.2,)), a_record(object=captions), config)
    assert [(window.start_seconds, window.num_frames) for window in found] == [(0.146, 17)]


@pytest.mark.parametrize(("lengths", "words"), [([17, 18], "18 is not 4k"), ([17, 17], "twice"), ([], "at least 1")])
def test_lengths_that_cannot_be_meant_are_refused(lengths: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prep_config(window={"num_frames": lengths})


def test_policies_put_windows_where_they_say() -> None:
    facts = facts_for(10.0)
    assert starts(windows(facts, "start")) == [0.0]
    assert starts(windows(facts, "middle")) == [pytest.approx(5 - LENGTH / 2, abs=0.001)]
    assert starts(windows(facts, "tile", 9)) == [0.0, 2.042, 4.084, 6.126]
    assert starts(windows(facts_for(10.0, 0.5), "start")) == [0.5]


def test_captions_get_a_window_each_in_the_order_of_their_worth() -> None:
    record = {
        "object": (
            Caption(text="short", start_seconds=1.0, end_seconds=2.0),
            Caption(text="long", start_seconds=14.0, end_seconds=20.0),
        ),
        "scene": (
            Caption(text="scene", start_seconds=5.0, end_seconds=9.0),
            Caption(text="beyond", start_seconds=30.0, end_seconds=40.0),
        ),
    }
    found = windows(facts_for(21.4), "captions", 9, **record)
    centres = [window.start_seconds + LENGTH / 2 for window in found]
    assert centres == [pytest.approx(17.0, abs=0.001), pytest.approx(1.5, abs=0.001), pytest.approx(7.0, abs=0.001)]
    assert "object caption 1" in found[0].ground
    assert len(windows(facts_for(21.4), "captions", 1, **record)) == 1


def test_a_caption_at_the_end_is_moved_into_the_clip_and_says_so() -> None:
    record = {"object": (Caption(text="a", start_seconds=9.5, end_seconds=10.0),)}
    (window,) = windows(facts_for(10.0), "captions", **record)
    assert window.start_seconds + LENGTH <= 10.0
    assert "moved" in window.ground


def test_without_timecodes_the_middle_is_taken_and_the_ground_says_why() -> None:
    (window,) = windows(facts_for(10.0), "captions", object=(Caption(text="whole clip"),))
    assert window.start_seconds == pytest.approx(5 - LENGTH / 2, abs=0.001)
    assert "no time-coded caption" in window.ground


def test_random_is_a_function_of_seed_and_clip_alone() -> None:
    facts = facts_for(20.0)
    first = windows(facts, "random", 3)
    assert first == windows(facts, "random", 3)
    assert first != windows(facts, "random", 3, seed=1)
    config = prep_config(window={"policy": "random"})
    spread = {
        choose_windows(facts, a_record().model_copy(update={"clip_id": f"c{n}"}), config)[0].start_seconds
        for n in range(200)
    }
    assert len(spread) > 190
    assert min(spread) < 1.0 and max(spread) > 20 - LENGTH - 1.0


def test_a_clip_that_just_fits_has_one_window_and_a_shorter_one_none() -> None:
    assert starts(windows(facts_for(LENGTH), "middle")) == [0.0]
    with pytest.raises(ClipRejected) as caught:
        windows(facts_for(LENGTH - 0.01), "middle")
    assert caught.value.rejection.reason == "too-short"


def test_an_image_is_one_frame() -> None:
    assert windows(facts_for(0.04, media="image"), "captions") == (Window(0.0, 1, "image"),)


def test_one_window_policies_refuse_to_be_asked_for_more() -> None:
    with pytest.raises(UserError, match="tile"):
        prep_config(window={"policy": "start", "max_windows": 2})


@pytest.fixture(scope="session")
def cut_clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two shots: the cut is at 2.6 s of 5.2 s."""
    folder = tmp_path_factory.mktemp("cuts")
    rng = np.random.default_rng(0)
    shots = [np.kron(rng.integers(30, 220, (12, 20)), np.ones((8, 8))).astype(np.uint8) for _ in range(2)]
    frames = np.stack([np.roll(shots[n >= 65], n // 2, axis=1) for n in range(130)])
    path = write_clip(folder / "cut.mp4", frames, 25, *SMALL)
    late = folder / "cut-later.ts"
    ffmpeg_run("-i", path, "-c", "copy", "-output_ts_offset", "10", late)
    return path, late


def test_no_window_crosses_a_shot_change(cut_clip: Any) -> None:
    for path in cut_clip:
        config = prep_config(window={"policy": "middle", "max_scene_score": 0.3})
        facts = probed(path, config)
        assert facts.cuts == (pytest.approx(2.6, abs=0.01),)
        (window,) = choose_windows(facts, a_record(), config)
        assert window.start_seconds == pytest.approx(2.6 - LENGTH, abs=0.03) or window.start_seconds >= 2.6
        assert "moved" in window.ground
    config = prep_config(window={"policy": "middle"})
    assert probed(cut_clip[0], config).cuts == ()


def test_shots_shorter_than_a_window_refuse_the_clip(cut_clip: Any) -> None:
    config = prep_config(window={"policy": "middle", "max_scene_score": 0.3, "num_frames": 81})
    with pytest.raises(ClipRejected) as caught:
        choose_windows(probed(cut_clip[0], config), a_record(), config)
    assert caught.value.rejection.reason == "scene-cuts"
