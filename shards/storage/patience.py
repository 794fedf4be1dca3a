"""How long a remote storage that fails is waited for: one policy for every read and write.

An attempt that fails for a passing reason (no connection, a 5xx answer, a body that breaks off) is repeated after
growing pauses with jitter, until `storage.patience_minutes` after the first failure; then it is a StorageOutage. The
log says what is waited for. Callers that measure time themselves use `on_wait`, `waited_seconds` and `result_within`.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, NamedTuple, TypeVar

from pydantic import Field

from shards.config import Config
from shards.console import LOG, duration_words
from shards.errors import StorageOutage

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 30.0
NOTICE_SECONDS = 2.0
"""Waits that are shorter are not reported."""
REMINDER_SECONDS = 60.0
Value = TypeVar("Value")


class StorageConfig(Config):
    """How a remote storage that fails is treated. Nothing here changes a byte of shards or a number of a run."""

    patience_minutes: Annotated[float, Field(ge=0)] = 15.0
    """Longest that one read or write waits for an S3 server that does not answer; then exit code 75. 0: not at all."""


class Waiting(NamedTuple):
    """What `on_wait` listeners are called with: at the start of a wait, once a minute during it, and at its end."""

    what: str
    """The operation and the address that is waited for."""
    reason: str
    """The last failure."""
    seconds: float
    """Since the first failed attempt began."""
    is_over: bool
    """Whether the storage answers again, or the wait was given up."""


Listener = Callable[[Waiting], None]


class _Process:
    """The waits of this process: operations overlap, so that one outage is one wait, reported once."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.limit_seconds = StorageConfig().patience_minutes * 60
        self.listeners: list[Listener] = []
        self.active: dict[int, tuple[str, str]] = {}
        """What each waiting operation waits for, and why."""
        self.since = self.ended = self.finished_seconds = 0.0
        self.next_notice = NOTICE_SECONDS
        self.generation = 0
        """Raised by `abandon_waits`: older operations give up."""

    def begin(self, operation: int, what: str, reason: str, since: float) -> None:
        """An attempt that began at `since` failed."""
        with self.changed:
            if not self.active:
                self.since, self.next_notice = max(since, self.ended), NOTICE_SECONDS
            self.active[operation] = (what, reason)
            seconds = time.monotonic() - self.since
            if seconds < self.next_notice:
                return
            self.next_notice = seconds + REMINDER_SECONDS
        LOG.warning(
            "waiting for storage since %s (at most %s): %s: %s",
            duration_words(seconds), duration_words(self.limit_seconds), what, reason,
        )  # fmt: skip
        self._tell(Waiting(what, reason, seconds, is_over=False))

    def end(self, operation: int) -> None:
        """The operation succeeded or was given up."""
        with self.changed:
            what, reason = self.active.pop(operation, ("", ""))
            if not what or self.active:
                return
            self.ended = time.monotonic()
            seconds = self.ended - self.since
            self.finished_seconds += seconds
            if self.next_notice == NOTICE_SECONDS:  # too short to have been reported
                return
        LOG.warning("waiting for storage is over after %s", duration_words(seconds))
        self._tell(Waiting(what, reason, seconds, is_over=True))

    def _tell(self, waiting: Waiting) -> None:
        for listener in list(self.listeners):
            listener(waiting)


_process = _Process()
_numbers = itertools.count()
_jitter = random.Random()  # noqa: S311 - its own: it must not move the draws of anyone else


def _after_fork() -> None:
    global _process  # its parent's threads and their lock are not its own
    limit, _process = _process.limit_seconds, _Process()
    _process.limit_seconds = limit
    _jitter.seed()


os.register_at_fork(after_in_child=_after_fork)


def set_patience(config: StorageConfig) -> None:
    """Set how long operations of this process wait from now on."""
    _process.limit_seconds = config.patience_minutes * 60


def on_wait(listener: Listener) -> Callable[[], None]:
    """Call `listener` on the waiting thread whenever a wait is to be reported. Returns what removes it again."""
    process = _process
    process.listeners.append(listener)
    return lambda: process.listeners.remove(listener)


def waited_seconds() -> float:
    """Wall-clock seconds that this process has waited for storage until now, a wait in progress included."""
    with _process.changed:
        running = time.monotonic() - _process.since if _process.active else 0.0
        return _process.finished_seconds + running


def result_within(future: Future[Value], seconds: float) -> Value:
    """The future's result; time in which storage is waited for does not count. Raises TimeoutError."""
    waited, start = waited_seconds(), time.monotonic()
    while True:
        left = seconds - (time.monotonic() - start) + (waited_seconds() - waited)
        try:
            return future.result(timeout=max(0.0, min(left, 1.0)))
        except TimeoutError:
            if future.done() or left <= 0:
                raise


def abandon_waits() -> None:
    """Make all operations that wait for storage now give up, so that their threads can be joined."""
    with _process.changed:
        _process.generation += 1
        _process.changed.notify_all()


@contextmanager
def reader_pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that is left at once on an exception (Ctrl-C too), though its threads wait for storage."""
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            yield pool
        except BaseException:
            abandon_waits()
            raise


class Attempts:
    """The attempts at one operation, as a context manager: the wait ends with the block.

    Args:
        what: the operation and its address, for messages.
        patient: False: the first failure is a StorageOutage.
    """

    def __init__(self, what: str, *, patient: bool = True) -> None:
        self._what, self._patient = what, patient
        self._number, self._process, self._generation = next(_numbers), _process, _process.generation
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._begun = time.monotonic()
        self._first: float | None = None

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *error: object) -> None:
        if self._first is not None:
            self._process.end(self._number)

    def failed(self, error: object, *, progressed: bool = False) -> None:
        """An attempt failed: return after a pause, for the next. Raises StorageOutage when the patience is over.

        `progressed`: a part of the data came, so that the pause need not grow.
        """
        reason = " ".join(str(error).split())
        if self._first is None:
            self._first = self._begun
        self._process.begin(self._number, self._what, reason, self._first)
        left = self._process.limit_seconds - (time.monotonic() - self._first) if self._patient else 0.0
        if left <= 0 or self._is_abandoned():
            raise StorageOutage(self._what, reason, time.monotonic() - self._first)
        if progressed:
            self._pause_seconds = FIRST_PAUSE_SECONDS
        pause = min(left, self._pause_seconds * _jitter.uniform(0.5, 1.0))
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        with self._process.changed:
            self._process.changed.wait_for(self._is_abandoned, pause)
        self._begun = time.monotonic()

    def _is_abandoned(self) -> bool:
        return self._process.generation != self._generation
