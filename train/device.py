"""The device of this process: its choice, its properties, its free memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from shards.errors import UserError
from shards.gpus import CONTEXT_BYTES, GIB


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


def available_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that this process can use: what is free, what it holds, and its own context; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + torch.cuda.memory_reserved(device) + CONTEXT_BYTES)


@contextmanager
def explained_out_of_memory(device: torch.device, settings: Mapping[str, Any]) -> Iterator[None]:
    """Raise UserError in place of torch's OutOfMemoryError: by how much, who holds what, and what to set.

    Args:
        settings: names of settings that decide memory, such as `checkpointing.policy`, and their present values.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        wanted = f"{asked[1]} more were needed" if asked else "more was needed"
        problem, fixes = f"{device} ran out of memory: {wanted}", []
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            own = torch.cuda.memory_reserved(device)
            others = max(0, total - free - own - CONTEXT_BYTES)
            problem += f", {free / GIB:.2f} GiB of {total / GIB:.2f} were free; this process holds {own / GIB:.2f}"
            if others > CONTEXT_BYTES:
                fixes.append(f"end the other processes on this GPU: they hold {others / GIB:.2f} GiB")
        if settings["checkpointing.policy"] != "full":
            better = "full" if settings["checkpointing.policy"] == "auto" else "auto"
            fixes.append(f"checkpointing.policy={better} (it is {settings['checkpointing.policy']})")
        if settings["data.micro_batch"] > 1:
            fixes.append(f"data.micro_batch=1 (it is {settings['data.micro_batch']})")
        fixes.append("smaller or shorter buckets; `wantrain plan` shows what fits")
        raise UserError(problem, fix="; ".join(fixes)) from None


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
