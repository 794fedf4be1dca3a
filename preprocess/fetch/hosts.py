"""Which hosts may be requested, by how many downloads at a time, and after which pause."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from preprocess.corpus.url import HttpUrl, redact, spell_url
from preprocess.fetch.transfer import FetchError, Limits, TransferStopped

_POLL_SECONDS = 0.1


class AllowedHosts:
    """`fetch.allow_hosts`: hosts that may be requested, checked by name and by the address that was reached."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(pattern.lower().strip("[]") for pattern in patterns)  # IPv6 addresses in brackets

    def allows(self, host: str) -> bool:
        """Whether `host` (or `s3://bucket`) is in `fetch.allow_hosts`."""
        return matches(host, self._patterns)

    def check_url(self, url: str) -> HttpUrl:
        """`url` split for the request, if its host may be requested. Raises FetchError."""
        try:
            spelled = spell_url(url)
        except ValueError as error:
            raise FetchError("fetch-bad-url", f"{redact(url)}: {error}") from None
        if not self.allows(spelled.host):
            raise FetchError("fetch-host-refused", f"{spelled.host} is not in fetch.allow_hosts", retryable=True)
        return spelled

    def check_address(self, host: str, address: str) -> None:
        """Check the address that a connection to `host` has reached, before a request is sent. Raises FetchError.

        A name that only a wildcard allows must have a public address: the owner of a DNS zone must not be able to
        direct the build at the machine's own network. Link-local addresses, where clouds keep credentials, are never
        allowed.
        """
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if ip.is_link_local or (not ip.is_global and host.lower().rstrip(".") not in self._patterns):
            raise FetchError(
                "fetch-address-refused", f"{host} leads to {ip}, which is not a public address", retryable=True
            )


def matches(host: str, patterns: Sequence[str]) -> bool:
    """Whether a host name is one of `patterns`, exact or `*.suffix`, whatever its case."""
    return any(fnmatchcase(host.lower().rstrip("."), pattern) for pattern in patterns)


class HostLimits:
    """At most so many downloads a host at a time, and a pause for all of them when the host requests one."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._busy: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._changed = threading.Condition()

    @contextmanager
    def slot(self, host: str, limits: Limits) -> Iterator[None]:
        """Hold a slot at `host` during the block. Waiting for it moves the deadline. Raises TransferStopped."""
        start = time.monotonic()
        with self._changed:
            while not self._may(host):
                if limits.stopped():
                    raise TransferStopped
                self._changed.wait(_POLL_SECONDS)
            self._busy[host] += 1
        limits.deadline += time.monotonic() - start
        try:
            yield
        finally:
            with self._changed:
                self._busy[host] -= 1
                self._changed.notify()

    def pause(self, host: str, seconds: float) -> None:
        """Send `host` no request for `seconds`: a Retry-After to one worker holds for all."""
        with self._changed:
            self._not_before[host] = max(self._not_before.get(host, 0.0), time.monotonic() + seconds)

    def _may(self, host: str) -> bool:
        return self._busy[host] < self._per_host and time.monotonic() >= self._not_before.get(host, 0.0)
