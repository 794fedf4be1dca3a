"""A step's loss and gradients: this rank's micro-batches, and the loss over all ranks.

Shapes: B slots, C latent channels, T H W latent frames and sides, S text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.data.batch import Batch
from train.objective import add_noise, loss_weight, model_timestep, sample_sigma, sigma_density, slot_losses
from train.parallel.fsdp import sum_in_backward
from train.parallel.ranks import Ranks
from train.run.trainee import Trainee


class StepLoss(NamedTuple):
    """Loss of a batch."""

    mean: float
    """Sum over the slots ÷ the global batch."""
    slots: tuple[float, ...]
    """Each slot's, float32; nothing is computed from them."""


class GlobalLoss(NamedTuple):
    """Loss of the global batch, and what is recorded of its slots."""

    mean: float
    slots: list[float]
    num_image_to_video: int
    keys: tuple[str, ...]
    substituted: tuple[tuple[str, str], ...]


def over_ranks(ranks: Ranks, batch: Batch, own: StepLoss, global_batch: int) -> GlobalLoss:
    """Put a step's loss together from what each rank has of it; every rank calls this."""
    keys, substituted = batch.step_keys, batch.substituted
    slots = [0.0] * global_batch
    for slot, loss in zip(batch.slots, own.slots, strict=True):
        slots[slot] = loss
    numbers = [own.mean, float(batch.image_first_B.sum()), float(len(substituted)), *slots]
    if ranks.layout.ulysses_rank:  # the ranks of a sequence have the same slots, and each the full loss of them
        numbers = [0.0] * len(numbers)
    mean, num_image_to_video, num_substituted, *slots = ranks.all_reduce_sum(*numbers)
    if num_substituted and not ranks.alone:
        pairs = {bad: taken for part in ranks.gather(substituted) for bad, taken in part}
        substituted, keys = tuple(pairs.items()), tuple(pairs.get(key, key) for key in keys)
    return GlobalLoss(mean, slots, int(num_image_to_video), keys, substituted)


def backward(
    trainee: Trainee,
    batch: Batch,
    scale_loss: Callable[[Tensor], Tensor],
    stopping: Callable[[], bool] = lambda: False,
) -> StepLoss | None:
    """Gather the gradients of a batch's loss, micro-batch by micro-batch, and return the loss.

    None, with the gradients dropped, where `stopping` turns true before a micro-batch: a step takes minutes on a small
    card, and a scheduler's grace time does not.

    A slot's loss is the mean over its own trained elements; the batch's is the sum over its slots ÷ the global batch.
    """
    data = trainee.config.data
    total = torch.zeros((), dtype=torch.float64, device=trainee.device)
    parts: list[Tensor] = []
    for start in range(0, len(batch.keys), data.micro_batch):
        if stopping():
            for weight in trainee.weights.values():
                weight.grad = None
            return None
        rows = slice(start, start + data.micro_batch)
        losses_B = losses(trainee, batch, rows)
        loss = losses_B.sum() / data.global_batch
        if trainee.sharded:
            sum_in_backward(trainee.model, wanted=start + data.micro_batch >= len(batch.keys))
        scale_loss(loss).backward()
        total += loss.detach()
        parts.append(losses_B.detach())
    return StepLoss(float(total), tuple(torch.cat(parts).tolist()))


def losses(trainee: Trainee, batch: Batch, rows: slice) -> Tensor:
    """Weighted loss of each slot of a micro-batch, B float32, with its graph."""
    objective, device = trainee.config.objective, trainee.device
    density = sigma_density(objective)
    sigma_B = sample_sigma(batch.sigma_quantile_B[rows], density)
    image_first_B = batch.image_first_B[rows]
    latent_BCTHW, noise_BCTHW, text_BSE = (
        send(x[rows], device) for x in (batch.latent_BCTHW, batch.noise_BCTHW, batch.text_BSE)
    )
    noisy_BCTHW, target_BCTHW = add_noise(latent_BCTHW, noise_BCTHW, sigma_B, image_first_B)
    velocity_BCTHW = trainee.model(
        noisy_BCTHW,
        model_timestep(sigma_B).to(device),
        image_first_B,
        text_BSE,
        batch.dropout_key_B[rows],
    )
    return slot_losses(velocity_BCTHW, target_BCTHW, image_first_B, loss_weight(sigma_B, objective.weighting, density))


def send(x: Tensor, device: torch.device) -> Tensor:
    """Move to the device; to a GPU from pinned memory, so that the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def num_batch_tokens(trainee: Trainee, batch: Batch) -> int:
    """Video tokens of the global batch."""
    _, _, *sides = batch.latent_BCTHW.shape
    per_slot = 1
    for side, patch in zip(sides, trainee.dims.patch, strict=True):
        per_slot *= side // patch
    return per_slot * trainee.config.data.global_batch
