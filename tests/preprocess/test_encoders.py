"""The frozen encoders: the reference's latents and embeddings, samples encoded alone, an identity of their weights."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from preprocess.build.clip import store_latent
from preprocess.build.text_pass import NEGATIVE_PROMPT
from preprocess.cli.main import main
from preprocess.config import EncodersConfig, PrepConfig
from preprocess.encoders.encoders import (
    computes_bf16,
    cpu_threads,
    digest_weights,
    load_text_encoder,
    load_tokenizer,
    load_vae_encoder,
)
from preprocess.encoders.random_weights import build_random_text_encoder, build_random_vae, train_tokenizer_model
from preprocess.encoders.vae_config import LATENT_MEAN, LATENT_STD
from preprocess.rejection import Rejection
from preprocess.text.clean import clean_text
from shards.config import load_config
from shards.errors import UserError

CONFIG = EncodersConfig(device="cpu")
CAPTION = "한 사람이 바닷가를 천천히 걷고 있다. 파도가 밀려온다."


def test_auto_embeds_in_bf16_where_the_chip_computes_it(text, monkeypatch):
    """A V100 emulates bf16, and fp16 is never right for UMT5: fp32 there."""
    assert CONFIG.text_precision == "auto" and text.precision == "bf16"
    for capability, there in {(7, 0): False, (7, 5): False, (8, 0): True, (9, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert computes_bf16(torch.device("cuda:0")) is there
    monkeypatch.setattr("preprocess.encoders.encoders.computes_bf16", lambda device: False)
    assert load_text_encoder(CONFIG, load_tokenizer(CONFIG)).precision == "fp32"


@pytest.fixture(scope="module")
def vae():
    return load_vae_encoder(CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CONFIG)


@pytest.fixture(scope="module")
def text(tokenizer):
    return load_text_encoder(CONFIG, tokenizer)


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), dtype=np.uint8)


def _floats(bits):
    return torch.from_numpy(bits).view(torch.bfloat16).float()


def test_latents_are_diffusers_normalised_mode(vae, frames):
    """As diffusers' image-to-video pipeline: (mode − mean) · (1 / std), of pixels in −1 … 1, channels first."""
    reference = build_random_vae(0).eval()
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        mode = reference.encode(pixels).latent_dist.mode()
    mean = torch.tensor(reference.config.latents_mean).view(1, 48, 1, 1, 1)
    std = 1.0 / torch.tensor(reference.config.latents_std).view(1, 48, 1, 1, 1)
    latent = vae.encode(frames)
    assert latent.shape == (48, 5, 4, 6) and latent.dtype == np.float32
    assert torch.equal(torch.from_numpy(latent)[None], (mode - mean) * std)


def test_the_statistics_are_the_48_published_ones():
    assert len(LATENT_MEAN) == len(LATENT_STD) == 48
    assert (LATENT_MEAN[0], LATENT_MEAN[19], LATENT_MEAN[47]) == (-0.2289, 0.5109, -0.0667)
    assert (LATENT_STD[0], LATENT_STD[39], LATENT_STD[47]) == (0.4765, 1.6887, 0.7744)


def test_random_latents_are_near_a_unit_normal(vae, frames):
    latent = vae.encode(frames)
    assert abs(latent.mean()) < 1 and 0.1 < latent.std() < 3


def test_the_first_latent_frame_is_that_of_the_first_frame_alone(vae, frames):
    assert np.array_equal(vae.encode(frames)[:, :1], vae.encode(frames[:1]))


def test_a_shorter_clip_is_a_prefix(vae, frames):
    whole = vae.encode(frames)
    for num_frames in (5, 9, 13):
        assert np.array_equal(vae.encode(frames[:num_frames]), whole[:, : (num_frames + 3) // 4])


def test_frames_that_the_encoder_would_drop_are_refused(vae, frames):
    with pytest.raises(ValueError, match="4k\\+1"):
        vae.encode(frames[:16])


def test_the_number_of_threads_changes_no_byte(vae, frames):
    latents = []
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        latents.append(vae.encode(frames[:5]))
        torch.set_num_threads(before)
    assert np.array_equal(*latents)


def test_decoders_keep_their_cores():
    before = torch.get_num_threads()
    with cpu_threads(1000):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_embeddings_are_transformers_real_tokens_in_bfloat16(text, tokenizer):
    """Padded to 512 with a mask and cut to the true length, as Wan2.2's T5EncoderModel does, gives the same rows."""
    model = build_random_text_encoder(0, len(tokenizer)).eval().to(torch.bfloat16)
    tokens = tokenizer.tokens(CAPTION)
    padded = torch.zeros(1, 512, dtype=torch.long)
    padded[0, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens))).last_hidden_state[0]
        long = model(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state[0, : len(tokens)]
    bits = text.embed(CAPTION)
    assert bits.dtype == np.uint16 and bits.shape == (len(tokens), 64)
    assert torch.equal(_floats(bits), alone.float())
    assert torch.allclose(_floats(bits), long.float(), atol=0.05)


def test_padding_changes_nothing_in_fp32(tokenizer):
    model = build_random_text_encoder(0, len(tokenizer)).eval()
    tokens = tokenizer.tokens(CAPTION)
    padded = torch.zeros(1, 512, dtype=torch.long)
    padded[0, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        long = model(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state[0, : len(tokens)]
    assert torch.allclose(alone, long, rtol=1e-5, atol=1e-5)


def test_a_text_ends_with_the_end_token_and_an_empty_one_is_it(text, tokenizer):
    assert tokenizer.tokens("")[-1:] == tokenizer.tokens(CAPTION)[-1:] == [1]
    assert tokenizer.count("") == 1 and text.embed("").shape == (1, 64)


def test_a_text_beyond_512_tokens_is_refused_not_cut(text, tokenizer):
    long = " ".join([CAPTION] * 60)
    assert tokenizer.count(long) > 512
    with pytest.raises(ValueError, match="at most 512"):
        text.embed(long)


def test_the_default_negative_prompt_is_the_models_and_cleaning_folds_its_commas():
    assert NEGATIVE_PROMPT.startswith("色调艳丽，过曝") and NEGATIVE_PROMPT.endswith("背景人很多，倒着走")
    # sha256 of `sample_neg_prompt` in Wan2.2's wan/configs/shared_config.py.
    assert hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest().startswith("ce96e0324e4b54ce")
    assert "，" not in clean_text(NEGATIVE_PROMPT)


def test_the_tokenizer_is_trained_to_the_same_bytes_in_every_process():
    script = (
        "import hashlib; from preprocess.encoders.random_weights import train_tokenizer_model as train;"
        "print(hashlib.sha256(train()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == hashlib.sha256(train_tokenizer_model()).hexdigest()


def test_identity_is_of_weights_and_precision(vae, text):
    assert vae.note == text.note == "random weights"
    again = load_vae_encoder(CONFIG)
    assert again.identity() == vae.identity()
    other = load_vae_encoder(CONFIG.model_copy(update={"random_seed": 1}))
    assert other.identity()["weights_sha256"] != vae.identity()["weights_sha256"]
    half = load_vae_encoder(CONFIG.model_copy(update={"vae_precision": "bf16"}))
    assert half.identity() != vae.identity()


def test_one_changed_weight_changes_the_digest():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    digests = {digest_weights(module)}
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-6
        digests.add(digest_weights(module))
        module[1].running_mean[0] = 1e-6
        digests.add(digest_weights(module))
    digests.add(digest_weights(module.double()))
    assert len(digests) == 4


def test_loading_leaves_the_callers_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    load_vae_encoder(CONFIG)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("latent", "dtype", "reason"),
    [
        (np.array([0.0, np.nan]), "float16", "latent-not-finite"),
        (np.array([0.0, np.inf]), "float32", "latent-not-finite"),
        (np.array([2.0, 2.0]), "float16", "latent-constant"),
        (np.array([0.0, 70_000.0]), "float16", "latent-beyond-float16"),
    ],
)
def test_latents_that_must_not_be_stored(latent, dtype, reason):
    result = store_latent(latent.astype(np.float32), dtype)
    assert isinstance(result, Rejection) and result.reason == reason


def test_stored_types():
    latent = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert np.array_equal(store_latent(latent, "float32"), latent)
    assert np.array_equal(store_latent(latent, "float16"), latent.astype(np.float16))
    expected = torch.from_numpy(latent).to(torch.bfloat16).float()
    assert torch.equal(_floats(store_latent(latent, "bfloat16")), expected)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "abacus"])
def test_a_device_that_is_not_there_is_named(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"encoders\.device"):
        load_vae_encoder(CONFIG.model_copy(update={"device": device}))


def test_the_doctor_looks_at_the_encoding_node_and_at_a_build(tmp_path):
    """Each check is a row; with a config one picture goes through the VAE, and what is wrong exits with 1."""
    alone = CliRunner().invoke(main, ["doctor"])
    assert alone.exit_code == 0 and "diffusers" in alone.output
    assert "this machine has no GPU" in alone.output or torch.cuda.is_available()
    path, corpus = tmp_path / "prep.yaml", tmp_path / "corpus"
    corpus.mkdir()
    path.write_text(f"output: {tmp_path}/shards\ncorpus: {{location: {corpus}}}\nencoders: {{device: cpu}}\n")
    found = CliRunner().invoke(main, ["doctor", str(path), "--json", "-o", "encoders.vae_precision=auto"])
    rows = {row["subject"]: row for row in json.loads(found.stdout)}
    assert found.exit_code == 1 and rows["corpus"]["status"] == "problem"  # an empty folder holds no annotation
    assert rows["VAE"]["status"] == "ok" and "832×480" in rows["VAE"]["found"]
    assert "auto: fp32, 16 bits make no VAE faster" in rows["precision"]["found"]
    (corpus / "one.json").write_text("{}")
    assert CliRunner().invoke(main, ["doctor", str(path)]).exit_code == 0


@pytest.mark.parametrize("name", ["mbc_832x480", "mbc_seed_1280x704"])
def test_the_shipped_corpus_configs_measure_the_vaes_precision(name):
    """fp32 there took 2.8 times the days on a V100 and eight times on an H100."""
    loaded = load_config(PrepConfig, Path(__file__).parents[2] / "configs" / f"{name}.yaml", ())
    assert (loaded.encoders.vae_precision, loaded.encoders.text_precision) == ("auto", "auto")
