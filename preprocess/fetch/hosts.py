"""Which hosts may be asked, how many downloads at a time, and when again."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from preprocess.corpus.url import redact
from preprocess.fetch.transfer import Limits, TransferStopped, Trouble

_POLL_SECONDS = 0.1


class AllowedHosts:
    """The list of hosts that may be asked, by name, and by the address that a name turns out to have."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(pattern.lower() for pattern in patterns)

    def allows(self, host: str) -> bool:
        """Whether `host` (or `s3://bucket`) is in `fetch.allow_hosts`."""
        return matches(host, self._patterns)

    def check_url(self, url: str) -> str:
        """The host of an HTTP(S) URL that may be asked. Raises Trouble."""
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise Trouble("fetch-bad-url", "not a URL") from None
        if parts.scheme not in {"http", "https"} or not host:
            raise Trouble("fetch-bad-url", f"{redact(url)}: expected http://, https:// or s3://")
        if parts.username is not None or parts.password is not None:
            raise Trouble("fetch-bad-url", f"{redact(url)}: carries a user name or password")
        if not self.allows(host):
            raise Trouble("fetch-host-refused", f"{host} is not in fetch.allow_hosts", retryable=True)
        return host

    def check_address(self, host: str, address: str) -> None:
        """Judge the address that a connection to `host` has reached, before anything is asked. Raises Trouble.

        A name that only a wildcard allows must be a public one: whoever answers for a zone must not be able to point
        the build at the machine's own network. Link-local addresses, where clouds keep credentials, never serve clips.
        """
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if ip.is_link_local or (not ip.is_global and host.lower().rstrip(".") not in self._patterns):
            raise Trouble(
                "fetch-address-refused", f"{host} leads to {ip}, which is not a public address", retryable=True
            )


def matches(host: str, patterns: Sequence[str]) -> bool:
    """Whether a host name is one of `patterns`, exact or `*.suffix`, whatever its case."""
    return any(fnmatchcase(host.lower().rstrip("."), pattern) for pattern in patterns)


class Turns:
    """A bounded number of downloads a host, and a pause for all of them where the host asks for one."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._busy: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, host: str, limits: Limits) -> Iterator[None]:
        """Wait for a turn at `host`, for the length of the block. Waiting moves the deadline. Raises Stopped."""
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
        """Ask nothing of `host` for a while: one worker was told to wait, and it meant all of them."""
        with self._changed:
            self._not_before[host] = max(self._not_before.get(host, 0.0), time.monotonic() + seconds)

    def _may(self, host: str) -> bool:
        return self._busy[host] < self._per_host and time.monotonic() >= self._not_before.get(host, 0.0)
