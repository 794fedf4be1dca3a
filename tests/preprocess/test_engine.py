"""The pools around the encoder: nobody waits for the order of clips, bytes are bounded, and all are gone at the end."""

import logging
import os
import signal
import threading
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_runs import prep

from preprocess.build import latent_pass
from preprocess.build.pools import POOLS, Pools, find_bottleneck
from preprocess.config import EngineConfig
from preprocess.video.ffmpeg import run_killable, runs_that_end
from shards.machine import usable_cores


class Work:
    """Stages over numbers, `fetch` and `decode` given; groups of `group` tasks are written in order; a byte a task."""

    def __init__(self, fetch=lambda task: task, decode=lambda task, reserve: task, group=1):
        self._fetch, self._decode, self._group = fetch, decode, group
        self.encoded, self._written, self._early = [], {}, set()

    @property
    def held_bytes(self):
        return len(self._early)

    def fetch(self, task):
        return self._fetch(task)

    def decode(self, task, fetched, reserve):
        return self._decode(fetched, reserve)

    def encode(self, task, decoded):
        self.encoded.append(decoded)
        return decoded

    def write(self, task, encoded):
        self._early.add(encoded)
        first = task // self._group * self._group
        written = self._written.setdefault(first, [])
        while (upcoming := first + len(written)) in self._early and len(written) < self._group:
            self._early.remove(upcoming)
            written.append(upcoming)
        if len(written) == self._group:
            yield written


def pools(work, *, num_fetchers=4, num_decoders=2, max_bytes=100, stop=None, **options):
    stop = stop or threading.Event()
    return Pools(work, num_fetchers=num_fetchers, num_decoders=num_decoders, max_bytes=max_bytes, stop=stop, **options)


def run(work, tasks, **options):
    return list(pools(work, **options).run(tasks))


@pytest.mark.parametrize("slow", ["fetch", "decode"])
def test_a_slow_task_holds_up_its_own_group_and_nothing_else(slow):
    """It ends last, and by then all others are encoded, and all other groups are complete."""
    others = threading.Event()

    def slowly(task, *_):
        if task == 2:
            assert others.wait(30), "the others wait for the slow one"
        return task

    work = Work(**{slow: slowly}, group=4)
    found = []
    for group in pools(work).run(range(40)):
        found.append(group)
        if len(found) == 9:
            assert 2 not in work.encoded
            others.set()
    assert found[-1] == [0, 1, 2, 3] and sorted(found) == [[n, n + 1, n + 2, n + 3] for n in range(0, 40, 4)]


def test_tasks_are_begun_ahead_and_not_read_all_at_once():
    read = []

    def tasks():
        for number in range(1000):
            read.append(number)
            yield number

    with closing(pools(Work(), num_fetchers=2).run(tasks())) as results:
        next(results)
        assert 2 <= len(read) <= 24


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 4))
def test_no_sizes_can_make_it_stuck(sizes, num_decoders):
    """Sizes above the limit too: one that holds alone may exceed it."""

    def decode(task, reserve):
        reserve(sizes[task])
        return task

    found = run(Work(decode=decode), range(len(sizes)), num_decoders=num_decoders, max_bytes=50)
    assert sorted(found) == [[task] for task in range(len(sizes))]


def test_the_budget_bounds_the_bytes_of_frames():
    lock, held, most = threading.Lock(), 0, 0

    class Counted(Work):
        def decode(self, task, fetched, reserve):
            nonlocal held, most
            reserve(30)
            with lock:
                held += 30
                most = max(most, held)
            return task

        def encode(self, task, decoded):
            nonlocal held
            time.sleep(0.01)
            with lock:
                held -= 30
            return decoded

    assert len(run(Counted(), range(30), num_decoders=4)) == 30
    assert 30 < most <= 90


def test_what_waits_to_be_written_is_bounded():
    """Nothing new is begun while more is held than the limit; the first task's end lets all go on."""
    begun, then = [], []

    def fetch(task):
        begun.append(task)
        if task == 0:
            time.sleep(1.0)
            then.append(len(begun))
        return task

    assert run(Work(fetch=fetch, group=100), range(100), max_bytes=10) == [list(range(100))]
    # The limit, what was begun before it was reached (4 fetchers, 4 a decoder), and 5 on their way to the writer.
    assert then[0] <= 10 + (4 + 2 * 4) + 5


def test_a_defect_in_the_work_comes_out_and_ends_it():
    started = []

    def decode(task, reserve):
        started.append(task)
        if task == 3:
            raise ZeroDivisionError
        return task

    with pytest.raises(ZeroDivisionError):
        run(Work(decode=decode), range(1000))
    assert len(started) < 50


def test_an_error_of_the_writer_comes_out():
    class Full(Work):
        def write(self, task, encoded):
            raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space"):
        run(Full(), range(1000))


def test_left_early_it_wakes_those_that_wait_for_room():
    stop = threading.Event()

    def decode(task, reserve):
        reserve(100)
        return task

    results = pools(Work(decode=decode), num_decoders=3, stop=stop).run(range(100))
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2 and stop.is_set()
    assert not [t for t in threading.enumerate() if t.name.startswith(("decoder", "fetcher", "writer"))]


def test_left_early_it_ends_the_programs_that_run():
    def decode(task, reserve):
        return run_killable(["sleep", "60"] if task else ["true"], timeout_seconds=100, max_stdout_bytes=10) and task

    with runs_that_end() as end_runs:
        results = pools(Work(decode=decode), on_stop=end_runs).run(range(9))
        assert next(results) == [0]
        time.sleep(0.3)
        start = time.monotonic()
        results.close()
        assert time.monotonic() - start < 5
    assert run_killable(["true"], timeout_seconds=20, max_stdout_bytes=10).returncode == 0


def test_ctrl_c_while_the_last_task_is_awaited_stops_it():
    """It comes up where the encoder's thread waits: nothing is behind the task that is waited for."""
    stop, told = threading.Event(), []

    def decode(task, reserve):
        time.sleep(0.3)  # by then the encoder waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return stop.wait(20)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(Work(decode=decode), [0], stop=stop, on_stop=lambda: told.append(True))
    assert stop.is_set() and told == [True]
    assert time.monotonic() - start < 10


def test_run_to_its_end_it_stops_nobody():
    stop = threading.Event()
    assert sorted(run(Work(), range(3), stop=stop)) == [[0], [1], [2]]
    assert not stop.is_set()


def test_of_those_that_are_ready_the_earliest_is_encoded_first():
    """All are ready, the last first, when the encoder is loaded: then it takes them in the order of the tasks."""
    work, ready = Work(), []

    def decode(task, reserve):
        while len(ready) < 7 - task:
            time.sleep(0.001)
        ready.append(task)
        return task

    def loaded():
        while len(ready) < 8:
            time.sleep(0.001)
        time.sleep(0.05)

    work._decode = decode
    assert len(run(work, range(8), num_decoders=8, on_begun=loaded)) == 8
    assert ready == list(range(7, -1, -1)) and work.encoded == list(range(8))


def test_it_says_what_the_encoder_waited_for():
    fetched = pools(Work(fetch=lambda task: time.sleep(0.1) or task), num_fetchers=1)
    assert len(list(fetched.run(range(5)))) == 5
    assert fetched.seconds["fetch"] > 0.3 > fetched.seconds["decode"]
    decoded = pools(Work(decode=lambda task, reserve: time.sleep(0.1) or task), num_fetchers=8, num_decoders=1)
    assert len(list(decoded.run(range(8)))) == 8
    assert decoded.seconds["decode"] > 0.4 > decoded.seconds["fetch"]
    laps = [decoded.lap(), decoded.lap()]
    assert laps == [decoded.seconds, dict.fromkeys(POOLS, 0.0)]
    assert [find_bottleneck(each.seconds) for each in (fetched, decoded)] == ["fetch", "decode"]


def test_few_clips_between_two_decoders_are_still_a_wait_for_fetching():
    """Each clip is decoded for as long as the next one is fetched; one of two decoders has nothing to do throughout."""
    work = Work(fetch=lambda task: time.sleep(0.1) or task, decode=lambda task, reserve: time.sleep(0.09) or task)
    slow = pools(work, num_fetchers=1, num_decoders=2)
    assert len(list(slow.run(range(8)))) == 8
    assert slow.seconds["fetch"] > 4 * slow.seconds["decode"] and find_bottleneck(slow.seconds) == "fetch"


@pytest.mark.parametrize(
    ("fetch", "decode", "encode", "write", "found"),
    [(1, 2, 97, 0, "encode"), (5, 10, 80, 5, "decode"), (0, 0, 50, 50, "write"), (0, 0, 0, 0, None)],
)
def test_the_pool_that_limits_a_build_is_named(fetch, decode, encode, write, found):
    assert find_bottleneck({"fetch": fetch, "decode": decode, "encode": encode, "write": write}) == found


@pytest.mark.parametrize(
    ("decoders", "cores", "encoders", "on_cpu", "number"),
    [
        (3, 64, 1, False, 3), ("auto", 8, 2, False, 3), ("auto", 4, 4, False, 1), ("auto", 208, 8, False, 16),
        ("auto", 2, 1, True, 1), ("auto", 16, 1, True, 2), ("auto", 3, 8, True, 1),
    ],
)  # fmt: skip
def test_each_encoder_has_its_share_of_the_cores_for_decoding(decoders, cores, encoders, on_cpu, number):
    assert EngineConfig(decoders=decoders).num_decoders(cores, encoders, on_cpu) == number


def test_auto_is_resolved_once_and_said(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(latent_pass, "usable_cores", lambda: 16)
    with caplog.at_level(logging.INFO, "wan"):
        settled = latent_pass.settle_decoders(prep(tmp_path, tmp_path), ["cuda:0", "cuda:1"])
        assert latent_pass.settle_decoders(settled, ["cuda:0"]) is settled
    assert settled.engine.decoders == 7
    assert caplog.messages == ["engine.decoders: auto is 7 for each of 2 encoders, on 16 cores"]


@pytest.mark.parametrize(
    ("text", "most"), [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1), ("x", None)]
)
def test_a_container_s_share_of_time_bounds_the_cores(tmp_path, text, most):
    (tmp_path / "cpu.max").write_text(text)
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path / "cpu.max") == (cores if most is None else min(cores, most))
