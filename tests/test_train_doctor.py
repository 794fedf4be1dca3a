"""The doctor's findings on machines that are not at hand: facts in, a row out."""

from pathlib import Path

import pytest

from train.doctor import (
    Finding,
    check_card,
    check_disk,
    check_no_gpu,
    check_python,
    check_shared_memory,
    examine,
    is_healthy,
)

CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "status"),
    [
        ((7, 0), CUDA_126, "ok"),
        ((7, 0), CUDA_130, "problem"),
        ((7, 5), CUDA_130, "ok"),
        ((8, 9), CUDA_130, "ok"),  # a binary of the same major version runs
        ((9, 0), CUDA_130, "ok"),
        ((10, 0), CUDA_126, "problem"),  # no binary, no PTX
        ((12, 1), ["sm_90", "compute_90"], "ok"),  # PTX is compiled for newer cards
        ((9, 0), ["sm_90a"], "ok"),
    ],
)
def test_a_card_needs_kernels_for_its_architecture(capability, architectures, status):
    finding = check_card("gpu 0", "a card", capability, architectures, "13.0")
    assert finding.status == status
    assert (finding.mend != "") == (status == "problem")


def test_a_v100_is_told_which_build_to_install():
    finding = check_card("gpu 0", "Tesla V100-PCIE-32GB", (7, 0), CUDA_130, "13.0")
    assert "sm_70" in finding.found and "CUDA 13.0" in finding.found
    assert "cu126" in finding.mend
    assert "fp16" in check_card("gpu 0", "Tesla V100-PCIE-32GB", (7, 0), CUDA_126, "12.6").found


def test_why_there_is_no_gpu():
    assert check_no_gpu(None, driver=False).status == "note"
    assert "CPU only" in check_no_gpu(None, driver=True).found
    assert check_no_gpu("13.0", driver=True).status == "problem"


def test_python_memory_and_disk(tmp_path):
    assert check_python((3, 10, 1)).status == "problem" and check_python((3, 13, 0)).status == "ok"
    assert check_shared_memory(tmp_path / "none").status == "note"
    assert check_disk(tmp_path / "a/b/c").subject == "output"
    (tmp_path / "file").write_text("")
    assert check_disk(tmp_path / "file" / "run").status == "problem"
    assert check_disk(Path("/proc/nothing/run")).status == "problem"


def test_without_a_config_the_machine_alone_is_examined():
    findings = list(examine(None))
    assert {"python", "torch", "ffmpeg", "bitsandbytes", "shared memory"} <= {finding.subject for finding in findings}
    assert not is_healthy([Finding("x", "problem", "y")]) and is_healthy([Finding("x", "note", "y")])
