"""Which of the configured picture sizes a clip is encoded at."""

from __future__ import annotations

import math

from preprocess.config import BucketsConfig, PictureSize
from preprocess.facts import ClipFacts
from preprocess.rejection import Rejection


def choose_bucket(facts: ClipFacts, config: BucketsConfig) -> PictureSize | Rejection:
    """The size of nearest shape among those that need no more enlargement than `max_upscale`; the larger of equals.

    A Rejection (stage `bucket`): `too-small` where none is left, `cropped-too-much` where it keeps too little.
    """
    return choose_size(facts.display_width, facts.display_height, config)


def choose_size(display_width: float, display_height: float, config: BucketsConfig) -> PictureSize | Rejection:
    """`choose_bucket` for a displayed size in pixels, as the plan estimates it from declared sizes."""
    fitting = [
        size for size in config.sizes if upscale(display_width, display_height, size) <= config.max_upscale + 1e-6
    ]
    if fitting:
        shape = display_width / display_height
        size = min(fitting, key=lambda size: (_shape_distance(shape, size), -size.width * size.height))
        kept = kept_share(display_width, display_height, size)
        if kept >= config.min_kept_share:
            return size
        detail = (
            f"shows as {display_width:.0f}×{display_height:.0f}; {size.width}×{size.height} would keep {kept:.3f} of "
            f"it, less than min_kept_share {config.min_kept_share:g}"
        )
        return Rejection("bucket", "cropped-too-much", detail, False)
    least = min(config.sizes, key=lambda size: upscale(display_width, display_height, size))
    needed = upscale(display_width, display_height, least)
    detail = (
        f"shows as {display_width:.0f}×{display_height:.0f}; {least.width}×{least.height} would enlarge it "
        f"{needed:.3f} ×, more than max_upscale {config.max_upscale:g}"
    )
    return Rejection("bucket", "too-small", detail, False)


def upscale(display_width: float, display_height: float, size: PictureSize) -> float:
    """Enlargement of a displayed picture that covers `size`; under 1 it is made smaller."""
    return max(size.width / display_width, size.height / display_height)


def kept_share(display_width: float, display_height: float, size: PictureSize) -> float:
    """Share of a displayed picture that is left of it when it covers `size` and the centre is cut out."""
    shape, other = display_width / display_height, size.width / size.height
    return min(shape / other, other / shape)


def _shape_distance(shape: float, size: PictureSize) -> float:
    return round(abs(math.log(shape * size.height / size.width)), 9)
