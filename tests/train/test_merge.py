"""Merging a LoRA into a checkpoint and taking it out again, in both layouts; the published sizes; memory."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peak import PEAK_KIB
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shards.errors import UserError
from train.config.model import TI2V_5B, DiTConfig, LoRAConfig
from train.lora.formats import name_tensors, raw_pairs, read_lora
from train.lora.lora import inject, lora_state
from train.lora.merge import merge_checkpoint, unmerge_checkpoint
from train.model.dit import build_model
from train.model.load import INDEX, load_dit, read_dit_config, save_dit
from train.model.save import config_text, file_names, header_bytes, index_text, plan_shards, write_layout

LORA = LoRAConfig(rank=4, alpha=8.0, targets=("self_attn", "ffn"))


@pytest.fixture
def base(tiny_dit, tmp_path):
    save_dit(tiny_dit, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapted(tiny_dit, base):
    """A twin of the base with a LoRA beside its weights."""
    model = build_model(tiny_dit.config)
    load_dit(model, base)
    inject(model, LORA, seed=1)
    with torch.no_grad():
        for place, (name, tensor) in enumerate(lora_state(model).items()):
            if "lora_B" in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(place))
    return model.eval()


@pytest.fixture
def lora_path(adapted, tmp_path):
    save_file(name_tensors(raw_pairs(lora_state(adapted), LORA)), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def _output(model):
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, model.config.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(1, model.config.text_len, model.config.text_dim, generator=generator)
    with torch.no_grad():
        return model(latent, torch.tensor([300.0]), torch.tensor([True]), text)


def _loaded(folder, config):
    model = build_model(config)
    load_dit(model, folder)
    return model.eval()


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_merged_equals_unmerged_with_the_lora_and_loads_in_both_layouts(layout, base, adapted, lora_path, tmp_path):
    result = merge_checkpoint(base, read_lora(lora_path), tmp_path / "out", layout)
    assert (result.num_changed, result.num_tensors) == (12, len(load_file(base)))
    merged = _loaded(tmp_path / "out", adapted.config)
    torch.testing.assert_close(_output(merged), _output(adapted), atol=1e-5, rtol=1e-5)
    assert read_dit_config(tmp_path / "out") == adapted.config
    untouched = "blocks.0.cross_attn.q.weight"
    assert torch.equal(merged.state_dict()[untouched], load_file(base)[untouched])


@pytest.mark.filterwarnings("ignore")
def test_diffusers_itself_loads_the_merged_transformer(base, adapted, lora_path, tmp_path):
    from diffusers import WanTransformer3DModel

    merge_checkpoint(base, read_lora(lora_path), tmp_path / "out", "diffusers", scale=0.5)
    transformer, facts = WanTransformer3DModel.from_pretrained(tmp_path / "out/transformer", output_loading_info=True)
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]
    for module in adapted.modules():
        if hasattr(module, "lora_B"):
            module.scale = LORA.scale / 2
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, adapted.config.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(1, adapted.config.text_len, adapted.config.text_dim, generator=generator)
    with torch.no_grad():
        theirs = transformer(latent, torch.tensor([300.0]), text, return_dict=False)[0]
        ours = adapted(latent, torch.tensor([300.0]), torch.tensor([False]), text)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_sixteen_bits_round_once(dtype, error, base, lora_path, tmp_path):
    lora = read_lora(lora_path)
    merge_checkpoint(base, lora, tmp_path / "full")
    merge_checkpoint(base, lora, tmp_path / "half", dtype=dtype)
    full, half = (load_file(tmp_path / name / file_names(1)[0]) for name in ("full", "half"))
    assert {tensor.dtype for tensor in half.values()} == {dtype}
    assert (tmp_path / "half" / file_names(1)[0]).stat().st_size < 0.55 * base.stat().st_size
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.to(dtype)), name
        torch.testing.assert_close(half[name].float(), tensor, atol=1e-6, rtol=error)


def test_unmerge_gives_the_base_back(base, lora_path, tmp_path):
    lora = read_lora(lora_path)
    merge_checkpoint(base, lora, tmp_path / "merged", "diffusers", scale=0.7)
    unmerge_checkpoint(tmp_path / "merged", lora, tmp_path / "back")
    before, after = load_file(base), load_file(tmp_path / "back" / file_names(1)[0])
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)
    with safe_open(tmp_path / "back" / file_names(1)[0], "pt") as file:
        assert "wan_merged_loras" not in file.metadata()


def test_unmerge_insists_on_the_lora_that_was_merged(base, lora_path, tmp_path):
    lora = read_lora(lora_path)
    with pytest.raises(UserError, match="its header does not say"):
        unmerge_checkpoint(base, lora, tmp_path / "back")
    unmerge_checkpoint(base, lora, tmp_path / "back", unrecorded_scale=1.0)
    merge_checkpoint(tmp_path / "back", lora, tmp_path / "again")
    name = "blocks.0.ffn.0.weight"
    torch.testing.assert_close(load_file(tmp_path / "again" / file_names(1)[0])[name], load_file(base)[name])


def test_merge_refuses_what_does_not_fit(base, adapted, lora_path, tmp_path):
    lora = read_lora(lora_path)
    small = DiTConfig(**{**adapted.config.model_dump(), "num_layers": 1})
    save_dit(build_model(small, seed=0), tmp_path / "small.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\.\S+ adapts .*does not exist in .*small"):
        merge_checkpoint(tmp_path / "small.safetensors", lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base, lora, tmp_path / "out")
    with pytest.raises(UserError, match="holds weights already"):
        merge_checkpoint(base, lora, tmp_path / "out")
    huge = lora._replace(pairs={name: pair._replace(scale=1e9) for name, pair in lora.pairs.items()})
    with pytest.raises(UserError, match=r"blocks\.0\.\S+ is not finite as float16"):
        merge_checkpoint(base, huge, tmp_path / "huge", dtype=torch.float16)
    tensors = load_file(base)
    tensors.pop("head.modulation")
    save_file(tensors, tmp_path / "cut.safetensors", {"wan_dit_config": adapted.config.model_dump_json()})
    with pytest.raises(UserError, match=r"missing head\.modulation"):
        merge_checkpoint(tmp_path / "cut.safetensors", lora, tmp_path / "never")


def test_a_merge_cut_short_leaves_no_file_that_looks_whole(base, lora_path, tmp_path):
    lora = read_lora(lora_path)
    broken = lora._replace(
        pairs={**lora.pairs, "blocks.1.ffn.2": lora.pairs["blocks.1.ffn.2"]._replace(scale=math.inf)}
    )
    with pytest.raises(UserError, match="not finite"):
        merge_checkpoint(base, broken, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_many_shards_and_their_index_read_back(tiny_dit, tmp_path):
    weights = {name: weight.detach() for name, weight in tiny_dit.named_parameters()}
    shards = plan_shards({name: tuple(w.shape) for name, w in weights.items()}, "official", torch.float32, 200_000)
    assert len(shards) > 2
    tensors = ((spec, weights[spec.official]) for shard in shards for spec in shard)
    write_layout(tmp_path / "out", "official", shards, tiny_dit.config, tensors, {})
    assert max((tmp_path / "out" / name).stat().st_size for name in file_names(len(shards))) < 230_000
    again = _loaded(tmp_path / "out", read_dit_config(tmp_path / "out"))
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in weights.items())


def test_the_published_sizes_come_out_to_the_byte():
    """Wan-AI/Wan2.2-TI2V-5B at 921dbaf3: sizes as several public manifests give them."""
    model = build_model(TI2V_5B, device="meta")
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert len(shapes) == 825
    assert 4 * sum(math.prod(shape) for shape in shapes.values()) == 19_999_150_848
    shards = plan_shards(shapes, "official", torch.float32)
    sizes = [len(header_bytes(shard, {"format": "pt"})) + sum(spec.num_bytes for spec in shard) for shard in shards]
    assert sizes == [9_825_014_472, 9_995_661_736, 178_558_176]
    assert file_names(3)[1] == "diffusion_pytorch_model-00002-of-00003.safetensors"
    assert len(index_text(shards).encode()) == 72_865
    assert len(config_text(TI2V_5B, "official").encode()) == 251


@pytest.mark.filterwarnings("ignore")
def test_the_real_diffusers_model_has_the_same_keys_and_shapes():
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    values = json.loads(config_text(TI2V_5B, "diffusers"))
    with init_empty_weights():
        theirs = WanTransformer3DModel.from_config(values)
    model = build_model(TI2V_5B, device="meta")
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    ours = {spec.name: spec.shape for shard in plan_shards(shapes, "diffusers", torch.float32) for spec in shard}
    assert ours == {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}


_PEAK = f"""
import sys
from pathlib import Path
from train.lora.formats import read_lora
from train.lora.merge import merge_checkpoint
lora = read_lora(sys.argv[2])
import torch
before = {PEAK_KIB}
merge_checkpoint(Path(sys.argv[1]), lora, Path(sys.argv[3]), dtype=torch.bfloat16)
print(({PEAK_KIB} - before) * 1024)
"""


def test_merging_holds_a_few_tensors_and_not_the_model(tmp_path):
    config = DiTConfig(dim=768, num_heads=12, num_layers=12, ffn_dim=3072, text_dim=64)
    model = build_model(config, seed=0)
    save_dit(model, tmp_path / "base.safetensors")
    inject(model, LoRAConfig(rank=2, targets=("ffn",)), seed=0)
    save_file(name_tensors(raw_pairs(lora_state(model), LoRAConfig(rank=2))), tmp_path / "lora.safetensors")
    del model
    size = (tmp_path / "base.safetensors").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    largest = 3072 * 768 * 4
    assert size > 40 * largest
    assert int(run.stdout) < 12 * largest


def test_the_record_names_the_loras_digest(base, lora_path, tmp_path):
    merge_checkpoint(base, read_lora(lora_path), tmp_path / "out", scale=0.25)
    with safe_open(tmp_path / "out" / file_names(1)[0], "pt") as file:
        (record,) = json.loads(file.metadata()["wan_merged_loras"])
    assert record == {"sha256": hashlib.sha256(lora_path.read_bytes()).hexdigest(), "scale": 0.25}
    assert not (tmp_path / "out" / INDEX).exists()
