"""The loop: what a step does to the weights, and what a run says of it."""

import contextlib
import json
import math
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from shards_data import flip_a_latent, write_dataset
from train_runs import DIMS, make_config, read_metrics

from shards.config import dump_config
from shards.errors import UserError
from shards.read.dataset import open_dataset
from train import checkpoint, step
from train.launch.launch import own_command
from train.loop import fit
from train.run.events import EVENTS_FILE
from train.run.session import open_session
from train.run.state import TrainingState

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.txt"


def weights_after(output: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(output / "checkpoints" / checkpoint.checkpoint_name(step) / "lora.safetensors")


def test_losses_are_what_they_were(tiny_shards, tmp_path):
    """A refactor proves itself by this file; a change of the maths writes it anew and says why."""
    config = make_config(
        tiny_shards, tmp_path / "run", eval={"num_clips": 3, "every_steps": 5}, optim__schedule="cosine", optim__lr=1e-2
    )
    fit(config)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    held_out = [line["mean"] for line in read_metrics(tmp_path / "run", "held_out.jsonl")]
    lines = [f"step {n} {loss:.9f}" for n, loss in enumerate(losses, 1)] + [f"held-out {x:.9f}" for x in held_out]
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text("\n".join(lines) + "\n")
    golden = [float(line.split()[-1]) for line in GOLDEN.read_text().splitlines()]
    assert losses + held_out == pytest.approx(golden, rel=1e-5)


def test_each_slots_loss_stands_beside_its_key(tiny_shards, tmp_path):
    """Their mean is the step's loss; micro-batches and a resume leave each with its slot."""
    for micro_batch in (1, 4):
        fit(make_config(tiny_shards, tmp_path / str(micro_batch), data__micro_batch=micro_batch, max_steps=3))
    fit(make_config(tiny_shards, tmp_path / "1", data__micro_batch=1, max_steps=5))
    fit(make_config(tiny_shards, tmp_path / "4", data__micro_batch=4, max_steps=5))
    for one, four in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / "4"), strict=True):
        assert len(one["slot_losses"]) == len(one["keys"]) == 4
        assert sum(one["slot_losses"]) / 4 == pytest.approx(one["loss"], rel=1e-4)
        assert one["slot_losses"] == pytest.approx(four["slot_losses"], rel=1e-3)
        assert len(set(one["slot_losses"])) == 4


def test_the_split_into_micro_batches_changes_nothing(tiny_shards, tmp_path):
    results = {}
    for micro_batch in (1, 2, 8):
        output = tmp_path / f"micro{micro_batch}"
        config = make_config(
            tiny_shards,
            output,
            data__global_batch=8,
            data__micro_batch=micro_batch,
            objective__image_to_video_share=0.5,
            objective__weighting="bell",
            lora__dropout=0.2,
            optim__lr=1e-2,
            max_steps=5,
        )
        fit(config)
        metrics = read_metrics(output)
        results[micro_batch] = ([line["loss"] for line in metrics], weights_after(output, 5), metrics)
    modes = [line["num_image_to_video"] for line in results[1][2] if "×17" in line["bucket"]]
    assert any(0 < mode < 8 for mode in modes), "the batches are not mixed, so the test shows nothing"
    for micro_batch in (2, 8):
        assert results[micro_batch][0] == pytest.approx(results[1][0], rel=1e-6)
        for name, weight in results[1][1].items():
            torch.testing.assert_close(results[micro_batch][1][name], weight, rtol=0, atol=1e-6)


def test_ten_samples_are_learnt_by_heart(tmp_path):
    write_flat_dataset(tmp_path / "shards")
    config = make_config(
        tmp_path / "shards",
        tmp_path / "run",
        max_steps=100,
        data__global_batch=10,
        data__micro_batch=10,
        data__validation_fraction=0.0,
        data__caption_dropout=0.0,
        lora=None,
        optim__lr=3e-3,
        checkpoint__every_steps=1000,
        # Wide enough to carry a patch's 192 numbers, or the noise itself could not be told.
        model__dims=DIMS | {"dim": 192, "num_layers": 1, "ffn_dim": 256, "num_heads": 4},
    )
    fit(config)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert sum(losses[:5]) / 5 > 1.8
    assert sum(losses[-10:]) / 10 < 0.35


def write_flat_dataset(root: Path) -> None:
    """Ten samples, each of one latent value, so that what is behind the noise can be known."""
    import shards_data

    write = shards_data._write_sample

    def flat(latents, texts, clip, place, rng, *rest):
        class Flat:
            def standard_normal(self, shape):
                return np.full(shape, rng.standard_normal()) if len(shape) == 4 else rng.standard_normal(shape)

            def integers(self, *bounds):
                return rng.integers(*bounds)

        return write(latents, texts, f"{clip}-{place}", 0, Flat(), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_data, "_write_sample", flat)
        write_dataset(root, num_units=1, samples_per_unit=10, scratch=root.with_name("scratch"))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_learning_rate_zero_changes_nothing(tiny_shards, tmp_path, optimizer):
    config = make_config(
        tiny_shards,
        tmp_path / "run",
        optim__name=optimizer,
        optim__lr=0.0,
        optim__weight_decay=0.1,
        max_steps=3,
        optim__min_8bit_size=32,
    )
    before = {name: weight.clone() for name, weight in open_session(config).trainee.tensors().items()}
    fit(config)
    after = weights_after(tmp_path / "run", 3)
    assert all(after[name].equal(weight) for name, weight in before.items())


def test_only_the_lora_moves(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path / "run")
    session = open_session(config)
    progress = TrainingState(session)
    base = {n: w.detach().clone() for n, w in session.trainee.model.named_parameters() if not w.requires_grad}
    step_once(session, progress)
    step_once(session, progress)
    now = dict(session.trainee.model.named_parameters())
    assert base and all(now[name].equal(weight) for name, weight in base.items())
    assert all(weight.abs().max() > 0 for weight in session.trainee.weights.values())


def step_once(session, progress, spoil=None):
    """One step of the loop on the session's next batch."""
    from train.data.loader import Loader

    config = session.trainee.config
    loader = Loader(
        session.dataset,
        session.order,
        session.ordinals,
        config,
        text_len=session.trainee.dims.text_len,
        step=progress.step + 1,
        position=progress.position,
    )
    batch, position = next(loader)
    loader.close()
    if progress.telemetry is not None:
        progress.telemetry.begin_step()
    if spoil is not None:
        batch.latent_BCTHW[spoil] = 3e5
    step.backward(session.trainee, batch, progress.scaler.scale_loss)
    result = progress.update()
    progress.step, progress.position = batch.step, position
    return result


@pytest.mark.parametrize("spoiled", [slice(0, 8), slice(3, 4)], ids=["whole batch", "one micro-step of eight"])
def test_fp16_overflow_skips_halves_and_names_the_block(tiny_shards, tmp_path, spoiled):
    config = make_config(
        tiny_shards,
        tmp_path / "run",
        data__global_batch=8,
        data__micro_batch=1,
        precision__compute="fp16",
        optim__ema_decay=0.5,
    )
    session = open_session(config)
    progress = TrainingState(session)
    step_once(session, progress)
    before = {name: weight.clone() for name, weight in session.trainee.tensors().items()}
    average = {name: weight.clone() for name, weight in progress.average.items()}
    scale = progress.scaler.scale
    _, norm, blamed = step_once(session, progress, spoil=spoiled)
    assert blamed.startswith("blocks.0") and norm is None
    assert progress.scaler.scale == scale / 2
    assert (progress.step, progress.updates, progress.skipped) == (2, 1, 1)
    assert all(weight.equal(before[name]) for name, weight in session.trainee.tensors().items())
    assert all(weight.equal(average[name]) for name, weight in progress.average.items())
    assert progress.telemetry.counts == {blamed: 1}
    # The next update has the rate of the one that was skipped, and the state survives a checkpoint.
    progress.save()
    again = TrainingState(session)
    again.restore(progress.written(to_end=True).path)
    assert (again.step, again.updates, again.skipped) == (2, 1, 1)
    assert again.scaler.state_dict() == progress.scaler.state_dict() and again.telemetry.counts == {blamed: 1}
    assert step_once(session, again)[2] is None


def test_the_loss_scale_is_taken_out_of_the_gradients(tiny_shards, tmp_path):
    # AdamW would hide a factor; the logged norm and the clipping would not.
    norms = {}
    for compute, scale in (("fp32", 65536.0), ("fp16", 65536.0), ("fp16", 128.0)):
        config = make_config(tiny_shards, tmp_path / "run", precision__compute=compute, precision__initial_scale=scale)
        session = open_session(config)
        norms[compute, scale] = step_once(session, TrainingState(session))[1]
    assert norms["fp16", 65536.0] == pytest.approx(norms["fp32", 65536.0], rel=0.02)
    assert norms["fp16", 128.0] == pytest.approx(norms["fp32", 65536.0], rel=0.02)


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_skips_in_a_row_are_bounded(tiny_shards, tmp_path, compute):
    config = make_config(
        tiny_shards, tmp_path / "run", precision__compute=compute, precision__max_skipped_in_a_row=3, optim__lr=1e-3
    )
    session = open_session(config)
    progress = TrainingState(session)
    with torch.no_grad():
        next(iter(session.trainee.weights.values())).fill_(math.inf)
    with pytest.raises(UserError, match="4 "):
        for _ in range(5):
            step_once(session, progress)
    assert progress.step == 3 and progress.updates == 0


def test_a_run_leaves_what_the_design_says(tiny_shards, tmp_path):
    output = tmp_path / "run"
    result = fit(make_config(tiny_shards, output, eval={"num_clips": 2, "every_steps": 5}))
    assert result.step == 10 and result.export == output / "lora.safetensors"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"loss", "lr", "grad_norm", "seconds", "data_wait_seconds", "tokens", "keys"} <= lines[0].keys()
    assert all(len(line["keys"]) == 4 for line in lines)
    held_out = [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in held_out] == [0, 5, 10]
    assert all(len(line["t2v"]) == len(line["i2v"]) == 9 for line in held_out)
    assert (result.loss_before, result.loss_after) == (held_out[0]["mean"], held_out[-1]["mean"])
    text = (output / "config.yaml").read_text()
    dataset = open_dataset([tiny_shards])
    assert dataset.identity_digest in text and dataset.revision in text
    assert list((output / "tensorboard").iterdir()) and (output / "logs/rank-0.log").exists()
    # The resolved config is a config: the same run from it gives the same losses.
    from shards.config import load_config
    from train.config.train import TrainConfig

    fit(load_config(TrainConfig, output / "config.yaml", [f"output={tmp_path / 'again'}"]))
    assert read_metrics(tmp_path / "again") == read_metrics(output)


def test_a_base_trained_whole_carries_a_lora(tiny_shards, tmp_path):

    whole = fit(make_config(tiny_shards, tmp_path / "base", lora=None, optim__ema_decay=0.9, max_steps=4))
    assert whole.export == tmp_path / "base/model.safetensors"
    config = make_config(
        tiny_shards, tmp_path / "run", model={"checkpoint": str(whole.export)}, eval={"num_clips": 2}, max_steps=2
    )
    session = open_session(config)
    assert session.trainee.dims.model_dump()["dim"] == DIMS["dim"]
    average = checkpoint.load_tensors(tmp_path / "base/checkpoints/step-0000004/average.safetensors")
    loaded = dict(session.trainee.model.named_parameters())
    assert all(loaded[name].equal(weight) for name, weight in average.items() if name in loaded)
    fit(config)
    # Written anew with the same numbers it is the same base; with others it is not.
    fit(make_config(tiny_shards, tmp_path / "base", lora=None, optim__ema_decay=0.9, max_steps=4))
    fit(config.model_copy(update={"max_steps": 3}))
    fit(make_config(tiny_shards, tmp_path / "base", lora=None, optim__ema_decay=0.9, max_steps=5))
    with pytest.raises(UserError, match="weights"):
        fit(config.model_copy(update={"max_steps": 4}))


def test_early_stop_and_the_export_of_the_best(tiny_shards, tmp_path):
    config = make_config(
        tiny_shards,
        tmp_path / "run",
        optim__lr=0.5,
        max_steps=40,
        checkpoint={"every_steps": 1, "keep_last": 1, "export": "best"},
        eval={"num_clips": 1, "every_steps": 1, "patience": 2},
    )
    result = fit(config)
    means = [line["mean"] for line in read_metrics(tmp_path / "run", "held_out.jsonl")]
    best = means.index(min(means))
    assert result.step == best + 2 < 40
    exported = checkpoint.load_tensors(result.export)
    if best == 0:  # the untrained LoRA was the best: there is a checkpoint of it to export
        assert all(weight.abs().max() == 0 for name, weight in exported.items() if "lora_B" in name)


def test_truncated_shard_refuses_to_start(tiny_shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(tiny_shards, root)
    tar = next(iter(sorted((root / "latents").glob("*.tar"))))
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(UserError, match=tar.name):
        fit(make_config(root, tmp_path / "run"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_flipped_byte_is_found_when_it_is_read_and_by_verify_before(tiny_shards, tmp_path):
    root = flip_a_latent(tiny_shards, tmp_path / "shards")
    with pytest.raises(UserError, match="cannot be read"):
        fit(make_config(root, tmp_path / "run", max_steps=20, data__validation_fraction=0.0))
    with pytest.raises(UserError, match="problems"):
        fit(make_config(root, tmp_path / "other"), verify=True)
    assert not (tmp_path / "other/metrics.jsonl").exists()


def test_several_processes_are_refused(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        fit(make_config(tiny_shards, tmp_path / "run"))


def test_a_line_is_json_whatever_the_loss(tmp_path):
    from train.run.log import _finite

    line = json.dumps(_finite({"loss": float("nan"), "keys": ["a"], "deep": [float("inf"), 1.5]}), allow_nan=False)
    assert json.loads(line) == {"loss": None, "keys": ["a"], "deep": [None, 1.5]}


def test_on_a_terminal_the_log_and_the_events_are_those_without_one(tiny_shards, tmp_path):
    """The bar of a terminal takes no line away; what differs between two runs are times alone."""
    (tmp_path / "run.yaml").write_text(dump_config(make_config(tiny_shards, "x", eval={"num_clips": 2}, max_steps=3)))
    left = {}
    for name in ("pipe", "term"):
        command = own_command(["fit", str(tmp_path / "run.yaml"), "-o", f"output={tmp_path / name}"])
        code, said = run_on_a_terminal(command) if name == "term" else run_on_a_pipe(command)
        assert code == 0, said
        assert "held-out loss" in said and ("\x1b[" in said) == (name == "term")
        # What takes long is said before it begins: each line comes before the next.
        order = [
            said.index(f"{words}") for words in ("loading torch", "opening the dataset", "loading the base", "base:")
        ]
        assert order == sorted(order)
        log = (tmp_path / name / "logs/rank-0.log").read_text().replace(str(tmp_path / name), "NAME").splitlines()
        numbers = re.compile(r"\d[\d,.e+-]*")
        events = [json.loads(line) for line in (tmp_path / name / EVENTS_FILE).read_text().splitlines()]
        left[name] = (
            [numbers.sub("#", line) for line in log],
            [
                {key: str(value).replace(str(tmp_path / name), "NAME") for key, value in event.items() if key != "time"}
                for event in events
            ],
        )
    assert left["term"] == left["pipe"]
    lines, events = left["term"]
    assert sum("  loss #" in line for line in lines) == 3
    assert [event["event"] for event in events] == ["start", "device", "plan", "checkpoint", "stop"]


def run_on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a command whose standard streams are a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    return process.wait(timeout=60), said.decode()


def run_on_a_pipe(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr
