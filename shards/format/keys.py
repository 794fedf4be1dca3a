"""Sample keys and the hashes of clip ids: names that survive tar, S3 and file systems that fold case.

key = <clip> "@" <start_ms> "-" <frames> "-" <height> "x" <width>, where <clip> keeps a–z, 0–9 and an inner "-", and
writes every other byte of the id's UTF-8 as "_" and two hex digits. A clip part longer than 48 characters becomes its
first 15 characters, "~" and 32 hex digits of the id's sha256. Neither "@" nor "~" occurs in an escaped id, and
upper-case letters are escaped, so two samples share a key only if they are the same sample, also where case is folded.
"""

from __future__ import annotations

import hashlib

from shards.errors import UserError

MAX_CLIP_CHARACTERS = 48
_HEAD_CHARACTERS = 15
_HASH_CHARACTERS = 32
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-")
_MAX_START_MS = 10**10 - 1
_MAX_SIZE = 10**5 - 1


def sample_key(clip_id: str, start_ms: int, num_frames: int, height: int, width: int) -> str:
    """The key of one sample: ASCII, no dot, at most 80 bytes, injective over its arguments.

    Args:
        clip_id: any text, not empty.
        start_ms: window start in milliseconds, 0 … 9,999,999,999.
        num_frames: frames of the window.
        height: pixels.
        width: pixels.

    Raises:
        UserError: an empty clip id, or a number out of range.
    """
    _check("start_ms", start_ms, 0, _MAX_START_MS)
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        _check(name, value, 1, _MAX_SIZE)
    return f"{_clip_part(clip_id)}@{start_ms}-{num_frames}-{height}x{width}"


def clip_hash(clip_id: str, purpose: str = "order") -> int:
    """A stable uint64 of a clip id: the first eight bytes, big-endian, of sha256(purpose, NUL, id).

    The purpose separates uses: were the plan ordered by the hash that splits train from validation, the first units
    of every plan would be validation only.
    """
    data = purpose.encode() + b"\0" + _utf8(clip_id)
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def is_validation(clip_id: str, fraction: float) -> bool:
    """Whether a clip belongs to the held-out `fraction` (0 … 1). A clip never changes sides as others are added;
    raising the fraction only moves clips from train to validation."""
    return clip_hash(clip_id, "split") < fraction * 2.0**64


def _clip_part(clip_id: str) -> str:
    if not clip_id:
        raise UserError("clip id is empty", expected="the id of a clip")
    data = _utf8(clip_id)
    # A leading "-" would read as an option on a command line.
    escaped = "".join(
        chr(byte) if byte in _PLAIN and (place or byte != ord("-")) else f"_{byte:02x}"
        for place, byte in enumerate(data)
    )
    if len(escaped) <= MAX_CLIP_CHARACTERS:
        return escaped
    return f"{escaped[:_HEAD_CHARACTERS]}~{hashlib.sha256(data).hexdigest()[:_HASH_CHARACTERS]}"


def _utf8(text: str) -> bytes:
    # JSON may carry lone surrogates; they are bytes like any other here.
    return text.encode("utf-8", "surrogatepass")


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} is {value}", expected=f"an integer from {low} to {high}")
