"""A program of its own that reads one file with PyAV and prints what it found as JSON.

`probe.py` runs it under a deadline and with limited memory: a hostile file can hang or crash libav, and then takes only
this process with it (docs/decisions/020-probe-in-a-child.md). A second mode says which part of a clip the decoder
complains about.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type

from preprocess.facts import Inspection, MeasuredPicture
from preprocess.video.aspect import is_sd
from preprocess.video.ffmpeg import IMAGE_FORMATS, VIDEO_FORMATS, file_url
from preprocess.video.interlace import flagged_order, order_of_votes
from preprocess.video.measure import fields_of, find_bars, find_lines_below, find_vbi
from preprocess.video.packets import (
    choose_stream,
    decode_from,
    limited,
    open_container,
    read_packets,
    window_complaints,
)

NUM_POSITIONS = 6
"""Places of the clip whose pictures are looked at."""
NUM_IDET_FRAMES = 60
MIN_KEY_DISTANCE_SECONDS = 0.5
FIELD_VERDICTS = ("progressive", "tff", "bff", "unclear")
BASE_MEMORY_MIB = 3072
"""Address space of Python and the libraries before a file is opened."""

# libav attaches kinds of side data that PyAV's enumeration lacks (EXIF is one), and PyAV then raises for all of them.
# Each unknown kind counts as one that nobody reads; the display matrix, which libav makes of EXIF too, is readable.
Type._missing_ = classmethod(lambda cls, value: cls.VIDEO_HINT)  # type: ignore[method-assign,assignment]


def main(arguments: list[str]) -> None:
    """FILE, largest picture in pixels, memory limit in MiB, `images` or `videos`; and of a window its first and last
    picture, in seconds on the file's own clock, to print what the decoder complains about between them.
    """
    path, max_pixels, max_memory_mib, kind, *window = arguments
    limit = (BASE_MEMORY_MIB + int(max_memory_mib)) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    formats = VIDEO_FORMATS + IMAGE_FORMATS if kind == "images" else VIDEO_FORMATS
    if window:
        first, last = map(float, window)
        sys.stdout.write(json.dumps(window_complaints(Path(path), formats, int(max_pixels), first, last)))
        return
    inspection = inspect(Path(path), formats, max_pixels=int(max_pixels), max_memory_mib=int(max_memory_mib))
    sys.stdout.write(inspection.model_dump_json())


def inspect(path: Path, formats: tuple[str, ...], *, max_pixels: int, max_memory_mib: int) -> Inspection:
    """Everything `Inspection` holds. What the file does wrong is in `problem`; a bug of ours raises."""
    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture() as log:
        try:
            with open_container(path, formats) as container:
                found = _inspect_open(container, max_pixels)
        except av.FFmpegError as error:
            found = Inspection(problem="cannot-open", detail=str(error.strerror))
        except MemoryError:
            found = Inspection(problem="too-large", detail=f"needs more than {max_memory_mib} MiB")
    return _explained(found, [message.strip() for _, _, message in log if message.strip()], path)


def _explained(found: Inspection, log: list[str], path: Path) -> Inspection:
    """A problem whose true reason is only in the library's log; its paths, which differ from run to run, taken out."""
    if found.problem not in ("cannot-open", "no-frames"):
        return found
    lines = [line.replace(file_url(path), "file").replace(str(path), "file") for line in log]
    reasons = {"whitelist": "format-refused", "Picture size": "too-large", "max_pixels": "too-large"}
    for line in lines:
        for word, reason in reasons.items():
            if word in line:
                return Inspection(problem=reason, detail=line[:200])
    return found.model_copy(update={"detail": "; ".join([*lines[:1], found.detail])[:200]})


def _inspect_open(container: Any, max_pixels: int) -> Inspection:
    stream, ground = choose_stream(container)
    if stream is None:
        return Inspection(problem="no-video", detail=f"{len(container.streams)} streams, none of video")
    if stream.codec_context is None:
        return Inspection(problem="no-decoder", detail=f"stream {stream.index}")
    if stream.width * stream.height > max_pixels:
        return Inspection(problem="too-large", detail=f"{stream.width}×{stream.height} pixels")
    codec = limited(stream.codec_context, max_pixels)
    packets, end_seconds, _ = read_packets(container, stream, [])
    shown = [packet for packet in packets if packet.pts is not None and not packet.is_discard]
    if not shown:
        return Inspection(problem="no-frames", detail=f"{len(packets)} packets, none to be shown")
    first = _first_picture(codec, packets)
    shown = [packet for packet in shown if first is None or packet.pts >= first] or shown
    facts = _timing(container, stream, shown) | _codec_facts(container, stream)
    facts["stream_ground"] = ground
    # A GIF or AVIF file of one picture is a still, whatever else its container may hold.
    facts["is_still"] |= len(shown) == 1 and (container.format.name == "gif" or codec.name in ("av1", "libdav1d"))
    facts["truncated"] = _truncation(stream, packets, end_seconds, facts)
    facts["corrupt_seconds"] = _corrupt_times(packets, stream.time_base, facts["zero_seconds"])
    return Inspection(**(facts | _look(codec, stream, packets, facts)))


def _first_picture(codec: Any, packets: list) -> int | None:
    """The time of the first picture that decodes; None: it bears none.

    A clip that was cut within a group of pictures, or at an open one, begins with pictures that refer to what is gone.
    """
    for frame in decode_from(codec, packets, 1, len(packets)):
        return frame.pts
    return None


def _codec_facts(container: Any, stream: Any) -> dict:
    codec = stream.codec_context
    aspect = stream.sample_aspect_ratio or codec.sample_aspect_ratio
    formats = set(container.format.name.split(","))
    return {
        "format": container.format.name,
        "codec": codec.name,
        "pixel_format": codec.pix_fmt or "",
        "stream": stream.index,
        "width": stream.width,
        "height": stream.height,
        "sample_aspect": (aspect.numerator, aspect.denominator) if aspect else None,
        "field_order": int(codec.field_order),
        "matrix": int(codec.colorspace),
        "range": int(codec.color_range),
        "primaries": int(codec.color_primaries),
        "transfer": int(codec.color_trc),
        "is_still": bool(formats & set(IMAGE_FORMATS)) or container.format.name.endswith("_pipe"),
    }


def _timing(container: Any, stream: Any, shown: list) -> dict:
    base = stream.time_base
    zero = min((container.start_time or 0) / 1_000_000, float(min(packet.pts for packet in shown) * base))
    times = sorted({packet.pts for packet in shown})
    gaps = [(b - a) * base for a, b in itertools.pairwise(times)]
    last = max(shown, key=lambda packet: packet.pts)
    period = median(gaps) if gaps else (last.duration or 0) * base or 1 / (stream.average_rate or 25)
    uneven = max((abs(gap - period) for gap in gaps), default=0)
    end = times[-1] * base + (period if gaps else max(period, (last.duration or 0) * base))
    return {
        "num_frames": len(times),
        "zero_seconds": zero,
        "start_seconds": float(times[0] * base) - zero,
        "end_seconds": float(end) - zero,
        "period_seconds": _mean_period(times, base, period, uneven),
        "max_gap_seconds": float(max(gaps, default=period)),
        "is_constant_rate": bool(uneven <= _tolerance(base, period)),
        "key_seconds": _key_times(shown, base, zero),
        "picture_seconds": tuple(round(float(time * base) - zero, 6) for time in times),
        "declared_seconds": container.duration / 1_000_000 if container.duration else None,
    }


def _key_times(shown: list, base: Any, zero: float) -> tuple[float, ...]:
    """Thinned, because every frame of an intra-coded clip is one."""
    times: list[float] = []
    for pts in sorted(packet.pts for packet in shown if packet.is_keyframe):
        time = float(pts * base) - zero
        if not times or time - times[-1] >= MIN_KEY_DISTANCE_SECONDS:
            times.append(time)
    return tuple(times)


def _tolerance(base: Any, period: Any) -> Any:
    """Times are rounded to the stream's time base, so evenly spaced frames differ by up to one tick and a half."""
    return max(base * 3 / 2, period / 50)


def _mean_period(times: list, base: Any, period: Any, uneven: Any) -> float:
    """At a constant rate the mean over the clip is free of the rounding that the median has."""
    if len(times) > 1 and uneven <= _tolerance(base, period):
        return float((times[-1] - times[0]) * base) / (len(times) - 1)
    return float(period)


def _corrupt_times(packets: list, base: Any, zero: float) -> tuple[float, ...]:
    times = [packet.pts for packet in packets if packet.is_corrupt and packet.pts is not None]
    return tuple(sorted(round(float(time * base) - zero, 6) for time in times))


def _truncation(stream: Any, packets: list, end_seconds: float, facts: dict) -> str | None:
    declared = facts.pop("declared_seconds")
    if packets[-1].is_corrupt:
        return "the last packet is cut short"
    # An AVI counts dropped frames, which have no data and are left out here; its size says whether it is cut.
    if stream.frames and len(packets) < stream.frames and facts["format"] != "avi":
        return f"the index names {stream.frames} frames, {len(packets)} are there"
    # The claim is the container's, of all its streams: sound may well outlast the pictures.
    end_seconds -= facts["zero_seconds"]
    if declared and stream.duration is None and end_seconds < 0.9 * declared - 1:
        return f"the container claims {declared:.2f} s, its packets end at {end_seconds:.2f} s"
    return None


def _look(codec: Any, stream: Any, packets: list, facts: dict) -> dict:
    """Decode a few pictures all over the clip and measure them."""
    zero = facts["zero_seconds"]
    pictures, lumas, matrix = [], [], None
    for frame, following in _sample_frames(codec, packets):
        luma = luma_of(frame)
        seconds = float((frame.pts or 0) * stream.time_base) - zero
        pictures.append(_picture(frame, luma, seconds))
        same_size = following is not None and (following.width, following.height) == (frame.width, frame.height)
        lumas.append((luma, luma_of(following) if same_size else None))
        matrix = matrix or _display_matrix(frame)
        facts = _flags_of_frame(frame, facts)
    if not pictures:
        return {"problem": "no-frames", "detail": "no picture could be decoded"}
    same = [luma for luma, _ in lumas if luma.shape == lumas[0][0].shape]
    vbi, vbi_ground = find_vbi(same) if is_sd(stream.width, stream.height) else (0, "not an SD raster")
    below = find_lines_below(same) if is_sd(stream.width, stream.height) and not vbi else 0
    end = stream.height - below
    votes = dict.fromkeys(FIELD_VERDICTS, 0)
    for luma, following in lumas:
        if following is not None:
            votes[fields_of(luma[vbi // 2 * 2 : end], following[vbi // 2 * 2 : end])] += 1
    flagged = facts["field_order"] > 1 or any(picture.interlaced for picture in pictures)
    disagree = flagged_order(facts["field_order"], flagged) != order_of_votes(votes)
    return {
        "pictures": tuple(pictures),
        "display_matrix": matrix,
        "vbi_lines": vbi,
        "vbi_ground": vbi_ground,
        "lines_below": below,
        "bars": find_bars([luma[vbi:end] for luma in same], black_limit=16 if facts["range"] == 2 else 32),
        "scan": votes,
        "idet": _idet(codec, stream, packets) if disagree and not facts["is_still"] else None,
        **{name: facts[name] for name in ("matrix", "range", "primaries", "transfer")},
    }


def _picture(frame: Any, luma: np.ndarray, seconds: float) -> MeasuredPicture:
    return MeasuredPicture(
        seconds=seconds,
        width=frame.width,
        height=frame.height,
        interlaced=bool(frame.interlaced_frame),
        mean=float(luma.mean()),
    )


def _flags_of_frame(frame: Any, facts: dict) -> dict:
    """A decoded frame knows flags that the container's header may lack."""
    facts = dict(facts)
    if facts["matrix"] == 2:
        facts["matrix"] = int(frame.colorspace)
    if facts["range"] == 0:
        facts["range"] = int(frame.color_range)
    if facts["transfer"] == 2:
        facts["transfer"] = int(frame.color_trc)
    if facts["primaries"] == 2:
        facts["primaries"] = int(frame.color_primaries)
    return facts


def _sample_frames(codec: Any, packets: list) -> Iterator[tuple[Any, Any]]:
    """A frame, and the frame that follows, at key frames spread over the clip.

    Where key frames are few, more frames are taken after each: a clip of one long group is looked at too.
    """
    keys = [n for n, packet in enumerate(packets) if packet.is_keyframe] or [0]
    chosen = sorted({keys[round(k * (len(keys) - 1) / (NUM_POSITIONS - 1))] for k in range(NUM_POSITIONS)})
    num_frames, step = (2, 2) if len(chosen) >= 4 else (26, 6)
    for place, start in enumerate(chosen):
        stop = chosen[place + 1] if place + 1 < len(chosen) else len(packets)
        frames = list(decode_from(codec, packets[start:stop], num_frames))
        for n in range(0, len(frames), step):
            yield frames[n], frames[n + 1] if n + 1 < len(frames) else None


def luma_of(frame: Any) -> np.ndarray:
    """The luma plane as H×W uint8, as coded where the format has one, else converted by swscale."""
    component = frame.format.components[0] if frame.format.components else None
    if component is None or frame.format.is_rgb or not frame.format.is_planar:
        return np.asarray(frame.to_ndarray(format="gray"))
    plane = frame.planes[0]
    wide = component.bits > 8
    row = np.frombuffer(plane, np.dtype("<u2") if wide else np.uint8).reshape(plane.height, -1)[:, : plane.width]
    return (row >> (component.bits - 8)).astype(np.uint8) if wide else row.copy()


def _display_matrix(frame: Any) -> tuple[float, float, float, float] | None:
    """How the frame asks to be turned, whether by a display matrix or by EXIF."""
    try:
        for entry in frame.side_data:
            if entry.type is Type.DISPLAYMATRIX:
                values = np.frombuffer(entry, "<i4")[:9] / 65536
                return (float(values[0]), float(values[1]), float(values[3]), float(values[4]))
    except Exception:  # unknown optional metadata never costs a clip: PyAV still tells the angle
        return {-90: (0, 1, -1, 0), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), -180: (-1, 0, 0, -1)}.get(frame.rotation)
    return None


def _idet(codec: Any, stream: Any, packets: list) -> dict[str, int]:
    """Counts of ffmpeg's idet over up to 60 frames from the middle of the clip, in `multiple` mode."""
    keys = [n for n, packet in enumerate(packets) if packet.is_keyframe and n <= len(packets) // 2] or [0]
    names = {"tff": 0, "bff": 0, "progressive": 0, "undetermined": 0}
    graph = None
    for frame in decode_from(codec, packets[keys[-1] :], NUM_IDET_FRAMES):
        if graph is None:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
            )
            idet, sink = graph.add("idet"), graph.add("buffersink")
            source.link_to(idet)
            idet.link_to(sink)
            graph.configure()
        graph.push(frame)
        while True:
            try:
                out = graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                break
            verdict = out.metadata.get("lavfi.idet.multiple.current_frame", "undetermined")
            names[verdict] += 1
    return names


if __name__ == "__main__":
    main(sys.argv[1:])
