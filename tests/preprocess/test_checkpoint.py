"""The encoders from both layouts: every key, equal weights, other models by name, memory, damage."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peak import PEAK_KIB
from safetensors.torch import load_file, save_file
from small_checkpoint import TEXT_TABLE, VAE_TABLE

from preprocess.encoders.load import OFFICIAL_TEXT, OFFICIAL_VAE, load_umt5, load_umt5_tokenizer, load_vae
from preprocess.encoders.random_weights import (
    build_random_text_encoder,
    build_random_vae,
    load_tokenizer_model,
    train_tokenizer_model,
)
from preprocess.encoders.vae_config import vae_arguments
from preprocess.encoders.weight_names import rename_text, rename_vae
from shards.errors import UserError


@pytest.fixture(scope="module")
def vae():
    return build_random_vae(0).eval()


@pytest.fixture(scope="module")
def text():
    return build_random_text_encoder(0, 300).eval()


def _official_vae(vae):
    state = vae.state_dict()
    return {official: state[theirs].clone() for official, theirs, _ in VAE_TABLE}


def _official_text(text):
    state = text.state_dict()
    return {official: state[theirs].clone() for official, theirs in TEXT_TABLE.items() if theirs in state}


@pytest.fixture
def official(vae, text, tmp_path):
    folder = tmp_path / "official"
    load_tokenizer_model(train_tokenizer_model()).save_pretrained(folder / "google/umt5-xxl")
    torch.save(_official_vae(vae), folder / OFFICIAL_VAE)
    torch.save(_official_text(text), folder / OFFICIAL_TEXT)
    return folder


@pytest.fixture
def diffusers_folder(vae, text, tmp_path):
    folder = tmp_path / "diffusers"
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder", max_shard_size="50KB")
    load_tokenizer_model(train_tokenizer_model()).save_pretrained(folder / "tokenizer")
    return folder


def test_the_map_covers_all_196_official_vae_names_and_is_bijective():
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs = {name: list(tensor.shape) for name, tensor in AutoencoderKLWan(**vae_arguments()).state_dict().items()}
    assert len(VAE_TABLE) == len(theirs) == 196
    assert {rename_vae(official): shape for official, _, shape in VAE_TABLE} == theirs
    assert [rename_vae(official) for official, _, _ in VAE_TABLE] == [name for _, name, _ in VAE_TABLE]
    assert rename_vae("decoder.something.weight") is None


def test_the_map_covers_all_242_official_text_names_and_is_bijective():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    names = set(model.state_dict()) - {"encoder.embed_tokens.weight"}
    assert {rename_text(official) for official in TEXT_TABLE} == names == set(TEXT_TABLE.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336


def test_both_layouts_give_the_same_vae_to_the_bit(official, diffusers_folder, vae):
    frames = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        truth = vae.encode(frames).latent_dist.mode()
        for folder in (official, diffusers_folder):
            whole = load_vae(folder, decoder=True)
            assert torch.equal(whole.encode(frames).latent_dist.mode(), truth)
            assert torch.equal(whole.decode(truth).sample, vae.decode(truth).sample)
            half = load_vae(folder)
            assert half.decoder is None
            assert torch.equal(half.encode(frames).latent_dist.mode(), truth)


def test_both_layouts_give_the_same_text_encoder_and_tokenizer(official, diffusers_folder, text):
    tokens = torch.tensor([[5, 17, 200, 1]])
    with torch.no_grad():
        truth = text(input_ids=tokens).last_hidden_state
        for folder in (official, diffusers_folder):
            model = load_umt5(folder)
            assert torch.equal(model(input_ids=tokens).last_hidden_state, truth)
            assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
            assert load_umt5_tokenizer(folder)("바닷가").input_ids[-1] == 1


def test_bfloat16_is_kept_as_stored(official, text):
    torch.save({name: tensor.bfloat16() for name, tensor in _official_text(text).items()}, official / OFFICIAL_TEXT)
    assert {parameter.dtype for parameter in load_umt5(official).parameters()} == {torch.bfloat16}


def _refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_every_odd_key_is_named_with_its_file(official, vae, text):
    state = _official_vae(vae)
    gone = state.pop("decoder.head.2.bias")
    state["decoder.head.3.bias"] = gone
    state["encoder.conv1.bias"] = state["encoder.conv1.bias"][:3].clone()
    state["conv2.bias"] = state["conv2.bias"].to(torch.int8)
    torch.save(state, official / OFFICIAL_VAE)
    message = _refused(load_vae, official)  # without the decoder too: a wrong file is a wrong file
    assert "4 tensors are not those" in message
    assert "missing decoder.conv_out.bias" in message
    assert f"unexpected decoder.head.3.bias in {OFFICIAL_VAE}" in message
    assert f"encoder.conv1.bias in {OFFICIAL_VAE} is (3,), not (8,)" in message
    assert "conv2.bias" in message
    assert "quantised" in message
    words = _official_text(text)
    words.pop("blocks.1.ffn.fc1.weight")
    torch.save(words, official / OFFICIAL_TEXT)
    assert "missing encoder.block.1.layer.1.DenseReluDense.wi_1.weight" in _refused(load_umt5, official)


def test_untied_text_embeddings_are_refused_and_tied_copies_taken(diffusers_folder, text):
    folder = diffusers_folder / "text_encoder"
    shutil.rmtree(folder)
    text.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.embed_tokens.weight", None)
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, folder / "model.safetensors")
    load_umt5(diffusers_folder)
    save_file(tensors | {"encoder.embed_tokens.weight": 0 * tensors["shared.weight"]}, folder / "model.safetensors")
    assert "untied embeddings: shared.weight and encoder.embed_tokens.weight differ" in _refused(
        load_umt5, diffusers_folder
    )
    only_one = {name: tensor for name, tensor in tensors.items() if name != "shared.weight"}
    save_file(only_one | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, folder / "model.safetensors")
    load_umt5(diffusers_folder)
    save_file(only_one, folder / "model.safetensors")
    assert "holds no token embedding" in _refused(load_umt5, diffusers_folder)


def test_other_wan_models_are_refused_by_name(official, diffusers_folder, vae):
    (official / "high_noise_model").mkdir()
    assert "is Wan2.2-A14B" in _refused(load_vae, official)
    (official / "high_noise_model").rmdir()
    (official / OFFICIAL_VAE).rename(official / "Wan2.1_VAE.pth")
    assert "is Wan2.1, or Wan2.2-A14B" in _refused(load_vae, official)
    state = _official_vae(vae)
    state["encoder.conv1.weight"] = torch.zeros(8, 3, 3, 3, 3)
    (official / "Wan2.1_VAE.pth").unlink()
    torch.save(state, official / OFFICIAL_VAE)
    assert "the VAE of Wan2.1" in _refused(load_vae, official)
    config = json.loads((diffusers_folder / "vae/config.json").read_text())
    (diffusers_folder / "vae/config.json").write_text(json.dumps({**config, "z_dim": 16}))
    assert "is Wan2.1, or Wan2.2-A14B" in _refused(load_vae, diffusers_folder)
    (diffusers_folder / "vae/config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 48}))
    assert "latents_mean is [0.0, 0.0" in _refused(load_vae, diffusers_folder)


def test_damaged_files_say_so(official, diffusers_folder):
    whole = (official / OFFICIAL_VAE).read_bytes()
    (official / OFFICIAL_VAE).write_bytes(whole[: len(whole) // 2])
    message = _refused(load_vae, official)
    assert "cannot be loaded" in message
    assert "cut short" in message
    assert "wanprep fetch-model" in message
    (official / OFFICIAL_VAE).write_bytes(b"")
    assert "cannot be loaded" in _refused(load_vae, official)
    shard = sorted((diffusers_folder / "text_encoder").glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-50])
    assert shard.name in _refused(load_umt5, diffusers_folder)
    shard.unlink()
    assert f"files are missing ({shard.name})" in _refused(load_umt5, diffusers_folder)
    for name in ("spiece.model", "tokenizer.json"):
        (diffusers_folder / "tokenizer" / name).unlink(missing_ok=True)
    assert "no tokenizer" in _refused(load_umt5_tokenizer, diffusers_folder)


def test_files_of_two_revisions_are_noticed(diffusers_folder):
    first, second, *_ = sorted((diffusers_folder / "text_encoder").glob("model-*.safetensors"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    message = _refused(load_umt5, diffusers_folder)
    assert "which the index places in" in message
    assert "two revisions" in message


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, (str(_Bomb.place),))


def test_a_pickle_that_would_run_code_does_not(official, tmp_path):
    _Bomb.place = tmp_path / "ran"
    torch.save({"encoder.conv1.weight": _Bomb()}, official / OFFICIAL_VAE)
    assert "cannot be loaded" in _refused(load_vae, official)
    (official / OFFICIAL_VAE).write_bytes(pickle.dumps(_Bomb()))
    assert "cannot be loaded" in _refused(load_vae, official)
    assert not (tmp_path / "ran").exists()


_PEAK = f"""
import sys
from pathlib import Path
import torch
from transformers import UMT5EncoderModel
from preprocess.encoders import load as checkpoint
from preprocess.encoders.random_weights import build_random_text_encoder
build_random_text_encoder(0, 10)(input_ids=torch.tensor([[1]]))
before = {PEAK_KIB}
model = checkpoint.load_umt5(Path(sys.argv[1]))
total = sum(float(p.float().abs().sum()) for p in model.parameters() if p.numel() < 1e6)
total += float(model.shared.weight[::7].sum())
assert total > 0
print(({PEAK_KIB} - before) * 1024)
"""


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_loading_holds_little_beyond_the_model(layout, official, diffusers_folder):
    """The limit is the model and 1.2 × its largest file; mapping the files stays well below."""
    model = build_random_text_encoder(0, 500_000)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if layout == "official":
        torch.save(_official_text(model), official / OFFICIAL_TEXT)
        folder, largest = official, (official / OFFICIAL_TEXT).stat().st_size
    else:
        shutil.rmtree(diffusers_folder / "text_encoder")
        model.save_pretrained(diffusers_folder / "text_encoder", max_shard_size="40MB")
        folder = diffusers_folder
        largest = max(file.stat().st_size for file in folder.glob("text_encoder/*.safetensors"))
    del model
    assert size > 128_000_000
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split()[-1])
    assert peak < size + 1.2 * largest, f"{peak / size:.2f} × the model"
    assert peak < 1.3 * size, f"{peak / size:.2f} × the model"
