"""CPU seconds of decoding a 49-frame window, as a ratio to the bare ffmpeg command with the same filters.

Promises: at most 1.1; measuring motion and darkness costs at most 0.03; and an early window of a 30 s clip decodes
a small part of it. CPU seconds are those of this process and its children (`getrusage`), so that other work on the
machine counts little. Runs alternate; medians count.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from clips import a_record, ffmpeg_run, only_bucket, prep_config

from preprocess.video.decode import decode_window
from preprocess.video.ffmpeg import find_ffmpeg
from preprocess.video.measure import measure_window
from preprocess.video.probe import probe_clip
from preprocess.video.window import Window

RUNS = 9
SCALE = "flags=lanczos+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact:out_range=full"
H264 = ("-c:v", "libx264", "-preset", "veryfast", "-b:v", "3M", "-pix_fmt", "yuv420p", "-g", "60")
WOVEN = (*H264, "-flags", "+ilme+ildct", "-x264-params", "tff=1")
CLIPS = {
    "720×480 proxy, 29.97": ("720x480", "setsar=32/27", H264, "fps=24", 0),
    "720×480 interlaced": ("720x480", "tinterlace=interleave_top,setsar=32/27", WOVEN, "bwdif,fps=24", 1),
    "1920×1080, 29.97": ("1920x1080", "null", H264, "fps=24", 0),
}


def cpu_seconds(work: Callable[[], object]) -> float:
    """User and system seconds of this process and of the children that it collected during `work`."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    work()
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))


def bare(path: Path, start: float, filters: str) -> list[str]:
    """What one would type: seek, filter, cover, crop, raw frames."""
    graph = f"{filters},scale=853:480:{SCALE},format=rgb24,crop=832:480"
    limits = ["-threads", "1", "-ss", str(start), "-i", str(path), "-filter_threads", "1", "-frames:v", "49"]
    return [find_ffmpeg(), "-v", "error", "-nostdin", *limits, "-vf", graph, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]


def main() -> None:
    """Print one line a clip and place; exit 1 where a promise is broken."""
    config = prep_config(((832, 480),))
    bucket = only_bucket(config)
    broken = False
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, picture, output, filters, woven) in CLIPS.items():
            path = Path(folder) / "clip.mp4"
            rate = "60000/1001" if woven else "30000/1001"
            ffmpeg_run("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d=30", "-vf", picture, *output, path)
            facts = probe_clip(path, a_record(), config)
            whole_command = [find_ffmpeg(), "-v", "error", "-threads", "1", "-i", str(path), "-f", "null", "-"]
            whole = cpu_seconds(partial(subprocess.run, whole_command, check=True))
            for place, start in (("early", 1.234), ("late", 26.3)):
                ours, theirs = [], []
                for _ in range(RUNS):
                    window = Window(start, 49, "bench")
                    ours.append(cpu_seconds(partial(decode_window, path, facts, window, bucket, config)))
                    theirs.append(cpu_seconds(partial(subprocess.run, bare(path, start, filters), capture_output=True)))
                decoded = decode_window(path, facts, Window(start, 49, "bench"), bucket, config)
                mine, other = statistics.median(ours), statistics.median(theirs)
                ratio = mine / other
                broken |= ratio > 1.1
                measure = statistics.median(
                    cpu_seconds(partial(measure_window, frames, 1.0)) for frames in [decoded] * RUNS
                )
                broken |= measure / mine > 0.03
                print(
                    f"{name}, {place}: measuring motion and darkness {measure:.4f} CPU-s, ratio to decoding "
                    f"{measure / mine:.4f} (promise ≤ 0.03)"
                )
                print(
                    f"{name}, {place}: {mine:.3f} CPU-s, bare ffmpeg {other:.3f}, ratio {ratio:.3f} (promise ≤ 1.1); "
                    f"decoding the whole 30 s alone {whole:.2f}"
                )
    sys.exit(broken)


if __name__ == "__main__":
    main()
