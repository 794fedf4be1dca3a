"""Which parts of a clip's URL may be written, kept and compared; nothing here uses the network."""

from __future__ import annotations

from urllib.parse import unquote_plus, urlsplit

_SIGNATURES = frozenset(
    {"signature", "key-pair-id", "awsaccesskeyid", "x-amz-signature", "x-amz-credential", "x-amz-security-token"}
)
"""Parameters that only a signed URL has, in lower case."""
_SIGNING = _SIGNATURES | {"expires", "policy", "hash-algorithm"}
"""Parameters that accompany a signature; alone they may mean anything."""


def redact(url: str) -> str:
    """A URL without user name, query and fragment: all that may be written anywhere."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not a URL)"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def unsigned(url: str) -> str:
    """`url` without the parameters of a CloudFront or S3 signature, and as it is where it carries none.

    The rest of a query stays: it may well name the clip. A lone `Expires` or `Policy` is no signature.
    """
    before, mark, query = url.partition("?")
    query, hash_mark, fragment = query.partition("#")
    items = query.split("&")
    if not mark or not any(_name(item) in _SIGNATURES for item in items):
        return url
    kept = "&".join(item for item in items if not _signs(_name(item)))
    return before + (f"?{kept}" if kept else "") + hash_mark + fragment


def cache_name(url: str) -> str:
    """A key of the clip that is the same however often its URL is signed; to be hashed, never written."""
    query = unsigned(url).partition("#")[0].partition("?")[2]
    return f"{redact(url)}?{query}"


def _name(item: str) -> str:
    return unquote_plus(item.partition("=")[0]).strip().lower()


def _signs(name: str) -> bool:
    return name in _SIGNING or name.startswith("x-amz-")
