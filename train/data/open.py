"""Open the dataset that a config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.console import LOG
from shards.read.dataset import Dataset, open_dataset
from shards.storage.patience import set_patience
from train.config.train import TrainConfig, dataset_roots


def open_data(config: TrainConfig, pin: dict[str, Any] | None = None) -> Dataset:
    """Open the configured dataset: at the configured revision, or at a pinned one."""
    set_patience(config.storage)
    data = config.data
    cache = None if data.cache is None else Path(data.cache)
    LOG.info("opening the dataset: %s", ", ".join(dataset_roots(data)))
    dataset = open_dataset(dataset_roots(data), data.text_set, revision=data.revision, pin=pin, cache=cache)
    if missing := dataset.missing_units():
        LOG.warning("%s: %s; `wanshards verify` names the others", data.root, missing)
    return dataset
