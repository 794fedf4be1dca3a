"""Heartbeats: every rank writes its place to the store, so that a rank that waits can name which rank is missing.

A thread of each rank writes its place (step, part of the step, how many parts it has passed) every two seconds,
and reads three things: whether a rank failed, whether its left neighbour still writes, and how long its own main
thread has been at one place. The ring watches every rank at the cost of one write and a few reads a rank.

    neighbour silent              → its process or machine is gone, or stopped
    own place unchanged too long  → all places are read: which rank is silent, which is behind, or neither
    a rank failed                 → end with that failure

A main thread that waits in a collective cannot be woken, so the thread ends the process. A store that does not answer
(rank 0, which holds it, is stopped, or its machine is gone) holds this thread up too: a second one, the guard, looks at
the clock and the launcher's note only.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import hashlib
import itertools
import json
import logging
import os
import socket
import threading
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist

from shards.console import LOG
from shards.errors import UserError
from shards.storage.patience import waited_seconds
from train.config.train import ParallelConfig
from train.launch.failure import (
    LOST_EXIT,
    SECRET_VARIABLE,
    Failure,
    RankLost,
    end_now,
    failure_from_json,
    failure_of,
    launch_folder,
    own_failure,
    read_note,
    record,
    speak_into_log,
)
from train.launch.rank_status import Beat, compare

BEAT_SECONDS = 2.0
SILENT_BEATS = 3
"""Heartbeats that a rank may miss between two readings before it counts as silent."""
NOTE_SECONDS = 0.25
"""Between two checks for the launcher's note."""
CONNECT_SECONDS = 3.0
STORE_LEAVE_SECONDS = 30.0
"""How long rank 0, which serves the store, waits at the end for the others to disconnect."""
FAILURE_KEY = "failure"
_TRANSPORT = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe", "Socket")
_RUNS = itertools.count()


class HeartbeatWatch:
    """Around a run of several processes: reports where this rank is, and ends it when another does not arrive.

    An error inside is reported to the others; an error of the connection itself becomes a RankLost that names the rank
    that is gone.
    """

    def __init__(self, rank: int, world_size: int, limits: ParallelConfig) -> None:
        self.rank, self.world_size, self._limits = rank, world_size, limits
        self.step, self._part, self._arrivals, self._since = 0, "connecting to the others", 0, time.monotonic()
        self._waited = 0.0
        """Seconds that this process had waited for storage at its last heartbeat."""
        self._first_step: int | None = None
        self._number = 0
        self._run_number = next(_RUNS)
        self._host = socket.gethostname()
        self._store: Any = None
        self._kept: Any = None
        self._neighbour = (rank - 1) % world_size
        self._heard: tuple[str, float] = ("", time.monotonic())
        self._ticked = time.monotonic()
        """When the thread last ran: a request to the store may never be answered."""
        self._done, self._over, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._guard = threading.Thread(target=self._guard_store, name="guard", daemon=True)

    def at(self, step: int, part: str) -> None:
        """The main thread entered a part of a step; every rank must call this at the same places."""
        if self._first_step is None and step > 0:
            self._first_step = step
        self.step, self._part = step, part
        self.pulse()
        if self._kept is None and dist.is_initialized():
            # Rank 0's object serves the store: it must outlast the group, for the others' last messages.
            self._kept = dist.distributed_c10d._get_default_store()

    def pulse(self) -> None:
        """The main thread made progress within the part; like `at`, called alike on every rank."""
        self._since = time.monotonic()
        self._arrivals += 1

    def __enter__(self) -> HeartbeatWatch:
        if self.world_size > 1:
            self._thread.start()
            self._guard.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world_size == 1:
            return
        with self._ending:  # a thread may be ending the process for the same reason
            self._done.set()
        self._thread.join(timeout=STORE_LEAVE_SECONDS)
        try:
            if error is None or isinstance(error, SystemExit):
                self._over.set()
                self._leave()
            else:
                self._go_with(error)
        finally:
            self._over.set()

    def _go_with(self, error: BaseException) -> None:
        error.add_note(f"rank {self.rank} was at step {self.step}, {self._part}")
        if not is_lost_connection(error):
            record(failure_of(error))  # before `_tell`: the store may not answer
            self._tell(failure_of(error))
            return
        failure = self._explain(error)
        self._tell(failure)
        raise RankLost(failure.message) from error

    # What the heartbeat thread does.

    def _run(self) -> None:
        failure = self._connect()
        while failure is None and not self._done.wait(BEAT_SECONDS):
            try:
                failure = self._check()
            except RuntimeError as error:
                failure = self._store_lost(error)
            self._ticked = time.monotonic()
        if failure is not None:
            self._end(failure)

    def _guard_store(self) -> None:
        while not self._over.wait(NOTE_SECONDS):
            silence = time.monotonic() - self._ticked
            note = None if self._done.is_set() else read_note()
            if note is not None:
                self._end(note)
            elif self._store is not None and silence > self._limits.lost_seconds + BEAT_SECONDS:
                self._store = None
                self._end(own_failure("lost", self._store_silent(silence)))

    def _store_silent(self, seconds: float) -> str:
        return (
            f"rank 0 did not arrive at step {self.step}, {self._part}: {master()}, which serves the ranks' store, "
            f"has been silent for {seconds:.0f} s; its process was stopped, or its machine is gone"
        )

    def _connect(self) -> Failure | None:
        deadline, error = time.monotonic() + self._limits.start_timeout_seconds, ""
        while time.monotonic() < deadline and not self._done.is_set():
            try:
                self._store = connect(self._limits.lost_seconds, self._run_number)
            except RuntimeError as refused:
                error = first_line(refused)
            else:
                self._beat()
                return None
            if (note := read_note()) is not None:
                return note
        return None if self._done.is_set() else own_failure("lost", f"rank 0 does not answer at {master()}: {error}")

    def _check(self) -> Failure | None:
        self._beat()
        failure = self._read_failure()
        if failure is not None:
            return failure
        if self._neighbour_is_silent():
            return self._survey()
        first = self._first_step is None or self.step == self._first_step
        limit = self._limits.start_timeout_seconds if first else self._limits.step_timeout_seconds
        if time.monotonic() - self._since <= limit:
            return None
        if any(beat is not None and beat.waits for beat in self._read_all()):
            self._since = time.monotonic()  # a rank waits for storage: that has a limit of its own
            return None
        return self._survey()

    def _beat(self) -> None:
        self._store.set(f"beat/{self.rank}", json.dumps(self._next_beat()))

    def _next_beat(self) -> Beat:
        self._number += 1
        before, self._waited = self._waited, waited_seconds()
        return Beat(self._number, self._host, self.step, self._part, self._arrivals, self._waited > before)

    def _read_failure(self) -> Failure | None:
        if not self._store.check([FAILURE_KEY]):
            return None
        failure = failure_from_json(self._store.get(FAILURE_KEY).decode())
        about = "" if failure.message.startswith("rank") else f"rank {failure.rank} on {failure.host}: "
        return failure._replace(kind="lost", message=f"{about}{failure.message}")

    def _neighbour_is_silent(self) -> bool:
        key = f"beat/{self._neighbour}"
        beat = self._store.get(key).decode() if self._store.check([key]) else ""
        if beat != self._heard[0]:
            self._heard = (beat, time.monotonic())
        if self._store.check([f"left/{self._neighbour}"]):
            return False
        limit = self._limits.lost_seconds if beat else self._limits.start_timeout_seconds
        return time.monotonic() - self._heard[1] > limit

    def _survey(self) -> Failure:
        """Read all places twice, some beats apart, and name the missing ranks."""
        waited = time.monotonic() - self._since
        before = self._read_all()
        for _ in range(SILENT_BEATS):  # beat meanwhile, or another rank would count this one as silent
            self._beat()
            if (failure := self._wait_for_note(BEAT_SECONDS) or self._read_failure()) is not None:
                return failure
        status = compare(before, self._read_all(), self.rank, self._next_beat())
        return own_failure("lost", status.describe(self.world_size, max(waited, self._limits.lost_seconds)))

    def _read_all(self) -> list[Beat | None]:
        beats = []
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            beats.append(Beat(*json.loads(self._store.get(key))) if self._store.check([key]) else None)
        return beats

    def _store_lost(self, error: BaseException) -> Failure:
        note = self._wait_for_note(2 * BEAT_SECONDS)  # the launcher may name the cause in a moment
        return note or own_failure(
            "lost",
            f"rank 0 at {master()}, which serves the ranks' store, is gone: {first_line(error)}; its own log says more",
        )

    def _wait_for_note(self, seconds: float) -> Failure | None:
        """The launcher's note, if it comes in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._ticked = time.monotonic()  # the store is not asked, so the guard need not act
            if (note := read_note()) is not None:
                return note
            time.sleep(NOTE_SECONDS)
        return None

    def _end(self, failure: Failure) -> None:
        """Report to the others and end this process, even if its main thread waits in a collective."""
        if not self._ending.acquire(blocking=False):
            return  # the main thread is ending the process already
        record(failure._replace(rank=self.rank, kind="lost"))
        self._post(failure)
        speak_into_log()
        LOG.error("%s", failure.message)
        for handler in LOG.handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream is not None:
                faulthandler.dump_traceback(handler.stream.fileno(), all_threads=True)
        self._linger()
        end_now(LOST_EXIT)

    # What the main thread does when it ends with an error.

    def _explain(self, error: BaseException) -> Failure:
        """Why a connection broke: wait until the failed rank or the launcher reports it, or a rank is silent."""
        self._ticked = time.monotonic()
        deadline = time.monotonic() + self._limits.lost_seconds
        before: list[Beat | None] | None = None
        rounds = 0
        while self._store is not None and time.monotonic() < deadline:
            try:
                self._beat()
                before = before or self._read_all()
                failure = self._wait_for_note(BEAT_SECONDS) or self._read_failure()
                status = compare(before, self._read_all(), self.rank, self._next_beat())
            except RuntimeError as lost:
                return self._store_lost(lost)
            if failure is not None:
                return failure
            rounds += 1
            if rounds > SILENT_BEATS and (status.silent or status.absent):
                return own_failure("lost", status.describe(self.world_size, time.monotonic() - self._since))
        return own_failure("lost", f"the connection to another rank broke: {first_line(error)}")

    def _tell(self, failure: Failure) -> None:
        self._post(failure)
        self._linger()

    def _post(self, failure: Failure) -> None:
        with contextlib.suppress(RuntimeError):  # the store itself may be lost
            if self._store is not None:
                self._store.compare_set(FAILURE_KEY, "", failure.to_json())

    def _linger(self) -> None:
        """Rank 0 serves the store: other machines must read the failure before it ends."""
        launcher_reports = launch_folder() is not None and os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size)
        if self.rank == 0 and self._store is not None and not launcher_reports:
            time.sleep(2 * BEAT_SECONDS)

    def _leave(self) -> None:
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "1")
            if self.rank == 0:
                others = [f"left/{rank}" for rank in range(1, self.world_size)]
                self._store.wait(others, datetime.timedelta(seconds=STORE_LEAVE_SECONDS))


def connect(patience_seconds: float, run: int) -> Any:
    """A separate connection to the ranks' store. Raises RuntimeError when it does not answer in a few seconds."""
    host, _, port = master().rpartition(":")
    moment = datetime.timedelta(seconds=CONNECT_SECONDS)
    store = dist.TCPStore(host, int(port), None, False, moment, wait_for_workers=False)
    store.set_timeout(datetime.timedelta(seconds=patience_seconds))
    # torchrun keeps one store over its restarts, a process one over its runs: none must read an older failure.
    return dist.PrefixStore(f"{secret_prefix()}watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{run}", store)


def open_store(rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """The ranks' store under our launcher: served by rank 0 on the address of MASTER_ADDR alone.

    torch's own (`env://`) listens on all interfaces, and whoever reaches it can end the run. Raises UserError.
    """
    host, _, port = master().rpartition(":")
    descriptor = None
    if rank == 0:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        listen_on = str(address[0])
        if listen_on != host and listen_on.startswith(("127.", "::1")):  # a name, as /etc/hosts of Debian has it
            raise UserError(
                f"--master {master()}: on this machine the name means {listen_on}, which no other machine reaches",
                fix="give the address of the interface that the machines share, on all of them",
            )
        try:
            listener = socket.create_server((listen_on, int(port)), family=family, backlog=4096)
        except OSError as error:
            raise UserError(
                f"--master {master()}: cannot listen on {listen_on}: {error.strerror}",
                expected="an address of an interface of machine 0, and a free port",
            ) from None
        descriptor = listener.detach()  # the store closes it
    store = dist.TCPStore(
        host, int(port), size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=descriptor
    )
    return dist.PrefixStore(f"{secret_prefix()}group", store)


def secret_prefix() -> str:
    """What the keys of a run's store begin with: a digest of the ranks' secret, or nothing."""
    secret = os.environ.get(SECRET_VARIABLE)
    return f"{hashlib.sha256(secret.encode()).hexdigest()}/" if secret else ""


def master() -> str:
    """The address of the ranks' store, host:port."""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error means that a peer is gone, not that something is wrong here."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in _TRANSPORT)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]
