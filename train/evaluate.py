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
NUM_RESAMPLES = 2000
HELD_OUT_SEED = 0  # not the run's: runs of different seeds are compared on the same noise

Forward = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
"""(noisy latent, timestep, image_first, text) → velocity, in inference mode."""


class HeldOut(NamedTuple):
    """One evaluation."""

    mean: float
    """Mean of the modes' means."""
    t2v: tuple[float, ...]
    """Mean over clips by quantile, lowest noise first."""
    i2v: tuple[float, ...]
    """The same for image-to-video; empty when every clip is one frame."""
    num_clips: int
    sigmas: tuple[float, ...]
    """Noise levels, shifted."""
    t2v_clips: Tensor
    """Loss of each clip at each level (clips × levels, float64), in an order that only the dataset decides."""
    i2v_clips: Tensor
    """The same for image-to-video; zero for clips of one frame."""
    moving: Tensor
    """Which clips have more than one latent frame."""

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """JSON values, as they go into held_out.jsonl."""
        t2v, i2v, sigmas = list(self.t2v), list(self.i2v), list(self.sigmas)
        return {"mean": self.mean, "t2v": t2v, "i2v": i2v, "num_clips": self.num_clips, "sigmas": sigmas}


def choose_held_out(dataset: Dataset, ordinals: Sequence[int], config: EvalConfig) -> list[int]:
    """One sample of each of `num_clips` held-out clips, by hash: adding clips changes few of them.

    Raises UserError when the validation side is empty.
    """
    first: dict[str, int] = {}
    for ordinal in sorted(ordinals, key=lambda ordinal: dataset.samples[ordinal].key):
        first.setdefault(dataset.samples[ordinal].clip_id, ordinal)
    if not first:
        raise UserError(
            "no clip is held out, so there is no held-out loss",
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
    clips: dict[bool, list[Tensor]] = {False: [], True: []}
    moving: list[bool] = []
    for group in _groups(dataset, ordinals, config.batch):
        latent, text = _read(dataset, group, text_len)
        modes = (False, True) if latent.shape[2] > 1 else (False,)
        moving += [len(modes) > 1] * len(group)
        for rows in clips.values():
            rows.append(torch.zeros(len(group), NUM_QUANTILES, dtype=torch.float64))
        for level, sigma in enumerate(sigmas):
            check_stop()
            noise = _noise(dataset, group, level, latent.shape[1:])
            for mode in modes:
                losses = _losses(forward, latent, noise, text, float(sigma), mode, device)
                sums[mode][level] += losses.sum()
                clips[mode][-1][:, level] = losses
        for mode in modes:
            counts[mode] += len(group)
    t2v, i2v = (tuple((sums[mode] / counts[mode]).tolist()) if counts[mode] else () for mode in (False, True))
    means = [math.fsum(losses) / len(losses) for losses in (t2v, i2v) if losses]
    return HeldOut(
        mean=sum(means) / len(means),
        t2v=t2v,
        i2v=i2v,
        num_clips=counts[False],
        sigmas=tuple(sigmas.tolist()),
        t2v_clips=torch.cat(clips[False]),
        i2v_clips=torch.cat(clips[True]),
        moving=torch.tensor(moving),
    )


class Change(NamedTuple):
    """How one model's held-out loss differs from another's, over all levels of a mode or at one."""

    mode: str
    """T2V, I2V, or all: the mean of the modes."""
    sigma: float | None
    """Noise level; None: the mean over levels."""
    before: float
    after: float
    share: float
    """after ÷ before − 1."""
    low: float | None
    """Of the share, the 2.5 % quantile over resampled clips; None with one clip."""
    high: float | None
    """The 97.5 % quantile."""


def changes(before: HeldOut, after: HeldOut) -> list[Change]:
    """Compare two evaluations of the same clips, with a paired bootstrap over clips: both models are seen on the same
    resampled clips, so that what makes a clip easy or hard cancels."""
    import torch

    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    num_clips = len(before.moving)
    drawn = torch.randint(num_clips, (NUM_RESAMPLES, num_clips), generator=generator)
    weights = torch.zeros(NUM_RESAMPLES, num_clips, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    weights = torch.cat([torch.ones(1, num_clips, dtype=torch.float64), weights])  # first the clips themselves
    tables = []
    for one in (before, after):
        modes = {"T2V": _weighted_means(weights, one.t2v_clips)}
        if one.moving.any():
            modes["I2V"] = _weighted_means(weights * one.moving, one.i2v_clips)
        tables.append(modes)
    found = []
    for mode in tables[0]:
        a, b = (table[mode] for table in tables)
        count = num_clips if mode == "T2V" else int(before.moving.sum())
        found += [_change(mode, sigma, a[:, n], b[:, n], count) for n, sigma in enumerate(before.sigmas)]
        found.append(_change(mode, None, a.mean(1), b.mean(1), count))
    a, b = (torch.stack([table.mean(1) for table in modes.values()]).mean(0) for modes in tables)
    return [*found, _change("all", None, a, b, num_clips)]


def _weighted_means(weights: Tensor, losses: Tensor) -> Tensor:
    """Resamples × levels; NaN where a resample holds no clip of the mode."""
    return (weights @ losses) / weights.sum(1, keepdim=True)


def _change(mode: str, sigma: float | None, before: Tensor, after: Tensor, num_clips: int) -> Change:
    """From a value and its resamples, of both models."""
    import torch

    share, low, high = after / before - 1, None, None
    if num_clips > 1:
        low, high = torch.nanquantile(share[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Change(mode, sigma, float(before[0]), float(after[0]), float(share[0]), low, high)


class Evaluation(NamedTuple):
    """Held-out losses of a base and of what was put into it, on the same clips and draws."""

    dataset: str
    revision: str
    results: dict[str, HeldOut]
    """By name, the base first."""

    def pairs(self) -> list[tuple[str, str]]:
        """What is compared: each against the base, then the last two with each other."""
        base, *others = self.results
        return [(base, name) for name in others] + [(others[0], name) for name in others[1:]]

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {
            "dataset": self.dataset,
            "revision": self.revision,
            "num_clips": next(iter(self.results.values())).num_clips,
            "results": {name: result.as_dict() for name, result in self.results.items()},
            "changes": [
                {"from": a, "to": b, **change._asdict()}
                for a, b in self.pairs()
                for change in changes(self.results[a], self.results[b])
            ],
        }

    def lines(self) -> list[str]:
        """A table a comparison, for people."""
        num_clips = next(iter(self.results.values())).num_clips
        lines = [f"held-out loss over {num_clips} clips of {self.dataset} (revision {self.revision[:12]})"]
        for a, b in self.pairs():
            lines += ["", f"{a} → {b}", f"{'':4} {'σ':>6} {'before':>8} {'after':>8} {'change':>8}  95 % over clips"]
            for one in changes(self.results[a], self.results[b]):
                level = "mean" if one.sigma is None else f"{one.sigma:.2f}"
                spread = "" if one.low is None else f"[{100 * one.low:+.1f}, {100 * (one.high or 0):+.1f}] %"
                share = f"{100 * one.share:+.1f} %"
                lines.append(
                    f"{one.mode:4} {level:>6} {one.before:8.4f} {one.after:8.4f} {share:>8}  {spread}".rstrip()
                )
        if num_clips == 1:
            lines.append("one clip gives no interval: raise eval.num_clips or data.validation_fraction")
        return lines


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
    latents = [read_latent(dataset, ordinal, sample) for ordinal, sample in zip(group, samples, strict=True)]
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
