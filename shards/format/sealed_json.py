"""Canonical JSON, and documents that carry their own seal.

Canonical: keys sorted, no spaces, ASCII only, no NaN or infinity. A sealed document ends in `"seal":"<hex>"}` and a
newline, where <hex> is the sha256 of every byte before `"seal"`: a flipped bit is found from the document alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from shards.errors import ShardDamage

_TAIL_START = b'"seal":"'
_TAIL_END = b'"}\n'
_TAIL_BYTES = len(_TAIL_START) + 64 + len(_TAIL_END)


def canonical_json(value: Any) -> bytes:
    """Canonical JSON of a plain value. Raises ValueError on NaN, TypeError on values that JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def canonical_digest(value: Any) -> str:
    """sha256, in hex, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def seal_document(body: Mapping[str, Any], indent: int | None = None) -> bytes:
    """The document as sealed JSON bytes. `indent` makes it pleasant to read; the seal covers the bytes as they are."""
    if "seal" in body or not body:
        raise ValueError("a document to seal has keys, and none is named seal")
    if indent is None:
        head = canonical_json(body)[:-1] + b","
    else:
        text = json.dumps(body, sort_keys=True, indent=indent, ensure_ascii=True, allow_nan=False)
        head = text[:-2].encode() + b",\n" + b" " * indent
    return head + _TAIL_START + hashlib.sha256(head).hexdigest().encode() + _TAIL_END


def sealed_part(data: bytes, file: str) -> bytes:
    """All of a sealed document that its seal covers, which is checked. Raises ShardDamage naming `file`."""
    head, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    if not (tail.startswith(_TAIL_START) and tail.endswith(_TAIL_END)):
        raise ShardDamage(
            file, f"truncated or overwritten: {len(data)} bytes that end without a seal", offset=len(data)
        )
    found = hashlib.sha256(head).hexdigest()
    stored = tail[len(_TAIL_START) : -len(_TAIL_END)].decode("latin-1")
    if found != stored:
        raise ShardDamage(file, f"its bytes have sha256 {found}, its seal says {stored}")
    return head


def open_document(data: bytes, file: str) -> dict[str, Any]:
    """The body of a sealed document, without its seal. Raises ShardDamage naming `file`."""
    sealed_part(data, file)
    body = parse_json(data, file)
    if not isinstance(body, dict):
        raise ShardDamage(file, f"its top level is {type(body).__name__}, not an object")
    del body["seal"]
    return body


def document_seal(data: bytes) -> str:
    """The seal (64 hex digits) of a sealed document that was opened before."""
    return data[-_TAIL_BYTES + len(_TAIL_START) : -len(_TAIL_END)].decode("ascii")


def parse_json(data: bytes, file: str, member: str | None = None, offset: int | None = None) -> Any:
    """JSON from untrusted bytes. Raises ShardDamage on anything that is not JSON, NaN and infinity among it."""
    try:
        return json.loads(data, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        what = f"not JSON: {str(error)[:200]}"
        raise ShardDamage(file, what, member=member, offset=offset) from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"a number that is not finite: {text}")
    return number
