"""Decoders ahead of the encoder: in order, within the budget, never stuck, and gone when they are no longer wanted."""

import signal
import threading
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.build.ordered_pool import in_order
from preprocess.video.ffmpeg import run_killable, runs_that_end


def _run(items, work, num_workers=4, max_bytes=100):
    return list(in_order(items, work, num_workers=num_workers, max_bytes=max_bytes, stop=threading.Event()))


def test_results_come_in_order_however_long_each_takes():
    def work(item, reserve):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item

    assert _run(range(40), work) == list(range(40))


def test_workers_run_ahead_and_items_are_not_read_all_at_once():
    read = []

    def items():
        for number in range(1000):
            read.append(number)
            yield number

    results = in_order(items(), lambda item, reserve: item, num_workers=2, max_bytes=1, stop=threading.Event())
    with closing(results):
        assert next(results) == 0
        assert 2 <= len(read) <= 20


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 4))
def test_no_sizes_can_make_it_stuck(sizes, num_workers):
    """Sizes above the whole budget too: the one that is waited for may always go on."""

    def work(size, reserve):
        reserve(size)
        return size

    assert _run(sizes, work, num_workers=num_workers, max_bytes=50) == sizes


def test_the_budget_bounds_what_waits():
    lock, held, most = threading.Lock(), 0, 0

    def work(item, reserve):
        nonlocal held, most
        reserve(30)
        with lock:
            held += 30
            most = max(most, held)
        return item

    results = in_order(range(30), work, num_workers=4, max_bytes=100, stop=threading.Event())
    for _ in results:
        time.sleep(0.01)
        with lock:
            held -= 30
    # 100 bytes, and the one that the consumer waits for on top.
    assert 30 < most <= 130


def test_a_bug_in_the_work_comes_out_and_ends_it():
    started = []

    def work(item, reserve):
        started.append(item)
        if item == 3:
            raise ZeroDivisionError
        return item

    with pytest.raises(ZeroDivisionError):
        _run(range(1000), work)
    assert len(started) < 50


def test_left_early_it_wakes_those_that_wait_for_room():
    stop = threading.Event()

    def work(item, reserve):
        reserve(100)
        return item

    results = in_order(range(100), work, num_workers=3, max_bytes=100, stop=stop)
    assert next(results) == 0
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2 and stop.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decoder")]


def test_left_early_it_ends_the_programs_that_run():
    def work(item, reserve):
        return run_killable(["sleep", "60"] if item else ["true"], timeout_seconds=100, max_stdout_bytes=10)

    with runs_that_end() as end_runs:
        results = in_order(range(9), work, num_workers=2, max_bytes=1, stop=threading.Event(), on_stop=end_runs)
        assert next(results).returncode == 0
        time.sleep(0.3)
        start = time.monotonic()
        results.close()
        assert time.monotonic() - start < 5
    assert run_killable(["true"], timeout_seconds=20, max_stdout_bytes=10).returncode == 0


def test_left_while_the_last_item_is_awaited_it_is_told_to_stop():
    """As Ctrl-C does, which comes up where the consumer waits: nothing is behind the item that is waited for."""
    stop = threading.Event()

    def work(item, reserve):
        time.sleep(0.3)  # by then the consumer waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return stop.wait(20)

    told = []
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(in_order([0], work, num_workers=1, max_bytes=1, stop=stop, on_stop=lambda: told.append(True)))
    assert stop.is_set() and told == [True]
    assert time.monotonic() - start < 10


def test_run_to_its_end_it_stops_nobody():
    stop = threading.Event()
    assert list(in_order(range(3), lambda item, reserve: item, num_workers=2, max_bytes=1, stop=stop)) == [0, 1, 2]
    assert not stop.is_set()
