"""What `encoders.vae_precision: auto` means: measured on clips of the plan, resolved once, and kept beside the plan.

    plan/vae.json     sealed: the mode, why, on which device, and for every mode tried its error and its seconds

A 16-bit mode is taken only where its latents agree with fp32's within `encoders.vae_tolerance` on every clip of the
gate and at every bucket size, and where it is faster. Some cards have had 3-D convolutions that were fast and wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from preprocess.config import PrepConfig
from shards.config import Config, validate_config
from shards.console import LOG
from shards.errors import ShardDamage, UserError
from shards.format.sealed_json import open_document, seal_document
from shards.storage.base import Storage

if TYPE_CHECKING:
    from preprocess.encoders.encoders import VaeEncoder

DOCUMENT = "plan/vae.json"
GATE_VERSION = 1
GATE_CLIPS = 3
GATE_CANDIDATES = 32
"""How many candidates are tried to find that many clips."""
MIN_GAIN = 1.2
"""How much faster than fp32 a mode must be to be worth its error."""
_MAX_BYTES = 2**20

Mode = Literal["fp32", "bf16", "fp16"]


class EncoderDevice(NamedTuple):
    """What the choice needs to know of a device."""

    name: str
    kind: str
    """`cpu` or `cuda`."""
    capability: tuple[int, int] | None = None
    """Of a GPU: (7, 0) is a V100."""


class ModeFigures(Config):
    """One precision mode on the clips of the gate."""

    mode: Mode
    seconds: float
    """A clip, on average."""
    error: float | None
    """Largest over the clips of |z − z_fp32| / |z_fp32| (root mean squares of normalised latents); None: not finite."""


class VaePrecision(Config):
    """The resolved mode."""

    gate_version: int = GATE_VERSION
    mode: Mode
    reason: str
    device: str
    tolerance: float
    num_clips: int
    """Clips and bucket sizes that were compared."""
    figures: tuple[ModeFigures, ...] = ()


def fast_modes(device: EncoderDevice) -> tuple[tuple[Mode, ...], str]:
    """The 16-bit modes worth measuring on a device; where there is none, why."""
    if device.capability is None:
        return (), f"16 bits make no VAE faster on a {device.kind}"
    if device.capability >= (8, 0):
        return ("fp16", "bf16"), ""
    if device.capability >= (7, 0):  # V100, T4: bf16 is emulated there, and slower than fp32
        return ("fp16",), ""
    return (), f"compute capability {device.capability[0]}.{device.capability[1]} has no fast 16-bit arithmetic"


def choose_mode(figures: Sequence[ModeFigures], tolerance: float) -> tuple[Mode, str]:
    """The mode of least error among those within the tolerance and faster than fp32, else fp32; and why."""
    (full,) = (each for each in figures if each.mode == "fp32")
    fast = [each for each in figures if each.mode != "fp32"]
    fit = [each for each in fast if each.error is not None and each.error <= tolerance]
    gains = [each for each in fit if each.seconds * MIN_GAIN <= full.seconds]
    if gains:
        best = min(gains, key=lambda each: (each.error, each.seconds))
        return best.mode, f"{_describe(best)} against fp32's {full.seconds:.3g} s; the tolerance is {tolerance:g}"
    tried = "; ".join(_describe(each) for each in fast)
    if fit:
        return "fp32", f"nothing is {MIN_GAIN:g} times as fast as its {full.seconds:.3g} s: {tried}"
    return "fp32", f"no 16-bit mode is within the tolerance {tolerance:g}: {tried}"


def _describe(figures: ModeFigures) -> str:
    error = "values that are not finite" if figures.error is None else f"error {figures.error:.2g}"
    return f"{figures.mode}: {error}, {figures.seconds:.3g} s a clip"


def measure_mode(mode: Mode, vae: VaeEncoder, clips: Sequence[np.ndarray], references: list[np.ndarray]) -> ModeFigures:
    """Encode the gate's clips (uint8 T×H×W×3) in one mode. `references`: fp32's latents, filled by the fp32 call."""
    import time

    vae.encode(clips[0])  # the first run loads kernels
    errors: list[float | None] = []
    seconds = 0.0
    for place, frames_THWC in enumerate(clips):
        start = time.perf_counter()
        latent_CTHW = vae.encode(frames_THWC)
        seconds += time.perf_counter() - start
        if mode == "fp32":
            references.append(latent_CTHW)
        errors.append(relative_error(latent_CTHW, references[place]))
    worst = None if any(error is None for error in errors) else max(error for error in errors if error is not None)
    return ModeFigures(mode=mode, seconds=seconds / len(clips), error=worst)


def relative_error(latent: np.ndarray, reference: np.ndarray) -> float | None:
    """Root mean square of the difference over that of the reference; None where either is not finite."""
    if not (np.isfinite(latent).all() and np.isfinite(reference).all()):
        return None
    difference = latent.astype(np.float64) - reference
    return float(np.sqrt(np.mean(difference**2) / np.mean(reference.astype(np.float64) ** 2)))


def measure_modes(
    device: EncoderDevice, clips: Sequence[np.ndarray], load: Callable[[Mode], VaeEncoder], tolerance: float
) -> VaePrecision:
    """Choose the mode for a device. `load` gives the encoder in a mode; each is freed before the next is loaded."""
    modes, why_none = fast_modes(device)
    figures: list[ModeFigures] = []
    mode: Mode = "fp32"
    if not modes:
        reason = why_none
    elif not clips:
        reason = f"none of the plan's first {GATE_CANDIDATES} clips could be decoded to measure 16-bit modes on"
    else:
        references: list[np.ndarray] = []
        for tried in ("fp32", *modes):
            figures.append(measure_mode(tried, load(tried), clips, references))
        mode, reason = choose_mode(figures, tolerance)
    return VaePrecision(
        mode=mode, reason=reason, device=device.name, tolerance=tolerance, num_clips=len(clips), figures=tuple(figures)
    )


def measure_here(config: PrepConfig) -> VaePrecision:
    """Choose the mode on this machine's encoder device, with clips of the plan. Raises UserError."""
    from preprocess.encoders.encoders import devices_of, find_device, load_vae_encoder

    encoders = config.encoders.model_copy(update={"device": devices_of(config)[0]})
    device = encoder_device(find_device(encoders.device))
    clips = list(gate_clips(config)) if fast_modes(device)[0] else []

    def load(mode: Mode) -> VaeEncoder:
        return load_vae_encoder(encoders.model_copy(update={"vae_precision": mode}))

    return measure_modes(device, clips, load, encoders.vae_tolerance)


def measure_apart(config: PrepConfig) -> VaePrecision:
    """`measure_here` where the encoding will be done: a Ray worker's machine, or a process that ends and so gives a
    GPU's memory back."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from preprocess.encoders.encoders import devices_of

    if config.engine.kind == "ray":
        from preprocess.build.ray_engine import run_on_worker

        return run_on_worker(config, measure_here)
    if not any(device.startswith("cuda") for device in devices_of(config)):
        return measure_here(config)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_here, config).result()


def encoder_device(device: Any) -> EncoderDevice:
    """The facts of a torch device."""
    import torch

    if device.type != "cuda":
        return EncoderDevice(device.type, device.type)
    return EncoderDevice(torch.cuda.get_device_name(device), "cuda", torch.cuda.get_device_capability(device))


def gate_clips(config: PrepConfig) -> Iterator[np.ndarray]:
    """Windows of the plan's first clips that decode, and one of them at every bucket size that none of them has."""
    import threading

    from preprocess.build.clip import Preparer
    from preprocess.build.scratch import scratch_folder
    from preprocess.encoders.encoders import load_tokenizer
    from preprocess.fetch.fetcher import Fetcher
    from preprocess.plan.plan import open_plan
    from shards.storage import open_storage

    found: list[np.ndarray] = []
    with (
        scratch_folder(config.output, on_this_machine=True) as scratch,
        Fetcher(config.fetch, config.corpus, scratch, threading.Event()) as fetcher,
    ):
        preparer = Preparer(config, fetcher, load_tokenizer(config.encoders).count, scratch)
        for candidate in islice(open_plan(open_storage(config.output)).candidates(), GATE_CANDIDATES):
            prepared = preparer.decode(preparer.fetch(candidate), lambda num_bytes: None)
            found += [each.frames_THWC for each in prepared.windows if each.frames_THWC is not None]
            if len(found) >= GATE_CLIPS:
                break
    yield from found[:GATE_CLIPS]
    seen = {frames.shape[1:3] for frames in found[:GATE_CLIPS]}
    for size in config.buckets.sizes:
        if found and (size.height, size.width) not in seen:
            yield resized(found[0], size.height, size.width)


def resized(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames at another size by the nearest pixel: pictures, at a shape that kernels are to be tried at."""
    rows = np.arange(height) * frames_THWC.shape[1] // height
    columns = np.arange(width) * frames_THWC.shape[2] // width
    return np.ascontiguousarray(frames_THWC[:, rows][:, :, columns])


def find_precision(storage: Storage) -> VaePrecision | None:
    """What was resolved; None where nothing was. Raises ShardDamage."""
    if not storage.exists(DOCUMENT):
        return None
    file = storage.url(DOCUMENT)
    body = open_document(storage.get(DOCUMENT, _MAX_BYTES), file)
    if body.get("gate_version") != GATE_VERSION:
        raise UserError(f"{file}: version {body.get('gate_version')!r}", expected=str(GATE_VERSION))
    try:
        return validate_config(VaePrecision, body, origin=file)
    except UserError as error:
        raise ShardDamage(file, error.problem) from None


def settle_precision(storage: Storage, config: PrepConfig, measure: Callable[[PrepConfig], VaePrecision]) -> PrepConfig:
    """The config with `auto` replaced by what was resolved, or by what `measure` finds now, which is recorded.

    Latents that are there already decide it too: what was begun in a mode is continued in it.
    """
    if config.encoders.vae_precision != "auto":
        return config
    mode = _mode_of_latents(storage)
    if mode is None:
        settled = find_precision(storage)
        if settled is None:
            storage.put(DOCUMENT, seal_document(measure(config).model_dump(mode="json"), indent=1), if_absent=True)
            settled = find_precision(storage)  # another process may have been first: its result counts
        if settled is None:
            raise RuntimeError(f"{storage.url(DOCUMENT)} is not there after it was written")
        mode = settled.mode
        LOG.info("encoders.vae_precision: auto is %s on %s: %s", mode, settled.device, settled.reason)
    return config.model_copy(update={"encoders": config.encoders.model_copy(update={"vae_precision": mode})})


def _mode_of_latents(storage: Storage) -> Mode | None:
    from preprocess.build.dataset_info import find_info

    info = find_info(storage)
    mode: Mode | None = info.identity["vae"]["precision"] if info is not None else None
    return mode
