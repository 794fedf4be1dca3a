"""From a window of a clip to frames: T×H×W×3, uint8, RGB, the bucket's size.

The order of the filters matters: VBI lines off, fields apart, black bars off, turned, resampled in time, resized over
the bucket with Lanczos, cut at the centre. T frames, H rows and W columns of the bucket.
"""

from __future__ import annotations

import io
import math
import re
import signal
from bisect import bisect_left
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import UInt8

from preprocess.config import FROZEN, DecodeConfig, PictureSize, PrepConfig
from preprocess.facts import ClipFacts
from preprocess.rejection import ClipRejected, Rejection
from preprocess.video.ffmpeg import Result, complaints, file_url, first_line, run_ffmpeg
from preprocess.video.inspection import complaints_within
from preprocess.video.lost import hole_in, is_bearable, lost_pictures, step_back
from preprocess.video.window import Window

TRANSFORM_VERSION = 2
"""Raised whenever a change here changes a pixel of any clip: it is part of the dataset's identity."""
SCALE_FLAGS = "lanczos+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
TICKS_PER_SECOND = 23_040_000
"""A multiple of 1000, 12288, 12800, 15360, 24000, 30000, 60000 and 90000: of the time bases that files have."""
SEEKABLE_FORMATS = {"mov", "matroska", "avi", "mxf", "mpegts"}
"""Containers in which a seek lands where it should. In an MPEG program stream the timestamps after it are wrong."""
PRINTED = re.compile(
    r"^((?:\[[^]\n]{1,99}\] )*)(?:frame:\d+ +pts:(-?\d+|NOPTS) +pts_time:\S+ *|picture=1)\n", re.MULTILINE
)
"""What the `metadata` filter prints of each decoded picture: two lines, each behind what the log has of a line."""
MAX_LIST_BYTES = 16 << 20
"""Of the list of shot changes."""
SEEK_FRAMES = 4
"""Frames decoded before a window: the deinterlacer looks back, and the first frame may lie before the window."""


def decode_window(
    path: Path, facts: ClipFacts, window: Window, bucket: PictureSize, config: PrepConfig
) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of `window`, exactly `window.num_frames` of them, or ClipRejected (stage `decode`).

    Frame k is the clip's picture at start + k / fps by the `fps` filter's rule: the last whose timestamp rounds to k or
    less. Decoding starts near the window and stops after it. Not the exit code decides but that every picture which the
    window shows was decoded (the filter would fill a gap with copies) and, under the strict policy, that the decoder
    reported nothing of the pictures that these are made of. Of others it may: see docs/decisions/103.
    """
    needed = needed_pictures(facts, window, config.window.fps)
    if needed and needed[0] > window.start_seconds + 1 / config.window.fps:
        _reject("missing-frames", f"the first picture that decodes is at {needed[0]:.3f} s")
    if config.decode.policy == "strict":
        _refuse_corrupt(facts, needed)
    seek = _seek_seconds(facts, window, needed)
    result, decoded = _run(path, facts, window, bucket, config, seek)
    lost = lost_pictures(decoded, facts, needed)
    if seek is not None and lost:
        # A seek may end behind the key frame that was asked for, and an MPEG-TS has no index to know better.
        result, decoded = _run(path, facts, window, bucket, config, None)
        lost = lost_pictures(decoded, facts, needed)
    _refuse_new_size(result, facts)
    frames = _frames_of(result, window, bucket, config)
    complaint = next(iter(complaints(result.stderr)), "")
    if lost and not (config.decode.policy == "tolerant" and is_bearable(lost, needed, window)):
        reason = "decode-errors" if complaint and config.decode.policy == "strict" else "missing-frames"
        detail = f"{len(lost)} of {len(needed)} pictures were not decoded; {complaint or 'nothing reported'}"
        _reject(reason, detail)
    if back := step_back(decoded, facts, needed):
        _reject("odd-timestamps", f"the picture at {back[1]:.3f} s comes after the one at {back[0]:.3f} s")
    if config.decode.policy == "strict":
        _refuse_complaints(result, path, facts, needed, config)
    elif hole := hole_in(facts, needed, is_damaged=bool(complaint)):
        _reject("missing-frames", f"no picture from {hole[0]:.3f} to {hole[1]:.3f} s; {complaint or 'marked corrupt'}")
    return frames


def needed_pictures(facts: ClipFacts, window: Window, fps: int) -> tuple[float, ...]:
    """Times of the clip's pictures from the first to the last that the window shows; none of a still."""
    if facts.media == "image":
        return ()
    half = 0.5 / fps
    first = bisect_left(facts.picture_seconds, window.start_seconds + half) - 1
    last = bisect_left(facts.picture_seconds, window.start_seconds + (window.num_frames - 1) / fps + half)
    return facts.picture_seconds[max(0, first) : last]


def _refuse_corrupt(facts: ClipFacts, needed: tuple[float, ...]) -> None:
    """What the container marks as corrupt must not be among what the window's pictures are made of."""
    if not needed:
        return
    key = next((time for time in reversed(facts.key_seconds) if time <= needed[0] + 0.001), 0.0)
    for time in facts.corrupt_seconds:
        if key <= time <= needed[-1]:
            _reject("decode-errors", f"the packet at {time:.3f} s is marked corrupt")


def _refuse_complaints(
    result: Result, path: Path, facts: ClipFacts, needed: tuple[float, ...], config: PrepConfig
) -> None:
    """Refuse a window where the decoder complained of what it is made of; of what lies beside it it may complain.

    The log alone cannot tell: entering an open group of pictures makes libavcodec complain of references that it has
    not seen, and it decodes ahead. So another decoding, packet by packet, says what each complaint is of.
    """
    reported = complaints(result.stderr)
    if not reported:
        return
    if not needed:
        _reject("decode-errors", reported[0])
    zero = facts.zero_seconds
    within = complaints_within(path, config, zero + needed[0], zero + needed[-1])
    if within is None or within:
        _reject("decode-errors", within[0] if within else reported[0])


def _run(
    path: Path, facts: ClipFacts, window: Window, bucket: PictureSize, config: PrepConfig, seek: float | None
) -> tuple[Result, list[float]]:
    limits = config.decode
    result = run_ffmpeg(
        window_arguments(path, facts, window, bucket, config, seek),
        timeout_seconds=limits.timeout_seconds,
        max_stdout_bytes=window.num_frames * bucket.width * bucket.height * 3,
        max_alloc_mib=limits.max_memory_mib,
        max_cpu_seconds=math.ceil(4 * limits.timeout_seconds * limits.threads),  # never before the deadline
    )
    seconds, log = split_log(result.stderr)
    # What is reported becomes a ledger row, whose bytes must not depend on where the clip lay.
    return result._replace(stderr=log.replace(file_url(path), "file")), seconds


def split_log(stderr: str) -> tuple[list[float], str]:
    """Times of the decoded pictures, in seconds and as they came, and the log without what `metadata` printed of them.

    The filter prints from a thread of its own, and libav's log writes the parts of a line (context, level, message) one
    after the other. So what is printed may stand between two parts; without it the line is complete again.
    """
    ticks = [int(match[2]) for match in PRINTED.finditer(stderr) if match[2] not in (None, "NOPTS")]
    return [each / TICKS_PER_SECOND for each in ticks], PRINTED.sub(r"\1", stderr)


def _refuse_new_size(result: Result, facts: ClipFacts) -> None:
    """When the size changes ffmpeg rebuilds its filters, and would crop and stretch the new picture in silence."""
    for line in re.findall(r"econfiguring filter graph because .*", result.stderr):
        size = re.search(r"\b(\d+)x(\d+)\b", line)
        if size is not None and size[0] != f"{facts.width}x{facts.height}":
            _reject("size-changes", f"{facts.width}×{facts.height}, then {size[1]}×{size[2]}")


def _frames_of(result: Result, window: Window, bucket: PictureSize, config: PrepConfig) -> UInt8[np.ndarray, "T H W 3"]:
    """The frames of a run, or the reason why they cannot be used."""
    if result.timed_out:
        _reject("decode-timeout", f"not done within {config.decode.timeout_seconds:g} s", retryable=True)
    if result.overflowed:
        _reject("decode-overflow", f"more than {window.num_frames} frames of {bucket.width}×{bucket.height}")
    if result.returncode < 0:
        _reject("decoder-crashed", f"ffmpeg ended by {signal.Signals(-result.returncode).name}")
    complaint = next(iter(complaints(result.stderr)), "")
    if result.returncode and config.decode.policy == "strict":
        _reject("decode-errors", complaint or f"exit code {result.returncode}: {first_line(result.stderr)}")
    num_frames, rest = divmod(len(result.stdout), 3 * bucket.width * bucket.height)
    if num_frames < window.num_frames or rest:
        _reject("missing-frames", f"{num_frames} of {window.num_frames} frames came; {complaint or 'nothing reported'}")
    frames = np.frombuffer(result.stdout, np.uint8)
    return frames.reshape(window.num_frames, bucket.height, bucket.width, 3)


def window_arguments(
    path: Path, facts: ClipFacts, window: Window, bucket: PictureSize, config: PrepConfig, seek_seconds: float | None
) -> list[str]:
    """ffmpeg's arguments for `decode_window`, without the program and its global limits.

    `seek_seconds`: time of the key frame to start at, on the file's own clock; None: the clip's start.
    """
    import ffmpeg

    picture = open_input(path, facts, config.decode, seek_seconds=seek_seconds)
    if facts.media == "video":
        picture = _skip(picture, facts, window, needed_pictures(facts, window, config.window.fps))
        picture = _deinterlace(_crop_vbi(picture, facts), facts)
        picture = _resample(picture, facts, window, config.window.fps)
    picture = _fit(_turn(_crop_active(picture, facts), facts), facts, bucket)
    options = {"format": "rawvideo", "pix_fmt": "rgb24", "frames:v": window.num_frames}
    arguments: list[str] = ffmpeg.output(picture, "pipe:1", **options).get_args()
    return ["-loglevel", "level+info", "-copyts", "-filter_threads", str(config.decode.threads), *arguments]


def open_input(path: Path, facts: ClipFacts, config: DecodeConfig, *, seek_seconds: float | None = None) -> Any:
    """ffmpeg-python's stream of the clip's video, with every limit on what opening it may do."""
    import ffmpeg

    options: dict[str, Any] = {
        "protocol_whitelist": "file",
        "format_whitelist": facts.format,
        "max_pixels": int(config.max_megapixels * 1_000_000),
        "threads": config.threads,
        "noautorotate": None,
        "an": None,
        "sn": None,
        "dn": None,
    }
    if seek_seconds is not None:
        options |= {"ss": f"{math.ceil(seek_seconds * 1000) / 1000:.3f}", "noaccurate_seek": None, "seek_timestamp": 1}
    return ffmpeg.input(file_url(path), **options)[str(facts.stream)]


def _seek_seconds(facts: ClipFacts, window: Window, needed: tuple[float, ...]) -> float | None:
    """The last key frame from which everything that the window needs can be decoded; None: the clip's start.

    A key frame's own time is asked for: demuxers without an index (MPEG-TS) go to a place near a time, and the decoder
    then waits for the next key frame, which may lie within the window.
    """
    if facts.format.split(",")[0] not in SEEKABLE_FORMATS:
        return None
    keys = [time for time in facts.key_seconds[1:] if time <= _first_needed(facts, window, needed)]
    return facts.zero_seconds + keys[-1] if keys else None


def _first_needed(facts: ClipFacts, window: Window, needed: tuple[float, ...]) -> float:
    """Time before which no frame matters: what is shown at the window's start may have begun a gap earlier."""
    first = needed[0] if needed else window.start_seconds - facts.max_gap_seconds
    return min(first, window.start_seconds) - SEEK_FRAMES / facts.fps


def _skip(picture: Any, facts: ClipFacts, window: Window, needed: tuple[float, ...]) -> Any:
    """Drop what is decoded only for reference, before any filter works on it; list the times of the rest on stderr."""
    first = facts.zero_seconds + _first_needed(facts, window, needed)
    picture = picture.filter("trim", start=f"{first:.3f}").filter("settb", f"1/{TICKS_PER_SECOND}")
    return picture.filter("metadata", mode="add", key="picture", value=1).filter(
        "metadata", mode="print", key="picture", file="pipe:2", direct=1
    )


def _crop_vbi(picture: Any, facts: ClipFacts) -> Any:
    raster = facts.raster
    if raster.height == facts.height:
        return picture
    return picture.filter("crop", raster.width, raster.height, raster.x, raster.y, exact=1)


def _deinterlace(picture: Any, facts: ClipFacts) -> Any:
    """One frame a field: 59.94 fields a second become 59.94 frames, and the resampling chooses among them."""
    if facts.deinterlace == "none":
        return picture
    frames = "all" if facts.deinterlace_frames == "all" else "interlaced"
    return picture.filter("bwdif", mode="send_field", parity=facts.deinterlace, deint=frames)


def _resample(picture: Any, facts: ClipFacts, window: Window, fps: int) -> Any:
    """Time zero at the window's start, in ticks so fine that no common time base is rounded.

    `-copyts` keeps the file's own timestamps until here: where ffmpeg shifts them it rounds to the stream's time base,
    which in AVI is a whole frame.
    """
    start = round(facts.zero_seconds * 1_000_000) * TICKS_PER_SECOND // 1_000_000
    start += round(window.start_seconds * 1000) * TICKS_PER_SECOND // 1000
    picture = picture.filter("settb", f"1/{TICKS_PER_SECOND}").filter("setpts", f"PTS-{start}")
    return picture.filter("fps", fps=fps, start_time=0, round="near")


def _crop_active(picture: Any, facts: ClipFacts) -> Any:
    active, raster = facts.active, facts.raster
    if active == raster:
        return picture
    return picture.filter("crop", active.width, active.height, active.x - raster.x, active.y - raster.y, exact=1)


def _turn(picture: Any, facts: ClipFacts) -> Any:
    if facts.mirrored:
        picture = picture.filter("hflip")
    if facts.rotation == 90:
        return picture.filter("transpose", "clock")
    if facts.rotation == 270:
        return picture.filter("transpose", "cclock")
    return picture.filter("hflip").filter("vflip") if facts.rotation == 180 else picture


def _fit(picture: Any, facts: ClipFacts, bucket: PictureSize) -> Any:
    """Cover the bucket, Lanczos, then cut the centre out: what the model's own image-to-video pre-processing does."""
    width, height = cover_size(facts.display_width, facts.display_height, bucket)
    color: dict[str, Any] = {"flags": SCALE_FLAGS, "out_range": "full"}
    if facts.matrix != "rgb":
        color |= {"in_color_matrix": facts.matrix, "in_range": facts.range}
    picture = picture.filter("scale", width, height, **color).filter("format", "rgb24")
    x, y = (width - bucket.width) // 2, (height - bucket.height) // 2
    return picture.filter("crop", bucket.width, bucket.height, x, y, exact=1).filter("setsar", 1)


def cover_size(display_width: float, display_height: float, bucket: PictureSize) -> tuple[int, int]:
    """Width and height, in pixels, of the displayed picture when it just covers the bucket."""
    scale = max(bucket.width / display_width, bucket.height / display_height)
    return max(bucket.width, round(display_width * scale)), max(bucket.height, round(display_height * scale))


def transform_identity(config: PrepConfig) -> dict[str, Any]:
    """What of probing, windows and decoding decides a sample's numbers; datasets that differ in it do not mix."""
    return {
        "version": TRANSFORM_VERSION,
        "scale": SCALE_FLAGS,
        "resample": "fps filter, round=near",
        "deinterlace": "bwdif send_field",
        # No key at its default, and no threshold or length at all: those are frozen with a plan's generation.
        "window": config.window.model_dump(mode="json", exclude_defaults=True, exclude=set(FROZEN["window"])),
        "window_seed": config.seed if config.window.policy == "random" else None,
        "buckets": {"sizes": [size.model_dump() for size in config.buckets.sizes]}
        | config.buckets.model_dump(mode="json", exclude_defaults=True, exclude={"sizes", *FROZEN["buckets"]}),
        "policy": config.decode.policy,
        "sd_display_aspect": config.decode.sd_display_aspect,
    }


def _reject(reason: str, detail: str, retryable: bool = False) -> NoReturn:
    raise ClipRejected(Rejection("decode", reason, detail[:300], retryable))


# Shot changes of a clip, by ffmpeg's scene score. All of the clip is decoded for it, so only on request.


def find_cuts(path: Path, facts: ClipFacts, config: PrepConfig) -> tuple[float, ...]:
    """Times, in seconds from the clip's zero, of the first frame of each new shot. Raises ClipRejected."""
    import ffmpeg

    threshold = config.window.max_scene_score
    picture = open_input(path, facts, config.decode)
    if facts.deinterlace != "none":
        picture = picture.filter("bwdif", mode="send_frame", parity=facts.deinterlace)
    picture = picture.filter("select", f"gt(scene,{threshold})").filter("metadata", mode="print", file="pipe:1")
    arguments = ffmpeg.output(picture, "pipe:2", format="null").get_args()
    result = run_ffmpeg(
        ["-loglevel", "error", *arguments],
        timeout_seconds=config.decode.timeout_seconds,
        max_stdout_bytes=MAX_LIST_BYTES,
        max_alloc_mib=config.decode.max_memory_mib,
    )
    if result.timed_out:
        detail = f"shot changes not found within {config.decode.timeout_seconds:g} s"
        raise ClipRejected(Rejection("window", "decode-timeout", detail, True))
    # What the decoder complains about costs the windows that it concerns, when they are decoded; not the clip.
    if result.overflowed or result.returncode:
        complaint = first_line(result.stderr.replace(file_url(path), "file"))
        raise ClipRejected(Rejection("window", "decode-errors", complaint or "too many shot changes", False))
    return tuple(float(time) for time in re.findall(rb"pts_time:(-?[0-9.]+)", bytes(result.stdout)))


# A strip of a few small frames of a sample, for eyes.

STRIP_HEIGHT = 128


def preview_strip(frames: UInt8[np.ndarray, "T H W 3"], num: int) -> bytes:
    """`num` evenly spaced frames side by side, 128 pixels high, as a JPEG. The same frames give the same bytes."""
    from PIL import Image

    num_frames, height, width, _ = frames.shape
    num = min(num, num_frames)
    small_width = max(1, round(width * STRIP_HEIGHT / height))
    strip = Image.new("RGB", (num * small_width, STRIP_HEIGHT))
    for place in range(num):
        frame = frames[round(place * (num_frames - 1) / max(1, num - 1))]
        small = Image.fromarray(np.ascontiguousarray(frame)).resize((small_width, STRIP_HEIGHT), Image.Resampling.BOX)
        strip.paste(small, (place * small_width, 0))
    with io.BytesIO() as file:
        strip.save(file, "JPEG", quality=80, subsampling="4:2:0", optimize=False)
        return file.getvalue()
