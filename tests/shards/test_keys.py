"""Keys: injective, plain and short for any clip id, also where a file system folds case."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.format.keys import clip_hash, is_validation, sample_key

WINDOW = st.tuples(st.integers(0, 10**10 - 1), st.integers(1, 99_999), st.integers(1, 99_999), st.integers(1, 99_999))
# Ids that differ in little: the letters most likely to collide.
CLIP = st.text(min_size=1, max_size=300) | st.text(alphabet="aA_-.~@/ 0\u00e9e\u0301", min_size=1, max_size=60)
HARD_IDS = [
    "a", "A", "a.b", "a/b", "a\\b", "..", ".", "../..", "a b", " a", "a ", "a_b", "a_5fb", "_41", "a-b", "-a", "a~b",
    "a@0-1-1x1", "뉴스데스크", "뉴스데스크", "é", "e\u0301", "x" * 300, "x" * 299 + "y", "X" * 300, "뉴" * 300, 
    "\ud800", "\0", "\n", "con", "CON", "%2e", "__wanshards__", "__wanshards__/header",
]  # fmt: skip


@given(CLIP, WINDOW, CLIP, WINDOW)
def test_a_key_names_one_sample(clip: str, window: tuple, other_clip: str, other_window: tuple) -> None:
    key, other = sample_key(clip, *window), sample_key(other_clip, *other_window)
    assert (key.lower() == other.lower()) == ((clip, window) == (other_clip, other_window))
    assert re.fullmatch(r"[a-z0-9_@~-]{1,80}", key)
    assert not key.startswith("-")


def test_hard_ids_windows_and_buckets_stay_apart() -> None:
    windows = [(0, 49, 480, 832), (2000, 49, 480, 832), (0, 1, 480, 832), (0, 49, 832, 480), (10, 49, 480, 832)]
    ids = list(dict.fromkeys(HARD_IDS))
    keys = {sample_key(clip, *window).lower() for clip in ids for window in windows}
    assert len(keys) == len(ids) * len(windows)
    assert max(map(len, keys)) <= 80


def test_keys_of_v1_do_not_change() -> None:
    # These names are in shards that exist: a change here needs a new format version.
    assert sample_key("3338987", 2500, 49, 480, 832) == "3338987@2500-49-480x832"
    assert sample_key("A.b/c d", 0, 1, 704, 1280) == "_41_2eb_2fc_20d@0-1-704x1280"
    long = sample_key("x" * 300, 10**10 - 1, 99_999, 99_999, 99_999)
    assert long == "xxxxxxxxxxxxxxx~0d4e2ca9e9cbced7a7a5380eb29e1a37@9999999999-99999-99999x99999"
    assert clip_hash("3338987") == 17140932416949836889


@pytest.mark.parametrize(
    ("clip", "window", "named"),
    [("", (0, 1, 1, 1), "empty"), ("a", (-1, 1, 1, 1), "start_ms"), ("a", (0, 0, 1, 1), "num_frames"),
     ("a", (0, 1, 10**5, 1), "height"), ("a", (10**10, 1, 1, 1), "start_ms")],
)  # fmt: skip
def test_what_no_key_can_hold_is_refused(clip: str, window: tuple, named: str) -> None:
    with pytest.raises(UserError, match=named):
        sample_key(clip, *window)


def test_the_split_is_of_its_size_and_only_grows() -> None:
    clips = [f"clip-{number}" for number in range(20_000)]
    small = {clip for clip in clips if is_validation(clip, 0.01)}
    large = {clip for clip in clips if is_validation(clip, 0.05)}
    assert small < large
    assert 800 < len(large) < 1200
    assert not any(is_validation(clip, 0.0) for clip in clips)
    assert all(is_validation(clip, 1.0) for clip in clips)


def test_the_split_is_independent_of_the_order() -> None:
    clips = sorted((f"clip-{number}" for number in range(20_000)), key=clip_hash)
    first = sum(is_validation(clip, 0.1) for clip in clips[:2000])
    assert 120 < first < 280
