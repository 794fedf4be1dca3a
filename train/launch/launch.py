"""`wantrain fit --nproc-per-node N`: a process for each GPU of this machine, and none left behind. Imports no torch.

    launcher ─┬─ rank 0   the terminal, logs/rank-0.log
              ├─ rank 1   logs/rank-1.log
              └─ …        one session each, killed with all its children

A rank that fails ends all: the launcher writes the cause for the remaining ranks (they pass it on to other machines),
gives them a moment to end, kills what remains and prints the first cause. A signal is passed on, so that the ranks
write a checkpoint together; after the grace time, or at a second Ctrl-C, everything is killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

import click

from shards.console import LOG
from shards.errors import UserError
from shards.files.write_file import no_pipe
from train.launch.failure import (
    FOLDER_VARIABLE,
    LAUNCHER_VARIABLE,
    LOG_VARIABLE,
    NOTE_FILE,
    SECRET_VARIABLE,
    SIGNAL_EXIT,
    Failure,
    describe_signal,
    failure_from_json,
    first_cause,
    name_ranks,
    own_failure,
    write_whole,
)

LOOK_SECONDS = 0.1
FAILURE_LEAVE_SECONDS = 10.0
"""How long ranks may take to pass a failure on to other machines and end."""
LOOPBACK = "127.0.0.1"


class Place(NamedTuple):
    """The part of a run that this launcher starts."""

    num_here: int
    """Processes of this machine."""
    num_nodes: int = 1
    node: int = 0
    master: str | None = None
    """`host:port` of machine 0, when there are several."""

    @property
    def ranks(self) -> range:
        """Ranks of this machine."""
        return range(self.node * self.num_here, (self.node + 1) * self.num_here)

    @property
    def world_size(self) -> int:
        """Processes of all machines."""
        return self.num_nodes * self.num_here


def make_place(processes: str, num_nodes: int, node: int | None, master: str | None) -> Place:
    """Check what the command line says of machines and processes. Raises UserError."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise UserError(
            "--nproc-per-node under a launcher that has started this process already (RANK, WORLD_SIZE are set)",
            fix="leave it out, or start the command itself without that launcher",
        )
    num_here = _count_gpus() if processes == "gpu" else _positive(processes)
    if num_nodes > 1 and (node is None or master is None):
        raise UserError(f"--nnodes {num_nodes} needs --node-rank and --master HOST:PORT, on every machine its own rank")
    if not 0 <= (node or 0) < num_nodes:
        raise UserError(f"--node-rank {node}: there are {num_nodes} machines", expected=f"0 to {num_nodes - 1}")
    if num_nodes > 1 and SECRET_VARIABLE not in os.environ:
        LOG.warning(
            "%s is not set: whoever reaches %s can disturb the run (docs/how-to/many-gpus.md)",
            SECRET_VARIABLE,
            master,
        )
    if master is not None:
        host, _, port = master.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--master {master}: not host:port", expected="the first machine's, such as node0:29500")
    return Place(num_here, num_nodes, node or 0, master)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--nproc-per-node {text}", expected="a number from 1, or gpu for as many as there are GPUs")
    return int(text)


def _count_gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise UserError("--nproc-per-node gpu: torch sees no GPU here", fix="wantrain doctor")
    return count


def launch(command: Sequence[str], place: Place, folder: Path, grace_seconds: float) -> int:
    """Run a command in every process until all have ended, and return the exit code of the run.

    Args:
        command: program and arguments; it knows its rank from the environment (RANK, WORLD_SIZE, MASTER_ADDR …).
        folder: the run's, for `logs/rank-N.log`.
        grace_seconds: how long a signal may take to become a checkpoint.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wantrain-launch-")))
        launcher = _Launcher(place, folder, scratch, grace_seconds)
        stack.callback(launcher.kill)
        launcher.take_signals()
        launcher.start(command)
        return launcher.wait()


class _Launcher:
    def __init__(self, place: Place, folder: Path, scratch: Path, grace_seconds: float) -> None:
        self._place, self._folder, self._scratch, self._grace = place, folder, scratch, grace_seconds
        # One machine: gloo and NCCL talk over the loopback alone, and the store has a secret of this run.
        self._loopback = {SECRET_VARIABLE: secrets.token_hex(16)}
        if Path("/sys/class/net/lo").exists():
            names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
            self._loopback |= {name: os.environ.get(name, "lo") for name in names}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._failures: dict[int, Failure] = {}
        self._killed: list[int] = []
        self._asked: signal.Signals | None = None
        """The signal that asked for the stop."""
        self._at_once = False
        self._deadline: float | None = None
        """When the remaining processes are killed."""

    def start(self, command: Sequence[str]) -> None:
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        host, port = self._master()
        for local, rank in enumerate(self._place.ranks):
            if self._asked is not None:
                return
            environment = os.environ | self._environment(rank, local, host, port)
            with ExitStack() as stack:
                output = None if rank == 0 else stack.enter_context(self._open_log(rank))
                # A session of its own: signals come through the launcher alone, and one call ends its children too.
                self._processes[rank] = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            if self._asked is not None:  # asked while it was being started
                self._send(self._asked)

    def log_path(self, rank: int) -> Path:
        return self._folder / "logs" / f"rank-{rank}.log"

    def _open_log(self, rank: int) -> IO[bytes]:
        return open(self.log_path(rank), "ab", opener=no_pipe)

    def _master(self) -> tuple[str, int]:
        if self._place.master is None:
            return LOOPBACK, free_port()
        host, _, port = self._place.master.rpartition(":")
        return host, int(port)

    def _environment(self, rank: int, local: int, host: str, port: int) -> dict[str, str]:
        place = self._place
        here = self._loopback if place.num_nodes == 1 else {}
        threads = max(1, (os.cpu_count() or 1) // place.num_here)
        return here | {
            "RANK": str(rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(place.num_here),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            # What c10d warns of when a peer goes, with a stack of C++ frames, would bury what matters.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            LOG_VARIABLE: str(self.log_path(rank).absolute()),
            FOLDER_VARIABLE: str(self._scratch),
            LAUNCHER_VARIABLE: str(os.getpid()),
        }

    def take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._send(number)
        elif self._asked is None:
            self._asked = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
            self._end_within(self._grace)
            self._send(self._asked)
        elif number == signal.SIGINT:
            self._at_once, self._deadline = True, time.monotonic()

    def _send(self, number: int) -> None:
        for process in self._processes.values():
            if process.returncode is None:  # not Popen.send_signal: it would reap
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _end_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def wait(self) -> int:
        """Until every process has ended; the exit code."""
        while running := [rank for rank, process in self._processes.items() if not self._has_ended(rank, process)]:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._killed = running
                self.kill()
                break
            self._look_for_records()
            time.sleep(LOOK_SECONDS)
        if self._at_once:
            click.echo("interrupted: every rank was killed; the newest checkpoint is kept", err=True)
            return SIGNAL_EXIT + signal.SIGINT
        for rank in self._killed:
            if (self._scratch / f"rank-{rank}.json").exists():
                self._failures[rank] = self._failure(rank, 0)
        if self._failures:
            return self._report()
        if self._killed:
            return self._report_late()
        codes = [process.returncode for process in self._processes.values() if process.returncode >= 0]
        return max(codes, default=SIGNAL_EXIT + (self._asked or 0))

    def _has_ended(self, rank: int, process: subprocess.Popen[bytes]) -> bool:
        """Whether one process has ended; then its failure, if any, is recorded and its children are killed."""
        if process.returncode is not None:
            return True
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        _kill_group(process.pid)  # not reaped yet: the number is not reused
        code = process.wait()
        if code == 0 or code > SIGNAL_EXIT:  # above 128: stopped by a signal, with a checkpoint
            return True
        failure = self._failure(rank, code)
        self._tell(failure)
        if code != -(self._asked or 0):  # else it had no signal handler yet
            self._failures[rank] = failure
        return True

    def _look_for_records(self) -> None:
        """A rank that recorded its failure may still hang while it ends."""
        for record in self._scratch.glob("rank-*.json"):
            self._tell(failure_from_json(record.read_text(encoding="utf-8")))

    def _tell(self, failure: Failure) -> None:
        note = self._scratch / NOTE_FILE
        if not note.exists():
            write_whole(note, failure.to_json())
            self._end_within(FAILURE_LEAVE_SECONDS)

    def _failure(self, rank: int, code: int) -> Failure:
        record = self._scratch / f"rank-{rank}.json"
        if record.exists():
            return failure_from_json(record.read_text(encoding="utf-8"))
        if code < 0:
            return own_failure("killed", f"rank {rank} was killed by {describe_signal(-code)}", rank)
        return own_failure("crash", f"rank {rank} ended with code {code} and left no message; see its log", rank)

    def _report(self) -> int:
        """Print the first cause on top, and what to do; the exit code."""
        cause = first_cause(list(self._failures.values()))
        others = [rank for rank in self._processes if rank != cause.rank]
        about = "" if cause.message.startswith("rank") or cause.kind == "lost" else f"rank {cause.rank}: "
        log = self._folder / "logs" if cause.kind == "lost" else self.log_path(cause.rank)
        lines = [f"error: {about}{cause.message}", f"  see:      {log}"]
        if cause.kind == "lost":
            lines.append(f"  then:     {name_ranks(list(self._processes))}, all that were here, ended")
        elif others:
            lines.append(f"  then:     {name_ranks(others)} here ended, {time.time() - cause.seconds:.1f} s later")
        if cause.kind != "mistake":
            lines.append("  to fix:  see why; then the same command resumes from the newest checkpoint")
        click.echo("\n".join(lines), err=True)
        return SIGNAL_EXIT - self._processes[cause.rank].returncode if cause.kind == "killed" else cause.exit_code

    def _report_late(self) -> int:
        click.echo(
            f"error: no checkpoint within {self._grace:g} s of the signal: {name_ranks(self._killed)} were killed\n"
            "  to fix:  raise parallel.grace_seconds, and the scheduler's own grace time with it",
            err=True,
        )
        return SIGNAL_EXIT + signal.SIGKILL

    def kill(self) -> None:
        """Kill every remaining process with its children, at once."""
        for process in self._processes.values():
            if process.returncode is None:
                _kill_group(process.pid)
                process.wait()


def _kill_group(number: int) -> None:
    """Kill a process and its children; `number` is not reaped yet, so no other process has it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def own_command(arguments: Sequence[str]) -> list[str]:
    """`wantrain` with these arguments, as this interpreter runs it."""
    # -P: a file train.py in the user's folder must not be imported instead of the package.
    return [sys.executable, "-P", "-m", "train.cli", *arguments]


def free_port() -> int:
    """A free TCP port of the loopback."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])
