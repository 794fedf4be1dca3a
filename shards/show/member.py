"""One member of a sample, by name, checked against the commit's sha256."""

from __future__ import annotations

import hashlib

import zstandard

from shards.errors import MissingObject, ShardDamage, UserError
from shards.format.arrays import MAX_ARRAY_BYTES, decode_array
from shards.format.commit import MemberInfo, read_commit
from shards.format.names import JSON_MEMBER, LATENTS, PREVIEW_MEMBER, text_kind
from shards.read.dataset import Dataset, open_dataset
from shards.storage import open_storage
from shards.storage.base import Storage


def member_bytes(root: str, name: str, text_set: str | None = None, npy: bool = False) -> bytes:
    """The bytes of `<key>.<suffix>`, from the latents or, when they have no such member, from the text set.

    With a text set named, of that set alone. Raises UserError when no such sample or member is there, ShardDamage when
    it is not what its commit says; with `npy` the zstd frame is undone.
    """
    key, _, suffix = name.partition(".")
    storage = open_storage(root)
    kinds = [text_kind(text_set)] if text_set else [LATENTS, text_kind("default")]
    dataset = open_dataset(root, None)
    unit = dataset.shard(key).unit
    there: list[str] = []
    for kind in kinds:
        try:
            commit = read_commit(storage, kind, unit).commit
        except MissingObject:
            if kind == LATENTS or text_set:
                raise
            continue  # nobody asked for the default text set
        sample = next((sample for sample in commit.samples if sample.key == key), None)
        member = sample.member(suffix) if sample else None
        if member:
            return read_member(storage, commit.tar.name, name, member, npy)
        there += [item.suffix for item in sample.members] if sample else []
    raise UserError(f"sample {key} has no member {suffix!r}", expected=f"one of {', '.join(there)}")


def preview_bytes(dataset: Dataset, key: str) -> bytes | None:
    """The preview strip of a sample, a JPEG; None where it was sealed without. Raises ShardDamage, UserError."""
    shard = dataset.shard(key)
    storage = dataset.storage(shard)
    commit = read_commit(storage, LATENTS, shard.unit).commit
    member = next(sample for sample in commit.samples if sample.key == key).member(PREVIEW_MEMBER)
    return read_member(storage, commit.tar.name, f"{key}.{PREVIEW_MEMBER}", member) if member else None


def read_member(storage: Storage, tar: str, name: str, member: MemberInfo, npy: bool = False) -> bytes:
    """The bytes of the member `name` of a tar, checked against its commit's sha256. Raises ShardDamage, UserError."""
    data = storage.get_range(tar, member.offset, member.size)
    found = hashlib.sha256(data).hexdigest()
    if found != member.sha256:
        what = f"sha256 {found}, its commit says {member.sha256}"
        raise ShardDamage(storage.url(tar), what, member=name, offset=member.offset)
    if not npy:
        return data
    if member.shape is None or member.dtype is None:
        raise UserError(f"{name} is no array", expected=f"a member in .npy.zst, not .{JSON_MEMBER}")
    decode_array(data, shape=member.shape, dtype=member.dtype)
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_ARRAY_BYTES)
