"""The buckets that a plan is for: the dataset's, or those named. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shards.errors import UserError
from shards.gpus import VaeMode
from train.config.model import TI2V_5B, DiTConfig
from train.config.train import TrainConfig
from train.geometry import Bucket

REFERENCE_SIZE = Bucket(49, 704, 1280)
"""Planned for where the dataset cannot be read."""


class Size(NamedTuple):
    """A bucket of the run and its share of the samples."""

    bucket: Bucket
    share: float


def read_sizes(config: TrainConfig, texts: Sequence[str]) -> tuple[list[Size], str, VaeMode]:
    """The buckets of the run, in words where they are from (the command, the dataset, or the reference size), and what
    the dataset was encoded in."""
    if texts:
        return [Size(parse_size(text), 1 / len(texts)) for text in texts], "as given", "fp32"
    from train.data.loader import select_samples
    from train.data.open import open_data
    from train.data.weights import kept_weights

    try:
        dataset = open_data(config)
        ordinals, _ = select_samples(dataset, config.data, hold_out_one=config.eval is not None)
        weights = [float(weight) for weight in kept_weights(dataset, ordinals, config.data.weights)]
    except UserError as error:
        words = str(error).splitlines()[0]
        return [Size(REFERENCE_SIZE, 1.0)], f"the reference's, since the dataset cannot be read ({words})", "fp32"
    mode: VaeMode = dataset.info.identity.get("vae", {}).get("precision", "fp32")
    counts: dict[Bucket, float] = {}
    for ordinal, weight in zip(ordinals, weights, strict=True):
        sample = dataset.samples[ordinal]
        bucket = Bucket(sample.frames, sample.height, sample.width)
        counts[bucket] = counts.get(bucket, 0) + weight
    return [Size(bucket, count / sum(weights)) for bucket, count in sorted(counts.items())], "the dataset's", mode


def parse_size(text: str) -> Bucket:
    """`1280x704x49`: width, height, frames. Raises UserError."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--size {text}: not a size", expected="width x height x frames, such as 1280x704x49")
    width, height, frames = map(int, parts)
    return Bucket(frames, height, width)


def read_dims(config: TrainConfig) -> tuple[DiTConfig, list[str]]:
    """The model's sizes, from the config, its checkpoint or the published model; and a note where it is the last."""
    if config.model.dims is not None:
        return config.model.dims, []
    checkpoint = config.model.checkpoint or ""
    if Path(checkpoint).exists():
        from train.model.load import read_dit_config

        return read_dit_config(checkpoint), []
    return TI2V_5B, [f"{checkpoint} is not here: sizes of Wan2.2-TI2V-5B are taken"]
