"""Bring one clip to a local file: from beside its JSON, from the cache, over HTTP(S), or from S3.

An attempt either completes the file or raises `Trouble`, which says whether another attempt may help now and whether
a later `wanprep retry` may. What is already on disk is kept between attempts and resumed by a ranged request.
No query string, user name, cookie or key ever reaches a log, a ledger or an exception: see `clip_url.redact`.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from posixpath import splitext
from typing import NamedTuple
from urllib.parse import urlsplit

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.fields import LOCAL, SIGNED_URL
from preprocess.corpus.records import Record
from preprocess.corpus.url import cache_name, redact
from preprocess.fetch.cache import ClipCache
from preprocess.fetch.cloudfront import open_signer
from preprocess.fetch.hosts import AllowedHosts, Turns
from preprocess.fetch.http_download import HttpSource
from preprocess.fetch.s3_download import S3Source
from preprocess.fetch.transfer import ByteCounter, Limits, Partial, TransferStopped, Trouble
from preprocess.fetch.transport import CHUNK_BYTES
from preprocess.rejection import ClipRejected, Rejection
from shards.console import LOG

VIDEO_SUFFIXES = (".mp4", ".mov", ".mxf", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".ts", ".m4v", ".wmv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
SIGN_FIX = "its annotation's URL came signed, and a plan keeps no signature: set fetch.sign, or a mirror to s3://"


class Clip(NamedTuple):
    """A clip's file, ready to be probed."""

    path: Path
    num_bytes: int
    attempts: int


class FetchCounts(NamedTuple):
    """What a Fetcher has done so far."""

    num_bytes: int
    """Bytes that came over the network, those of broken attempts too."""
    num_connections: int
    num_beside: int
    """Clips that lay beside their JSON."""
    num_cached: int
    """Clips that the cache had."""
    num_downloaded: int
    num_again: int
    """Attempts after a clip's first."""


class Fetcher:
    """Fetches clips for many threads at once, over shared connections, into one scratch folder.

    Raises UserError where the config asks for what the environment lacks: a signing key, a folder for the cache.
    """

    def __init__(
        self, config: FetchConfig, corpus: CorpusConfig, scratch: Path, stop: threading.Event, parallel: int = 1
    ) -> None:
        self._config = config
        self._folder = Path(corpus.location) if Path(corpus.location).is_dir() else None
        self._root = corpus.media_root
        self._scratch = scratch
        self._stop = stop
        self._signer = open_signer(config.sign)
        hosts, turns = AllowedHosts(config.allow_hosts), Turns(config.per_host)
        self._http = HttpSource(hosts, turns, self._signer, parallel)
        self._s3 = S3Source(hosts, turns, config.s3_endpoint, parallel)
        self._cache = ClipCache(Path(config.cache), config.cache_gib) if config.cache else None
        self._meter = ByteCounter()
        self._lock = threading.Lock()
        self._done = {"num_beside": 0, "num_cached": 0, "num_downloaded": 0, "num_again": 0}

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.transport.close()
        self._s3.close()

    @property
    def counts(self) -> FetchCounts:
        """What has been done so far; to be read at any time, from any thread."""
        num_connections = self._http.transport.num_connections + self._s3.transport.num_connections
        with self._lock:
            return FetchCounts(self._meter.num_bytes, num_connections, **self._done)

    @contextmanager
    def fetched(self, record: Record) -> Iterator[Clip]:
        """The clip of `record` as a local file for the length of the block.

        Raises ClipRejected (stage `fetch`, with its reason code and attempts) and Stopped.
        """
        beside = self._local(record) or self._beside(record)
        if beside is not None:
            self._count("num_beside")
            yield Clip(beside, beside.stat().st_size, attempts=0)
            return
        if record.url is None:
            raise _rejected(Trouble("no-source", "no URL in the record and no media file beside its JSON"), 0)
        path = self._scratch / f"clip-{secrets.token_hex(8)}{_suffix(record.url)}"
        try:
            yield self._cached(record, record.url, path)
        finally:
            path.unlink(missing_ok=True)

    def _cached(self, record: Record, url: str, path: Path) -> Clip:
        if self._cache is None:
            return self._download(record, url, path)
        name = cache_name(url)
        if self._cache.take(name, path):
            self._count("num_cached")
            return Clip(path, path.stat().st_size, attempts=0)
        clip = self._download(record, url, path)
        self._cache.keep(name, path)
        return clip

    def _download(self, record: Record, url: str, path: Path) -> Clip:
        """Attempt by attempt until the file is whole, the attempts or the deadline are spent, or hope is."""
        config = self._config
        limits = Limits(
            config.deadline_seconds, config.timeout_seconds, config.max_mib << 20,
            config.min_kib_per_second * 1024, self._stop.is_set,
        )  # fmt: skip
        with path.open("xb", buffering=CHUNK_BYTES) as file:
            partial = Partial(file, self._meter)
            for attempt in range(1, config.attempts + 1):
                trouble = self._attempt(url, partial, limits)
                if self._stop.is_set():
                    raise TransferStopped
                if trouble is None:
                    self._count("num_downloaded")
                    return Clip(path, partial.num_bytes, attempt)
                wait_seconds = _wait_seconds(trouble, attempt)
                last = attempt == config.attempts or not trouble.again
                if last or time.monotonic() + wait_seconds > limits.deadline:
                    raise _rejected(self._explained(trouble, record), attempt)
                LOG.debug("%s: %s, attempt %d, again in %.1f s", redact(url), trouble.reason, attempt, wait_seconds)
                self._count("num_again")
                self._stop.wait(wait_seconds)
        raise AssertionError("unreachable: attempts is positive")

    def _attempt(self, url: str, partial: Partial, limits: Limits) -> Trouble | None:
        """One attempt; what went wrong as a value: in its chain are the network's errors, which name the whole URL."""
        url = self._mirrored(url)
        try:
            if url.startswith("s3://"):
                self._s3.attempt(url, partial, limits)
            else:
                self._http.attempt(url, partial, limits)
        except Trouble as trouble:
            return trouble
        except TransferStopped:
            pass
        return None

    def _explained(self, trouble: Trouble, record: Record) -> Trouble:
        if trouble.reason in ("fetch-401", "fetch-403") and SIGNED_URL in record.defects and self._signer is None:
            trouble.detail += f"; {SIGN_FIX}"
        return trouble

    def _mirrored(self, url: str) -> str:
        """`url` with its prefix replaced where `fetch.mirrors` says so; the longest prefix wins."""
        mirrors = self._config.mirrors
        for prefix in sorted(mirrors, key=len, reverse=True):
            if url.startswith(prefix):
                return mirrors[prefix] + url[len(prefix) :]
        return url

    def _count(self, what: str) -> None:
        with self._lock:
            self._done[what] += 1

    def _local(self, record: Record) -> Path | None:
        """The clip that a `file:` URL names, within the corpus's root. Raises ClipRejected."""
        if record.url is None or not record.url.startswith(LOCAL):
            return None
        if self._root is None:
            raise ClipRejected(Rejection("fetch", "no-source", "a local path, and the corpus is not on this machine"))
        root, name = self._root.resolve(), record.url.removeprefix(LOCAL)
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ClipRejected(Rejection("fetch", "fetch-outside-corpus", f"{name} leads out of {root}"))
        if not path.is_file():
            raise ClipRejected(Rejection("fetch", "no-source", f"{name}: no such file in {root}", retryable=True))
        return path

    def _beside(self, record: Record) -> Path | None:
        """The media file of the record's kind with the JSON's stem in the JSON's folder, if there is one.

        A video's thumbnail often lies there too; of a record of unknown kind any medium will do, a video first.
        """
        if self._folder is None or not record.source.lower().endswith(".json"):
            return None
        source = self._folder / record.source
        kinds = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES}
        suffixes = kinds.get(record.media_type or "", VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        names = (source.with_suffix(cased) for suffix in suffixes for cased in (suffix, suffix.upper()))
        return next((path for path in names if path.is_file()), None)


def _rejected(trouble: Trouble, attempts: int) -> ClipRejected:
    return ClipRejected(Rejection("fetch", trouble.reason, trouble.detail, trouble.retryable), attempts)


def _wait_seconds(trouble: Trouble, attempt: int) -> float:
    """Exponential backoff, on top of what the server asked for; jittered, so that many workers do not come as one."""
    ceiling = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** (attempt - 1))
    return (trouble.wait_seconds or 0.0) + ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


def _suffix(url: str) -> str:
    """The file suffix of a URL's path when it is one of a medium; ffmpeg needs it for formats without a signature."""
    suffix = splitext(urlsplit(url).path)[1].lower()
    return suffix if suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES else ""
