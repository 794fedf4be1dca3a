"""What is known about one clip: the fields of its file, the measurements of its frames, and the decisions made."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import JsonValue

from shards.config import Config


class Crop(Config):
    """A rectangle of the coded picture, in coded pixels."""

    x: int
    y: int
    width: int
    height: int


class MeasuredPicture(Config):
    """Measurements of one decoded picture; see `video/measure.py`."""

    seconds: float
    """Time from the clip's zero."""
    width: int
    height: int
    interlaced: bool
    """The stream flags this frame as interlaced."""
    mean: float
    """Mean luma, 0–255."""


class Inspection(Config):
    """What the inspector (a process of its own) read from a file. Times are in seconds."""

    problem: str | None = None
    """Reason code when the file cannot be used."""
    detail: str = ""
    format: str = ""
    codec: str = ""
    pixel_format: str = ""
    stream: int = 0
    """Index of the video stream."""
    stream_ground: str = "the only video stream"
    width: int = 0
    height: int = 0
    sample_aspect: tuple[int, int] | None = None
    """Flagged sample aspect ratio; None: not flagged."""
    display_matrix: tuple[float, float, float, float] | None = None
    """a, b, c, d of the display matrix, when there is one."""
    field_order: int = 0
    """libavcodec's AVFieldOrder: 0 unknown, 1 progressive, 2 and 4 top first, 3 and 5 bottom first."""
    matrix: int = 2
    """ISO 23091 matrix coefficients; 2: not flagged."""
    range: int = 0
    """0 not flagged, 1 limited, 2 full."""
    primaries: int = 2
    """ISO 23091 colour primaries; 2: not flagged."""
    transfer: int = 2
    """ISO 23091 transfer characteristics; 2: not flagged."""
    num_frames: int = 0
    """Frames shown, counted from the packets."""
    zero_seconds: float = 0.0
    """The clip's zero on the file's own clock: where its earliest stream starts. All other times count from here."""
    start_seconds: float = 0.0
    """Time of the first frame that decodes: a clip cut at an open group of pictures begins with some that do not."""
    end_seconds: float = 0.0
    """End of the last frame."""
    period_seconds: float = 0.0
    """Median distance of frames."""
    max_gap_seconds: float = 0.0
    """Largest distance of two frames."""
    is_constant_rate: bool = True
    key_seconds: tuple[float, ...] = ()
    """Times of key frames where decoding can start, half a second or more apart."""
    picture_seconds: tuple[float, ...] = ()
    """Times of all frames shown, in order."""
    corrupt_seconds: tuple[float, ...] = ()
    """Times of packets that the container itself reports as corrupt."""
    truncated: str | None = None
    """Why the file is thought to be cut, if it is."""
    is_still: bool = False
    """A picture file."""
    pictures: tuple[MeasuredPicture, ...] = ()
    """Not recorded with a rejection."""
    vbi_lines: int = 0
    """Lines above the picture that carry data or nothing."""
    vbi_ground: str = "pictures"
    lines_below: int = 0
    """Blank lines below the picture, where none are above it."""
    bars: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Black left, top, right, bottom of the raster below the VBI lines, in coded pixels."""
    scan: dict[str, int] | None = None
    """How many pairs of frames look `progressive`, `tff`, `bff`, `unclear`; see `fields_of` there."""
    idet: dict[str, int] | None = None
    """Counts of the idet filter: tff, bff, progressive, undetermined; None: not run."""


class ClipFacts(Config):
    """What window, bucket and decode need of one clip; JSON-able."""

    media: Literal["video", "image"]
    format: str
    codec: str
    pixel_format: str
    stream: int
    width: int
    """Coded width, pixels."""
    height: int
    """Coded height, pixels."""
    raster: Crop
    """Coded picture without the VBI lines."""
    active: Crop
    """Coded picture without VBI lines and black bars: what is trained on."""
    display_width: float
    """Width of the active picture as shown (after rotation), in pixels of its shown height."""
    display_height: float
    rotation: Literal[0, 90, 180, 270]
    """Degrees clockwise that the picture must be turned to be shown."""
    mirrored: bool
    """Flipped left to right before it is turned."""
    deinterlace: Literal["none", "tff", "bff", "auto"]
    """Field order that the deinterlacer assumes; `auto`: each frame's own flag."""
    deinterlace_frames: Literal["all", "flagged"]
    matrix: Literal["bt601", "bt709", "fcc", "smpte240m", "bt2020", "rgb"]
    range: Literal["limited", "full"]
    fps: float
    is_constant_rate: bool
    zero_seconds: float
    """The clip's zero on the file's own clock; other times count from it."""
    start_seconds: float
    """Time of the first frame from the clip's zero (0 but for oddly muxed files)."""
    end_seconds: float
    """End of the last frame from the clip's zero."""
    duration_seconds: float
    max_gap_seconds: float
    num_frames: int
    key_seconds: tuple[float, ...] = ()
    """Times of key frames where decoding can start, half a second or more apart."""
    picture_seconds: tuple[float, ...] = ()
    """Times of all frames shown, in order; what a window needs is looked up here. Not recorded with the sample."""
    corrupt_seconds: tuple[float, ...] = ()
    """Times of packets that the container itself reports as corrupt."""
    cuts: tuple[float, ...] = ()
    """Times of shot changes; looked for only where the config asks."""
    decisions: dict[str, JsonValue]
    """One entry a decision: its value and its ground; and how the file differs from its annotation."""


def recorded_facts(facts: ClipFacts | Inspection) -> dict[str, JsonValue]:
    """What the ledger keeps of a rejected clip: no list that grows with the clip."""
    lists = {"picture_seconds", "key_seconds", "corrupt_seconds", "cuts", "pictures", "problem", "detail"}
    dumped = json.dumps(facts.model_dump(mode="json", exclude=lists, exclude_defaults=True))
    recorded: dict[str, JsonValue] = json.loads(dumped, parse_constant=lambda name: None)  # a figure that is no number
    return recorded
