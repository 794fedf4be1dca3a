"""SMPTE timecodes: both ways, drop-frame and not, and decimal lengths."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.corpus.timecode import (
    NTSC,
    can_drop,
    is_skipped,
    label_rate,
    label_to_frame,
    parse_length,
    parse_timecode,
    snap_fps,
    split_label,
)

DOUBLE_NTSC = Fraction(60000, 1001)
FRAMES_A_DAY = 2_589_408
"""24 hours of drop-frame labels at 29.97: 144 × 17,982."""


def frame_to_timecode(frame: int, fps: Fraction, *, drop: bool) -> str:
    """The label of a frame counted from 00:00:00:00. Raises ValueError below 0, and for drop where there is none."""
    if frame < 0:
        raise ValueError(f"frame {frame} is below 0")
    nominal = max(1, round(fps))
    if drop:
        if not can_drop(fps):
            raise ValueError(f"no drop-frame counting at {float(fps):.3f} fps")
        frame += skipped_before(frame, nominal, 2 * int(fps / NTSC))
    seconds, frames = divmod(frame, nominal)
    mark = ";" if drop else ":"
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{mark}{frames:02d}"


def timecode_to_frame(text: str, fps: Fraction) -> int:
    """Frame number of a label. Raises ValueError; see `split_label`, `label_to_frame`."""
    label = split_label(text)
    return label_to_frame(label, label_rate(label, fps))


def skipped_before(frame: int, nominal: int, dropped: int) -> int:
    """Labels skipped up to a frame: none in the first minute of ten, `dropped` at the start of each other one."""
    minute = 60 * nominal - dropped
    tens, rest = divmod(frame, 10 * minute + dropped)
    later_minutes = max(0, rest - dropped) // minute
    return dropped * (9 * tens + later_minutes)


@given(st.integers(0, FRAMES_A_DAY - 1))
def test_drop_frame_labels_come_back_over_a_day(frame):
    label = frame_to_timecode(frame, NTSC, drop=True)
    assert timecode_to_frame(label, NTSC) == frame
    assert not is_skipped(split_label(label), NTSC)


@given(st.integers(0, 2 * FRAMES_A_DAY - 1))
def test_drop_frame_labels_come_back_at_twice_the_rate(frame):
    assert timecode_to_frame(frame_to_timecode(frame, DOUBLE_NTSC, drop=True), DOUBLE_NTSC) == frame


@given(st.integers(0, 10_000_000), st.sampled_from([Fraction(24), Fraction(25), NTSC, Fraction(30), Fraction(50)]))
def test_non_drop_labels_come_back(frame, fps):
    frame %= 24 * 3600 * round(fps)
    assert timecode_to_frame(frame_to_timecode(frame, fps, drop=False), fps) == frame


def test_drop_frame_counts_as_smpte_12m_does_by_hand():
    """Every label of 21 minutes, listed by the rule and not by the formula."""
    labels = [
        f"00:{minute:02d}:{second:02d};{frame:02d}"
        for minute in range(21)
        for second in range(60)
        for frame in range(30)
        if not (minute % 10 and second == 0 and frame < 2)
    ]
    assert [frame_to_timecode(n, NTSC, drop=True) for n in range(len(labels))] == labels


def test_a_day_of_drop_frame_keeps_pace_with_the_clock():
    assert frame_to_timecode(FRAMES_A_DAY - 1, NTSC, drop=True) == "23:59:59;29"
    assert parse_timecode("01:00:00;00", NTSC) == pytest.approx(3600, abs=0.004)
    assert parse_timecode("01:00:00:00", NTSC) == pytest.approx(3603.6)


def test_a_skipped_label_means_the_frame_that_follows():
    assert timecode_to_frame("00:01:00;00", NTSC) == timecode_to_frame("00:01:00;02", NTSC) == 1800
    assert timecode_to_frame("00:10:00;00", NTSC) == 17_982


def test_a_drop_frame_label_at_a_rate_without_drop_counts_at_2997():
    assert parse_timecode("00:00:14;03", Fraction(25)) == parse_timecode("00:00:14;03", NTSC)


@pytest.mark.parametrize("text", ["", "14;03", "00:00:14", "00:60:00;00", "00:00:61:00", "00:00:14;30", "aa:bb:cc;dd"])
def test_what_is_no_label_is_refused(text):
    with pytest.raises(ValueError, match=r"is not|past 59|fps"):
        parse_timecode(text, NTSC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:21.37", 21.37), ("01:00:00", 3600.0), ("02:03.5", 123.5), (" 21.37 ", 21.37), ("7", 7.0)],
)
def test_lengths(text, seconds):
    assert parse_length(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-3", "nan", "1e9", "00:00:60.0", "00:61:00", "21 s", "٢١"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ValueError, match=r"is not|past 59"):
        parse_length(text)


@given(st.text(max_size=20))
def test_any_text_is_a_time_or_a_value_error(text):
    for parse in (parse_length, lambda value: parse_timecode(value, NTSC)):
        try:
            assert 0 <= parse(text) < 1e9
        except ValueError:
            continue


def test_rounded_rates_are_made_exact():
    assert snap_fps(29.97) == NTSC
    assert snap_fps(23.976) == Fraction(24000, 1001)
    assert snap_fps(59.94) == DOUBLE_NTSC
    assert snap_fps(25.0) == 25
    assert snap_fps(15.0) == 15
