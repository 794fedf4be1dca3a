"""Packets of one file by PyAV: which stream, when each is shown, what decodes, and what the decoder complains about.

Used by the inspector alone, in a process of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from preprocess.video.ffmpeg import file_url

MAX_PACKETS = 2_000_000
FIRST_GROUP_COMPLAINTS = ("mmco: unref short failure",)
"""H.264 copied from an open group asks to drop references that lie before the cut. The pictures are right without."""


def open_container(path: Path, formats: tuple[str, ...]) -> Any:
    options = {"format_whitelist": ",".join(formats), "protocol_whitelist": "file"}
    return av.open(file_url(path), options=options, metadata_errors="replace")


def choose_stream(container: Any) -> tuple[Any, str]:
    """The largest video stream that is no cover picture, the first of equals; None where there is none."""
    streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if len(streams) < 2:
        return (streams[0] if streams else None), "the only video stream"
    shapes = {each.index: (each.width, each.height) if each.codec_context else (0, 0) for each in streams}
    chosen = max(streams, key=lambda each: shapes[each.index][0] * shapes[each.index][1])
    sizes = ", ".join(f"{index}: {width}×{height}" for index, (width, height) in itertools.islice(shapes.items(), 8))
    return chosen, f"the largest of {len(streams)} video streams ({sizes})"


def limited(codec: Any, max_pixels: int) -> Any:
    codec.thread_count = 1
    codec.options = {"max_pixels": str(max_pixels)}
    return codec


def read_packets(container: Any, stream: Any, log: list) -> tuple[list, float, list[list[str]]]:
    """Packets of the stream with their times; when the last of any stream ends; what was reported before each.

    Nothing is decoded. The end is on the file's own clock.
    """
    packets: list = []
    reported: list[list[str]] = []
    end, num_logged = 0.0, len(log)
    for packet in _demuxed(container):
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and packet.time_base:
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index or packet.size == 0:
            continue
        packet.pts = time
        packets.append(packet)
        reported.append([message for _, _, message in log[num_logged:]])
        num_logged = len(log)
        if len(packets) > MAX_PACKETS:
            break
    return packets, end, reported


def _demuxed(container: Any) -> Iterator[Any]:
    # PyAV ends with an empty packet for each stream, and raises IndexError there for one that appeared in mid-file (a
    # transport stream may announce one at any time). By then all packets have been read.
    with suppress(IndexError):
        yield from container.demux()


def decode_from(codec: Any, packets: list, num_frames: int, max_packets: int | None = None) -> Iterator[Any]:
    """First frames of a run of packets that starts at a key frame; damage in them is decode's business, not ours."""
    num_out = 0
    try:
        for packet in itertools.chain(itertools.islice(packets, max_packets or num_frames + 8), [None]):
            try:
                frames = codec.decode(packet)
            except av.error.EOFError:
                frames = []
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                if num_out < num_frames:
                    num_out += 1
                    yield frame
            if num_out >= num_frames:
                break
    finally:
        codec.flush_buffers()


def window_complaints(path: Path, formats: tuple[str, ...], max_pixels: int, first: float, last: float) -> list[str]:
    """What the decoder reports of the packets that the pictures from `first` to `last` are made of.

    Those are the packets from the last key frame at or before `first` on. Decoding starts one key frame earlier, so
    that pictures which lead that key frame find what they refer to. One thread decodes, so each message is of the
    packet just given to it.
    """
    av.logging.set_level(av.logging.ERROR)
    found = []
    with av.logging.Capture() as log, open_container(path, formats) as container:
        stream, _ = choose_stream(container)
        codec = limited(stream.codec_context, max_pixels)
        packets, _, num_logged = read_packets(container, stream, log)
        base, tick = stream.time_base, float(stream.time_base)
        keys = [n for n, each in enumerate(packets) if each.is_keyframe and each.pts is not None]
        before = [n for n in keys if packets[n].pts * base <= first + tick] or keys[:1] or [0]
        key, start = before[-1], before[-2] if len(before) > 1 else 0
        key_pts = packets[key].pts or 0
        for n in range(start, len(packets)):
            packet = packets[n]
            time = packet.pts if packet.pts is not None else key_pts
            if packet.dts is not None and packet.dts * base > last + tick:
                break
            num_before = len(log)
            try:
                codec.decode(packet)
                messages = [message for _, _, message in log[num_before:]]
            except av.FFmpegError as error:
                messages = [message for _, _, message in log[num_before:]] or [str(error.strerror)]
            messages += num_logged[n]
            if n < key or time < key_pts or time * base > last + tick:
                continue
            in_first_group = not keys[1:] or n < keys[1]
            found += [
                f"at {float(time * base) - first:+.2f} s of the window: {message.strip()}"
                for message in messages
                if message.strip() and not (in_first_group and message.strip() in FIRST_GROUP_COMPLAINTS)
            ]
    return [message.replace(file_url(path), "file")[:200] for message in found[:20]]
