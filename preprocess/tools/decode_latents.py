"""Latents back to pictures: one file to a video, or a run's samples to videos and a contact sheet while it trains.

Shape legend: T frames, H height, W width, C latent channels.
"""

from __future__ import annotations

import time
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
from shards.files.tensor_files import Latent, read_latent_file

if TYPE_CHECKING:
    import torch

SAMPLES_FOLDER = "samples"
SHEET_NAME = "contact-sheet.jpg"
SHEET_HEIGHT = 120
SUFFIXES = (".mp4", ".png")


class VaeDecoder:
    """diffusers' `AutoencoderKLWan` on one device, in fp32."""

    def __init__(self, vae: Any, device: torch.device, note: str | None = None) -> None:
        self.note = note
        # As in a dataset's identity: the encoder half stands for the whole VAE.
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
        raise UserError(f"{out}: {out.suffix or 'no suffix'}", expected=" or ".join(SUFFIXES))


def check_vae(latent: Latent, decoder: VaeDecoder, source: Path) -> None:
    """Raise UserError when the latent was made in the space of another VAE, whose pictures would be noise."""
    if latent.values.shape[0] != Z_DIM:
        raise UserError(f"{source}: {latent.values.shape[0]} channels", expected=f"{Z_DIM}, of Wan2.2-TI2V-5B")
    theirs = latent.facts.get("vae")
    if theirs is not None and theirs != decoder.encoder_sha256:
        raise UserError(
            f"{source}: a latent of another VAE ({theirs[:8]}…), this one is {decoder.encoder_sha256[:8]}…",
            fix="-o encoders.checkpoint=… the one that the shards were built with",
        )


def write_frames(out: Path, frames_THWC: UInt8[np.ndarray, "T H W 3"], fps: Fraction) -> None:
    """Write frames as H.264 in MP4 (BT.709, CRF 17), or the first one as PNG; whole or not at all."""
    import av
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".writing-{out.name}")
    if out.suffix.lower() == ".png":
        Image.fromarray(frames_THWC[0]).save(temporary)
        temporary.rename(out)
        return
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17", "preset": "medium"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # 1 is BT.709 for matrix, primaries and transfer alike; players guess at unflagged video.
        context.colorspace = context.color_primaries = context.color_trc = 1
        for frame_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    temporary.rename(out)


def decode_new(decoder: VaeDecoder, run: Path) -> list[Path]:
    """Decode every latent under RUN/samples that has no video yet, oldest step first, and bring the sheet up to date.

    Returns the videos made. Raises UserError when there is no run.
    """
    folder = run / SAMPLES_FOLDER
    if not run.is_dir():
        raise UserError(f"{run}: no such folder", expected="the output of a run with a `sample` section")
    made = []
    for latent in sorted(folder.glob("step-*/[!.]*.safetensors")):
        video = latent.with_suffix(".mp4")
        # A run that went back to an earlier checkpoint samples a step again.
        if video.exists() and video.stat().st_mtime >= latent.stat().st_mtime:
            continue
        frames_THWC = decode_file(decoder, latent, video)
        _write_still(latent, frames_THWC)
        LOG.info("decoded %s", video)
        made.append(video)
    if made:
        write_sheet(folder)
    return made


def watch_run(decoder: VaeDecoder, run: Path, every_seconds: float) -> None:
    """`decode_new` again and again, until Ctrl-C."""
    _check_samples(run)
    while True:
        decode_new(decoder, run)
        time.sleep(every_seconds)


def _check_samples(run: Path) -> None:
    """Raise UserError for a run whose config asks for no samples: there would be nothing to decode, for ever."""
    path = run / "config.yaml"
    if path.is_file() and not (run / SAMPLES_FOLDER).is_dir():
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if isinstance(values, dict) and values.get("sample") is None:
            fix = 'train with sample: {prompts: [{name: first, key: "*"}]} in its config, see docs/how-to/see-a-run.md'
            raise UserError(f"{run}: this run makes no samples", fix=fix)


def _write_still(latent: Path, frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> None:
    from PIL import Image

    middle = Image.fromarray(frames_THWC[len(frames_THWC) // 2])
    middle.resize((round(middle.width * SHEET_HEIGHT / middle.height), SHEET_HEIGHT)).save(latent.with_suffix(".jpg"))


def write_sheet(folder: Path) -> Path:
    """One picture of all samples: a row a step, a column a prompt, the middle frame of each."""
    from PIL import Image, ImageDraw

    stills = {(path.parent.name, path.stem): _read_still(path) for path in folder.glob("step-*/*.jpg")}
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
