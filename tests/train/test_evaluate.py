"""`wantrain evaluate`: the held-out loss of a run again, of a merged base, of two LoRAs on the same draws."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from train_runs import DIMS, make_config, read_metrics

from train.cli.main import main
from train.config.model import DiTConfig
from train.evaluate import HeldOut, changes
from train.loop import fit
from train.lora.formats import read_lora
from train.lora.merge import merge_checkpoint
from train.model.dit import build_model
from train.model.load import save_dit

EVAL = {"every_steps": 3, "num_clips": 3, "batch": 2}


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
