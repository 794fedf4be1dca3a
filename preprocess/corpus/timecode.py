"""Timecodes of the annotations: SMPTE 12M labels, drop-frame (`;`) and not (`:`), and decimal lengths.

Drop-frame labels at 30000/1001 skip frame numbers 0 and 1 at the start of every minute, except every tenth, so that
labels keep pace with the clock: 17,982 frames are ten minutes. At 60000/1001 four numbers are skipped.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

NTSC = Fraction(30000, 1001)
STANDARD_FPS = (
    Fraction(24000, 1001),
    Fraction(24),
    Fraction(25),
    NTSC,
    Fraction(30),
    Fraction(48000, 1001),
    Fraction(48),
    Fraction(50),
    Fraction(60000, 1001),
    Fraction(60),
)
MAX_SECONDS = 1_000_000.0

_LABEL = re.compile(r"([0-9]{1,2}):([0-9]{1,2}):([0-9]{1,2})([:;])([0-9]{1,3})", re.ASCII)
_CLOCK = re.compile(r"(?:([0-9]{1,3}):)?([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]{1,9})?)", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,7}(?:\.[0-9]{1,9})?", re.ASCII)


class Label(NamedTuple):
    """The parts of a timecode as written."""

    hours: int
    minutes: int
    seconds: int
    frames: int
    is_drop: bool


def snap_fps(fps: float) -> Fraction:
    """The exact rate behind a rounded one: 29.97 is 30000/1001, 23.976 is 24000/1001; others keep their value."""
    for standard in STANDARD_FPS:
        if abs(fps - float(standard)) < 0.006:
            return standard
    return Fraction(fps).limit_denominator(1001)


def can_drop(fps: Fraction) -> bool:
    """Whether drop-frame counting exists at this rate: multiples of 30000/1001 only."""
    return (fps / NTSC).denominator == 1


def split_label(text: str) -> Label:
    """Read `HH:MM:SS:FF` or `HH:MM:SS;FF`. Raises ValueError for anything else, and for minutes or seconds past 59."""
    match = _LABEL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text[:40]!r} is not HH:MM:SS:FF or HH:MM:SS;FF")
    hours, minutes, seconds, mark, frames = match.groups()
    if int(minutes) > 59 or int(seconds) > 59:
        raise ValueError(f"{text[:40]!r} has minutes or seconds past 59")
    return Label(int(hours), int(minutes), int(seconds), int(frames), mark == ";")


def label_rate(label: Label, fps: Fraction) -> Fraction:
    """The rate that a label counts at: drop-frame at a rate that has none can only mean 30000/1001."""
    return NTSC if label.is_drop and not can_drop(fps) else fps


def is_skipped(label: Label, fps: Fraction) -> bool:
    """Whether drop-frame counting skips this label, so that no frame bears it."""
    return label.is_drop and label.seconds == 0 and label.minutes % 10 != 0 and label.frames < _num_dropped(fps)


def label_to_frame(label: Label, fps: Fraction) -> int:
    """Frame number counted from 00:00:00:00.

    A label that drop-frame skips means the frame that follows it (`is_skipped` tells). Raises ValueError for a frame
    number that the rate does not have.
    """
    nominal = _nominal(fps)
    if label.frames >= nominal:
        raise ValueError(f"frame {label.frames} at {float(fps):.3f} fps")
    total_minutes = 60 * label.hours + label.minutes
    frames = _num_dropped(fps) if is_skipped(label, fps) else label.frames
    count = (60 * total_minutes + label.seconds) * nominal + frames
    return count - _num_dropped(fps) * (total_minutes - total_minutes // 10) if label.is_drop else count


def parse_timecode(text: str, fps: Fraction) -> float:
    """Seconds from the clip's start to the frame that a label names. Raises ValueError where it names none."""
    label = split_label(text)
    rate = label_rate(label, fps)
    return float(label_to_frame(label, rate) / rate)


def parse_length(text: str) -> float:
    """Seconds of a decimal length: `HH:MM:SS.ss`, `MM:SS.ss` or plain seconds. Raises ValueError."""
    stripped = text.strip()
    if _NUMBER.fullmatch(stripped):
        return float(stripped)
    match = _CLOCK.fullmatch(stripped)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not HH:MM:SS.ss")
    hours, minutes, seconds = match.groups()
    if float(seconds) >= 60 or (hours is not None and int(minutes) > 59):
        raise ValueError(f"{text[:40]!r} has minutes or seconds past 59")
    return 3600.0 * int(hours or 0) + 60.0 * int(minutes) + float(seconds)


def _nominal(fps: Fraction) -> int:
    """Frame numbers a second of labels: 30 for 29.97."""
    return max(1, round(fps))


def _num_dropped(fps: Fraction) -> int:
    """Frame numbers skipped a minute: 2 at 29.97, 4 at 59.94."""
    return 2 * int(fps / NTSC) if can_drop(fps) else 0
