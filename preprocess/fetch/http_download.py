"""One attempt at one download over HTTP(S), resuming what an earlier attempt left on disk."""

from __future__ import annotations

import email.utils
import re
import time
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from preprocess.corpus.url import redact
from preprocess.fetch.cloudfront import CloudFrontSigner
from preprocess.fetch.hosts import AllowedHosts, Turns
from preprocess.fetch.transfer import Limits, Partial, Trouble
from preprocess.fetch.transport import Transport, chunks_of

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

MAX_REDIRECTS = 5
MAX_LENGTH_DIGITS = 18
_LENGTH = rf"(\d{{1,{MAX_LENGTH_DIGITS}}})"
_PLAIN = re.compile(
    r"https?://[a-z0-9.-]+(?::[1-9]\d{0,4})?/[\w\-.~!$&'()*+,;=:@/]*(?:\?[\w\-.~!$&'()*+,;=:@/?]*)?", re.ASCII
)
"""A URL in which percent-encoding changes nothing, unless a segment of its path is one of dots."""
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_UNSIGNED = ("fetch-401", "fetch-403")


class HttpSource:
    """Downloads over HTTP(S), within the list of hosts, signed where a signer covers the host."""

    def __init__(self, hosts: AllowedHosts, turns: Turns, signer: CloudFrontSigner | None, parallel: int) -> None:
        self._hosts = hosts
        self._turns = turns
        self._signer = signer
        self.transport = Transport(parallel, hosts.check_address)

    def attempt(self, url: str, partial: Partial, limits: Limits) -> None:
        """Make one attempt to complete `partial` from `url`; a signature that is refused is made anew once.

        Raises Trouble, Stopped.
        """
        try:
            self._follow(url, partial, limits)
        except Trouble as trouble:
            if trouble.reason not in _UNSIGNED or self._signer is None or not self._signer.renew(url):
                raise
        else:
            return
        try:
            self._follow(url, partial, limits)
        except Trouble as trouble:
            if trouble.reason in _UNSIGNED:
                trouble.detail += ", though signed twice: its key, its policy and the clock are to be looked at"
            raise

    def _follow(self, url: str, partial: Partial, limits: Limits) -> None:
        """Ask, going along with redirects within the allowed hosts."""
        first_url = url
        for _ in range(MAX_REDIRECTS + 1):
            host = self._hosts.check_url(url)
            asked, headers = _spelled(url), _headers(partial)
            if self._signer is not None:
                asked, cookies = self._signer.sign(asked)
                headers |= cookies
            with self._turns.turn(host, limits), self.transport.get(asked, headers, limits) as response:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    self._receive(response, host, partial, limits)
                    return
            url = self._redirected(url, location)
        detail = f"more than {MAX_REDIRECTS} redirects from {redact(first_url)}"
        raise Trouble("fetch-redirect-loop", detail, retryable=True)

    def _receive(self, response: BaseHTTPResponse, host: str, partial: Partial, limits: Limits) -> None:
        try:
            accept(response, partial, limits)
        except Trouble as trouble:
            if trouble.wait_seconds and trouble.wait_seconds < limits.remaining_seconds():
                self._turns.pause(host, trouble.wait_seconds)
            raise
        partial.append(chunks_of(response, limits), limits)

    def _redirected(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
        except ValueError:
            raise Trouble("fetch-redirect-refused", "to what is not a URL", retryable=True) from None
        if url.startswith("https:") and not target.startswith("https:"):
            raise Trouble("fetch-redirect-refused", f"from https down to {redact(target)}", retryable=True)
        try:
            self._hosts.check_url(target)
        except Trouble as trouble:
            detail = f"to {redact(target)}: {trouble.reason}"
            raise Trouble("fetch-redirect-refused", detail, retryable=True) from None
        return target


def _spelled(url: str) -> str:
    """`url` as it goes over the wire, percent-encoded: that is what a signature must cover. Raises Trouble."""
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    if _PLAIN.fullmatch(url) and "/." not in url:
        return url
    try:
        return parse_url(url)._replace(fragment=None).url
    except LocationParseError:
        raise Trouble("fetch-bad-url", f"cannot be asked for: {redact(url)}") from None


def _headers(partial: Partial) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "wanprep"}
    if partial.resumable:
        return headers | {"Range": f"bytes={partial.num_bytes}-", "If-Range": str(partial.validator)}
    partial.restart()
    return headers


def accept(response: BaseHTTPResponse, partial: Partial, limits: Limits) -> None:
    """Judge a response's head, and make `partial` ready for its body. Raises Trouble."""
    if response.status == 416:
        partial.restart()
        raise Trouble("fetch-truncated", "the server no longer has the rest of the content", again=True)
    if response.status not in (200, 206):
        raise refusal(response.status, response.headers.get("Retry-After"))
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        # Undoing it would make a resumed range, a length and a limit each mean two things; media gains nothing by it.
        raise Trouble("fetch-encoded", f"Content-Encoding {encoding[:40]!r}, though none was asked for", again=True)
    if response.status == 206:
        _accept_rest(response, partial, limits)
        return
    partial.restart()
    partial.validator = _validator(response)
    partial.total_bytes = _told_length(response)
    limits.check_bytes(partial.total_bytes or 0)


def _told_length(response: BaseHTTPResponse) -> int | None:
    """The body's length; None where its chunks tell its end. Raises Trouble where nothing does."""
    if "chunked" in response.headers.get("Transfer-Encoding", "").lower():
        return None
    length = response.headers.get("Content-Length")
    if length is None:
        detail = "neither a Content-Length nor chunks: a body cut short would look whole"
        raise Trouble("fetch-no-length", detail, again=True)
    if not (length.isascii() and length.isdecimal()) or len(length) > MAX_LENGTH_DIGITS:
        raise Trouble("fetch-bad-length", f"Content-Length {length[:40]!r}", again=True)
    return int(length)


def _accept_rest(response: BaseHTTPResponse, partial: Partial, limits: Limits) -> None:
    told = response.headers.get("Content-Range", "")
    match = re.fullmatch(rf"bytes {_LENGTH}-{_LENGTH}/{_LENGTH}", told, re.ASCII)
    if match is None or int(match[1]) != partial.num_bytes or int(match[2]) != int(match[3]) - 1:
        detail = f"asked for bytes {partial.num_bytes}-, was given {told[:60]!r}"
        partial.restart()
        raise Trouble("fetch-bad-range", detail, again=True)
    total_bytes, validator = int(match[3]), _validator(response)
    # Not every server looks at If-Range: what it says of the rest must not speak of other content.
    known = (partial.total_bytes or total_bytes, partial.validator or validator)
    if known != (total_bytes, validator or partial.validator):
        partial.restart()
        raise Trouble("fetch-changed", "the content changed while it was downloaded", again=True)
    partial.total_bytes = total_bytes
    limits.check_bytes(total_bytes)


def _validator(response: BaseHTTPResponse) -> str | None:
    """A strong ETag or a date: without one, a rest that is asked for later may be of other content."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def refusal(status: int, retry_after: str | None = None) -> Trouble:
    """What a status other than 200 and 206 means."""
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
    except (ValueError, TypeError, OverflowError):
        return None
