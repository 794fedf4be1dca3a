"""Real gloo ranks that lose one another: who is missing is named, everybody ends, nobody is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launchers import end, is_alive, pids, start_launcher, wait_for

from train.launch.launch import free_port
from train.launch.rank_status import Beat, compare


def start(
    folder: Path, *arguments: str, ranks: int = 3, nodes: int = 1, node: int = 0, master: str = "-"
) -> subprocess.Popen[str]:
    """A launcher of ranks that sum a number each step."""
    return start_launcher(folder, 20, ranks, nodes, node, master, "ranks_at_work.py", *arguments)


def test_a_stalled_rank_is_named_with_its_step(tmp_path):
    code, said = end(start(tmp_path, "1000", "stop", "1", "100", ranks=2))
    assert code == 75, said
    assert "rank 1 did not arrive at step 100, the sum" in said
    assert "silent, last at step" in said and "killed or stopped" in said
    assert len(pids(tmp_path)) == 2 and not any(map(is_alive, pids(tmp_path)))


@pytest.mark.slow
def test_ranks_that_finish_leave_in_peace(tmp_path):
    code, said = end(start(tmp_path, "30"))
    assert (code, said) == (0, "rank 0 speaks\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "code", "words"),
    [
        ("kill", 1, 137, "error: rank 1 was killed by SIGKILL"),
        ("kill", 0, 137, "error: rank 0 was killed by SIGKILL"),
        ("raise", 2, 1, "error: rank 2: ZeroDivisionError: a defect of this rank"),
        ("raise", 0, 1, "error: rank 0: ZeroDivisionError: a defect of this rank"),
        ("out-of-memory", 1, 1, "error: rank 1: OutOfMemoryError: CUDA out of memory"),
        ("stop", 0, 75, "error: rank 0 did not arrive at step 50, the sum"),
        ("sleep", 2, 75, "rank 2 on"),
    ],
)
def test_the_first_cause_is_on_top(tmp_path, fault, rank, code, words):
    began = time.monotonic()
    ended, said = end(start(tmp_path, "1000", fault, str(rank), "50"))
    assert ended == code, said
    assert said.removeprefix("rank 0 speaks\n").startswith("error: ") and words in said, said
    if fault == "sleep":
        assert "alive, still at step 50, its own work" in said
        assert "commit_fault" in (tmp_path / "logs/rank-2.log").read_text()  # its stack
    assert time.monotonic() - began < 60
    assert not any(map(is_alive, pids(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_machine_that_dies_ends_the_other_within_a_minute(tmp_path, dead):
    """Two launchers on the loopback; one and its ranks are killed at once."""
    master = f"127.0.0.1:{free_port()}"
    both = [start(tmp_path, "100000", ranks=2, nodes=2, node=node, master=master) for node in (0, 1)]
    wait_for(lambda: len(list(tmp_path.glob("at-*"))) == 4)
    time.sleep(2)
    for pid in (both[dead].pid, *(int((tmp_path / f"pid-{rank}").read_text()) for rank in (2 * dead, 2 * dead + 1))):
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    code, said = end(both[1 - dead], seconds=60)
    assert time.monotonic() - began < 60 and code == 75, said
    if dead == 1:
        assert "ranks 2, 3 did not arrive" in said and "killed or stopped, or its machine is gone" in said
    else:
        assert "which serves the ranks' store, is gone" in said
    assert not any(map(is_alive, pids(tmp_path)))
    both[dead].communicate()


@pytest.mark.slow
def test_what_fails_on_one_machine_is_told_on_the_other(tmp_path):
    master = f"127.0.0.1:{free_port()}"
    both = [start(tmp_path, "100000", "raise", "3", "60", ranks=2, nodes=2, node=n, master=master) for n in (0, 1)]
    codes, said = zip(*(end(launcher) for launcher in both), strict=True)
    assert codes == (75, 1), said
    assert all("rank 3" in words and "ZeroDivisionError: a defect of this rank" in words for words in said), said


@pytest.mark.slow
def test_ranks_agree_on_where_to_stop(tmp_path):
    launcher = start(tmp_path, "100000")
    wait_for(lambda: len(list(tmp_path.glob("at-*"))) == 3)
    os.kill(pids(tmp_path)[1], signal.SIGTERM)  # one rank alone is told
    assert end(launcher)[0] == 143
    assert len({path.read_text() for path in tmp_path.glob("saved-*")}) == 1


def test_who_is_absent_silent_or_behind():
    def beat(number: int, arrivals: int) -> Beat:
        return Beat(number, "node0", 7, "the sum", arrivals)

    before = [beat(1, 9), beat(1, 9), beat(1, 8), None]
    here = beat(3, 9)
    standing = compare(before, [beat(2, 9), beat(1, 9), beat(2, 8), None], 0, here)
    assert (standing.absent, list(standing.silent), list(standing.behind)) == ([3], [1], [2])
    words = standing.describe(4, 30)
    assert words.startswith("ranks 1–3 did not arrive at step 7, the sum in 30 s")
    assert "rank 3: never connected" in words and "rank 1 on node0: silent" in words
    all_here = compare([here, beat(1, 9)], [here, beat(2, 9)], 0, here)
    assert "all 2 ranks are at step 7" in all_here.describe(2, 30) and "NCCL" in all_here.describe(2, 30)
    ahead = compare([here, beat(1, 12)], [here, beat(2, 12)], 0, here)
    assert list(ahead.behind) == [0]  # this rank is the one that does not come
