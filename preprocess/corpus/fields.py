"""Single fields of an annotation, read from whatever JSON value is there: a value or None, and a defect's name.

A reader takes the JSON value and the set that collects defects. None and an empty string are absence, no defect.
"""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

from preprocess.corpus.timecode import (
    MAX_SECONDS,
    NTSC,
    is_skipped,
    label_rate,
    label_to_frame,
    parse_length,
    parse_timecode,
    snap_fps,
    split_label,
)
from preprocess.corpus.url import unsigned
from preprocess.rejection import Rejection, short

SIGNED_URL = "signed-url"
"""The defect of a URL that came with a signature, which is not kept: it would open the clip to who reads the plan."""
LOCAL = "file:"
"""Scheme of a record's URL that is a path relative to the corpus's root: moving the corpus changes no record."""
MAX_CLIP_ID_CHARACTERS = 500
MAX_URL_CHARACTERS = 4096
MAX_SIDE = 65_535
MIN_FPS = 0.001  # below, a rate is nothing that a timecode can be divided by
MAX_FPS = 1000.0
MAX_LABEL_CHARACTERS = 32
MAX_FIGURE_CHARACTERS = 64
"""A size, rate or length written longer than this is none."""
BEYOND_CLIP_SECONDS = 1.0
"""A caption that starts later than this after the declared end is not of this clip's time axis."""

_SIZE = re.compile(r"\s*([0-9]{1,5})\s*(?:[,xX×*:]|\s)\s*([0-9]{1,5})\s*(?:px)?\s*", re.ASCII)
_RATE = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{1,9})?)(?:\s*/\s*([0-9]{1,6}))?\s*(?:fps)?\s*", re.ASCII | re.IGNORECASE)
_USER = re.compile(r"(?:[^/?#]*//)?[^/?#]*@")
_KEYWORD_MARKS = re.compile(r"[,;#\n\r]+")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".jfif", ".jpe")
VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".mxf", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".m2ts", ".mts", ".m2t", ".ts", ".m4v",
    ".wmv", ".dv", ".flv", ".3gp", ".3g2", ".asf", ".f4v", ".mpe", ".ogv", ".qt", ".divx", ".m2p",
    ".ogm", ".tod", ".trp",
)  # fmt: skip
"""The most frequent first: the order in which a clip beside its JSON is looked for."""


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def read_section(parent: dict[str, Any], name: str, defects: set[str]) -> dict[str, Any]:
    value = parent.get(name)
    if isinstance(value, dict):
        return value
    defects.add(f"missing-{name}" if value is None else f"wrong-type-{name}")
    return {}


def read_text(value: Any, name: str, defects: set[str]) -> str | None:
    if isinstance(value, str):
        return value.strip() or None
    if value is not None:
        defects.add(f"wrong-type-{name}")
    return None


def read_clip_id(clip_id: Any, file_id: Any, source: str, defects: set[str]) -> str | Rejection:
    first = _id_text(clip_id, "clip_id", defects)
    second = first if file_id == clip_id else _id_text(file_id, "file_id", defects)
    if first and second and first != second:
        defects.add("id-conflict")
    chosen = first or second
    if chosen is None:
        name = PurePosixPath(source).name
        if not name.lower().endswith(".json") or len(name) == len(".json"):
            return Rejection("read", "no-clip-id", "neither clip_id nor file_id, and no file name to take it from")
        defects.add("id-from-file-name")
        chosen = name[: -len(".json")]
    if len(chosen) > MAX_CLIP_ID_CHARACTERS:
        return Rejection("read", "bad-clip-id", f"{len(chosen)} characters: {short(chosen, 60)}")
    return chosen


def _id_text(value: Any, name: str, defects: set[str]) -> str | None:
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        defects.add(f"wrong-type-{name}")
        return str(value)
    return read_text(value, name, defects)


def read_url(value: Any, defects: set[str]) -> str | None:
    """The clip's URL, with what of its query may name the clip. One with a user name or password is none.

    Fetching would refuse that, and a plan must keep neither it nor a signature: that one is taken off, as a defect.
    """
    url = read_text(value, "clip_proxy_url", defects)
    if url is None:
        return None
    if len(url) > MAX_URL_CHARACTERS or not url.isprintable() or _USER.match(url):
        defects.add("bad-url")
        return None
    if (kept := unsigned(url)) != url:
        defects.add(SIGNED_URL)
        return kept
    return url


def read_media_type(value: Any, url: str | None, defects: set[str]) -> str | None:
    name = (read_text(value, "media_type", defects) or "").lower()
    if name in ("video", "image"):
        return name
    defects.add("unknown-media-type" if name else "missing-media-type")
    suffix = PurePosixPath((url or "").split("?", 1)[0]).suffix.lower()
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None


def _number(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if -MAX_SECONDS < value < MAX_SECONDS and math.isfinite(value) else math.nan


def read_seconds(value: Any, defects: set[str]) -> float | None:
    """Declared length in seconds: a number, `HH:MM:SS.ss`, or a timecode."""
    if value is None or value == "":
        return None
    seconds = length_of(value) if isinstance(value, str) and len(value) <= MAX_FIGURE_CHARACTERS else _number(value)
    if seconds is None or not 0 < seconds < MAX_SECONDS:
        defects.add("bad-length")
        return None
    return seconds


@functools.lru_cache(maxsize=65_536)
def length_of(text: str) -> float | None:
    """Seconds of a length or a timecode; None for other text."""
    for parse in (parse_length, functools.partial(parse_timecode, fps=NTSC)):
        try:
            return parse(text)
        except ValueError:
            continue
    return None


def read_fps(value: Any, defects: set[str]) -> float | None:
    if value is None or value == "":
        return None
    fps = _rate_of(value) if isinstance(value, str) and len(value) <= MAX_FIGURE_CHARACTERS else _number(value)
    if fps is None or not MIN_FPS <= fps <= MAX_FPS:
        defects.add("bad-frame-rate")
        return None
    return fps


@functools.lru_cache(maxsize=4096)
def _rate_of(text: str) -> float | None:
    match = _RATE.fullmatch(text)
    if match is None or not float(match[2] or 1):
        return None
    return float(match[1]) / float(match[2] or 1)


def read_resolution(direct: Any, detailed: Any, defects: set[str]) -> tuple[int | None, int | None]:
    """Declared size from its two places; the first that reads well counts, and that they differ is a defect."""
    sizes = []
    for value in (direct, detailed):
        if value is None or value == "":
            continue
        is_text = isinstance(value, str) and len(value) <= MAX_FIGURE_CHARACTERS
        size = _size_of(value) if is_text else _size_of_parts(value)
        if size is None:
            defects.add("bad-resolution")
        else:
            sizes.append(size)
    if len(set(sizes)) > 1:
        defects.add("resolution-conflict")
    return sizes[0] if sizes else (None, None)


@functools.lru_cache(maxsize=4096)
def _size_of(text: str) -> tuple[int, int] | None:
    match = _SIZE.fullmatch(text)
    return _checked_size(int(match[1]), int(match[2])) if match else None


def _size_of_parts(value: Any) -> tuple[int, int] | None:
    if isinstance(value, dict):
        value = [value.get("width"), value.get("height")]
    if not isinstance(value, list) or len(value) != 2 or any(type(part) is not int for part in value):
        return None
    return _checked_size(value[0], value[1])


def _checked_size(width: int, height: int) -> tuple[int, int] | None:
    return (width, height) if 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE else None


def read_keywords(value: Any, defects: set[str]) -> tuple[str, ...]:
    if isinstance(value, list):
        words = [word for word in value if isinstance(word, str)]
        if len(words) != len(value):
            defects.add("wrong-type-keyword")
    else:
        words = _KEYWORD_MARKS.split(read_text(value, "keyword", defects) or "")
    return tuple(word for each in words if (word := each.strip()))


def read_captions(
    items: Any, text_name: str, fps: float | None, seconds: float | None, defects: set[str]
) -> tuple[dict[str, Any], ...]:
    """Captions of one level. One whose timecodes cannot be read is left out: it might describe another scene."""
    if items is None or items == "":
        return ()
    if not isinstance(items, list):
        defects.add("wrong-type-captions")
        return ()
    captions: list[dict[str, Any]] = []
    for item in items:
        if not isinstance(item, dict):
            defects.add("wrong-type-captions")
            item = {text_name: item}  # noqa: PLW2901 - a bare text is read as what it must have been
        text = item.get(text_name)
        text = text.strip() if isinstance(text, str) else read_text(text, "captions", defects)
        if not text:
            continue
        start, end = item.get("tc_in"), item.get("tc_out")
        if not start and not end:
            captions.append({"text": text})
        elif (span := _span(start, end, fps, seconds, defects)) is not None:
            captions.append({"text": text, "start_seconds": span[0], "end_seconds": span[1]})
    return tuple(captions)


def _span(
    start: Any, end: Any, fps: float | None, seconds: float | None, defects: set[str]
) -> tuple[float | None, float | None] | None:
    first, first_defect = _mark(start, fps) if isinstance(start, str) else _no_mark(start)
    last, last_defect = _mark(end, fps) if isinstance(end, str) else _no_mark(end)
    if first_defect or last_defect:
        defects |= {defect for defect in (first_defect, last_defect) if defect}
        if "bad-timecode" in (first_defect, last_defect):
            return None
    if first is not None:
        if last is not None and last < first:
            defects.add("reversed-timecode")
            return None
        if seconds is not None and first > seconds + BEYOND_CLIP_SECONDS:
            defects.add("timecode-beyond-clip")
    return first, last


def _no_mark(value: Any) -> tuple[None, str | None]:
    return None, "bad-timecode" if value else None


@functools.lru_cache(maxsize=65_536)
def _mark(text: str, fps: float | None) -> tuple[float | None, str | None]:
    """(seconds, defect) of one end of a span; (None, None) for an empty one. Kept, because labels repeat."""
    if not text.strip():
        return None, None
    if len(text) > MAX_LABEL_CHARACTERS:
        return None, "bad-timecode"
    try:
        label = split_label(text)
        rate = label_rate(label, snap_fps(fps) if fps else NTSC)
        seconds = float(Fraction(label_to_frame(label, rate)) / rate)
    except ValueError:
        return None, "bad-timecode"
    return seconds, "skipped-timecode" if is_skipped(label, rate) else None
