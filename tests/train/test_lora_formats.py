"""LoRA files of other tools: their naming as tables, the real loaders where they are installed, one meaning in all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.config import validate_config
from shards.console import LOG
from shards.errors import UserError
from train.config.model import DiTConfig, LoRAConfig
from train.lora.export import export_lora, locate_lora
from train.lora.formats import EXPORT_FORMATS, name_tensors, raw_pairs, read_lora, refuse_other_model
from train.lora.info import describe_lora
from train.lora.load import load
from train.lora.lora import attach_lora, inject, lora_state
from train.lora.targets import describe_targets, match_targets
from train.model.dit import build_model

TINY = DiTConfig(dim=48, num_heads=2, num_layers=2, ffn_dim=96, in_channels=48, text_dim=16, text_len=8, freq_dim=16)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=("self_attn", "cross_attn", "ffn"))  # true scale 2

# One row a tool: key of A, of B, of alpha, for the official linear blocks.1.self_attn.q, with a true scale of 2.
# ComfyUI: comfy/lora.py model_lora_keys_unet, comfy/weight_adapter/lora.py. musubi-tuner: networks/lora_wan.py.
# DiffSynth-Studio: diffusion/training_module.py (export_trainable_state_dict). diffusers: loaders/lora_pipeline.py.
KEY_TABLE = {
    "comfyui": (
        "diffusion_model.blocks.1.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.1.self_attn.q.lora_B.weight",
        "diffusion_model.blocks.1.self_attn.q.alpha",
    ),
    "comfyui, lora_down": (
        "diffusion_model.blocks.1.self_attn.q.lora_down.weight",
        "diffusion_model.blocks.1.self_attn.q.lora_up.weight",
        "diffusion_model.blocks.1.self_attn.q.alpha",
    ),
    "musubi": (
        "lora_unet_blocks_1_self_attn_q.lora_down.weight",
        "lora_unet_blocks_1_self_attn_q.lora_up.weight",
        "lora_unet_blocks_1_self_attn_q.alpha",
    ),
    "videox": (
        "lora_unet__blocks_1_self_attn_q.lora_down.weight",
        "lora_unet__blocks_1_self_attn_q.lora_up.weight",
        "lora_unet__blocks_1_self_attn_q.alpha",
    ),
    "diffusers": (
        "transformer.blocks.1.attn1.to_q.lora_A.weight",
        "transformer.blocks.1.attn1.to_q.lora_B.weight",
        None,
    ),
    "diffsynth": (
        "blocks.1.self_attn.q.lora_A.default.weight",
        "blocks.1.self_attn.q.lora_B.default.weight",
        None,
    ),
    "diffsynth, pipe.dit": (
        "pipe.dit.blocks.1.self_attn.q.lora_A.default.weight",
        "pipe.dit.blocks.1.self_attn.q.lora_B.default.weight",
        None,
    ),
    "diffusers, save_lora_adapter": (
        "blocks.1.attn1.to_q.lora_A.weight",
        "blocks.1.attn1.to_q.lora_B.weight",
        None,
    ),
    "bare": (
        "blocks.1.self_attn.q.lora_A.weight",
        "blocks.1.self_attn.q.lora_B.weight",
        None,
    ),
    "peft": (
        "base_model.model.blocks.1.self_attn.q.lora_A.weight",
        "base_model.model.blocks.1.self_attn.q.lora_B.weight",
        None,
    ),
}
ALL_LINEARS = {
    "self_attn.q": ("attn1.to_q", "self_attn_q"),
    "self_attn.k": ("attn1.to_k", "self_attn_k"),
    "self_attn.v": ("attn1.to_v", "self_attn_v"),
    "self_attn.o": ("attn1.to_out.0", "self_attn_o"),
    "cross_attn.q": ("attn2.to_q", "cross_attn_q"),
    "cross_attn.k": ("attn2.to_k", "cross_attn_k"),
    "cross_attn.v": ("attn2.to_v", "cross_attn_v"),
    "cross_attn.o": ("attn2.to_out.0", "cross_attn_o"),
    "ffn.0": ("ffn.net.0.proj", "ffn_0"),
    "ffn.2": ("ffn.net.2", "ffn_2"),
}


@pytest.fixture(scope="module")
def trained():
    """A small model with a LoRA whose B is not zero, and its raw state."""
    model = build_model(TINY, seed=1)
    inject(model, LORA, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in lora_state(model).items():
            if ".lora_B." in name:
                tensor.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture
def exported(trained, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(name_tensors(raw_pairs(lora_state(trained), LORA)), path)
    return path


def _pairs(model):
    """The model's own pairs, their scale of 2 not folded in."""
    return raw_pairs(lora_state(model), LORA)


def _updates(lora):
    return {module: pair.scale * pair.up_Or.float() @ pair.down_rI.float() for module, pair in lora.pairs.items()}


def _assert_same_updates(lora, model):
    state = lora_state(model)
    updates = _updates(lora)
    assert len(updates) == len(state) // 2
    for module, update in updates.items():
        truth = LORA.scale * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
        torch.testing.assert_close(update, truth, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tool", KEY_TABLE)
def test_one_pair_of_each_tool_means_the_same(tool, tmp_path):
    key_a, key_b, key_alpha = KEY_TABLE[tool]
    down, up = torch.randn(4, 48), torch.randn(48, 4)
    tensors, metadata = {key_a: down, key_b: up}, {}
    if key_alpha:
        tensors[key_alpha] = torch.tensor(8.0)
    elif tool.startswith("diffusers"):
        prefix = "" if "adapter" in tool else "transformer."
        metadata["lora_adapter_metadata"] = json.dumps({f"{prefix}r": 4, f"{prefix}lora_alpha": 8})
    elif tool == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": False}))
    else:
        tensors[key_b] = 2 * up  # no alpha: the scale is 1
    save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
    lora = read_lora(tmp_path / "lora.safetensors")
    assert lora.format == tool.split(",")[0]
    assert list(lora.pairs) == ["blocks.1.self_attn.q"]
    torch.testing.assert_close(_updates(lora)["blocks.1.self_attn.q"], 2 * up @ down)


@pytest.mark.parametrize("tool", EXPORT_FORMATS)
def test_every_linear_has_the_tools_own_name_and_reads_back(tool, trained, tmp_path):
    tensors = name_tensors(_pairs(trained), tool, torch.float32)
    stems = {
        "comfyui": lambda n, ours: f"diffusion_model.blocks.{n}.{ours}.lora_A.weight",
        "musubi": lambda n, ours: f"lora_unet_blocks_{n}_{ALL_LINEARS[ours][1]}.lora_down.weight",
        "videox": lambda n, ours: f"lora_unet__blocks_{n}_{ALL_LINEARS[ours][1]}.lora_down.weight",
        "diffusers": lambda n, ours: f"transformer.blocks.{n}.{ALL_LINEARS[ours][0]}.lora_A.weight",
        "diffsynth": lambda n, ours: f"blocks.{n}.{ours}.lora_A.default.weight",
    }[tool]
    assert {stems(n, ours) for n in range(2) for ours in ALL_LINEARS} <= tensors.keys()
    assert len(tensors) == 20 * (3 if tool in ("comfyui", "musubi", "videox") else 2)
    save_file(tensors, tmp_path / "again.safetensors")
    _assert_same_updates(read_lora(tmp_path / "again.safetensors"), trained)


def test_the_scale_is_folded_into_b_and_alpha_is_the_rank(trained, exported):
    tensors = load_file(exported)
    state = lora_state(trained)
    name = "blocks.0.ffn.2"
    assert tensors[f"diffusion_model.{name}.alpha"].item() == 4
    torch.testing.assert_close(tensors[f"diffusion_model.{name}.lora_B.weight"], 2 * state[f"{name}.lora_B.weight"])
    torch.testing.assert_close(tensors[f"diffusion_model.{name}.lora_A.weight"], state[f"{name}.lora_A.weight"])


def _diffusers_pipe(model, tmp_path):
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    from train.model.load import diffusers_key

    transformer = WanTransformer3DModel(
        num_attention_heads=TINY.num_heads, attention_head_dim=TINY.head_dim, in_channels=48, out_channels=48,
        text_dim=TINY.text_dim, freq_dim=TINY.freq_dim, ffn_dim=TINY.ffn_dim, num_layers=TINY.num_layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6,
    )  # fmt: skip
    base = {name: w for name, w in model.state_dict().items() if ".lora_" not in name}
    transformer.load_state_dict({diffusers_key(name): weight for name, weight in base.items()})
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(), transformer=transformer
    )


def _inputs():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 48, 2, 4, 4, generator=generator), torch.randn(1, 8, 16, generator=generator)


def _ours(model, scale=1.0):
    latent, text = _inputs()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.scale = LORA.scale * scale
        return model(latent, torch.tensor([500.0]), torch.tensor([False]), text)


def _theirs(transformer):
    latent, text = _inputs()
    with torch.no_grad():
        return transformer(latent, torch.tensor([500.0]), text, return_dict=False)[0]


@pytest.mark.filterwarnings("ignore")  # the libraries' own, on loading
@pytest.mark.parametrize("tool", ["comfyui", "musubi", "diffusers"])
def test_diffusers_own_loader_gives_our_numbers(tool, trained, tmp_path):
    pipe = _diffusers_pipe(trained, tmp_path)
    without = _theirs(pipe.transformer)
    torch.testing.assert_close(without, _ours(trained, 0.0), atol=1e-4, rtol=1e-4)
    path = tmp_path / f"{tool}.safetensors"
    save_file(name_tensors(_pairs(trained), tool, torch.float32), path)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="mbc")
    assert (_theirs(pipe.transformer) - without).abs().max() > 0.01
    for scale in (0.0, 0.5, 1.0):
        pipe.set_adapters("mbc", scale)
        torch.testing.assert_close(_theirs(pipe.transformer), _ours(trained, scale), atol=1e-4, rtol=1e-4)
    _ours(trained, 1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("root", [False, True])
def test_a_lora_saved_by_diffusers_itself_is_read_at_its_scale(root, trained, tmp_path):
    from diffusers import WanPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = _diffusers_pipe(trained, tmp_path)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=root, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    with torch.no_grad():  # peft starts at a scale at which nothing could be told apart
        for name, weight in pipe.transformer.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.format == "diffusers"
    assert {pair.scale for pair in lora.pairs.values()} == {6 / 2 if root else 6 / 4}
    fresh = build_model(TINY, seed=1)
    inject(fresh, LORA, seed=9)
    attach_lora(fresh, lora)
    torch.testing.assert_close(_ours(fresh.eval()), _theirs(pipe.transformer), atol=1e-4, rtol=1e-4)


def _videox_save_weights(model, alpha, path):
    """VideoX-Fun's `LoRANetwork.save_weights`: prefix + "." + name of the root ("") + "." + child, dots to underscores;
    alpha is a buffer beside the two linears, and two hashes go into the header."""
    tensors = {}
    for module, pair in _pairs(model).items():
        name = ".".join(("lora_unet", "", module)).replace(".", "_")
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        tensors[f"{name}.lora_down.weight"] = pair.down_rI.detach().clone()
        tensors[f"{name}.lora_up.weight"] = pair.up_Or.detach().clone()
    save_file(tensors, path, metadata={"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8})


def test_a_file_by_the_rules_of_videox_funs_saver_is_read_and_its_hashes_stay_behind(trained, tmp_path):
    _videox_save_weights(trained, 8.0, tmp_path / "videox.safetensors")
    assert "lora_unet__blocks_0_self_attn_q.alpha" in load_file(tmp_path / "videox.safetensors")
    lora = read_lora(tmp_path / "videox.safetensors")
    assert lora.format == "videox"
    _assert_same_updates(lora, trained)
    header = export_lora(tmp_path / "videox.safetensors", tmp_path / "out.safetensors", "comfyui", torch.float32)
    assert header == {}
    _assert_same_updates(read_lora(tmp_path / "out.safetensors"), trained)


@pytest.mark.parametrize("to", ["default", "other"])
def test_musubis_converter_reads_and_writes_what_we_do(to, trained, tmp_path):
    """convert_lora.py's two directions, by its rules; `--target other` takes nothing of our file, as its docs say."""
    prefix, tensors = "lora_unet_", {}
    if to == "default":  # from ComfyUI's names to musubi's own; alpha becomes the rank
        for key, weight in name_tensors(_pairs(trained)).items():
            name = (prefix + key.split(".", 1)[1]).replace(".", "_")
            name = name.replace("_lora_A_", ".lora_down.").replace("_lora_B_", ".lora_up.")
            if not name.endswith("_alpha"):
                tensors[name] = weight
            if ".lora_down." in name:
                tensors[name.split(".")[0] + ".alpha"] = torch.tensor(float(weight.shape[0]))
    else:  # from musubi's own: half of the scale goes into each matrix
        ours = name_tensors(_pairs(trained), "musubi")
        for key in [key for key in ours if "lora_down" in key]:
            module = key.split(".")[0].removeprefix(prefix).replace("_", ".")
            module = module.replace("cross.attn", "cross_attn").replace("self.attn", "self_attn")
            half = (ours[key.split(".")[0] + ".alpha"] / ours[key].shape[0]).sqrt()
            tensors[f"diffusion_model.{module}.lora_A.weight"] = ours[key] * half
            tensors[f"diffusion_model.{module}.lora_B.weight"] = ours[key.replace("down", "up")] * half
        assert not [key for key in name_tensors(_pairs(trained)) if key.startswith(prefix)]
    save_file(tensors, tmp_path / "musubi.safetensors")
    lora = read_lora(tmp_path / "musubi.safetensors")
    assert lora.format == ("musubi" if to == "default" else "comfyui")
    _assert_same_updates(lora, trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saver", ["save_lora_adapter", "peft"])
def test_a_models_own_saver_and_pefts_folder_are_read_at_their_scale(saver, trained, tmp_path):
    from peft import LoraConfig, get_peft_model

    from train.model.load import diffusers_key

    transformer = _diffusers_pipe(trained, tmp_path).transformer
    without = _theirs(transformer)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    if saver == "peft":
        wrapped = get_peft_model(transformer, config)
        wrapped.save_pretrained(tmp_path / "adapter")
    else:
        transformer.add_adapter(config)
        transformer.save_lora_adapter(tmp_path / "adapter")
    file = locate_lora(tmp_path / "adapter")[0]
    lora = read_lora(file)
    assert lora.format == ("peft" if saver == "peft" else "diffusers")
    assert {pair.scale for pair in lora.pairs.values()} == {1.5}
    theirs = dict(transformer.named_modules())
    for module, update in _updates(lora).items():
        layer = theirs[diffusers_key(module + ".").removesuffix(".")]
        truth = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(update, truth, atol=1e-6, rtol=1e-6)
    fresh = build_model(TINY, seed=1)
    load(fresh.eval(), tmp_path / "adapter")
    assert (_theirs(transformer) - without).abs().max() > 0.01
    torch.testing.assert_close(
        fresh(_inputs()[0], torch.tensor([500.0]), torch.tensor([False]), _inputs()[1]),
        _theirs(transformer), atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_bare_names_are_read_at_scale_one_and_that_is_said(trained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(LOG, "propagate", True)  # a command that was called in this process may have set it
    tensors = {key: tensor.clone() for key, tensor in lora_state(trained).items()}
    save_file(tensors, tmp_path / "bare.safetensors")
    with caplog.at_level("WARNING", logger="wan"):
        lora = read_lora(tmp_path / "bare.safetensors")
    assert "scale 1 is assumed" in caplog.text
    assert lora.scale_from == "assumed: nothing gives an alpha"
    assert {pair.scale for pair in lora.pairs.values()} == {1.0}


NAMES = [f"blocks.{n}.{linear}" for n in range(2) for linear in ALL_LINEARS]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("q,k,v,o,ffn.0,ffn.2", ["self_attn", "cross_attn", "ffn"]),  # DiffSynth-Studio, VideoX-Fun
        (["to_q", "to_k", "to_v", "to_out.0"], ["self_attn", "cross_attn"]),  # diffusers, peft
        (["attn1", "net.0.proj"], ["self_attn", "ffn.0"]),
        (["blocks.1.self_attn.q", "ffn.2"], ["ffn.2", "blocks.1.self_attn.q"]),
    ],
)
def test_targets_as_peers_write_them(theirs, ours):
    targets = validate_config(LoRAConfig, {"targets": theirs}, origin="test").targets
    chosen = match_targets(NAMES, targets)
    assert describe_targets(NAMES, chosen) == ours
    assert match_targets(NAMES, tuple(ours)) == chosen


@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_training_continues_from_a_file_at_any_alpha(alpha, trained, exported):
    """What the model computes after loading is what the file means, whatever lora.alpha of the new run is."""
    config = LORA.model_copy(update={"alpha": alpha})
    model = build_model(TINY, seed=1)
    inject(model, config, seed=9)
    load(model, exported)
    latent, text = _inputs()
    with torch.no_grad():
        again = model.eval()(latent, torch.tensor([500.0]), torch.tensor([False]), text)
    torch.testing.assert_close(again, _ours(trained), atol=1e-5, rtol=1e-5)


def test_info_tells_rank_alpha_targets_norms_and_tool(trained, exported):
    info = describe_lora(read_lora(exported))
    assert (info["ranks"], info["alphas"], info["scales"]) == ([4], [4.0], [1.0])
    assert info["num_modules"] == 20
    assert info["blocks"] == "0–1 (2)"
    assert info["model"] == "a model of width 48"
    assert info["zero_modules"] == info["not_finite_modules"] == []
    state = lora_state(trained)
    norms = [
        (2 * state[f"blocks.{n}.ffn.0.lora_B.weight"] @ state[f"blocks.{n}.ffn.0.lora_A.weight"]).norm().item()
        for n in range(2)
    ]
    assert info["update_norms"]["ffn.0"] == pytest.approx({"mean": sum(norms) / 2, "max": max(norms)}, rel=1e-4)


def test_info_shows_untrained_and_broken_modules(tmp_path):
    pairs = {f"diffusion_model.blocks.{n}.ffn.0.lora_A.weight": torch.ones(2, 3072) for n in range(2)}
    ups = {f"diffusion_model.blocks.{n}.ffn.0.lora_B.weight": torch.zeros(14336, 2) for n in range(2)}
    ups["diffusion_model.blocks.1.ffn.0.lora_B.weight"][5, 1] = float("nan")
    save_file({**pairs, **ups}, tmp_path / "l.safetensors", metadata={"ss_network_module": "networks.lora_wan"})
    info = describe_lora(read_lora(tmp_path / "l.safetensors"))
    assert info["zero_modules"] == ["blocks.0.ffn.0"]
    assert info["not_finite_modules"] == ["blocks.1.ffn.0"]
    assert info["model"] == "Wan2.2-TI2V-5B"
    assert info["written_by"] == "musubi-tuner or sd-scripts (networks.lora_wan)"


def _bad(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(UserError) as caught:
        read_lora(tmp_path / "bad.safetensors")
    return str(caught.value)


def test_bad_files_name_file_and_key(tmp_path):
    down, up = torch.zeros(2, 48), torch.zeros(48, 2)
    stem = "diffusion_model.blocks.0.self_attn.q"
    assert "B (lora_up) is missing" in _bad(tmp_path, {f"{stem}.lora_A.weight": down})
    assert "A (lora_down) is missing" in _bad(tmp_path, {f"{stem}.alpha": torch.tensor(1.0)})
    text = _bad(tmp_path, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": torch.zeros(48, 3)})
    assert "A is (2, 48) and B (48, 3)" in text
    text = _bad(tmp_path, {f"{stem}.lora_A.weight": down, f"{stem}.dora_scale": up})
    assert f"{stem}.dora_scale: not a part of a plain LoRA" in text
    text = _bad(tmp_path, {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": down})
    assert "an image-to-video module of Wan2.1" in text
    text = _bad(tmp_path, {f"{stem}.lora_A.weight": down, "lora_unet_blocks_0_ffn_0.lora_down.weight": down.clone()})
    assert "names of several tools" in text
    assert "no LoRA naming that is known" in _bad(tmp_path, {"down_blocks.0.weight": down})
    peft = "base_model.model.blocks.0.ffn.0"
    text = _bad(tmp_path, {f"{peft}.lora_A.weight": down, f"{peft}.lora_B.weight": up})
    assert "the scale cannot be known" in text
    assert "adapter_config.json" in text
    bare = {"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}
    assert "not JSON" in _bad(tmp_path, bare, {"lora_adapter_metadata": "{"})
    assert "no lora_alpha" in _bad(tmp_path, bare, {"lora_adapter_metadata": '{"r": 2}'})
    text = _bad(tmp_path, {}, {"format": "pt"})
    assert "holds no tensors" in text
    pair = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    for alpha, shown in ((torch.ones(2), "[1.0, 1.0]"), (torch.tensor(torch.nan), "nan")):
        assert f"{stem}.alpha: {shown}" in _bad(tmp_path, pair | {f"{stem}.alpha": alpha})
    text = _bad(tmp_path, {f"{stem}.lora_A.weight": down[:0], f"{stem}.lora_B.weight": up[:, :0]})
    assert "A is (0, 48) and B (48, 0)" in text
    text = _bad(tmp_path, pair | {f"{stem}.lora_A.weight": down.to(torch.int8)})
    assert f"{stem}.lora_A.weight: numbers of int8" in text
    text = _bad(tmp_path, pair | {f"{stem}.lora_down.weight": down.clone()})
    assert "a second tensor for the same matrix of blocks.0.self_attn.q" in text


def test_a_truncated_file_and_a_missing_one(exported, tmp_path):
    exported.write_bytes(exported.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        read_lora(exported)
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "nowhere.safetensors")


def test_another_rank_or_model_is_refused_with_the_fix(exported):
    lora = read_lora(exported)
    for change, words in (
        ({"rank": 8}, r"rank 4, lora\.rank is 8"),
        ({"targets": ("q",)}, r"0 modules are missing, 16 are unexpected \(blocks\.0\.cross_attn\.k, …\)"),
    ):
        model = build_model(TINY, seed=1)
        inject(model, LORA.model_copy(update=change), seed=9)
        before = {name: tensor.clone() for name, tensor in lora_state(model).items()}
        with pytest.raises(UserError, match=words) as caught:
            attach_lora(model, lora)
        assert caught.value.fix == "lora.rank=4 'lora.targets=[self_attn, cross_attn, ffn]'"
        assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state(model).items())
    sizes = {module: (pair.up_Or.shape[0], pair.down_rI.shape[1]) for module, pair in lora.pairs.items()}
    refuse_other_model(lora, sizes, "this model")
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.2 .*does not exist in this model"):
        refuse_other_model(lora, {k: v for k, v in sizes.items() if k != "blocks.1.ffn.2"}, "this model")
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0 adapts a 96 × 48 linear, which is 96 × 64"):
        refuse_other_model(lora, {**sizes, "blocks.0.ffn.0": (96, 64)}, "this model")


def test_a_runs_raw_checkpoint_takes_its_scale_from_the_run(trained, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-0000010"
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in lora_state(trained).items()}, folder / "lora.safetensors")
    (tmp_path / "run" / "config.yaml").write_text("lora: {rank: 4, alpha: 8.0, targets: [ffn]}\n")
    lora = read_lora(folder / "lora.safetensors")
    assert lora.format == "run"
    _assert_same_updates(lora, trained)
