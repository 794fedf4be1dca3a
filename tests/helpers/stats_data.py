"""Datasets whose latents look like a VAE's: smooth in space, alike in time, of its own mean and deviation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shards_data import IDENTITY, PREVIEW, PROVENANCE

from shards.format.arrays import array_facts, encode_array
from shards.format.dataset_info import DatasetInfo, Generation, write_info
from shards.format.keys import sample_key
from shards.format.ledger import LedgerRow, WindowRow
from shards.format.sealed_json import canonical_json
from shards.storage import open_storage
from shards.write.shard_writer import ShardWriter

CHANNELS, SAMPLES = 48, 12
SHAPE = (CHANNELS, 5, 12, 20)
Plant = Callable[[int, int, np.ndarray], np.ndarray]
"""Changes the latent of (unit, place)."""


def vae_like(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A float32 latent C×T×H×W: coarse noise made larger, a little fine noise, near N(0, 1) over many clips."""
    channels, frames, height, width = shape
    coarse = rng.standard_normal((channels, 1, -(-height // 4), -(-width // 4)))
    smooth = np.repeat(np.repeat(coarse, 4, axis=2), 4, axis=3)[..., :height, :width]
    fine = 0.4 * rng.standard_normal((channels, frames, height, width))
    offset = 0.3 * rng.standard_normal((channels, 1, 1, 1))
    return ((0.85 * smooth + fine) * np.exp(0.1 * rng.standard_normal()) + offset).astype(np.float32)


def write_latents(
    root: Path | str,
    num_units: int = 6,
    plant: Plant | None = None,
    *,
    scratch: Path,
    samples: int = SAMPLES,
    planned_units: int | None = None,
    first_unit: int = 0,
    shape: tuple[int, ...] = SHAPE,
    notes: dict[str, str] | None = None,
    preview: bytes = PREVIEW,
) -> None:
    """Units of `samples` clips with one window each, one refused candidate a unit, and dataset.json."""
    storage = open_storage(root)
    scratch.mkdir(exist_ok=True)
    for unit in range(first_unit, num_units):
        _write_unit(storage, unit, samples, plant or (lambda unit, place, latent: latent), scratch, shape, preview)
    total = planned_units or num_units
    generation = Generation(
        name="gen-000",
        plan_sha256=hashlib.sha256(b"a plan").hexdigest(),
        first_unit=0,
        num_units=total,
        num_candidates=total * (samples + 1),
        num_records=total * (samples + 1),
    )
    write_info(storage, DatasetInfo(identity=IDENTITY, generations=(generation,), notes=notes or {}))


def clip_name(unit: int, place: int) -> str:
    return f"clip-{unit:02d}-{place:02d}"


def key_of(unit: int, place: int, shape: tuple[int, ...] = SHAPE) -> str:
    return sample_key(clip_name(unit, place), 0, 4 * shape[1] - 3, 16 * shape[2], 16 * shape[3])


def _write_unit(
    storage: Any, unit: int, num: int, plant: Plant, scratch: Path, shape: tuple[int, ...], preview: bytes
) -> None:
    rows = []
    with ShardWriter(storage, "latents", unit, IDENTITY, scratch, PROVENANCE) as writer:
        for place in range(num):
            rng = np.random.default_rng([unit, place])
            latent = plant(unit, place, vae_like(rng, shape)).astype(np.float16)
            key, clip = key_of(unit, place, shape), clip_name(unit, place)
            frames, height, width = 4 * shape[1] - 3, 16 * shape[2], 16 * shape[3]
            meta = {"clip": clip, "decisions": {}, "latent": array_facts(latent)}
            writer.add(
                key,
                {
                    "json": canonical_json(meta),
                    "latent.npy.zst": encode_array(latent),
                    "preview.jpg": preview + rng.bytes(8),
                },
                {"clip": clip, "start_ms": 0, "frames": frames, "height": height, "width": width,
                 "source_media": "video", "category": "news"},
            )  # fmt: skip
            window = WindowRow(key=key, start_seconds=0.0, status="accepted", reason=None, detail=None)
            rows.append(_row(unit * (num + 1) + len(rows), clip, "accepted", None, None, (window,)))
        rows.append(_row(unit * (num + 1) + len(rows), f"lost-{unit}", "rejected", "fetch", "fetch-404", ()))
        writer.seal(rows)


def _row(ordinal: int, clip: str, status: Any, stage: str | None, reason: str | None, windows: tuple) -> LedgerRow:
    return LedgerRow(
        candidate=ordinal, clip_id=clip, source=f"video/{clip}.json", status=status, stage=stage, reason=reason,
        detail="HTTP 404" if reason else None, retryable=bool(reason), attempts=1, windows=windows,
        seconds={"fetch": 0.25}, bytes=100,
    )  # fmt: skip
