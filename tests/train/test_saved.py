"""A run never ends without a checkpoint where its state is exact, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import train_runs
from fault_proxy import proxied
from ranks import run_ranks
from s3_servers import BUCKET, serve
from shards_data import flip_a_latent, write_dataset
from train_runs import checkpoint_bytes, make_config, read_metrics, send_when

from shards.config import dump_config
from shards.console import set_up_logging
from shards.errors import SystemFailure, UserError
from shards.storage import open_storage
from train import checkpoint, loop
from train.checkpoint import find_checkpoints, read_checkpoint
from train.evaluate import Evaluator
from train.launch.failure import RankLost
from train.launch.launch import own_command
from train.loop import fit
from train.run.events import write_event
from train.run.log import RunLog


def newest(folder: Path) -> int:
    """Step of the newest checkpoint of a run; 0 where there is none."""
    found = find_checkpoints(folder / "checkpoints")
    return read_checkpoint(found[-1]).step if found else 0


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_an_error_of_the_loader_saves_the_steps_before_it_and_its_advice_can_be_followed(tiny_shards, tmp_path):
    """`substitute`, which the message recommends, is no other identity: the resume takes it."""
    root = flip_a_latent(tiny_shards, tmp_path / "shards")
    changes = {"max_steps": 20, "data__validation_fraction": 0.0, "checkpoint__every_steps": 100}
    with pytest.raises(UserError, match="on_bad_sample=substitute"):
        fit(make_config(root, tmp_path / "run", **changes))
    done = len(read_metrics(tmp_path / "run"))
    assert newest(tmp_path / "run") == done > 0
    last = events(tmp_path / "run")[-1]
    assert (last["event"], last["reason"], last["step"]) == ("stop", "error", done) and "cannot be read" in last[
        "error"
    ]
    changes["data__on_bad_sample"] = "substitute"
    fit(make_config(root, tmp_path / "run", **changes))
    fit(make_config(root, tmp_path / "straight", **changes))
    assert any(line["substituted"] for line in read_metrics(tmp_path / "run"))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")


def test_an_error_of_the_evaluation_saves_the_step_and_the_resume_takes_it_again(tiny_shards, tmp_path, monkeypatch):
    def config(name):
        return make_config(tiny_shards, tmp_path / name, eval={"num_clips": 2, "every_steps": 4})

    original, calls = Evaluator.take, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a kernel failed")
        return original(*arguments)

    monkeypatch.setattr(Evaluator, "take", failing)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        fit(config("run"))
    (path,) = find_checkpoints(tmp_path / "run/checkpoints")
    state = read_checkpoint(path)
    assert (state.step, state.owed) == (4, ("evaluation",))
    fit(config("run"))
    monkeypatch.setattr(Evaluator, "take", original)
    fit(config("straight"))
    for name in ("metrics.jsonl", "held_out.jsonl"):
        assert read_metrics(tmp_path / "run", name) == read_metrics(tmp_path / "straight", name)
    assert checkpoint_bytes(tmp_path / "run", 10) == checkpoint_bytes(tmp_path / "straight", 10)


def test_an_error_of_the_log_saves_the_step(tiny_shards, tmp_path):
    """metrics.jsonl on a disk that is full; the checkpoint's is not."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    config = make_config(tiny_shards, tmp_path / "run")
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device") as caught:
        fit(config)
    assert caught.value.exit_code == 75
    assert newest(tmp_path / "run") == 1
    (tmp_path / "run/metrics.jsonl").unlink()
    fit(config)
    fit(make_config(tiny_shards, tmp_path / "straight"))
    assert checkpoint_bytes(tmp_path / "run", 10) == checkpoint_bytes(tmp_path / "straight", 10)


def test_an_error_within_an_update_saves_nothing(tiny_shards, tmp_path, monkeypatch):
    """There weights and step do not belong together."""
    from train.run import state

    original, calls = state.clip_gradients, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return original(*arguments)

    monkeypatch.setattr(state, "clip_gradients", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(make_config(tiny_shards, tmp_path / "run"))
    assert newest(tmp_path / "run") == 0


def test_under_nohup_a_hangup_ends_nothing(tiny_shards, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_when(tmp_path / "run/metrics.jsonl", signal.SIGHUP)
        result = fit(make_config(tiny_shards, tmp_path / "run", max_steps=30))
        assert (result.step, result.stopped_by) == (30, None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_cannot_read_ends_the_run_with_a_checkpoint(tiny_shards, tmp_path):
    """The others stop at the same step, rank 0 saves, and the error of the rank that had it is on the terminal."""
    root = flip_a_latent(tiny_shards, tmp_path / "shards")
    config = make_config(
        root,
        tmp_path / "run",
        max_steps=40,
        data__validation_fraction=0.0,
        checkpoint__every_steps=100,
        data__micro_batch=1,
    )
    (tmp_path / "run.yaml").write_text(dump_config(config))
    command = own_command(["fit", str(tmp_path / "run.yaml"), "--nproc-per-node", "2"])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 2, done.stderr
    assert "cannot be read, tried twice" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\nerror: ") == 1 and "C++" not in done.stderr
    assert newest(tmp_path / "run") == len(read_metrics(tmp_path / "run")) > 0


def test_an_outage_that_outlasts_the_patience_ends_with_a_checkpoint_and_code_75(tmp_path, monkeypatch):
    for name, value in (
        ("ACCESS_KEY_ID", "testing"),
        ("SECRET_ACCESS_KEY", "testing"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    with serve("moto", tmp_path / "s3") as endpoint, proxied(endpoint) as proxy:
        write_dataset(tmp_path / "shards", scratch=tmp_path / "scratch")
        root = f"s3://{BUCKET}/run?endpoint={proxy.url}"
        remote = open_storage(root)
        local = open_storage(str(tmp_path / "shards"))
        for entry in local.list():
            remote.put(entry.name, local.get(entry.name))
        config = make_config(
            root, tmp_path / "run", max_steps=100_000, checkpoint__every_steps=50_000,
            storage={"patience_minutes": 0.05}, data__read_timeout_seconds=1.0,
        )  # fmt: skip
        (tmp_path / "run.yaml").write_text(dump_config(config))
        process = subprocess.Popen(own_command(["fit", str(tmp_path / "run.yaml")]), stderr=subprocess.PIPE, text=True)
        train_runs.wait_for_metrics(tmp_path / "run", 3)
        proxy.fault = lambda request: 503
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert "Traceback" not in said and "damage" not in said
    assert newest(tmp_path / "run") == len(read_metrics(tmp_path / "run")) >= 3
    kinds = [event["event"] for event in events(tmp_path / "run")]
    # The end of the wait that is given up may be written behind the stop.
    assert [kind for kind in kinds if kind != "waiting"][-1] == "stop" and "waiting" in kinds


def test_sighup_is_a_signal_like_sigterm(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path / "run", max_steps=100_000, checkpoint__every_steps=50_000)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    process = subprocess.Popen(own_command(["fit", str(tmp_path / "run.yaml")]), stderr=subprocess.PIPE, text=True)
    train_runs.wait_for_metrics(tmp_path / "run", 3)
    os.kill(process.pid, signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP
    assert newest(tmp_path / "run") == len(read_metrics(tmp_path / "run"))


@pytest.fixture
def held_write(monkeypatch):
    """Writes of checkpoints wait until a step is in the metrics: with it the function that says for which."""
    original, write_step, at, reached = checkpoint.write_checkpoint, RunLog.write_step, [0], threading.Event()

    def held(folder, state, *rest):
        assert state.step >= at[0] or reached.wait(120), "the steps wait for the checkpoint"
        return original(folder, state, *rest)

    def noted(log, record):
        write_step(log, record)
        if record.step >= at[0]:
            reached.set()

    monkeypatch.setattr(checkpoint, "write_checkpoint", held)
    monkeypatch.setattr(RunLog, "write_step", noted)
    return lambda step: at.__setitem__(0, step)


def test_steps_go_on_while_a_checkpoint_is_written_and_change_nothing_in_it(tiny_shards, tmp_path, held_write):
    """Step 5's is written when step 8 is done: weights, moments, average and counters are those of step 5."""
    changes = {"optim__ema_decay": 0.9, "optim__lr": 1e-2}
    fit(make_config(tiny_shards, tmp_path / "straight", **changes))
    held_write(8)
    fit(make_config(tiny_shards, tmp_path / "run", **changes))
    for step in (5, 10):
        assert checkpoint_bytes(tmp_path / "run", step) == checkpoint_bytes(tmp_path / "straight", step)
    kinds = [(event["event"], event["step"]) for event in events(tmp_path / "run")]
    assert kinds[-3:] == [("checkpoint", 5), ("checkpoint", 10), ("stop", 10)]


def test_an_error_of_the_write_ends_the_run_and_a_later_step_is_saved(tiny_shards, tmp_path, held_write, monkeypatch):
    """A disk that refused for a moment: the same error as without the thread, and no step is lost."""
    held, refused = checkpoint.write_checkpoint, []

    def refusing(folder, state, *rest):
        if not refused:
            refused.append(state.step)
            raise SystemFailure(OSError(28, "No space left on device", str(folder)))
        return held(folder, state, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", refusing)
    with pytest.raises(SystemFailure, match="No space left on device") as caught:
        fit(make_config(tiny_shards, tmp_path / "run", max_steps=1000))
    assert caught.value.exit_code == 75 and refused == [5]
    assert newest(tmp_path / "run") == len(read_metrics(tmp_path / "run")) >= 5
    assert [event["event"] for event in events(tmp_path / "run")][-2:] == ["checkpoint", "stop"]


@pytest.mark.parametrize("way", ["signal", "error", "interrupt"])
def test_every_way_out_waits_for_a_checkpoint_that_is_being_written(
    tiny_shards, tmp_path, held_write, monkeypatch, way
):
    held_write(6)
    original = loop.backward

    def leaving(trainee, batch, *rest):
        if batch.step == 7:
            if way == "error":
                raise RuntimeError("a kernel failed")
            if way == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainee, batch, *rest)

    monkeypatch.setattr(loop, "backward", leaving)
    expected = {"error": RuntimeError, "interrupt": KeyboardInterrupt}.get(way)
    if expected is None:
        assert fit(make_config(tiny_shards, tmp_path / "run")).stopped_by == signal.SIGTERM
    else:
        with pytest.raises(expected):
            fit(make_config(tiny_shards, tmp_path / "run"))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-0000005"] + ([] if way == "interrupt" else ["step-0000006"])
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def fit_on_a_full_disk(config, at):
    """One rank of a run whose checkpoint of a step cannot be written; what ended it."""
    original = checkpoint.write_checkpoint

    def refusing(folder, state, *rest):
        if state.step == at:
            raise SystemFailure(OSError(28, "No space left on device", str(folder)))
        return original(folder, state, *rest)

    checkpoint.write_checkpoint = refusing
    try:
        fit(config)
    except (UserError, RankLost) as error:
        return f"{type(error).__name__}: {error}"


def test_the_other_ranks_learn_of_a_last_checkpoint_that_could_not_be_written(tiny_shards, tmp_path):
    """They end with its message, at once, and do not wait in another exchange than it."""
    config = make_config(tiny_shards, tmp_path / "run", max_steps=3, data__micro_batch=1)
    first, second = run_ranks(2, fit_on_a_full_disk, config, 3)
    assert first.startswith("SystemFailure:") and "No space left on device" in first
    assert second.startswith("RankLost: rank 0 failed: SystemFailure:") and "No space left on device" in second


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "held_out.jsonl", "events.jsonl", "logs/rank-0.log"])
def test_a_pipe_in_place_of_a_file_that_a_run_writes_is_named_and_not_waited_for(tiny_shards, tmp_path, name):
    (tmp_path / "run/logs").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(UserError, match=f"{name}: not a regular file"):
        fit(make_config(tiny_shards, tmp_path / "run", max_steps=1))


def test_a_log_file_that_cannot_be_written_is_said_once_and_ends_nothing(tiny_shards, tmp_path, capfd):
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/logs/rank-0.log").symlink_to("/dev/full")
    set_up_logging()
    fit(make_config(tiny_shards, tmp_path / "run"))
    said = capfd.readouterr().err
    assert newest(tmp_path / "run") == 10 and "Traceback" not in said
    assert said.count("rank-0.log is incomplete from here on: [Errno 28] No space left on device") == 1


def test_a_full_disk_under_the_events_is_one_line(tiny_shards, tmp_path):
    """/dev/full reads as zeros without end: no more than the file's end is read."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/events.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"events.jsonl: No space left on device") as caught:
        fit(make_config(tiny_shards, tmp_path / "run"))
    assert caught.value.exit_code == 75


@pytest.mark.parametrize(
    "left", [b"", b"torn", b"x" * 200_000, b'{"a": 1}\n', b'{"a": 1}\ntorn', b"{}\n" + b"x" * 99_999]
)
def test_what_a_kill_left_of_an_event_is_cut_off(tmp_path, left):
    (tmp_path / "events.jsonl").write_bytes(left)
    write_event(tmp_path, "stop", 1)
    kept, line = left[: left.rfind(b"\n") + 1], (tmp_path / "events.jsonl").read_bytes()
    assert line.startswith(kept) and json.loads(line[len(kept) :])["event"] == "stop"
