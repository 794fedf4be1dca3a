"""The work on one candidate, in four parts, one for each pool of `pools.py`.

    fetch     HTTP, S3 or a file beside the annotation                  any thread, no order
    decode    probe → bucket → windows → captions → decode → preview    any thread, no order
    encode    VAE                                                       one thread, as clips become ready
    write     stored type → compression → shard, ledger row             one thread, in the plan's order within a unit

A bad clip ends as a ledger row with its stage and reason. So does an unexpected exception in the work on one clip: its
row is `internal-error`, retryable, and the log has the traceback. Errors caused by the user or the machine are raised.
"""

from __future__ import annotations

import errno
import re
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from preprocess.config import PictureSize, PrepConfig
from preprocess.corpus.records import Record
from preprocess.facts import ClipFacts, recorded_facts
from preprocess.fetch.fetcher import Clip, Fetcher
from preprocess.fetch.transfer import TransferStopped
from preprocess.plan.plan import Candidate
from preprocess.rejection import INTERNAL_ERROR, ClipRejected, Rejection, short
from preprocess.text.captions import compose_all
from preprocess.video.bucket import choose_bucket, kept_share
from preprocess.video.decode import decode_window, preview_strip, transform_identity
from preprocess.video.measure import Measured, measure_window
from preprocess.video.probe import probe_clip
from preprocess.video.window import Window, choose_windows
from shards.console import LOG
from shards.errors import DISK_FULL, UserError
from shards.format.arrays import array_facts, encode_array
from shards.format.keys import sample_key
from shards.format.ledger import LedgerRow, WindowRow
from shards.format.names import FORMAT_VERSION, LATENT_MEMBER, PREVIEW_MEMBER
from shards.format.sealed_json import canonical_json
from shards.write.shard_writer import ShardWriter

if TYPE_CHECKING:
    from preprocess.encoders.encoders import VaeEncoder

Reserve = Callable[[int], None]
"""Called with a number of bytes: waits until that many bytes of frames may be decoded."""
_OF_THE_DISK = {*DISK_FULL, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN}
_QUERY = re.compile(r"\?[^\s'\"<>]*=[^\s'\"<>]*")


class Decoded(NamedTuple):
    """One window of a clip: its frames, or why there are none."""

    window: Window
    frames_THWC: np.ndarray | None
    """uint8; None once it is encoded."""
    rejection: Rejection | None
    measured: Measured | None = None
    """None where nothing was decoded."""
    preview: bytes | None = None
    """A JPEG strip, where one is wanted."""


class Fetched(NamedTuple):
    """A candidate after its fetch: either `clip` is a file on this machine, or `rejection` says why there is none."""

    candidate: Candidate
    clip: Clip | None
    stack: ExitStack
    """Keeps the clip's file; `Preparer.decode` closes it, which removes a downloaded file."""
    rejection: Rejection | None
    attempts: int
    seconds: dict[str, float]


class Prepared(NamedTuple):
    """A candidate after decoding."""

    candidate: Candidate
    facts: ClipFacts | None
    bucket: PictureSize | None
    windows: tuple[Decoded, ...]
    rejection: Rejection | None
    """Why the complete clip was rejected; None where it was not (its windows may be)."""
    attempts: int
    num_bytes: int
    seconds: dict[str, float]
    inspected: dict[str, Any] | None = None
    """What probe had read of a file that it rejected."""


class Encoded(NamedTuple):
    """A candidate after encoding; its frames are freed."""

    prepared: Prepared
    latents: tuple[np.ndarray | None, ...]
    """fp32, one per window; None for a window without frames."""
    seconds: float
    """Time in the encoder."""


class Preparer:
    """What the threads that fetch and decode need; shared by all of them."""

    def __init__(self, config: PrepConfig, fetcher: Fetcher, count_tokens: Callable[[str], int], scratch: Path) -> None:
        self._config = config
        self._fetcher = fetcher
        self._count_tokens = count_tokens
        self._scratch = scratch

    def fetch(self, candidate: Candidate) -> Fetched:
        """Fetch the candidate's clip to this machine. Raises only errors for which `propagates` is true."""
        record, began, stack = candidate.record, time.perf_counter(), ExitStack()
        clip, rejection, attempts = None, None, 0
        try:
            clip = stack.enter_context(self._fetcher.fetched(record, is_retry=candidate.is_retry))
            attempts = clip.attempts
        except ClipRejected as rejected:
            attempts, rejection = rejected.attempts, rejected.rejection
        except Exception as error:
            if propagates(error, self._scratch):
                raise
            rejection = internal_error("fetch", error, record.clip_id)
        seconds = {} if rejection else {"fetch": round(time.perf_counter() - began, 3)}
        return Fetched(candidate, clip, stack, rejection, attempts, seconds)

    def decode(self, fetched: Fetched, reserve: Reserve, config: PrepConfig | None = None) -> Prepared:
        """Probe and decode a fetched clip, then close its file. Raises only errors for which `propagates` is true.

        `config`: the build's config with the choices that the plan recorded for the candidate's unit; None: the
        build's config.
        """
        config = config or self._config
        candidate, clip, attempts = fetched.candidate, fetched.clip, fetched.attempts
        record, seconds, rejection = candidate.record, dict(fetched.seconds), fetched.rejection
        if clip is None:
            return Prepared(candidate, None, None, (), rejection, attempts, 0, seconds)
        facts = bucket = inspected = None
        decoded: tuple[Decoded, ...] = ()
        clock, stage = _Clock(seconds), "probe"
        try:
            with fetched.stack:
                facts = probe_clip(clip.path, record, config)
                clock.lap("probe")
                stage = "bucket"
                bucket = _bucket(facts, config)
                stage = "window"
                windows = choose_windows(facts, record, config)
                reserve(sum(3 * bucket.width * bucket.height * window.num_frames for window in windows))
                stage = "decode"
                decoded = tuple(self._decode(clip.path, record, facts, window, bucket, config) for window in windows)
                decoded = tuple(each._replace(rejection=clip.judged(each.rejection)) for each in decoded)
                clock.lap("decode")
        except ClipRejected as rejected:
            rejection, inspected = rejected.rejection, rejected.facts
        except Exception as error:
            if propagates(error, self._scratch):
                raise
            rejection = internal_error(stage, error, record.clip_id)
        return Prepared(candidate, facts, bucket, decoded, rejection, attempts, clip.num_bytes, seconds, inspected)

    def _decode(
        self, path: Path, record: Record, facts: ClipFacts, window: Window, bucket: PictureSize, config: PrepConfig
    ) -> Decoded:
        """Frames of one window; a rejection instead if the record has no caption for this window."""
        stage = "caption"
        try:
            end_seconds = window.start_seconds + window.num_frames / config.window.fps
            captions = compose_all(record, window.start_seconds, end_seconds, config.captions, self._count_tokens)
            if isinstance(captions, Rejection):
                return Decoded(window, None, captions)
            stage = "decode"
            frames_THWC = decode_window(path, facts, window, bucket, config)
            measured = measure_window(frames_THWC, kept_share(facts.display_width, facts.display_height, bucket))
            if (refused := _refused_by_measure(measured, window, config)) is not None:
                return Decoded(window, None, refused, measured)
            num_previewed = config.shards.preview_frames
            preview = preview_strip(frames_THWC, num_previewed) if num_previewed else None
        except ClipRejected as rejected:
            return Decoded(window, None, rejected.rejection)
        except Exception as error:
            if propagates(error, self._scratch):
                raise
            return Decoded(window, None, internal_error(stage, error, record.clip_id))
        return Decoded(window, frames_THWC, None, measured, preview)


def _refused_by_measure(measured: Measured, window: Window, config: PrepConfig) -> Rejection | None:
    if measured.black_share > config.window.max_black_share:
        detail = f"{measured.black_share:g} of it is black, window.max_black_share {config.window.max_black_share:g}"
        return Rejection("window", "black", detail)
    if measured.motion < config.window.min_motion and window.num_frames > 1:
        detail = f"{measured.motion:g} of the picture moves, window.min_motion {config.window.min_motion:g}"
        return Rejection("window", "no-motion", detail)
    return None


def propagates(error: Exception, scratch: Path) -> bool:
    """Whether an error concerns more than one clip: the user or the machine has to fix it, or the build is stopping."""
    is_disk = isinstance(error, OSError) and (error.errno in _OF_THE_DISK or not scratch.exists())
    return is_disk or isinstance(error, UserError | TransferStopped)


def internal_error(stage: str, error: Exception, clip_id: str) -> Rejection:
    """The rejection of a clip after an unexpected exception; the traceback is logged, without the queries of URLs."""
    LOG.error(
        "clip %s: internal error in stage %s; the build continues\n%s",
        clip_id, stage, _QUERY.sub("?…", "".join(traceback.format_exception(error)).rstrip()),
    )  # fmt: skip
    # The message may hold paths of a scratch folder, but the same clip must give the same ledger bytes every time:
    # so the row names only the exception's type and the line of code.
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {Path(place[0].filename).name}:{place[0].lineno}" if place else ""
    return Rejection(stage, INTERNAL_ERROR, f"{type(error).__name__}{where}; the log has the traceback", True)


def encode_clip(prepared: Prepared, vae: VaeEncoder) -> Encoded:
    """Encode the windows of a prepared candidate one by one, and free their frames. Raises UserError: out of memory."""
    start = time.perf_counter()
    windows, latents = [], []
    for decoded in prepared.windows:
        latent_CTHW, rejection = None, decoded.rejection
        try:
            if decoded.frames_THWC is not None:
                latent_CTHW = vae.encode(decoded.frames_THWC)
        except UserError:
            raise
        except Exception as error:  # a broken device fails on every clip: ten internal errors in a row stop the build
            rejection = internal_error("encode", error, prepared.candidate.record.clip_id)
        windows.append(decoded._replace(frames_THWC=None, rejection=rejection))
        latents.append(latent_CTHW)
    seconds = time.perf_counter() - start if prepared.windows else 0.0
    return Encoded(prepared._replace(windows=tuple(windows)), tuple(latents), seconds)


def write_clip(encoded: Encoded, writer: ShardWriter, config: PrepConfig) -> LedgerRow:
    """Write an encoded candidate's windows into the shard, and return its ledger row."""
    prepared = encoded.prepared
    rejections = [prepared.rejection] if prepared.rejection else []
    rows: list[WindowRow] = []
    for decoded, latent_CTHW in zip(prepared.windows, encoded.latents, strict=False):
        key, rejection = None, decoded.rejection
        if latent_CTHW is not None:
            try:
                key, rejection = _write_window(prepared, decoded, latent_CTHW, writer, config)
            except OSError:
                raise
            except Exception as error:  # UserError too: the writer checks a sample before it writes any part of it
                rejection = internal_error("encode", error, prepared.candidate.record.clip_id)
        if rejection:
            rejections.append(rejection)
        rows.append(_window_row(decoded, key, rejection))
    seconds = {**prepared.seconds, "encode": round(encoded.seconds, 3)}
    # If there is an internal error, it gives the row its reason: somebody has to look at it.
    rejections.sort(key=lambda each: each.reason != INTERNAL_ERROR)
    return _row(prepared, rows, rejections[0] if rejections else None, seconds)


def latent_identity(config: PrepConfig, vae: VaeEncoder) -> dict[str, Any]:
    """Everything that changes the values of the latents; no paths, URLs, workers or library versions."""
    return {
        "format_version": FORMAT_VERSION,
        "vae": vae.identity(),
        "transform": transform_identity(config),
        "latent_dtype": config.shards.latent_dtype,
    }


def store_latent(latent_CTHW: np.ndarray, dtype: str) -> np.ndarray | Rejection:
    """The latent in the type that is stored (bf16 as its bits in uint16), or a rejection."""
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
        "json": canonical_json(_sample_json(prepared, decoded, latent, config)),
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


def _sample_json(prepared: Prepared, decoded: Decoded, latent: np.ndarray, config: PrepConfig) -> dict[str, Any]:
    """The JSON of a sample: its source, the decisions and their reasons. No URL, path or time of day."""
    record, facts, bucket = prepared.candidate.record, prepared.facts, prepared.bucket
    window, measured = decoded.window, decoded.measured
    if facts is None or bucket is None or measured is None:
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
        "probed": facts.model_dump(mode="json", exclude={"decisions", "picture_seconds"}),
        "decisions": facts.decisions,
        "measured": measured.model_dump(),
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


def _window_row(decoded: Decoded, key: str | None, rejection: Rejection | None) -> WindowRow:
    return WindowRow(
        key=key,
        start_seconds=decoded.window.start_seconds,
        status="rejected" if rejection else "accepted",
        reason=rejection.reason if rejection else None,
        detail=short(rejection.detail) if rejection else None,
        measured=decoded.measured.model_dump() if decoded.measured else None,
    )


def _row(
    prepared: Prepared, windows: list[WindowRow], rejection: Rejection | None, seconds: dict[str, float]
) -> LedgerRow:
    """The ledger row. A candidate is accepted if at least one window is; else `rejection` gives the row its reason."""
    is_accepted = any(window.status == "accepted" for window in windows)
    why = None if is_accepted else rejection
    facts = recorded_facts(prepared.facts) if prepared.facts else prepared.inspected
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
        facts=None if is_accepted else facts,
    )


class _Clock:
    """Writes into `seconds`, for each stage, the time since the previous `lap`."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] = round(now - self._last, 3)
        self._last = now
