"""What CloudFront does with a signature, written anew from its documentation: a gate in front of a test's answers.

Refuses with 403 what is not signed, signed by another key, for another resource, or past its time.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

KEY_PAIR_ID = "KTESTHUSHPAIRID"
_SIGNING = ("Expires", "Policy", "Signature", "Key-Pair-Id")


class Gate:
    """Keys, a clock that can be moved, and every secret that it was shown."""

    def __init__(self, kind: str = "rsa") -> None:
        is_rsa = kind == "rsa"
        self.key: Any = rsa.generate_private_key(65537, 2048) if is_rsa else ec.generate_private_key(ec.SECP256R1())
        self.clock_seconds = 0.0
        self.secrets: set[str] = set()
        self.verdicts: list[str] = []

    @property
    def pem(self) -> str:
        form = serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()

    def write_key(self, path: Path) -> Path:
        path.write_text(self.pem)
        return path

    def guards(self, answer: Callable[[Any], None]) -> Callable[[Any], None]:
        """`answer` behind the gate."""

        def guarded(handler: Any) -> None:
            verdict = self.judge(f"http://{handler.headers['Host']}{handler.path}", handler.headers.get("Cookie", ""))
            self.verdicts.append(verdict)
            if verdict == "open":
                answer(handler)
            else:
                handler.send_response(403)
                handler.send_header("Content-Length", "7")
                handler.end_headers()
                handler.wfile.write(b"<Error>")

        return guarded

    def judge(self, url: str, cookie: str = "") -> str:
        """`open`, or why not."""
        before, _, query = url.partition("?")
        told = dict(parse_qsl(query))
        jar = SimpleCookie(cookie)
        told |= {name.removeprefix("CloudFront-"): morsel.value for name, morsel in jar.items()}
        self.secrets |= {told[name] for name in ("Signature", "Policy", "Key-Pair-Id") if name in told}
        if "Signature" not in told or told.get("Key-Pair-Id") != KEY_PAIR_ID:
            return "unsigned"
        rest = "&".join(item for item in query.split("&") if item and item.split("=")[0] not in _SIGNING)
        resource = before + (f"?{rest}" if rest else "")
        if "Policy" in told:
            policy = _unspell(told["Policy"])
        else:
            policy = (
                '{"Statement":[{"Resource":"' + resource + '","Condition":{"DateLessThan":{"AWS:EpochTime":'
                + told["Expires"] + "}}}]}"
            ).encode()  # fmt: skip
        if not self._verifies(_unspell(told["Signature"]), policy):
            return "forged"
        statement = json.loads(policy)["Statement"][0]
        pattern = re.escape(statement["Resource"]).replace(r"\*", ".*").replace(r"\?", ".")
        if not re.fullmatch(pattern, resource):
            return "elsewhere"
        until = statement["Condition"]["DateLessThan"]["AWS:EpochTime"]
        return "open" if time.time() + self.clock_seconds < until else "expired"

    def _verifies(self, signature: bytes, policy: bytes) -> bool:
        public, sha1 = self.key.public_key(), hashes.SHA1()  # noqa: S303 - CloudFront's own choice
        try:
            if isinstance(self.key, rsa.RSAPrivateKey):
                public.verify(signature, policy, padding.PKCS1v15(), sha1)
            else:
                public.verify(signature, policy, ec.ECDSA(sha1))
        except InvalidSignature:
            return False
        return True


def _unspell(text: str) -> bytes:
    return base64.b64decode(text.translate(str.maketrans("-_~", "+=/")))
