"""The device of this process: which one, what it is, how much memory it has."""

from __future__ import annotations

from typing import NamedTuple

import torch

from shards.errors import UserError


class DeviceInfo(NamedTuple):
    """What the choice of precision and kernel depends on; made by hand in tests."""

    kind: str
    """`cpu` or `cuda`."""
    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None on a CPU."""
    cudnn: int = 0
    """Version of cuDNN, 91500 for 9.15.0; 0: none."""


def device_info(device: torch.device | str) -> DeviceInfo:
    """Name and compute capability of a device."""
    device = torch.device(device)
    if device.type != "cuda":
        return DeviceInfo(device.type, device.type, None)
    cudnn = torch.backends.cudnn.version() or 0
    return DeviceInfo("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), cudnn)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is CUDA where there is some. One of several processes takes the GPU of its number on the machine. A
    GPU becomes the process's current device.

    Raises UserError for a device that is not there, or one GPU for all processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"precision.device: {name!r} is not a device", expected="auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and local_rank is not None:
        if device.index is not None:
            raise UserError(f"precision.device: {name} for all processes of a machine", expected="auto, cpu or cuda")
        device = torch.device("cuda", local_rank)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"precision.device: {name} cannot train here", expected="auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"precision.device: {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices",
            fix="`wantrain doctor` says why; precision.device=cpu trains without one",
        )
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        use_device(device)
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU the process's own, and its matrix products sum in float32.

    Without the first, libraries open a context on GPU 0 for every rank. Without the second cuBLAS may add the parts of
    a product in 16 bits: LoRA gradients sum over thousands of tokens under a loss scale of 65,536.
    """
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
