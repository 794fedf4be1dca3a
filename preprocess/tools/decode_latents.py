"""Latents back to pictures: one file to a video, or a run's samples to videos and a contact sheet while it trains.

Shape legend: T frames, H height, W width, C latent channels.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8

from preprocess.config import EncodersConfig
from preprocess.encoders import load as checkpoints
from preprocess.encoders import random_weights as random_encoders
from preprocess.encoders.encoders import digest_weights, find_device, quiet_libraries
from preprocess.encoders.vae_config import LATENT_MEAN, LATENT_STD, Z_DIM
from shards.config import parse_yaml
from shards.console import LOG
from shards.errors import UserError
from shards.files.tensor_files import SAMPLES_FOLDER, Latent, read_latent_file

if TYPE_CHECKING:
    import torch

SHEET_NAME = "contact-sheet.jpg"
SHEET_HEIGHT = 120
SIDE_BY_SIDE_NAME = "side-by-side.mp4"
CELL_HEIGHT = 360
"""Pixels of one cell of the side-by-side video, at most."""
CELL_PREFIX, CELL_SUFFIX = ".cell-", ".mkv"
MAX_COLUMNS = 4
TITLE_HEIGHT = 20
SUFFIXES = (".mp4", ".png")


class VaeDecoder:
    """diffusers' `AutoencoderKLWan` on one device, in fp32."""

    def __init__(self, vae: Any, device: torch.device, note: str | None = None) -> None:
        self.note = note
        # As in a dataset's identity: the encoder half identifies the VAE.
        self.encoder_sha256 = digest_weights(vae, prefixes=("encoder.", "quant_conv."))
        vae.encoder = vae.quant_conv = None
        self._vae = vae.to(device)
        self._device = device

    def decode(self, latent: Float32[np.ndarray, "48 t h w"]) -> UInt8[np.ndarray, "T H W 3"]:
        """Decode one normalised latent to RGB frames. Raises UserError when the device has too little memory."""
        import torch

        mean_C111, std_C111 = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
        latent_1CTHW = (torch.from_numpy(latent) * std_C111 + mean_C111)[None].to(self._device)
        try:
            with torch.inference_mode():
                pixels_CTHW = self._vae.decode(latent_1CTHW).sample[0].clamp(-1, 1)
        except torch.OutOfMemoryError:
            raise UserError(
                f"the VAE ran out of memory on {self._device} decoding {list(latent.shape)}",
                fix="-o encoders.device=cpu, or a larger device (about 19 GiB for 49 frames of 1280×704)",
            ) from None
        return ((pixels_CTHW + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def load_decoder(config: EncodersConfig) -> VaeDecoder:
    """Load the VAE that the config names; small random weights without a checkpoint."""
    LOG.info("loading the VAE: %s", config.checkpoint or random_encoders.NOTE)
    device = find_device(config.device)
    quiet_libraries()
    if config.checkpoint is None:
        vae = random_encoders.build_random_vae(config.random_seed).eval().requires_grad_(False)
        return VaeDecoder(vae, device, random_encoders.NOTE)
    return VaeDecoder(checkpoints.load_vae(Path(config.checkpoint), decoder=True), device)


def decode_file(decoder: VaeDecoder, source: Path, out: Path) -> UInt8[np.ndarray, "T H W 3"]:
    """Decode a latent file to a video (.mp4) or a picture (.png: the first frame); return the frames.

    Raises UserError for a file that is no latent, a latent of another VAE, or another suffix.
    """
    check_suffix(out)
    latent = read_latent_file(source)
    check_vae(latent, decoder, source)
    frames_THWC = decoder.decode(latent.values)
    write_frames(out, frames_THWC, Fraction(latent.facts.get("fps", "24")))
    return frames_THWC


def check_suffix(out: Path) -> None:
    """Raise UserError unless it is known how to write `out`."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"{out}: suffix {out.suffix!r}", expected=" or ".join(SUFFIXES))


def check_vae(latent: Latent, decoder: VaeDecoder, source: Path) -> None:
    """Raise UserError when the latent was made in the space of another VAE, and would decode to noise."""
    if latent.values.shape[0] != Z_DIM:
        raise UserError(f"{source}: {latent.values.shape[0]} channels", expected=f"{Z_DIM}, of Wan2.2-TI2V-5B")
    theirs = latent.facts.get("vae")
    if theirs is not None and theirs != decoder.encoder_sha256:
        raise UserError(
            f"{source}: a latent of another VAE ({theirs[:8]}…), this one is {decoder.encoder_sha256[:8]}…",
            fix="-o encoders.checkpoint=… the one that the shards were built with",
        )


def write_frames(out: Path, frames_THWC: Iterable[UInt8[np.ndarray, "H W 3"]], fps: Fraction) -> None:
    """Write frames as H.264 in MP4 (BT.709, CRF 17), as lossless FFV1 in .mkv, or the first one as PNG; the complete
    file or none."""
    import av
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".writing-{out.name}")
    frames = iter(frames_THWC)
    first_HWC = next(frames)
    if out.suffix.lower() == ".png":
        Image.fromarray(first_HWC).save(temporary)
        temporary.rename(out)
        return
    lossless = out.suffix == CELL_SUFFIX
    target: dict[str, Any] = {"format": "bgr0"}
    with av.open(str(temporary), "w", format="matroska" if lossless else "mp4") as container:
        stream: Any = (
            container.add_stream("ffv1", rate=fps)
            if lossless
            else container.add_stream("libx264", rate=fps, options={"crf": "17", "preset": "medium"})
        )
        if not lossless:
            target = {"format": "yuv420p", "dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
            context = stream.codec_context
            # 1 is BT.709 for matrix, primaries and transfer alike; players guess at unflagged video.
            context.colorspace = context.color_primaries = context.color_trc = 1
        stream.height, stream.width = first_HWC.shape[:2]
        stream.pix_fmt = target["format"]
        for frame_HWC in itertools.chain([first_HWC], frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(frame.reformat(**target)))
        container.mux(stream.encode())
    temporary.rename(out)


def decode_new(decoder: VaeDecoder, run: Path) -> list[Path]:
    """Decode every latent under RUN/samples that has no video yet, oldest step first, and bring the contact sheet and
    the side-by-side video up to date.

    Returns the videos made. Raises UserError when there is no run, or one that makes no samples.
    """
    folder = run / SAMPLES_FOLDER
    if not run.is_dir():
        raise UserError(f"{run}: no such folder", expected="the output of a run with a `sample` section")
    _refuse_without_samples(run)
    made = []
    for latent in sorted(folder.glob("*/[!.]*.safetensors")):
        video = latent.with_suffix(".mp4")
        # A run that was resumed from an earlier checkpoint samples a step again.
        if video.exists() and video.stat().st_mtime >= latent.stat().st_mtime:
            continue
        frames_THWC = decode_file(decoder, latent, video)
        _write_still(latent, frames_THWC)
        _write_cell(latent, frames_THWC)
        LOG.info("decoded %s", video)
        made.append(video)
    if made:
        write_sheet(folder)
        write_side_by_side(folder)
    return made


def _refuse_without_samples(run: Path) -> None:
    """Raise UserError for a run that was told to make no samples: a watch would wait for nothing."""
    settings = run / "config.yaml"
    if (run / SAMPLES_FOLDER).is_dir() or not settings.is_file():
        return
    values = parse_yaml(settings.read_text(encoding="utf-8"), str(settings))
    if isinstance(values, dict) and values.get("sample") is None:
        raise UserError(
            f"{run}: this run makes no samples: its config has no `sample` section",
            fix="add `sample: {every_steps: 500, prompts: [{name: first, key: '*'}]}` to the config of `wantrain fit`",
        )


def watch_run(decoder: VaeDecoder, run: Path, every_seconds: float, *, with_parent: bool = False) -> None:
    """`decode_new` again and again, until Ctrl-C, or `with_parent` until the process that started this one is gone."""
    parent = os.getppid()
    if not decode_new(decoder, run) and not (run / SAMPLES_FOLDER).is_dir():
        LOG.info("waiting for the first samples under %s", run / SAMPLES_FOLDER)
    while not with_parent or os.getppid() == parent:
        time.sleep(every_seconds)
        decode_new(decoder, run)


def write_side_by_side(folder: Path) -> Path | None:
    """One video of all samples: a row a prompt, a column a step, without the LoRA on the left; None for one column.

    Of more than four steps the first, the last and two between are shown. It is made of lossless copies of the decoded
    frames, since x264 does not repeat to the bit: where two latents are equal, so are the two sides.
    """
    videos = {(path.parent.name, path.stem.removeprefix(CELL_PREFIX)): path for path in _cells(folder)}
    steps, names = (sorted({key[place] for key in videos}) for place in (0, 1))
    if len(steps) < 2:
        return None
    if len(steps) > MAX_COLUMNS:
        steps = [steps[round(place * (len(steps) - 1) / (MAX_COLUMNS - 1))] for place in range(MAX_COLUMNS)]
    grid = [[videos.get((step, name)) for step in steps] for name in names]
    out = folder / SIDE_BY_SIDE_NAME
    write_frames(out, composite(grid, steps), Fraction(24))
    return out


def composite(grid: list[list[Path | None]], titles: list[str]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Frames of videos side by side, under a line of titles. A shorter video holds its last frame."""
    import av
    from PIL import Image, ImageDraw

    with contextlib.ExitStack() as stack:
        rows = [[stack.enter_context(av.open(str(path))) if path else None for path in row] for row in grid]
        streams = [next(video for video in row if video).streams.video[0] for row in rows]
        sizes = [(stream.width, stream.height) for stream in streams]
        # Cells of one column are as wide as the widest prompt; the rest is black.
        width = max(width for width, _ in sizes)
        frames = [[one.decode(video=0) if one else iter(()) for one in row] for row in rows]
        top = Image.new("RGB", (width * len(titles), TITLE_HEIGHT), "white")
        for column, title in enumerate(titles):
            ImageDraw.Draw(top).text((column * width + 4, 4), title, fill="black")
        cells = [[np.zeros((height, width, 3), np.uint8) for _ in titles] for _, height in sizes]
        while True:
            moved = False
            for row, (cell_width, height) in enumerate(sizes):
                for column, stream in enumerate(frames[row]):
                    frame = next(stream, None)
                    if frame is not None:
                        moved = True
                        picture = frame.to_ndarray(format="rgb24", width=cell_width, height=height)
                        cells[row][column][:, :cell_width] = picture
            if not moved:
                return
            yield np.concatenate([np.asarray(top), *(np.concatenate(row, axis=1) for row in cells)])


def _cells(folder: Path) -> list[Path]:
    """The lossless copies under a folder of samples, of latents that are still there."""
    found = folder.glob(f"*/{CELL_PREFIX}*{CELL_SUFFIX}")
    return [path for path in found if path.with_name(f"{path.stem.removeprefix(CELL_PREFIX)}.safetensors").exists()]


def _write_cell(latent: Path, frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> None:
    import av

    height, width = (side for side in frames_THWC.shape[1:3])
    if height > CELL_HEIGHT:
        size = {"width": round(width * CELL_HEIGHT / height) // 2 * 2, "height": CELL_HEIGHT}
        frames = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames_THWC)
        frames_THWC = np.stack([frame.reformat(**size, interpolation="AREA").to_ndarray() for frame in frames])
    write_frames(latent.with_name(f"{CELL_PREFIX}{latent.stem}{CELL_SUFFIX}"), frames_THWC, Fraction(24))


def _write_still(latent: Path, frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> None:
    from PIL import Image

    middle = Image.fromarray(frames_THWC[len(frames_THWC) // 2])
    middle.resize((round(middle.width * SHEET_HEIGHT / middle.height), SHEET_HEIGHT)).save(latent.with_suffix(".jpg"))


def write_sheet(folder: Path) -> Path:
    """One picture of all samples: a row a step, a column a prompt, the middle frame of each."""
    from PIL import Image, ImageDraw

    stills = {(path.parent.name, path.stem): _read_still(path) for path in folder.glob("*/*.jpg")}
    steps, names = (sorted({key[place] for key in stills}) for place in (0, 1))
    widths = [max(still.width for (_, other), still in stills.items() if other == name) + 4 for name in names]
    left, top, row_height = 110, 18, SHEET_HEIGHT + 4
    sheet = Image.new("RGB", (left + sum(widths), top + len(steps) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((left + sum(widths[:column]), 3), name, fill="black")
    for row, step in enumerate(steps):
        draw.text((4, top + row * row_height + SHEET_HEIGHT // 2), step, fill="black")
    for (step, name), still in stills.items():
        sheet.paste(still, (left + sum(widths[: names.index(name)]), top + steps.index(step) * row_height))
    temporary = folder / f".writing-{SHEET_NAME}"
    sheet.save(temporary, "JPEG", quality=85)
    temporary.rename(folder / SHEET_NAME)
    return folder / SHEET_NAME


def _read_still(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as still:
        return still.copy()
