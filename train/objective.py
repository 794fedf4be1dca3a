"""Flow matching: x_σ = (1 − σ) x₀ + σ ε, target ε − x₀, and the loss of one slot (place in the batch).

Shapes: B slots, C channels, T H W latent frames, rows, columns.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shards.errors import UserError
from train.config.train import ObjectiveConfig

NUM_TIMESTEPS = 1000
LEAST_SHARE = 1e-6
"""Of a density, between the configured bounds: with less, neighbouring draws would be the same noise level."""


class SigmaDensity(NamedTuple):
    """How noise levels are drawn."""

    kind: Literal["uniform", "logit_normal", "mode"] = "uniform"
    shift: float = 5.0
    """σ' = sσ / (1 + (s − 1)σ): more weight on high noise; 5 is the model's own."""
    mean: float = 0.0
    """Of the logit, for logit_normal."""
    std: float = 1.0
    """Of the logit, for logit_normal."""
    mode_scale: float = 1.29
    """For mode: 0 is uniform, up to 1.75 heavier in the middle."""
    low: float = 0.0
    """Least noise level, shifted."""
    high: float = 1.0
    """Greatest noise level, shifted."""


def sigma_density(config: ObjectiveConfig) -> SigmaDensity:
    """The distribution of noise levels. Raises UserError where nothing of it lies between the configured bounds."""
    kind, shift, low, high = config.sigma, config.shift, config.sigma_min, config.sigma_max
    density = SigmaDensity(kind, shift, config.logit_mean, config.logit_std, config.mode_scale, low, high)
    first, last = _bounds(density)
    if (held := abs(last - first)) < LEAST_SHARE:
        raise UserError(
            f"objective.sigma_min {low:g} and sigma_max {high:g} hold {held:.1g} of {kind}, shift {shift:g}",
            expected=f"at least {LEAST_SHARE:g} of it",
            fix="widen the bounds, or choose another objective.sigma",
        )
    return density


def shift_sigma(sigma: Float[Tensor, "*shape"], shift: float) -> Float[Tensor, "*shape"]:
    """σ' = sσ / (1 + (s − 1)σ) (Wan fm_solvers_unipc.py, set_timesteps)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigma(u_B: Float[Tensor, "*shape"], density: SigmaDensity) -> Float[Tensor, "*shape"]:
    """Noise levels from uniform numbers in (0, 1), float64: the inverse distribution function, so that quantiles of u
    are quantiles of σ (`mode` runs downwards). Between bounds it is the same density without what lies outside.

    Sources: logit-normal and mode, Esser et al. 2024 (arXiv:2403.03206), section 3.1.
    """
    u_B = u_B.double()
    if (density.low, density.high) != (0.0, 1.0):
        first, last = _bounds(density)
        u_B = first + (last - first) * u_B
    return _unbounded(u_B, density)


@lru_cache(maxsize=16)
def _bounds(density: SigmaDensity) -> tuple[float, float]:
    """The quantiles of the complete density where its bounds lie, by bisection: every density is monotonic in u."""
    falls = density.kind == "mode"
    found = []
    for bound in (density.low, density.high):
        low, high = 0.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            is_below = _unbounded(torch.tensor(middle, dtype=torch.float64), density).item() < bound
            low, high = (middle, high) if is_below != falls else (low, middle)
        found.append((low + high) / 2 if 0 < bound < 1 else float((bound == 1) != falls))
    return (found[1], found[0]) if falls else (found[0], found[1])


def _unbounded(u_B: Tensor, density: SigmaDensity) -> Tensor:
    if density.kind == "logit_normal":
        sigma_B = torch.sigmoid(density.mean + density.std * torch.special.ndtri(u_B))
    elif density.kind == "mode":
        sigma_B = 1 - u_B - density.mode_scale * (torch.cos(math.pi / 2 * u_B) ** 2 - 1 + u_B)
    elif density.kind == "uniform":
        sigma_B = u_B
    else:
        raise ValueError(f"unknown density {density.kind!r}")
    return shift_sigma(sigma_B, density.shift)


def model_timestep(sigma_B: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1000 σ in float32, what the model is given; never rounded to an integer or to 16 bits."""
    return (NUM_TIMESTEPS * sigma_B.double()).float()


def loss_weight(
    sigma_B: Float[Tensor, "*shape"], kind: Literal["none", "bell"], density: SigmaDensity
) -> Float[Tensor, "*shape"]:
    """Weight of a slot's loss, with mean 1 over the density: 1, or a bell over σ that is 0 at both ends.

    The bell is exp(−2(σ − ½)²) less its value at σ = 1 (DiffSynth-Studio flow_match.py, linear_timesteps_weights; there
    the mean is taken over its 1,000 shifted timesteps, here over 1,000 quantiles of the density in use).
    """
    if kind == "none":
        return torch.ones_like(sigma_B, dtype=torch.float64)
    quantiles = (torch.arange(NUM_TIMESTEPS, dtype=torch.float64) + 0.5) / NUM_TIMESTEPS
    return _bell(sigma_B.double()) / _bell(sample_sigma(quantiles, density)).mean().item()


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)


def add_noise(
    x0_BCTHW: Float[Tensor, "b c t h w"],
    noise_BCTHW: Float[Tensor, "b c t h w"],
    sigma_B: Float[Tensor, " b"],
    image_first_B: Bool[Tensor, " b"],
) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b c t h w"]]:
    """The model's input and its target, float32.

    Image-to-video samples keep their first latent frame clean, as inference gives it (diffusers pipeline_wan_i2v.py:
    (1 − mask) condition + mask latents). Their first frame has no target: see `slot_losses`.

    Raises: ValueError for an image-to-video sample of one frame: nothing of it would be left to learn.
    """
    if x0_BCTHW.shape[2] == 1 and bool(image_first_B.any()):
        raise ValueError("a one-frame sample cannot be image-to-video")
    x0, noise = x0_BCTHW.float(), noise_BCTHW.float()
    sigma = sigma_B.to(x0.device).float().view(-1, 1, 1, 1, 1)
    noised = (1 - sigma) * x0 + sigma * noise
    clean = image_first_B.to(x0.device).view(-1, 1, 1, 1)
    noised[:, :, 0] = torch.where(clean, x0[:, :, 0], noised[:, :, 0])
    return noised, noise - x0


def slot_losses(
    velocity_BCTHW: Float[Tensor, "b c t h w"],
    target_BCTHW: Float[Tensor, "b c t h w"],
    image_first_B: Bool[Tensor, " b"],
    weight_B: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, " b"]:
    """Mean squared error of each slot over its own trained elements, in float32: all of them, or all but the first
    latent frame of an image-to-video sample. Times `weight_B`.

    A batch's loss is the sum of these over the global batch ÷ its size: what shares a micro-batch or rank never counts.
    """
    squared_BT = (velocity_BCTHW.float() - target_BCTHW.float()).square().mean(dim=(1, 3, 4))
    first_B = image_first_B.to(squared_BT.device)
    trained_BT = torch.ones_like(squared_BT)
    trained_BT[:, 0] = torch.where(first_B, 0.0, 1.0)
    losses_B = (squared_BT * trained_BT).sum(1) / trained_BT.sum(1)
    return losses_B if weight_B is None else losses_B * weight_B.to(losses_B)
