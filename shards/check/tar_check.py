"""The check of one unit's bytes: its tar against its commit, in one pass, and its ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from shards.errors import ShardDamage
from shards.format.commit import Blob, Commit
from shards.format.ledger import read_ledger
from shards.format.names import FOOTER_MEMBER, FORMAT_VERSION, HEADER_MEMBER, LATENTS
from shards.format.sealed_json import canonical_digest, canonical_json, parse_json
from shards.format.tar import Member, scan_tar
from shards.read.outcomes import MAX_LEDGER_BYTES
from shards.storage.base import Storage

ReportBytes = Callable[[int], None]
"""Called with the number of bytes read since the last call."""
_CHUNK = 2**20
_MAX_HEADER_BYTES = 2**26


class HashingReader:
    """Reads an object once, front to back, hashing all of it, and serves ranges near the front as it goes.

    A scan of a tar asks for headers and padding at growing offsets: so hashing and scanning cost one read.
    """

    def __init__(self, storage: Storage, name: str, size: int, progress: ReportBytes) -> None:
        self._storage, self._name, self._size, self._progress = storage, name, size, progress
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(_CHUNK))
        self._start = self._end = 0

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes at `offset`, which is not before the start of the chunk that was read last."""
        parts = []
        while length > 0 and offset < self._size:
            while offset >= self._end:
                self._advance()
            got = bytes(self._buffer[offset - self._start : min(self._end, offset + length) - self._start])
            parts.append(got)
            offset, length = offset + len(got), length - len(got)
        return b"".join(parts)

    def hexdigest(self) -> str:
        """Read to the end; sha256 of all bytes."""
        while self._end < self._size:
            self._advance()
        return self._digest.hexdigest()

    def _advance(self) -> None:
        got = self._storage.read_into(self._name, self._end, self._buffer[: min(_CHUNK, self._size - self._end)])
        if not got:
            raise ShardDamage(
                self._storage.url(self._name), "the file became shorter while it was read", offset=self._end
            )
        self._digest.update(self._buffer[:got])
        self._progress(got)
        self._start, self._end = self._end, self._end + got


def check_tar(storage: Storage, commit: Commit, tar: Blob, progress: ReportBytes) -> None:
    """Raises ShardDamage, with member and offset, unless the tar is the one that its commit describes."""
    url = storage.url(tar.name)
    reader = HashingReader(storage, tar.name, tar.size, progress)
    members = list(scan_tar(reader.read_at, url, tar.size))
    sha256 = reader.hexdigest()
    expected = _expected_members(commit)
    found = [member for member in members if not member.name.startswith("__wanshards__/")]
    for member, wanted in zip(found, expected, strict=False):
        if member != wanted:
            what = f"{member.name} of {member.size} bytes where the commit has {wanted.name} of {wanted.size}"
            raise ShardDamage(url, what, member=member.name, offset=member.offset)
    names = [member.name for member in members]
    if len(found) != len(expected) or (names[0], names[-1]) != (HEADER_MEMBER, FOOTER_MEMBER):
        raise ShardDamage(url, f"{len(found)} members, its commit has {len(expected)}, between a header and a footer")
    digests = _check_header_and_footer(storage, commit, url, members)
    if sha256 != tar.sha256:
        _locate(storage, tar, url, members, digests)
        raise ShardDamage(url, f"sha256 {sha256}, its commit says {tar.sha256}")


def _expected_members(commit: Commit) -> list[Member]:
    return [
        Member(f"{sample.key}.{member.suffix}", member.offset, member.size)
        for sample in commit.samples
        for member in sample.members
    ]


def _check_header_and_footer(storage: Storage, commit: Commit, url: str, members: list[Member]) -> dict[str, str]:
    """Check both against the commit; returns the digest of every other member by its name."""
    header = _read_json(storage, commit, url, members[0])
    expected = {"format_version": FORMAT_VERSION, "kind": commit.kind, "unit": commit.unit}
    expected["identity_sha256"] = commit.identity_sha256
    for field, value in expected.items():
        if not isinstance(header, dict) or header.get(field) != value:
            found = header.get(field) if isinstance(header, dict) else header
            raise ShardDamage(url, f"{field} is {found!r}, its commit says {value!r}", member=HEADER_MEMBER, offset=512)
    if canonical_digest(header.get("identity")) != commit.identity_sha256:
        raise ShardDamage(url, "its identity is not what its digest says", member=HEADER_MEMBER, offset=512)
    digests = {f"{sample.key}.{member.suffix}": member.sha256 for sample in commit.samples for member in sample.members}
    digests[HEADER_MEMBER] = hashlib.sha256(canonical_json(header)).hexdigest()
    listed = [[member.name, member.offset, member.size, digests[member.name]] for member in members[:-1]]
    if _read_json(storage, commit, url, members[-1]) != {"num_samples": len(commit.samples), "members": listed}:
        what = "it does not list the members that its commit lists"
        raise ShardDamage(url, what, member=FOOTER_MEMBER, offset=members[-1].offset)
    return digests


def _read_json(storage: Storage, commit: Commit, url: str, member: Member) -> Any:
    if member.size > _MAX_HEADER_BYTES:
        raise ShardDamage(url, f"{member.size:,} bytes are too many", member=member.name, offset=member.offset)
    data = storage.get_range(commit.tar.name, member.offset, member.size)
    return parse_json(data, url, member.name, member.offset)


def _locate(storage: Storage, tar: Blob, url: str, members: list[Member], digests: dict[str, str]) -> None:
    """Find the member whose bytes changed: the tar's digest says that one did, or that the footer's did."""
    for member in members[:-1]:
        found = hashlib.sha256(storage.get_range(tar.name, member.offset, member.size)).hexdigest()
        if found != digests[member.name]:
            what = f"its payload has sha256 {found}, the commit says {digests[member.name]}"
            raise ShardDamage(url, what, member=member.name, offset=member.offset)


def check_ledger(storage: Storage, commit: Commit, ledger: Blob) -> None:
    """Raises ShardDamage unless the ledger is the commit's, and accepts exactly the samples of the tar."""
    data = storage.get(ledger.name, MAX_LEDGER_BYTES)
    url = storage.url(ledger.name)
    found = hashlib.sha256(data).hexdigest()
    if found != ledger.sha256:
        raise ShardDamage(url, f"sha256 {found}, its commit says {ledger.sha256}")
    accepted = [w.key for row in read_ledger(data, url) for w in row.windows if w.status == "accepted"]
    if commit.kind == LATENTS and sorted(map(str, accepted)) != sorted(sample.key for sample in commit.samples):
        raise ShardDamage(url, "its accepted windows are not the samples of the tar")
