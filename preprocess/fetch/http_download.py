"""One attempt at one download over HTTP(S), resuming the bytes that an earlier attempt left on disk."""

from __future__ import annotations

import email.utils
import re
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from preprocess.corpus.url import check_printable, redact
from preprocess.fetch.cloudfront import CloudFrontSigner
from preprocess.fetch.hosts import AllowedHosts, HostLimits
from preprocess.fetch.transfer import FetchError, Limits, Partial, is_document
from preprocess.fetch.transport import Transport, chunks_of

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

MAX_REDIRECTS = 5
MAX_LENGTH_DIGITS = 18
_LENGTH = rf"(\d{{1,{MAX_LENGTH_DIGITS}}})"
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (407, 408, 425, 429)
"""Statuses below 500 that say nothing about the clip; 407 is a proxy's, which is not content with its password."""
_UNSIGNED = ("fetch-401", "fetch-403")


class HttpSource:
    """Downloads over HTTP(S) from allowed hosts, signed where a signer covers the host."""

    def __init__(
        self, hosts: AllowedHosts, host_limits: HostLimits, signer: CloudFrontSigner | None, parallel: int,
        user_agent: str,
    ) -> None:  # fmt: skip
        self._user_agent = user_agent
        self._hosts = hosts
        self._host_limits = host_limits
        self._signer = signer
        self.transport = Transport(parallel, hosts.check_address)

    def attempt(self, url: str, partial: Partial, limits: Limits) -> None:
        """Make one attempt to complete `partial` from `url`; a refused signature is renewed once.

        Raises FetchError, TransferStopped.
        """
        try:
            self._follow(url, partial, limits)
        except FetchError as error:
            if error.reason not in _UNSIGNED or self._signer is None or not self._signer.renew(url):
                raise
        else:
            return
        try:
            self._follow(url, partial, limits)
        except FetchError as error:
            if error.reason in _UNSIGNED:
                error.detail += ", though signed twice: check the key, its policy and the clock"
            raise

    def answers(self, url: str, limits: Limits, *, is_clip: bool) -> bool:
        """Whether the host of `url` serves requests: a refusal such as 404 is an answer, a document as a clip is not.

        Raises TransferStopped.
        """
        try:
            self._follow(url, None, limits, is_clip)
        except FetchError as error:
            return not error.again
        return True

    def _follow(self, url: str, partial: Partial | None, limits: Limits, is_clip: bool = True) -> None:
        """Send the request, following redirects within the allowed hosts.

        Without `partial` only the first byte is requested, also from a host that is waited for.
        """
        first_url = url
        for _ in range(MAX_REDIRECTS + 1):
            spelled = self._hosts.check_url(url)
            headers = {"Range": "bytes=0-63"} if partial is None else _range_headers(partial)
            headers |= {"Accept-Encoding": "identity", "User-Agent": self._user_agent}
            host = spelled.host
            if self._signer is not None:
                spelled, cookies = self._signer.sign(spelled)
                headers |= cookies
            slot = nullcontext() if partial is None else self._host_limits.slot(host, limits)
            with slot, self.transport.get(spelled, headers, limits) as response:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    if partial is None:
                        _check_answer(response, limits, is_clip)
                    else:
                        self._receive(response, host, partial, limits)
                    return
            url = self._redirected(url, location)
        detail = f"more than {MAX_REDIRECTS} redirects from {redact(first_url)}"
        raise FetchError("fetch-redirect-loop", detail, retryable=True)

    def _receive(self, response: BaseHTTPResponse, host: str, partial: Partial, limits: Limits) -> None:
        try:
            accept(response, partial, limits)
        except FetchError as error:
            if error.wait_seconds and error.wait_seconds < limits.remaining_seconds():
                self._host_limits.pause(host, error.wait_seconds)
            raise
        partial.append(chunks_of(response, limits), limits)

    def _redirected(self, url: str, location: str) -> str:
        try:
            check_printable(location)  # urljoin would drop a tab without a word
            target = urljoin(url, location)
        except ValueError:
            raise FetchError("fetch-redirect-refused", "to something that is not a URL", retryable=True) from None
        if url.startswith("https:") and not target.startswith("https:"):
            raise FetchError("fetch-redirect-refused", f"from https down to {redact(target)}", retryable=True)
        try:
            self._hosts.check_url(target)
        except FetchError as error:
            detail = f"to {redact(target)}: {error.reason}"
            raise FetchError("fetch-redirect-refused", detail, retryable=True) from None
        return target


def _range_headers(partial: Partial) -> dict[str, str]:
    if partial.resumable:
        return {"Range": f"bytes={partial.num_bytes}-", "If-Range": str(partial.validator)}
    partial.restart()
    return {}


def _check_answer(response: BaseHTTPResponse, limits: Limits, is_clip: bool) -> None:
    """Raises FetchError for a server error, and where a clip was expected and a document or nothing came."""
    if response.status not in (200, 206, 416):
        raise refusal(response.status)
    start = next(iter(chunks_of(response, limits)), b"")
    if is_clip and response.status != 416 and (not start or is_document(start[:64], _content_type(response))):
        raise FetchError("fetch-not-media", "a document or nothing instead of a clip", again=True)


def accept(response: BaseHTTPResponse, partial: Partial, limits: Limits) -> None:
    """Check a response's head, and prepare `partial` for its body. Raises FetchError."""
    if response.status == 416:
        partial.restart()
        raise FetchError("fetch-truncated", "the server no longer has the rest of the content", again=True)
    if response.status not in (200, 206):
        raise refusal(response.status, response.headers.get("Retry-After"))
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        # Decoding it would make a resumed range, a length and a limit each ambiguous; media does not compress anyway.
        raise FetchError("fetch-encoded", f"Content-Encoding {encoding[:40]!r}, though none was requested", again=True)
    if response.status == 206:
        _accept_rest(response, partial, limits)
        return
    partial.restart()
    partial.validator = _validator(response)
    partial.content_type = _content_type(response)
    partial.total_bytes = _declared_length(response)
    limits.check_bytes(partial.total_bytes or 0)


def _content_type(response: BaseHTTPResponse) -> str:
    return response.headers.get("Content-Type", "")


def _declared_length(response: BaseHTTPResponse) -> int | None:
    """The body's length; None where it is chunked. Raises FetchError where neither is given."""
    if "chunked" in response.headers.get("Transfer-Encoding", "").lower():
        return None
    length = response.headers.get("Content-Length")
    if length is None:
        detail = "neither a Content-Length nor chunks: a body cut short would look complete"
        raise FetchError("fetch-no-length", detail, again=True)
    if not (length.isascii() and length.isdecimal()) or len(length) > MAX_LENGTH_DIGITS:
        raise FetchError("fetch-bad-length", f"Content-Length {length[:40]!r}", again=True)
    return int(length)


def _accept_rest(response: BaseHTTPResponse, partial: Partial, limits: Limits) -> None:
    content_range = response.headers.get("Content-Range", "")
    match = re.fullmatch(rf"bytes {_LENGTH}-{_LENGTH}/{_LENGTH}", content_range, re.ASCII)
    if match is None or int(match[1]) != partial.num_bytes or int(match[2]) != int(match[3]) - 1:
        detail = f"requested bytes {partial.num_bytes}-, received {content_range[:60]!r}"
        partial.restart()
        raise FetchError("fetch-bad-range", detail, again=True)
    total_bytes, validator = int(match[3]), _validator(response)
    # Not every server honours If-Range: length and validator of the rest must be those of the first part.
    known = (partial.total_bytes or total_bytes, partial.validator or validator)
    if known != (total_bytes, validator or partial.validator):
        partial.restart()
        raise FetchError("fetch-changed", "the content changed while it was downloaded", again=True)
    partial.total_bytes = total_bytes
    limits.check_bytes(total_bytes)


def _validator(response: BaseHTTPResponse) -> str | None:
    """A strong ETag or a date: without one, a range requested later may be of other content."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def refusal(status: int, retry_after: str | None = None) -> FetchError:
    """The error for a status other than 200 and 206."""
    if status in _BUSY or status >= 500:
        return FetchError(f"fetch-{status}", f"HTTP {status}", again=True, wait_seconds=_parse_retry_after(retry_after))
    # 401 and 403 mean "sign again"; they say nothing about the clip.
    return FetchError(f"fetch-{status}", f"HTTP {status}", retryable=status in {401, 403})


def _parse_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header (a number or a date); None where there is none or it is neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
