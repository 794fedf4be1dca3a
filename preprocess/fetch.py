"""Bring one clip to a local file: from beside its JSON, over HTTP(S), or from S3.

An attempt either completes the file or raises `Trouble`, which says whether another attempt may help now and whether
a later `wanprep retry` may. What is already on disk is kept between attempts and resumed by a ranged request.
No query string, user name or key of a URL ever reaches a log, a ledger or an exception: see `redact`.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from preprocess.clip_cache import ClipCache
from preprocess.config import CorpusConfig, FetchConfig
from preprocess.fetch_source import Limits, Partial, Source, Trouble, cache_name, open_source, redact
from preprocess.records import Record
from preprocess.rejection import ClipRejected, Rejection
from shards.console import LOG

VIDEO_SUFFIXES = (".mp4", ".mov", ".mxf", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".ts", ".m4v", ".wmv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0


class Stopped(Exception):
    """The build was asked to stop while this clip was under way; says nothing about the clip."""


class Clip(NamedTuple):
    """A clip's file, ready to be probed."""

    path: Path
    num_bytes: int
    attempts: int


class Fetcher:
    """Fetches clips for many threads at once, over shared connections, into one scratch folder."""

    def __init__(
        self, config: FetchConfig, corpus: CorpusConfig, scratch: Path, stop: threading.Event, parallel: int = 1
    ) -> None:
        self._config = config
        self._folder = Path(corpus.location) if Path(corpus.location).is_dir() else None
        self._scratch = scratch
        self._stop = stop
        self._source = Source(config, parallel)
        self._cache = ClipCache(Path(config.cache), config.cache_gib) if config.cache else None

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.close()

    @contextmanager
    def fetched(self, record: Record) -> Iterator[Clip]:
        """The clip of `record` as a local file for the length of the block.

        Raises ClipRejected (stage `fetch`, with its reason code) and Stopped.
        """
        beside = self._beside(record)
        if beside is not None:
            yield Clip(beside, beside.stat().st_size, attempts=0)
            return
        if record.url is None:
            raise _rejected(Trouble("no-source", "no URL in the record and no media file beside its JSON"), 0)
        folder = Path(tempfile.mkdtemp(prefix="clip-", dir=self._scratch))
        try:
            path = folder / f"clip{_suffix(record.url)}"
            yield self._cached(record.url, path)
        finally:
            shutil.rmtree(folder)

    def _cached(self, url: str, path: Path) -> Clip:
        if self._cache is None:
            return self._download(url, path)
        name = cache_name(url)
        if self._cache.take(name, path):
            return Clip(path, path.stat().st_size, attempts=0)
        clip = self._download(url, path)
        self._cache.keep(name, path)
        return clip

    def _download(self, url: str, path: Path) -> Clip:
        """Attempt by attempt until the file is whole, the attempts or the deadline are spent, or hope is."""
        deadline = time.monotonic() + self._config.deadline_seconds
        limits = Limits(deadline, self._config.timeout_seconds, self._config.max_mib << 20)
        with path.open("wb") as file:
            partial = Partial(file)
            for attempt in range(1, self._config.attempts + 1):
                if self._stop.is_set():
                    raise Stopped
                try:
                    open_source(self._source, url, partial, limits, self._stop.is_set)
                except Trouble as trouble:
                    wait_seconds = _wait_seconds(trouble, attempt)
                    last = attempt == self._config.attempts or not trouble.again
                    if last or time.monotonic() + wait_seconds > deadline:
                        raise _rejected(trouble, attempt) from None
                    LOG.debug("%s: %s, attempt %d, again in %.1f s", redact(url), trouble.reason, attempt, wait_seconds)
                    self._stop.wait(wait_seconds)
                else:
                    if self._stop.is_set():
                        raise Stopped
                    return Clip(path, partial.num_bytes, attempt)
        raise AssertionError("unreachable: attempts is positive")

    def _beside(self, record: Record) -> Path | None:
        """The media file of the record's kind with the JSON's stem in the JSON's folder, if there is one.

        A video's thumbnail often lies there too; of a record of unknown kind any medium will do, a video first.
        """
        if self._folder is None:
            return None
        source = self._folder / record.source
        kinds = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES}
        suffixes = kinds.get(record.media_type or "", VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        names = (source.with_suffix(cased) for suffix in suffixes for cased in (suffix, suffix.upper()))
        return next((path for path in names if path.is_file()), None)


def attempts_of(rejected: ClipRejected) -> int:
    """How many attempts a fetch made before it was given up; 0 for a rejection of another stage."""
    return int(getattr(rejected, "attempts", 0))


def _rejected(trouble: Trouble, attempts: int) -> ClipRejected:
    rejected = ClipRejected(Rejection("fetch", trouble.reason, trouble.detail, trouble.retryable))
    rejected.attempts = attempts  # type: ignore[attr-defined]
    return rejected


def _wait_seconds(trouble: Trouble, attempt: int) -> float:
    """What the server asked for, or exponential backoff with jitter, so that many workers do not come back as one."""
    if trouble.wait_seconds is not None:
        return trouble.wait_seconds
    ceiling = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** (attempt - 1))
    return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


def _suffix(url: str) -> str:
    """The file suffix of a URL's path when it is one of a medium; ffmpeg needs it for formats without a signature."""
    suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
    return suffix if suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES else ""
