"""Flow matching, noise levels, the first-frame contract against diffusers' image-to-video pipeline, a slot's loss.

Traps 2 (rounded timesteps) and 8 (the first frame): see each test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shards.errors import UserError
from train.config.train import ObjectiveConfig
from train.data.draws import draw_quantile
from train.model.dit import WanDiT
from train.objective import (
    SigmaDensity,
    add_noise,
    loss_weight,
    model_timestep,
    sample_sigma,
    shift_sigma,
    sigma_density,
    slot_losses,
)

QUANTILES = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
Kind = Literal["uniform", "logit_normal", "mode"]


def pair(shape: tuple[int, ...] = (2, 4, 3, 4, 4)) -> tuple[Tensor, Tensor]:
    """A latent and its noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_interpolation_and_target() -> None:
    """x_σ = (1 − σ) x₀ + σ ε; the target is ε − x₀, so that x₀ = x_σ − σ v (Wan fm_solvers_unipc.py)."""
    x0, noise = pair()
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64)
    noised, target = add_noise(x0, noise, sigma, torch.tensor([False, False]))
    weights = sigma.float().view(-1, 1, 1, 1, 1)
    assert torch.equal(target, noise - x0)
    assert torch.allclose(noised, (1 - weights) * x0 + weights * noise, atol=1e-7)
    assert torch.allclose(noised - weights * target, x0, atol=1e-6)
    assert add_noise(x0.half(), noise, sigma, torch.tensor([False, False]))[0].dtype == torch.float32


def test_the_first_latent_frame_is_clean_only_in_image_to_video() -> None:
    """Trap 8: clean exactly where the sample is image-to-video, noised in all its other frames."""
    x0, noise = pair()
    kept = x0.clone()
    noised, _ = add_noise(x0, noise, torch.tensor([0.5, 0.5]), torch.tensor([True, False]))
    assert torch.equal(noised[0, :, 0], x0[0, :, 0])
    assert torch.allclose(noised[0, :, 1:], (x0 + noise)[0, :, 1:] / 2)
    assert torch.allclose(noised[1], (x0 + noise)[1] / 2)
    assert torch.equal(x0, kept)


def test_a_one_frame_sample_cannot_be_image_to_video() -> None:
    """Trap 8: an image as image-to-video would have nothing left to learn."""
    x0, noise = pair((2, 4, 1, 4, 4))
    with pytest.raises(ValueError, match="one-frame"):
        add_noise(x0, noise, torch.tensor([0.5, 0.5]), torch.tensor([True, False]))


def test_a_slots_loss_is_the_mean_over_its_own_trained_elements() -> None:
    """Trap 8: frame 0 of an image-to-video sample is out of the loss, and its frames count alone in the divisor."""
    velocity, target = pair((3, 4, 5, 4, 6))
    first_B = torch.tensor([True, False, True])
    losses = slot_losses(velocity, target, first_B)
    squared = (velocity - target).square()
    expected = torch.stack([squared[0, :, 1:].mean(), squared[1].mean(), squared[2, :, 1:].mean()])
    assert torch.allclose(losses, expected, rtol=1e-6)
    weighted = slot_losses(velocity, target, first_B, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert torch.allclose(weighted, expected * torch.tensor([0.0, 1.0, 2.0]), rtol=1e-6)


def test_no_gradient_reaches_the_first_frame_of_image_to_video() -> None:
    """Trap 8: even a NaN-free huge error there is worth nothing; text-to-video learns it."""
    velocity, target = pair()
    velocity[:, :, 0] += 1e6
    velocity.requires_grad_()
    slot_losses(velocity, target, torch.tensor([True, False])).sum().backward()
    assert velocity.grad[0, :, 0].abs().max() == 0
    assert velocity.grad[0, :, 1:].abs().min() > 0
    assert velocity.grad[1].abs().min() > 0


def test_what_shares_a_micro_batch_never_counts() -> None:
    """A slot's loss is the same alone, beside text-to-video and beside image-to-video samples."""
    velocity, target = pair((4, 4, 3, 4, 4))
    together = slot_losses(velocity, target, torch.tensor([True, False, False, True]))
    alone = [slot_losses(velocity[i : i + 1], target[i : i + 1], torch.tensor([i in (0, 3)])) for i in range(4)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(u=st.floats(0, 1), shift=st.floats(0.1, 20), kind=st.sampled_from(["uniform", "logit_normal", "mode"]))
def test_noise_levels_stay_between_zero_and_one(u: float, shift: float, kind: Kind) -> None:
    """Every draw, the ends included, gives a level in [0, 1]; nothing is clamped."""
    sigma = sample_sigma(torch.tensor([u], dtype=torch.float64), SigmaDensity(kind, shift)).item()
    assert -1e-12 <= sigma <= 1 + 1e-12


@pytest.mark.parametrize(
    ("kind", "mean", "low", "high"), [("uniform", 0.75, 0.047, 0.36), ("logit_normal", 0.79, 0.001, 0.28)]
)
def test_densities_are_the_measured_ones(kind: Kind, mean: float, low: float, high: float) -> None:
    """Mean σ, P(σ < 0.2), P(σ > 0.9) under shift 5 (reference, section 2)."""
    sigma = sample_sigma(QUANTILES, SigmaDensity(kind))
    assert sigma.mean().item() == pytest.approx(mean, abs=0.006)
    assert (sigma < 0.2).double().mean().item() == pytest.approx(low, abs=0.001)
    assert (sigma > 0.9).double().mean().item() == pytest.approx(high, abs=0.006)


def test_uniform_and_logit_normal_quantiles_rise() -> None:
    """Quantiles of the draw are quantiles of the noise level: held-out losses use that."""
    for kind in ("uniform", "logit_normal"):
        sigma = sample_sigma(QUANTILES, SigmaDensity(kind))
        assert (sigma.diff() > 0).all()
    assert (sample_sigma(QUANTILES, SigmaDensity("mode")).diff() < 0).all()
    median = sample_sigma(torch.tensor([0.5], dtype=torch.float64), SigmaDensity("logit_normal", 1.0, mean=0.7))
    assert median.item() == pytest.approx(1 / (1 + math.exp(-0.7)))


def test_mode_is_the_published_formula() -> None:
    """f(u) = 1 − u − s (cos²(πu/2) − 1 + u) (arXiv:2403.03206, eq. 20), uniform at s = 0."""
    u = 0.3
    by_hand = 1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
    draw = torch.tensor([u], dtype=torch.float64)
    assert sample_sigma(draw, SigmaDensity("mode", 1.0)).item() == pytest.approx(by_hand)
    assert sample_sigma(draw, SigmaDensity("mode", 1.0, mode_scale=0.0)).item() == pytest.approx(1 - u)
    with pytest.raises(ValueError, match="unknown density"):
        sample_sigma(draw, SigmaDensity("cosine"))  # type: ignore[arg-type]


def test_shift_is_the_schedulers() -> None:
    """σ' = sσ / (1 + (s − 1) σ), as diffusers' flow-match scheduler shifts its grid."""
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    grid = torch.linspace(1, 1000, 1000).flip(0) / 1000
    assert torch.allclose(shift_sigma(grid, 5.0), scheduler.sigmas[:1000], atol=1e-6)
    assert shift_sigma(torch.tensor(0.0), 5.0) == 0
    assert shift_sigma(torch.tensor(1.0), 5.0) == 1


@pytest.mark.parametrize("sigma", [0.71325, 0.0617, 0.99999, 1.0])
def test_the_timestep_is_not_rounded(sigma: float) -> None:
    """Trap 2: 1000 σ in float32; not an integer, not bf16, not shifted by one."""
    timestep = model_timestep(torch.tensor([sigma], dtype=torch.float64))
    assert timestep.dtype == torch.float32
    assert timestep.item() == pytest.approx(1000 * sigma, rel=1e-7)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode"])
def test_bell_weight_has_mean_one_over_its_density(kind: Kind) -> None:
    """Weights do not change the learning rate on average, whatever is drawn."""
    density = SigmaDensity(kind)
    weights = loss_weight(sample_sigma(QUANTILES, density), "bell", density)
    assert weights.mean().item() == pytest.approx(1, abs=1e-3)
    assert loss_weight(QUANTILES, "none", density).unique().tolist() == [1.0]


def test_bell_weight_is_that_of_diffsynth() -> None:
    """Against DiffSynth-Studio's table over its 1,000 shifted timesteps: 0 at σ = 1, 2.08 at t ≈ 500."""
    timesteps = 1000 * shift_sigma(torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1], 5.0)
    bell = torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    table = (bell - bell.min()) * (1000 / (bell - bell.min()).sum())
    ours = loss_weight(timesteps / 1000, "bell", SigmaDensity())
    assert (ours - table).abs().max() < 5e-3
    assert ours[0].item() == pytest.approx(0, abs=1e-12)
    assert ours.max().item() == pytest.approx(2.08, abs=0.01)


def shifted_back(sigma: Tensor, shift: float) -> Tensor:
    """The level before the shift."""
    return sigma / (shift - (shift - 1) * sigma)


def cumulative(sigma: Tensor, density: SigmaDensity) -> Tensor:
    """The closed form of the share below a level, without bounds."""
    plain = shifted_back(sigma, density.shift)
    if density.kind == "uniform":
        return plain
    return torch.special.ndtr((torch.logit(plain) - density.mean) / density.std)


def drawn_levels(density: SigmaDensity, num_strata: int = 1) -> Tensor:
    """What 500 steps of 16 slots draw, sorted."""
    quantiles = [draw_quantile(3, step, slot, num_strata) for step in range(500) for slot in range(16)]
    return sample_sigma(torch.tensor(quantiles, dtype=torch.float64), density).sort().values


@pytest.mark.parametrize("num_strata", [1, 16])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.9), (0.875, 1.0), (0.0, 0.4)])
@pytest.mark.parametrize(("kind", "shift"), [("uniform", 5.0), ("logit_normal", 3.0), ("logit_normal", 1.0)])
def test_drawn_levels_have_the_closed_form(kind: Kind, shift: float, low: float, high: float, num_strata: int) -> None:
    """Kolmogorov and Smirnov's distance to the density between its bounds, at 0.1 %; with strata far below."""
    density = SigmaDensity(kind, shift, low=low, high=high)
    levels = drawn_levels(density, num_strata)
    assert low <= levels[0] and levels[-1] <= high
    ends = cumulative(torch.tensor([low, high], dtype=torch.float64), density)
    expected = (cumulative(levels, density) - ends[0]) / (ends[1] - ends[0])
    ranks = (torch.arange(len(levels), dtype=torch.float64) + 0.5) / len(levels)
    assert (expected - ranks).abs().max() < (1.95 / len(levels) ** 0.5 if num_strata == 1 else 0.01)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode"])
def test_bounds_cut_the_density_and_keep_its_shape(kind: Kind) -> None:
    """As if levels outside had been thrown away and drawn again."""
    every = sample_sigma(QUANTILES, SigmaDensity(kind))
    inside = every[(every >= 0.3) & (every <= 0.8)].sort().values
    bounded = sample_sigma(QUANTILES, SigmaDensity(kind, low=0.3, high=0.8)).sort().values
    places = ((torch.arange(len(inside)) + 0.5) / len(inside) * len(bounded)).long()
    assert (bounded[places] - inside).abs().max() < 1e-3
    assert sample_sigma(QUANTILES, SigmaDensity(kind, low=0.0, high=1.0)).equal(every)


@pytest.mark.parametrize(
    ("settings", "mean", "above"),
    [
        ({}, 0.747, 0.36),
        ({"weighting": "bell"}, 0.645, 0.10),  # DiffSynth-Studio
        ({"sigma": "logit_normal", "shift": 3.0}, 0.714, 0.135),  # musubi-tuner
        ({"sigma": "logit_normal", "shift": 1.0}, 0.500, 0.014),  # diffusion-pipe
        ({"sigma": "uniform", "shift": 1.0}, 0.5, 0.10),  # ai-toolkit, linear
    ],
)
def test_the_densities_of_other_tools_are_settings(settings: dict[str, Any], mean: float, above: float) -> None:
    """Mean σ and the share above 0.9, weighted as the loss is: the table of docs/explanations/flow-matching.md."""
    config = ObjectiveConfig(**settings)
    density = sigma_density(config)
    sigma = sample_sigma(QUANTILES, density)
    weight = loss_weight(sigma, config.weighting, density)
    assert (sigma * weight).mean().item() == pytest.approx(mean, abs=6e-4)
    assert ((sigma > 0.9) * weight).mean().item() == pytest.approx(above, abs=5e-3)


def test_bounds_that_hold_nothing_are_refused() -> None:
    """With their figures."""
    with pytest.raises(UserError, match=r"objective.sigma_min 0 and sigma_max 0\.01 hold"):
        sigma_density(ObjectiveConfig(sigma="logit_normal", logit_mean=3.0, logit_std=0.5, sigma_max=0.01))
    with pytest.raises(ValueError, match=r"sigma_min 0\.5 is not below sigma_max 0\.5"):
        ObjectiveConfig(sigma_min=0.5, sigma_max=0.5)


# --- the first-frame contract ---------------------------------------------------------------------------------------


def _image_to_video(transformer: Any) -> Any:
    import diffusers

    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.1 * i for i in range(8)],
        latents_std=[0.5 + 0.1 * i for i in range(8)],
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _encode(vae: Any, image: Tensor) -> Tensor:
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (vae.encode(image[:, :, None]).latent_dist.mode() - mean) / std


def test_training_inputs_are_those_of_the_image_to_video_pipeline(
    tiny_dit: WanDiT, diffusers_twin: Callable[[Any], Any]
) -> None:
    """Trap 8: what `add_noise` builds and the timesteps the model makes of it are what the pipeline's transformer gets
    at every step, and the velocities agree.
    """
    twin = diffusers_twin(tiny_dit)
    pipeline = _image_to_video(twin)
    calls: list[dict[str, Any]] = []
    twin.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    outputs: list[Tensor] = []
    twin.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, 64, 96, generator=generator)
    noise = torch.randn(1, 8, 3, 4, 6, generator=generator)
    text = torch.randn(1, 12, 16, generator=generator)
    with torch.no_grad():
        pipeline(
            image=image,
            prompt_embeds=text,
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=3,
            guidance_scale=1.0,
            latents=noise,
            output_type="latent",
        )
        condition = _encode(pipeline.vae, 2 * image - 1)
    first_B = torch.tensor([True])

    # At the first step σ is 1: the pipeline holds pure noise behind the condition.
    x0 = torch.cat([condition, torch.zeros_like(noise)[:, :, 1:]], dim=2)
    noised, _ = add_noise(x0, noise, torch.tensor([1.0]), first_B)
    assert torch.allclose(noised, calls[0]["hidden_states"], atol=1e-6)
    for call, theirs in zip(calls, outputs, strict=True):
        # At later steps any clip that led here would do: the frames behind are the pipeline's own.
        assert torch.allclose(call["hidden_states"][:, :, 0], condition[:, :, 0], atol=1e-6)
        timesteps = call["timestep"][0].float()
        sigma = timesteps[-1] / 1000
        rebuilt, _ = add_noise(x0, (call["hidden_states"] - (1 - sigma) * x0) / sigma, sigma[None], first_B)
        assert torch.allclose(rebuilt, call["hidden_states"], atol=1e-5)
        timestep = model_timestep(sigma[None].double())
        assert timesteps[:6].abs().max() == 0
        assert torch.allclose(timesteps[6:], timestep.expand(12))
        with torch.no_grad():
            ours = tiny_dit(call["hidden_states"], timestep, first_B, text)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
