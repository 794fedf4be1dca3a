"""GPUs by name, for the estimates of both stages: peak FLOP/s, memory, bandwidth. Importing it imports no torch.

Peaks and memory bandwidths are of NVIDIA's data sheets, dense, in the precision that `precision: auto` takes: fp16 on
V100 and T4, bf16 elsewhere. The rates that are expected of training, of the VAE and of collectives are estimates:
docs/performance.md says which of them were measured.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

from shards.errors import UserError

GIB = 2**30
DAY_SECONDS = 86_400
CONTEXT_BYTES = int(0.75 * 2**30)
"""CUDA context and the libraries' own workspaces: an estimate."""
VaeMode = Literal["fp32", "bf16", "fp16"]


class Gpu(NamedTuple):
    """One kind of GPU."""

    name: str
    peak_tflops: float
    """Dense 16-bit tensor-core peak, 10¹² FLOP/s."""
    memory_gib: float
    """What the driver offers."""
    bandwidth_gb: float
    """Of its own memory, 10⁹ bytes/s."""
    link_gb_per_second: float
    """Collective bandwidth a GPU between the GPUs of one machine, 10⁹ bytes/s."""
    network_gb_per_second: float
    """The same where it spans machines: with H100 8 × 400 Gb/s a machine, A100 8 × 200, V100 SXM 4 × 100, cards on
    PCIe 25; a network of another speed moves it in proportion."""
    gemm_tflops: float
    """Expected of large matrix products."""
    attention_tflops: float
    """Expected of attention's forward pass."""
    attention_backward_tflops: float
    """Expected of attention's backward pass."""
    vae_fp32_tflops: float
    """Expected of the VAE's encoder in fp32, without TF32."""
    vae_fast_tflops: float
    """Expected of it in 16 bits."""
    precision: Literal["bf16", "fp16"] = "bf16"
    """fp16 where the chip has no bf16."""
    note: str = ""
    host_gb: float = 24.0
    """Between the GPU and pinned memory of its host, 10⁹ bytes/s each way: 12 of PCIe 3, 24 of PCIe 4, 50 of PCIe 5, at
    sixteen lanes; an estimate."""

    @property
    def traffic_gb(self) -> float:
        """Expected memory traffic of elementwise operators, 10⁹ bytes/s: mixed dtypes run below the full bandwidth."""
        return (0.72 if self.precision == "fp16" else 0.6) * self.bandwidth_gb

    def encode_seconds(self, mode: VaeMode, tflop: float) -> float:
        """Stage 1: seconds of VAE encoding of so many TFLOP."""
        return tflop / (self.vae_fp32_tflops if mode == "fp32" else self.vae_fast_tflops)


# name, peak, GiB, GB/s of memory, GB/s of link and network, expected TFLOP/s: GEMM, attention forward, backward,
# VAE in fp32 (71 % of the fp32 peak, where 13 to 15 s a clip of 1280×704×49 were found on a V100) and in 16 bits.
_ROWS = (
    Gpu("v100-32gb", 112, 31.7, 900, 11, 2.6, 75, 35, 20, 11.1, 31, "fp16", "PCIe", 12),
    Gpu("v100-16gb", 112, 15.7, 900, 11, 2.6, 75, 35, 20, 11.1, 31, "fp16", "PCIe", 12),
    Gpu("v100-sxm", 125, 31.7, 900, 45, 41, 84, 39, 22, 12, 34, "fp16", "NVLink, 32 GB", 12),
    Gpu("t4", 65, 14.6, 320, 11, 2.6, 25, 12, 7, 4, 10, "fp16", "PCIe, 70 W", 12),
    Gpu("a100-40gb", 312, 39.4, 1555, 230, 165, 240, 200, 160, 13.8, 90, note="SXM"),
    Gpu("a100-80gb", 312, 79.2, 2039, 230, 165, 240, 200, 160, 13.8, 100, note="SXM"),
    Gpu("a10", 125, 22.1, 600, 11, 2.6, 70, 60, 45, 18, 32, note="PCIe, 150 W"),
    Gpu("rtx3060", 25, 11.6, 360, 11, 2.6, 21, 17, 13, 9, 10, note="PCIe, 12 GB; fp32 accumulation"),
    Gpu("rtx4070", 58, 11.6, 504, 11, 2.6, 49, 41, 31, 20, 23, note="PCIe, 12 GB; fp32 accumulation"),
    Gpu("rtx4080", 97, 15.6, 717, 11, 2.6, 82, 70, 55, 34, 38, note="PCIe, 16 GB; fp32 accumulation"),
    Gpu("rtx3090", 71, 23.6, 936, 11, 2.6, 60, 50, 38, 22, 28, note="PCIe; fp32 accumulation"),
    Gpu("rtx4090", 165, 23.5, 1008, 11, 2.6, 140, 120, 95, 58, 62, note="PCIe, no peer-to-peer; fp32 accumulation"),
    Gpu(
        "rtx5090",
        209,
        31.4,
        1792,
        22,
        2.6,
        175,
        140,
        110,
        74,
        90,
        note="PCIe, no peer-to-peer; fp32 accumulation",
        host_gb=50,
    ),
    Gpu("l40s", 362, 44.5, 864, 22, 2.6, 230, 190, 150, 65, 75, note="PCIe"),
    Gpu("h100", 989, 79.1, 3350, 360, 330, 650, 500, 400, 47, 195, note="SXM, 80 GB", host_gb=50),
    Gpu("h200", 989, 139.8, 4800, 360, 330, 650, 500, 400, 47, 210, note="SXM", host_gb=50),
    Gpu("b200", 2250, 178.3, 7700, 700, 330, 1450, 1000, 750, 53, 350, note="SXM", host_gb=50),
)
GPUS = {gpu.name: gpu for gpu in _ROWS}
# Parts of the names that drivers give, the more particular first.
_DRIVER_NAMES = {
    "V100-PCIE-16GB": "v100-16gb",
    "V100-PCIE": "v100-32gb",
    "V100S": "v100-32gb",
    "V100": "v100-sxm",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-PCIE-40GB": "a100-40gb",
    "A100": "a100-80gb",
    "H200": "h200",
    "H100": "h100",
    "B200": "b200",
    "L40S": "l40s",
    "RTX 3060": "rtx3060",
    "RTX 4070": "rtx4070",
    "RTX 4080": "rtx4080",
    "RTX 3090": "rtx3090",
    "RTX 4090": "rtx4090",
    "RTX 5090": "rtx5090",
    "Tesla T4": "t4",
}


def vae_encode_tflop(width: int, height: int, num_frames: int) -> float:
    """10¹² floating-point operations of VAE-encoding one window of 4k+1 frames (2 a multiply-add).

    A first chunk of one frame, 4.2 at 1280×704, then chunks of four, 12.617; both scale with the picture's area. Within
    0.5 % of what FlopCounterMode counts on the published sizes.
    """
    return (4.2 + 12.617 * ((num_frames - 1) // 4)) * width * height / (1280 * 704)


def find_gpu(
    name: str = "auto",
    memory_gib: float | None = None,
    tflops: float | None = None,
    bandwidth_gb: float | None = None,
) -> Gpu:
    """A GPU by its name here, this machine's for `auto`, or one described by hand.

    Args:
        memory_gib: instead of the named card's; with `tflops` and `bandwidth_gb` no name is needed.
        tflops: dense 16-bit peak, 10¹² FLOP/s; the expected rates are scaled with it.
        bandwidth_gb: of its memory, 10⁹ bytes/s.
    Raises: UserError for an unknown name, and where a card by hand lacks a figure.
    """
    by_hand = (memory_gib, tflops, bandwidth_gb)
    if name == "auto" and any(by_hand):
        if not all(by_hand):
            raise UserError(
                "a GPU by hand needs all of --memory-gib, --tflops and --bandwidth",
                fix="give the three, or --gpu NAME and what differs from that card",
            )
        gpu = GPUS["a100-80gb"]._replace(name="by hand", note="rates in proportion to an A100's")
    else:
        gpu = detect_gpu() if name == "auto" else _by_name(name)
    if tflops:
        share = tflops / gpu.peak_tflops
        rates = ("gemm_tflops", "attention_tflops", "attention_backward_tflops", "vae_fp32_tflops", "vae_fast_tflops")
        gpu = gpu._replace(peak_tflops=tflops, **{rate: getattr(gpu, rate) * share for rate in rates})
    if memory_gib:
        gpu = gpu._replace(memory_gib=memory_gib)
    return gpu._replace(bandwidth_gb=bandwidth_gb) if bandwidth_gb else gpu


def _by_name(name: str) -> Gpu:
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.4)
    raise UserError(
        f"--gpu {name}: not known" + (f"; did you mean {near[0]}?" if near else ""),
        expected=f"auto, {', '.join(GPUS)}",
        fix="name one of these; the `plan` commands also take --memory-gib, --tflops and --bandwidth of another GPU",
    )


def detect_gpu() -> Gpu:
    """This machine's first GPU. Raises UserError where there is none, or none of the known ones."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("--gpu auto: torch sees no GPU on this machine", fix=f"name one: {', '.join(GPUS)}")
    driver = torch.cuda.get_device_name(0)
    gpu = by_driver_name(driver)
    if gpu is None:
        raise UserError(
            f"--gpu auto: {driver} is not a known GPU",
            fix=f"describe it by --memory-gib, --tflops and --bandwidth, or name the nearest: {', '.join(GPUS)}",
        )
    return gpu


def by_driver_name(driver: str) -> Gpu | None:
    """The GPU that a driver's name means; None for one whose peak is not known here."""
    if driver.endswith(" A10"):  # A10G, A100 and A10M are other cards
        return GPUS["a10"]
    for part, name in _DRIVER_NAMES.items():
        if part in driver:
            return GPUS[name]
    return None
