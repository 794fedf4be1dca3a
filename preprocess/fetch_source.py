"""One attempt at one download, over HTTP(S) or from S3, resuming what an earlier attempt left on disk."""

from __future__ import annotations

import email.utils
import re
import threading
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

from preprocess.config import FetchConfig

if TYPE_CHECKING:
    import urllib3

CHUNK_BYTES = 1 << 18
MAX_REDIRECTS = 5
MAX_LENGTH_DIGITS = 18
_LENGTH = rf"(\d{{1,{MAX_LENGTH_DIGITS}}})"
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_SIGNING = {"Expires", "Signature", "Key-Pair-Id", "Policy", "AWSAccessKeyId", "Hash-Algorithm"}
_S3_REASONS = {"NoSuchKey": 404, "NoSuchBucket": 404, "AccessDenied": 403, "SlowDown": 503}


class Trouble(Exception):
    """One attempt failed. `again`: another attempt now may help; `retryable`: another build may."""

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        again: bool = False,
        retryable: bool = False,
        wait_seconds: float | None = None,
    ) -> None:
        self.reason = reason
        self.detail = detail
        self.again = again
        self.retryable = retryable or again
        self.wait_seconds = wait_seconds
        super().__init__(f"{reason}: {detail}")


class Limits:
    """Bounds of one download: a moment (`time.monotonic`), the longest silence, the most bytes."""

    def __init__(self, deadline: float, silence_seconds: float, max_bytes: int) -> None:
        self.deadline = deadline
        self.silence_seconds = silence_seconds
        self.max_bytes = max_bytes

    def remaining_seconds(self) -> float:
        """Seconds until the deadline. Raises Trouble when it is past."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise Trouble("fetch-timeout", "the whole download took longer than fetch.deadline_seconds", retryable=True)
        return remaining

    def check_bytes(self, num_bytes: int) -> None:
        """Raises Trouble above the limit."""
        if num_bytes > self.max_bytes:
            raise Trouble("fetch-too-large", f"{num_bytes:,} bytes or more, above fetch.max_mib {self.max_bytes >> 20}")


class Partial:
    """What has arrived of a clip: the open file, and what proves that the rest belongs to the same content."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0
        self.validator: str | None = None

    def restart(self) -> None:
        """Forget what has arrived."""
        self._file.seek(0)
        self._file.truncate()
        self.num_bytes = 0
        self.validator = None

    def append(
        self, chunks: Iterable[bytes], total_bytes: int | None, limits: Limits, stopped: Callable[[], bool]
    ) -> None:
        """Write what arrives. Raises Trouble on the limits, and when it ends before `total_bytes`."""
        for chunk in chunks:
            self._file.write(chunk)
            self.num_bytes += len(chunk)
            limits.check_bytes(self.num_bytes)
            limits.remaining_seconds()
            if stopped():
                return
        if total_bytes is not None and self.num_bytes != total_bytes:
            received = self.num_bytes
            if received > total_bytes:
                self.restart()
            raise Trouble("fetch-truncated", f"{received:,} of {total_bytes:,} bytes arrived", again=True)
        self._file.flush()


class Source:
    """Connections shared by all threads of a build, and the list of hosts that may be asked."""

    def __init__(self, config: FetchConfig, parallel: int) -> None:
        self._allowed = tuple(host.lower() for host in config.allow_hosts)
        self._mirrors = config.mirrors
        self._silence_seconds = config.timeout_seconds
        self._parallel = parallel
        self._lock = threading.Lock()
        self._http: urllib3.PoolManager | None = None
        self._s3: Any = None

    def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            self._http.clear()
        if self._s3 is not None:
            self._s3.close()

    def mirrored(self, url: str) -> str:
        """`url` with its prefix replaced where `fetch.mirrors` says so; the longest prefix wins."""
        for prefix in sorted(self._mirrors, key=len, reverse=True):
            if url.startswith(prefix):
                return self._mirrors[prefix] + url[len(prefix) :]
        return url

    def allows(self, host: str) -> bool:
        """Whether `host` (or `s3://bucket`) is in `fetch.allow_hosts`."""
        return any(fnmatchcase(host.lower().rstrip("."), pattern) for pattern in self._allowed)

    def http(self) -> urllib3.PoolManager:
        """The connection pool, made at first use."""
        import urllib3

        with self._lock:
            if self._http is None:
                self._http = urllib3.PoolManager(num_pools=8, maxsize=self._parallel, block=False)
            return self._http

    def s3(self) -> Any:
        """The S3 client, made at first use; its own retries are off, ours count."""
        import boto3
        from botocore.config import Config as BotoConfig

        with self._lock:
            if self._s3 is None:
                options = BotoConfig(
                    retries={"total_max_attempts": 1},
                    connect_timeout=self._silence_seconds,
                    read_timeout=self._silence_seconds,
                    max_pool_connections=max(10, self._parallel),
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                )
                self._s3 = boto3.session.Session().client("s3", config=options)
            return self._s3


def redact(url: str) -> str:
    """A URL without user name, query and fragment: all that may be written anywhere."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not a URL)"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def cache_name(url: str) -> str:
    """What tells one clip's URL from another's, however often it is signed anew; to be hashed, never written.

    The query is kept but for the parameters of a signature (CloudFront's, S3's): it may well name the clip.
    """
    query = url.partition("#")[0].partition("?")[2]
    kept = [item for item in query.split("&") if item and not _signs(item.partition("=")[0])]
    return f"{redact(url)}?{'&'.join(kept)}"


def _signs(parameter: str) -> bool:
    return parameter in _SIGNING or parameter.lower().startswith("x-amz-")


def open_source(source: Source, url: str, partial: Partial, limits: Limits, stopped: Callable[[], bool]) -> None:
    """Make one attempt to complete `partial` from `url`. Raises Trouble; returns early when `stopped()`."""
    url = source.mirrored(url)
    if url.startswith("s3://"):
        _attempt_s3(source, url, partial, limits, stopped)
    else:
        _attempt_http(source, url, partial, limits, stopped)


def _attempt_http(source: Source, url: str, partial: Partial, limits: Limits, stopped: Callable[[], bool]) -> None:
    import urllib3

    _check_url(source, url)
    try:
        response = _request(source, url, partial, limits)
        try:
            total_bytes = _accept(response, partial, limits)
            partial.append(_chunks(response), total_bytes, limits, stopped)
        except BaseException:
            # What is left unread would be taken for the next response on this connection.
            response.close()
            raise
        response.release_conn()
    # The texts of these errors name the URL, query and all: only their types are passed on.
    except urllib3.exceptions.NewConnectionError as error:  # a kind of ConnectTimeoutError, but not silence
        detail = f"{urlsplit(url).hostname}: {type(error).__name__}"
        raise Trouble("fetch-connection", detail, again=True) from None
    except (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.ReadTimeoutError):
        detail = f"silent for {limits.silence_seconds:g} s after {partial.num_bytes:,} bytes"
        raise Trouble("fetch-timeout", detail, again=True) from None
    except urllib3.exceptions.SSLError:
        raise Trouble("fetch-tls", f"TLS with {urlsplit(url).hostname} failed", retryable=True) from None
    except (urllib3.exceptions.LocationValueError, UnicodeError):
        raise Trouble("fetch-bad-url", f"cannot be asked for: {redact(url)}") from None
    except urllib3.exceptions.HTTPError as error:
        reason = "fetch-truncated" if partial.num_bytes else "fetch-connection"
        detail = f"{type(error).__name__} after {partial.num_bytes:,} bytes"
        raise Trouble(reason, detail, again=True) from None


def _request(source: Source, url: str, partial: Partial, limits: Limits) -> urllib3.BaseHTTPResponse:
    """Ask, following redirects within the allow-list."""
    import urllib3

    headers = {"Accept-Encoding": "identity", "User-Agent": "wanprep"}
    if partial.num_bytes and partial.validator:
        headers |= {"Range": f"bytes={partial.num_bytes}-", "If-Range": partial.validator}
    elif partial.num_bytes:
        partial.restart()
    for _ in range(MAX_REDIRECTS + 1):
        seconds = min(limits.silence_seconds, limits.remaining_seconds())
        response = source.http().request(
            "GET", url, headers=headers, timeout=urllib3.Timeout(connect=seconds, read=seconds),
            retries=False, redirect=False, preload_content=False, decode_content=False,
        )  # fmt: skip
        location = response.headers.get("Location")
        if response.status not in _REDIRECTS or location is None:
            return response
        response.close()
        url = _redirected(source, url, location)
    raise Trouble("fetch-redirect-loop", f"more than {MAX_REDIRECTS} redirects from {redact(url)}")


def _redirected(source: Source, url: str, location: str) -> str:
    target = urljoin(url, location)
    if url.startswith("https:") and not target.startswith("https:"):
        raise Trouble("fetch-redirect-refused", f"from https down to {redact(target)}")
    try:
        _check_url(source, target)
    except Trouble as trouble:
        raise Trouble("fetch-redirect-refused", f"to {redact(target)}: {trouble.reason}") from None
    return target


def _check_url(source: Source, url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Trouble("fetch-bad-url", "not a URL") from None
    if parts.scheme not in {"http", "https"} or not host:
        raise Trouble("fetch-bad-url", f"{redact(url)}: expected http://, https:// or s3://")
    if parts.username or parts.password:
        raise Trouble("fetch-bad-url", f"{redact(url)}: carries a user name or password")
    if not source.allows(host):
        raise Trouble("fetch-host-refused", f"{host} is not in fetch.allow_hosts", retryable=True)


def _accept(response: urllib3.BaseHTTPResponse, partial: Partial, limits: Limits) -> int | None:
    """Judge a response's head; the whole content's length, when it is told. Raises Trouble."""
    if response.status == 206:
        return _accept_rest(response, partial, limits)
    if response.status == 416:
        partial.restart()
        raise Trouble("fetch-truncated", "the server no longer has the rest of the content", again=True)
    if response.status != 200:
        raise _refusal(response.status, response.headers.get("Retry-After"))
    partial.restart()
    partial.validator = _validator(response)
    length = response.headers.get("Content-Length")
    if length is None:
        return None
    if not length.isdecimal() or len(length) > MAX_LENGTH_DIGITS:
        raise Trouble("fetch-bad-length", f"Content-Length {length[:40]!r}", again=True)
    limits.check_bytes(int(length))
    return int(length)


def _accept_rest(response: urllib3.BaseHTTPResponse, partial: Partial, limits: Limits) -> int:
    told = response.headers.get("Content-Range", "")
    match = re.fullmatch(rf"bytes {_LENGTH}-{_LENGTH}/{_LENGTH}", told)
    if match is None or int(match[1]) != partial.num_bytes or int(match[2]) != int(match[3]) - 1:
        detail = f"asked for bytes {partial.num_bytes}-, was given {told[:60]!r}"
        partial.restart()
        raise Trouble("fetch-bad-range", detail, again=True)
    limits.check_bytes(int(match[3]))
    return int(match[3])


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    """A strong ETag or a date: without one, a rest that is asked for later may be of other content."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _refusal(status: int, retry_after: str | None) -> Trouble:
    if status in _BUSY or status >= 500:
        return Trouble(f"fetch-{status}", f"HTTP {status}", again=True, wait_seconds=_parse_retry_after(retry_after))
    # 401 and 403 are "sign again", never a truth about the clip.
    return Trouble(f"fetch-{status}", f"HTTP {status}", retryable=status in {401, 403})


def _parse_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header (a number or a date); None where there is none or it is neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _chunks(response: urllib3.BaseHTTPResponse) -> Iterable[bytes]:
    # read1 returns what has come: read(n) would sit through a server that drips, past every deadline.
    while chunk := response.read1(CHUNK_BYTES, decode_content=False):
        yield chunk


def _attempt_s3(source: Source, url: str, partial: Partial, limits: Limits, stopped: Callable[[], bool]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(url)
    bucket, key = parts.netloc, unquote(parts.path.lstrip("/"))
    if not source.allows(f"s3://{bucket}"):
        raise Trouble("fetch-host-refused", f"s3://{bucket} is not in fetch.allow_hosts", retryable=True)
    request: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if partial.num_bytes and partial.validator:
        request |= {"Range": f"bytes={partial.num_bytes}-", "IfMatch": partial.validator}
    else:
        partial.restart()
    limits.remaining_seconds()
    try:
        answer = source.s3().get_object(**request)
        if "Range" in request and "ContentRange" not in answer:
            partial.restart()
        partial.validator = answer.get("ETag")
        total_bytes = partial.num_bytes + int(answer["ContentLength"])
        limits.check_bytes(total_bytes)
        partial.append(answer["Body"].iter_chunks(CHUNK_BYTES), total_bytes, limits, stopped)
    except ClientError as error:
        raise _s3_refusal(error, partial) from None
    except BotoCoreError as error:
        raise Trouble("fetch-s3", f"{type(error).__name__} after {partial.num_bytes:,} bytes", again=True) from None


def _s3_refusal(error: Any, partial: Partial) -> Trouble:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in {"PreconditionFailed", "InvalidRange"}:
        partial.restart()
        return Trouble("fetch-truncated", "the object changed while it was read", again=True)
    status = _S3_REASONS.get(code) or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return _refusal(int(status), None)
