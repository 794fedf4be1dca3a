"""`wantrain fit` in several real processes, as a user and as Slurm starts it: stopped, killed, stalled, resumed."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from launchers import end, is_alive, wait_for
from train_runs import make_config, read_metrics

from shards.config import dump_config
from shards.errors import UserError
from train.checkpoint import find_checkpoints
from train.config.train import ParallelConfig
from train.launch import heartbeat
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


def test_on_one_machine_the_ranks_listen_to_the_loopback_alone_and_a_stranger_ends_nothing(tiny_shards, tmp_path):
    launcher = start(write_config(tiny_shards, tmp_path, **ENDLESS))
    wait_for_steps(tmp_path)
    ranks = ranks_of(launcher)
    listening = {address for pid in ranks for address in listening_addresses(pid)}
    assert listening == {"127.0.0.1"}
    environment = _environment(ranks[0])
    moment = datetime.timedelta(seconds=20)
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), None, False, moment, False)
    store.set("watch/0/0/failure", '{"rank": 1, "host": "x", "kind": "lost", "message": "forged", "seconds": 1.0}')
    done = len(read_metrics(tmp_path / "run"))
    time.sleep(6)  # three heartbeats
    assert launcher.poll() is None and len(read_metrics(tmp_path / "run")) > done
    launcher.send_signal(signal.SIGTERM)
    code, said = end(launcher)
    assert code == 143 and "forged" not in said


def listening_addresses(pid: int) -> list[str]:
    """Addresses of the TCP sockets that a process listens on, IPv4 or IPv6, as the kernel lists them."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(str(descriptor.readlink()))
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in own:
                words = bytes.fromhex(local.partition(":")[0])
                packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.append(socket.inet_ntop(family, packed))
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "data.micro_batch=4", "-o", "parallel.ulysses=1"], "data.micro_batch: 4 does not divide the 2 samples"),
        (["-o", "parallel.ulysses=3"], "parallel.ulysses: 3 does not divide 2 processes"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_is_started(tiny_shards, tmp_path, arguments, words):
    code, said = end(start(write_config(tiny_shards, tmp_path), *arguments))
    assert code == 2 and said.startswith(f"error: {words}") and len(said.splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_offloading_without_a_sharded_base_is_refused(tiny_shards, tmp_path):
    with pytest.raises(UserError, match=r"only a sharded base can be offloaded(.|\n)*model\.stream_blocks=true"):
        fit(make_config(tiny_shards, tmp_path / "run", parallel={"offload": True}))


def test_a_rank_that_waits_for_storage_is_not_late(monkeypatch):
    """Beyond the limit of a step: the clock starts again while a rank says that it waits, and only then."""
    store, limits = dist.HashStore(), ParallelConfig(step_timeout_seconds=0.01, lost_seconds=600)
    waiting, other = (heartbeat.HeartbeatWatch(rank, 2, limits) for rank in (0, 1))
    seconds, found = [0.0], []
    monkeypatch.setattr(heartbeat, "waited_seconds", lambda: seconds[0])
    monkeypatch.setattr(heartbeat.HeartbeatWatch, "_survey", lambda watch: found.append(watch.rank))
    for watch in (waiting, other):
        watch._store, watch._first_step, watch.step = store, 1, 2
        watch._beat()
    seconds[0] = 5.0
    waiting._beat()
    other._waited = 5.0
    time.sleep(0.05)
    other._check()
    assert found == []
    waiting._beat()  # it waits no longer
    time.sleep(0.05)
    other._check()
    assert found == [1]
