"""What a forecast is for, and its constants: seconds a clip, window, megapixel and caption, assumed or measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from preprocess.config import PrepConfig
from preprocess.encoders.encoders import devices_of
from shards.errors import UserError
from shards.gpus import Gpu
from shards.machine import usable_cores

PROBE_SECONDS = 0.5
DECODE_SECONDS = 0.35
"""Of a core: to look into a clip, and to decode one window of it (docs/performance.md)."""
REQUEST_SECONDS = 0.1
CONNECTION_MBIT = 50.0
"""Until a clip's first byte comes, and what one connection brings, where no clip was fetched to see."""


class Hardware(NamedTuple):
    """What the forecast is for."""

    gpu: Gpu | None
    """None: this machine, whose encoders were measured."""
    num_gpus: int
    """That encode: a worker each."""
    network_mbit: float
    """Download, 10⁶ bits a second in all."""
    num_cores: int
    """For decoding, in all."""
    num_text_gpus: int | None = None
    """That embed captions; None: all."""
    is_here: bool = False
    """The GPU is this machine's: what `--probe` measured of its encoders counts."""


def find_hardware(
    config: PrepConfig, gpu: Gpu | None, is_here: bool, num_gpus: int | None, num_cores: int | None, mbit: float
) -> Hardware:
    """The hardware that a build of this config uses; what is not asked for is the config's, then this machine's.

    Raises UserError where the config fixes another number of devices than is asked for.
    """
    engine = config.engine
    fixed = engine.devices or ((config.encoders.device,) if config.encoders.device != "auto" else ())
    if engine.kind == "ray":
        number = min(num_gpus or engine.ray.num_workers or 1, engine.ray.num_workers or 10**9)
        # Captions are embedded by the driver's machine.
        num_text_gpus = len(engine.devices) or (len(devices_of(config)) if is_here else 1)
        return Hardware(gpu, number, mbit, num_cores or 4 * number, num_text_gpus, is_here)
    if fixed and num_gpus is not None and num_gpus != len(fixed):
        raise UserError(
            f"--gpus {num_gpus}, but the config encodes on {', '.join(fixed)}",
            fix="leave --gpus out, or plan with -o 'engine.devices=[]' -o encoders.device=auto",
        )
    number = len(fixed) or num_gpus or (len(devices_of(config)) if is_here else 1)
    return Hardware(gpu, number, mbit, num_cores or (usable_cores() if is_here else 4 * number), is_here=is_here)


class Costs(NamedTuple):
    """What one thing takes, in seconds: assumed, or as `--probe` measured it. None: by the GPU's table, by bytes."""

    probe_seconds: float = PROBE_SECONDS
    decode_seconds: float = DECODE_SECONDS
    fetch_seconds: float | None = None
    """Of a clip on one connection."""
    encode_seconds: float | None = None
    """Of a megapixel: frames × height × width."""
    text_seconds: float | None = None
    """Of a caption."""


def find_costs(counts: Mapping[str, Any], hardware: Hardware) -> Costs:
    """The constants, measured ones where the probe has them; of the encoders only in a forecast for this machine."""
    measured = counts["probed"].get("measured", {}) if counts.get("probed") else {}
    keys = {
        "probe_seconds": ("decode", "probe_seconds_a_clip"),
        "decode_seconds": ("decode", "decode_seconds_a_window"),
        "fetch_seconds": ("fetch", "seconds_a_clip"),
        "encode_seconds": ("encode", "seconds_a_megapixel"),
        "text_seconds": ("text", "seconds_a_caption"),
    }
    if not hardware.is_here:
        del keys["encode_seconds"], keys["text_seconds"]
    found = {name: measured.get(part, {}).get(key) for name, (part, key) in keys.items()}
    if "not_measured" in measured.get("fetch", {}):
        found["fetch_seconds"] = 0.0  # the clips are here
    return Costs(**{name: value for name, value in found.items() if value is not None})
