"""Ranks of a sharded model that trains are killed, or cannot write: a checkpoint is complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from train_runs import DIMS, checkpoint_bytes, make_config

from shards.console import set_up_logging
from shards.errors import UserError
from train import checkpoint
from train.config.train import TrainConfig
from train.launch.failure import RankLost
from train.loop import fit

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def settings(shards: Path, output: Path, max_steps: int) -> TrainConfig:
    more: dict[str, Any] = {"parallel": {"shard": "full"}, "data__micro_batch": 1, "optim__ema_decay": 0.9}
    return make_config(shards, output, model={"dims": DIMS}, lora=None, max_steps=max_steps, **more)


def train(config: TrainConfig) -> None:
    set_up_logging(terminal=False)
    fit(config)


def train_killed(config: TrainConfig, rank: int, place: int) -> int:
    """One rank is killed at the so many-th thing that it does with the files of the checkpoint of step 10, if it comes
    to that; returns how many there were."""
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and any("step-0000010" in str(argument) for argument in arguments):
            seen += 1
            if seen == place:
                os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ["RANK"]) == rank:
        sys.addaudithook(look)
    train(config)
    return seen


@pytest.fixture(scope="module")
def half(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps on two ranks."""
    folder = tmp_path_factory.mktemp("half") / "run"
    run_ranks(2, train, settings(tiny_shards, folder, 5))
    return folder


@pytest.fixture(scope="module")
def straight(tiny_shards: Path, half: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The checkpoint of the same after ten."""
    folder = shutil.copytree(half, tmp_path_factory.mktemp("straight") / "run")
    run_ranks(2, train, settings(tiny_shards, folder, 10))
    return checkpoint_bytes(folder, 10)


def killed_at(shards: Path, half: Path, folder: Path, rank: int, place: int) -> bool:
    """Go on from step 5 with a kill in the checkpoint of step 10; whether it came to that."""
    shutil.copytree(half, folder)
    config = settings(shards, folder, 10)
    try:
        counts = run_ranks(2, train_killed, config, rank, place)
    except AssertionError:
        found = checkpoint.verify_run(folder)
        assert {one.state for one in found if "step-" in one.path} <= {"good", "unfinished"}, found
        whole = [path.name for path in checkpoint.find_checkpoints(folder / "checkpoints")]
        assert whole in (["step-0000005"], ["step-0000005", "step-0000010"])
        return True
    assert counts[rank] < place
    return False


@pytest.mark.parametrize(("rank", "place"), [(0, 6), (1, 2)])
def test_killed_in_a_checkpoint_and_resumed_is_the_run_that_never_stopped(
    tiny_shards: Path, half: Path, straight: dict[str, bytes], tmp_path: Path, rank: int, place: int
) -> None:
    assert killed_at(tiny_shards, half, tmp_path / "run", rank, place)
    run_ranks(2, train, settings(tiny_shards, tmp_path / "run", 10))
    assert checkpoint_bytes(tmp_path / "run", 10) == straight
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_killed_at_any_write_is_complete_or_absent(
    tiny_shards: Path, half: Path, straight: dict[str, bytes], tmp_path: Path, rank: int
) -> None:
    place = 1
    while killed_at(tiny_shards, half, tmp_path / f"run-{place}", rank, place):
        if place % 3 == 0:
            run_ranks(2, train, settings(tiny_shards, tmp_path / f"run-{place}", 10))
            assert checkpoint_bytes(tmp_path / f"run-{place}", 10) == straight, place
        place += 1
    assert place > 5


def train_full_disk(config: TrainConfig) -> str:
    """Rank 1 cannot write its rows; how each rank ends."""
    from train.parallel import rows

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == "1":
        rows.os = type("os", (), {"fsync": staticmethod(no_space)})  # type: ignore[assignment]
    set_up_logging(terminal=False)
    try:
        fit(config)
    except UserError as error:
        return f"{error.exit_code} {error}"
    return "no error"


def test_a_disk_that_is_full_for_one_rank_ends_all_with_its_reason(
    tiny_shards: Path, half: Path, tmp_path: Path
) -> None:
    """At once, with the exit code of something that passes; the checkpoint before stays and is resumed."""
    folder = shutil.copytree(half, tmp_path / "run")
    first, second = run_ranks(2, train_full_disk, settings(tiny_shards, folder, 10))
    assert first.startswith("75 rank 1: ") and second.startswith("75 ")
    assert "No space left" in first and "No space left" in second
    assert not list((folder / "checkpoints").glob(".*"))
    assert [path.name for path in checkpoint.find_checkpoints(folder / "checkpoints")] == ["step-0000005"]
    run_ranks(2, train, settings(tiny_shards, folder, 10))


def train_bad_batch(config: TrainConfig, bad_step: int) -> str:
    """Rank 1 cannot read the batch of a step; how each rank ends."""
    from train import loop

    class Loader(loop.Loader):
        def __next__(self) -> Any:
            batch, position = super().__next__()
            if (os.environ["RANK"], batch.step) == ("1", bad_step):
                raise UserError("a sample is damaged")
            return batch, position

    loop.Loader = Loader
    try:
        train(config)
    except (UserError, RankLost) as error:
        return f"{type(error).__name__} {error}"
    return "no error"


def test_a_rank_that_cannot_read_its_batch_leaves_a_checkpoint_of_the_step_before(
    tiny_shards: Path, half: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    """All ranks write it together, then end."""
    folder = shutil.copytree(half, tmp_path / "run")
    ends = run_ranks(2, train_bad_batch, settings(tiny_shards, folder, 10), 8)
    assert ends == ["RankLost rank 1 failed: UserError: a sample is damaged", "UserError a sample is damaged"]
    assert checkpoint.find_checkpoints(folder / "checkpoints")[-1].name == "step-0000007"
    run_ranks(2, train, settings(tiny_shards, folder, 10))
    assert checkpoint_bytes(folder, 10) == straight


def train_one_lost(config: TrainConfig, bad_step: int) -> str:
    """Rank 1 is killed in the micro-batches of a step."""
    from train import loop

    plain = loop.backward

    def backward(trainee: Any, batch: Any, *rest: Any) -> Any:
        if (os.environ["RANK"], batch.step) == ("1", bad_step):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(trainee, batch, *rest)

    loop.backward = backward
    train(config)
    return "done"


def test_a_rank_that_is_killed_leaves_the_newest_checkpoint_to_resume_from(
    tiny_shards: Path, half: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    folder = shutil.copytree(half, tmp_path / "run")
    with pytest.raises(AssertionError):
        run_ranks(2, train_one_lost, settings(tiny_shards, folder, 10), 8)
    assert [path.name for path in checkpoint.find_checkpoints(folder / "checkpoints")] == ["step-0000005"]
    run_ranks(2, train, settings(tiny_shards, folder, 10))
    assert checkpoint_bytes(folder, 10) == straight
