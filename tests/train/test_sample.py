"""Sampling against diffusers' pipelines on the same small weights, with and without a LoRA; prompts and bad input."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from train_runs import make_config, merge

from preprocess.encoders.random_weights import build_random_vae
from preprocess.encoders.vae_config import LATENT_MEAN, LATENT_STD
from shards.errors import UserError
from shards.files.tensor_files import Prompts, read_latent_file, read_prompts, write_latent, write_prompts
from shards.read.dataset import open_dataset
from train.config.model import DiTConfig, LoRAConfig
from train.config.sampling import Prompt, SampleConfig, SamplerConfig
from train.loop import fit
from train.lora.formats import name_tensors, raw_pairs, read_lora
from train.lora.lora import attach_lora, inject, lora_modules, lora_state
from train.lora.merge import merge_checkpoint
from train.model.dit import build_model
from train.model.load import load_dit, save_dit
from train.sampling.sample import draw_start, latent_shape, prepare_prompts, sample_latent, sample_prompts

DIMS = DiTConfig(dim=64, num_heads=2, num_layers=2, ffn_dim=128, text_len=40, text_dim=64, freq_dim=32)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=("self_attn", "cross_attn", "ffn"))
SIZE = {"height": 64, "width": 96, "num_frames": 9}
SAMPLER = SamplerConfig(steps=10)


@pytest.fixture(scope="module")
def model():
    model = build_model(DIMS, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def texts():
    """Prompt and null text, zero-padded as the model takes them."""
    generator = torch.Generator().manual_seed(3)
    pair = torch.zeros(2, DIMS.text_len, DIMS.text_dim)
    pair[0, :30] = torch.randn(30, DIMS.text_dim, generator=generator)
    pair[1, :7] = torch.randn(7, DIMS.text_dim, generator=generator)
    return pair


@pytest.fixture(scope="module")
def vae():
    return build_random_vae(0).eval()


def _scheduler():
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )


def _pipe(kind, transformer, vae):
    import diffusers

    pipe = getattr(diffusers, kind)(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=_scheduler(), transformer=transformer,
        expand_timesteps=True, **({"image_encoder": None, "image_processor": None} if "Image" in kind else {}),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run(pipe, texts, guidance=5.0, **inputs):
    return pipe(
        prompt_embeds=texts[:1], negative_prompt_embeds=texts[1:], num_inference_steps=10, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7), output_type="latent", **SIZE, **inputs,
    ).frames[0]  # fmt: skip


def _noise():
    return draw_start(7, latent_shape(48, SIZE["num_frames"], SIZE["height"], SIZE["width"]))


@pytest.mark.filterwarnings("ignore")  # diffusers' own, on missing parts of the pipeline
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_text_to_video_equals_diffusers_pipeline(guidance, model, texts, vae, diffusers_twin):
    theirs = _run(_pipe("WanPipeline", diffusers_twin(model), vae), texts, guidance)
    sampler = SAMPLER.model_copy(update={"guidance": guidance})
    ours = sample_latent(model, _noise(), *texts, sampler)
    assert (ours - _noise()).abs().max() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_image_to_video_equals_diffusers_pipeline(model, texts, vae, diffusers_twin):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (SIZE["height"], SIZE["width"], 3), dtype=np.uint8)
    pipe = _pipe("WanImageToVideoPipeline", diffusers_twin(model), vae)
    theirs = _run(pipe, texts, image=Image.fromarray(pixels))
    frame = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(frame).latent_dist.mode()[0]
    first = ((mean - torch.tensor(LATENT_MEAN).view(-1, 1, 1, 1)) / torch.tensor(LATENT_STD).view(-1, 1, 1, 1))[:, 0]
    ours = sample_latent(model, _noise(), *texts, SAMPLER, first)
    torch.testing.assert_close(ours[:, 0], first, atol=0, rtol=0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - sample_latent(model, _noise(), *texts, SAMPLER)).abs()[:, 1:].max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_a_lora_in_diffusers_pipeline_equals_ours_at_three_scales_and_merged(
    texts, vae, model, diffusers_twin, tmp_path
):
    twin = diffusers_twin(model)
    adapted = build_model(DIMS, seed=1)
    adapted.load_state_dict(model.state_dict())
    inject(adapted, LORA, seed=5)
    with torch.no_grad():
        for name, tensor in lora_state(adapted).items():
            if "lora_B" in name:
                tensor.normal_(0, 0.05, generator=torch.Generator().manual_seed(6))
    save_file(name_tensors(raw_pairs(lora_state(adapted), LORA)), tmp_path / "lora.safetensors")
    pipe = _pipe("WanPipeline", twin, vae)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="mbc")
    adapted.eval()
    without = sample_latent(model, _noise(), *texts, SAMPLER)
    results = {}
    for scale in (0.0, 0.5, 1.0):
        pipe.set_adapters("mbc", scale)
        for module in lora_modules(adapted).values():
            module.scale = LORA.scale * scale
        results[scale] = sample_latent(adapted, _noise(), *texts, SAMPLER)
        torch.testing.assert_close(results[scale], _run(pipe, texts), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(results[0.0], without, atol=1e-5, rtol=1e-5)
    assert (results[1.0] - without).abs().max() > 0.1
    merge(adapted)
    torch.testing.assert_close(sample_latent(adapted, _noise(), *texts, SAMPLER), results[1.0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_trained_runs_own_file_in_diffusers_pipeline_equals_ours_at_three_scales_and_merged(
    texts, vae, model, diffusers_twin, tiny_shards, tmp_path
):
    """`fit` trains it, RUN/lora.safetensors is what diffusers' loader takes: nothing between is made by the test."""
    base = tmp_path / "base.safetensors"
    save_dit(model, base)
    config = make_config(
        tiny_shards, tmp_path / "run", max_steps=30, model__checkpoint=str(base), model__dims=None, optim__lr=3e-2,
        lora__alpha=8.0, lora__targets=["self_attn", "cross_attn", "ffn"],
    )  # fmt: skip
    file = fit(config).export
    pipe = _pipe("WanPipeline", diffusers_twin(model), vae)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="mbc")
    assert sum("lora_B" in name for name, _ in pipe.transformer.named_parameters()) == 2 * 10
    without = sample_latent(model, _noise(), *texts, SAMPLER)
    results = {}
    for scale in (0.0, 0.5, 1.0):
        pipe.set_adapters("mbc", scale)
        ours = build_model(DIMS, seed=1)
        load_dit(ours, base)
        attach_lora(ours, read_lora(file), scale)
        results[scale] = sample_latent(ours.eval(), _noise(), *texts, SAMPLER)
        torch.testing.assert_close(results[scale], _run(pipe, texts), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(results[0.0], without, atol=1e-5, rtol=1e-5)
    assert (results[1.0] - without).abs().max() > 0.1
    assert (results[1.0] - results[0.5]).abs().max() > 0.05
    merge_checkpoint(base, read_lora(file), tmp_path / "merged")
    merged = build_model(DIMS, seed=1)
    load_dit(merged, tmp_path / "merged")
    torch.testing.assert_close(
        sample_latent(merged.eval(), _noise(), *texts, SAMPLER), results[1.0], atol=1e-4, rtol=1e-4
    )


def test_the_noise_is_the_one_diffusers_draws():
    from diffusers.utils.torch_utils import randn_tensor

    theirs = randn_tensor((1, 4, 3, 2, 2), generator=torch.Generator().manual_seed(11))
    assert torch.equal(draw_start(11, (4, 3, 2, 2)), theirs[0])


@pytest.fixture
def prompts_file(tmp_path):
    arrays = [np.random.default_rng(n).integers(0, 16000, (n + 3, 64), dtype=np.uint16) for n in range(4)]
    path = tmp_path / "prompts.safetensors"
    write_prompts(path, Prompts(("바닷가", "시장"), tuple(arrays[:2]), arrays[2], arrays[3], "abc"))
    return path


def test_prompts_files_read_back(prompts_file):
    prompts = read_prompts(prompts_file)
    assert prompts.texts == ("바닷가", "시장")
    assert prompts.embeddings[1].shape == (4, 64)
    assert prompts.null_text("empty").shape == (5, 64)
    assert prompts.null_text("negative").shape == (6, 64)


def test_a_prompt_becomes_a_latent_file_and_repeats_to_the_bit(model, prompts_file, tmp_path):
    sampler = SamplerConfig(steps=2)
    prompt = Prompt(name="sea", embeddings=str(prompts_file), index=1, width=96, height=64, num_frames=9, seed=4)
    ready = prepare_prompts([prompt], sampler, DIMS, None)
    (first,) = sample_prompts(model, ready, sampler, tmp_path / "a")
    (second,) = sample_prompts(model, ready, sampler, tmp_path / "b")
    latent = read_latent_file(first)
    assert latent.values.shape == (48, 3, 4, 6)
    assert latent.facts["prompt"] == "시장"
    assert latent.facts["seed"] == "4"
    assert SamplerConfig.model_validate_json(latent.facts["sampler"]) == sampler
    assert first.read_bytes() == second.read_bytes()


def test_a_sample_of_the_shards_gives_text_size_and_first_frame(model, tiny_shards, tmp_path):
    dataset = open_dataset(tiny_shards)
    key = min(sample.key for sample in dataset.samples if sample.frames > 1)
    sample = dataset.samples[dataset.ordinal(key)]
    sampler = SamplerConfig(steps=2, negative="empty")
    prompts = [Prompt(name="t2v", key=key), Prompt(name="i2v", key=key[:-3] + "*", first_frame="sample")]
    dims = DIMS.model_copy(update={"text_len": 600})
    ready = prepare_prompts(prompts, sampler, dims, dataset)
    assert ready[0].facts["key"] == key
    assert ready[0].shape == dataset.latent_shape(key) == (48, 5, sample.height // 16, sample.width // 16)
    assert ready[0].first_CHW is None
    assert torch.equal(ready[1].first_CHW, torch.from_numpy(dataset.latent(ready[1].facts["key"])[:, 0].astype("f4")))
    null = dataset.null_text("empty")
    assert torch.equal(ready[0].null_SE[: len(null)].bfloat16().view(torch.uint16), torch.from_numpy(null))
    assert not ready[0].null_SE[len(null) :].any()


def test_sampling_drops_nothing_and_leaves_a_training_model_in_training(prompts_file, tmp_path):
    model = build_model(DIMS, seed=1)
    inject(model, LORA.model_copy(update={"dropout": 0.5}), seed=5)
    prompt = Prompt(name="p", embeddings=str(prompts_file), width=64, height=64, num_frames=1)
    sampler = SamplerConfig(steps=1)
    model.train()
    sample_prompts(model, prepare_prompts([prompt], sampler, DIMS, None), sampler, tmp_path)
    assert model.training


def _refused(prompt, dims=DIMS, dataset=None):
    with pytest.raises(UserError) as caught:
        prepare_prompts([prompt], SAMPLER, dims, dataset)
    return str(caught.value)


def test_bad_prompts_are_named(prompts_file, tmp_path, tiny_shards):
    size = {"width": 96, "height": 64, "num_frames": 9}
    prompt = Prompt(name="p", embeddings=str(prompts_file), **size)
    assert "index 5" in _refused(prompt.model_copy(update={"index": 5}))
    assert "embeddings of width 64, the model takes 32" in _refused(prompt, DIMS.model_copy(update={"text_dim": 32}))
    assert "3 tokens, the model takes 2" in _refused(prompt, DIMS.model_copy(update={"text_len": 2}))
    assert "cannot be read" in _refused(prompt.model_copy(update={"embeddings": str(tmp_path / "none")}))
    write_latent(tmp_path / "first.safetensors", np.zeros((48, 1, 2, 2)), {})
    text = _refused(prompt.model_copy(update={"first_frame": str(tmp_path / "first.safetensors")}))
    assert "its first frame is 32×32 pixels" in text
    assert "96×64" in text
    text = _refused(prompt.model_copy(update={"num_frames": 1, "first_frame": str(tmp_path / "first.safetensors")}))
    assert "at least 5 frames" in text
    assert "its kind is 'wan-prompts-1'" in _refused(prompt.model_copy(update={"first_frame": str(prompts_file)}))
    assert "needs a dataset" in _refused(Prompt(name="p", key="x"))
    assert "no key matches" in _refused(Prompt(name="p", key="nothing*"), dataset=open_dataset(tiny_shards))
    assert "no sample" in _refused(Prompt(name="p", key="nothing"), dataset=open_dataset(tiny_shards))


def test_damaged_handover_files_are_named(prompts_file, tmp_path):
    whole = prompts_file.read_bytes()
    prompts_file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(prompts_file)
    write_latent(tmp_path / "nan.safetensors", np.full((48, 1, 2, 2), np.nan), {})
    with pytest.raises(UserError, match="not finite"):
        read_latent_file(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a"}, "either key"),
        ({"embeddings": None}, "either key"),
        ({"num_frames": 10}, "4k"),
        ({"width": None}, "width, height and num_frames"),
        ({"first_frame": "sample"}, "needs key"),
        ({"width": 100}, "multiple of 32"),
        ({"name": "../x"}, "match pattern"),
    ],
)
def test_a_prompts_config_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Prompt(**{"name": "p", "embeddings": "f", "width": 96, "height": 64, "num_frames": 9, **change})


def test_two_prompts_of_one_name_are_refused():
    prompt = Prompt(name="p", key="k")
    with pytest.raises(ValueError, match="two prompts are named p"):
        SampleConfig(prompts=(prompt, prompt))
