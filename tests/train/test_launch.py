"""The launcher: what it gives its ranks, who is told what, and that nobody outlives it. Its ranks need no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from launchers import end, is_alive, pids, start_launcher, wait_for

from shards.errors import UserError
from train.cli.main import main
from train.launch.failure import Failure, describe_signal, first_cause, name_ranks
from train.launch.launch import Place, make_place

HERE = Path(__file__).parent


def start(folder: Path, *arguments: str, ranks: int = 3, grace: float = 20) -> subprocess.Popen[str]:
    """A launcher of plain ranks."""
    return start_launcher(folder, grace, ranks, 1, 0, "-", "plain_ranks.py", *arguments)


def wait_for_ranks(folder: Path, number: int = 3) -> list[int]:
    """Until all of them listen to signals."""
    wait_for(lambda: len(pids(folder)) == number)
    return pids(folder)


def test_every_rank_knows_its_place_and_only_the_first_speaks(tmp_path):
    code, said = end(start(tmp_path, "done"))
    assert (code, said) == (0, "rank 0 speaks\n")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    places = [json.loads((tmp_path / f"env-{rank}.json").read_text()) for rank in range(3)]
    assert [[place[name] for name in names[:4]] for place in places] == [[str(r), str(r), "3", "3"] for r in range(3)]
    assert len({tuple(place[name] for name in names[4:]) for place in places}) == 1
    assert [(tmp_path / f"logs/rank-{rank}.log").read_text() for rank in (1, 2)] == [
        "rank 1 speaks\n",
        "rank 2 speaks\n",
    ]
    assert Place(4, 3, 2, "a:1").ranks == range(8, 12) and Place(4, 3, 2, "a:1").world_size == 12


@pytest.mark.parametrize(
    ("fault", "rank", "code", "words"),
    [
        ("raise", 1, 1, "error: rank 1: ZeroDivisionError: a defect of this rank\n  raised in plain_ranks.py, line"),
        ("mistake", 2, 2, "error: rank 2: the disk is full\n  to fix:  make room\n"),
        ("kill", 1, 137, "error: rank 1 was killed by SIGKILL; if no person did that, the machine ran out of memory"),
        ("kill", 0, 137, "error: rank 0 was killed by SIGKILL"),
        ("exit", 0, 1, "error: rank 0 ended with code 9 and left no message"),
        ("hang-after-record", 2, 1, "error: rank 2: something broke, and its thread does not end"),
    ],
)
def test_one_failure_ends_all_with_the_first_cause_on_top(tmp_path, fault, rank, code, words):
    ended, said = end(start(tmp_path, fault, str(rank)))
    assert ended == code
    assert said.removeprefix("rank 0 speaks\n").startswith(words), said
    assert f"rank-{rank}.log" in said and "Traceback" not in said
    assert not any(is_alive(pid) for pid in pids(tmp_path))
    if fault == "raise":
        assert "Traceback" in (tmp_path / f"logs/rank-{rank}.log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_is_passed_on_and_the_ranks_have_time(tmp_path, number, code):
    launcher = start(tmp_path)
    alive = wait_for_ranks(tmp_path)
    launcher.send_signal(number)
    assert end(launcher) == (code, "rank 0 speaks\n")
    assert len(list(tmp_path.glob("saved-*"))) == 3 and not any(map(is_alive, alive))


def test_usr1_is_passed_on_and_ends_nothing(tmp_path):
    launcher = start(tmp_path)
    wait_for_ranks(tmp_path)
    launcher.send_signal(signal.SIGUSR1)
    wait_for(lambda: len(list(tmp_path.glob("used-*"))) == 3)
    launcher.send_signal(signal.SIGTERM)
    assert end(launcher)[0] == 143


def test_after_the_grace_time_what_is_left_is_killed(tmp_path):
    launcher = start(tmp_path, "deaf", grace=0.5)
    alive = wait_for_ranks(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    code, said = end(launcher)
    assert code == 137 and "no checkpoint within 0.5 s of the signal: ranks 0–2 were killed" in said
    assert "parallel.grace_seconds" in said and not any(map(is_alive, alive))


def test_a_second_interrupt_ends_at_once(tmp_path):
    launcher = start(tmp_path, "deaf", grace=600)
    alive = wait_for_ranks(tmp_path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    code, said = end(launcher, seconds=10)
    assert code == 130 and "interrupted" in said and not any(map(is_alive, alive))


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path):
    launcher = start(tmp_path, "deaf")
    alive = wait_for_ranks(tmp_path)
    launcher.kill()
    launcher.communicate()
    wait_for(lambda: not any(map(is_alive, alive)), seconds=10)


def test_children_of_a_rank_end_with_it(tmp_path):
    launcher = start(tmp_path, "child", ranks=2)
    ranks = wait_for_ranks(tmp_path, 2)
    children = pids(tmp_path, "child")
    assert len(children) == 2 and all(map(is_alive, children))
    os.kill(ranks[0], signal.SIGKILL)
    assert end(launcher)[0] == 137
    wait_for(lambda: not any(map(is_alive, children)), seconds=10)


def test_the_first_cause_is_the_earliest_that_followed_from_nobody(monkeypatch):
    lost, defect, later = (
        Failure(0, "a", "lost", "the connection broke", 1.0),
        Failure(3, "a", "crash", "ZeroDivisionError", 2.0),
        Failure(1, "a", "killed", "rank 1 was killed", 3.0),
    )
    assert first_cause([lost, later, defect]) is defect
    assert first_cause([lost]) is lost
    assert [failure.exit_code for failure in (lost, defect)] == [75, 1]
    assert [name_ranks(x) for x in ([3], [2, 0], [5, 6, 7], [1, 3, 4])] == [
        "rank 3",
        "ranks 0, 2",
        "ranks 5–7",
        "ranks 1, 3, 4",
    ]
    assert "shared memory" in describe_signal(signal.SIGBUS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("0", 1, None, None), "--nproc-per-node 0"),
        (("many", 1, None, None), "a number from 1"),
        (("2", 2, None, "a:1"), "needs --node-rank and --master"),
        (("2", 2, 1, None), "needs --node-rank and --master"),
        (("2", 2, 2, "a:1"), "0 to 1"),
        (("2", 2, 1, "node0"), "not host:port"),
        (("2", 2, 1, "node0:99999"), "not host:port"),
    ],
)
def test_a_place_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(UserError) as caught:
        make_place(*arguments)
    assert words in str(caught.value)


def test_mistakes_are_told_once_before_anything_starts(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output: {tmp_path}/run\nmax_steps: 1\nmodel: {{checkpoint: /nowhere}}\ndata: {{root: /nowhere}}\n"
    )
    for extra, words in (
        (["--nproc-per-node", "2", "-o", "max_steps=x"], "max_steps"),
        (["--nproc-per-node", "2", "--nnodes", "2"], "--master HOST:PORT"),
        (["--nnodes", "2"], "belong to --nproc-per-node"),
    ):
        result = CliRunner().invoke(main, ["fit", str(path), *extra])
        assert result.exit_code == 2 and words in result.output and result.output.count("error:") == 1
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(main, ["fit", str(path), "--nproc-per-node", "2"])
    assert result.exit_code == 2 and "under a launcher" in result.output
    assert not (tmp_path / "run").exists()
