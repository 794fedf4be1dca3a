"""A dataset of the archive's size in commits alone: its tars are holes. For opening and listing, not for reading."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from shards_data import IDENTITY, PROVENANCE, TEXT_IDENTITY

from shards.format.commit import Blob, Commit, LatentSummary, MemberInfo, SampleInfo, TextSummary, commit_bytes
from shards.format.dataset_info import DatasetInfo, Generation, TextSetInfo, write_info
from shards.format.keys import sample_key
from shards.format.names import commit_name, tar_name
from shards.format.sealed_json import canonical_digest
from shards.storage import open_storage

UNITS, SAMPLES = 2_500, 64
SIZES = ((480, 832), (832, 480), (704, 1280), (1280, 704))
CATEGORIES = ("생활/문화", "스포츠", "news", None)


def write_commits(root: Path, num_units: int = UNITS, num_samples: int = SAMPLES) -> None:
    """Commits of `num_units` units of latents (64 each) and of their text, with holes for tars."""
    for kind in ("latents", "text/default"):
        (root / kind).mkdir(parents=True)
    for unit in range(num_units):
        keys = [_key(unit, place) for place in range(num_samples)]
        latents = tuple(_latent(unit, place, key) for place, key in enumerate(keys))
        _write(root, "latents", unit, canonical_digest(IDENTITY), latents)
        texts = tuple(_text(place, key) for place, key in enumerate(keys))
        _write(root, "text/default", unit, canonical_digest(TEXT_IDENTITY), texts)
    count = num_units * num_samples
    generation = Generation(
        name="gen-000", plan_sha256="0" * 64, first_unit=0, num_units=num_units, num_candidates=count, num_records=count
    )
    text_sets = {"default": TextSetInfo(identity=TEXT_IDENTITY)}
    write_info(open_storage(root), DatasetInfo(identity=IDENTITY, text_sets=text_sets, generations=(generation,)))


def _key(unit: int, place: int) -> str:
    height, width = SIZES[place % 4]
    return sample_key(str(3_000_000 + unit * SAMPLES + place), place * 500, 49, height, width)


def _sha256(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _members(place: int, key: str, name: str, dtype: str, shape: tuple[int, ...], size: int) -> tuple[MemberInfo, ...]:
    start = 1024 + place * (size + 4096)
    digest = _sha256(key, name)
    document = MemberInfo(suffix="json", offset=start, size=1500, sha256=digest)
    fields = {"dtype": dtype, "shape": shape, "check": digest[:8]}
    return document, MemberInfo(suffix=name, offset=start + 2560, size=size, sha256=digest, **fields)


def _latent(unit: int, place: int, key: str) -> SampleInfo:
    height, width = SIZES[place % 4]
    clip = str(3_000_000 + unit * SAMPLES + place)
    summary = LatentSummary(
        clip=clip, start_ms=place * 500, frames=49, height=height, width=width, source_media="video",
        category=CATEGORIES[place % 4],
    )  # fmt: skip
    shape = (48, 13, height // 16, width // 16)
    return SampleInfo(
        key=key, summary=summary, members=_members(place, key, "latent.npy.zst", "float16", shape, 3_900_000)
    )


def _text(place: int, key: str) -> SampleInfo:
    tokens = 40 + place * 5
    members = _members(place, key, "text.npy.zst", "bfloat16", (tokens, 4096), 2_200_000)
    return SampleInfo(key=key, summary=TextSummary(variants=1, tokens=(tokens,)), members=members)


def _write(root: Path, kind: str, unit: int, identity: str, samples: tuple[SampleInfo, ...]) -> None:
    sha256, size = _sha256(kind, unit), 270_000_000
    tar = Blob(name=tar_name(kind, unit, sha256), size=size, sha256=sha256)
    commit = Commit(
        kind=kind, unit=unit, identity_sha256=identity, tar=tar, ledger=None, samples=samples, provenance=PROVENANCE
    )
    (root / tar.name).touch()
    os.truncate(root / tar.name, size)
    (root / commit_name(kind, unit)).write_bytes(commit_bytes(commit))
