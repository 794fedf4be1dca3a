"""Kill, stop, resume: to the bit the run that never stopped."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import yaml
from shards_data import write_dataset
from train_runs import checkpoint_bytes, fit_in_child, make_config, read_metrics, send_when

from shards.errors import UserError
from train import checkpoint
from train.loop import fit
from train.run import session
from train.run.session import StopSignal

KILLED = -signal.SIGKILL
VARIED = {"optim__ema_decay": 0.9, "lora__dropout": 0.1, "data__caption_dropout": 0.3, "optim__warmup_updates": 4}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_killed_and_resumed_is_bit_identical(tiny_shards, tmp_path, optimizer, compute, micro_batch):
    def config(name: str, **more):
        changes = {"optim__name": optimizer, "optim__min_8bit_size": 32, "precision__compute": compute} | VARIED | more
        return make_config(tiny_shards, tmp_path / name, data__micro_batch=micro_batch, **changes)

    assert fit_in_child(config("straight")) == 0
    # Killed while it writes the second checkpoint, half a run after the first.
    half = "checkpoints/.writing-step-0000010/lora.safetensors"
    assert fit_in_child(config("killed"), kill_at=half) == KILLED
    assert [path.name for path in checkpoint.find_checkpoints(tmp_path / "killed/checkpoints")] == ["step-0000005"]
    assert fit_in_child(config("killed")) == 0
    assert checkpoint_bytes(tmp_path / "killed", 10) == checkpoint_bytes(tmp_path / "straight", 10)
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "straight")
    killed, straight = (
        checkpoint.load_tensors(tmp_path / name / "lora.safetensors") for name in ("killed", "straight")
    )
    assert killed.keys() == straight.keys() and all(killed[name].equal(straight[name]) for name in killed)
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_killed_between_checkpoints_cuts_the_metrics_back(tiny_shards, tmp_path):
    # Fast checkpoints and an endless run: wherever the kill falls, there are steps beyond the newest checkpoint or not.
    endless = make_config(tiny_shards, tmp_path / "run", max_steps=100_000, checkpoint__every_steps=3)
    assert fit_in_child(endless, kill_at="checkpoints/step-0000003") == KILLED
    newest = checkpoint.find_checkpoints(tmp_path / "run/checkpoints")[-1]
    step = checkpoint.read_checkpoint(newest).step
    with (tmp_path / "run/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 99, "loss"')  # a line that the kill cut short
    fit(endless.model_copy(update={"max_steps": step + 4}))
    fit(make_config(tiny_shards, tmp_path / "straight", max_steps=step + 4, checkpoint__every_steps=3))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, step + 5))
    assert [line["keys"] for line in lines] == [line["keys"] for line in read_metrics(tmp_path / "straight")]


def test_stopped_before_the_first_checkpoint_begins_again(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path / "run", eval={"num_clips": 2})
    assert fit_in_child(config, kill_at="held_out.jsonl") == KILLED
    assert fit_in_child(config) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 11))
    assert [line["step"] for line in read_metrics(tmp_path / "run", "held_out.jsonl")] == [0, 10]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends(tiny_shards, tmp_path, number, caplog, monkeypatch):
    caplog.set_level("INFO", "wan")
    monkeypatch.setattr(logging.getLogger("wan"), "propagate", True)
    config = make_config(tiny_shards, tmp_path / "run", max_steps=100_000, checkpoint__every_steps=50_000)
    before = signal.getsignal(number)
    send_when(tmp_path / "run/metrics.jsonl", number)
    result = fit(config)
    assert result.stopped_by == number and result.export is None
    assert "the same command resumes there" in caplog.text
    assert [path.name for path in checkpoint.find_checkpoints(tmp_path / "run/checkpoints")] == [
        checkpoint.checkpoint_name(result.step)
    ]
    assert signal.getsignal(number) is before
    # And it resumes there.
    assert fit(config.model_copy(update={"max_steps": result.step + 2})).step == result.step + 2


def test_usr1_writes_a_checkpoint_and_goes_on(tiny_shards, tmp_path):
    send_when(tmp_path / "run/metrics.jsonl", signal.SIGUSR1)
    result = fit(make_config(tiny_shards, tmp_path / "run", max_steps=30, checkpoint__every_steps=50_000))
    assert result.step == 30 and result.stopped_by is None
    assert len(checkpoint.find_checkpoints(tmp_path / "run/checkpoints")) == 2


def test_what_decides_the_numbers_may_not_change(tiny_shards, tmp_path):
    fit(make_config(tiny_shards, tmp_path / "run", max_steps=2))
    for change, field in (
        ({"optim__lr": 2e-3}, "config.optim.lr"),
        ({"seed": 1}, "config.seed"),
        ({"data__global_batch": 2}, "config.data.global_batch"),
        ({"lora__alpha": 8.0}, "config.lora.alpha"),
        ({"model__random_seed": 3}, "config.model.random_seed"),
        ({"objective__shift": 3.0}, "config.objective.shift"),
    ):
        with pytest.raises(UserError, match="differ") as caught:
            fit(make_config(tiny_shards, tmp_path / "run", **({"max_steps": 4} | change)))
        assert field in str(caught.value)
        digests = [word.strip(",;.") for word in str(caught.value).split() if len(word.strip(",;.")) == 64]
        assert len(set(digests)) == 2
    # What only says where, how often or how split may.
    fit(
        make_config(
            tiny_shards, tmp_path / "run", max_steps=4, data__micro_batch=1, data__workers=1, checkpoint__every_steps=1
        )
    )


def test_max_steps_may_not_change_under_a_schedule_that_leans_on_it(tiny_shards, tmp_path):
    fit(make_config(tiny_shards, tmp_path / "run", max_steps=2, optim__schedule="cosine"))
    with pytest.raises(UserError, match="schedule_steps"):
        fit(make_config(tiny_shards, tmp_path / "run", max_steps=4, optim__schedule="cosine"))


def test_added_shards_do_not_change_a_run(tmp_path):
    root = tmp_path / "shards"
    write_dataset(root, num_units=2, scratch=tmp_path / "scratch")
    straight = make_config(root, tmp_path / "straight", max_steps=6)
    fit(straight)
    fit(make_config(root, tmp_path / "run", max_steps=3))
    write_more(root, tmp_path / "scratch")
    fit(make_config(root, tmp_path / "run", max_steps=6))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")
    fit(make_config(root, tmp_path / "new", max_steps=6))
    assert read_metrics(tmp_path / "new") != read_metrics(tmp_path / "straight")


def write_more(root: Path, scratch: Path) -> None:
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").unlink()
    write_dataset(root, num_units=1, first_unit=2, seed=9, prefix="late", scratch=scratch)
    assert json.loads((root / "dataset.json").read_text()) != info


def test_another_dataset_is_refused(tiny_shards, tmp_path):
    fit(make_config(tiny_shards, tmp_path / "run", max_steps=2))
    write_dataset(tmp_path / "other", seed=5, scratch=tmp_path / "scratch")
    with pytest.raises(UserError):
        fit(make_config(tmp_path / "other", tmp_path / "run", max_steps=4))


def test_resume_never_and_by_path(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path / "run", checkpoint__keep_last=5, checkpoint__every_steps=2)
    fit(config, resume="never")
    with pytest.raises(UserError, match="holds a run already"):
        fit(config, resume="never")
    with pytest.raises(UserError, match="no such checkpoint"):
        fit(config, resume=str(tmp_path / "nowhere"))
    before = checkpoint_bytes(tmp_path / "run", 10)
    fit(config, resume=str(tmp_path / "run/checkpoints/step-0000004"))
    assert checkpoint_bytes(tmp_path / "run", 10) == before
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 11))
    # Into another folder: a run of its own from there on.
    elsewhere = make_config(tiny_shards, tmp_path / "elsewhere")
    fit(elsewhere, resume=str(tmp_path / "run/checkpoints/step-0000004"))
    assert [line["step"] for line in read_metrics(tmp_path / "elsewhere")] == list(range(5, 11))
    assert checkpoint_bytes(tmp_path / "elsewhere", 10) == before


@pytest.mark.parametrize("name", ["state.json", "lora.safetensors", "optimizer.safetensors", "dataset-pin.json"])
def test_a_damaged_checkpoint_is_named(tiny_shards, tmp_path, name):
    config = make_config(tiny_shards, tmp_path / "run", max_steps=4)
    fit(config)
    file = tmp_path / "run/checkpoints/step-0000004" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=name):
        fit(config)


def test_last_n_and_the_best_are_kept_without_pickles(tiny_shards, tmp_path):
    config = make_config(
        tiny_shards,
        tmp_path / "run",
        optim__lr=0.5,  # so high that the first evaluation stays the best
        max_steps=12,
        checkpoint__every_steps=2,
        checkpoint__keep_last=2,
        eval={"num_clips": 2, "every_steps": 2},
    )
    fit(config)
    folder = tmp_path / "run/checkpoints"
    state = checkpoint.read_checkpoint(folder / "step-0000012")
    kept = {path.name for path in checkpoint.find_checkpoints(folder)}
    assert (
        {"step-0000010", "step-0000012"}
        <= kept
        <= {
            "step-0000010",
            "step-0000012",
            checkpoint.checkpoint_name(state.best_step or 0),
        }
    )
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {"lora.safetensors", "optimizer.safetensors", "state.json", "dataset-pin.json"}


def test_two_processes_do_not_share_a_folder(tiny_shards, tmp_path):
    from train.run.session import locked

    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        fit(make_config(tiny_shards, tmp_path / "run"))


def test_a_course_given_up_leaves_no_checkpoint_behind(tiny_shards, tmp_path):
    """Else its later steps would prune the new ones, and `auto` would resume from them."""
    config = make_config(tiny_shards, tmp_path / "run", checkpoint__every_steps=2, checkpoint__keep_last=3)
    fit(config)
    folder = tmp_path / "run/checkpoints"
    short = make_config(tiny_shards, tmp_path / "run", max_steps=7, checkpoint__every_steps=2, checkpoint__keep_last=3)
    fit(short, resume=str(folder / "step-0000006"))
    assert [path.name for path in checkpoint.find_checkpoints(folder)] == ["step-0000006", "step-0000007"]
    fit(config)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 11))


def test_the_beginning_may_be_the_best(tiny_shards, tmp_path):
    """A run that never improves exports what it began with, instead of failing after its last step."""
    evaluation = {"every_steps": 1, "num_clips": 2}
    config = make_config(
        tiny_shards, tmp_path / "run", max_steps=2, optim__lr=0.0, eval=evaluation, checkpoint__export="best"
    )
    assert fit(config).export is not None
    first = tmp_path / "run/checkpoints/step-0000000/lora.safetensors"
    assert first.is_file()


def test_a_signal_within_a_step_is_answered_before_the_next_micro_batch(tiny_shards, tmp_path, monkeypatch):
    """The step is dropped: what the checkpoint holds is what the straight run holds."""
    from train import step

    fit(make_config(tiny_shards, tmp_path / "straight", data__micro_batch=1))
    calls = []
    original = step.losses

    def signalled(trainee, batch, rows):
        calls.append(batch.step)
        if len(calls) == 4 * 3 + 2:  # the second micro-batch of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainee, batch, rows)

    config = make_config(tiny_shards, tmp_path / "stopped", data__micro_batch=1)
    monkeypatch.setattr(step, "losses", signalled)
    result = fit(config)
    assert (result.step, result.stopped_by, len(calls)) == (3, signal.SIGTERM, 14)
    monkeypatch.setattr(step, "losses", original)
    fit(config)
    assert checkpoint_bytes(tmp_path / "stopped", 10) == checkpoint_bytes(tmp_path / "straight", 10)


EVALUATION, PICTURES = (2 + 1) * 9 + 1, 2 * 4 + 1
"""Looks for a signal: one a clip, noise level and mode (one clip is an image), one a prompt and step of the solver; and
one at the end."""
SETTLED = EVALUATION + PICTURES


@pytest.mark.parametrize(
    ("looks", "step", "owed"),
    [
        (5, 0, ("evaluation", "pictures")),
        (EVALUATION + 2, 0, ("pictures",)),
        (SETTLED + 1, 4, ("evaluation", "pictures")),
        (SETTLED + EVALUATION + 6, 4, ("pictures",)),
        (3 * SETTLED + 12, 10, ("evaluation", "pictures")),
        (4 * SETTLED, 10, ("pictures",)),
    ],
)
def test_a_signal_during_an_evaluation_or_pictures_is_answered_at_once(
    tiny_shards, tmp_path, monkeypatch, looks, step, owed
):
    """It is stopped at once; the resume does it from its beginning, and all is as in the straight run."""

    def config(name):
        prompts = [{"name": name, "key": "*"} for name in ("one", "two")]
        return make_config(
            tiny_shards, tmp_path / name, eval={"num_clips": 2, "every_steps": 4}, checkpoint__every_steps=3,
            checkpoint__keep_last=9, sample={"every_steps": 4, "prompts": prompts, "sampler": {"steps": 4}},
        )  # fmt: skip

    original, done = StopSignal.raise_if_asked, []

    def look(stop, at=None):
        done.append(stop)
        if len(done) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        original(stop)

    monkeypatch.setattr(StopSignal, "raise_if_asked", look)
    fit(config("straight"))
    assert len(done) == 4 * SETTLED
    done.clear()
    monkeypatch.setattr(StopSignal, "raise_if_asked", lambda stop: look(stop, looks))
    result = fit(config("run"))
    assert (result.stopped_by, result.step, len(done)) == (signal.SIGTERM, step, looks), "not answered at once"
    newest = checkpoint.find_checkpoints(tmp_path / "run/checkpoints")[-1]
    assert checkpoint.read_checkpoint(newest).owed == owed
    monkeypatch.setattr(StopSignal, "raise_if_asked", original)
    # Killed in the resume, before it has written another checkpoint: the evaluation is there once all the same.
    with (tmp_path / "run/held_out.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "mean": 0.0}) + "\n" if "evaluation" in owed else "")
    fit(config("run"))
    for name in ("metrics.jsonl", "held_out.jsonl"):
        assert read_metrics(tmp_path / "run", name) == read_metrics(tmp_path / "straight", name)
    assert checkpoint_bytes(tmp_path / "run", 10) == checkpoint_bytes(tmp_path / "straight", 10)
    made, meant = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.safetensors")}
                   for root in (tmp_path / "run/samples", tmp_path / "straight/samples"))  # fmt: skip
    assert made == meant and len(made) == 8


def test_compile_auto_is_decided_once_and_kept(tiny_shards, tmp_path, caplog, monkeypatch):
    """Written into the run's config.yaml; a resume asks nobody again, unless it is told otherwise."""
    caplog.set_level("INFO", "wan")
    monkeypatch.setattr(logging.getLogger("wan"), "propagate", True)

    def run(steps: int, compiles: bool | str) -> str:
        caplog.clear()
        config = make_config(tiny_shards, tmp_path / "run", max_steps=steps, model__compile=compiles)
        fit(config)
        return yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["compile"]

    assert run(1, "auto") is False and "model.compile: auto is false here: no GPU" in caplog.text
    monkeypatch.setattr(session, "with_compile", None)
    assert run(2, "auto") is False and "model.compile" not in caplog.text
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace("compile: false", "compile: true"))
    asked = []
    monkeypatch.setattr("train.run.trainee.keep", lambda model, policy, *, compiled, **rest: asked.append(compiled))
    assert run(3, "auto") is True and asked == [True]
    assert run(4, False) is False and asked == [True, False]
