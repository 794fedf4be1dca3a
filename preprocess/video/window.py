"""Which stretches of a clip become samples.

A window is `num_frames` frames at `fps`; its first frame is at `start_seconds` from the clip's zero (a multiple of a
millisecond, because keys are made of milliseconds) and it ends num_frames / fps later, never beyond the clip's end.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from preprocess.config import PrepConfig, WindowConfig
from preprocess.corpus.records import Record
from preprocess.facts import ClipFacts
from preprocess.rejection import ClipRejected, Rejection


class Window(NamedTuple):
    """One stretch of a clip."""

    start_seconds: float
    """From the clip's zero, a multiple of 0.001."""
    num_frames: int
    ground: str
    """Why here."""


class _Wish(NamedTuple):
    start_ms: int
    ground: str


class _Span(NamedTuple):
    """A stretch without a shot change: windows may start from `first_ms` to `last_ms`, both inclusive."""

    first_ms: int
    last_ms: int


def choose_windows(facts: ClipFacts, record: Record, config: PrepConfig) -> tuple[Window, ...]:
    """Up to `max_windows` windows that do not overlap, by the configured policy, in the order of preference.

    Raises ClipRejected (stage `window`): `too-short` for a clip shorter than one window, `scene-cuts` where no stretch
    between two shot changes is long enough.
    """
    if facts.media == "image":
        return (Window(0.0, 1, "image"),)
    length_ms = 1000 * config.window.num_frames / config.window.fps
    spans = _free_spans(facts, length_ms)
    if not spans:
        needed = f"{length_ms / 1000:.3f} s for {config.window.num_frames} frames"
        if facts.cuts and facts.duration_seconds * 1000 >= length_ms:
            _reject("scene-cuts", f"{len(facts.cuts)} shot changes leave no stretch of {needed}")
        _reject("too-short", f"{facts.duration_seconds:.3f} s, {needed}")
    wishes = _wishes(facts, record, config, length_ms)
    return _grant(wishes, spans, config.window, math.ceil(length_ms))


def _free_spans(facts: ClipFacts, length_ms: float) -> list[_Span]:
    """Where a window may start. A window's last frame is its last picture, so a cut may come right after it."""
    begin, end = facts.start_seconds, facts.end_seconds
    borders = [begin, *[cut for cut in facts.cuts if begin < cut < end], end]
    spans = []
    for one, other in itertools.pairwise(borders):
        first = math.ceil(round(one * 1000, 3))
        last = math.floor(round(other * 1000 - length_ms, 3))
        if last >= first:
            spans.append(_Span(first, last))
    return spans


def _wishes(facts: ClipFacts, record: Record, config: PrepConfig, length_ms: float) -> Iterator[_Wish]:
    """Starts in the order they are wanted, wherever they lie."""
    policy = config.window.policy
    begin, end = facts.start_seconds * 1000, facts.end_seconds * 1000
    if policy == "start":
        yield _Wish(round(begin), "start")
    elif policy == "middle":
        yield _Wish(round((begin + end - length_ms) / 2), "middle")
    elif policy == "tile":
        length = math.ceil(length_ms)
        for n in range(max(1, int((end - begin) // length))):
            yield _Wish(math.ceil(begin) + n * length, f"tile {n}")
    elif policy == "random":
        yield from _random_wishes(begin, end, length_ms, config, record.clip_id)
    else:
        yield from _caption_wishes(record, begin, end, length_ms)


def _random_wishes(begin: float, end: float, length_ms: float, config: PrepConfig, clip_id: str) -> Iterator[_Wish]:
    """Windows at random, without overlap: the slack is cut at sorted random places."""
    length = math.ceil(length_ms)
    number = min(config.window.max_windows, int((end - begin) // length) or 1)
    slack = max(0.0, end - begin - number * length)
    for n, share in enumerate(sorted(_uniform(config.seed, clip_id, k) for k in range(number))):
        yield _Wish(math.ceil(begin) + n * length + math.floor(share * slack), f"random, seed {config.seed}")


def _uniform(seed: int, clip_id: str, draw: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"window {seed} {draw} {clip_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _caption_wishes(record: Record, begin: float, end: float, length_ms: float) -> Iterator[_Wish]:
    """A window centred on each time-coded caption: object level before scenes, those that fill a window first."""
    placed = []
    for rank, (level, captions) in enumerate((("object", record.object), ("scene", record.scene))):
        for number, caption in enumerate(captions):
            if caption.start_seconds is None and caption.end_seconds is None:
                continue
            first = max(begin, 1000 * (caption.start_seconds or 0.0))
            last = min(end, end if caption.end_seconds is None else 1000 * caption.end_seconds)
            if last <= first:
                continue  # it speaks of a time that the clip does not have
            wish = _Wish(
                round((first + last - length_ms) / 2),
                f"{level} caption {number}, {first / 1000:.2f} to {last / 1000:.2f} s",
            )
            placed.append(((rank, last - first < length_ms, number), wish))
    for _, wish in sorted(placed):
        yield wish
    if not placed:
        yield _Wish(round((begin + end - length_ms) / 2), "middle: no time-coded caption within the clip")


def _grant(wishes: Iterator[_Wish], spans: list[_Span], config: WindowConfig, length_ms: int) -> tuple[Window, ...]:
    """Each wish at the nearest place that is allowed; one that would then overlap a granted window is dropped."""
    granted: list[Window] = []
    taken: list[int] = []
    for wish in wishes:
        start = min(
            (min(max(wish.start_ms, s.first_ms), s.last_ms) for s in spans), key=lambda ms: abs(ms - wish.start_ms)
        )
        if any(abs(start - other) < length_ms for other in taken):
            continue
        moved = (
            "" if start == wish.start_ms else f", moved {start - wish.start_ms:+d} ms to lie within the clip or shot"
        )
        taken.append(start)
        granted.append(Window(start / 1000, config.num_frames, wish.ground + moved))
        if len(granted) == config.max_windows:
            break
    return tuple(granted)


def _reject(reason: str, detail: str) -> NoReturn:
    raise ClipRejected(Rejection("window", reason, detail, False))
