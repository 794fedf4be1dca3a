"""Optimizer state, schedule, clipping, average."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from train_runs import checkpoint_bytes, make_config, read_metrics

from shards.errors import UserError
from train.checkpoint import load_tensors, write_tensors
from train.cli.main import main
from train.config.optim import OptimConfig
from train.doctor.machine import check_optimizer
from train.estimate.saves import run_memory
from train.geometry import Shape
from train.loop import fit
from train.optim import (
    averaged_weights,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    pack_optimizer,
    probe_optimizer,
    unpack_optimizer,
    update_average,
)


def test_learning_rate_rises_then_follows_its_schedule():
    def course(**changes):
        config = OptimConfig(lr=1.0, warmup_updates=4, final_lr_share=0.1, **changes)
        return [learning_rate(config, updates, 24) for updates in range(25)]

    for schedule in ("constant", "cosine", "linear"):
        assert course(schedule=schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(course(schedule="constant")[4:]) == {1.0}
    assert course(schedule="linear")[14] == pytest.approx(0.55) and course(schedule="linear")[24] == pytest.approx(0.1)
    cosine = course(schedule="cosine")
    assert cosine[14] == pytest.approx(0.1 + 0.9 * 0.5) and cosine[24] == pytest.approx(0.1)
    assert cosine[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_clipping_is_torchs():
    ours, theirs = ([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))] for _ in range(2))
    for first, second in zip(ours, theirs, strict=True):
        first.grad = torch.arange(first.numel(), dtype=torch.float32).view_as(first)
        second.grad = first.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert clip_gradients(ours, 0.5) == pytest.approx(expected.item())
    assert all(first.grad.equal(second.grad) for first, second in zip(ours, theirs, strict=True))
    assert clip_gradients(ours, None) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_goes_through_tensors_to_the_bit(name):
    config = OptimConfig(name=name, lr=1e-2, min_8bit_size=32, weight_decay=0.01)

    def make():
        generator = torch.Generator().manual_seed(0)
        weights = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in (("a", (16, 8)), ("a.b", (4, 4)))}
        return weights, make_optimizer(weights.values(), config)

    def steps(weights, optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    straight, optimizer = make()
    steps(straight, optimizer, 0, 6)
    weights, optimizer = make()
    steps(weights, optimizer, 0, 3)
    tensors = optimizer_tensors(optimizer, {weight: name for name, weight in weights.items()})
    resumed, fresh = make()
    for name_of, weight in resumed.items():
        weight.data.copy_(weights[name_of])
    load_optimizer_tensors(fresh, {weight: name for name, weight in resumed.items()}, tensors)
    steps(resumed, fresh, 3, 6)
    assert all(resumed[name_of].equal(weight) for name_of, weight in straight.items())
    if name == "adamw8bit":
        assert tensors["a.state1"].dtype == torch.uint8 and "a.absmax1" in tensors
        assert tensors["a.b.state1"].dtype == torch.float32  # fewer elements than min_8bit_size
    other, another = make()
    with pytest.raises(UserError, match="does not fit"):
        load_optimizer_tensors(another, {weight: f"x.{name}" for name, weight in other.items()}, tensors)


def test_state_of_the_other_optimizer_is_refused():
    weight = nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    first = make_optimizer([weight], OptimConfig(name="adamw8bit", min_8bit_size=32))
    first.step()
    second = make_optimizer([weight], OptimConfig(name="adamw"))
    with pytest.raises(UserError, match="state1"):
        load_optimizer_tensors(second, {weight: "w"}, optimizer_tensors(first, {weight: "w"}))


def test_average_follows_slowly_and_forgets_the_start():
    weights = {"w": torch.zeros(3)}
    average = {"w": torch.zeros(3)}
    weights["w"] += 1
    update_average(average, weights, 0.99, 1)
    assert average["w"][0] == pytest.approx(1 - 2 / 11)
    for updates in range(2, 2000):
        update_average(average, weights, 0.99, updates)
    assert average["w"][0] == pytest.approx(1.0, abs=1e-5)


# --- optimizers of other packages -----------------------------------------------------------------------------------

OTHERS = {
    "schedulefree.AdamWScheduleFree": ({"warmup_steps": 3, "betas": [0.9, 0.99]}, 8.0),
    "prodigyopt.Prodigy": ({"use_bias_correction": True, "d0": 1e-3}, 16.0),
    "muon.SingleDeviceMuon": ({"momentum": 0.9}, 4.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_package_goes_through_a_file_to_the_bit(name, tmp_path):
    args, expected_bytes = OTHERS[name]
    config = OptimConfig(name=name, args=args, lr=1e-2)
    assert probe_optimizer(name, json.dumps(args)) == expected_bytes

    def make():
        generator = torch.Generator().manual_seed(0)
        weights = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in (("a", (16, 8)), ("a.b", (4, 4)))}
        return weights, make_optimizer(weights.values(), config)

    def steps(weights, optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    straight, optimizer = make()
    steps(straight, optimizer, 0, 8)
    weights, optimizer = make()
    steps(weights, optimizer, 0, 4)
    tensors, values = pack_optimizer(optimizer, weights)
    write_tensors(tmp_path / "optimizer.safetensors", tensors)
    resumed, fresh = make()
    for name_of, weight in resumed.items():
        weight.data.copy_(weights[name_of])
    loaded, saved = load_tensors(tmp_path / "optimizer.safetensors"), json.loads(json.dumps(values, allow_nan=False))
    unpack_optimizer(fresh, resumed, loaded, saved)
    steps(resumed, fresh, 4, 8)
    assert all(resumed[name_of].equal(weight) for name_of, weight in straight.items())
    other, another = make()
    with pytest.raises(UserError, match="does not fit"):
        unpack_optimizer(another, {"x": other["a"], "a.b": other["a.b"]}, loaded, saved)
    with pytest.raises(UserError, match="does not fit"):
        unpack_optimizer(torch.optim.SGD(other.values(), lr=1.0), other, loaded, saved)
    with pytest.raises(UserError, match="cannot be read"):
        unpack_optimizer(another, other, {}, saved)


def test_the_trial_is_large_enough_for_state_of_8_bits():
    """bitsandbytes keeps state of tensors below 4096 numbers in float32; here two code books are in each state."""
    assert probe_optimizer("bitsandbytes.optim.AdamW8bit", "{}") == pytest.approx(2.3, abs=0.05)
    assert probe_optimizer("bitsandbytes.optim.Lion8bit", "{}") == pytest.approx(1.15, abs=0.05)


def test_a_look_at_schedule_free_weights_changes_nothing():
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = make_optimizer([weight], OptimConfig(name="schedulefree.AdamWScheduleFree", lr=0.1))
    for _ in range(3):
        weight.grad = torch.randn(4, 4)
        optimizer.step()
    before = weight.detach().clone()
    averaged = averaged_weights(optimizer, {"w": weight})["w"]
    assert weight.equal(before) and not averaged.equal(before)
    assert optimizer.param_groups[0]["train_mode"]
    assert torch.allclose(averaged, before.lerp(optimizer.state[weight]["z"], 1 - 1 / 0.9))
    assert averaged_weights(make_optimizer([weight], OptimConfig()), {"w": weight}) is None


class Forgetful(torch.optim.SGD):
    """Holds a count of its own that no checkpoint sees."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["weight_decay"] = 0.1 * self.count
        return super().step(closure)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        (
            "schedulefree.AdamWScheduleFree",
            {"warmup_step": 3},
            r"no argument 'warmup_step'; did you mean warmup_steps\?",
        ),
        ("prodigyopt.Prodigy", {"betas": [2, 1]}, "refuses .*Invalid beta"),
        ("nowhere.Adam", {}, "cannot be imported.*nowhere"),
        ("torch.optim.Adan", {}, "cannot be imported.*Adan"),
        ("json.JSONDecoder", {}, "is no optimizer"),
        ("torch.optim.LBFGS", {}, "cannot take a step.*closure"),
        (f"{__name__}.Forgetful", {}, "does not continue to the bit"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_by_name(name, args, words):
    with pytest.raises(UserError, match=words) as caught:
        make_optimizer([nn.Parameter(torch.ones(4, 4))], OptimConfig(name=name, args=args))
    if "argument" in words:
        assert "of betas, eps, weight_decay, warmup_steps, r, weight_lr_power, foreach" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "adamW"}, "did you mean adamw"),
        ({"args": {"eps": 1.0}}, "args are for a class by its path"),
        ({"name": "a.B", "args": {"lr": 1.0}}, r"optim\.lr"),
        ({"name": "a.B", "weight_decay": 0.1}, "put it into args"),
    ],
)
def test_a_config_that_means_two_things_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        OptimConfig(**values)


def test_doctor_tries_the_optimizer(tmp_path):
    good = check_optimizer(make_config("shards", tmp_path, optim__name="prodigyopt.Prodigy"))
    assert (good.status, good.found) == ("ok", "prodigyopt.Prodigy, 16 bytes of state a trained number")
    bad = check_optimizer(make_config("shards", tmp_path, optim__name="torch.optim.LBFGS"))
    assert bad.status == "problem" and "closure" in bad.found


def test_the_plan_counts_measured_state(tmp_path):
    def optimizer_bytes(**changes):
        config = make_config("shards", tmp_path, **changes)
        shape = Shape(1, 128)
        return run_memory(config, config.model.dims, shape, [("attention",)] * 2, 4).optimizer

    assert optimizer_bytes(optim__name="muon.SingleDeviceMuon") == optimizer_bytes() / 2
    assert optimizer_bytes(optim__name="prodigyopt.Prodigy") == optimizer_bytes() * 2


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_resumes_exactly_with_another_optimizer(tiny_shards, tmp_path, name):
    args, _ = OTHERS[name]
    lr = 1.0 if "rodigy" in name else 1e-3
    changes = {"optim": {"name": name, "args": args, "lr": lr}, "eval": {"num_clips": 1, "every_steps": 3}}
    fit(make_config(tiny_shards, tmp_path / "whole", max_steps=8, **changes))
    fit(make_config(tiny_shards, tmp_path / "parts", max_steps=5, **changes))
    fit(make_config(tiny_shards, tmp_path / "parts", max_steps=8, **changes))
    whole, parts = (checkpoint_bytes(tmp_path / run, 8) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(whole[file] == parts[file] for file in whole)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    # Neither how often it is evaluated nor how often it is saved moves a bit.
    seldom = changes | {"eval": None, "checkpoint": {"every_steps": 8}}
    fit(make_config(tiny_shards, tmp_path / "seldom", max_steps=8, **seldom))
    alike = checkpoint_bytes(tmp_path / "seldom", 8)
    assert all(alike[file] == whole[file] for file in ("lora.safetensors", "optimizer.safetensors"))
    folder = tmp_path / "whole" / "checkpoints" / "step-0000008"
    assert (folder / "average.safetensors").exists() == name.startswith("schedulefree")
    with pytest.raises(UserError, match=r"config\.optim\.args"):
        fit(make_config(tiny_shards, tmp_path / "parts", max_steps=9, **changes | {"optim": {"name": name, "lr": lr}}))


def test_a_schedule_free_run_is_evaluated_and_exported_by_its_average(tiny_shards, tmp_path):
    changes = {
        "optim": {"name": "schedulefree.AdamWScheduleFree", "lr": 1e-2},
        "eval": {"num_clips": 1, "every_steps": 6},
    }
    fit(make_config(tiny_shards, tmp_path / "run", max_steps=6, **changes))
    folder = tmp_path / "run" / "checkpoints" / "step-0000006"
    average, trained = (load_tensors(folder / f"{name}.safetensors") for name in ("average", "lora"))
    moments = load_tensors(folder / "optimizer.safetensors")
    for name, weight in trained.items():
        assert torch.allclose(average[name], weight.lerp(moments[f"{name}.z"], 1 - 1 / 0.9), atol=1e-7)
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run"), "--json"], catch_exceptions=False)
    held_out = [line["mean"] for line in read_metrics(tmp_path / "run", "held_out.jsonl")]
    found = [result["mean"] for result in json.loads(result.stdout)["results"].values()]
    assert found == pytest.approx([held_out[0], held_out[-1]], rel=1e-5), "the export is what was evaluated"
    with pytest.raises(UserError, match="averages the weights itself"):
        fit(make_config(tiny_shards, tmp_path / "ema", max_steps=1, **changes, optim__ema_decay=0.9))
