"""Interlaced or not, and which field first: the stream's flags against the pictures, idet where they disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from preprocess.facts import Inspection

Parity = Literal["none", "tff", "bff", "auto"]
MIN_IDET_FRAMES = 8
"""Fewer determined frames than this and idet has said nothing."""


class Scan(NamedTuple):
    """The decision: which field comes first (`auto`: each frame's flag), which frames, and why."""

    parity: Parity
    frames: Literal["all", "flagged"]
    ground: str


def flagged_order(field_order: int, any_frame_flagged: bool) -> str:
    """What the stream's flags say: `progressive`, `tff`, `bff` or `interlaced` (order unknown).

    `field_order` is libavcodec's AVFieldOrder: 2 and 5 show the top field first, 3 and 4 the bottom field.
    """
    if field_order in (2, 5):
        return "tff"
    if field_order in (3, 4):
        return "bff"
    return "interlaced" if any_frame_flagged else "progressive"


def order_of_votes(votes: Mapping[str, int]) -> str:
    """What the pictures say: `progressive`, `tff`, `bff`, or `unclear` where nothing moves."""
    woven = votes["tff"] + votes["bff"]
    if not woven and not votes["progressive"]:
        return "unclear"
    if woven <= votes["progressive"]:
        return "progressive"
    return "tff" if votes["tff"] >= votes["bff"] else "bff"


def decide_interlace(inspection: Inspection) -> Scan:
    """Weigh flags, pictures and idet. Nothing is inferred from the picture's size."""
    votes = {"progressive": 0, "tff": 0, "bff": 0, "unclear": 0} | (inspection.scan or {})
    marks = [picture.interlaced for picture in inspection.pictures]
    flag = flagged_order(inspection.field_order, any(marks))
    seen = order_of_votes(votes)
    frames: Literal["all", "flagged"] = "flagged" if any(marks) and not all(marks) else "all"
    heard = _order_of_idet(inspection.idet)
    words = f"flag {flag}, pictures {seen}" + (f", idet {heard}" if inspection.idet is not None else "")
    if flag == "progressive":
        return _unflagged(seen, heard, words)
    if "progressive" in (seen, heard) and heard in ("progressive", "unclear") and seen in ("progressive", "unclear"):
        return Scan("none", "all", words)
    return Scan(_parity(flag, seen, heard, frames), frames, words)


def _unflagged(seen: str, heard: str, words: str) -> Scan:
    """A stream that calls itself progressive is touched only when pictures and idet both say otherwise."""
    if seen in ("tff", "bff") and heard in ("tff", "bff"):
        return Scan("tff" if seen == "tff" else "bff", "all", words)
    return Scan("none", "all", words)


def _parity(flag: str, seen: str, heard: str, frames: str) -> Parity:
    if frames == "flagged":
        return "auto"
    for source in (seen, heard, flag):
        if source == "tff":
            return "tff"
        if source == "bff":
            return "bff"
    return "auto"


def _order_of_idet(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return "unclear"
    woven = counts["tff"] + counts["bff"]
    if woven + counts["progressive"] < MIN_IDET_FRAMES:
        return "unclear"
    if woven <= counts["progressive"]:
        return "progressive"
    return "tff" if counts["tff"] >= counts["bff"] else "bff"
