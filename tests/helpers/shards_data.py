"""Small datasets of random samples, written by the real writer."""

from __future__ import annotations

import base64
import hashlib
import shutil
from pathlib import Path

import numpy as np

from shards.format.arrays import array_facts, encode_array
from shards.format.dataset_info import BucketInfo, DatasetInfo, Generation, TextSetInfo, write_info
from shards.format.keys import sample_key
from shards.format.ledger import LedgerRow, WindowRow
from shards.format.sealed_json import canonical_json
from shards.read.dataset import open_dataset
from shards.storage import open_storage
from shards.storage.base import Storage
from shards.write.shard_writer import ShardWriter, write_null_embeddings

IDENTITY = {"format_version": 1, "encoder": {"weights": "0" * 64}, "transform": {"sizes": "small"}, "dtype": "float16"}
TEXT_IDENTITY = {"format_version": 1, "encoder": {"weights": "1" * 64}, "template": "{object} {scene}", "dim": 64}
PROVENANCE = {"torch": "2.13.0", "device": "cpu"}
TEXT_DIM = 64
# A grey JPEG of 8×8 pixels.
PREVIEW = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////////////"
    "////////////////////wAALCAAIAAgBAREA/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUF"
    "BAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVW"
    "V1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi"
    "4+Tl5ufo6erx8vP09fb3+Pn6/9oACAEBAAA/ACv/2Q=="
)
# One bucket lies, one stands; frames × height × width, and the latent's C × T × H × W.
SIZES = ((17, 96, 160), (17, 160, 96))


def write_dataset(
    root: Path | str,
    num_units: int = 3,
    samples_per_unit: int = 8,
    seed: int = 0,
    prefix: str = "clip",
    first_unit: int = 0,
    channels: int = 48,
    identity: dict | None = None,
    scratch: Path | None = None,
    max_variants: int = 2,
    plan: bytes = b"a plan",
    lengths: tuple[int, ...] = (17,),
) -> None:
    """Write `num_units` units of latents and of the text set `default`, the null embeddings and dataset.json."""
    storage = open_storage(root)
    rng = np.random.default_rng(seed)
    identity = identity or IDENTITY
    scratch = scratch or Path(root) / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    sizes = [size for size in SIZES for size in (*((frames, *size[1:]) for frames in lengths), (1, *size[1:]))]
    for unit in range(first_unit, first_unit + num_units):
        _write_unit(storage, unit, samples_per_unit, rng, prefix, channels, identity, scratch, max_variants, lengths)
    null = [_embedding(rng, tokens) for tokens in (1, 9)]
    write_null_embeddings(
        storage, "default", TEXT_IDENTITY, *null, scratch=scratch, provenance=PROVENANCE, negative_prompt="blurred"
    )
    num_all = first_unit + num_units
    storage.put("plan/gen-000.jsonl.zst", plan)
    generation = Generation(
        name="gen-000",
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        first_unit=0,
        num_units=num_all,
        num_candidates=num_all * (samples_per_unit + 1),
        num_records=num_all * (samples_per_unit + 1),
    )
    info = DatasetInfo(
        identity=identity,
        text_sets={"default": TextSetInfo(identity=TEXT_IDENTITY)},
        buckets=tuple(BucketInfo(frames=f, height=h, width=w) for f, h, w in sizes),
        generations=(generation,),
        notes={"encoders": "random arrays"},
    )
    write_info(storage, info)


def _write_unit(
    storage: Storage,
    unit: int,
    num_samples: int,
    rng: np.random.Generator,
    prefix: str,
    channels: int,
    identity: dict,
    scratch: Path,
    max_variants: int,
    lengths: tuple[int, ...],
) -> None:
    latents = ShardWriter(storage, "latents", unit, identity, scratch, PROVENANCE)
    texts = ShardWriter(storage, "text/default", unit, TEXT_IDENTITY, scratch, PROVENANCE)
    rows = []
    with latents, texts:
        for place in range(num_samples):
            number = unit * num_samples + place
            # Two windows of every third clip; every fourth sample is an image.
            clip = f"{prefix}-{number - (place % 3 == 2)}"
            length = lengths[number % len(lengths)]
            rows.append(_write_sample(latents, texts, clip, place, rng, channels, max_variants, length))
        rows.append(_rejected(f"{prefix}-{unit}-gone"))
        first = unit * len(rows)
        latents.seal([row.model_copy(update={"candidate": first + place}) for place, row in enumerate(rows)])
        texts.seal()


def _write_sample(
    latents: ShardWriter,
    texts: ShardWriter,
    clip: str,
    place: int,
    rng: np.random.Generator,
    channels: int,
    max_variants: int,
    length: int,
) -> LedgerRow:
    _, height, width = SIZES[place // 2 % 2]
    frames = 1 if place % 4 == 3 else length
    start_ms = 2500 if place % 3 == 2 else 0
    key = sample_key(clip, start_ms, frames, height, width)
    shape = (channels, (frames - 1) // 4 + 1, height // 16, width // 16)
    latent = rng.standard_normal(shape).astype(np.float16)
    media = "image" if frames == 1 else "video"
    category = ("news", "drama", None)[place % 3]
    window = {"start_seconds": start_ms / 1000, "num_frames": frames, "fps": 24.0}
    meta = {
        "clip": clip,
        "source": f"video/batch_0001/{clip}.json",
        "window": window,
        "bucket": {"width": width, "height": height},
        "category": category,
        "latent": array_facts(latent),
    }
    summary = {"clip": clip, "start_ms": start_ms, "frames": frames, "height": height, "width": width}
    latents.add(
        key,
        {"json": canonical_json(meta), "latent.npy.zst": encode_array(latent), "preview.jpg": PREVIEW},
        {**summary, "source_media": media, "category": category},
    )
    embeddings = [_embedding(rng, int(rng.integers(2, 20))) for _ in range(1 + place % max_variants)]
    tokens = [len(embedding) for embedding in embeddings]
    captions = [f"caption {variant} of {clip}" for variant in range(len(embeddings))]
    members = {f"text{variant or ''}.npy.zst": encode_array(array) for variant, array in enumerate(embeddings)}
    facts = [array_facts(array) for array in embeddings]
    text_meta = {"captions": captions, "cut": [[] for _ in captions], "tokens": tokens, "text": facts}
    text_summary = {"variants": len(tokens), "tokens": tokens}
    texts.add(key, {"json": canonical_json(text_meta), **members}, text_summary)
    start_seconds = start_ms / 1000
    accepted = WindowRow(key=key, start_seconds=start_seconds, status="accepted", reason=None, detail=None)
    return _row(clip, accepted)


def _embedding(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Finite bfloat16 bits: the upper half of float32 values."""
    values = rng.standard_normal((tokens, TEXT_DIM)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _row(clip: str, window: WindowRow) -> LedgerRow:
    return LedgerRow(
        candidate=0,
        clip_id=clip,
        source=f"video/batch_0001/{clip}.json",
        status="accepted",
        stage=None,
        reason=None,
        detail=None,
        retryable=False,
        attempts=1,
        windows=(window,),
        seconds={"fetch": 0.5},
        bytes=1000,
    )


def _rejected(clip: str) -> LedgerRow:
    return LedgerRow(
        candidate=0,
        clip_id=clip,
        source=f"video/batch_0001/{clip}.json",
        status="rejected",
        stage="fetch",
        reason="fetch-404",
        detail="404 Not Found",
        retryable=True,
        attempts=3,
        windows=(),
        seconds={},
        bytes=0,
    )


def flip_a_latent(source: Path, root: Path) -> Path:
    """A copy of a dataset with one flipped bit in its first latent."""
    shutil.copytree(source, root)
    dataset = open_dataset([root])
    tar = next(iter(sorted((root / "latents").glob("*.tar"))))
    data = bytearray(tar.read_bytes())
    name = dataset.samples[0].key.encode() + b".latent.npy.zst"
    data[data.index(name) + 512 + 400] ^= 1
    tar.write_bytes(data)
    return root
