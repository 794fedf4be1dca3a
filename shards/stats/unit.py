"""Statistics of one unit: each sample is read once and leaves a few numbers; the cache keeps them by the tar's digest.

A cached unit is one `.npz` without pickles, about 45 kB for 64 samples of 48 channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.errors import ShardDamage
from shards.format.arrays import decode_array, frame_checksum
from shards.format.commit import Commit, LatentSummary, SampleInfo, TextSummary
from shards.format.names import JSON_MEMBER, LATENT_MEMBER
from shards.format.sealed_json import parse_json
from shards.stats.counter import Histograms
from shards.stats.features import FEATURES, LatentFeatures, latent_features
from shards.storage.base import Storage

CACHE_VERSION = 2
"""Of what the cache keeps: raise it when a number changes its meaning."""
SECONDS_EDGES = (0, 1, 2, 4, 6, 8, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200, 3600)
SHARE_EDGES = (0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
MEASURED = {
    "motion": "share of the picture that moves",
    "black_share": "share of black pixels",
    "kept_share": "share of the picture kept",
}
"""What stage 1 measures of each window, and how it is shown."""
TOKEN_EDGES = tuple(range(0, 545, 32))
CHARACTER_EDGES = (0, 25, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400)
DECISIONS = ("aspect", "interlace", "rotation", "matrix", "range", "vbi_lines", "bars")
_SCRIPTS = {
    "Hangul": re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]"),
    "Kana": re.compile(r"[\u3040-\u30ff]"),
    "Han": re.compile(r"[\u4e00-\u9fff]"),
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
}


class UnitStats(NamedTuple):
    """Numbers of one unit: of N latents that could be read, or of a text set (N is 0: its embeddings are not read)."""

    keys: list[str]
    clips: list[str]
    is_image: np.ndarray
    """bool [N]: one latent frame."""
    features: np.ndarray
    """float32 [N, 3, C]: see `features.FEATURES`."""
    prints: np.ndarray
    """uint8 [N, B]: fingerprints."""
    digests: list[str]
    """Of the latent's bytes: 16 hex digits of the frame's sha256."""
    previews: list[str]
    """The same of the preview strip; empty: it has none."""
    tally: Histograms
    """Counts; under `problem` what is wrong with single samples."""


_LISTS, _ARRAYS = ("keys", "clips", "digests", "previews"), ("is_image", "features", "prints")


def latent_unit(storage: Storage, commit: Commit, wanted: Collection[str] | None = None) -> UnitStats:
    """Read the samples of a unit of latents, or those `wanted`. A damaged sample is a count under `problem`."""
    tally, rows, seen_clips = Histograms(), [], set()
    num_channels = 0
    for sample in commit.samples:
        if wanted is not None and sample.key not in wanted:
            continue
        try:
            meta, latent = read_latent(storage, commit, sample)
        except ShardDamage as damage:
            tally.add("problem", f"damaged: {damage.what}", sample.key)
            continue
        num_channels = num_channels or (len(latent) if latent.ndim == 4 and latent.size else 0)
        if latent.ndim != 4 or not latent.size or len(latent) != num_channels:
            tally.add("problem", f"no latent of {num_channels} channels: {list(latent.shape)}", sample.key)
            continue
        found = latent_features(latent)
        if not found.is_finite:
            tally.add("problem", "not finite: it holds infinities or NaN", sample.key)
        if found.is_constant:
            tally.add("problem", "constant: no channel of the latent varies", sample.key)
        summary = sample.summary
        assert isinstance(summary, LatentSummary)  # noqa: S101 - the commit was parsed as one of latents
        count_sample(tally, meta, summary, sample.key, is_new_clip=summary.clip not in seen_clips)
        seen_clips.add(summary.clip)
        rows.append((sample, summary.clip, latent.shape[1] == 1, found))
    return _stack(rows, tally)


def text_unit(storage: Storage, commit: Commit, wanted: Collection[str] | None = None) -> UnitStats:
    """Count captions, tokens and cuts of a unit of text; its embeddings are not read."""
    tally = Histograms()
    for sample in commit.samples:
        if wanted is not None and sample.key not in wanted:
            continue
        summary = sample.summary
        assert isinstance(summary, TextSummary)  # noqa: S101 - as above
        for tokens in summary.tokens:
            tally.add_number("tokens", tokens, TOKEN_EDGES)
            tally.add("token_total", "tokens", times=tokens)
        tally.add("variants", summary.variants)
        try:
            count_text(tally, read_json(storage, commit, sample), sample.key)
        except ShardDamage as damage:
            tally.add("problem", f"damaged: {damage.what}", sample.key)
    return _stack([], tally)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/wanshards/stats`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanshards" / "stats"


def read_cached(cache: Path, name: str) -> UnitStats | None:
    """The unit that was written under `name`; None where there is none, or none that can be read."""
    try:
        with np.load(_cache_path(cache, name), allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            values = {field: file[field] for field in _ARRAYS} | {field: head[field] for field in _LISTS}
            return UnitStats(**values, tally=Histograms.of(head["tally"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # the unit is read again


def write_cached(cache: Path, name: str, stats: UnitStats) -> None:
    """Keep a unit. Processes may share the folder: a file is complete or absent."""
    path = _cache_path(cache, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {field: getattr(stats, field) for field in _LISTS} | {"tally": stats.tally.plain()}
    arrays = {field: getattr(stats, field) for field in _ARRAYS}
    temporary = path.with_name(f".writing-{secrets.token_hex(8)}")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    temporary.replace(path)


def _cache_path(cache: Path, name: str) -> Path:
    return cache / f"v{CACHE_VERSION}" / name[:2] / f"{name}.npz"


def read_latent(storage: Storage, commit: Commit, sample: SampleInfo) -> tuple[dict[str, Any], np.ndarray]:
    """A sample's JSON and latent by one read, each checked against the commit. Raises ShardDamage."""
    document, array = sample.member(JSON_MEMBER), sample.member(LATENT_MEMBER)
    if document is None or array is None or array.shape is None or array.dtype is None or array.check is None:
        raise ShardDamage(storage.url(commit.tar.name), "no latent", member=sample.key)
    first = min(document.offset, array.offset)
    size = max(document.offset + document.size, array.offset + array.size) - first
    buffer = _buffer(size)
    if storage.read_into(commit.tar.name, first, buffer) < size:
        raise ShardDamage(storage.url(commit.tar.name), "cut short", member=sample.key, offset=first)
    text = bytes(buffer[document.offset - first :][: document.size])
    meta = _checked_json(text, document.sha256, commit.tar.name, sample.key)
    frame = buffer[array.offset - first :][: array.size]
    if frame_checksum(frame) != int(array.check, 16):
        raise ShardDamage("array", "its checksum is not the one in the commit", member=sample.key)
    return meta, decode_array(frame, shape=array.shape, dtype=array.dtype)


def read_json(storage: Storage, commit: Commit, sample: SampleInfo) -> dict[str, Any]:
    """A sample's JSON, checked against the commit. Raises ShardDamage."""
    document = sample.member(JSON_MEMBER)
    if document is None:
        raise ShardDamage(storage.url(commit.tar.name), "no JSON", member=sample.key)
    data = storage.get_range(commit.tar.name, document.offset, document.size)
    return _checked_json(data, document.sha256, commit.tar.name, sample.key)


def count_sample(
    tally: Histograms, meta: Mapping[str, Any], summary: LatentSummary, key: str, *, is_new_clip: bool
) -> None:
    """Count what a sample's JSON says: of its window always, of its clip once."""
    tally.add("bucket", f"{summary.frames}×{summary.height}×{summary.width}")
    tally.add("category", summary.category or "(none)")
    window = _part(meta, "window")
    if "ground" in window:
        tally.add("window", re.sub(r"\d+(\.\d+)?", "n", str(window["ground"])), key)
    for name in MEASURED:
        if isinstance(value := _part(meta, "measured").get(name), int | float):
            tally.add_number(name, float(value), SHARE_EDGES)
    if not is_new_clip:
        return
    probed, decisions = _part(meta, "probed"), _part(meta, "decisions")
    if isinstance(seconds := probed.get("duration_seconds"), int | float):
        tally.add_number("clip_seconds", float(seconds), SECONDS_EDGES)
    if isinstance(fps := probed.get("fps"), int | float):
        tally.add("source_fps", f"{fps:.4g}")
    for field in ("codec", "pixel_format"):
        if field in probed:
            tally.add(f"source_{field}", probed[field])
    if probed:
        tally.add("source_size", f"{probed.get('width')}×{probed.get('height')}")
    _count_decisions(tally, decisions, key)
    for defect in meta.get("defects") or ():
        tally.add("defect", re.sub(r"\d+", "n", str(defect)), key)


def count_text(tally: Histograms, meta: Mapping[str, Any], key: str) -> None:
    """Count what a text sample's JSON says of its captions."""
    for caption in meta.get("captions") or ():
        tally.add_number("caption_characters", len(str(caption)), CHARACTER_EDGES)
        tally.add("script", script_of(str(caption)), key)
    cuts = [cut for of_variant in meta.get("cut") or () for cut in of_variant if isinstance(cut, Mapping)]
    for cut in cuts:
        tally.add("cut", f"{cut.get('level')}: {cut.get('why')}", key)
    if any(cut.get("why") != "repeated" for cut in cuts):
        tally.add("shortened", "samples whose captions lost a sentence to the limit", key)
    if "refused" in meta:
        tally.add("no_words", str(meta["refused"]).split(":", maxsplit=1)[0], key)
    for skipped in meta.get("skipped") or ():
        tally.add("skipped_variant", _part({"s": skipped}, "s").get("why"), key)


def script_of(text: str) -> str:
    """The script of most letters of a text: 'Hangul', 'Latin' …; 'no letters' where there are none."""
    letters = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    best = max(letters, key=lambda name: letters[name])
    return best if letters[best] else "no letters" if text.strip() else "empty"


def _count_decisions(tally: Histograms, decisions: Mapping[str, Any], key: str) -> None:
    for name in DECISIONS:
        decision = _part(decisions, name)
        if decision:
            value = decision.get("value")
            if isinstance(value, list):
                value = "some" if any(value) else "none"
            tally.add(f"decision/{name}", f"{value} · {decision.get('ground')}", key)
    if "frame_rate" in decisions:
        is_constant = _part(decisions, "frame_rate").get("constant")
        tally.add("decision/frame_rate", "constant" if is_constant else "variable", key)
    for name in ("truncated", "damaged"):
        if name in decisions:
            tally.add(f"decision/{name}", _part(decisions, name).get("ground"), key)
    differences = _part(decisions, "differences")
    tally.add("differs", "none" if not differences else "some")
    for field, pair in differences.items():
        tally.add("difference", field, key)
        if isinstance(pair, list) and len(pair) == 2:
            tally.add(f"difference/{field}", _difference(field, *pair), key)


def _difference(field: str, declared: Any, found: Any) -> str:
    if field == "seconds" and isinstance(declared, int | float) and isinstance(found, int | float):
        by = found - declared
        size = next(limit for limit in (0.5, 1, 2, 5, 10, 60, float("inf")) if abs(by) <= limit)
        how = "longer" if by > 0 else "shorter"
        return f"file {how} by more than 60 s" if size == float("inf") else f"file {how} by up to {size:g} s"
    return f"{declared} in the JSON, {found} in the file"


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = value.get(name)
    return part if isinstance(part, Mapping) else {}


def _stack(rows: list[tuple[SampleInfo, str, bool, LatentFeatures]], tally: Histograms) -> UnitStats:
    features = [found.values for _, _, _, found in rows]
    prints = [found.fingerprint for _, _, _, found in rows]
    return UnitStats(
        [sample.key for sample, *_ in rows],
        [clip for _, clip, *_ in rows],
        np.array([is_image for _, _, is_image, _ in rows], bool),
        np.stack(features) if rows else np.zeros((0, len(FEATURES), 0), np.float32),
        np.stack(prints) if rows else np.zeros((0, 0), np.uint8),
        [_member_digest(sample, LATENT_MEMBER) for sample, *_ in rows],
        [_member_digest(sample, "preview.jpg") for sample, *_ in rows],
        tally,
    )


def _member_digest(sample: SampleInfo, suffix: str) -> str:
    member = sample.member(suffix)
    return member.sha256[:16] if member else ""


def _checked_json(data: bytes, sha256: str, tar: str, key: str) -> dict[str, Any]:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ShardDamage(tar, "its JSON is not the one in the commit", member=key)
    value = parse_json(data, tar, key)
    if not isinstance(value, dict):
        raise ShardDamage(tar, "its JSON is no object", member=key)
    return value


_BUFFERS = threading.local()


def _buffer(size: int) -> memoryview:
    # Kept for each thread: mapping four new megabytes costs a fifth of a sample's time.
    have = getattr(_BUFFERS, "value", None)
    if have is None or len(have) < size:
        have = _BUFFERS.value = bytearray(size)
    return memoryview(have)[:size]
