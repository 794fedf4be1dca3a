"""Files of a run: sealed checkpoints, one writer, and what a disk that refuses looks like."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from train_runs import make_config, read_metrics

from shards.config import dump_config
from shards.errors import SystemFailure, UserError
from shards.files.tensor_files import write_latent
from shards.files.write_file import TEMPORARY, write_file, write_text
from train.checkpoint import cut_back, find_checkpoints, load_tensors, read_checkpoint, write_tensors
from train.cli.main import main
from train.launch.launch import own_command
from train.loop import fit


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("sealed") / "run"
    fit(make_config(tiny_shards, folder))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path: Path, place: int = -9) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["lora.safetensors", "optimizer.safetensors", "dataset-pin.json", "state.json"])
def test_a_flipped_bit_is_refused_by_name_and_the_newest_good_one_is_named(tiny_shards, run, name):
    newest, older = run / "checkpoints/step-0000010", run / "checkpoints/step-0000005"
    flip(newest / name, -20 if name == "dataset-pin.json" else len((newest / name).read_bytes()) // 2)
    with pytest.raises(UserError, match=name) as caught:
        fit(make_config(tiny_shards, run, max_steps=12))
    assert f"--resume {older}" in str(caught.value)
    result = CliRunner().invoke(main, ["verify", str(run), "--json"])
    found = {Path(one["path"]).name: one["state"] for one in json.loads(result.stdout)}
    assert result.exit_code == 1
    lines = ("metrics.jsonl", "held_out.jsonl", "events.jsonl")
    assert found == {"step-0000005": "good", "step-0000010": "damaged"} | dict.fromkeys(lines, "good")
    assert fit(make_config(tiny_shards, run, max_steps=12), resume=str(older)).step == 12
    assert CliRunner().invoke(main, ["verify", str(run)]).exit_code == 0
    flip(older / "lora.safetensors")
    with pytest.raises(UserError, match="step-0000005: lora"):
        fit(make_config(tiny_shards, run, max_steps=12), resume=str(older))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["state.json", "lora.safetensors", "dataset-pin.json"])
def test_what_is_no_file_in_a_checkpoint_is_named_and_not_waited_for(run, name):
    newest = find_checkpoints(run / "checkpoints")[-1]
    (newest / name).unlink()
    os.mkfifo(newest / name)
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 1 and name in result.output and "not a regular file" in result.output
    result = CliRunner().invoke(main, ["export", str(newest), str(run / "out.safetensors")])
    assert result.exit_code in ((0,) if name == "dataset-pin.json" else (2, 75)), result.output


def test_a_checkpoint_under_the_name_of_another_step_is_named(tiny_shards, run):
    older, newest = find_checkpoints(run / "checkpoints")
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    with pytest.raises(UserError, match=r"step-0000010: state.json is of step 5") as caught:
        fit(make_config(tiny_shards, run, max_steps=12))
    assert str(older) in str(caught.value)


def test_a_state_with_digests_and_without_its_seal_was_edited(tiny_shards, run):
    path = find_checkpoints(run / "checkpoints")[-1] / "state.json"
    values = json.loads(path.read_text())
    del values["seal"]
    path.write_text(json.dumps({**values, "step": values["step"] + 1}, indent=1) + "\n")
    with pytest.raises(UserError, match=r"state.json is damaged.*without a seal"):
        fit(make_config(tiny_shards, run, max_steps=12))


@pytest.mark.parametrize("kind", ["file", "looping link"])
def test_checkpoints_that_are_no_folder_are_named_before_the_first_step(tiny_shards, tmp_path, kind):
    place = tmp_path / "run/checkpoints"
    place.parent.mkdir()
    place.write_text("x") if kind == "file" else place.symlink_to(place)
    with pytest.raises(UserError, match="checkpoints: not a folder"):
        fit(make_config(tiny_shards, place.parent))
    assert not (place.parent / "metrics.jsonl").exists() or not (place.parent / "metrics.jsonl").read_text()


def test_a_checkpoint_without_digests_is_read_and_said_so(tiny_shards, run):
    """As earlier versions wrote them."""
    for path in find_checkpoints(run / "checkpoints"):
        values = json.loads((path / "state.json").read_text())
        del values["seal"], values["files"]
        (path / "state.json").write_text(json.dumps(values, indent=1) + "\n")
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 0 and result.stdout.count("unverified  /") == 2
    fit(make_config(tiny_shards, run, max_steps=12))
    assert "without digests" in (run / "logs/rank-0.log").read_text()
    assert read_checkpoint(run / "checkpoints/step-0000012").files.keys() == {
        "lora.safetensors", "optimizer.safetensors", "dataset-pin.json"
    }  # fmt: skip


def test_unfinished_is_told_from_damaged(run):
    (run / "checkpoints/.writing-step-0000015").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 0 and result.stdout.count("unfinished  /") == 2
    assert CliRunner().invoke(main, ["verify", str(run.parent)]).exit_code == 2


def test_a_garbage_line_in_the_metrics_is_reported_and_removed(tiny_shards, run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "\x00\x00 garbage\n", *lines[3:]]))
    fit(make_config(tiny_shards, run, max_steps=12))
    assert "metrics.jsonl, line 4 is no record of a step" in (run / "logs/rank-0.log").read_text()
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 13))


@pytest.mark.parametrize(
    "garbage",
    [b"a\rb", b"[" * 200_000, b"null", b"\xff", b"\x85", b"", b'{"step": "3"}', b'{"step": NaN}', b'{"step": 1e999}',
     b'{"step": 9}'],
)  # fmt: skip
def test_a_line_that_is_no_record_costs_no_other_line(tmp_path, garbage):
    """Nor one of a step that the resume replaces; a last line without its end goes too."""
    steps = [b'{"step": %d}' % number for number in range(1, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*steps[:2], garbage, *steps[2:], b'{"step": 1']))
    cut_back(path, 4)
    assert path.read_bytes() == b"".join(step + b"\n" for step in steps[:4])


def test_the_same_tensors_make_the_bytes_of_the_library(tmp_path):
    """But for the metadata, which it writes in an order that changes from run to run."""
    kinds = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    tensors = {
        f'b{shape}.{place % 3}.{kind} é"': torch.ones(shape).to(kind)
        for place, kind in enumerate(kinds)
        for shape in ((3, 5), (), (0, 4), (7,))
    }
    tensors["transposed"] = torch.arange(6.0).view(2, 3).T
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_tensors(tmp_path / "one", tensors, {"b": "2", "a": "1", "c": "3"})
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())), {"c": "3", "a": "1", "b": "2"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_identical_runs_export_identical_files(tiny_shards, tmp_path):
    exports = [fit(make_config(tiny_shards, tmp_path / name / "run", max_steps=2)).export for name in ("a", "b", "c")]
    assert len({path.read_bytes() for path in exports}) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_mode_that_the_umask_leaves(tiny_shards, tmp_path, umask):
    import numpy as np

    before = os.umask(umask)
    try:
        fit(make_config(tiny_shards, tmp_path / "run", max_steps=1))
        write_latent(tmp_path / "run/latent.safetensors", np.zeros((1, 1, 1, 1)), {})
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_a_full_disk_is_one_line_a_code_to_retry_and_no_leftover(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    (tmp_path / f"{TEMPORARY}a.json").symlink_to("/dev/full")
    with pytest.raises(SystemFailure) as caught:
        write_text(target, "new")
    assert str(caught.value) == f"{target}: No space left on device"
    assert caught.value.exit_code == 75
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and target.read_text() == "old"
    with pytest.raises(SystemFailure, match="nowhere/b: No such file"):
        write_file(tmp_path / "nowhere/b", [b""])


def test_a_checkpoint_that_the_disk_refuses_ends_the_run_in_one_line(tiny_shards, tmp_path):
    """By a limit of the process on the size of a file, which everybody can set."""
    config = make_config(tiny_shards, tmp_path / "run", max_steps=4, checkpoint__every_steps=2)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    done = subprocess.run(
        own_command(["fit", str(tmp_path / "run.yaml")]), capture_output=True, text=True, check=False, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line == f"error: {tmp_path}/run/checkpoints/{TEMPORARY}step-0000002/optimizer.safetensors: File too large"
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_missing_permission_is_no_advice_to_resume_from_elsewhere(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SystemFailure, match="loop: Too many levels of symbolic links"):
        load_tensors(tmp_path / "loop")
