"""Shot changes of a clip, by ffmpeg's scene score. The whole clip is decoded for it, so only on request."""

from __future__ import annotations

import re
from pathlib import Path

from preprocess.config import PrepConfig
from preprocess.facts import ClipFacts
from preprocess.rejection import ClipRejected, Rejection
from preprocess.video.decode import open_input
from preprocess.video.ffmpeg import file_url, first_line, run_ffmpeg

MAX_LIST_BYTES = 16 << 20


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
    complaint = first_line(result.stderr.replace(file_url(path), "file"))
    if result.overflowed or result.returncode or (complaint and config.decode.policy == "strict"):
        raise ClipRejected(Rejection("window", "decode-errors", complaint or "too many shot changes", False))
    return tuple(float(time) for time in re.findall(rb"pts_time:(-?[0-9.]+)", bytes(result.stdout)))
