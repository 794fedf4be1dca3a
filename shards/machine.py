"""Checks that both `doctor` commands share: Python, torch, GPUs, disk. Importing it imports no torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from shards.errors import UserError

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 9)
MIN_DISK_GIB = 5.0
TORCH_FOR_VOLTA = (
    "pip install 'torch>=2.9,<2.15' from the index of CUDA 12.6 builds (cu126): the last ones with sm_70 kernels"
)
NO_GPU = "none: no NVIDIA driver"


class Finding(NamedTuple):
    """One row of the table."""

    subject: str
    status: Literal["ok", "note", "problem"]
    """A note is not an error: what it speaks of is not needed, or cannot be known here."""
    found: str
    fix: str = ""


def usable_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those it may run on, or what its container's share of time comes to."""
    cores = len(os.sched_getaffinity(0))
    try:  # cgroup v2: "max 100000", or microseconds of a period, such as "250000 100000"
        quota, period = limit.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def check_python(version: tuple[int, ...]) -> Finding:
    """Python is new enough."""
    found = ".".join(map(str, version))
    if version < MIN_PYTHON:
        return Finding("python", "problem", found, "install Python 3.11 or newer and create the environment again")
    return Finding("python", "ok", found)


def check_torch() -> Iterator[Finding]:
    """torch is there, new enough, and built for every card that is there."""
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "problem", "not installed", "pip install -e '.[train]' -c constraints.txt")
        return
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"{torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU only'}"
    if version < MIN_TORCH:
        yield Finding("torch", "problem", build, "pip install 'torch>=2.9': FSDP2 of older ones trains wrong on gloo")
    else:
        yield Finding("torch", "ok", build)
    if not torch.cuda.is_available():
        yield check_no_gpu(torch.version.cuda, Path("/proc/driver/nvidia/version").exists())
        return
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        yield check_card(f"gpu {index}", name, capability, torch.cuda.get_arch_list(), torch.version.cuda)


def check_no_gpu(cuda_build: str | None, driver: bool) -> Finding:
    """Why there is no CUDA device: no card, a CPU build, or a driver that is too old."""
    if not driver:
        return Finding(
            "gpu", "note", NO_GPU, "all of it runs on the CPU, slowly; a GPU needs its driver and a CUDA build of torch"
        )
    if cuda_build is None:
        fix = "install a CUDA build of torch; for V100: " + TORCH_FOR_VOLTA
        return Finding("gpu", "problem", "a driver is there, torch is built for the CPU only", fix)
    return Finding(
        "gpu",
        "problem",
        f"a driver is there, torch (CUDA {cuda_build}) sees no card",
        "nvidia-smi shows whether the card answers; the driver must be as new as torch's CUDA",
    )


def check_card(
    subject: str, name: str, capability: tuple[int, int], architectures: list[str], cuda_build: str | None
) -> Finding:
    """Whether torch's kernels run on a card: a binary of its major version up to its minor, or PTX up to it."""
    major, minor = capability
    found = f"{name}, sm_{major}{minor}"
    numbers = {kind: _numbers(architectures, kind) for kind in ("sm_", "compute_")}
    binary = any(number // 10 == major and number % 10 <= minor for number in numbers["sm_"])
    portable = any(number <= 10 * major + minor for number in numbers["compute_"])
    if binary or portable:
        kind = "bf16" if capability >= (8, 0) else "fp16 with loss scaling"
        return Finding(subject, "ok", f"{found}, {kind}")
    fix = "install a torch build that names this architecture"
    if capability < (7, 5):
        fix = TORCH_FOR_VOLTA
    have = f"torch for CUDA {cuda_build} has kernels for {', '.join(architectures) or 'no card'}"
    return Finding(subject, "problem", f"{found}: {have}", fix)


def _numbers(architectures: list[str], kind: str) -> list[int]:
    digits = (name.removeprefix(kind).rstrip("af") for name in architectures if name.startswith(kind))
    return [int(text) for text in digits if text.isdigit()]


def check_disk(output: Path) -> Finding:
    """Room for checkpoints where the run will lie, and the right to write there."""
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 2**30
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Finding("output", "problem", f"{place} cannot be written to", "choose another output")
    if free < MIN_DISK_GIB:
        return Finding("output", "problem", f"{free:.1f} GiB free in {place}", "free some, or choose another output")
    return Finding("output", "ok", f"{free:,.0f} GiB free in {place}")


def guarded(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check whose UserError is the finding."""
    try:
        yield from check()
    except UserError as error:
        expected = f" (expected: {error.expected})" if error.expected else ""
        yield Finding(subject, "problem", error.problem + expected, error.fix or "")


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether no finding is a problem."""
    return all(finding.status != "problem" for finding in findings)


def print_findings(findings: Sequence[Finding]) -> None:
    """The doctor's table, and its verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("what", "status", "found", "to fix"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(*finding)
    Console(width=None if Console().is_terminal else 160).print(table)
    problems = sum(finding.status == "problem" for finding in findings)
    verdict = f"{problems} problems" if problems else "nothing is wrong"
    if not problems and any(finding.found == NO_GPU for finding in findings):
        verdict = "no problem on the CPU; this machine has no GPU, so nothing is known of one"
    print(verdict)
