"""The held-out loss on any layout of processes; `wantrain evaluate`: of a run again, of a merged base, of two LoRAs."""

import contextlib
import json
import os
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ranks import in_a_group, run_ranks
from train_runs import DIMS, finish, make_config, read_metrics

from shards.config import validate_config
from shards.console import set_up_logging
from shards.files.tensor_files import read_latent_file
from train import loop
from train.cli.main import main
from train.cli.sample_commands import SampleRun, sample_run
from train.config.model import DiTConfig
from train.config.sampling import Prompt, SamplerConfig
from train.evaluate import Evaluator, HeldOut, changes, describe_held_out
from train.loop import fit
from train.lora.formats import read_lora
from train.lora.merge import merge_checkpoint
from train.model.dit import build_model
from train.model.load import save_dit
from train.parallel.ranks import Layout, make_ranks
from train.run.session import StopSignal, open_session
from train.sampling.sample import prepare_prompts, sample_prompts

EVAL = {"every_steps": 3, "num_clips": 3, "batch": 2}
LAYOUTS = {
    2: {"replicate": (1, 1), "shard": (2, 1), "ulysses": (1, 2)},
    4: {"replicate": (1, 1), "shard": (4, 1), "two copies": (2, 1), "ulysses": (1, 2), "all": (4, 2)},
}
"""By processes: over how many the base is sharded, and how many share a sample's tokens."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_dit(build_model(DiTConfig(**DIMS), seed=3), path)
    return path


@pytest.fixture(scope="module")
def run(base, tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    fit(make_config(
        tiny_shards, folder, max_steps=6, model__checkpoint=str(base), model__dims=None, lora__alpha=8.0,
        optim__lr=2e-2, optim__ema_decay=0.5, data__validation_fraction=0.4, eval=EVAL,
    ))  # fmt: skip
    return folder


def _call(*arguments):
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments), "--json"])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def own(run):
    """The run's held-out losses, before the first step and last."""
    lines = read_metrics(run, "held_out.jsonl")
    assert lines[-1]["mean"] != lines[0]["mean"]
    return lines


def _equal(result, line):
    for name in ("mean", "t2v", "i2v"):
        np.testing.assert_allclose(result[name], line[name], rtol=1e-6, atol=0)


def test_a_runs_lora_gives_its_own_last_loss_and_the_base_its_first(run, own, tiny_shards):
    found = _call(run, tiny_shards)
    assert found["num_clips"] == own[-1]["num_clips"] == 3
    _equal(found["results"]["the base"], own[0])
    _equal(found["results"][str(run)], own[-1])
    total = found["changes"][-1]
    assert (total["mode"], total["sigma"]) == ("all", None)
    assert total["share"] == pytest.approx(own[-1]["mean"] / own[0]["mean"] - 1, rel=1e-5)
    assert total["low"] < total["share"] < total["high"]
    assert _call(run) == found


@pytest.mark.parametrize("kept", [{"base_dtype": "fp8"}, {"base_dtype": "nf4", "stream_blocks": True}])
def test_on_a_base_that_is_kept_as_the_run_keeps_it(kept, base, run, tiny_shards, tmp_path):
    """A LoRA that trained beside rounded weights is measured beside them; the base's own loss too."""
    given = {"checkpoint": str(base), **kept}
    changes = {"model": given, "lora__alpha": 8.0, "optim__lr": 2e-2, "data__validation_fraction": 0.4, "eval": EVAL}
    fit(make_config(tiny_shards, tmp_path / "run", max_steps=3, **changes))
    lines = read_metrics(tmp_path / "run", "held_out.jsonl")
    found = _call(tmp_path / "run", "--against", run / "lora.safetensors")["results"]
    _equal(found["the base"], lines[0])
    _equal(found[str(tmp_path / "run")], lines[-1])
    alone = _call(run / "lora.safetensors", "-c", tmp_path / "run" / "config.yaml")["results"]
    assert found[str(run / "lora.safetensors")] == alone[str(run / "lora.safetensors")]


def test_of_a_merged_base_too(run, own, base, tmp_path):
    merge_checkpoint(base, read_lora(run / "lora.safetensors"), tmp_path / "merged")
    found = _call(tmp_path / "merged", "-c", run / "config.yaml")
    _equal(found["results"]["the base"], own[0])
    _equal(found["results"][str(tmp_path / "merged")], own[-1])


def test_a_file_of_another_tool_against_a_checkpoint_on_the_same_draws(run, own, tmp_path):
    file, first = tmp_path / "musubi.safetensors", run / "checkpoints/step-0000005"
    command = ["lora", "convert", str(run), str(file), "--format", "musubi"]
    assert CliRunner().invoke(main, command).exit_code == 0
    found = _call(file, "--against", first, "-c", run / "config.yaml")
    _equal(found["results"][str(file)], own[-1])
    assert [(one["from"], one["to"]) for one in found["changes"][:: len(found["changes"]) // 3]][:3] == [
        ("the base", str(file)), ("the base", str(first)), (str(file), str(first)),
    ]  # fmt: skip
    assert found["results"][str(first)]["mean"] != found["results"][str(file)]["mean"]
    same = _call(file, "--against", run / "lora.safetensors", "-c", run / "config.yaml")["changes"][-1]
    assert abs(same["share"]) < 1e-6 and abs(same["low"]) < 1e-6


def test_what_a_run_in_fp16_folded_is_folded_again_in_evaluate_and_sample(tiny_shards, tmp_path):
    """A base whose outputs fp16 cannot hold (V100): finite and the run's own last loss, not inf; the base's too."""
    base, folder = tmp_path / "model.safetensors", tmp_path / "run"
    model = build_model(DiTConfig(**DIMS), seed=3)
    with torch.no_grad():
        model.blocks[1].ffn[2].bias.fill_(6e4)
        model.blocks[1].ffn[2].weight.fill_(4e3)
        model.blocks[1].modulation[:, 5].fill_(1e-4)
    save_dit(model, base)
    changes = {"model": {"checkpoint": str(base)}, "precision__compute": "fp16", "lora__targets": ["ffn"]}
    changes |= {"optim__lr": 2e-2, "data__validation_fraction": 0.4, "eval": EVAL}
    fit(make_config(tiny_shards, folder, max_steps=6, **changes))
    last = read_metrics(folder, "held_out.jsonl")[-1]
    assert last["mean"] is not None
    for source in (folder, folder / "checkpoints/step-0000006", folder / "lora.safetensors"):
        found = _call(source)["results"]
        _equal(found[str(source)], last)
        assert np.isfinite(found["the base"]["mean"])
    merge_checkpoint(base, read_lora(folder / "lora.safetensors"), tmp_path / "merged")
    assert np.isfinite(_call(folder, "--against", tmp_path / "merged")["results"][str(tmp_path / "merged")]["mean"])
    config = {"output": str(tmp_path / "out"), "model": {"checkpoint": str(base)}, "lora": str(folder)}
    config |= {"data": {"root": str(tiny_shards)}, "prompts": [{"name": "one", "key": "*"}]}
    config |= {"precision": {"compute": "fp16"}, "sampler": {"steps": 2}}
    for file in sample_run(validate_config(SampleRun, config, origin="the test's config"), compare=True):
        assert np.isfinite(read_latent_file(file).values).all(), file


def test_without_a_run_or_a_config_it_says_what_to_give(run, tmp_path):
    file = tmp_path / "lora.safetensors"
    file.write_bytes((run / "lora.safetensors").read_bytes())
    result = CliRunner().invoke(main, ["evaluate", str(file)])
    assert result.exit_code == 2
    assert "-c TRAIN.yaml" in result.output
    text = CliRunner().invoke(main, ["evaluate", str(file), "-c", str(run / "config.yaml")])
    assert text.exit_code == 0, text.output
    assert "T2V    mean" in text.output and "95 % over clips" in text.output
    alone = CliRunner().invoke(main, ["evaluate", str(run), "-o", "eval.num_clips=1"])
    assert "one clip gives no interval" in alone.output


def _held(t2v, i2v, moving):
    levels = (0.5, 0.9)
    t2v, i2v, moving = torch.as_tensor(t2v).double(), torch.as_tensor(i2v).double(), torch.tensor(moving)
    return HeldOut(0.0, (), (), len(moving), levels, t2v, i2v, moving)


def test_a_line_for_people_has_no_negative_zero_and_no_plural_of_one():
    one = _held([[1.0, 2.0]], [[0.0, 0.0]], [False])._replace(mean=0.99999)
    assert describe_held_out(one, {"mean": 1.0}) == "held-out loss 1.0000 over 1 clip; +0.0 % since the start"
    two = _held([[1.0, 2.0]] * 2, [[0.0, 0.0]] * 2, [False] * 2)._replace(mean=0.9)
    assert describe_held_out(two, {"mean": 1.0}) == "held-out loss 0.9000 over 2 clips; -10.0 % since the start"


def test_on_a_cpu_no_memory_of_a_gpu_is_planned_in_the_log(tiny_shards, tmp_path, caplog):
    with caplog.at_level("INFO", "wan"):
        fit(make_config(tiny_shards, tmp_path / "run", max_steps=1))
    lines = caplog.messages
    assert any("plan, largest bucket" in line for line in lines)
    assert not [line for line in lines if "workspace" in line or "0.00 GiB" in line]


def test_the_interval_is_over_clips_and_paired():
    """Clips of very different difficulty that all improve by a tenth: no doubt is left. One that gets worse leaves one.
    The coverage of the interval is checked on a case with a known answer."""
    losses = [[1.0, 2.0], [5.0, 9.0], [0.1, 0.2]]
    still = [[0.5, 1.0], [0.0, 0.0], [2.0, 3.0]]
    moving = [True, False, True]
    before = _held(losses, still, moving)
    better = _held(*(0.9 * torch.tensor(rows) for rows in (losses, still)), moving)
    found = {(one.mode, one.sigma): one for one in changes(before, better)}
    assert len(found) == 2 * 3 + 1
    for one in found.values():
        assert one.share == pytest.approx(-0.1)
        assert one.low == pytest.approx(-0.1) and one.high == pytest.approx(-0.1)
    assert found["I2V", 0.5].before == pytest.approx(1.25)  # the one-frame clip does not count
    assert found["all", None].before == pytest.approx((17.3 / 6 + 6.5 / 4) / 2)
    mixed = changes(before, _held([[0.9, 1.8], [5.5, 9.9], [0.09, 0.18]], still, moving))
    assert mixed[2].low < 0 < mixed[2].high
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        ones = np.ones((40, 2))
        after = ones * (0.95 + 0.2 * rng.standard_normal((40, 1)))
        one = changes(_held(ones, ones, [True] * 40), _held(after, after, [True] * 40))[-1]
        inside += one.low < -0.05 < one.high
    assert 50 <= inside <= 60


def held_out_on(config, ranks, folder):
    """Held-out figures of a model that is the same on every layout, the passes that were run here, and pictures."""
    session = open_session(config, ranks=ranks)
    trainee = session.trainee
    finish(trainee.model, trainee.policy)
    forwards = []

    def forward(*inputs):
        forwards.append(tuple(inputs[0].shape))
        return trainee.model(*inputs)

    with trainee.inference(), contextlib.closing(session.held_out):
        session.held_out.read_ahead()
        first, again = (session.held_out.take(forward) for _ in range(2))
    assert first.as_dict() == again.as_dict()
    assert torch.equal(first.t2v_clips, again.t2v_clips) and torch.equal(first.i2v_clips, again.i2v_clips)
    prompts = [Prompt(name=f"p{seed}", key="*", seed=seed) for seed in range(3)]
    sampler = SamplerConfig(steps=2)
    ready = prepare_prompts(prompts, sampler, trainee.dims, session.dataset)
    written = sample_prompts(trainee.model, ready, sampler, folder, layout=ranks.layout)
    clips = [first.t2v_clips.tolist(), first.i2v_clips.tolist()]
    return first.as_dict(), clips, len(forwards) // 2, [path.name for path in written]


def held_out_on_ranks(config, layouts, folder):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def work():
        found = {}
        for name, (base_shards, ulysses) in layouts.items():
            layout = Layout(rank, size, rank, base_shards, ulysses)
            found[name] = held_out_on(config, make_ranks(layout), folder / f"{size} {name}")
        return found

    return in_a_group(work)


def test_the_figures_are_those_of_one_process_on_every_layout(tiny_shards, tmp_path):
    """And the pictures. Replicated and sharded to the bit: a pass holds the same clips, a sum the same numbers."""
    config = make_config(
        tiny_shards, tmp_path, data__validation_fraction=0.4, data__global_batch=8, data__micro_batch=1, eval=EVAL,
        model={"dims": {**DIMS, "dim": 192, "num_heads": 24}},
    )  # fmt: skip
    (one,) = run_ranks(1, held_out_on_ranks, config, {"alone": (1, 1)}, tmp_path)
    figures, clips, num_passes, names = one["alone"]
    assert num_passes % 4 and names == ["p0.safetensors", "p1.safetensors", "p2.safetensors"], "every rank has as many"
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "1 alone").iterdir()}
    for size, layouts in LAYOUTS.items():
        results = run_ranks(size, held_out_on_ranks, config, layouts, tmp_path)
        for name, (base_shards, ulysses) in layouts.items():
            by_rank = [result[name] for result in results]
            groups = size // ulysses
            for found, found_clips, _, _ in by_rank:
                if ulysses == 1:
                    assert (found, found_clips) == (figures, clips), (size, name)
                for part in ("mean", "t2v", "i2v"):
                    np.testing.assert_allclose(found[part], figures[part], rtol=1e-6, atol=0)
            rounds, fewer = -(-num_passes // groups), num_passes // groups
            done = [passes for _, _, passes, _ in by_rank]
            assert set(done) == ({rounds} if base_shards > 1 else {rounds, fewer}), (size, name, done)
            assert sorted(one for _, _, _, made in by_rank for one in made) == names
            made = {path.name: path.read_bytes() for path in (tmp_path / f"{size} {name}").iterdir()}
            assert made == pictures if ulysses == 1 else made.keys() == pictures.keys()


def test_its_first_clips_are_read_while_the_step_before_it_runs(tiny_shards, tmp_path, monkeypatch):
    order = []

    def noting(owner, name, note):
        original = getattr(owner, name)

        def noted(*arguments):
            order.append(note(arguments))
            return original(*arguments)

        monkeypatch.setattr(owner, name, noted)

    noting(Evaluator, "read_ahead", lambda arguments: "read ahead")
    noting(Evaluator, "take", lambda arguments: "take")
    noting(loop, "backward", lambda arguments: arguments[1].step)
    fit(make_config(tiny_shards, tmp_path, max_steps=5, eval={"num_clips": 1, "every_steps": 3}))
    firsts = [one for before, one in zip([None, *order], order, strict=False) if one != before]  # one a pass follows
    assert firsts == ["take", "read ahead", 1, 2, "read ahead", 3, "take", "read ahead", 4, "read ahead", 5, "take",
                      "read ahead"]  # fmt: skip


def fit_and_stop(config, looks):
    """One rank of a run; the second gets a signal at its so manieth look for one."""
    original, done = StopSignal.raise_if_asked, []

    def look(stop):
        done.append(1)
        if len(done) == looks and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        original(stop)

    StopSignal.raise_if_asked = look
    set_up_logging(terminal=False)
    result = fit(config)
    return result.step, result.stopped_by, len(done)


def test_an_evaluation_that_a_signal_stopped_gives_the_same_figures_after_the_resume(tiny_shards, tmp_path):
    """On two processes, in the middle of the second evaluation."""

    def config(name):
        return make_config(
            tiny_shards, tmp_path / name, max_steps=4, data__micro_batch=1, data__validation_fraction=0.4,
            optim__lr=2e-2, eval=EVAL,
        )  # fmt: skip

    (*_, in_all), _ = run_ranks(2, fit_and_stop, config("straight"), None)
    assert in_all % 3 == 0, "evaluations before the first step, after the third and the last"
    stopped = run_ranks(2, fit_and_stop, config("run"), in_all // 3 + 5)
    assert stopped == [(3, signal.SIGTERM, in_all // 3 + 5)] * 2
    assert [line["step"] for line in read_metrics(tmp_path / "run", "held_out.jsonl")] == [0]
    run_ranks(2, fit_and_stop, config("run"), None)
    straight, resumed = (read_metrics(tmp_path / name, "held_out.jsonl") for name in ("straight", "run"))
    assert resumed == straight and len({line["mean"] for line in straight}) == 3
