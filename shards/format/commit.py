"""Commits: the document, written last, that makes a unit exist. It names the tar and all its members."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from shards.config import Config, Number, validate_config
from shards.errors import ShardDamage, UserError
from shards.format.dataset_info import check_format_version
from shards.format.names import (
    FORMAT_VERSION,
    JSON_MEMBER,
    KEY,
    LATENTS,
    NULL_UNIT,
    array_members,
    commit_name,
    parse_name,
)
from shards.format.sealed_json import canonical_digest, document_seal, open_document, seal_document, sealed_part
from shards.storage.base import Storage

MAX_COMMIT_BYTES = 2**26
_WRITTEN = re.compile(
    rb'(\{"format_version":\d+,"identity_sha256":"[^"]*","kind":"[^"]*",)'
    rb'("ledger":(?:null|\{[^}]*\}),"provenance":\{[^}]*\},)"revision":"([0-9a-f]{64})",("samples":\[.*),',
    re.DOTALL,
)
"""What a seal covers of a commit: content, what a revision leaves out, the revision, content."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Blob(Config):
    """An object that a commit names."""

    name: str
    size: Number
    sha256: Sha256


class MemberInfo(Config):
    """One member of a sample: the place of its payload in the tar, and its digest."""

    suffix: Annotated[str, Field(max_length=19)]
    offset: Number
    size: Number
    sha256: Sha256
    dtype: str | None = None
    """Of an array: 'float16', 'bfloat16' or 'float32'."""
    shape: tuple[Number, ...] | None = None
    check: Annotated[str, Field(pattern="^[0-9a-f]{8}$")] | None = None
    """Of an array: its zstd frame's checksum, the last four bytes read as a little-endian number, in 8 hex digits."""


class LatentSummary(Config):
    """What order and batching need to know of a latent without opening the tar."""

    clip: str
    start_ms: Number
    frames: Number
    height: Number
    width: Number
    source_media: Literal["video", "image"]
    category: str | None


class TextSummary(Config):
    """What is known of a sample's embeddings without opening the tar."""

    variants: Number
    tokens: tuple[Number, ...]


class SampleInfo(Config):
    """One sample of a unit."""

    key: Annotated[str, Field(pattern=f"^{KEY.pattern}$")]
    summary: LatentSummary | TextSummary
    members: tuple[MemberInfo, ...]

    def arrays(self) -> list[MemberInfo]:
        """Its arrays, in order."""
        return [member for member in self.members if member.check is not None]

    def member(self, suffix: str) -> MemberInfo | None:
        """The member of that suffix."""
        return next((member for member in self.members if member.suffix == suffix), None)


class Commit(Config):
    """A unit's commit."""

    format_version: int = FORMAT_VERSION
    kind: str
    unit: int
    """-1 for a text set's null embeddings."""
    identity_sha256: str
    tar: Blob
    ledger: Blob | None
    samples: tuple[SampleInfo, ...]
    provenance: dict[str, str]
    """Versions and devices of the run that made it: a difference warns, and changes no revision."""

    @property
    def revision(self) -> str:
        """Digest of the content: of all fields but the ledger and the provenance."""
        return content_digest(self.model_dump(mode="json"))


def content_digest(body: Mapping[str, Any]) -> str:
    """The revision of a commit given as plain values: the digest of all but its ledger and its provenance."""
    return canonical_digest({name: value for name, value in body.items() if name not in ("ledger", "provenance")})


class StoredCommit(Config):
    """A stored commit: its content, and the size and seal of its file."""

    commit: Commit
    revision: str
    size: int
    seal: str


def commit_bytes(commit: Commit) -> bytes:
    """The commit as a sealed document."""
    return seal_document({**commit.model_dump(mode="json", exclude_none=False), "revision": commit.revision})


def parse_commit(data: bytes, file: str, kind: str, unit: int) -> StoredCommit:
    """A commit from untrusted bytes, expected to be the one of `kind` and `unit`. Raises ShardDamage naming it."""
    opened = _open_as_written(sealed_part(data, file))
    if opened is not None:
        commit, revision = opened
        found = revision
    else:
        body = open_document(data, file)
        check_format_version(body.get("format_version"), file)
        revision = body.pop("revision", None)
        try:
            commit = validate_config(Commit, body, origin=file)
        except UserError as error:
            raise ShardDamage(file, error.problem) from None
        found = content_digest(body)
    if (commit.kind, commit.unit) != (kind, unit):
        raise ShardDamage(file, f"it is the commit of unit {commit.unit} of {commit.kind}, not of {unit} of {kind}")
    if revision != found:
        raise ShardDamage(file, f"its revision is {revision}, its content's {found}")
    _check_content(commit, file)
    return StoredCommit(commit=commit, revision=revision, size=len(data), seal=document_seal(data))


def _open_as_written(sealed: bytes) -> tuple[Commit, str] | None:
    """A sound commit and its revision, in half the time: from the bytes of `commit_bytes`, not from parsed values.

    None where anything is otherwise: the slow way says what.
    """
    if (parts := _WRITTEN.fullmatch(sealed)) is None:
        return None
    start, of_the_run, revision, content = parts.groups()
    if hashlib.sha256(start + content + b"}").hexdigest() != revision.decode():
        return None
    try:
        commit = Commit.model_validate_json(start + of_the_run + content + b"}")
    except ValidationError:
        return None
    return (commit, revision.decode()) if commit.format_version == FORMAT_VERSION else None


def read_commit(storage: Storage, kind: str, unit: int) -> StoredCommit:
    """Read one commit. Raises MissingObject, ShardDamage or FutureFormat."""
    name = commit_name(kind, unit)
    return parse_commit(storage.get(name, MAX_COMMIT_BYTES), storage.url(name), kind, unit)


def is_committed(storage: Storage, kind: str, unit: int) -> bool:
    """Whether a unit is there, by its commit."""
    return storage.exists(commit_name(kind, unit))


def committed_units(storage: Storage, kind: str) -> set[int]:
    """The units that have a commit; without the null embeddings."""
    names = (parse_name(entry.name) for entry in storage.list(f"{kind}/"))
    return {name.unit for name in names if name and name.what == "commit" and name.unit != NULL_UNIT}


def dataset_revision(revisions: Iterable[tuple[str, int, str]]) -> str:
    """The revision of a set of commits, given as (kind, unit, revision): the digest of the sorted list."""
    return canonical_digest(sorted(list(item) for item in revisions))


def _check_content(commit: Commit, file: str) -> None:
    keys = [sample.key for sample in commit.samples]
    if len(set(keys)) != len(keys):
        raise ShardDamage(file, f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    if not commit.tar.name == f"{commit_name(commit.kind, commit.unit)[:-5]}-{commit.tar.sha256[:8]}.tar":
        raise ShardDamage(file, f"it names the tar {commit.tar.name!r}, which cannot be its own")
    summary = LatentSummary if commit.kind == LATENTS else TextSummary
    for sample in commit.samples:
        suffixes = [member.suffix for member in sample.members]
        arrays = [member.suffix for member in sample.arrays()]
        is_complete = suffixes[:1] == [JSON_MEMBER] and arrays and arrays == array_members(commit.kind, len(arrays))
        if not (is_complete and isinstance(sample.summary, summary)):
            raise ShardDamage(file, f"sample {sample.key!r} of {commit.kind} has the members {suffixes}")
        if any(member.offset + member.size > commit.tar.size for member in sample.members):
            raise ShardDamage(file, f"sample {sample.key!r} ends beyond the tar's {commit.tar.size} bytes")
