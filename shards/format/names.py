"""Names of the objects of a dataset, under its root."""

from __future__ import annotations

import re
from typing import NamedTuple

from shards.errors import UserError

FORMAT_VERSION = 1
INFO_NAME = "dataset.json"
INDEX_NAME = "index.jsonl.zst"
HEADER_MEMBER = "__wanshards__/header"
FOOTER_MEMBER = "__wanshards__/footer"
LATENTS = "latents"
NULL_UNIT = -1
"""The unit number under which a text set's null embeddings are written; its objects are named `null…`."""
MAX_UNIT = 10**9 - 1
_STEM = r"(?P<folder>latents|text/[a-z0-9][a-z0-9_-]{0,39})/(?:shard-(?P<unit>\d{6,9})|(?P<null>null))"
_OBJECT = re.compile(
    _STEM + r"(?:(?P<commit>\.json)|-(?P<digest>[0-9a-f]{8})(?:(?P<tar>\.tar)|(?P<ledger>\.ledger\.jsonl\.zst)))"
)
KEY = re.compile(r"[a-z0-9_@~-]{1,80}")
"""What a key looks like."""
_SET = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


class ObjectName(NamedTuple):
    """The meaning of a name under `latents/` or `text/<set>/`; `what` is 'commit', 'tar' or 'ledger'."""

    kind: str
    unit: int
    what: str


def text_kind(set_name: str) -> str:
    """The kind of a text set's shards. Raises UserError on a name that is not plain lower case."""
    if not _SET.fullmatch(set_name):
        raise UserError(
            f"text set {set_name!r}", expected="1 to 40 of a–z, 0–9, - and _, starting with a letter or a digit"
        )
    return f"text/{set_name}"


def check_kind(kind: str) -> None:
    """Raises ValueError unless `kind` is 'latents' or 'text/<set>'."""
    folder, _, name = kind.partition("/")
    if kind != LATENTS and (folder != "text" or not _SET.fullmatch(name)):
        raise ValueError(f"kind {kind!r} is neither {LATENTS!r} nor 'text/<set>'")


def stem(kind: str, unit: int) -> str:
    """The common start of the names of one unit's objects."""
    check_kind(kind)
    if not NULL_UNIT <= unit <= MAX_UNIT or (unit == NULL_UNIT and kind == LATENTS):
        raise ValueError(f"unit {unit} of {kind}")
    return f"{kind}/null" if unit == NULL_UNIT else f"{kind}/shard-{unit:06d}"


def commit_name(kind: str, unit: int) -> str:
    """Name of a unit's commit."""
    return f"{stem(kind, unit)}.json"


def tar_name(kind: str, unit: int, sha256: str) -> str:
    """Name of a unit's tar: it has the first eight digits of its digest, so two tars of a unit differ in name."""
    return f"{stem(kind, unit)}-{sha256[:8]}.tar"


def ledger_name(kind: str, unit: int, sha256: str) -> str:
    """Name of a unit's ledger, which carries its digest for the same reason."""
    return f"{stem(kind, unit)}-{sha256[:8]}.ledger.jsonl.zst"


def parse_name(name: str) -> ObjectName | None:
    """The meaning of a name; None for a name that the format does not use."""
    match = _OBJECT.fullmatch(name)
    if not match:
        return None
    kind, unit = match["folder"], NULL_UNIT if match["null"] else int(match["unit"])
    what = "commit" if match["commit"] else "tar" if match["tar"] else "ledger"
    is_canonical = (unit != NULL_UNIT or kind != LATENTS) and name.startswith(stem(kind, unit))
    return ObjectName(kind, unit, what) if is_canonical else None


def text_member(variant: int) -> str:
    """Suffix of the embedding of one caption variant: text.npy.zst, text1.npy.zst, …"""
    return "text.npy.zst" if variant == 0 else f"text{variant}.npy.zst"


LATENT_MEMBER = "latent.npy.zst"
JSON_MEMBER = "json"
PREVIEW_MEMBER = "preview.jpg"


def array_members(kind: str, num_arrays: int) -> list[str]:
    """The suffixes of a sample's arrays, in order."""
    return [LATENT_MEMBER] if kind == LATENTS else [text_member(variant) for variant in range(num_arrays)]
