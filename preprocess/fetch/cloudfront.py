"""CloudFront's signed URLs and signed cookies, from a key that only the environment holds.

Source: Amazon CloudFront Developer Guide, "Serving private content with signed URLs and signed cookies". A statement
names a resource and when it ends; it is signed with SHA-1 by an RSA or an ECDSA P-256 key.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from preprocess.config import SigningConfig
from preprocess.corpus.url import HttpUrl, unsigned
from preprocess.fetch.hosts import matches
from shards.errors import UserError
from shards.format.sealed_json import canonical_json

KEY_VARIABLE = "CLOUDFRONT_PRIVATE_KEY"
KEY_PAIR_VARIABLE = "CLOUDFRONT_KEY_PAIR_ID"

Sign = Callable[[bytes], bytes]


class Signed(NamedTuple):
    """A request's URL and headers. Both are secret: they are sent to the server and never written."""

    url: HttpUrl
    headers: dict[str, str]


class _Statement(NamedTuple):
    """A signed statement in CloudFront's encoding, and its end in seconds since 1970."""

    policy: str
    signature: str
    expires: int


class CloudFrontSigner:
    """Signs the URLs of `fetch.sign.hosts`; used by many threads at once."""

    def __init__(self, config: SigningConfig, key_pair_id: str, sign: Sign) -> None:
        self._config = config
        self._hosts = tuple(host.lower() for host in config.hosts)
        self._key_pair_id = key_pair_id
        self._sign = sign
        self._lock = threading.Lock()
        self._shared: dict[str, _Statement] = {}

    def sign(self, url: HttpUrl) -> Signed:
        """`url` with its signature; unchanged on another host."""
        if not self._covers(url.host):
            return Signed(url, {})
        # Only the target changes: the host stays the one that was checked.
        url = url._replace(target=unsigned(url.text)[len(url.text) - len(url.target) :])
        mode, resource = self._config.mode, self._config.resource
        if mode == "url":
            statement = self._new_statement(url.text)
            return Signed(_with_query(url, f"Expires={statement.expires}", statement, self._key_pair_id), {})
        if mode == "policy":
            statement = self._new_statement(url.text) if resource is None else self._shared_statement(resource)
            return Signed(_with_query(url, f"Policy={statement.policy}", statement, self._key_pair_id), {})
        statement = self._shared_statement(resource or f"{url.scheme}://{url.netloc}/*")
        cookies = {
            "CloudFront-Policy": statement.policy,
            "CloudFront-Signature": statement.signature,
            "CloudFront-Key-Pair-Id": self._key_pair_id,
        }
        return Signed(url, {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())})

    def renew(self, url: str) -> bool:
        """Forget the signatures that are shared between clips; whether signing `url` again can help."""
        with self._lock:
            self._shared.clear()
        return self._covers(urlsplit(url).hostname or "")

    def _covers(self, host: str) -> bool:
        return matches(host, self._hosts)

    def _shared_statement(self, resource: str) -> _Statement:
        """A statement that many clips share, renewed when less than half of its time is left."""
        with self._lock:
            statement = self._shared.get(resource)
            if statement is None or statement.expires - time.time() < self._config.valid_seconds / 2:
                statement = self._shared[resource] = self._new_statement(resource)
            return statement

    def _new_statement(self, resource: str) -> _Statement:
        expires = int(time.time() + self._config.valid_seconds)
        # Byte for byte what CloudFront assembles from a canned URL: this order, no blanks.
        policy = canonical_policy(resource, expires)
        return _Statement(_encode(policy), _encode(self._sign(policy)), expires)


def canonical_policy(resource: str, expires: int) -> bytes:
    """CloudFront's canned policy for `resource` until `expires`, in seconds since 1970."""
    until = f'"Condition":{{"DateLessThan":{{"AWS:EpochTime":{expires}}}}}'
    return f'{{"Statement":[{{"Resource":{canonical_json(resource).decode()},{until}}}]}}'.encode()


def open_signer(config: SigningConfig, environment: Mapping[str, str] | None = None) -> CloudFrontSigner | None:
    """The signer that `fetch.sign` asks for; None where it asks for none. Raises UserError, never naming the key."""
    if config.mode == "none":
        return None
    environment = os.environ if environment is None else environment
    key, key_pair_id = (environment.get(name, "").strip() for name in (KEY_VARIABLE, KEY_PAIR_VARIABLE))
    for name, value in ((KEY_VARIABLE, key), (KEY_PAIR_VARIABLE, key_pair_id)):
        if not value:
            expected = f"{KEY_VARIABLE}: a private key's PEM or its file; {KEY_PAIR_VARIABLE}: the public key's id"
            raise UserError(f"fetch.sign.mode is {config.mode}, and {name} is not set", expected=expected)
    if not (key_pair_id.isascii() and key_pair_id.isalnum()):
        raise UserError(f"{KEY_PAIR_VARIABLE} is not a key's id", expected="letters and digits, such as K2JCJMDEHXQW5F")
    return CloudFrontSigner(config, key_pair_id, _load_key(_read_key(key)))


def _read_key(value: str) -> bytes:
    """PEM text, with real or escaped line breaks; else the file's content."""
    if "-----BEGIN" in value:
        return value.replace("\\n", "\n").encode()
    try:
        return Path(value).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        # The value may be a key without its first line: it is not printed.
        why = error.strerror if isinstance(error, OSError) else "not a path"
        raise UserError(f"{KEY_VARIABLE} is neither PEM text nor a file: {why}") from None


def _load_key(pem: bytes) -> Sign:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    sha1 = hashes.SHA1()  # noqa: S303 - what CloudFront checks
    try:
        key: Any = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = "it has a password" if isinstance(error, TypeError) else "it is not the PEM of a private key"
        raise UserError(f"{KEY_VARIABLE} cannot be read: {why}", fix="openssl pkey -in KEY -out PLAIN") from None
    if isinstance(key, rsa.RSAPrivateKey):
        return lambda message: key.sign(message, padding.PKCS1v15(), sha1)
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1":
        return lambda message: key.sign(message, ec.ECDSA(sha1))
    raise UserError(f"{KEY_VARIABLE}: a key type that CloudFront does not accept", expected="RSA, or ECDSA on P-256")


def _with_query(url: HttpUrl, term: str, statement: _Statement, key_pair_id: str) -> HttpUrl:
    separator = "&" if "?" in url.target else "?"
    query = f"{separator}{term}&Signature={statement.signature}&Key-Pair-Id={key_pair_id}"
    return url._replace(target=url.target + query)


def _encode(data: bytes) -> str:
    """Base64 with CloudFront's replacements for characters that a URL cannot hold."""
    return base64.b64encode(data).translate(bytes.maketrans(b"+=/", b"-_~")).decode()
