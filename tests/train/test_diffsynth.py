"""An exported LoRA in DiffSynth-Studio's own loader and model. Long: fetches the package, which nothing else needs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from train.config.model import DiTConfig, LoRAConfig
from train.lora.formats import name_tensors, raw_pairs, read_lora
from train.lora.lora import inject, lora_modules, lora_state
from train.model.dit import build_model

PACKAGES = ("diffsynth==2.1.12", "einops==0.8.1")
# A head of 128 channels, because DiffSynth-Studio splits rotary channels by its own rule.
DIMS = DiTConfig(dim=256, num_heads=2, num_layers=2, ffn_dim=128, text_len=16, text_dim=32, freq_dim=32)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=("self_attn", "cross_attn", "ffn"))

# Runs in a process of its own, on the package's real files. Its parent packages are not run: they import torchvision,
# modelscope and every other model of the studio.
_SCRIPT = """
import importlib, json, sys, types
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
site, folder = Path(sys.argv[1]), Path(sys.argv[2])
for name in ("diffsynth", "diffsynth.core", "diffsynth.models", "diffsynth.utils", "diffsynth.utils.lora"):
    package = types.ModuleType(name)
    package.__path__ = [str(site.joinpath(*name.split(".")))]
    sys.modules[name] = package
loader = importlib.import_module("diffsynth.utils.lora.general").GeneralLoRALoader()
WanModel = importlib.import_module("diffsynth.models.wan_video_dit").WanModel
dims = json.loads((folder / "dims.json").read_text())
model = WanModel(
    dim=dims["dim"], in_dim=48, ffn_dim=dims["ffn_dim"], out_dim=48, text_dim=dims["text_dim"],
    freq_dim=dims["freq_dim"], eps=1e-6, patch_size=(1, 2, 2), num_heads=dims["num_heads"],
    num_layers=dims["num_layers"], has_image_input=False,
).eval()
model.load_state_dict(load_file(folder / "base.safetensors"), strict=True)
# Its pipeline cuts what patchify gives into tokens outside of the model; WanModel.forward expects it done.
cut = WanModel.patchify
model.patchify = lambda x: (cut(model, x).flatten(2).transpose(1, 2), (x.shape[2], x.shape[3] // 2, x.shape[4] // 2))
inputs = load_file(folder / "inputs.safetensors")
out = {}
with torch.no_grad():
    out["without"] = model(inputs["latent"], inputs["timestep"], inputs["text"]).contiguous()
    loader.fuse_lora_to_base_model(model, load_file(folder / "lora.safetensors"), alpha=0.5)
    out["half"] = model(inputs["latent"], inputs["timestep"], inputs["text"]).contiguous()
    loader.fuse_lora_to_base_model(model, load_file(folder / "lora.safetensors"), alpha=0.5)
    out["whole"] = model(inputs["latent"], inputs["timestep"], inputs["text"]).contiguous()
save_file(out, folder / "out.safetensors")
"""


@pytest.fixture(scope="module")
def diffsynth_site(tmp_path_factory):
    """A folder with the real package in it."""
    site = tmp_path_factory.mktemp("diffsynth")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=200)
    if done.returncode:
        pytest.skip(f"pip could not fetch {PACKAGES[0]}: {done.stderr.strip()[-200:]}")
    return site


@pytest.mark.slow
def test_diffsynths_own_loader_fuses_every_module_at_the_right_scale(diffsynth_site, tmp_path):
    from safetensors.torch import load_file

    model = build_model(DIMS, seed=1)
    save_file(
        {name: weight.detach().clone() for name, weight in model.named_parameters()}, tmp_path / "base.safetensors"
    )
    inject(model, LORA, seed=2)
    with torch.no_grad():
        for place, (name, tensor) in enumerate(lora_state(model).items()):
            if "lora_B" in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(place))
    save_file(name_tensors(raw_pairs(lora_state(model), LORA)), tmp_path / "lora.safetensors")
    generator = torch.Generator().manual_seed(9)
    inputs = {
        "latent": torch.randn(1, 48, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, 16, 32, generator=generator),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    (tmp_path / "dims.json").write_text(json.dumps(DIMS.model_dump()))
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(diffsynth_site), str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(diffsynth_site), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    num_modules = len(read_lora(tmp_path / "lora.safetensors").pairs)
    assert num_modules == 20
    assert run.stdout.count(f"{num_modules} tensors are fused by LoRA") == 2  # none is quietly left out
    theirs = load_file(tmp_path / "out.safetensors")
    model.eval()
    for name, strength in (("without", 0.0), ("half", 0.5), ("whole", 1.0)):
        for module in lora_modules(model).values():
            module.scale = LORA.scale * strength
        with torch.no_grad():
            ours = model(inputs["latent"], inputs["timestep"], torch.tensor([False]), inputs["text"])
        torch.testing.assert_close(theirs[name], ours, atol=2e-4, rtol=2e-4)
    assert (theirs["whole"] - theirs["without"]).abs().max() > 0.05
