"""`export --plain`: one tar a unit with latent and text together and nothing compressed, for any webdataset user."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from shards.console import with_progress
from shards.errors import UserError
from shards.format.sealed_json import canonical_json
from shards.read.dataset import Dataset
from shards.storage.local import TEMPORARY


def export_plain(dataset: Dataset, target: Path) -> list[Path]:
    """Write `shard-000012.tar` (of several roots: `root-1-shard-…`) for every unit into `target`, by webdataset.

    A sample is `<key>.json` and `<key>.latent.npy`, and with a text set `<key>.text.json`, `<key>.text.npy`,
    `<key>.text1.npy` …; bfloat16 stays its bits in uint16, as the JSON says. Every array is checked as it is read.
    Raises UserError when `target` holds files already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: not an empty folder", expected="a new or an empty folder")
    target.mkdir(parents=True, exist_ok=True)
    written = []
    samples = with_progress(range(len(dataset)), len(dataset), f"export to {target}")
    for (root, unit), places in groupby(samples, lambda place: dataset.shard(place)[0:3:2]):
        name = f"shard-{unit:06d}.tar" if root == 0 else f"root-{root}-shard-{unit:06d}.tar"
        _write_unit(dataset, places, target, name)
        written.append(target / name)
    return written


def _write_unit(dataset: Dataset, places: Iterator[int], target: Path, name: str) -> None:
    import webdataset

    temporary = target / f"{TEMPORARY}{name}"
    try:
        with webdataset.TarWriter(str(temporary), encoder=False, mtime=0) as out:
            for place in places:
                out.write(plain_sample(dataset, place))
        temporary.replace(target / name)
    finally:
        temporary.unlink(missing_ok=True)


def plain_sample(dataset: Dataset, place: int) -> dict[str, Any]:
    """One sample as webdataset's writer takes it: bytes by suffix, and `__key__`."""
    sample = dataset.samples[place]
    members: dict[str, Any] = {"__key__": sample.key, "json": canonical_json(dataset.meta(place))}
    members["latent.npy"] = _npy(dataset.latent(place))
    if sample.num_variants:
        members["text.json"] = canonical_json(dataset.text_meta(place))
    for variant in range(sample.num_variants):
        members[f"text{variant or ''}.npy"] = _npy(dataset.text(place, variant))
    return members


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()
