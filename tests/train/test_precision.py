"""Precision by device, loss scaling, and which block overflowed; the overflows are real where they can be.

Trap 3's other side (fp16 is a measured choice): see the ranges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from train_runs import lora_parameters

from shards.errors import UserError
from train.config.model import LoRAConfig
from train.device import DeviceInfo
from train.doctor.tables import print_ranges
from train.lora.lora import inject
from train.model.dit import WanDiT, build_model, set_checkpointing
from train.precision import (
    LossScaler,
    OverflowTelemetry,
    fold_outputs,
    fp16_headroom,
    has_overflow,
    record_ranges,
    resolve_precision,
)
from train.recompute.runner import keep

V100 = DeviceInfo("cuda", "V100", (7, 0))
T4 = DeviceInfo("cuda", "T4", (7, 5))
A100 = DeviceInfo("cuda", "A100", (8, 0))
H200 = DeviceInfo("cuda", "H200", (9, 0))
CPU = DeviceInfo("cpu", "cpu", None)


@pytest.mark.parametrize(
    ("facts", "name", "scales"),
    [(V100, "fp16", True), (T4, "fp16", True), (A100, "bf16", False), (H200, "bf16", False), (CPU, "fp32", False)],
)
def test_auto_takes_what_the_chip_computes(facts: DeviceInfo, name: str, scales: bool) -> None:
    """bf16 from 8.0 on, fp16 with scaling below (emulated bf16 does not count), fp32 on a CPU."""
    precision = resolve_precision("auto", facts)
    assert (precision.name, precision.scales_loss) == (name, scales)
    assert facts.name in precision.reason


def test_emulated_bf16_is_refused_and_the_rest_is_as_asked() -> None:
    """bf16 on a V100 is an error with the fix; other requests are taken at their word and say so."""
    with pytest.raises(UserError, match=r"V100 \(compute capability 7\.0\) would be emulated"):
        resolve_precision("bf16", V100)
    for name, facts in (("fp32", V100), ("fp16", H200), ("bf16", CPU), ("fp16", CPU)):
        precision = resolve_precision(name, facts)  # type: ignore[arg-type]
        assert precision.name == name
        assert precision.reason.endswith("as asked")
    assert resolve_precision("fp16", CPU).scales_loss


def test_the_scale_halves_on_overflow_and_doubles_after_good_updates() -> None:
    """Dynamic scaling; only applied updates in a row make it grow."""
    scaler = LossScaler(True, init_scale=1024, growth_interval=3)
    scaler.update(True)
    assert (scaler.scale, scaler.skipped) == (512, 1)
    for overflow in (False, False, True, False, False):
        scaler.update(overflow)
    assert scaler.scale == 256
    scaler.update(False)
    assert (scaler.scale, scaler.skipped) == (512, 2)


def test_skips_in_a_row_are_bounded() -> None:
    """A run that only overflows ends with an error that says what to do; one good update starts the count anew."""
    scaler = LossScaler(True, max_skips=3)
    for overflow in (True, True, True, False, True, True, True):
        scaler.update(overflow)
    with pytest.raises(UserError, match="4 updates in a row overflowed fp16") as caught:
        scaler.update(True)
    assert "doctor --ranges" in str(caught.value)


def test_scaled_gradients_come_back_unscaled() -> None:
    """scale_loss then unscale_ is the plain gradient, to the bit: scales are powers of two."""
    weight = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight.square().sum().backward()
    plain = weight.grad.clone()
    weight.grad = None
    scaler = LossScaler(True)
    scaler.scale_loss(weight.square().sum()).backward()
    assert not torch.equal(weight.grad, plain)
    scaler.unscale_([weight.grad])
    assert torch.equal(weight.grad, plain)


def test_a_disabled_scaler_does_nothing() -> None:
    """bf16 and fp32 runs keep one code path."""
    scaler = LossScaler(False)
    loss, gradient = torch.tensor(3.0), torch.tensor([2.0])
    assert scaler.scale_loss(loss) is loss
    scaler.unscale_([gradient])
    for _ in range(100):
        scaler.update(True)
    assert (gradient.item(), scaler.scale, scaler.skipped) == (2.0, 1.0, 0)


def test_scaler_state_goes_through_json() -> None:
    """A resumed run scales on where it stopped."""
    scaler = LossScaler(True, growth_interval=5)
    for overflow in (True, False, False, False, False):
        scaler.update(overflow)
    other = LossScaler(True, growth_interval=5)
    other.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    for each in (scaler, other):
        each.update(False)
    assert other.state_dict() == scaler.state_dict()
    assert other.scale == 2.0**16


@pytest.mark.parametrize(
    ("gradients", "overflow"),
    [
        ([], False),
        ([torch.ones(3), torch.full((2, 2), 1e30)], False),
        ([torch.ones(3), torch.tensor([1.0, math.inf])], True),
        ([torch.tensor([math.inf, -math.inf])], True),
        ([torch.tensor([math.nan]), torch.ones(1)], True),
        ([torch.full((70_000,), 3.0, dtype=torch.float16)], False),
    ],
)
def test_overflow_is_seen_in_gradients(gradients: list[Tensor], overflow: bool) -> None:
    """Infinite, cancelling infinities and NaN are overflows; a large sum in 16 bit is not."""
    assert bool(has_overflow(gradients)) is overflow


# --- telemetry ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp16_dit(tiny_dit: WanDiT) -> Iterator[WanDiT]:
    """A model of three blocks in fp16 compute with a LoRA, as on a V100."""
    config = tiny_dit.config.model_copy(update={"num_layers": 3})
    model = build_model(config, torch.float16, seed=0)
    inject(model, LoRAConfig(rank=4, targets=("*",)), seed=1)
    with torch.no_grad():
        for weight in lora_parameters(model):
            weight.add_(0.01)
    yield model


def backward(model: WanDiT, scale: float = 1.0) -> list[Tensor]:
    """One micro-step; the gradients."""
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(1, 8, 3, 4, 6, generator=generator)
    text = torch.randn(1, 12, 16, generator=generator)
    out = model(latent, torch.tensor([500.0]), torch.tensor([False]), text)
    (out.square().mean() * scale).backward()
    return [weight.grad for weight in lora_parameters(model)]


def blame(telemetry: OverflowTelemetry, model: WanDiT) -> str:
    """Ask with the model's own names."""
    return telemetry.blame((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_forward_overflow_names_its_first_block(fp16_dit: WanDiT, bad: int, mode: str) -> None:
    """Weights that push ffn.2 beyond 65,504 in one block: that block is named, not those it poisons."""
    set_checkpointing(fp16_dit, mode)
    telemetry = OverflowTelemetry(fp16_dit)
    assert not has_overflow(backward(fp16_dit))
    fp16_dit.zero_grad()
    telemetry.begin_step()
    with torch.no_grad():
        fp16_dit.blocks[bad].ffn[2].weight.fill_(6e4)
    assert has_overflow(backward(fp16_dit))
    assert blame(telemetry, fp16_dit) == f"blocks.{bad} forward"
    assert telemetry.counts == {f"blocks.{bad} forward": 1}


def test_an_overflow_in_one_micro_step_of_eight_is_kept(fp16_dit: WanDiT) -> None:
    """Notes add up over a step's micro-steps, and a new step forgets them; counts stay."""
    telemetry = OverflowTelemetry(fp16_dit)
    weight = fp16_dit.blocks[1].ffn[2].weight
    kept = weight.detach().clone()
    telemetry.begin_step()
    for micro_step in range(8):
        with torch.no_grad():
            weight.copy_(torch.full_like(weight, 6e4) if micro_step == 3 else kept)
        gradients = backward(fp16_dit)
    assert has_overflow(gradients)
    assert blame(telemetry, fp16_dit) == "blocks.1 forward"
    fp16_dit.zero_grad()
    telemetry.begin_step()
    assert not has_overflow(backward(fp16_dit))
    for weight in lora_parameters(fp16_dit):
        weight.grad[0] = math.inf
    assert blame(telemetry, fp16_dit) == "blocks.2 backward"
    assert telemetry.state_dict() == {"blocks.1 forward": 1, "blocks.2 backward": 1}


def test_a_backward_overflow_names_the_last_bad_block(fp16_dit: WanDiT) -> None:
    """A loss scale too large overflows 16-bit gradients behind a finite forward; a smaller one does not."""
    telemetry = OverflowTelemetry(fp16_dit)
    telemetry.begin_step()
    assert has_overflow(backward(fp16_dit, 2.0**30))
    assert blame(telemetry, fp16_dit).endswith("backward")
    fp16_dit.zero_grad()
    assert not has_overflow(backward(fp16_dit, 2.0**4))


def test_what_no_block_did_is_said_to_be_outside(fp16_dit: WanDiT) -> None:
    """A loss that overflowed by itself is not laid at a block's door; state and hooks come and go."""
    telemetry = OverflowTelemetry(fp16_dit)
    telemetry.begin_step()
    backward(fp16_dit)
    assert blame(telemetry, fp16_dit) == "outside the blocks"
    other = OverflowTelemetry(fp16_dit)
    other.load_state_dict(json.loads(json.dumps(telemetry.state_dict())))
    assert other.counts["outside the blocks"] == 1
    for each in (telemetry, other):
        each.remove()
    assert not any(block._forward_hooks for block in fp16_dit.blocks)


def test_telemetry_counts_nothing_in_the_output(fp16_dit: WanDiT) -> None:
    """Watching changes no gradient."""
    watched = [gradient.clone() for gradient in backward(fp16_dit)]
    fp16_dit.zero_grad()
    telemetry = OverflowTelemetry(fp16_dit)
    assert all(torch.equal(a, b) for a, b in zip(backward(fp16_dit), watched, strict=True))
    telemetry.remove()


def test_ranges_name_the_layer_that_fp16_cannot_hold(tiny_dit: WanDiT) -> None:
    """Largest outputs per block and linear in fp32, over several passes; headroom under 1 is where fp16 overflows."""
    with torch.no_grad():
        tiny_dit.blocks[1].ffn[2].weight.mul_(1e6)
    with record_ranges(tiny_dit) as ranges:
        backward_free(tiny_dit, 1.0)
        assert not ranges
        backward_free(tiny_dit, 0.1)
    assert {"blocks.0", "blocks.1", "blocks.1.ffn.2", "blocks.0.self_attn.q"} <= set(ranges)
    assert len(ranges) == 2 * 11
    headroom = fp16_headroom(ranges)
    assert [name for name, factor in headroom.items() if factor < 1] == ["blocks.1.ffn.2"]
    assert "blocks.1" not in headroom, "the residual stream is float32"
    assert headroom["blocks.1.ffn.2"] == pytest.approx(65504 / ranges["blocks.1.ffn.2"])
    with record_ranges(tiny_dit) as smaller:
        backward_free(tiny_dit, 0.1)
    assert smaller["blocks.0.self_attn.q"] <= ranges["blocks.0.self_attn.q"]
    assert not tiny_dit.blocks[0]._forward_hooks


def test_ranges_keep_what_is_not_a_number(tiny_dit: WanDiT) -> None:
    """A NaN seen once stays seen."""
    with record_ranges(tiny_dit) as ranges:
        backward_free(tiny_dit, math.nan)
        backward_free(tiny_dit, 1.0)
    assert math.isnan(ranges["blocks.0"])


def backward_free(model: WanDiT, size: float) -> None:
    """One forward pass of latents of this size."""
    latent = size * torch.randn(1, 8, 3, 4, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model(latent, torch.tensor([500.0]), torch.tensor([False]), torch.zeros(1, 12, 16))


# --- folding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", ["plain", "none", "full"])
@pytest.mark.parametrize("image_first", [False, True])
def test_a_folded_power_of_two_changes_no_bit_in_float32(tiny_dit: WanDiT, runner: str, image_first: bool) -> None:
    """Forward and gradients, in the plain and in the hand-written block, LoRA and dropout included."""
    inject(tiny_dit, LoRAConfig(rank=4, targets=("self_attn", "cross_attn", "ffn"), dropout=0.2), seed=1)
    with torch.no_grad():
        for weight in lora_parameters(tiny_dit.train()):
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    if runner != "plain":
        keep(tiny_dit, runner)

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        latent, text = (torch.randn(shape, generator=generator) for shape in ((1, 8, 3, 4, 6), (1, 12, 16)))
        timestep, flag, key = torch.tensor([500.0]), torch.tensor([image_first]), torch.tensor([7])
        out = tiny_dit(latent, timestep, flag, text, key)
        out.square().mean().backward()
        gradients = [weight.grad.clone() for weight in lora_parameters(tiny_dit)]
        tiny_dit.zero_grad()
        return [out.detach(), *gradients]

    before = run()
    for place, block in enumerate(tiny_dit.blocks):
        fold_outputs(block, 4 + 8 * place)
        assert block.ffn[2].output_scale == 2.0 ** -(4 + 8 * place)
    for ours, theirs in zip(run(), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("runner", ["plain", "none", "full"])
@pytest.mark.parametrize("linear", ["self_attn.o", "cross_attn.o", "ffn.2"])
def test_a_run_folds_what_fp16_cannot_hold_and_is_trained_on(fp16_dit: WanDiT, linear: str, runner: str) -> None:
    """An output of 1e5 and more: the update is skipped once or twice, then gradients are finite."""
    if runner != "plain":
        keep(fp16_dit, runner)
    telemetry, block = OverflowTelemetry(fp16_dit), fp16_dit.blocks[1]
    with torch.no_grad():
        for attention in (block.self_attn, block.cross_attn):
            attention.v.bias.fill_(0.1)
        block.get_submodule(linear).bias.fill_(6e4)
        block.get_submodule(linear).weight.fill_(4e3)
        if linear != "cross_attn.o":
            block.modulation[:, 2 if linear == "self_attn.o" else 5].fill_(1e-4)
    telemetry.begin_step()
    assert has_overflow(backward(fp16_dit)) and blame(telemetry, fp16_dit) == "blocks.1 forward"
    for _ in range(3):
        fp16_dit.zero_grad()
        telemetry.begin_step()
        gradients = backward(fp16_dit, 2.0**-8)
        if not has_overflow(gradients):
            break
        blame(telemetry, fp16_dit)
    assert not has_overflow(gradients)
    assert block.get_submodule(linear).output_scale == 2.0 ** -telemetry.exponent("blocks.1") < 1
    assert fp16_dit.blocks[0].ffn[2].output_scale == 1


def test_what_was_folded_is_kept_in_the_state_and_restored(fp16_dit: WanDiT) -> None:
    telemetry = OverflowTelemetry(fp16_dit)
    telemetry.counts["blocks.2 forward"] = 2
    telemetry.counts["blocks.1 backward"] = 3
    state = json.loads(json.dumps(telemetry.state_dict()))
    again = build_model(fp16_dit.config, torch.float16, seed=0)
    other = OverflowTelemetry(again)
    other.load_state_dict(state)
    assert [block.ffn[2].output_scale for block in again.blocks] == [1, 1, 2.0**-8]
    other.load_state_dict({"blocks.0 forward": 99})
    assert [block.self_attn.o.output_scale for block in again.blocks] == [2.0**-16, 1, 1]


def test_the_doctor_says_what_a_run_folds_and_what_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    print_ranges({"blocks.0": 1e6, "blocks.0.ffn.2": 5e4, "blocks.1.self_attn.q": 6e4, "blocks.1.ffn.2": 10.0})
    said = capsys.readouterr().out
    assert "folds a power of two into when they overflow: blocks.0\n" in said
    assert "cannot be folded: blocks.1.self_attn.q" in said
