"""Writes one unit: samples into a tar in a scratch folder, then tar, ledger and commit into the storage, in this order.

A unit without a commit does not exist. A writer that is killed before the commit leaves at most orphans: files that
no reader opens and that `wanshards sweep` removes. The next run writes the same tar, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shards.config import validate_config
from shards.console import LOG
from shards.errors import UserError
from shards.format.arrays import array_facts, encode_array, inspect_array
from shards.format.commit import (
    Blob,
    Commit,
    LatentSummary,
    MemberInfo,
    SampleInfo,
    TextSummary,
    commit_bytes,
    read_commit,
)
from shards.format.keys import sample_key
from shards.format.ledger import LedgerRow, write_ledger
from shards.format.names import (
    FOOTER_MEMBER,
    FORMAT_VERSION,
    HEADER_MEMBER,
    JSON_MEMBER,
    KEY,
    LATENTS,
    NULL_UNIT,
    array_members,
    check_kind,
    commit_name,
    ledger_name,
    stem,
    tar_name,
    text_kind,
)
from shards.format.sealed_json import canonical_digest, canonical_json
from shards.format.tar import TarWriter
from shards.storage.base import Storage

_SUFFIX = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")
_SPOOL_BYTES = 2**20


class ShardWriter:
    """One unit of one kind ('latents' or 'text/<set>'), written sample by sample and sealed at the end.

    A context manager: left without `seal`, nothing reaches the storage and the scratch file is removed.

    Args:
        storage: the dataset's root.
        kind: 'latents' or 'text/<set>'.
        unit: the unit's number.
        identity: the identity of this kind (for text, of its set).
        scratch: an existing folder for the tar while it grows. If it is on the same file system as the dataset, the
            finished tar is linked, not copied. It is not created here: that would hide an unmounted disk.
        provenance: versions and devices, as text.
    """

    def __init__(
        self,
        storage: Storage,
        kind: str,
        unit: int,
        identity: Mapping[str, Any],
        scratch: Path,
        provenance: Mapping[str, str],
    ) -> None:
        check_kind(kind)
        self._storage, self._kind, self._unit = storage, kind, unit
        self._identity_sha256 = canonical_digest(identity)
        self._provenance = dict(provenance)
        self._samples: list[SampleInfo] = []
        self._keys: set[str] = set()
        name = stem(kind, unit).replace("/", "-")
        self._path = scratch / f".tmp-{name}-{os.getpid()}-{secrets.token_hex(4)}.tar"
        self._file = self._path.open("wb", buffering=_SPOOL_BYTES)
        self._tar = TarWriter(self._file)
        header = {"format_version": FORMAT_VERSION, "kind": kind, "unit": unit, "identity": dict(identity)}
        self._tar.add(HEADER_MEMBER, canonical_json({**header, "identity_sha256": self._identity_sha256}))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, key: str, members: Mapping[str, bytes], summary: Mapping[str, Any]) -> None:
        """Append one sample.

        Args:
            key: from `sample_key` ('empty' and 'negative' among the null embeddings).
            members: payloads by suffix: 'json' (canonical), 'latent.npy.zst' or 'text.npy.zst', 'text1.npy.zst' …
                (from `encode_array`), and others such as 'preview.jpg'. They are written in this order.
            summary: fields of LatentSummary or TextSummary.

        Raises UserError for a sample that the reader would refuse; it names the missing part or the wrong field.
        """
        where = f"{stem(self._kind, self._unit)}: sample {key!r}"
        if not KEY.fullmatch(key) or key in self._keys:
            raise UserError(
                f"{where}: the unit has this key already, or it is not a valid key",
                expected="a new key, as sample_key() makes it",
            )
        arrays = self._check_members(where, members)
        info: LatentSummary | TextSummary = (
            validate_config(LatentSummary, summary, origin=where)
            if self._kind == LATENTS
            else validate_config(TextSummary, summary, origin=where)
        )
        ordered = [JSON_MEMBER, *arrays, *sorted(members.keys() - {JSON_MEMBER, *arrays})]
        fields = ("shape", "dtype", "check")
        facts: dict[str, dict[str, Any]] = {
            suffix: dict(zip(fields, inspect_array(members[suffix]), strict=True)) for suffix in arrays
        }
        self._check_summary(where, key, info, [facts[suffix]["shape"] for suffix in arrays])
        infos = []
        for suffix in ordered:
            _, offset, size = self._tar.add(f"{key}.{suffix}", members[suffix])
            sha256 = self._tar.members[-1][1]
            infos.append(MemberInfo(suffix=suffix, offset=offset, size=size, sha256=sha256, **facts.get(suffix, {})))
        self._samples.append(SampleInfo(key=key, summary=info, members=tuple(infos)))
        self._keys.add(key)

    def seal(self, ledger: Sequence[LedgerRow] | None = None) -> Commit:
        """Finish the tar, store it, the ledger and, last, the commit. Returns the commit that is in the storage.

        If another writer committed this unit first, its commit is returned and our files stay as orphans; a warning is
        logged if the two tars differ.
        """
        commit = self._finish(ledger)
        name = commit_name(self._kind, self._unit)
        if not self._storage.put(name, commit_bytes(commit), if_absent=True):
            first = read_commit(self._storage, self._kind, self._unit).commit
            if first.tar != commit.tar:
                LOG.warning("%s: another writer committed %s first; %s is an orphan", name, first.tar, commit.tar)
            return first
        return commit

    def close(self) -> None:
        """Remove the scratch file. Disk errors are ignored: `seal` flushes the file before and raises them."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _finish(self, ledger: Sequence[LedgerRow] | None) -> Commit:
        members = [[member.name, member.offset, member.size, sha256] for member, sha256 in self._tar.members]
        self._tar.add(FOOTER_MEMBER, canonical_json({"num_samples": len(self._samples), "members": members}))
        sha256 = self._tar.finish()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        tar = Blob(name=tar_name(self._kind, self._unit, sha256), size=self._tar.size, sha256=sha256)
        self._storage.put(tar.name, self._path)
        stored_ledger = None
        if ledger is not None:
            data = write_ledger(ledger)
            sha256 = hashlib.sha256(data).hexdigest()
            stored_ledger = Blob(name=ledger_name(self._kind, self._unit, sha256), size=len(data), sha256=sha256)
            self._storage.put(stored_ledger.name, data)
        self.close()
        return Commit(
            kind=self._kind,
            unit=self._unit,
            identity_sha256=self._identity_sha256,
            tar=tar,
            ledger=stored_ledger,
            samples=tuple(self._samples),
            provenance=self._provenance,
        )

    def _check_members(self, where: str, members: Mapping[str, bytes]) -> list[str]:
        arrays = sorted((suffix for suffix in members if suffix.endswith(".npy.zst")), key=lambda s: (len(s), s))
        if JSON_MEMBER not in members or not arrays or arrays != array_members(self._kind, len(arrays)):
            expected = f"json and {', '.join(array_members(self._kind, max(1, len(arrays))))}"
            raise UserError(f"{where}: its members are {sorted(members)}", expected=expected)
        if bad := [suffix for suffix in members if not _SUFFIX.fullmatch(suffix) or len(suffix) > 19]:
            raise UserError(f"{where}: member suffixes {bad}", expected="at most 19 of a–z, 0–9 and inner dots")
        if canonical_json(json.loads(members[JSON_MEMBER])) != members[JSON_MEMBER]:
            raise UserError(f"{where}: its json is not canonical", expected="the bytes of canonical_json()")
        return arrays

    def _check_summary(
        self, where: str, key: str, info: LatentSummary | TextSummary, shapes: list[tuple[int, ...]]
    ) -> None:
        if isinstance(info, LatentSummary):
            made = sample_key(info.clip, info.start_ms, info.frames, info.height, info.width)
            if made != key:
                raise UserError(
                    f"{where}: its summary makes the key {made!r}", expected="the key under which it is added"
                )
        elif info.variants != len(shapes) or info.tokens != tuple(shape[0] for shape in shapes):
            raise UserError(
                f"{where}: {info.variants} variants of {list(info.tokens)} tokens",
                expected=f"what its arrays are: shapes {[list(shape) for shape in shapes]}",
            )


def write_null_embeddings(
    storage: Storage,
    set_name: str,
    identity: Mapping[str, Any],
    empty: np.ndarray,
    negative: np.ndarray,
    *,
    scratch: Path,
    provenance: Mapping[str, str],
    negative_prompt: str,
) -> Commit:
    """Write a text set's two null embeddings: of the empty caption, and of the negative prompt.

    Args:
        storage: the dataset's root.
        set_name: the text set's name.
        identity: the text set's identity.
        empty: tokens × dim, bfloat16's bits as uint16.
        negative: tokens × dim, likewise.
        scratch: a folder for the growing tar.
        provenance: versions and devices, as text.
        negative_prompt: the text behind `negative`.
    """
    with ShardWriter(storage, text_kind(set_name), NULL_UNIT, identity, scratch, provenance) as writer:
        for key, text, array in (("empty", "", empty), ("negative", negative_prompt, negative)):
            tokens = [int(array.shape[0])]
            facts = {"captions": [text], "cut": [[]], "tokens": tokens, "text": [array_facts(array)]}
            members = {JSON_MEMBER: canonical_json(facts), "text.npy.zst": encode_array(array)}
            writer.add(key, members, {"variants": 1, "tokens": tokens})
        return writer.seal()
