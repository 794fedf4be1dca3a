"""Which samples and refused records a report shows, and what it says of each, within a number of bytes."""

from __future__ import annotations

import base64
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
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
    """Keeps some refused records of every reason: those of smallest hash, so that the choice is no matter of order."""

    def __init__(self) -> None:
        self.num_seen = 0
        self._kept: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}

    def add(self, row: LedgerRow) -> None:
        """Look at one refused record."""
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
        return _within(in_turn, max_bytes)


def choose_samples(
    storage: Storage,
    info: DatasetInfo,
    findings: Mapping[str, Sequence[str]],
    max_bytes: int,
    *,
    limit: int | None = None,
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
    reader, shown, num_pictures = _UnitReader(storage, info), [], 0
    for _, _, key, unit in heapq.nsmallest(limit or len(places), places):
        if record_bytes <= 0:
            break
        try:
            item = reader.sample(unit, key, findings.get(key, ()), with_picture=picture_bytes > 0)
        except ShardDamage:
            continue
        picture = len(item.get("preview") or "")
        picture_bytes -= picture
        record_bytes -= _size(item) - picture
        num_pictures += bool(picture)
        shown.append(item)
    return shown, num_pictures


class _UnitReader:
    """Commits and ledgers of the units that were asked for last."""

    def __init__(self, storage: Storage, info: DatasetInfo) -> None:
        self._storage = storage
        self._sets = sorted(info.text_sets)
        self._units: dict[int, tuple[Commit, dict[str, LedgerRow], dict[str, Commit]]] = {}

    def sample(self, unit: int, key: str, codes: Sequence[str], *, with_picture: bool) -> dict[str, Any]:
        """Everything about one sample. Raises ShardDamage."""
        commit, rows, texts = self._unit(unit)
        info = _find(commit, key)
        meta = read_json(self._storage, commit, info)
        member = info.member("preview.jpg")
        preview = None
        if with_picture and member and member.size <= MAX_PREVIEW_BYTES:
            data = read_member(self._storage, commit.tar.name, f"{key}.preview.jpg", member)
            preview = base64.b64encode(data).decode()
        summary = info.summary
        assert isinstance(summary, LatentSummary)  # noqa: S101 - the commit was parsed as one of latents
        row = rows.get(summary.clip)
        return {
            **_described(meta, summary, key, row),
            "texts": [self._text(name, commit, key) for name, commit in texts.items()],
            "findings": list(codes),
            "preview": preview,
        }

    def _unit(self, unit: int) -> tuple[Commit, dict[str, LedgerRow], dict[str, Commit]]:
        if unit not in self._units:
            if len(self._units) >= 64:
                self._units.pop(next(iter(self._units)))
            commit = read_commit(self._storage, LATENTS, unit).commit
            rows = {row.clip_id: row for row in unit_rows(self._storage, commit.ledger)}
            self._units[unit] = (commit, rows, dict(self._texts(unit)))
        return self._units[unit]

    def _texts(self, unit: int) -> Iterable[tuple[str, Commit]]:
        for name in self._sets:
            try:
                yield name, read_commit(self._storage, text_kind(name), unit).commit
            except MissingObject:
                continue  # not embedded yet

    def _text(self, name: str, commit: Commit, key: str) -> dict[str, Any]:
        meta = read_json(self._storage, commit, _find(commit, key))
        cuts = [cut for of_variant in meta.get("cut") or () for cut in of_variant if isinstance(cut, dict)]
        return {
            "set": name,
            "captions": [str(caption)[:_LONGEST_TEXT] for caption in meta.get("captions") or ()],
            "tokens": meta.get("tokens") or [],
            "cut": [
                [str(cut.get("level")), str(cut.get("why")), str(cut.get("sentence"))[:_LONGEST_TEXT]] for cut in cuts
            ],
        }


def _described(meta: Mapping[str, Any], summary: LatentSummary, key: str, row: LedgerRow | None) -> dict[str, Any]:
    window, probed = meta.get("window") or {}, meta.get("probed") or {}
    fps = window.get("fps") or 24
    declared = meta.get("declared") or {}
    facts = {f"declared {name}": value for name, value in declared.items() if value is not None}
    facts |= {f"file: {name}": value for name, value in probed.items() if isinstance(value, str | int | float)}
    return {
        "key": key,
        "clip": summary.clip,
        "source": meta.get("source"),
        "category": summary.category,
        "bucket": f"{summary.frames}×{summary.height}×{summary.width}",
        "start": summary.start_ms / 1000,
        "length": summary.frames / fps,
        "seconds": probed.get("duration_seconds"),
        "windows": _windows(row) if row else [],
        "decisions": [*_window_decisions(window), *_decisions(meta.get("decisions") or {})],
        "facts": facts,
    }


def _window_decisions(window: Mapping[str, Any]) -> list[list[str]]:
    return [["window", str(window["ground"])]] if "ground" in window else []


def _decisions(decisions: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, decision in decisions.items():
        if name == "differences":
            words = "; ".join(f"{field}: {pair[0]} → {pair[1]}" for field, pair in decision.items())
            rows.append(["JSON → file", words or "no difference"])
        elif isinstance(decision, Mapping):
            more = {key: value for key, value in decision.items() if key not in ("value", "ground")}
            words = ", ".join(
                [_plain(decision.get("value")), *(f"{key} {_plain(value)}" for key, value in more.items())]
            )
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


def _within(rows: Iterable[dict[str, Any]], max_bytes: int) -> list[dict[str, Any]]:
    chosen = []
    for row in rows:
        max_bytes -= _size(row)
        if max_bytes < 0:
            break
        chosen.append(row)
    return chosen


def _size(value: Any) -> int:
    """Bytes in the page; what is escaped there (`html.json_block`) counts six."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return len(text.encode("utf-8", "surrogatepass")) + 5 * sum(text.count(character) for character in "<>&")
