"""What a batch is made of: a slot's plan, what is read for it, and all of them as tensors.

Shape letters: B slots, C latent channels, T H W latent frames and sides, S text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shards.errors import UserError
from shards.format.arrays import MAX_LATENT_RMS, root_mean_square, to_float32
from train.data.draws import SlotDraws
from train.data.sampler import OrderedBatch
from train.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, Bucket

if TYPE_CHECKING:
    from torch import Tensor

    from shards.read.dataset import Dataset, Sample


class SlotPlan(NamedTuple):
    """One slot of one step before anything is read: which sample, drawn how."""

    slot: int
    """Number in the global batch."""
    ordinal: int
    """Index into the dataset's samples."""
    draws: SlotDraws


class SlotItem(NamedTuple):
    """One slot, read and drawn."""

    plan: SlotPlan
    key: str
    latent: np.ndarray
    """C×T×H×W float32."""
    noise: np.ndarray
    """C×T×H×W float32."""
    text: np.ndarray
    """Tokens×E uint16, the bits of bf16."""
    replaced: str | None
    """Key of the unreadable sample that this one replaces."""


@dataclass(frozen=True)
class Batch:
    """This process's slots of one step, on the CPU."""

    step: int
    epoch: int
    bucket: Bucket
    keys: tuple[str, ...]
    slots: tuple[int, ...]
    step_keys: tuple[str, ...]
    """Samples of all the step's slots, those of other processes included."""
    latent_BCTHW: Tensor
    """float32."""
    noise_BCTHW: Tensor
    """float32."""
    text_BSE: Tensor
    """bfloat16, zero rows up to the model's text length: the model attends to them."""
    sigma_quantile_B: Tensor
    """float64 in (0, 1)."""
    image_first_B: Tensor
    """bool: image-to-video."""
    dropout_key_B: Tensor
    """int64."""
    substituted: tuple[tuple[str, str], ...]
    """(unreadable key, key taken instead)."""


_FIX = "build its unit again, or set data.on_bad_sample=substitute"
_FIX_RMS = f"`wanshards verify ROOT --deep` finds such latents; {_FIX}"


def read_latent(dataset: Dataset, ordinal: int, sample: Sample) -> np.ndarray:
    """A latent as C×T×H×W float32. Raises UserError when it is not of its bucket, not finite, or not normalised."""
    latent = to_float32(dataset.latent(ordinal))
    frames = (sample.frames - 1) // TEMPORAL_STRIDE + 1
    expected = (frames, sample.height // SPATIAL_STRIDE, sample.width // SPATIAL_STRIDE)
    if latent.shape[1:] != expected:
        raise UserError(f"sample {sample.key}: its latent is {latent.shape}", expected=f"(C, {expected})", fix=_FIX)
    if (rms := root_mean_square(latent)) > MAX_LATENT_RMS:
        problem = f"sample {sample.key}: the root mean square of its latent is {rms:.3g}"
        raise UserError(problem, expected=f"near 1, at most {MAX_LATENT_RMS:g}: it is not normalised", fix=_FIX_RMS)
    return latent


def check_text(text: np.ndarray, text_len: int, key: str) -> np.ndarray:
    """`text` itself. Raises UserError when it is longer than the model takes: it is never cut."""
    if len(text) > text_len:
        raise UserError(f"sample {key}: its caption has {len(text)} tokens, the model takes {text_len}")
    return text


def pad_texts(texts: Sequence[np.ndarray], text_len: int) -> Tensor:
    """uint16 bf16 bits of several lengths to B×text_len×E bfloat16, zero rows behind."""
    import torch

    padded = np.zeros((len(texts), text_len, texts[0].shape[1]), dtype=np.uint16)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(padded).view(torch.bfloat16)


def stack(step: int, chosen: OrderedBatch, step_keys: list[str], items: Sequence[SlotItem], text_len: int) -> Batch:
    """This process's slots of a step as tensors; `step_keys`, of all its slots, has substitutes in place."""
    import torch

    for item in items:
        step_keys[item.plan.slot] = item.key
    draws = [item.plan.draws for item in items]
    return Batch(
        step=step,
        epoch=chosen.epoch,
        bucket=chosen.bucket,
        keys=tuple(item.key for item in items),
        slots=tuple(item.plan.slot for item in items),
        step_keys=tuple(step_keys),
        latent_BCTHW=torch.from_numpy(np.stack([item.latent for item in items])),
        noise_BCTHW=torch.from_numpy(np.stack([item.noise for item in items])),
        text_BSE=pad_texts([item.text for item in items], text_len),
        sigma_quantile_B=torch.tensor([draw.sigma_quantile for draw in draws], dtype=torch.float64),
        image_first_B=torch.tensor([draw.image_to_video for draw in draws]),
        dropout_key_B=torch.tensor([draw.dropout_key for draw in draws], dtype=torch.int64),
        substituted=tuple((item.replaced, item.key) for item in items if item.replaced is not None),
    )
