"""Fetching, decoding, encoding and writing, each in a pool of its own; no pool waits for the order of the clips.

    tasks ─▶ fetch (threads) ─▶ decode (threads) ─▶ encode (the caller's thread) ─▶ write (a thread) ─▶ results

A task moves on as soon as it is ready, so a clip that takes minutes holds up only what is written after it in its own
unit. What is bounded: downloads by connections, decoding by cores, decoded frames by bytes, and encoded clips that
wait to be written by bytes. Nothing here changes a byte of output: the order of writing is the writer's.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

Task = TypeVar("Task")
Fetched = TypeVar("Fetched")
Decoded = TypeVar("Decoded")
Encoded = TypeVar("Encoded")
Result = TypeVar("Result")
Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

WAITING_PER_DECODER = 4
"""Clips on disk or decoded, beside those that are being fetched, for each decoder."""
POOLS = ("fetch", "decode", "encode", "write")
BUSY_SHARE = 0.9
"""An encoder that is at work for so much of the time is itself what limits a build."""


def find_bottleneck(seconds: Mapping[str, float]) -> str | None:
    """The pool that limits a build, by the seconds of the encoder's thread; None before anything was measured."""
    total = sum(seconds.values())
    if not total:
        return None
    if seconds["encode"] >= BUSY_SHARE * total:
        return "encode"
    return max((name for name in POOLS if name != "encode"), key=lambda name: seconds[name])


class ByteBudget:
    """Bytes that may be held at a time. One holder alone may exceed the limit, so that nothing can wait for ever."""

    def __init__(self, limit: int, stop: threading.Event) -> None:
        self._limit, self._stop = limit, stop
        self._used = 0
        self._changed = threading.Condition()

    def reserve(self, num_bytes: int) -> None:
        """Wait until there is room for `num_bytes`, or nothing else is held, or `stop` is set."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stop.is_set() or not self._used or self._used + num_bytes <= self._limit
            )
            self._used += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()

    def wake(self) -> None:
        """Let everybody who waits look at `stop` again."""
        with self._changed:
            self._changed.notify_all()

    @property
    def used(self) -> int:
        """Bytes held now."""
        return self._used


class Stages(Protocol[Task_contra, Fetched, Decoded, Encoded, Result_co]):
    """The work on one task. Exceptions end the run; a bad clip is a value."""

    def fetch(self, task: Task_contra) -> Fetched:
        """In a thread of the fetch pool."""

    def decode(self, task: Task_contra, fetched: Fetched, reserve: Callable[[int], None]) -> Decoded:
        """In a thread of the decode pool; calls `reserve(num_bytes)` before it makes something large."""

    def encode(self, task: Task_contra, decoded: Decoded) -> Encoded:
        """In the caller's thread, one at a time, of those that are ready the earliest first."""

    def write(self, task: Task_contra, encoded: Encoded) -> Iterable[Result_co]:
        """In the writer's thread, in the order of encoding: what is complete with it. It may keep `encoded`."""

    @property
    def held_bytes(self) -> int:
        """What the writer keeps for later."""


class _Ready(NamedTuple):
    place: int
    """In the order of the tasks."""
    task: Any
    decoded: Any
    num_bytes: int
    error: BaseException | None


class Pools(Generic[Task, Fetched, Decoded, Encoded, Result]):
    """One run of tasks through the stages.

    Args:
        stages: the work.
        num_fetchers: threads that download.
        num_decoders: threads that decode.
        max_bytes: decoded frames that may be held, and again as much of encoded clips that wait for their turn.
        stop: set when the run is left early (an exception, Ctrl-C): work should look at it.
        on_stop: called then, to end what cannot look.
        on_begun: called once, in the caller's thread, when the first tasks are begun: to load what encoding needs.
    """

    def __init__(
        self,
        stages: Stages[Task, Fetched, Decoded, Encoded, Result],
        *,
        num_fetchers: int,
        num_decoders: int,
        max_bytes: int,
        stop: threading.Event,
        on_stop: Callable[[], None] = lambda: None,
        on_begun: Callable[[], None] = lambda: None,
    ) -> None:
        self._stages, self._stop, self._on_stop, self._on_begun = stages, stop, on_stop, on_begun
        self._fetchers = ThreadPoolExecutor(num_fetchers, thread_name_prefix="fetcher")
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="decoder")
        self._max_started = num_fetchers + num_decoders * WAITING_PER_DECODER
        self._max_bytes = max_bytes
        self._frames = ByteBudget(max_bytes, stop)
        self._ready: queue.SimpleQueue[_Ready | None] = queue.SimpleQueue()
        """What can be encoded; None: the writer has completed something."""
        self._heap: list[tuple[bool, int, _Ready]] = []
        """What the caller's thread has taken from there: errors first, then by place, so that little waits its turn."""
        self._num_decoders = num_decoders
        self._num_fetching = self._num_decoding = 0
        """Begun and not fetched yet; fetched and not decoded yet."""
        self._lock = threading.Lock()
        self.seconds = dict.fromkeys(POOLS, 0.0)
        """Of the encoder's thread: `encode`, and what it waited for: `fetch`, `decode` or `write`."""
        self._last = dict(self.seconds)

    def lap(self) -> dict[str, float]:
        """`seconds` since the last lap. For one thread, which may be another than the encoder's."""
        now, before = dict(self.seconds), self._last
        self._last = now
        return {name: now[name] - before[name] for name in POOLS}

    def run(self, tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """What the writer completes, as it completes it. Tasks are taken one at a time, when they are begun.

        Left by an exception it ends all pools. Raises what a stage raised.
        """
        finished = False
        writer = _Writer(self._stages, lambda: self._ready.put(None))
        try:
            upcoming, started, more, is_loaded = enumerate(tasks), 0, True, False
            while started or more:
                while more and started < self._max_started and self._stages.held_bytes <= self._max_bytes:
                    place_and_task = next(upcoming, None)
                    if place_and_task is None:
                        more = False
                        break
                    started += 1
                    self._begin(*place_and_task)
                if started and not is_loaded:
                    is_loaded = True
                    self._on_begun()
                if started:
                    started -= self._encode_next(writer)
                elif more:  # what is held waits for nothing but the writer
                    self._wait("write", writer.catch_up)
                yield from writer.results()
            self._wait("write", writer.finish)
            yield from writer.results()
            finished = True
        finally:
            if not finished:
                self._stop.set()
                self._frames.wake()
                self._on_stop()
            self._fetchers.shutdown(wait=True, cancel_futures=True)
            self._decoders.shutdown(wait=True, cancel_futures=True)
            writer.close()

    def _begin(self, place: int, task: Task) -> None:
        self._count(fetching=1)
        self._fetchers.submit(self._fetch, place, task)

    def _fetch(self, place: int, task: Task) -> None:
        try:
            fetched = self._stages.fetch(task)
        except BaseException as error:
            self._count(fetching=-1)
            self._ready.put(_Ready(place, task, None, 0, error))
            return
        self._count(fetching=-1, decoding=1)
        with suppress(RuntimeError):  # the pool is shut down: the run is being left
            self._decoders.submit(self._decode, place, task, fetched)

    def _decode(self, place: int, task: Task, fetched: Fetched) -> None:
        held = 0

        def reserve(num_bytes: int) -> None:
            nonlocal held
            self._frames.reserve(num_bytes)
            held += num_bytes

        try:
            self._ready.put(_Ready(place, task, self._stages.decode(task, fetched, reserve), held, None))
        except BaseException as error:
            self._ready.put(_Ready(place, task, None, held, error))
        finally:
            self._count(decoding=-1)

    def _count(self, fetching: int = 0, decoding: int = 0) -> None:
        with self._lock:
            self._num_fetching += fetching
            self._num_decoding += decoding

    def _encode_next(self, writer: _Writer) -> bool:
        """Encode what is ready next; False where the writer has completed something first."""
        while not self._ready.empty() or not self._heap:
            # A free decoder has nothing to do but to wait for a fetch.
            is_fetch = self._num_fetching and self._num_decoding < self._num_decoders
            item = self._wait("fetch" if is_fetch else "decode", self._ready.get)
            if item is None:
                return False
            heapq.heappush(self._heap, (item.error is None, item.place, item))
            del item  # it holds frames
        ready = heapq.heappop(self._heap)[2]
        if ready.error is not None:
            raise ready.error
        began = time.perf_counter()
        encoded = self._stages.encode(ready.task, ready.decoded)
        self.seconds["encode"] += time.perf_counter() - began
        self._frames.release(ready.num_bytes)
        task = ready.task
        del ready
        self._wait("write", lambda: writer.put(task, encoded))
        return True

    def _wait(self, what: str, wait: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return wait()
        finally:
            self.seconds[what] += time.perf_counter() - began


class _Writer:
    """The writer's thread, a few clips behind the encoder."""

    def __init__(self, stages: Any, on_result: Callable[[], None]) -> None:
        self._stages, self._on_result = stages, on_result
        self._items: queue.Queue[tuple[Any, Any] | None] = queue.Queue(maxsize=4)
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer")
        self._thread.start()

    def put(self, task: Any, encoded: Any) -> None:
        """Hand one on. Raises what the writer raised before."""
        self._items.put((task, encoded))
        self._raise()

    def results(self) -> Generator[Any, None, None]:
        """What is complete since the last call."""
        self._raise()
        with suppress(queue.Empty):
            while True:
                yield self._results.get_nowait()

    def catch_up(self) -> None:
        """Wait until all that was put is written or kept."""
        self._items.join()
        self._raise()

    def finish(self) -> None:
        """Wait until all is written, and end the thread."""
        self.close()
        self._raise()

    def close(self) -> None:
        """End the thread behind what was put."""
        if self._thread.is_alive():
            self._items.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                if self._error is None:  # after an error the rest is only taken, so that nobody waits
                    for result in self._stages.write(*item):
                        self._results.put(result)
                        self._on_result()
            except BaseException as error:
                self._error = error
                self._on_result()
            finally:
                self._items.task_done()
                item = None
        self._items.task_done()
