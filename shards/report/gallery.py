"""Which samples and refused records a report shows, and what it says of each, within a number of bytes."""

from __future__ import annotations

import base64
import heapq
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

from shards.errors import MissingObject, ShardDamage
from shards.format.commit import Commit, LatentSummary, SampleInfo, read_commit
from shards.format.dataset_info import DatasetInfo
from shards.format.keys import clip_hash
from shards.format.ledger import LedgerRow
from shards.format.names import LATENTS, text_kind
from shards.read.outcomes import unit_rows
from shards.read.units import list_units
from shards.show.member import read_member
from shards.stats.unit import read_json
from shards.storage.base import Storage

PREVIEW_SHARE, RECORD_SHARE, REFUSED_SHARE = 0.60, 0.22, 0.12
"""Parts of the page's bytes for preview strips, for what is said of samples, and for refused records."""
MAX_PREVIEW_BYTES = 2**18
_REFUSED_PER_REASON = 400
_LONGEST_TEXT = 4000


class Gallery(NamedTuple):
    """What the page's script shows."""

    samples: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    num_samples: int
    """Samples of the dataset."""
    num_pictures: int
    """Samples on the page with their preview strip."""
    num_rejected: int
    """Refused records of the dataset."""
    bad: tuple[str, ...]
    """Codes of findings that are to be fixed."""

    def data(self) -> dict[str, Any]:
        """As plain values for the page."""
        return {
            "samples": self.samples,
            "rejected": self.rejected,
            "bad": list(self.bad),
            "note_without_picture": "Its preview strip is not on this page: see `wanshards cat ROOT KEY.preview.jpg`.",
            "note_not_here": "The page holds a choice of the dataset. `wanshards show ROOT KEY` shows any sample.",
        }


class RefusedKeeper:
    """Keeps some refused records of every reason: those of smallest hash, in whatever order they come."""

    def __init__(self) -> None:
        self.num_seen = 0
        self._kept: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}

    def add(self, row: LedgerRow) -> None:
        """Take one refused record."""
        self.num_seen += 1
        kept = self._kept.setdefault(f"{row.stage}/{row.reason}", [])
        item = (-clip_hash(row.clip_id or row.source, "report"), self.num_seen, _refused(row))
        if len(kept) < _REFUSED_PER_REASON:
            heapq.heappush(kept, item)
        else:
            heapq.heappushpop(kept, item)

    def rows(self, max_bytes: int) -> list[dict[str, Any]]:
        """Kept records within a number of bytes, taken in turn from every reason."""
        queues = [[row for *_, row in sorted(kept, reverse=True)] for kept in self._kept.values()]
        in_turn = [queue[place] for place in range(_REFUSED_PER_REASON) for queue in queues if place < len(queue)]
        total = accumulate(map(_size, in_turn))
        return [row for row, num_bytes in zip(in_turn, total, strict=True) if num_bytes <= max_bytes]


class _Unit(NamedTuple):
    """What the gallery needs of one unit: the latents' commit, rows by clip id, and the text sets' commits."""

    commit: Commit
    rows: dict[str, LedgerRow]
    texts: dict[str, Commit]


def choose_samples(
    storage: Storage, info: DatasetInfo, findings: Mapping[str, Sequence[str]], max_bytes: int
) -> tuple[list[dict[str, Any]], int]:
    """What is said of samples, most with their picture, and how many of them have it.

    Those that a finding names come first, then the others by a hash of their keys; read until the bytes are used up.
    A damaged sample is left out: it is a finding by itself.
    """
    places = [
        (key not in findings, clip_hash(key, "report"), key, unit.unit)
        for unit in list_units(storage, LATENTS)
        for key in unit.keys
    ]
    picture_bytes, record_bytes = int(max_bytes * PREVIEW_SHARE), int(max_bytes * RECORD_SHARE)
    read_unit = lru_cache(maxsize=64)(partial(_read_unit, storage, sorted(info.text_sets)))
    shown, num_pictures = [], 0
    for _, _, key, unit in sorted(places):
        if record_bytes <= 0:
            break
        try:
            item = _sample(storage, read_unit(unit), key, findings.get(key, ()), with_picture=picture_bytes > 0)
        except ShardDamage:
            continue
        picture = len(item["preview"] or "")
        picture_bytes -= picture
        record_bytes -= _size(item) - picture
        num_pictures += bool(picture)
        shown.append(item)
    return shown, num_pictures


def _read_unit(storage: Storage, text_sets: Sequence[str], unit: int) -> _Unit:
    commit = read_commit(storage, LATENTS, unit).commit
    texts = {}
    for name in text_sets:
        with suppress(MissingObject):  # not embedded yet
            texts[name] = read_commit(storage, text_kind(name), unit).commit
    return _Unit(commit, {row.clip_id: row for row in unit_rows(storage, commit.ledger)}, texts)


def _sample(storage: Storage, unit: _Unit, key: str, codes: Sequence[str], *, with_picture: bool) -> dict[str, Any]:
    """Everything about one sample. Raises ShardDamage."""
    sample = _find(unit.commit, key)
    meta = read_json(storage, unit.commit, sample)
    member, preview = sample.member("preview.jpg"), None
    if with_picture and member and member.size <= MAX_PREVIEW_BYTES:
        data = read_member(storage, unit.commit.tar.name, f"{key}.preview.jpg", member)
        preview = base64.b64encode(data).decode()
    summary = sample.summary
    assert isinstance(summary, LatentSummary)  # noqa: S101 - the commit was parsed as one of latents
    window, probed = meta.get("window") or {}, meta.get("probed") or {}
    facts = {f"declared {name}": value for name, value in (meta.get("declared") or {}).items() if value is not None}
    facts |= {f"file: {name}": value for name, value in probed.items() if isinstance(value, str | int | float)}
    row = unit.rows.get(summary.clip)
    return {
        "key": key,
        "clip": summary.clip,
        "source": meta.get("source"),
        "category": summary.category,
        "bucket": f"{summary.frames}×{summary.height}×{summary.width}",
        "start": summary.start_ms / 1000,
        "length": summary.frames / (window.get("fps") or 24),
        "seconds": probed.get("duration_seconds"),
        "windows": _windows(row) if row else [],
        "decisions": _decisions(window, meta.get("decisions") or {}),
        "facts": facts,
        "texts": [_text(storage, name, commit, key) for name, commit in unit.texts.items()],
        "findings": list(codes),
        "preview": preview,
    }


def _text(storage: Storage, name: str, commit: Commit, key: str) -> dict[str, Any]:
    meta = read_json(storage, commit, _find(commit, key))
    cuts = [cut for of_variant in meta.get("cut") or () for cut in of_variant if isinstance(cut, dict)]
    return {
        "set": name,
        "captions": [str(caption)[:_LONGEST_TEXT] for caption in meta.get("captions") or ()],
        "tokens": meta.get("tokens") or [],
        "cut": [[str(cut.get(field))[:_LONGEST_TEXT] for field in ("level", "why", "sentence")] for cut in cuts],
    }


def _decisions(window: Mapping[str, Any], decisions: Mapping[str, Any]) -> list[list[str]]:
    rows = [["window", str(window["ground"])]] if "ground" in window else []
    for name, decision in decisions.items():
        if name == "differences":
            words = "; ".join(f"{field}: {pair[0]} → {pair[1]}" for field, pair in decision.items())
            rows.append(["JSON → file", words or "no difference"])
        elif isinstance(decision, Mapping):
            more = [f"{key} {_plain(value)}" for key, value in decision.items() if key not in ("value", "ground")]
            words = ", ".join([_plain(decision.get("value")), *more])
            rows.append([name.replace("_", " "), f"{words} — {decision.get('ground')}"])
    return rows


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else str(value)


def _refused(row: LedgerRow) -> dict[str, Any]:
    return {
        "clip": row.clip_id,
        "source": row.source,
        "stage": row.stage,
        "reason": row.reason,
        "detail": row.detail,
        "retryable": row.retryable,
        "windows": _windows(row),
        "length": 0,
        "facts": {"record": row.source, "attempts": row.attempts, "bytes downloaded": row.bytes},
    }


def _windows(row: LedgerRow) -> list[dict[str, Any]]:
    return [
        {"start": w.start_seconds, "status": w.status, "reason": w.reason, "detail": w.detail, "key": w.key}
        for w in row.windows
    ]


def _find(commit: Commit, key: str) -> SampleInfo:
    sample = next((sample for sample in commit.samples if sample.key == key), None)
    if sample is None:
        raise ShardDamage(commit.tar.name, f"it has no sample {key}")
    return sample


def _size(value: Any) -> int:
    """Bytes in the page; what is escaped there (`html_page.json_block`) counts six."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return len(text.encode("utf-8", "surrogatepass")) + 5 * sum(text.count(character) for character in "<>&")
