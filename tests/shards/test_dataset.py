"""The reader: what was written comes back, by key and by ordinal, in this process and in others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.read.dataset import open_dataset


def test_every_sample_is_what_its_json_says(tiny_shards: Path) -> None:
    from shards.format.arrays import array_facts

    dataset = open_dataset(tiny_shards)
    assert len(dataset) == len(dataset.samples) == 24
    for place, sample in enumerate(dataset.samples):
        latent = dataset.latent(sample.key)
        assert array_facts(latent) == dataset.meta(place)["latent"]
        assert np.array_equal(latent, dataset.latent(place))
        facts = [array_facts(dataset.text(place, variant)) for variant in range(sample.num_variants)]
        assert facts == dataset.text_meta(sample.key)["text"]
    assert {sample.media for sample in dataset.samples} == {"video", "image"}
