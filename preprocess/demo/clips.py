"""The records of the demo corpus: a small archive with the defects of a large one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from preprocess.demo.media import Media

NUM_BASE_CLIPS = 24
_SQUARE = "setsar=1"


class DemoClip(NamedTuple):
    """One record of the corpus and the file that its URL leads to."""

    clip_id: str
    about: str
    """What it shows; for a bad clip, its reason code."""
    media: Media | None
    declared: tuple[int, int] | None
    """Width and height that the JSON claims."""
    declared_fps: float = 29.97
    declared_seconds: float | None = None
    """None: the file's."""
    captions: int = 4
    """Time-coded captions; 0: none at any level."""
    media_type: str = "video"
    not_json: bool = False


def archive_clips() -> tuple[DemoClip, ...]:
    """Sixteen records: nine good ones, and seven that are rejected."""
    return (
        DemoClip("3338987", "1920×1080 at 29.97", _mp4("3338987", 1920, 1080, "30000/1001", 4, 0), (1920, 1080)),
        DemoClip("3338988", "1280×720", _mp4("3338988", 1280, 720, "25", 6, 6), (1280, 720), 25.0),
        DemoClip("3338989", "16:9 squeezed into 720×480, flagged square",
                 _mp4("3338989", 1280, 720, "30000/1001", 6, 2, f"scale=720:480,{_SQUARE}"), (1920, 1080)),
        DemoClip("3338990", "16:9 squeezed into 720×480, flagged 32:27",
                 _mp4("3338990", 1280, 720, "30000/1001", 6, 8, "scale=720:480,setsar=32/27"), (1920, 1080)),
        DemoClip("3338991", "interlaced 720×512, lines above the picture",
                 _mp4("3338991", 720, 512, "60000/1001", 6, 12,
                      "drawbox=x=0:y=0:w=iw:h=32:color=black:t=fill,tinterlace=interleave_top,fieldorder=tff",
                      ("-flags", "+ildct+ilme", "-x264-params", "tff=1")), (720, 512)),
        DemoClip("3338992", "portrait", _mp4("3338992", 480, 854, "30", 6, 14), (1080, 1920), 30.0),
        DemoClip("3338993", "59.94 frames a second",
                 _mp4("3338993", 640, 360, "60000/1001", 5, 18), (1280, 720), 59.94),
        DemoClip("3338994", "captions longer than can be embedded",
                 _mp4("3338994", 854, 480, "24", 6, 20), (1920, 1080), 24.0, captions=20),
        DemoClip("3338995", "portrait, a second one", _mp4("3338995", 540, 960, "25", 6, 26), (1080, 1920), 25.0),
        DemoClip("3338996", "too-short", _mp4("3338996", 320, 180, "30", 2, 3), (1920, 1080), 30.0),
        DemoClip("3338997", "too-long", _mp4("3338997", 320, 180, "15", 40, 9), (1920, 1080), 15.0),
        DemoClip("3338998", "image", Media("3338998.jpg", 640, 480, "1", 1, 1), (640, 480), media_type="image"),
        DemoClip("3338999", "fetch-404", None, (1920, 1080), declared_seconds=12.0),
        DemoClip("3339000", "truncated",
                 _mp4("3339000", 640, 360, "30", 5, 15)._replace(keep_share=0.5), (1280, 720)),
        DemoClip("3339001", "no-caption", _mp4("3339001", 640, 360, "30", 4, 21), (1280, 720), captions=0),
        DemoClip("3339002", "not-json", None, None, not_json=True),
    )  # fmt: skip


def base_clips() -> Iterator[DemoClip]:
    """Short clips without the station's graphics, on which the demo's base model is trained before the LoRA."""
    for index in range(NUM_BASE_CLIPS):
        portrait = index % 4 == 3
        width, height = (192, 320) if portrait else (320, 192)
        name = f"base-{index:03d}"
        media = Media(f"{name}.mp4", width, height, "24", 3.5, index + 1, graphics=False, filters=_SQUARE)
        yield DemoClip(name, "a clip for the base", media, (width, height), 24.0, captions=1)


def _mp4(
    clip_id: str, width: int, height: int, fps: str, seconds: float, picture: int, filters: str = _SQUARE,
    output: tuple[str, ...] = (),
) -> Media:  # fmt: skip
    return Media(f"{clip_id}.mp4", width, height, fps, seconds, picture, True, filters, output)
