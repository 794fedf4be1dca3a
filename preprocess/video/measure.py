"""What the pictures of a clip say of themselves: black bars, lines of the vertical blanking interval, combing.

H rows and W columns of luma, uint8, as coded: nothing scaled, nothing deinterlaced. A measurement is taken over several
pictures of the clip, because one dark scene looks like a bar.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int16, UInt8

DARK_MEAN = 36
"""A picture darker than this (mean luma) says nothing about bars."""
MIN_BAR_SHARE = 0.02
"""Thinner bars are left: cropping them would cost more enlargement than they show."""
MAX_VBI_LINES = 44
SEARCHED_LINES = 60
COMB_STEP = 20
"""A line that sticks out by less is noise, not combing (twice the step to one neighbour)."""
MIN_COMB_ENERGY = 0.05
CUT_DIFFERENCE = 40
"""Mean luma difference of two frames above which they are of two shots."""


def fields_of(first: UInt8[np.ndarray, "H W"], second: UInt8[np.ndarray, "H W"]) -> str:
    """How two consecutive frames were scanned: `progressive`, `tff`, `bff`, or `unclear` (nothing moves, or a cut).

    Weave three pictures: the first frame's own fields, and each frame's top with the other's bottom field. In
    progressive material both mixtures comb alike and the frame itself does not. In interlaced material, top field
    first, the first bottom field lies midway between the two top fields: one mixture combs no more than the frame
    itself, and the other, three fields apart, combs most. Still detail combs in all three and says nothing.
    """
    height = first.shape[0] // 2 * 2
    top_0, bottom_0 = first[0:height:2].astype(np.int16), first[1:height:2].astype(np.int16)
    top_1, bottom_1 = second[0:height:2].astype(np.int16), second[1:height:2].astype(np.int16)
    if np.abs(top_0 - top_1).mean() > CUT_DIFFERENCE:
        return "unclear"
    own = _comb_energy(top_0, bottom_0)
    near_if_tff, near_if_bff = _comb_energy(top_1, bottom_0), _comb_energy(top_0, bottom_1)
    low, high = sorted((near_if_tff, near_if_bff))
    if high - own < MIN_COMB_ENERGY and high < 1.3 * own + MIN_COMB_ENERGY:
        return "unclear"
    if high < 1.5 * low or own < 0.25 * low:
        return "progressive"
    return "tff" if near_if_tff < near_if_bff else "bff"


def _comb_energy(top: Int16[np.ndarray, "R W"], bottom: Int16[np.ndarray, "R W"]) -> float:
    """Mean height by which lines stick out of their two neighbours of the other field, beyond texture and noise."""
    out_b = np.abs(2 * bottom[:-1] - top[:-1] - top[1:]) - np.abs(top[:-1] - top[1:])
    out_t = np.abs(2 * top[1:] - bottom[:-1] - bottom[1:]) - np.abs(bottom[:-1] - bottom[1:])
    return float(np.maximum(out_b - COMB_STEP, 0).mean() + np.maximum(out_t - COMB_STEP, 0).mean())


def find_bars(lumas: Sequence[UInt8[np.ndarray, "H W"]], black_limit: int) -> tuple[int, int, int, int]:
    """Black left, top, right, bottom, in pixels; zeros where there is none.

    A bar is black in every picture, ends in a straight edge that is lit along half its length, is matched by a like
    bar on the opposite side, and is at least 2 % of the picture: so a night scene or a title on black is not one.

    Args:
        lumas: pictures of one size.
        black_limit: largest luma that counts as black (32 for limited range, 16 for full).
    """
    bright = [luma for luma in lumas if luma.mean() >= DARK_MEAN]
    if not bright:
        return (0, 0, 0, 0)
    lit = np.max(bright, axis=0) > black_limit
    top, bottom = _pair(lit)
    left, right = _pair(lit[top : lit.shape[0] - bottom].T)
    return (left, top, right, bottom)


def _pair(lit: np.ndarray) -> tuple[int, int]:
    """Bars at the first and at the last rows of `lit`; zeros where they are not a pair."""
    height = lit.shape[0]
    shares = lit.mean(axis=1)
    shown = np.flatnonzero(shares >= 0.02)
    if not shown.size:
        return (0, 0)
    first, last = int(shown[0]), height - 1 - int(shown[-1])
    straight = shares[first : first + 4].max() >= 0.5 and shares[height - last - 4 : height - last].max() >= 0.5
    alike = abs(first - last) <= max(4, 0.02 * height)
    thick = min(first, last) >= MIN_BAR_SHARE * height
    return (first, last) if straight and alike and thick else (0, 0)


def find_vbi(lumas: Sequence[UInt8[np.ndarray, "H W"]]) -> int:
    """Lines above the picture that belong to the vertical blanking interval: data lines, and empty ones among them.

    A line is empty (black and flat), or data (like none of its neighbours), or picture (like one of them). The interval
    ends after the last line of the first two kinds; without a line that is not empty it is a bar, not an interval.
    """
    found = [_vbi_of(luma) for luma in lumas if luma.mean() >= DARK_MEAN]
    seen = [lines for lines in found if lines]
    return int(np.median(seen)) if 2 * len(seen) > len(found) else 0


def _vbi_of(luma: np.ndarray) -> int:
    rows = luma[: luma.shape[0] // 3].astype(np.float32)
    if len(rows) < SEARCHED_LINES:
        return 0
    empty = _is_empty(rows)
    likeness = np.full(len(rows), -1.0)
    for step in (1, 2):
        pair = _correlation(rows[:-step], rows[step:])
        likeness[:-step] = np.maximum(likeness[:-step], pair)
        likeness[step:] = np.maximum(likeness[step:], pair)
    foreign = empty | (likeness < 0.5)
    if not foreign[:SEARCHED_LINES].any():
        return 0
    lines = int(np.flatnonzero(foreign[:SEARCHED_LINES])[-1]) + 1
    if lines > MAX_VBI_LINES:
        lines = _above_letterbox(luma, foreign)
    signs_of_life = (~empty[:lines]).any() and foreign[:lines].sum() >= min(4, lines)
    return lines if signs_of_life and lines <= MAX_VBI_LINES else 0


def _above_letterbox(luma: np.ndarray, foreign: np.ndarray) -> int:
    """Lines of the interval where a letterbox follows it: what is black above beyond what is black below."""
    shown = np.flatnonzero(~foreign[MAX_VBI_LINES:])
    below = np.flatnonzero(~_is_empty(luma[::-1].astype(np.float32)))
    if not shown.size or not below.size:
        return 0
    return max(0, MAX_VBI_LINES + int(shown[0]) - int(below[0]))


def _is_empty(rows: Float[np.ndarray, "R W"]) -> Bool[np.ndarray, " R"]:
    return (rows.mean(axis=1) < 40) & (rows.std(axis=1) < 6)


def _correlation(a: Float[np.ndarray, "R W"], b: Float[np.ndarray, "R W"]) -> Float[np.ndarray, " R"]:
    """Pearson's correlation of each row of `a` with the same row of `b`; two flat rows of like level count as alike."""
    difference = np.abs(a.mean(axis=1) - b.mean(axis=1))
    a = a - a.mean(axis=1, keepdims=True)
    b = b - b.mean(axis=1, keepdims=True)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    flat = norms < 9.0 * a.shape[1]  # both vary by less than three steps
    correlation = (a * b).sum(axis=1) / np.maximum(norms, 1e-6)
    return np.where(flat & (difference < 12), 1.0, correlation)
