"""What the pictures of a clip say of themselves: black bars, blanking lines, combing; and how much a window moves.

H rows and W columns of luma, uint8, as coded: nothing scaled, nothing deinterlaced. A measurement is taken over several
pictures of the clip, because one dark scene looks like a bar. A window is measured on its decoded RGB frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int16, UInt8

from shards.config import Config

DARK_MEAN = 36
"""A picture darker than this (mean luma) says nothing about bars."""
MIN_BAR_SHARE = 0.02
"""Thinner bars are left: cropping them would cost more enlargement than they show."""
MAX_VBI_LINES = 44
SEARCHED_LINES = 60
MIN_BLANK_LINES = 6
"""Fewer lines without data at the top are left: many a picture has a dark line or two there."""
FLAT_DEVIATION = 3.0
"""Largest deviation of the means of a blank line's columns, and of its level in time: noise remains below it."""
MIN_EDGE_STEP = 8.0
"""Smallest step of luma from the blank lines to the picture, in the picture where it is largest."""
COMB_STEP = 20
"""A line that sticks out by less is noise, not combing (twice the step to one neighbour)."""
MIN_COMB_ENERGY = 0.05
BLOCK = 32
BLACK_LEVEL = 16
"""Largest mean of red, green and blue that counts as black."""
MOTION_FLOOR = 3.0
"""Changes of a block's mean up to this, of 255, are those of coding."""
LUMA_WEIGHTS = np.array([0.25, 0.5, 0.25], np.float32)
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


def find_vbi(lumas: Sequence[UInt8[np.ndarray, "H W"]]) -> tuple[int, str]:
    """Lines above the picture that belong to the vertical blanking interval, and the ground for it.

    They carry data (VITC, captions, teletext, wide-screen signalling) with empty lines among them, or nothing at all:
    then only their straight lower edge tells them from a picture.
    """
    bright = [luma for luma in lumas if luma.mean() >= DARK_MEAN]
    found = [_vbi_of(luma) for luma in bright]
    seen = [lines for lines in found if lines]
    with_data = int(np.median(seen)) if 2 * len(seen) > len(found) else 0
    blank = _blank_lines(bright)
    if blank > with_data:
        return blank, f"blank lines: flat and unchanged in {len(bright)} pictures, with a straight lower edge"
    return with_data, "data lines in the pictures" if with_data else "pictures"


def find_lines_below(lumas: Sequence[UInt8[np.ndarray, "H W"]]) -> int:
    """Blank lines below the picture of a raster of 512 or 608 lines, which has 32 more than a picture."""
    bright = [luma[::-1] for luma in lumas if luma.mean() >= DARK_MEAN]
    lines = _blank_lines(bright) if bright and bright[0].shape[0] in (512, 608) else 0
    return lines if abs(lines - 32) <= 2 else 0


def _blank_lines(lumas: Sequence[np.ndarray]) -> int:
    """Lines above the picture that are flat, of whatever luma, in all of several pictures.

    A line is blank where it has no structure along its length, which noise has not in the mean of a column, and keeps
    its level from picture to picture. The lines end at an edge that runs through (almost) all columns at one row: a
    dark sky, a night scene and a roof do not. Black lines that are matched by black ones below are a letterbox.
    """
    if len(lumas) < 2 or lumas[0].shape[0] // 3 < SEARCHED_LINES:
        return 0
    height, width = lumas[0].shape
    rows = height // 3
    # Means of columns 24 pixels wide: P pictures, H rows, C columns; the whole height, for what is black below.
    means_PHC = np.stack(
        [luma[:, : width // 24 * 24].reshape(height, -1, 24).mean(axis=2, dtype=np.float32) for luma in lumas]
    )
    # Not those of black borders at the sides, nor the two beside them, which may be part border, part picture.
    means_PHC = means_PHC[..., means_PHC[:, rows:].max(axis=(0, 1)) > 40][..., 1:-1]
    if means_PHC.shape[2] < 8:
        return 0
    steady_HC, levels_PH = means_PHC.mean(axis=0), means_PHC.mean(axis=2)
    blank_H = (steady_HC.std(axis=1) <= FLAT_DEVIATION) & (levels_PH.std(axis=0) <= FLAT_DEVIATION)
    black_H = blank_H & (levels_PH.mean(axis=0) < 40)
    steps_PHC = np.abs(np.diff(means_PHC[:, : rows + 8], axis=1))
    edge = 0
    for row in range(MIN_BLANK_LINES, rows):
        above, below = means_PHC[:, row - 3 : row - 1].mean(axis=1), means_PHC[:, row + 1 : row + 3].mean(axis=1)
        is_edge = (np.abs(below - above).max(axis=0) > MIN_EDGE_STEP).mean() >= 0.9
        if is_edge and blank_H[row - 2 : row].all() and blank_H[:row].mean() >= 0.75:
            edge = row
    if not edge:
        return 0
    step_H = steps_PHC.mean(axis=(0, 2))  # step_H[n] lies between rows n and n + 1
    first = max(0, edge - 4)
    lines = first + int(step_H[first : edge + 3].argmax()) + 1
    typical = float(np.median(step_H[lines + 1 : lines + 7]))
    if step_H[lines] > max(0.4 * step_H[lines - 1], 2 * typical):
        lines += 1  # a proxy's scaling has mixed this one from the last blank line and the picture
    if black_H[lines - 3 : lines - 1].all():
        num_below = height if black_H.all() else int(np.argmin(black_H[::-1]))
        is_letterbox = num_below >= 4 and abs(lines - num_below) <= max(4, MIN_BAR_SHARE * height)
        lines = 0 if is_letterbox else lines - num_below
    return lines if MIN_BLANK_LINES <= lines <= MAX_VBI_LINES else 0


def _vbi_of(luma: np.ndarray) -> int:
    """Lines of an interval that carries data, as one picture shows it.

    A line is empty (black and flat), or data (like none of its neighbours), or picture (like one of them). The interval
    ends after the last line of the first two kinds; without a line that is not empty it is no such interval.
    """
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


class Measured(Config):
    """What is recorded of a window, whether it becomes a sample or not."""

    motion: float
    """Share of the picture's blocks (of 32×32 pixels, of 8×8 in small pictures) that change by more than noise does."""
    black_share: float
    """Share of its pixels that are black."""
    kept_share: float
    """Share of the displayed picture that the bucket keeps of it."""


def measure_window(frames_THWC: UInt8[np.ndarray, "T H W 3"], kept_share: float) -> Measured:
    """Measure decoded frames. To cost a hundredth of decoding them, about twelve frames and every eighth row must do.

    Of a still that was coded with noise all blocks change by a little, and alike; so the floor above which a block
    moves rises with the median change, up to where no noise reaches (docs/decisions/105).
    """
    from PIL import Image

    block = BLOCK if min(frames_THWC.shape[1:3]) >= 256 else BLOCK // 4
    rows_THWC = np.ascontiguousarray(frames_THWC[:: max(1, len(frames_THWC) // 12), :: block // 4])
    num_frames, num_rows, width, _ = rows_THWC.shape
    stacked = Image.fromarray(rows_THWC.reshape(num_frames * num_rows, width, 3))
    blocks = np.asarray(stacked.reduce((block, 4)), np.float32).reshape(num_frames, -1, 3) @ LUMA_WEIGHTS
    changes = np.ptp(blocks, axis=0)
    floor = MOTION_FLOOR + 3 * min(float(np.median(changes)), 2.0)
    black = rows_THWC[:, :, ::8].sum(axis=3, dtype=np.uint16) <= 3 * BLACK_LEVEL
    return Measured(
        motion=round(float((changes > floor).mean()), 4),
        black_share=round(float(black.mean()), 4),
        kept_share=round(kept_share, 4),
    )
