"""Which stretches of a clip become samples.

A window is one of the lengths of `num_frames` at `fps`: the longest that fits. Its first frame is at `start_seconds`
from the clip's zero (a multiple of a millisecond, because keys are made of milliseconds) and it ends num_frames / fps
later, never beyond the clip's end.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple, NoReturn

from preprocess.config import PrepConfig
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
    start_ms: Callable[[float], int]
    """Where a window of so many milliseconds would begin."""
    ground: str
    stretch: tuple[float, float] | None = None
    """The caption's, in milliseconds: a window longer than the shortest lies within it."""


class _Span(NamedTuple):
    """A stretch without a shot change: windows may start from `first_ms` to `last_ms`, both inclusive."""

    first_ms: int
    last_ms: int


class _Stretch(NamedTuple):
    """Of a clip, what decides where its windows can be."""

    start_seconds: float
    end_seconds: float
    cuts: tuple[float, ...]


class _Length(NamedTuple):
    """A length that the clip has room for."""

    num_frames: int
    ms: float
    spans: list[_Span]


def choose_windows(facts: ClipFacts, record: Record, config: PrepConfig) -> tuple[Window, ...]:
    """Up to `max_windows` windows that do not overlap, by the configured policy, in the order of preference.

    Each has the longest of the configured lengths for which there is room, at the place nearest to where the policy
    wants it: within the clip and one shot, beside the windows before it, and, where a caption's times place it, within
    these (the shortest length is centred on a caption that is shorter still).

    Raises ClipRejected (stage `window`): `too-short` for a clip shorter than one window, `scene-cuts` where no stretch
    between two shot changes is long enough.
    """
    if facts.media == "image":
        return (Window(0.0, 1, "image"),)
    stretch = _Stretch(facts.start_seconds, facts.end_seconds, facts.cuts)
    lengths = _lengths(stretch, config)
    if not lengths:
        shortest = config.window.lengths[0]
        length_ms = 1000 * shortest / config.window.fps
        needed = f"{length_ms / 1000:.3f} s for {shortest} frames"
        if facts.cuts and facts.duration_seconds * 1000 >= length_ms:
            _reject("scene-cuts", f"{len(facts.cuts)} shot changes leave no stretch of {needed}")
        _reject("too-short", f"{facts.duration_seconds:.3f} s, {needed}")
    return _choose(stretch, lengths, record, config)


def declared_lengths(seconds: float, record: Record, config: PrepConfig) -> list[int]:
    """Frames of the windows that a video of so many seconds would have if it had no shot change; none if too short."""
    stretch = _Stretch(0.0, seconds, ())
    lengths = _lengths(stretch, config)
    return [window.num_frames for window in _choose(stretch, lengths, record, config)] if lengths else []


def _lengths(stretch: _Stretch, config: PrepConfig) -> list[_Length]:
    """The lengths that a clip has room for, the longest first."""
    every = ((frames, 1000 * frames / config.window.fps) for frames in reversed(config.window.lengths))
    return [_Length(frames, ms, spans) for frames, ms in every if (spans := _free_spans(stretch, ms))]


def _choose(stretch: _Stretch, lengths: Sequence[_Length], record: Record, config: PrepConfig) -> tuple[Window, ...]:
    wishes = _wishes(stretch, record, config, [length.ms for length in lengths])
    return _grant(wishes, lengths, config.window.max_windows)


def _free_spans(stretch: _Stretch, length_ms: float) -> list[_Span]:
    """Where a window may start. A window's last frame is its last picture, so a cut may come right after it."""
    begin, end = stretch.start_seconds, stretch.end_seconds
    borders = [begin, *[cut for cut in stretch.cuts if begin < cut < end], end]
    spans = []
    for one, other in itertools.pairwise(borders):
        first = math.ceil(round(one * 1000, 3))
        last = math.floor(round(other * 1000 - length_ms, 3))
        if last >= first:
            spans.append(_Span(first, last))
    return spans


def _wishes(stretch: _Stretch, record: Record, config: PrepConfig, lengths_ms: Sequence[float]) -> Iterator[_Wish]:
    """Starts in the order they are wanted, wherever they lie."""
    policy = config.window.policy
    begin, end = stretch.start_seconds * 1000, stretch.end_seconds * 1000
    if policy == "start":
        yield _Wish(lambda _: round(begin), "start")
    elif policy == "middle":
        yield _Wish(_centred(begin, end), "middle")
    elif policy == "tile":
        yield from _tile_wishes(begin, end, lengths_ms)
    elif policy == "random":
        yield from _random_wishes(begin, end, lengths_ms[0], config, record.clip_id)
    else:
        yield from _caption_wishes(record, begin, end, lengths_ms[-1])


def _centred(first: float, last: float) -> Callable[[float], int]:
    return lambda length_ms: round((first + last - length_ms) / 2)


def _at(start_ms: int) -> Callable[[float], int]:
    return lambda _: start_ms


def _tile_wishes(begin: float, end: float, lengths_ms: Sequence[float]) -> Iterator[_Wish]:
    """One after the other, the longest first; what they leave at the end is for shorter ones."""
    number, start = 0, begin
    for place, length_ms in enumerate(lengths_ms):
        length = math.ceil(length_ms)
        room = int((end - start) // length)
        if place == len(lengths_ms) - 1 and not number:
            room = max(1, room)
        first = math.ceil(start)
        for n in range(room):
            yield _Wish(_at(first + n * length), f"tile {number + n}")
        number, start = number + room, first + room * length if room else start


def _random_wishes(begin: float, end: float, length_ms: float, config: PrepConfig, clip_id: str) -> Iterator[_Wish]:
    """Windows at random, without overlap: the slack is cut at sorted random places."""
    length = math.ceil(length_ms)
    number = min(config.window.max_windows, int((end - begin) // length) or 1)
    slack = max(0.0, end - begin - number * length)
    for n, share in enumerate(sorted(_uniform(config.seed, clip_id, k) for k in range(number))):
        start = math.ceil(begin) + n * length + math.floor(share * slack)
        yield _Wish(_at(start), f"random, seed {config.seed}")


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
            ground = f"{level} caption {number}, {first / 1000:.2f} to {last / 1000:.2f} s"
            wish = _Wish(_centred(first, last), ground, (first, last))
            placed.append(((rank, last - first < length_ms, number), wish))
    for _, wish in sorted(placed, key=itemgetter(0)):
        yield wish
    if not placed:
        yield _Wish(_centred(begin, end), "middle: no time-coded caption within the clip")


def _grant(wishes: Iterator[_Wish], lengths: Sequence[_Length], most: int) -> tuple[Window, ...]:
    """Each wish at the longest length and the nearest place that are allowed; one without room is dropped."""
    granted: list[Window] = []
    taken: list[tuple[int, int]] = []
    for wish in wishes:
        place = _place(wish, lengths, taken)
        if place is None:
            continue
        length, start = place
        wanted = wish.start_ms(length.ms)
        moved = "" if start == wanted else f", moved {start - wanted:+d} ms to lie within the clip or shot"
        taken.append((start, start + math.ceil(length.ms)))
        granted.append(Window(start / 1000, length.num_frames, wish.ground + moved))
        if len(granted) == most:
            break
    return tuple(granted)


def _place(wish: _Wish, lengths: Sequence[_Length], taken: Sequence[tuple[int, int]]) -> tuple[_Length, int] | None:
    """The longest length with room for a wish, and its start; None where every one would overlap a granted window.

    Beyond its caption's times only the shortest is given.
    """
    for length in lengths:
        wanted = wish.start_ms(length.ms)
        starts = (min(max(wanted, span.first_ms), span.last_ms) for span in length.spans)
        start = min(starts, key=lambda ms: abs(ms - wanted))
        if any(start < end and begin < start + math.ceil(length.ms) for begin, end in taken):
            continue
        # Times in whole milliseconds: a start may be rounded by half of one.
        is_within = wish.stretch is None or (wish.stretch[0] - 1 <= start and start + length.ms <= wish.stretch[1] + 1)
        if is_within or length is lengths[-1]:
            return length, start
    return None


def _reject(reason: str, detail: str) -> NoReturn:
    raise ClipRejected(Rejection("window", reason, detail, False))
