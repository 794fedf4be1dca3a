"""GPUs by name: what they compute, hold and move. Importing it imports no torch.

Peaks are dense tensor-core figures of NVIDIA's data sheets, in the precision that `precision: auto` takes: fp16 on a
V100, bf16 elsewhere. Bandwidths are what collectives are assumed to reach; none was measured.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from shards.errors import UserError

GIB = 2**30


class Gpu(NamedTuple):
    """One kind of GPU."""

    name: str
    peak_tflops: float
    """Dense 16-bit tensor-core peak, 10¹² FLOP/s."""
    memory_gib: float
    """What the driver offers."""
    link_gb_per_second: float
    """Collective bandwidth a GPU between the GPUs of one machine, 10⁹ bytes/s."""
    network_gb_per_second: float
    """The same where it spans machines: with H100 8 × 400 Gb/s a machine, A100 8 × 200, V100 SXM 4 × 100, cards on
    PCIe 25; a network of another speed moves it in proportion."""
    efficiency: float
    """Share of the peak, of executed FLOPs, that a plan expects of training: an estimate until it is measured."""
    precision: str
    """bf16, or fp16 where the chip has no bf16."""
    encode_seconds: float
    """Stage 1: seconds of VAE encoding for a clip of 1280 × 704 × 49, an estimate (performance.md, section 2)."""
    note: str = ""


GPUS = {
    "v100-32gb": Gpu(
        "v100-32gb", 112.0, 31.7, 11.0, 2.6, 0.40, "fp16", 14.0, "PCIe; fp32 encoding, which is safe there"
    ),
    "v100-sxm": Gpu("v100-sxm", 125.0, 31.7, 45.0, 41.0, 0.40, "fp16", 13.0, "NVLink, 32 GB; fp32 encoding"),
    "a100-40gb": Gpu("a100-40gb", 312.0, 39.4, 230.0, 165.0, 0.50, "bf16", 1.2, "SXM"),
    "a100-80gb": Gpu("a100-80gb", 312.0, 79.2, 230.0, 165.0, 0.50, "bf16", 1.2, "SXM"),
    "h100": Gpu("h100", 989.0, 79.1, 360.0, 330.0, 0.50, "bf16", 0.4, "SXM, 80 GB"),
    "h200": Gpu("h200", 989.0, 139.8, 360.0, 330.0, 0.50, "bf16", 0.4, "SXM"),
    "rtx4090": Gpu("rtx4090", 165.0, 23.5, 11.0, 2.6, 0.50, "bf16", 2.5, "PCIe, no peer-to-peer; fp32 accumulation"),
}
# Parts of the names that drivers give, the more particular first.
_DRIVER_NAMES = {
    "V100-PCIE": "v100-32gb",
    "V100S": "v100-32gb",
    "V100": "v100-sxm",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-PCIE-40GB": "a100-40gb",
    "A100": "a100-80gb",
    "H200": "h200",
    "H100": "h100",
    "RTX 4090": "rtx4090",
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name here, or this machine's for `auto`. Raises UserError for an unknown one."""
    if name == "auto":
        return detect_gpu()
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.4)
    raise UserError(
        f"--gpu {name}: not known" + (f"; did you mean {near[0]}?" if near else ""),
        expected=f"auto, {', '.join(GPUS)}",
    )


def detect_gpu() -> Gpu:
    """This machine's first GPU. Raises UserError where there is none, or none of the known ones."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("--gpu auto: torch sees no GPU on this machine", fix=f"name one: {', '.join(GPUS)}")
    driver = torch.cuda.get_device_name(0)
    gpu = by_driver_name(driver)
    if gpu is None:
        raise UserError(f"--gpu auto: {driver} is not a known GPU", fix=f"name the nearest: {', '.join(GPUS)}")
    return gpu


def by_driver_name(driver: str) -> Gpu | None:
    """The GPU that a driver's name means; None for one whose peak is not known here."""
    for part, name in _DRIVER_NAMES.items():
        if part in driver:
            return GPUS[name]
    return None
