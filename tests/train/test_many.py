"""`wantrain fit` in several real processes, as a user and as Slurm starts it: stopped, killed, stalled, resumed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launchers import end, is_alive, wait_for
from train_runs import make_config, read_metrics

from shards.config import dump_config
from train.checkpoint import find_checkpoints
from train.launch.launch import free_port, own_command
from train.loop import fit

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = {"max_steps": 100_000, "checkpoint__every_steps": 50_000, "data__micro_batch": 1}

SRUN = """#!{python}
# Starts the command once a node, on the loopback; passes SIGTERM on; ends what is left after --wait seconds.
import os, signal, subprocess, sys, time
words = sys.argv[1:]
options = []
while words[0].startswith("-"):
    options.append(words.pop(0))
patience = float(next(o for o in options if o.startswith("--wait=")).partition("=")[2])
assert "--ntasks-per-node=1" in options
nodes = range(int(os.environ["SLURM_NNODES"]))
own = lambda node: {{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0"}}
tasks = [subprocess.Popen(words, env=os.environ | own(node)) for node in nodes]
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
first = None
while any(task.poll() is None for task in tasks):
    if first is None and any(task.poll() is not None for task in tasks):
        first = time.monotonic()
    if first is not None and time.monotonic() - first > patience:
        [task.kill() for task in tasks]
    time.sleep(0.1)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
SCONTROL = """#!{python}
import os, pathlib, sys
if sys.argv[1] == "show":
    print("localhost")
else:
    pathlib.Path(os.environ["REQUEUED"]).write_text(" ".join(sys.argv[1:]))
"""
WANTRAIN = """#!{python}
import sys
from train.cli.main import main
sys.exit(main())
"""


def write_config(shards: Path, folder: Path, **changes) -> Path:
    """A small run's YAML beside its folder."""
    path = folder / "run.yaml"
    path.write_text(dump_config(make_config(shards, folder / "run", **changes)))
    return path


def start(config: Path, *more: str, processes: int = 2) -> subprocess.Popen[str]:
    """`wantrain fit` with a launcher."""
    command = own_command(["fit", str(config), "--nproc-per-node", str(processes), *more])
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def wait_for_steps(folder: Path, steps: int = 3) -> None:
    """Until the run has trained some."""
    metrics = folder / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= steps, seconds=240)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of a launcher's ranks, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return sorted(map(int, children), key=lambda pid: int(_environment(pid)["RANK"]))


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.mark.parametrize("to", ["the launcher", pytest.param("every rank", marks=pytest.mark.slow)])
def test_sigterm_leaves_a_checkpoint(tiny_shards, tmp_path, to):
    launcher = start(write_config(tiny_shards, tmp_path, **ENDLESS))
    wait_for_steps(tmp_path)
    ranks = ranks_of(launcher)
    for pid in [launcher.pid] if to == "the launcher" else ranks:
        os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    code, said = end(launcher)
    assert code == 143 and time.monotonic() - began < 60, said
    (left,) = find_checkpoints(tmp_path / "run/checkpoints")
    steps = read_metrics(tmp_path / "run")
    assert left.name == f"step-{steps[-1]['step']:07d}" and not any(map(is_alive, ranks))
    assert "checkpoint" in said and "Traceback" not in said
    assert (tmp_path / "run/logs/rank-1.log").exists()
    if to == "every rank":  # and one process resumes from what two left
        done = steps[-1]["step"]
        assert fit(make_config(tiny_shards, tmp_path / "run", **ENDLESS | {"max_steps": done + 3})).step == done + 3
        fit(make_config(tiny_shards, tmp_path / "straight", **ENDLESS | {"max_steps": done + 3}))
        ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "straight")
        assert [line["keys"] for line in ours] == [line["keys"] for line in theirs]
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(tiny_shards, tmp_path, victim):
    config = write_config(tiny_shards, tmp_path, **ENDLESS | {"checkpoint__every_steps": 2})
    launcher = start(config)
    wait_for_steps(tmp_path, 5)
    ranks = ranks_of(launcher)
    os.kill(ranks[victim], signal.SIGKILL)
    began = time.monotonic()
    code, said = end(launcher)
    assert code == 137 and time.monotonic() - began < 60, said
    last = said[said.index("error: ") :]
    assert last.startswith(f"error: rank {victim} was killed by SIGKILL") and "Traceback" not in said
    assert not any(map(is_alive, ranks))
    step = int(find_checkpoints(tmp_path / "run/checkpoints")[-1].name.removeprefix("step-"))
    assert end(start(config, "-o", f"max_steps={step + 2}"))[0] == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 3))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stalled_rank_is_named(tiny_shards, tmp_path, victim):
    launcher = start(write_config(tiny_shards, tmp_path, **ENDLESS, parallel={"lost_seconds": 5}))
    wait_for_steps(tmp_path)
    ranks = ranks_of(launcher)
    os.kill(ranks[victim], signal.SIGSTOP)
    code, said = end(launcher)
    assert code == 75 and f"rank {victim} did not arrive at step" in said, said
    assert not any(map(is_alive, ranks))


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tiny_shards, tmp_path):
    config = write_config(tiny_shards, tmp_path, max_steps=4, data__micro_batch=1)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    subprocess.run([*command, "-m", "train.cli", "fit", str(config)], cwd=ROOT, check=True, capture_output=True)
    fit(make_config(tiny_shards, tmp_path / "one", max_steps=4, data__micro_batch=1))
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "one")
    assert [line["keys"] for line in ours] == [line["keys"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)


def slurm(folder: Path) -> dict[str, str]:
    """The environment of a job of two machines, with stand-ins for Slurm's programs."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("wantrain", WANTRAIN)):
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(stat.S_IRWXU)
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "MASTER": f"127.0.0.1:{free_port()}",
        "PROCESSES": "1",
        "REQUEUED": str(folder / "requeued"),
    }


@pytest.mark.slow
def test_slurm_script(tiny_shards, tmp_path):
    """Two machines on the loopback: told to stop at the time limit, put back, gone on with to the end."""
    config, environment = write_config(tiny_shards, tmp_path, **ENDLESS), slurm(tmp_path)
    command = ["bash", str(ROOT / "configs/slurm/fit.sbatch"), str(config)]
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_steps(tmp_path)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)  # the step, as --signal=TERM@180 does
    code, said = end(job)
    assert code == 143, said
    assert (tmp_path / "requeued").read_text() == "requeue 4711"
    (left,) = find_checkpoints(tmp_path / "run/checkpoints")
    step = int(left.name.removeprefix("step-"))
    again = [*command, "-o", f"max_steps={step + 2}"]
    environment |= {"MASTER": f"127.0.0.1:{free_port()}", "SLURM_RESTART_COUNT": "1"}
    subprocess.run(again, env=environment, check=True, capture_output=True, timeout=240)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 3))
    assert {path.name for path in (tmp_path / "run/logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    # A mistake is not tried again.
    (tmp_path / "requeued").unlink()
    wrong = subprocess.run([*command, "-o", "data.root=/nowhere"], env=environment, check=False, capture_output=True)
    assert wrong.returncode == 2 and not (tmp_path / "requeued").exists()
