"""Which hosts may be requested, by how many downloads at a time, and after which pause."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from preprocess.corpus.url import HttpUrl, redact, spell_url
from preprocess.fetch.transfer import FetchError, Limits, TransferStopped
from shards.console import LOG, duration_words
from shards.errors import TemporaryFailure

SUSPECT_FAILURES = 3
"""Failures in a row, over all clips of a host, after which it is asked whether it is down."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
"""Between two questions to a host that is down: doubled each time."""
_POLL_SECONDS = 0.1
_METADATA = {ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")}
"""Where clouds keep credentials, beside the link-local addresses."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


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
        direct the build at the machine's own network. Link-local addresses and others where clouds keep credentials are
        never allowed.
        """
        ip = _innermost(ipaddress.ip_address(address.partition("%")[0]))
        is_named = host.lower().rstrip(".") in self._patterns
        if ip.is_link_local or ip in _METADATA or (not ip.is_global and not is_named):
            raise FetchError(
                "fetch-address-refused", f"{host} leads to {ip}, which is not a public address", retryable=True
            )


def _innermost(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address leads to (mapped, 6to4, NAT64), or the address itself."""
    if isinstance(ip, IPv4Address):
        return ip
    return ip.ipv4_mapped or ip.sixtofour or (IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip)


def matches(host: str, patterns: Sequence[str]) -> bool:
    """Whether a host name is one of `patterns`, exact or `*.suffix`, whatever its case."""
    return any(fnmatchcase(host.lower().rstrip("."), pattern) for pattern in patterns)


class HostLimits:
    """At most so many downloads a host at a time, a pause where a host requests one, and a wait where it is down.

    Args:
        per_host: downloads from one host at a time.
        outage_minutes: longest wait for a host that is down; then every thread gets a TemporaryFailure.
        notes: folder where a file says which host is waited for, for `wanprep status`.
    """

    def __init__(self, per_host: int, outage_minutes: float, notes: Path) -> None:
        self._per_host = per_host
        self._max_seconds = outage_minutes * 60
        self._notes = notes
        self._busy: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._down: set[str] = set()
        self._given_up: TemporaryFailure | None = None
        self._changed = threading.Condition()

    @contextmanager
    def slot(self, host: str, limits: Limits) -> Iterator[None]:
        """Hold a slot at `host` during the block. Waiting for it moves the deadline. Raises TransferStopped."""
        start = time.monotonic()
        with self._changed:
            self._wait(limits, lambda: self._may(host))
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

    def succeeded(self, host: str) -> None:
        """A download from `host` is complete."""
        self._failures[host] = 0

    def failed(self, host: str) -> bool:
        """A download from `host` failed; whether so many failed in a row that the host may be down."""
        with self._changed:
            self._failures[host] += 1
            return self._failures[host] >= SUSPECT_FAILURES

    def wait_out(self, host: str, reason: str, answers: Callable[[], bool], limits: Limits) -> bool:
        """Wait while `host` is down: True after an outage; False, at once, where it answers and the clip is the cause.

        One thread asks `answers` with growing pauses; nothing else is sent to the host meanwhile. Raises
        TransferStopped, and TemporaryFailure after `outage_minutes`.
        """
        with self._changed:
            if host in self._down:  # another thread asks
                self._wait(limits, lambda: host not in self._down)
                return True
            self._down.add(host)
        since, start, pause = datetime.now().astimezone(), time.monotonic(), FIRST_PAUSE_SECONDS
        # A name of this process's own: several share the folder.
        note = self._notes / f"outage-{os.getpid()}-{hashlib.sha256(host.encode()).hexdigest()[:16]}.json"
        try:
            if answers():
                return False
            minutes = f"{self._max_seconds / 60:g} min"
            LOG.warning("%s does not answer (%s): waiting up to %s for it; no clip is lost", host, reason, minutes)
            note.write_text(json.dumps({"host": host, "reason": reason, "since": since.isoformat(timespec="seconds")}))
            while True:
                seconds = time.monotonic() - start
                if seconds >= self._max_seconds:
                    self._given_up = TemporaryFailure(
                        f"{host} has not answered since {since:%H:%M:%S} (fetch.outage_minutes: {minutes}): {reason}",
                        fix="run the same command when the host is back: it resumes at the last unit. With "
                        "fetch.outage_minutes=0 its clips become rejected rows that `wanprep retry` takes up",
                    )
                    raise self._given_up
                end = time.monotonic() + min(pause, self._max_seconds - seconds)
                with self._changed:
                    self._wait(limits, lambda end=end: time.monotonic() >= end)  # type: ignore[misc]
                if answers():
                    LOG.info("%s answers again after %s", host, duration_words(time.monotonic() - start))
                    return True
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
        finally:
            note.unlink(missing_ok=True)
            with self._changed:
                self._down.discard(host)
                self._failures[host] = 0
                self._changed.notify_all()

    def _wait(self, limits: Limits, ready: Callable[[], bool]) -> None:
        """Wait, with the lock held, until `ready()`. Raises TransferStopped, TemporaryFailure."""
        while self._given_up is not None or not ready():
            if self._given_up is not None:
                raise self._given_up
            if limits.stopped():
                raise TransferStopped
            self._changed.wait(_POLL_SECONDS)

    def _may(self, host: str) -> bool:
        is_free = self._busy[host] < self._per_host and time.monotonic() >= self._not_before.get(host, 0.0)
        return is_free and host not in self._down
