"""Which of a window's pictures are missing, and whether their times can be told: from times alone, in seconds."""

from __future__ import annotations

import itertools
from bisect import bisect_left

from preprocess.facts import ClipFacts
from preprocess.video.window import Window


def lost_pictures(decoded: list[float], facts: ClipFacts, needed: tuple[float, ...]) -> list[float]:
    """Which of the needed pictures no decoded one has the time of; `decoded`: on the file's own clock."""
    decoded = sorted(seconds - facts.zero_seconds for seconds in decoded)
    lost = []
    for time in needed:
        place = bisect_left(decoded, time)
        near = decoded[max(0, place - 1) : place + 1]
        if all(abs(other - time) > 0.45 / facts.fps for other in near):
            lost.append(time)
    return lost


def is_bearable(lost: list[float], needed: tuple[float, ...], window: Window) -> bool:
    """Whether enough pictures are left for every frame to be another one, with no two lost in a row."""
    places = [needed.index(time) for time in lost]
    apart = all(b - a > 1 for a, b in itertools.pairwise(places))
    return apart and len(needed) - len(lost) >= window.num_frames


def hole_in(facts: ClipFacts, needed: tuple[float, ...], *, is_damaged: bool) -> tuple[float, float] | None:
    """Where two pictures in a row or more are missing from the file itself; None: nowhere, or nothing is damaged.

    A container that lost its data in the middle does not list those pictures, so they are not among the needed ones.
    In a clip without damage such a gap is a variable frame rate.
    """
    if not needed or not (is_damaged or any(needed[0] <= time <= needed[-1] for time in facts.corrupt_seconds)):
        return None
    pairs = itertools.pairwise(needed)
    return next(((one, other) for one, other in pairs if (other - one) * facts.fps > 2.5), None)


def step_back(decoded: list[float], facts: ClipFacts, needed: tuple[float, ...]) -> tuple[float, float] | None:
    """Where the decoded pictures' times begin again within a window, as (time, earlier time); None: nowhere.

    Pictures whose file gives them no time (a Matroska file that begins before zero) get one that others have. Two
    neighbours in the wrong order, as a program stream may have them, are no new beginning.
    """
    if not needed:
        return None
    times = [seconds - facts.zero_seconds for seconds in decoded]
    first, last = needed[0] - 0.5 / facts.fps, needed[-1]
    for lowest, (one, other) in zip(itertools.accumulate(times, min), itertools.pairwise(times), strict=False):
        if other < one and other < lowest + 0.9 / facts.fps and other < last and first < one:
            return one, other
    return None
