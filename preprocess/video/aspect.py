"""The shape that a raster is shown in, decided in the order of grounds that the corpus was seen to need.

A 720×480 proxy of a 1920×1080 source is a squeezed 16:9 picture, whatever its flags; an SD raster never has square
pixels. The order: (1) a non-square sample aspect in the file, (2) a declared raster of square pixels, (3) an SD raster:
bars found in the pictures, else the config, (4) square pixels.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

SD_WIDTHS = (704, 720)
SD_HEIGHTS = (480, 486, 512, 576, 608)
WIDE, NARROW = Fraction(16, 9), Fraction(4, 3)
ANAMORPHIC_HD = {(1440, 1080): WIDE, (1280, 1080): WIDE, (960, 720): WIDE}
"""HD rasters of tape formats (HDV, DVCPRO HD): declared so, the picture is 16:9."""
SAME_SHAPE = 0.02
"""Shapes nearer than this are the same: 1920×1080 and 1920×1088, 853×480 and 854×480."""
DAR_FLAGGED = 0.005


class Raster(NamedTuple):
    """What is known of a coded picture when its shape is to be decided."""

    width: int
    """Coded width."""
    height: int
    """Coded height, lines of the blanking interval included."""
    vbi_lines: int
    sample_aspect: Fraction | None
    declared: tuple[int, int] | None
    """Width and height in the annotation."""
    turned: bool
    """Shown turned by 90° or 270°."""
    bars: tuple[int, int, int, int]
    """Black left, top, right, bottom below the blanking interval."""


def is_sd(width: int, height: int) -> bool:
    """A raster of standard definition, whose pixels are never square."""
    return width in SD_WIDTHS and height in SD_HEIGHTS


def decide_aspect(raster: Raster, sd_display_aspect: str) -> tuple[Fraction, str]:
    """Display aspect (width ÷ height, before rotation) of the raster below the VBI lines, and the ground for it."""
    flagged = _flagged(raster)
    if flagged is not None:
        return flagged
    if raster.declared is not None:
        declared = _declared(raster, *raster.declared)
        if declared is not None:
            return declared
    if is_sd(raster.width, raster.height):
        return _standard_definition(raster, sd_display_aspect)
    return Fraction(raster.width, raster.height - raster.vbi_lines), "square pixels: nothing says otherwise"


def _flagged(raster: Raster) -> tuple[Fraction, str] | None:
    """A non-square flag. Where it was derived from a display aspect over all lines, that aspect is the picture's."""
    if raster.sample_aspect is None or raster.sample_aspect == 1:
        return None
    over_all = raster.sample_aspect * Fraction(raster.width, raster.height)
    ground = f"flagged sample aspect {raster.sample_aspect.numerator}:{raster.sample_aspect.denominator}"
    for known in (WIDE, NARROW):
        if _differ(over_all, known) <= DAR_FLAGGED:
            return over_all, ground
    return raster.sample_aspect * Fraction(raster.width, raster.height - raster.vbi_lines), ground


def _declared(raster: Raster, width: int, height: int) -> tuple[Fraction, str] | None:
    """The shape of a declared raster of square pixels (or of a known anamorphic one); None: it says nothing."""
    if is_sd(width, height) or is_sd(height, width):
        return None
    words = f"declared {width}×{height}"
    own = Fraction(raster.width, raster.height - raster.vbi_lines)
    if (width, height) in ANAMORPHIC_HD:
        return ANAMORPHIC_HD[width, height], f"{words}, a raster shown as 16:9"
    shape = Fraction(width, height)
    if _differ(shape, own) <= SAME_SHAPE:
        return own, f"square pixels: {words} is of the file's shape"
    if (_differ(1 / shape, own) <= SAME_SHAPE) and not is_sd(raster.width, raster.height):
        return own, f"square pixels: {words} is the file's shape turned"
    shape = 1 / shape if raster.turned else shape
    between_bars = _shape_between_bars(raster, shape)
    if between_bars is not None:
        return between_bars, f"{words} is the shape between the black bars"
    return shape, f"{words}, square pixels of another shape than the file's"


def _shape_between_bars(raster: Raster, shape: Fraction) -> Fraction | None:
    """The raster's shape where the declared one is that of a pillarboxed picture in it."""
    left, top, right, bottom = raster.bars
    if left + right == 0:
        return None
    lines = raster.height - raster.vbi_lines
    share = Fraction(raster.width - left - right, raster.width) / Fraction(lines - top - bottom, lines)
    for known in (WIDE, NARROW):
        if _differ(known * share, shape) <= 0.03:
            return known
    return None


def _standard_definition(raster: Raster, sd_display_aspect: str) -> tuple[Fraction, str]:
    left, top, right, bottom = raster.bars
    across = 1 - (left + right) / raster.width
    down = 1 - (top + bottom) / (raster.height - raster.vbi_lines)
    if down == 1 and across < 1:
        if 0.70 <= across <= 0.80 or 0.29 <= across <= 0.34:
            return WIDE, f"SD raster, pillarbox of {across:.2f} of the width: a 16:9 raster"
        if 0.40 <= across <= 0.45:
            return NARROW, f"SD raster, pillarbox of {across:.2f} of the width: a 4:3 raster"
    if across == 1 and 0.70 <= down <= 0.80:
        return NARROW, f"SD raster, letterbox of {down:.2f} of the height: a 16:9 picture in a 4:3 raster"
    width, height = sd_display_aspect.split(":")
    return Fraction(int(width), int(height)), f"SD raster, decode.sd_display_aspect {sd_display_aspect}"


def _differ(a: Fraction, b: Fraction) -> float:
    """Relative difference of two shapes, the same in both orders."""
    return float(max(a, b) / min(a, b)) - 1
