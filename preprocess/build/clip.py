"""The work on one candidate, in three parts: a decoder thread's, the encoder's, and the writer's behind it.

    prepare   fetch → probe → bucket → windows → captions → decode → preview     any thread, no order
    encode    VAE                                                  one thread, in the order of candidates
    write     stored type → compression → shard, ledger row        one thread, in the same order, behind the encoder

A bad clip ends as a ledger row with its stage and reason; anything else that goes wrong is a bug and propagates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from preprocess.config import PictureSize, PrepConfig
from preprocess.corpus.records import Record
from preprocess.facts import ClipFacts
from preprocess.fetch.fetcher import Fetcher
from preprocess.plan.plan import Candidate
from preprocess.rejection import ClipRejected, Rejection, short
from preprocess.text.captions import compose_all
from preprocess.video.bucket import choose_bucket
from preprocess.video.decode import decode_window, preview_strip, transform_identity
from preprocess.video.probe import probe_clip
from preprocess.video.window import Window, choose_windows
from shards.format.arrays import array_facts, encode_array
from shards.format.keys import sample_key
from shards.format.ledger import LedgerRow, WindowRow
from shards.format.names import FORMAT_VERSION, LATENT_MEMBER, PREVIEW_MEMBER
from shards.format.sealed_json import canonical_json
from shards.write.shard_writer import ShardWriter

if TYPE_CHECKING:
    from preprocess.encoders.encoders import VaeEncoder

Reserve = Callable[[int], None]
"""Waits until so many bytes of frames may be decoded."""


class Decoded(NamedTuple):
    """One window of a clip: its frames, or why there are none."""

    window: Window
    frames_THWC: np.ndarray | None
    """uint8; None once it is encoded."""
    rejection: Rejection | None
    preview: bytes | None = None
    """A JPEG strip, where one is wanted."""


class Prepared(NamedTuple):
    """A candidate when the decoders are done with it."""

    candidate: Candidate
    facts: ClipFacts | None
    bucket: PictureSize | None
    windows: tuple[Decoded, ...]
    rejection: Rejection | None
    """Why the clip as a whole went no further."""
    attempts: int
    num_bytes: int
    seconds: dict[str, float]


class Encoded(NamedTuple):
    """A candidate when the encoder is done with it; the frames are gone."""

    prepared: Prepared
    latents: tuple[np.ndarray | None, ...]
    """fp32, one a window; None for a window without frames."""
    seconds: float
    """In the encoder."""


class Preparer:
    """What a decoder thread needs; shared by all of them."""

    def __init__(self, config: PrepConfig, fetcher: Fetcher, count_tokens: Callable[[str], int]) -> None:
        self._config = config
        self._fetcher = fetcher
        self._count_tokens = count_tokens

    def prepare(self, candidate: Candidate, reserve: Reserve) -> Prepared:
        """Bring one candidate to decoded frames. Never raises for a bad clip; raises `fetch.Stopped`."""
        seconds: dict[str, float] = {}
        clock = _Clock(seconds)
        facts = bucket = None
        attempts = num_bytes = 0
        try:
            with self._fetcher.fetched(candidate.record, is_retry=candidate.is_retry) as clip:
                attempts, num_bytes = clip.attempts, clip.num_bytes
                clock.lap("fetch")
                facts = probe_clip(clip.path, candidate.record, self._config)
                clock.lap("probe")
                bucket = _bucket(facts, self._config)
                windows = choose_windows(facts, candidate.record, self._config)
                reserve(sum(3 * bucket.width * bucket.height * window.num_frames for window in windows))
                decoded = tuple(self._decode(clip.path, candidate.record, facts, window, bucket) for window in windows)
                decoded = tuple(each._replace(rejection=clip.judged(each.rejection)) for each in decoded)
                clock.lap("decode")
        except ClipRejected as rejected:
            attempts = attempts or rejected.attempts
            return Prepared(candidate, facts, bucket, (), rejected.rejection, attempts, num_bytes, seconds)
        return Prepared(candidate, facts, bucket, decoded, None, attempts, num_bytes, seconds)

    def _decode(self, path: Path, record: Record, facts: ClipFacts, window: Window, bucket: PictureSize) -> Decoded:
        """Frames of one window, unless no caption of the record speaks of it."""
        end_seconds = window_end(window, self._config)
        captions = compose_all(record, window.start_seconds, end_seconds, self._config.captions, self._count_tokens)
        if isinstance(captions, Rejection):
            return Decoded(window, None, captions)
        try:
            frames_THWC = decode_window(path, facts, window, bucket, self._config)
        except ClipRejected as rejected:
            return Decoded(window, None, rejected.rejection)
        num_previewed = self._config.shards.preview_frames
        preview = preview_strip(frames_THWC, num_previewed) if num_previewed else None
        return Decoded(window, frames_THWC, None, preview)


def encode_clip(prepared: Prepared, vae: VaeEncoder) -> Encoded:
    """Encode a prepared candidate's windows, each alone. The frames are let go."""
    start = time.perf_counter()
    latents = tuple(
        None if decoded.frames_THWC is None else vae.encode(decoded.frames_THWC) for decoded in prepared.windows
    )
    seconds = time.perf_counter() - start if prepared.windows else 0.0
    windows = tuple(decoded._replace(frames_THWC=None) for decoded in prepared.windows)
    return Encoded(prepared._replace(windows=windows), latents, seconds)


def write_clip(encoded: Encoded, writer: ShardWriter, config: PrepConfig) -> LedgerRow:
    """Write an encoded candidate's windows into the shard; its ledger row."""
    prepared = encoded.prepared
    rejections = [prepared.rejection] if prepared.rejection else []
    rows: list[WindowRow] = []
    for decoded, latent_CTHW in zip(prepared.windows, encoded.latents, strict=False):
        key, rejection = None, decoded.rejection
        if latent_CTHW is not None:
            key, rejection = _write_window(prepared, decoded, latent_CTHW, writer, config)
        if rejection:
            rejections.append(rejection)
        rows.append(_window_row(decoded.window, key, rejection))
    seconds = {**prepared.seconds, "encode": round(encoded.seconds, 3)}
    return _row(prepared, rows, rejections[0] if rejections else None, seconds)


def latent_identity(config: PrepConfig, vae: VaeEncoder) -> dict[str, Any]:
    """What decides the latents' numbers: nothing of paths, URLs, workers or versions of libraries."""
    return {
        "format_version": FORMAT_VERSION,
        "vae": vae.identity(),
        "transform": transform_identity(config),
        "latent_dtype": config.shards.latent_dtype,
    }


def window_end(window: Window, config: PrepConfig) -> float:
    """Where a window ends, in seconds of the clip."""
    return window.start_seconds + window.num_frames / config.window.fps


def store_latent(latent_CTHW: np.ndarray, dtype: str) -> np.ndarray | Rejection:
    """The latent in its stored type (bf16 as uint16), or why it must not be stored."""
    if not np.isfinite(latent_CTHW).all():
        return Rejection("encode", "latent-not-finite", "the encoder gave values that are not numbers", retryable=True)
    if latent_CTHW.min() == latent_CTHW.max():
        return Rejection("encode", "latent-constant", f"every value is {latent_CTHW.flat[0]:g}")
    if dtype == "float32":
        return latent_CTHW
    if dtype == "bfloat16":
        return _to_bfloat16(latent_CTHW)
    limit = float(np.finfo(np.float16).max)
    if np.abs(latent_CTHW).max() > limit:
        return Rejection("encode", "latent-beyond-float16", f"a value of {np.abs(latent_CTHW).max():g}")
    return latent_CTHW.astype(np.float16)


def _write_window(
    prepared: Prepared, decoded: Decoded, latent_CTHW: np.ndarray, writer: ShardWriter, config: PrepConfig
) -> tuple[str | None, Rejection | None]:
    latent = store_latent(latent_CTHW, config.shards.latent_dtype)
    if isinstance(latent, Rejection):
        return None, latent
    record, window, bucket = prepared.candidate.record, decoded.window, prepared.bucket
    if bucket is None:
        raise ValueError("a sample without a bucket")
    start_ms = round(window.start_seconds * 1000)
    key = sample_key(record.clip_id, start_ms, window.num_frames, bucket.height, bucket.width)
    members = {
        "json": canonical_json(_sample_json(prepared, window, latent, config)),
        LATENT_MEMBER: encode_array(latent),
    }
    if decoded.preview is not None:
        members[PREVIEW_MEMBER] = decoded.preview
    summary = {
        "clip": record.clip_id,
        "start_ms": start_ms,
        "frames": window.num_frames,
        "height": bucket.height,
        "width": bucket.width,
        "source_media": prepared.facts.media if prepared.facts else "video",
        "category": record.category,
    }
    writer.add(key, members, summary)
    return key, None


def _sample_json(prepared: Prepared, window: Window, latent: np.ndarray, config: PrepConfig) -> dict[str, Any]:
    """What a sample says of itself: where it comes from and what was decided, and why; no URL, no path, no time."""
    record, facts, bucket = prepared.candidate.record, prepared.facts, prepared.bucket
    if facts is None or bucket is None:
        raise ValueError("a sample without facts or bucket")
    return {
        "clip": record.clip_id,
        "source": record.source,
        "category": record.category,
        "window": {
            "start_seconds": window.start_seconds,
            "num_frames": window.num_frames,
            "fps": config.window.fps,
            "ground": window.ground,
        },
        "bucket": {"width": bucket.width, "height": bucket.height},
        "declared": {
            "width": record.declared_width,
            "height": record.declared_height,
            "fps": record.declared_fps,
            "seconds": record.declared_seconds,
        },
        "probed": facts.model_dump(mode="json", exclude={"decisions"}),
        "decisions": facts.decisions,
        "defects": list(record.defects),
        "latent": array_facts(latent),
    }


def _bucket(facts: ClipFacts, config: PrepConfig) -> PictureSize:
    bucket = choose_bucket(facts, config.buckets)
    if isinstance(bucket, Rejection):
        raise ClipRejected(bucket)
    return bucket


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def _window_row(window: Window, key: str | None, rejection: Rejection | None) -> WindowRow:
    return WindowRow(
        key=key,
        start_seconds=window.start_seconds,
        status="rejected" if rejection else "accepted",
        reason=rejection.reason if rejection else None,
        detail=short(rejection.detail) if rejection else None,
    )


def _row(
    prepared: Prepared, windows: list[WindowRow], rejection: Rejection | None, seconds: dict[str, float]
) -> LedgerRow:
    """A candidate is accepted when at least one of its windows is; else the first reason is its reason."""
    is_accepted = any(window.status == "accepted" for window in windows)
    why = None if is_accepted else rejection
    return LedgerRow(
        candidate=prepared.candidate.ordinal,
        clip_id=prepared.candidate.record.clip_id,
        source=prepared.candidate.record.source,
        status="accepted" if is_accepted else "rejected",
        stage=why.stage if why else None,
        reason=why.reason if why else None,
        detail=short(why.detail) if why else None,
        retryable=bool(why and why.retryable),
        attempts=prepared.attempts,
        windows=tuple(windows),
        seconds=seconds,
        bytes=prepared.num_bytes,
    )


class _Clock:
    """Seconds between laps, noted by stage."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] = round(now - self._last, 3)
        self._last = now
