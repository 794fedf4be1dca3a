"""Work in threads ahead of one consumer, in order, within a budget of bytes. Nothing here changes a byte of output."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD_PER_WORKER = 4


class ByteBudget:
    """Bytes that may wait for the consumer. The result it waits for next always gets its own: no deadlock."""

    def __init__(self, limit: int, stop: threading.Event) -> None:
        self._limit = limit
        self._stop = stop
        self._used: dict[int, int] = {}
        self._head = 0
        self._changed = threading.Condition()

    def reserve(self, number: int, num_bytes: int) -> None:
        """Wait until item `number` may hold `num_bytes`: there is room, or the consumer waits for it."""

        def may() -> bool:
            used = sum(self._used.values())
            return self._stop.is_set() or number == self._head or used + num_bytes <= self._limit

        with self._changed:
            self._changed.wait_for(may)
            self._used[number] = self._used.get(number, 0) + num_bytes

    def advance(self, number: int) -> None:
        """Item `number` is consumed: its bytes are free, and the next is waited for."""
        with self._changed:
            self._used.pop(number, None)
            self._head = number + 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Make every waiting thread check `stop` again."""
        with self._changed:
            self._changed.notify_all()


def in_order(
    items: Iterable[Item],
    work: Callable[[Item, Callable[[int], None]], Result],
    *,
    num_workers: int,
    max_bytes: int,
    stop: threading.Event,
    on_stop: Callable[[], None] = lambda: None,
    name: str = "decoder",
) -> Generator[Result, None, None]:
    """Results of `work(item, reserve)` in the order of `items`, made by threads ahead of the consumer.

    Args:
        items: taken one at a time, never all at once.
        work: must call `reserve(num_bytes)` before it makes something large, at most once.
        num_workers: threads.
        max_bytes: what may be reserved and not yet consumed.
        stop: set when the iterator is left early (an exception, Ctrl-C): work should check it.
        on_stop: called then, to end what cannot check it.
        name: of the threads.
    """
    budget = ByteBudget(max_bytes, stop)
    waiting: deque[tuple[int, Future[Result]]] = deque()
    numbered = enumerate(items)
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix=name)
    finished = False
    try:
        while True:
            while len(waiting) < num_workers * AHEAD_PER_WORKER and (upcoming := next(numbered, None)):
                number, item = upcoming
                waiting.append((number, pool.submit(work, item, partial(budget.reserve, number))))
            if not waiting:
                finished = True
                return
            number, future = waiting.popleft()
            yield future.result()
            del future
            budget.advance(number)
    finally:
        # An empty `waiting` says nothing: the item that is awaited, perhaps the last, is no longer in it.
        if not finished:
            stop.set()
            budget.wake()
            on_stop()
        pool.shutdown(wait=True, cancel_futures=True)
