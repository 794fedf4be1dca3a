"""Identity: the digest of what decides the numbers; and the refusal to mix two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shards.errors import UserError
from shards.format.sealed_json import canonical_digest, canonical_json

_MAX_SHOWN = 8
_MISSING = object()


class IdentityMismatch(UserError):
    """Two things that may not be mixed, with both digests and the fields that differ."""


def refuse_mismatch(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str, fix: str | None = None) -> None:
    """Return if both identities are equal; otherwise raise IdentityMismatch.

    Args:
        ours: the identity that is asked for.
        theirs: the identity that is there.
        what: what carries `theirs`, for the message.
        fix: what to do about it; by default, to build into another folder or to take back the change.
    """
    our_digest, their_digest = canonical_digest(ours), canonical_digest(theirs)
    if our_digest == their_digest:
        return
    lines = [f"{what} has identity {their_digest}, expected {our_digest}; they may not be mixed. They differ in:"]
    fields = list(differing_fields(ours, theirs))
    lines += [f"  {name}: there {_show(there)}, expected {_show(here)}" for name, here, there in fields[:_MAX_SHOWN]]
    if len(fields) > _MAX_SHOWN:
        lines.append(f"  and {len(fields) - _MAX_SHOWN} more")
    fix = fix or "take back the change of these fields, or build into (or read from) another root"
    raise IdentityMismatch("\n".join(lines), fix=fix)


def differing_fields(ours: Any, theirs: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf in which two plain values differ, as (dotted name, ours, theirs)."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(ours.keys() | theirs.keys()):
            here, there = ours.get(key, _MISSING), theirs.get(key, _MISSING)
            yield from differing_fields(here, there, f"{prefix}.{key}" if prefix else key)
    elif ours is _MISSING or theirs is _MISSING or canonical_json(ours) != canonical_json(theirs):
        yield prefix, ours, theirs


def _show(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    text = canonical_json(value).decode()
    return text if len(text) <= 100 else text[:97] + "..."
