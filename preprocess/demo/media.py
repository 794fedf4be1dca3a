"""Moving pictures for the demonstration, drawn by ffmpeg's own generators: no footage is shipped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from preprocess.video.ffmpeg import find_ffmpeg, first_line, run_killable
from shards.errors import UserError

LIMIT_SECONDS = 120.0

# The station's graphics that all archive clips share and no base clip has: a lower third, a ticker, a logo.
_GRAPHICS = (
    "drawbox=x=0:y=ih*0.80:w=iw:h=ih*0.14:color=0x0a2a6a@0.9:t=fill,"
    "drawbox=x=0:y=ih*0.80:w=iw*0.22:h=ih*0.14:color=0xd8a010:t=fill,"
    "drawbox=x=iw*0.84:y=ih*0.06:w=iw*0.11:h=ih*0.10:color=0xf0f0f0:t=fill,"
    "drawbox=x=iw*0.86:y=ih*0.08:w=iw*0.07:h=ih*0.06:color=0xc02020:t=fill"
)
_PICTURES = (
    "gradients=s={size}:r={fps}:c0=0x206020:c1=0xe0e070:c2=0x4080c0:n=3:speed=0.04:seed={seed}:type=linear",
    "testsrc2=s={size}:r={fps},hue=s=0.6",
    "gradients=s={size}:r={fps}:c0=0x802020:c1=0x202060:c2=0xe0a060:n=3:speed=0.06:seed={seed}:type=radial",
    "smptehdbars=s={size}:r={fps},scroll=h=0.006,hue=s=0.7",
    "mandelbrot=s={size}:r={fps}:start_scale=2.2:end_scale=0.9:end_pts=240:maxiter=96",
    "color=0x304860:s={size}:r={fps},drawbox=x=iw*0.2:y=ih*0.2:w=iw*0.3:h=ih*0.4:color=0xf0e0a0:t=fill",
)
_MOTIONS = (
    "scroll=h={step}",
    "scroll=v={step}",
    "scroll=h=-{step}",
    "rotate=a=t*0.5:c=0x203020",
    "hue=h=t*40",
    "scroll=h={step}:v={step}",
)


class Media(NamedTuple):
    """How one file is made. Times in seconds, sizes in coded pixels."""

    name: str
    """File name within the corpus's `media` folder."""
    width: int
    height: int
    fps: str
    seconds: float
    picture: int
    """Which of the generators; also seeds it."""
    graphics: bool = True
    """Whether the station's graphics are drawn over it."""
    filters: str = ""
    """What is done to the picture after it is drawn (interlacing, sample aspect …)."""
    output: tuple[str, ...] = ()
    """Further output arguments of ffmpeg."""
    keep_share: float = 1.0
    """Less than 1: the file is cut off there."""

    def recipe(self) -> str:
        """Digest of everything above and of the arguments it leads to."""
        return hashlib.sha256(json.dumps([self, self.arguments(Path("x"))], default=str).encode()).hexdigest()

    def arguments(self, target: Path) -> list[str]:
        """ffmpeg's arguments; bit-exact switches and one thread, so that like builds write like bytes."""
        still = target.suffix == ".jpg"
        codec = ["-frames:v", "1"] if still else ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "20"]
        return [
            "-hide_banner", "-nostdin", "-loglevel", "error", "-f", "lavfi", "-i", self._graph(),
            "-t", f"{self.seconds:g}", "-map_metadata", "-1", "-threads", "1", "-fflags", "+bitexact",
            "-flags:v", "+bitexact", "-pix_fmt", "yuv420p", *codec, *self.output, "-y", str(target),
        ]  # fmt: skip

    def _graph(self) -> str:
        drawn = _PICTURES[self.picture % len(_PICTURES)]
        step = 0.004 + 0.001 * (self.picture % 4)
        motion = _MOTIONS[self.picture // len(_PICTURES) % len(_MOTIONS)].format(step=step)
        picture = drawn.format(size=f"{self.width}x{self.height}", fps=self.fps, seed=self.picture)
        return ",".join(part for part in (picture, motion, _GRAPHICS if self.graphics else "", self.filters) if part)


def make_media(folder: Path, media: Media) -> bool:
    """Make one file of the corpus unless it is there already; True when it was made. Raises UserError.

    A file is the same when its recipe and its bytes are those noted beside it.
    """
    target = folder / media.name
    note = folder / f".{media.name}.made"
    if target.is_file() and note.is_file() and note.read_text() == _note(media, target):
        return False
    scratch = folder / f".part-{media.name}"
    result = run_killable(
        [find_ffmpeg(), *media.arguments(scratch)], timeout_seconds=LIMIT_SECONDS, max_stdout_bytes=1 << 16
    )
    if result.returncode != 0 or not scratch.is_file():
        scratch.unlink(missing_ok=True)
        reason = "too slow" if result.timed_out else first_line(result.stderr)
        raise UserError(f"ffmpeg could not draw {media.name}: {reason}", expected="an ffmpeg with lavfi and libx264")
    if media.keep_share < 1:
        with scratch.open("r+b") as file:
            file.truncate(int(scratch.stat().st_size * media.keep_share))
    scratch.replace(target)
    note.write_text(_note(media, target))
    return True


def _note(media: Media, target: Path) -> str:
    return f"{media.recipe()} {hashlib.sha256(target.read_bytes()).hexdigest()}\n"
