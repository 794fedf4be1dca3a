"""The held-out loss: the same clips, noise levels, noise and modes every time, so that only the weights change it.

Nine noise levels represent the density that is trained on: the 10 %, 20 % … 90 % quantiles of it. Each clip is seen at
each level as text-to-video and, where it has more than one latent frame, as image-to-video, with its first caption.
The mean is over clips, then levels, then modes, and carries no loss weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from shards.errors import UserError
from train.config.train import EvalConfig
from train.data.batch import check_text, pad_texts, read_latent
from train.data.draws import Purpose, draw_noise
from train.data.sampler import hash_key
from train.geometry import Bucket

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.read.dataset import Dataset
    from train.objective import SigmaDensity

NUM_QUANTILES = 9
HELD_OUT_SEED = 0  # not the run's: runs of different seeds are compared on the same noise

Forward = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
"""(noisy latent, timestep, image_first, text) → velocity, in inference mode."""


class HeldOut(NamedTuple):
    """One evaluation, as it goes into held_out.jsonl."""

    mean: float
    """Mean of the modes' means."""
    t2v: tuple[float, ...]
    """Mean over clips by quantile, lowest noise first."""
    i2v: tuple[float, ...]
    """The same for image-to-video; empty when every clip is one frame."""
    num_clips: int
    sigmas: tuple[float, ...]
    """Noise levels, shifted."""


def choose_held_out(dataset: Dataset, ordinals: Sequence[int], config: EvalConfig) -> list[int]:
    """One sample of each of `num_clips` held-out clips, by hash: adding clips changes few of them.

    Raises UserError when the validation side is empty.
    """
    first: dict[str, int] = {}
    for ordinal in sorted(ordinals, key=lambda ordinal: dataset.samples[ordinal].key):
        first.setdefault(dataset.samples[ordinal].clip_id, ordinal)
    if not first:
        raise UserError(
            "no clip falls on the validation side, so there is no held-out loss",
            fix="raise data.validation_fraction, add shards, or set eval: null",
        )
    return [first[clip] for clip in sorted(first, key=hash_key)[: config.num_clips]]


def evaluate(
    forward: Forward,
    dataset: Dataset,
    ordinals: Sequence[int],
    config: EvalConfig,
    density: SigmaDensity,
    text_len: int,
    device: torch.device,
    check_stop: Callable[[], None] = lambda: None,
) -> HeldOut:
    """The held-out loss of `forward` over the samples `ordinals`. `check_stop` is called on the way; it may raise."""
    import torch

    from train.objective import sample_sigma

    quantiles = torch.arange(1, NUM_QUANTILES + 1, dtype=torch.float64) / (NUM_QUANTILES + 1)
    sigmas = sample_sigma(quantiles, density)
    sums = {mode: torch.zeros(NUM_QUANTILES, dtype=torch.float64) for mode in (False, True)}
    counts = {False: 0, True: 0}
    for group in _groups(dataset, ordinals, config.batch):
        latent, text = _read(dataset, group, text_len)
        modes = (False, True) if latent.shape[2] > 1 else (False,)
        for level, sigma in enumerate(sigmas):
            check_stop()
            noise = _noise(dataset, group, level, latent.shape[1:])
            for mode in modes:
                losses = _losses(forward, latent, noise, text, float(sigma), mode, device)
                sums[mode][level] += losses.sum()
        for mode in modes:
            counts[mode] += len(group)
    t2v, i2v = (tuple((sums[mode] / counts[mode]).tolist()) if counts[mode] else () for mode in (False, True))
    means = [math.fsum(losses) / len(losses) for losses in (t2v, i2v) if losses]
    return HeldOut(sum(means) / len(means), t2v, i2v, counts[False], tuple(sigmas.tolist()))


def describe_held_out(now: HeldOut, before: Mapping[str, float] | None = None) -> str:
    """One line for people."""
    parts = [f"held-out loss {now.mean:.4f} over {now.num_clips} clips"]
    for name, losses in (("T2V", now.t2v), ("I2V", now.i2v)):
        if losses:
            parts.append(
                f"{name} {sum(losses) / len(losses):.4f} (σ {now.sigmas[0]:.2f}: {losses[0]:.3f}, "
                f"σ {now.sigmas[-1]:.2f}: {losses[-1]:.3f})"
            )
    if before and before["mean"] is not None:
        parts.append(f"{100 * (now.mean / before['mean'] - 1):+.1f} % since the start")
    return "; ".join(parts)


def _groups(dataset: Dataset, ordinals: Sequence[int], size: int) -> list[list[int]]:
    buckets: dict[Bucket, list[int]] = {}
    for ordinal in ordinals:
        sample = dataset.samples[ordinal]
        buckets.setdefault(Bucket(sample.frames, sample.height, sample.width), []).append(ordinal)
    return [some[start : start + size] for _, some in sorted(buckets.items()) for start in range(0, len(some), size)]


def _read(dataset: Dataset, group: Sequence[int], text_len: int) -> tuple[Tensor, Tensor]:
    import numpy as np
    import torch

    samples = [dataset.samples[ordinal] for ordinal in group]
    channels = dataset.latent_shape(group[0])[0]
    latents = [read_latent(dataset, ordinal, sample, channels) for ordinal, sample in zip(group, samples, strict=True)]
    texts = [check_text(dataset.text(ordinal, 0), text_len, dataset.samples[ordinal].key) for ordinal in group]
    return torch.from_numpy(np.stack(latents)), pad_texts(texts, text_len)


def _noise(dataset: Dataset, group: Sequence[int], level: int, shape: Sequence[int]) -> Tensor:
    import numpy as np
    import torch

    keys = [hash_key(dataset.samples[ordinal].key) for ordinal in group]
    drawn = [draw_noise(HELD_OUT_SEED, key, level, shape, Purpose.HELD_OUT_NOISE) for key in keys]
    return torch.from_numpy(np.stack(drawn))


def _losses(
    forward: Forward, latent: Tensor, noise: Tensor, text: Tensor, sigma: float, mode: bool, device: torch.device
) -> Tensor:
    import torch

    from train.objective import add_noise, model_timestep, slot_losses

    sigma_B = torch.full((len(latent),), sigma, dtype=torch.float64)
    image_first_B = torch.full((len(latent),), mode)
    with torch.no_grad():
        noisy, target = add_noise(latent.to(device), noise.to(device), sigma_B.to(device), image_first_B.to(device))
        velocity = forward(noisy, model_timestep(sigma_B).to(device), image_first_B, text.to(device))
        return slot_losses(velocity, target, image_first_B.to(device)).double().cpu()
