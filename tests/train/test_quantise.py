"""A base in 8 or 4 bits: the numbers of a model whose weights were rounded beforehand, and of no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from streamed import DIMS, LORA, late_copies, make_placed, passes, same
from torch import Tensor
from train_runs import checkpoint_bytes, finish, make_config, read_metrics

from shards.errors import UserError
from shards.format.identity import IdentityMismatch
from train.checkpoint import find_checkpoints, read_checkpoint
from train.loop import fit
from train.lora.formats import read_lora
from train.lora.lora import inject, merge
from train.lora.merge import merge_checkpoint
from train.model.block import Linear
from train.model.dit import WanDiT, build_model
from train.model.load import diffusers_key, load_dit, save_dit
from train.model.quantise import Quantised, empty_quantised, quantised_weights
from train.model.stream import place_base

KINDS = ("fp8", "nf4")


def quantised(weight_OI: Tensor, kind: Any) -> Quantised:
    empty = empty_quantised(kind, tuple(weight_OI.shape))
    made = empty._replace(
        codes=torch.empty_like(empty.codes, device="cpu"), scales=torch.empty_like(empty.scales, device="cpu")
    )
    made.fill(weight_OI)
    return made


def rounded_beforehand(model: WanDiT, kind: str, dtype: torch.dtype) -> WanDiT:
    """The linears' weights as a quantised base gives them, kept as plain weights."""
    with torch.no_grad():
        for block in model.blocks:
            for module in block.modules():
                if isinstance(module, Linear):
                    module.weight.copy_(quantised(module.weight, kind).to(dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_with_weights_rounded_beforehand(kind: str, dtype: torch.dtype) -> None:
    """Forward, gradients and an evaluation to the bit, whatever is recomputed; only blocks' linears are touched."""
    # Codes are made of the float32 weights, whatever they are computed in.
    base = rounded_beforehand(build_model(DIMS, torch.float32, seed=0), kind, dtype)
    plain = build_model(DIMS, dtype)
    plain.load_state_dict(base.state_dict())
    inject(plain, LORA, 0)
    exact = passes(finish(plain, "none"))
    unrounded = build_model(DIMS, dtype, seed=0)
    inject(unrounded, LORA, 0)
    assert not same(passes(finish(unrounded, "none")), exact)
    for saves in ("none", "full"):
        model = finish(make_placed(DIMS, LORA, dtype, kind=kind), saves)
        assert same(passes(model), exact)
    assert {name.split(".", 2)[2] for name in quantised_weights(model)} == {
        f"{part}.{leaf}.weight" for part in ("self_attn", "cross_attn") for leaf in "qkvo"
    } | {"ffn.0.weight", "ffn.2.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_it_gives_the_same_bits(kind: str) -> None:
    resident = passes(finish(make_placed(DIMS, LORA, kind=kind), "none"))
    with late_copies():
        streamed = finish(make_placed(DIMS, LORA, kind=kind, streamed=True), "full", offload_inputs=True)
        assert same(passes(streamed), resident)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_a_function_of_the_weights_alone(kind: str, tmp_path: Path) -> None:
    """Read from a file of either precision of computing, or drawn: the same codes; scales hold every row."""
    save_dit(build_model(DIMS, torch.float32, seed=0), tmp_path / "model.safetensors")
    codes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(DIMS, dtype, "meta")
        place_base(model, torch.device("cpu"), kind, streamed=False)
        load_dit(model, tmp_path / "model.safetensors")
        codes.append(quantised_weights(model))
    codes.append(quantised_weights(make_placed(DIMS, LORA, kind=kind)))
    for name, first in codes[0].items():
        for other in (codes[1][name], codes[2][name]):
            assert torch.equal(first.codes.view(torch.uint8), other.codes.view(torch.uint8)), name
            assert torch.equal(first.scales, other.scales)
    weight = build_model(DIMS, seed=0).blocks[0].ffn[0].weight.detach()
    error = (quantised(weight, kind).to(torch.float32) - weight).norm() / weight.norm()
    assert error < {"fp8": 0.03, "nf4": 0.11}[kind]


def test_fp8_holds_every_row_at_its_own_scale() -> None:
    """Rows of any size, one of zeros, and the largest number of each row to the bit of its scale."""
    weight = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 3e-3])[:, None]
    made = quantised(weight, "fp8")
    back = made.to(torch.float32)
    assert torch.equal(back[3], torch.zeros(64)) and bool(back.isfinite().all())
    largest = weight.abs().argmax(1, keepdim=True)
    assert torch.allclose(back.gather(1, largest), weight.gather(1, largest), rtol=1e-6)
    for row in (0, 1, 2, 4):
        assert float((back[row] - weight[row]).norm() / weight[row].norm()) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_records_it_resumes_with_it_and_refuses_another(kind: str, tiny_shards: Path, tmp_path: Path) -> None:
    """In the identity and in the header of the LoRA; a base of 16 bits, resident or streamed, is in neither."""
    save_dit(build_model(make_config(tiny_shards, "x").model.dims, seed=3), tmp_path / "base.safetensors")
    given: dict[str, Any] = {"model__checkpoint": str(tmp_path / "base.safetensors"), "max_steps": 4}
    given |= {"checkpoint": {"every_steps": 2}}
    straight = make_config(tiny_shards, tmp_path / "straight", **given, model__base_dtype=kind)
    fit(straight)
    streamed = {"model__base_dtype": kind, "model__stream_blocks": True}
    fit(make_config(tiny_shards, tmp_path / "resumed", **given | {"max_steps": 2} | streamed))
    fit(make_config(tiny_shards, tmp_path / "resumed", **given, model__base_dtype=kind))
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "resumed")
    assert checkpoint_bytes(tmp_path / "straight", 4) == checkpoint_bytes(tmp_path / "resumed", 4)
    newest = find_checkpoints(tmp_path / "straight" / "checkpoints")[-1]
    assert read_checkpoint(newest).identity["base_dtype"] == kind
    with safe_open(tmp_path / "straight" / "lora.safetensors", framework="pt") as opened:
        assert opened.metadata()["base_dtype"] == kind
    for other in ("auto", "fp8" if kind == "nf4" else "nf4"):
        with pytest.raises(IdentityMismatch, match="base_dtype"):
            fit(make_config(tiny_shards, tmp_path / "straight", **given | {"max_steps": 5}, model__base_dtype=other))
    fit(make_config(tiny_shards, tmp_path / "exact", **given | {"max_steps": 1}))
    assert "base_dtype" not in read_checkpoint(find_checkpoints(tmp_path / "exact" / "checkpoints")[-1]).identity


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_its_lora_is_merged_into_the_original_weights_and_loads_in_diffusers(
    kind: str, tiny_shards: Path, tmp_path: Path
) -> None:
    from diffusers import WanPipeline, WanTransformer3DModel

    config = make_config(tiny_shards, tmp_path / "run", max_steps=2, model__base_dtype=kind, optim__lr=0.05)
    base = tmp_path / "base.safetensors"
    save_dit(build_model(config.model.dims, seed=3), base)
    fit(config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": str(base)})}))
    file = tmp_path / "run" / "lora.safetensors"
    lora = read_lora(file)
    merge_checkpoint(base, lora, tmp_path / "plain", "diffusers", scale=0.0)
    merge_checkpoint(base, lora, tmp_path / "merged", "diffusers")
    plain, merged = (
        WanTransformer3DModel.from_pretrained(tmp_path / name / "transformer") for name in ("plain", "merged")
    )
    before = load_file(base)
    for official in lora.pairs:
        theirs = plain.get_parameter(diffusers_key(f"{official}.weight"))
        assert torch.equal(theirs, before[f"{official}.weight"])
    WanPipeline.load_lora_into_transformer(WanPipeline.lora_state_dict(file), transformer=plain)
    assert sum("lora_A" in name for name, _ in plain.named_parameters()) == len(lora.pairs)
    inputs = torch.randn(1, 48, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 32, 64)
    with torch.no_grad():
        beside, within = (model(*inputs, return_dict=False)[0] for model in (plain, merged))
    assert float((beside - within).norm() / within.norm()) < 1e-5


def test_a_quantised_model_is_not_merged_in_memory() -> None:
    with pytest.raises(UserError, match="original weights"):
        merge(make_placed(DIMS, LORA, kind="fp8"))


def test_a_base_kept_in_16_bits_is_cast_linear_by_linear() -> None:
    """`base_dtype: bf16` where float32 is computed: the numbers of a base rounded to bf16."""
    model = build_model(DIMS, torch.float32, param_dtype=torch.bfloat16, seed=0)
    rounded = build_model(DIMS, torch.float32)
    rounded.load_state_dict(model.state_dict())
    for one in (model, rounded):
        inject(one, LORA, 0)
    assert same(passes(finish(model, "full")), passes(finish(rounded, "full")))
