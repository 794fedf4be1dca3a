"""The doctor's findings on machines that are not at hand: facts in, a row out."""

import socket
from pathlib import Path

import pytest
from train_runs import make_config

from shards.machine import (
    Finding,
    check_card,
    check_disk,
    check_no_gpu,
    check_python,
    is_healthy,
    print_findings,
)
from train.doctor.machine import check_shared_memory, examine
from train.doctor.ranks import check_backends, check_batch, check_cards, check_host_name, check_master

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
    assert (finding.fix != "") == (status == "problem")


def test_a_v100_is_told_which_build_to_install():
    finding = check_card("gpu 0", "Tesla V100-PCIE-32GB", (7, 0), CUDA_130, "13.0")
    assert "sm_70" in finding.found and "CUDA 13.0" in finding.found
    assert "cu126" in finding.fix and "torch>=2.9,<2.15" in finding.fix  # 2.15 is expected to drop CUDA 12.6
    assert "fp16" in check_card("gpu 0", "Tesla V100-PCIE-32GB", (7, 0), CUDA_126, "12.6").found


def test_why_there_is_no_gpu():
    assert check_no_gpu(None, driver=False).status == "note"
    assert "CPU only" in check_no_gpu(None, driver=True).found
    assert check_no_gpu("13.0", driver=True).status == "problem"


def test_a_machine_without_a_gpu_is_said_to_have_none(capsys):
    """Rather than that nothing is wrong: of a GPU nothing is known there."""
    none, fine = check_no_gpu(None, driver=False), Finding("gpu 0", "ok", "NVIDIA H200, sm_90, bf16")
    print_findings([none])
    said = capsys.readouterr().out
    assert "this machine has no GPU" in said and "nothing is wrong" not in said
    print_findings([fine])
    assert "nothing is wrong" in capsys.readouterr().out
    print_findings([none, Finding("torch", "problem", "not installed")])
    assert "1 problems" in capsys.readouterr().out


def test_python_memory_and_disk(tmp_path):
    assert check_python((3, 10, 1)).status == "problem" and check_python((3, 13, 0)).status == "ok"
    assert check_shared_memory(tmp_path / "none").status == "note"
    assert check_disk(tmp_path / "a/b/c").subject == "output"
    (tmp_path / "file").write_text("")
    assert check_disk(tmp_path / "file" / "run").status == "problem"
    assert check_disk(Path("/proc/nothing/run")).status == "problem"


def test_what_several_processes_need():
    assert check_backends(True, False, 1).status == "ok"  # nothing to exchange between GPUs
    assert check_backends(True, False, 2).status == "problem" and check_backends(False, True, 2).status == "problem"
    assert check_host_name("localhost").status == "ok"
    assert "GLOO_SOCKET_IFNAME" in check_host_name("no-such-host.invalid").fix
    assert check_cards(["V100", "V100"], []).status == "ok"
    assert "2 pairs without peer access" in check_cards(["V100", "V100"], [(0, 1), (1, 0)]).found
    assert "2 kinds" in check_cards(["V100", "A100"], []).found
    config = make_config("shards", "run", data__global_batch=4, data__micro_batch=1)
    assert check_batch(config, 4).found == "1 of 4 samples for each share of 4 GPUs"
    assert "does not divide by 3" in check_batch(config, 3).found


def test_where_the_ranks_would_meet_is_tried():
    assert "none set" in check_master({}).found
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        assert check_master(place).status == "problem" and "is taken" in check_master(place).found
    assert check_master(place).status == "ok"
    assert "no port" in check_master(place | {"MASTER_PORT": "many"}).found
    assert "no address" in check_master(place | {"MASTER_ADDR": "no-such-host.invalid"}).found
    assert check_master(place | {"MASTER_ADDR": "192.0.2.1"}).status == "note"


def test_without_a_config_the_machine_alone_is_examined():
    findings = list(examine(None))
    assert {"python", "torch", "ffmpeg", "bitsandbytes", "shared memory"} <= {finding.subject for finding in findings}
    assert not is_healthy([Finding("x", "problem", "y")]) and is_healthy([Finding("x", "note", "y")])
