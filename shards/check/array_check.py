"""The deep check of a unit: every array decoded, finite, and what its sample's JSON says it is."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

from shards.errors import ShardDamage
from shards.format.arrays import (
    MAX_LATENT_MAGNITUDE,
    MAX_LATENT_RMS,
    decode_array,
    implausible_latent,
    largest_magnitude,
    root_mean_square,
)
from shards.format.commit import Commit, MemberInfo, SampleInfo
from shards.format.names import JSON_MEMBER, LATENTS
from shards.format.sealed_json import parse_json
from shards.storage.base import Storage


def check_arrays(storage: Storage, commit: Commit) -> Iterator[ShardDamage]:
    """Every damage in the arrays of one unit, whose tar is known to have the bytes that were written."""
    for sample in commit.samples:
        try:
            meta = _json(storage, commit, sample)
        except ShardDamage as damage:
            yield damage
            continue
        for place, member in enumerate(sample.arrays()):
            try:
                _check_array(storage, commit, member, _facts(commit.kind, meta, place))
            except ShardDamage as damage:
                name = f"{sample.key}.{member.suffix}"
                yield ShardDamage(storage.url(commit.tar.name), damage.what, member=name, offset=member.offset)


def _json(storage: Storage, commit: Commit, sample: SampleInfo) -> Any:
    member = next(member for member in sample.members if member.suffix == JSON_MEMBER)
    data = storage.get_range(commit.tar.name, member.offset, member.size)
    return parse_json(data, storage.url(commit.tar.name), f"{sample.key}.{JSON_MEMBER}", member.offset)


def _facts(kind: str, meta: Any, place: int) -> Any:
    try:
        return meta["latent"] if kind == LATENTS else meta["text"][place]
    except (KeyError, IndexError, TypeError):
        return None


def _check_array(storage: Storage, commit: Commit, member: MemberInfo, facts: Any) -> None:
    shape, dtype = member.shape or (), str(member.dtype)
    data = storage.get_range(commit.tar.name, member.offset, member.size)
    array = decode_array(data, shape=shape, dtype=dtype)
    sha256 = hashlib.sha256(array.tobytes()).hexdigest()
    if facts != {"shape": list(shape), "dtype": dtype, "sha256": sha256}:
        raise ShardDamage("array", f"{dtype} {list(shape)} with sha256 {sha256}, the sample's JSON says {facts!r}")
    largest = largest_magnitude(array)
    if largest > (MAX_LATENT_MAGNITUDE if commit.kind == LATENTS else sys.float_info.max):
        raise ShardDamage("array", implausible_latent(largest))
    if commit.kind == LATENTS and array.size and (rms := root_mean_square(array)) > MAX_LATENT_RMS:
        raise ShardDamage("array", f"its root mean square is {rms:.3g}: a normalised latent's is near 1")
