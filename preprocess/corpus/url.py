"""A clip's URL: how it is spelled for a request, and which parts may be written, kept and compared.

Nothing here uses the network. Signatures are secrets: `unsigned` removes them, `redact` also removes the query.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import unquote_plus, urlsplit

_SIGNATURES = {
    "keypairid", "awsaccesskeyid", "xamzcredential", "xgoogcredential", "googleaccessid", "xosscredential",
    "ossaccesskeyid", "hdnts", "hdnea", "hdntl", "hdnt", "gda", "auth", "authorization", "authkey", "jwt", "sig",
    "sign", "hmac", "apikey", "secret", "password", "wssecret", "txsecret",
}  # fmt: skip
"""Parameters that only a signed URL has, as letters and digits in lower case, beside all whose names end in `token` or
hold `signature`: CloudFront, S3, Google, Akamai, Azure, OSS and others."""
_COMPANIONS = {"expires", "expire", "expiry", "exp", "policy", "hashalgorithm", "wstime", "txtime"}
"""Parameters that accompany a signature; alone they may mean anything."""
_HASHES, _TIMES = {"md5", "st", "hash"}, {"expires", "expire", "expiry", "exp", "e"}
"""nginx's secure links: one of the first is a signature where one of the second says a time in seconds since 1970."""
_AZURE = {"se", "sp", "sv", "sr", "ss", "srt", "st", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv"}
"""Parameters that accompany Azure's `sig`."""
_ENCODED = re.compile(
    r"%(?:25)*(?:3f|26|3b|23)([^=%&;/?#]{1,60})(?:=|%(?:25)*3d)((?:(?!%(?:25)*(?:26|3b|23|2f))[^&;/?#])*)",
    re.IGNORECASE,
)
"""A parameter behind an encoded `?`, `&`, `;` or `#`: of a URL within a URL, or of one that was encoded twice."""
_SIGNED_VALUE = re.compile(r"(?:^|[~!&;,*])(?:hmac|signature|sig)=|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.")
"""A value that is a signature under any name: Akamai's `exp=…~hmac=…`, a JSON web token."""
_HTTP = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::([0-9]{0,5}))?", re.IGNORECASE | re.ASCII)
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
USER_IN_URL = re.compile(r"://[^/\s]*@")
"""User name and password in front of a host, which no message may hold."""
_PLAIN_TARGET = re.compile(r"/[\w\-.~!$&'()*+,;=:@/]*(?:\?[\w\-.~!$&'()*+,;=:@/?]*)?", re.ASCII)
"""A target that percent-encoding does not change, unless a segment of its path consists of dots."""


class HttpUrl(NamedTuple):
    """An HTTP(S) URL, split once: the host that is checked is by construction the host that is connected to."""

    scheme: str
    host: str
    """In lower case: letters, digits, dots and hyphens, or an IP address; an IPv6 address without its brackets."""
    port: int | None
    target: str
    """Path and query, percent-encoded as they are sent: a signature must cover this text."""

    @property
    def netloc(self) -> str:
        """Host and port, as in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def text(self) -> str:
        """The URL as one string; it may hold a signature."""
        return f"{self.scheme}://{self.netloc}{self.target}"


def spell_url(url: str) -> HttpUrl:
    """The only reading of a URL that is used for checks, signatures and requests. Raises ValueError with the reason."""
    split = _HTTP.fullmatch(url)
    if split is None:
        raise ValueError("expected http://, https:// or s3://")
    check_printable(url)
    if "@" in split[2]:
        raise ValueError("carries a user name or password")
    authority = _AUTHORITY.fullmatch(split[2])
    if authority is None:
        raise ValueError("its host is not an IP address or a name of letters, digits, dots and hyphens (xn--…)")
    port = int(authority[2]) if authority[2] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError("its port is not 1 to 65535")
    return HttpUrl(split[1].lower(), _check_host(authority[1].lower()), port, _encode_target(split[3]))


def check_printable(url: str) -> None:
    """Raises ValueError for control characters, which URL parsers drop or read differently."""
    if any(character < " " or character == "\x7f" for character in url):
        raise ValueError("holds a control character")


def _check_host(host: str) -> str:
    try:
        if host.startswith("["):
            return str(ipaddress.IPv6Address(host[1:-1]))
        host = host.removesuffix(".")
        labels = host.split(".")
        if _NUMBER.fullmatch(labels[-1]):  # resolvers read 127.1, 0x7f.1 and 2130706433 as addresses
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise ValueError("its host is not an IP address") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("its host is not a host name")
    return host


def _encode_target(rest: str) -> str:
    if _PLAIN_TARGET.fullmatch(rest) and "/." not in rest:
        return rest
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    try:
        return parse_url(f"http://host{rest}").request_uri
    except (LocationParseError, UnicodeError):
        raise ValueError("its path or query cannot be encoded") from None


def redact(url: str) -> str:
    """A URL without user name, signature, query and fragment: all that may be written anywhere."""
    try:
        parts = urlsplit(unsigned(url))
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not a URL)"
    # Without a host any part of it may be a secret.
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}" if parts.hostname else "(not a URL)"


def unsigned(url: str) -> str:
    """`url` without the signature in its query, path or fragment, and unchanged where it carries none.

    The rest of a query stays: it may name the clip. A lone `Expires` or `Policy` is not a signature.
    """
    if "=" not in url and "%" not in url:
        return url
    if "%" in url:
        url = _ENCODED.sub(lambda found: "" if _is_signature(f"{found[1]}={found[2]}") else found[0], url)
    before, hash_mark, fragment = url.partition("#")
    before, mark, query = before.partition("?")
    is_web = before[:4].lower() == "http"  # the key of an s3:// object may hold anything
    segments = before.split("/") if is_web else [before]
    items = [item for text in (*segments[3:], query, fragment) for item in re.split("[&;]", text)]
    drop = {_name(item) for item in items if _is_signature(item)}
    if any(_name(item) in _TIMES and re.fullmatch("[0-9]{9,11}", item.partition("=")[2]) for item in items):
        drop |= {name for item in items if (name := _name(item)) in _HASHES}
    if not drop:
        return url
    drop |= _COMPANIONS | (_AZURE if "sig" in drop else set()) | (_TIMES if drop & _HASHES else set())

    def keep(item: str) -> bool:
        name = _name(item)
        return not (_is_signature(item) or name in drop or name.startswith(("xamz", "xgoog", "xoss")))

    def kept(text: str, separators: str = "&;") -> str:
        if not separators:
            return text if keep(text) else ""
        parts = text.split(separators[0])
        return separators[0].join(part for each in parts if (part := kept(each, separators[1:])) or not each)

    path = [segment for each in segments[3:] if (segment := kept(each, ";")) or not each]
    before, query, fragment = "/".join([*segments[:3], *path]), kept(query), kept(fragment)
    return before + (mark + query if query else "") + (hash_mark + fragment if fragment else "")


def cache_name(url: str) -> str:
    """A key of the clip that is the same however often its URL is signed; to be hashed, never written."""
    query = unsigned(url).partition("#")[0].partition("?")[2]
    return f"{redact(url)}?{query}"


def _name(item: str) -> str:
    """A parameter's name as its letters and digits, in lower case."""
    return re.sub("[^a-z0-9]", "", _decoded(item).partition("=")[0].lower())


def _decoded(item: str) -> str:
    """An item, decoded; one without `=` may have been encoded as a whole."""
    name, mark, value = item.partition("=")
    return f"{unquote_plus(name)}{mark}{unquote_plus(value)}"


def _is_signature(item: str) -> bool:
    if "=" not in item and "%" not in item:
        return False
    name, mark, value = _decoded(item).partition("=")
    name = re.sub("[^a-z0-9]", "", name.lower())
    is_named = name in _SIGNATURES or name.endswith("token") or "signature" in name
    if name == "verify":
        is_named = re.match("[0-9]{10}-", value) is not None
    return bool(mark) and (is_named or bool(_SIGNED_VALUE.search(value)))
