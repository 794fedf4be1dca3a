"""The record that a failing rank leaves. Importing this imports no torch.

A rank that fails leaves one JSON record in the launcher's folder; the launcher reads them all, finds which came first
and prints that one. Started otherwise (torchrun, srun), a rank has no launcher and prints its error itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, NoReturn

import click

from shards.console import LOG, without_passwords
from shards.errors import EXIT_TEMPORARY, EXIT_USER, SystemFailure, UserError

CRASH_EXIT = 1
MISTAKE_EXIT = EXIT_USER
LOST_EXIT = EXIT_TEMPORARY
"""EX_TEMPFAIL: another rank or machine was lost; the same command resumes from the newest checkpoint."""
SIGNAL_EXIT = 128
FOLDER_VARIABLE = "WANTRAIN_LAUNCH"
"""Names the launcher's folder to its ranks."""
LOG_VARIABLE = "WANTRAIN_LOG"
"""Names a rank's own log to it."""
LAUNCHER_VARIABLE = "WANTRAIN_LAUNCHER_PID"
SECRET_VARIABLE = "WANTRAIN_SECRET"  # noqa: S105 - a name
"""Names a secret that the ranks of a run share: without it nobody finds a key in their store."""
NOTE_FILE = "failure.json"
"""The launcher's note to the remaining ranks about the one that failed."""
_PR_SET_PDEATHSIG = 1
Kind = Literal["mistake", "temporary", "crash", "killed", "lost"]


class RankLost(Exception):
    """Another rank is gone or does not arrive: this one is healthy but cannot continue."""


class Failure(NamedTuple):
    """Why a rank ended."""

    rank: int
    host: str
    kind: Kind
    """`lost`: by no fault of its own. `temporary`: a storage or a disk that the same command may find well again."""
    message: str
    """For people; may have several lines."""
    seconds: float
    """When, since 1970."""

    @property
    def exit_code(self) -> int:
        """What the command ends with when this came first; a killed rank's signal decides its own."""
        return {"mistake": MISTAKE_EXIT, "temporary": LOST_EXIT, "lost": LOST_EXIT}.get(self.kind, CRASH_EXIT)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self._asdict(), ensure_ascii=False)


def failure_from_json(text: str) -> Failure:
    """The inverse of `Failure.to_json`."""
    return Failure(**json.loads(text))


def own_failure(kind: Kind, message: str, rank: int | None = None) -> Failure:
    """A failure on this machine, now; of this process, or of the rank that is given."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    return Failure(rank, socket.gethostname(), kind, message, time.time())


def failure_of(error: BaseException) -> Failure:
    """What an exception that ends this process means."""
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, RankLost):
        return own_failure("lost", f"{error}{notes}")
    if isinstance(error, OSError) and error.errno is not None:
        error = SystemFailure(error)
    if isinstance(error, UserError):
        return own_failure("mistake" if error.exit_code == MISTAKE_EXIT else "temporary", f"{error}{notes}")
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f"\n  raised in {Path(frame.filename).name}, line {frame.lineno}" for frame in last)
    return own_failure("crash", f"{type(error).__name__}: {error}{where}{notes}")


def launch_folder() -> Path | None:
    """The launcher's folder; None for a process that was not started by one."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


def record(failure: Failure) -> None:
    """Record a failure for the launcher, once: the first one stays. Without a launcher, print it."""
    folder = launch_folder()
    if folder is None:
        if failure.kind == "lost":  # the others are printed by the command line
            click.echo(f"error: rank {failure.rank}: {without_passwords(failure.message)}", err=True)
        return
    path = folder / f"rank-{failure.rank}.json"
    if folder.is_dir() and not path.exists():
        write_whole(path, failure.to_json())


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees all of it or nothing."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_note() -> Failure | None:
    """The launcher's note about a failed rank of this machine."""
    folder = launch_folder()
    if folder is None or not (folder / NOTE_FILE).exists():
        return None
    return failure_from_json((folder / NOTE_FILE).read_text(encoding="utf-8"))


class Reported:
    """Around a rank's work: an error is recorded for the launcher, and the traceback goes to the rank's log.

    Under a launcher the process also ends when the launcher does, however that ends.
    """

    def __enter__(self) -> None:
        if launch_folder() is not None:
            end_with_parent(int(os.environ[LAUNCHER_VARIABLE]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt):
            return
        record(failure_of(error))
        speak_into_log()
        if isinstance(error, RankLost):
            traceback.print_exception(error)
            end_now(LOST_EXIT)


def end_now(code: int) -> NoReturn:
    """End without the interpreter's shutdown, in which threads of gloo and NCCL hang or abort."""
    for handler in LOG.handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone (Linux; elsewhere the launcher's own end does)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(LOST_EXIT)


def speak_into_log() -> None:
    """Under a launcher: send standard error to the rank's own log; the launcher prints what matters."""
    log = os.environ.get(LOG_VARIABLE)
    if log is not None:
        sys.stderr.flush()
        with Path(log).open("ab") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that caused the others: the earliest that is not itself the loss of another rank."""
    return min(failures, key=lambda failure: (failure.kind == "lost", failure.seconds))


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1, 2`, `ranks 8–15`."""
    numbers = sorted(ranks)
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"ranks {numbers[0]}–{numbers[-1]}"
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def describe_signal(number: int) -> str:
    """A signal's name, with what usually sends it."""
    name = signal.Signals(number).name
    hint = {
        signal.SIGKILL: "; if no person did that, the machine ran out of memory (`dmesg` names the process)",
        signal.SIGBUS: "; shared memory may be full (`df /dev/shm`)",
    }.get(signal.Signals(number), "")
    return f"{name}{hint}"
