"""Other readers get the same arrays: webdataset and Hugging Face `datasets`, on the shards and on the plain export."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from shards_data import write_dataset

from shards.read.dataset import Dataset, open_dataset
from shards.show.export_plain import export_plain

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def npy_zst(data: bytes) -> np.ndarray:
    """The two-line handler that docs/shard-format.md gives to webdataset users."""
    return np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(data)))


def tars(root: Path, kind: str) -> list[str]:
    return sorted(str(path) for path in (root / kind).glob("shard-*.tar"))


def test_webdataset_reads_the_shards(tiny_shards: Path) -> None:
    import webdataset

    dataset = open_dataset(tiny_shards)
    handlers = [webdataset.handle_extension("npy.zst", npy_zst), webdataset.handle_extension("jpg", bytes)]
    stream = webdataset.WebDataset(tars(tiny_shards, "latents"), shardshuffle=False).decode(*handlers)
    keys = []
    for sample in stream:
        keys.append(sample["__key__"])
        assert np.array_equal(sample["latent.npy.zst"], dataset.latent(sample["__key__"]))
        assert sample["json"] == dataset.meta(sample["__key__"])
    assert keys == [sample.key for sample in dataset.samples]
    stream = webdataset.WebDataset(tars(tiny_shards, "text/default"), shardshuffle=False).decode(*handlers)
    assert [s["__key__"] for s in stream if np.array_equal(s["text.npy.zst"], dataset.text(s["__key__"]))] == keys


def test_hugging_face_datasets_reads_the_shards(tmp_path: Path) -> None:
    # It wants the same members in the first samples of a tar: one number of caption variants.
    write_dataset(tmp_path / "root", max_variants=1)
    dataset = open_dataset(tmp_path / "root")
    kinds = {"latents": ("latent.npy.zst", dataset.latent), "text/default": ("text.npy.zst", dataset.text)}
    for kind, (member, read) in kinds.items():
        rows = hugging_face(tars(tmp_path / "root", kind), tmp_path / "cache")
        assert [row["__key__"] for row in rows] == [sample.key for sample in dataset.samples]
        for row in rows:
            assert np.array_equal(np.asarray(row[member]), read(row["__key__"]))


def hugging_face(files: list[str], cache: Path) -> list[dict[str, Any]]:
    import datasets

    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True, cache_dir=str(cache))
    return list(stream)


def test_the_plain_export_is_one_tar_a_unit_for_any_webdataset(tiny_shards: Path, tmp_path: Path) -> None:
    import webdataset

    dataset = open_dataset(tiny_shards)
    written = export_plain(dataset, tmp_path / "plain")
    assert [path.name for path in written] == [f"shard-{unit:06d}.tar" for unit in range(3)]
    samples = list(webdataset.WebDataset([str(path) for path in written], shardshuffle=False).decode())
    assert_plain(samples, dataset)
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {path.name for path in written}


def assert_plain(samples: list[dict[str, Any]], dataset: Dataset) -> None:
    assert [sample["__key__"] for sample in samples] == [sample.key for sample in dataset.samples]
    for place, sample in enumerate(samples):
        assert np.array_equal(sample["latent.npy"], dataset.latent(place))
        assert sample["json"] == dataset.meta(place) and sample["text.json"] == dataset.text_meta(place)
        for variant in range(dataset.samples[place].num_variants):
            assert np.array_equal(sample[f"text{variant or ''}.npy"], dataset.text(place, variant))


def test_system_tar_and_python_read_the_shards(tiny_shards: Path) -> None:
    for path in tars(tiny_shards, "latents"):
        with tarfile.open(path) as archive:
            names = archive.getnames()
            assert names[0] == "__wanshards__/header" and names[-1] == "__wanshards__/footer"
            header = archive.extractfile(names[0])
            assert header is not None and json.load(header)["format_version"] == 1
