"""Get one clip as a local file: from beside its JSON, from the cache, over HTTP(S), or from S3.

An attempt either completes the file or raises `FetchError`, which says whether another attempt can help now and whether
a later `wanprep retry` can. Received bytes are kept between attempts and resumed by a ranged request.
No query string, user name, cookie or key ever reaches a log, a ledger or an exception: see `url.redact`.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from posixpath import splitext
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.fields import IMAGE_SUFFIXES, LOCAL, SIGNED_URL, VIDEO_SUFFIXES
from preprocess.corpus.records import Record
from preprocess.corpus.url import cache_name, redact
from preprocess.fetch.cache import ClipCache
from preprocess.fetch.cloudfront import open_signer
from preprocess.fetch.hosts import AllowedHosts, HostLimits
from preprocess.fetch.http_download import HttpSource
from preprocess.fetch.s3_download import S3Source
from preprocess.fetch.transfer import ByteCounter, FetchError, Limits, Partial, TransferStopped
from preprocess.fetch.transport import CHUNK_BYTES
from preprocess.rejection import ClipRejected, Rejection
from shards.console import LOG

_OF_SOUND_CLIPS = frozenset(
    {"too-short", "too-long", "too-large", "image", "hdr", "matrix-unsupported", "odd-rotation", "size-changes"}
)
"""Reason codes that the probe gives only to files that could be read without error."""
_PAGES = ("fetch-not-media", "fetch-empty")
"""Reasons for which a clip is refused whose host sent something else."""
MAX_REFUSED_IN_A_ROW = 8
"""Clips of a host refused for a server's error, none coming between, before its earlier clips prove nothing."""
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
SIGN_FIX = "its annotation's URL came signed, and a plan keeps no signature: set fetch.sign, or a mirror to s3://"


@dataclass
class Clip:
    """A clip's file, ready to be probed."""

    path: Path
    num_bytes: int
    attempts: int
    may_be_wrong: bool = False
    """Whether the file was fetched, and not by a retry: another download may give a better file."""
    is_refused: bool = False

    def judged(self, rejection: Rejection | None) -> Rejection | None:
        """`rejection`, made retryable once if it means that the file is bad; a bad file is removed from the cache."""
        if rejection is None or rejection.stage not in ("probe", "decode") or rejection.reason in _OF_SOUND_CLIPS:
            return rejection
        self.is_refused = True
        return rejection._replace(retryable=rejection.retryable or self.may_be_wrong)


class FetchCounts(NamedTuple):
    """Counts of a Fetcher, up to now."""

    num_bytes: int
    """Bytes received over the network, those of failed attempts included."""
    num_connections: int
    num_beside: int
    """Clips found beside their JSON."""
    num_cached: int
    """Clips found in the cache."""
    num_downloaded: int
    num_again: int
    """Attempts after a clip's first."""


class Fetcher:
    """Fetches clips for many threads at once, over shared connections, into one scratch folder.

    Raises UserError where the config needs something that is missing: a signing key, a folder for the cache.
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
        hosts = AllowedHosts(config.allow_hosts)
        self._host_limits = HostLimits(config.per_host, config.outage_minutes, scratch)
        self._known_good: dict[str, str] = {}
        self._refused_in_a_row: Counter[str] = Counter()
        self._wanted: Counter[str] = Counter()
        """Sources that are being downloaded now, those that wait for their host too."""
        self._http = HttpSource(hosts, self._host_limits, self._signer, parallel, config.user_agent)
        self._s3 = S3Source(hosts, self._host_limits, config.s3_endpoint, parallel)
        self._cache = ClipCache(Path(config.cache), config.cache_gib) if config.cache else None
        self._counter = ByteCounter()
        self._lock = threading.Lock()
        self._done = {"num_beside": 0, "num_cached": 0, "num_downloaded": 0, "num_again": 0}

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.transport.close()
        self._s3.close()

    @property
    def counts(self) -> FetchCounts:
        """The counts up to now; may be read from any thread."""
        num_connections = self._http.transport.num_connections + self._s3.transport.num_connections
        with self._lock:
            return FetchCounts(self._counter.num_bytes, num_connections, **self._done)

    @contextmanager
    def fetched(self, record: Record, *, is_retry: bool = False) -> Iterator[Clip]:
        """The clip of `record` as a local file during the block.

        Raises ClipRejected (stage `fetch`, with its reason code and attempts) and TransferStopped. A clip enters the
        cache after the block, unless a refusal by probe or decode passed through the block or through `Clip.judged`.
        """
        beside = self._local(record) or self._beside(record)
        if beside is not None:
            self._count("num_beside")
            yield Clip(beside, beside.stat().st_size, attempts=0)
            return
        if record.url is None:
            raise _rejected(FetchError("no-source", "no URL in the record and no media file beside its JSON"), 0)
        path = self._scratch / f"clip-{secrets.token_hex(8)}{_suffix(record.url)}"
        try:
            yield from self._kept(record, record.url, path, is_retry)
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _wanting(self, source: str) -> Iterator[None]:
        with self._lock:
            self._wanted[source] += 1
        try:
            yield
        finally:
            with self._lock:
                self._wanted -= Counter([source])

    def _kept(self, record: Record, url: str, path: Path, is_retry: bool) -> Iterator[Clip]:
        """The clip from the cache or the network; it is kept when the block has not refused it, and removed if so."""
        name = cache_name(url)
        is_cached = self._cache is not None and self._cache.take(name, path)
        if is_cached:
            self._count("num_cached")
            clip = Clip(path, path.stat().st_size, attempts=0)
        else:
            clip = self._download(record, url, path)
        clip.may_be_wrong, is_judged = not is_retry, False
        try:
            yield clip
            is_judged = True
        except ClipRejected as rejected:
            is_judged = True
            rejected.rejection = clip.judged(rejected.rejection) or rejected.rejection
            raise
        finally:
            if self._cache is not None and clip.is_refused:
                self._cache.drop(name)
            elif self._cache is not None and is_judged and not is_cached:
                self._cache.keep(name, path)

    def _download(self, record: Record, url: str, path: Path) -> Clip:
        """Repeat attempts until the file is complete, no attempt or time is left, or another attempt cannot help.

        Before an error becomes a ledger row, another file of the host is requested: no attempt counts while the host
        is down.
        """
        config, source = self._config, self._mirrored(url)
        host = _host_key(source)
        limits = self._limits()
        attempt, host_answers = 0, config.outage_minutes == 0
        with path.open("xb", buffering=CHUNK_BYTES) as file, self._wanting(source):
            part = Partial(file, self._counter)
            while True:
                attempt += 1
                error = self._attempt(source, part, limits)
                if self._stop.is_set():
                    raise TransferStopped
                if error is None:
                    self._host_limits.succeeded(host)
                    self._known_good[host] = source
                    self._refused_in_a_row[host] = 0
                    self._count("num_downloaded")
                    return Clip(path, part.num_bytes, attempt)
                wait_seconds = _wait_seconds(error, attempt)
                is_last = attempt >= config.attempts or not error.again
                is_last |= time.monotonic() + wait_seconds > limits.deadline
                is_suspect = error.again and self._host_limits.failed(host)
                if error.again and not host_answers and (is_last or is_suspect):
                    answers = partial(self._answers, source, error.reason)
                    if self._host_limits.wait_out(host, error.reason, answers, limits):
                        attempt = 0
                    else:  # the clip gets one attempt more: the host may have come back meanwhile
                        host_answers, attempt = True, min(attempt, config.attempts - 1)
                    limits = self._limits()
                    continue
                if is_last:
                    self._refused_in_a_row[host] += error.reason.startswith("fetch-5")
                    raise _rejected(self._explained(error, record), attempt)
                LOG.debug("%s: %s, attempt %d, again in %.1f s", redact(url), error.reason, attempt, wait_seconds)
                self._count("num_again")
                self._stop.wait(wait_seconds)

    def _limits(self) -> Limits:
        config = self._config
        return Limits(
            time.monotonic() + config.deadline_seconds, config.timeout_seconds, config.max_mib << 20,
            config.min_kib_per_second * 1024, self._stop.is_set,
        )  # fmt: skip

    def _answers(self, url: str, reason: str) -> bool:
        """Whether the host answers from which `url` failed for `reason`: by a clip that came from it, else its root.

        Any clip that is wanted now decides where those are no proof: a CDN whose origin is down still has the clips
        that came before; and a host that gives a page for a name that nobody has made gives one for its root too.
        """
        if url.startswith("s3://"):
            return self._s3.answers(url, self._limits())
        host = _host_key(url)
        known_good, asked, is_clip = self._known_good.get(host), urljoin(url, "/"), False
        if known_good is not None:
            asked, is_clip = known_good, True
        elif reason in _PAGES:
            asked, is_clip = urljoin(url, f"/{secrets.token_hex(16)}"), True
        is_up = self._http.answers(asked, self._limits(), is_clip=is_clip)
        if is_up and self._refused_in_a_row[host] < MAX_REFUSED_IN_A_ROW:
            return True
        if not is_up and (known_good is not None or reason not in _PAGES):
            return False
        with self._lock:
            wanted = [source for source in self._wanted if _host_key(source) == host]
        return any(self._http.answers(source, self._limits(), is_clip=True) for source in wanted)

    def _attempt(self, url: str, partial: Partial, limits: Limits) -> FetchError | None:
        """One attempt. The error is returned, not raised: its chain holds library errors that contain the full URL."""
        try:
            if url.startswith("s3://"):
                self._s3.attempt(url, partial, limits)
            else:
                self._http.attempt(url, partial, limits)
        except FetchError as error:
            return error
        except TransferStopped:
            pass
        return None

    def _explained(self, error: FetchError, record: Record) -> FetchError:
        if error.reason in ("fetch-401", "fetch-403") and SIGNED_URL in record.defects and self._signer is None:
            error.detail += f"; {SIGN_FIX}"
        return error

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

        `walk.mp4`, `walk.MP4` or `walk.Mp4` is beside `walk.json`, and so is `walk.mp4` beside `walk.mp4.json`.
        A video's thumbnail is often there too; for a record of unknown kind any medium is taken, a video first.
        """
        if self._folder is None or not record.source.lower().endswith(".json"):
            return None
        source = self._folder / record.source
        kinds = {"video": (*VIDEO_SUFFIXES, ".gif"), "image": IMAGE_SUFFIXES}
        suffixes = kinds.get(record.media_type or "", (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
        spelled = chain(
            (cased for suffix in suffixes for cased in (suffix, suffix.upper())),
            (suffix.title() for suffix in suffixes),
            [""] if source.with_suffix("").suffix.lower() in suffixes else [],
        )
        return next((path for path in map(source.with_suffix, spelled) if path.is_file()), None)


def _host_key(url: str) -> str:
    """The name of the host of `url` in `HostLimits`: the bucket, or the host."""
    try:
        parts = urlsplit(url)
    except ValueError:  # refused before it is requested
        return ""
    return f"s3://{parts.netloc}" if parts.scheme == "s3" else parts.hostname or ""


def _rejected(error: FetchError, attempts: int) -> ClipRejected:
    return ClipRejected(Rejection("fetch", error.reason, error.detail, error.retryable), attempts)


def _wait_seconds(error: FetchError, attempt: int) -> float:
    """Exponential backoff on top of the server's Retry-After, with jitter so that workers do not retry together."""
    ceiling = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** (attempt - 1))
    return (error.wait_seconds or 0.0) + ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


def _suffix(url: str) -> str:
    """The suffix of a URL's path if it is a medium's; ffmpeg needs it for formats without magic bytes."""
    suffix = splitext(urlsplit(url).path)[1].lower()
    return suffix if suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES else ""
