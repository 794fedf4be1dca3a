"""From records to samples: what became of every record, and why, by the ledgers of the plans and the units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shards.errors import MissingObject, ShardDamage
from shards.format.dataset_info import DatasetInfo
from shards.format.ledger import LedgerRow, read_ledger
from shards.format.sealed_json import open_document
from shards.read.outcomes import MAX_LEDGER_BYTES, unit_rows
from shards.read.units import UnitRef
from shards.stats.counter import Histograms
from shards.storage.base import Storage

_MAX_PLAN_COMMIT_BYTES = 2**26
STAGES = ("read", "sieve", "fetch", "probe", "window", "bucket", "decode", "caption", "encode")
"""In the order that a record passes them."""
OnRefused = Callable[[LedgerRow], None]


def read_funnel(
    storage: Storage,
    info: DatasetInfo,
    units: Sequence[UnitRef],
    damaged: list[str],
    on_refused: OnRefused | None = None,
) -> Histograms:
    """Count the ledgers of plans and units, one row at a time; `on_refused` is called with each refused record.

    Of several attempts at one candidate the one in the highest unit counts. What is wrong with a ledger that cannot be
    read goes into `damaged`: the counts lack it.
    """
    tally = Histograms()

    def refuse(row: LedgerRow) -> None:
        label = f"{row.stage}/{row.reason}"
        tally.add("reason", label, f"{row.clip_id or row.source}: {row.detail}")
        if row.retryable:
            tally.add("retryable", label)
        if on_refused:
            on_refused(row)

    for generation in info.generations:
        tally.add("records", "read", times=generation.num_records)
        # One that read no records is a retry: its candidates are those of earlier generations.
        tally.add("records", "candidates", times=generation.num_candidates if generation.num_records else 0)
        try:
            for row in _plan_rows(storage, generation.name):
                refuse(row)
            for reason, count in _superseded(storage, generation.name).items():
                tally.add("reason", reason, times=-count)
                tally.add("records", "read", times=-count)
        except ShardDamage as damage:
            damaged.append(damage.problem)
    seen: set[int] = set()
    for unit in sorted(units, key=lambda unit: unit.unit, reverse=True):
        tally.add("units", "with latents")
        try:
            rows = list(unit_rows(storage, unit.ledger))
        except ShardDamage as damage:
            damaged.append(damage.problem)
            continue
        for row in rows:
            if row.candidate in seen:
                tally.add("attempts", "superseded")
                continue
            _count_row(tally, row)
            if row.status == "rejected":
                refuse(row)
        seen.update(row.candidate for row in rows)
    return tally


def funnel_steps(tally: Histograms, info: DatasetInfo, num_samples: int, num_with_text: int) -> dict[str, Any]:
    """The funnel: `records = refused_before + candidates`, `candidates = accepted + rejected + waiting`."""
    records, rows = tally.counts("records"), tally.counts("rows")
    candidates = records.get("candidates", 0)
    accepted, rejected = rows.get("accepted", 0), rows.get("rejected", 0)
    windows = tally.counts("windows")
    return {
        "records": records.get("read", 0),
        "refused_before": records.get("read", 0) - candidates,
        "candidates": candidates,
        "waiting": candidates - accepted - rejected,
        "rejected": rejected,
        "accepted": accepted,
        "windows": sum(windows.values()),
        "windows_rejected": windows.get("rejected", 0),
        "samples": num_samples,
        "samples_with_text": num_with_text,
        "retryable": tally.total("retryable"),
        "superseded_attempts": tally.total("attempts"),
        "units": {"planned": len(info.planned_units()), "with_latents": tally.counts("units").get("with latents", 0)},
        "downloaded_bytes": tally.total("bytes"),
        "seconds_by_stage": {name: count / 1000 for name, count in tally.counts("milliseconds").items()},
    }


def reason_rows(tally: Histograms) -> list[dict[str, Any]]:
    """Reasons by stage, in the order of stages, with counts, examples of details, and how many a retry can help."""
    retryable = tally.counts("retryable")
    rows = []
    for row in tally.rows("reason"):
        stage, _, reason = row["label"].partition("/")
        if row["count"] > 0:
            rows.append(
                {
                    "stage": stage,
                    "reason": reason,
                    "count": row["count"],
                    "retryable": retryable.get(row["label"], 0),
                    "examples": row["examples"],
                }
            )
    order = {stage: place for place, stage in enumerate(STAGES)}
    return sorted(rows, key=lambda row: (order.get(row["stage"], len(STAGES)), -row["count"], row["reason"]))


def _plan_rows(storage: Storage, generation: str) -> Iterator[LedgerRow]:
    name = f"plan/{generation}.ledger.jsonl.zst"
    try:
        data = storage.get(name, MAX_LEDGER_BYTES)
    except MissingObject:
        return  # a plan may have refused nothing, and kept no ledger
    yield from read_ledger(data, storage.url(name))


def _superseded(storage: Storage, generation: str) -> dict[str, int]:
    """Earlier rows that a later generation counts no more (docs/shard-format.md): its plan's commit says so."""
    name = f"plan/{'-'.join(generation.split('-')[:2])}.json"
    try:
        body = open_document(storage.get(name, _MAX_PLAN_COMMIT_BYTES), storage.url(name))
    except MissingObject:
        return {}
    found = body.get("superseded_by")
    return {str(reason): int(count) for reason, count in found.items()} if isinstance(found, dict) else {}


def _count_row(tally: Histograms, row: LedgerRow) -> None:
    tally.add("rows", row.status)
    tally.add("bytes", "downloaded", times=row.bytes)
    for stage, seconds in row.seconds.items():
        tally.add("milliseconds", stage, times=round(seconds * 1000))
    for window in row.windows:
        tally.add("windows", window.status)
        if window.status == "rejected":
            tally.add("window_reason", window.reason, f"{row.clip_id} at {window.start_seconds:g} s: {window.detail}")
