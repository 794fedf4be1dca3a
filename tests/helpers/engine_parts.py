"""What the engine's benchmarks are made of: many clips in few files, and an encoder that takes a fixed time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from annotations import CAPTION, annotation, encode
from clips import ffmpeg_run

from preprocess.config import PrepConfig
from preprocess.encoders.vae_config import LATENT_MEAN
from shards.config import validate_config


class FixedVae:
    """In place of a GPU: each clip takes `seconds`, in which the processor is free, and gives unit-normal latents."""

    note = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.busy_seconds = 0.0
        self.num_clips = 0

    def encode(self, frames_THWC: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        num_frames, height, width, _ = frames_THWC.shape
        shape = (len(LATENT_MEAN), (num_frames + 3) // 4, height // 16, width // 16)
        latent = np.random.default_rng(int(frames_THWC[0, 0, 0, 0])).standard_normal(shape, dtype=np.float32)
        time.sleep(max(0.0, self.seconds - (time.perf_counter() - start)))
        self.busy_seconds += time.perf_counter() - start
        self.num_clips += 1
        return latent

    def identity(self) -> dict[str, Any]:
        return {"model": "fixed time", "precision": "fp32"}

    def provenance(self) -> dict[str, str]:
        return {}


@contextmanager
def copied_frames() -> Iterator[None]:
    """Look into and decode one clip; all others take its facts and a copy of its frames."""
    from preprocess.build import clip as parts

    probe, decode = parts.probe_clip, parts.decode_window
    probed, frames = [], []

    def probe_once(path: Path, record: Any, config: Any) -> Any:
        if not probed:
            probed.append(probe(path, record, config))
        return probed[0]

    def decode_once(*arguments: Any) -> np.ndarray:
        if not frames:
            frames.append(decode(*arguments))
        return frames[0].copy()

    parts.probe_clip, parts.decode_window = probe_once, decode_once
    try:
        yield
    finally:
        parts.probe_clip, parts.decode_window = probe, decode


def seconds_of(number: int, kind: str) -> float:
    """How late a server answers for a clip: 0.2 s, one in a hundred 100 times as long; or lognormal around 0.2 s."""
    rng = np.random.default_rng(number)
    if kind == "rare":
        return 20.0 if rng.random() < 0.01 or number == 7 else 0.2  # one at least, however few clips there are
    return float(rng.lognormal(np.log(0.2), 1.5))


TAILS: dict[str, Callable[[str], None]] = {
    "none": lambda path: None,
    "rare": lambda path: time.sleep(seconds_of(int(Path(path).stem), "rare")),
    "lognormal": lambda path: time.sleep(seconds_of(int(Path(path).stem), "lognormal")),
}
"""By name, what a server does before it sends a clip, `0000012.mp4`."""


@contextmanager
def served_after(folder: Path, wait: Callable[[str], None]) -> Iterator[str]:
    """A folder over HTTP on a free port; `wait(path)` returns when a file may be sent."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            wait(self.path)
            super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_clips(root: Path, count: int, size: str, seconds: float, distinct: int = 4, cdn: Path | None = None) -> Path:
    """A corpus of `count` records; each clip is beside its record, or in `cdn`. They are `distinct` files, linked."""
    media = root.parent / f"{root.name}-media"
    media.mkdir(parents=True, exist_ok=True)
    if cdn is not None:
        cdn.mkdir(parents=True, exist_ok=True)
    for number in range(distinct):
        source = f"testsrc2=s={size}:r=30000/1001:d={seconds}"
        look = f"hue=h={90 * number},setsar=1"
        output = ("-c:v", "libx264", "-preset", "veryfast", "-b:v", "3M", "-pix_fmt", "yuv420p", "-g", "60")
        ffmpeg_run("-f", "lavfi", "-i", source, "-vf", look, *output, media / f"{number}.mp4")
    for number in range(count):
        folder = root / f"video/batch_{number // 1000:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        clip = f"{number:07d}"
        record = annotation(
            clip,
            raw_data_info__source_media_info__details={"length": seconds},
            labeling_data_info__caption_info={"object_level": [{"text": f"{CAPTION} {number}."}]},
        )
        (folder / f"{clip}.json").write_bytes(encode(record))
        os.link(media / f"{number % distinct}.mp4", (cdn or folder) / f"{clip}.mp4")
    return root


def engine_config(corpus: Path, output: Path, size: tuple[int, int], num_frames: int, **sections: Any) -> PrepConfig:
    """A config for such a corpus: one bucket, one window a clip, random encoders."""
    values: dict[str, Any] = {
        "output": str(output),
        "corpus": {"location": str(corpus)},
        "sieve": {"min_seconds": 1.0},
        "window": {"num_frames": num_frames},
        "buckets": {"sizes": [{"width": size[0], "height": size[1]}], "max_upscale": 100.0},
        "encoders": {"device": "cpu"},
    }
    return validate_config(PrepConfig, values | sections, origin="benchmark")
