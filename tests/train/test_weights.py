"""DiT checkpoints in both layouts, by hand and by diffusers, with every key accounted for. Trap 11 (norm2 / norm3)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from train_runs import merge

from shards.errors import UserError
from train.config.model import DiTConfig, LoRAConfig
from train.lora.lora import inject, lora_modules
from train.model.dit import WanDiT, build_model
from train.model.load import INDEX, diffusers_key, find_tensors, load_dit, read_dit_config, recognise, save_dit


def official_folder(model: WanDiT, folder: Path, num_shards: int = 3) -> Path:
    """Write the official layout by hand: shards, index, config.json of the class WanModel."""
    folder.mkdir()
    names = list(model.state_dict())
    weight_map = {}
    for shard in range(num_shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: model.state_dict()[name].contiguous() for name in names[shard::num_shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    config = model.config
    official = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "ti2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }
    (folder / "config.json").write_text(json.dumps(official))
    return folder


def same(a: WanDiT, b: WanDiT) -> bool:
    """Equal weights, to the bit."""
    theirs = b.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in a.state_dict().items())


def test_official_shards_load(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """Three shards with an index; sizes from config.json and, for the text width, from the tensors."""
    folder = official_folder(tiny_dit, tmp_path / "official")
    assert read_dit_config(folder) == tiny_dit.config
    model = build_model(tiny_dit.config)
    load_dit(model, folder)
    assert same(model, tiny_dit)


@pytest.mark.parametrize("max_shard_size", ["10GB", "300KB"])
@pytest.mark.parametrize("whole", [True, False])
def test_diffusers_folders_load(
    tiny_dit: WanDiT, diffusers_twin: Callable[[Any], Any], tmp_path: Path, max_shard_size: str, whole: bool
) -> None:
    """What diffusers' save_pretrained writes, one file or many, as a pipeline's folder or its transformer/."""
    diffusers_twin(tiny_dit).save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size)
    sharded = (tmp_path / "transformer" / INDEX).exists()
    assert sharded == (max_shard_size == "300KB")
    path = tmp_path if whole else tmp_path / "transformer"
    config = read_dit_config(path)
    # The Diffusers config has no text_len; the model's own 512 is taken.
    assert config == tiny_dit.config.model_copy(update={"text_len": 512})
    model = build_model(tiny_dit.config)
    load_dit(model, path)
    assert same(model, tiny_dit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_weights_come_back(tiny_dit: WanDiT, tmp_path: Path, dtype: torch.dtype) -> None:
    """One file with official names that carries the model's sizes; islands stay fp32; a folder of it loads too."""
    model = build_model(tiny_dit.config, dtype)
    model.load_state_dict(tiny_dit.state_dict())
    save_dit(model, tmp_path / "model.safetensors", {"note": "random weights"})
    assert read_dit_config(tmp_path / "model.safetensors") == tiny_dit.config
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again = build_model(read_dit_config(path), dtype)
        load_dit(again, path)
        assert same(again, model)
    assert find_tensors(tmp_path).keys() == tiny_dit.state_dict().keys()


def test_a_lora_is_left_out_of_the_base_unless_merged(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """save_dit writes the model's own tensors; after merge they hold the LoRA."""
    inject(tiny_dit, LoRAConfig(rank=4), seed=1)
    with torch.no_grad():
        for module in lora_modules(tiny_dit).values():
            module.lora_B.fill_(0.01)
    latent, text = torch.randn(1, 8, 3, 4, 6), torch.randn(1, 12, 16)
    call = (latent, torch.tensor([500.0]), torch.tensor([True]), text)
    out = tiny_dit(*call)
    merge(tiny_dit)
    save_dit(tiny_dit, tmp_path / "model.safetensors")
    plain = build_model(tiny_dit.config)
    load_dit(plain, tmp_path)
    assert torch.allclose(plain(*call), out, atol=1e-5 * out.abs().max().item())


def test_loading_rounds_into_the_models_own_dtypes(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """The published files are fp32: linears are rounded once to bf16, islands are not."""
    save_dit(tiny_dit, tmp_path / "model.safetensors")
    model = build_model(tiny_dit.config, torch.bfloat16)
    load_dit(model, tmp_path)
    assert torch.equal(model.blocks[0].modulation, tiny_dit.blocks[0].modulation)
    assert torch.equal(model.blocks[0].ffn[0].weight, tiny_dit.blocks[0].ffn[0].weight.bfloat16())


MEASURE = """
import sys, torch
from pathlib import Path
from train.model.dit import build_model
from train.config.model import DiTConfig
from train.model.load import load_dit, read_dit_config

def peak_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
model = build_model(read_dit_config(folder), seed=0)  # its own pages are touched
before = peak_bytes()
load_dit(model, folder)
print(peak_bytes() - before, max(file.stat().st_size for file in folder.glob("*.safetensors")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_streams(tmp_path: Path) -> None:
    """Peak host memory beyond the model's own: at most 1.2 × the largest shard, of three."""
    config = DiTConfig(dim=512, num_heads=4, num_layers=3, ffn_dim=3072, text_len=16, text_dim=64)
    folder = official_folder(build_model(config, seed=0), tmp_path / "official")
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    extra, largest = map(int, run.stdout.split())
    assert largest > 20e6
    assert extra < 1.2 * largest


def spoiled(tiny_dit: WanDiT, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None]) -> Path:
    """A single file with one thing wrong."""
    tensors = {name: weight.clone() for name, weight in tiny_dit.state_dict().items()}
    spoil(tensors)
    save_file(tensors, tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("blocks.1.norm3.bias"), r"missing blocks\.1\.norm3\.bias"),
        (lambda t: t.update({"blocks.9.norm3.bias": torch.zeros(96)}), r"unexpected blocks\.9\.norm3\.bias in dit\.s"),
        (
            lambda t: t.update({"head.head.bias": torch.zeros(7)}),
            r"head\.head\.bias in dit\.s.* is \(7,\), not \(32,\)",
        ),
    ],
)
def test_every_wrong_key_is_named_and_nothing_is_copied(
    tiny_dit: WanDiT, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    """Missing, unexpected, wrongly shaped: the key and its file; the model stays as it was."""
    path = spoiled(tiny_dit, tmp_path, spoil)
    model = build_model(tiny_dit.config, seed=9)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_dit(model, path)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_shard_that_is_missing_or_cut_is_named(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """A download that stopped half-way."""
    folder = official_folder(tiny_dit, tmp_path / "official")
    second = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"00002-of-00003\.safetensors: not a complete safetensors file"):
        load_dit(build_model(tiny_dit.config), folder)
    second.unlink()
    with pytest.raises(UserError, match=r"1 of 3 files are missing \(diffusion_pytorch_model-00002"):
        load_dit(build_model(tiny_dit.config), folder)


def test_an_index_of_another_revision_is_refused(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """A tensor in a shard that the index does not place there, or nowhere."""
    folder = official_folder(tiny_dit, tmp_path / "official")
    index = json.loads((folder / INDEX).read_text())
    moved = index["weight_map"].pop("patch_embedding.weight")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="which the index places in nowhere"):
        load_dit(build_model(tiny_dit.config), folder)
    index["weight_map"] |= {"patch_embedding.weight": moved, "blocks.7.modulation": moved}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"blocks\.7\.modulation .* does not hold it"):
        load_dit(build_model(tiny_dit.config), folder)


def test_an_index_cannot_reach_outside_its_folder(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """A file name in the index is a name, not a path."""
    folder = official_folder(tiny_dit, tmp_path / "official", num_shards=1)
    index = {"weight_map": dict.fromkeys(tiny_dit.state_dict(), "../../outside.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside"):
        load_dit(build_model(tiny_dit.config), folder)


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_path_without_a_checkpoint_says_what_was_expected(tiny_dit: WanDiT, tmp_path: Path, name: str) -> None:
    """A wrong path is the commonest mistake."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no DiT checkpoint here"):
        load_dit(build_model(tiny_dit.config), tmp_path / name)


def test_a_bare_file_of_unknown_sizes_is_refused(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """The number of heads is in no tensor: without a config the sizes are not guessed."""
    path = spoiled(tiny_dit, tmp_path, lambda tensors: None)
    with pytest.raises(UserError, match=r"no config\.json beside the weights"):
        read_dit_config(path)
    (tmp_path / "config.json").write_text('{"dim": 96}')
    with pytest.raises(UserError, match="lacks 'num_heads'"):
        read_dit_config(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_dit_config(path)


@pytest.mark.parametrize(
    ("dim", "channels", "name"),
    [(5120, 16, "A14B"), (1536, 16, "Wan2.1-T2V-1.3B"), (3072, 48, "TI2V-5B"), (96, 8, None)],
)
def test_other_wan_models_are_recognised(dim: int, channels: int, name: str | None) -> None:
    """By the patch embedding alone, in either naming."""
    found = recognise({"patch_embedding.weight": (Path("x"), (dim, channels, 1, 2, 2))})
    assert found is None if name is None else name in (found or "")


def test_another_model_is_refused_by_name(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """Wan2.1's 1.3B where the config says otherwise: recognised before its 600 wrong keys are listed."""
    tensors = {name: weight.clone() for name, weight in tiny_dit.state_dict().items()}
    tensors["patch_embedding.weight"] = torch.zeros(1536, 16, 1, 2, 2)
    save_file(tensors, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match=r"this looks like Wan2\.1-T2V-1\.3B"):
        load_dit(build_model(tiny_dit.config), tmp_path / "dit.safetensors")


def test_norm3_is_the_norm_before_cross_attention(tiny_dit: WanDiT) -> None:
    """Trap 11: Diffusers' norm2 is the official norm3; its norm3, like its norm1, has no parameters."""
    assert diffusers_key("blocks.0.norm3.weight") == "blocks.0.norm2.weight"
    assert not [name for name in map(diffusers_key, tiny_dit.state_dict()) if ".norm3." in name or ".norm1." in name]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 100, "num_heads": 3}, "does not divide"),
        ({"dim": 96, "num_heads": 32}, "rotary positions"),
        ({"patch": (2, 2, 2)}, "first latent frame"),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes: dict[str, Any], message: str) -> None:
    """Before anything is built."""
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{"dim": 96, "num_heads": 4, "num_layers": 1, "ffn_dim": 96, **sizes})


def test_another_wan_is_refused_by_name_though_its_own_config_fits_it(tmp_path: Path) -> None:
    """Without model.dims the sizes come from the checkpoint, so nothing else would notice."""
    save_file({"patch_embedding.weight": torch.zeros(5120, 16, 1, 2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"this is Wan2\.1-T2V-14B or Wan2\.2-T2V-A14B"):
        read_dit_config(tmp_path)
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(UserError, match=r"this is Wan2\.2-A14B"):
        read_dit_config(tmp_path)
