"""What a dataset holds and what became of every record, counted from the plan, the commits and their ledgers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from preprocess.config import PrepConfig
from preprocess.plan import Plan
from shards.commit import Commit, LatentSummary, TextSummary, committed_units, read_commit
from shards.layout import LATENTS, text_kind
from shards.ledger import LedgerRow, read_ledger
from shards.storage import Storage

MAX_LEDGER_BYTES = 2**28


def count_dataset(storage: Storage, plan: Plan, config: PrepConfig, set_name: str) -> dict[str, Any]:
    """Everything `build-shards` and `status` say, as plain JSON. Raises ShardDamage.

    `accepted` + `rejected` + `waiting` is always `records`; what `corpus.limit` leaves out comes on top of these.
    """
    reasons: Counter[str] = Counter(dict(plan.refused_by()))
    buckets: Counter[str] = Counter({_bucket_name(size.width, size.height): 0 for size in config.buckets.sizes})
    totals: Counter[str] = Counter()
    units = sorted(committed_units(storage, LATENTS))
    for unit in units:
        commit = read_commit(storage, LATENTS, unit).commit
        totals["latent_bytes"] += commit.tar.size
        for sample in commit.samples:
            if isinstance(sample.summary, LatentSummary):
                buckets[_bucket_name(sample.summary.width, sample.summary.height)] += 1
        for row in _rows(storage, commit):
            _count_row(row, totals, reasons)
    refused = plan.num_refused
    return {
        "records": plan.num_candidates + refused,
        "accepted": totals["accepted"],
        "rejected": totals["rejected"] + refused,
        "waiting": plan.num_candidates - totals["accepted"] - totals["rejected"],
        "beyond_limit": plan.generations[-1].num_beyond_limit if plan.generations else 0,
        "rejected_by": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "retryable": totals["retryable"],
        "units": {"planned": plan.num_units, "latents": len(units)},
        "samples": totals["samples"],
        "windows_rejected": totals["windows_rejected"],
        "buckets": dict(buckets),
        "empty_buckets": [name for name, count in buckets.items() if not count],
        "bytes": {"downloaded": totals["downloaded"], "latents": totals["latent_bytes"]},
        "text": {"set": set_name, **_count_texts(storage, set_name)},
    }


def describe(counts: dict[str, Any]) -> list[str]:
    """The counts as lines for people."""
    units, text = counts["units"], counts["text"]
    beyond = counts["beyond_limit"]
    lines = [
        f"records  {counts['records'] + beyond:,} read = {counts['accepted']:,} accepted + "
        f"{counts['rejected']:,} rejected"
        + (f" + {counts['waiting']:,} waiting" if counts["waiting"] else "")
        + (f" + {beyond:,} beyond corpus.limit" if beyond else ""),
        *(f"  {count:>7,}  {reason}" for reason, count in counts["rejected_by"].items()),
        f"samples  {counts['samples']:,} in {units['latents']:,} of {units['planned']:,} units, "
        f"{_mib(counts['bytes']['latents'])} of latents"
        + (f"; {counts['windows_rejected']:,} windows rejected" if counts["windows_rejected"] else ""),
        *(f"  {count:>7,}  {name}" for name, count in counts["buckets"].items() if count),
        *(f"  {'none':>7}  {name}: this bucket stayed empty" for name in counts["empty_buckets"]),
        f"text     set {text['set']!r}: {text['embeddings']:,} embeddings of {text['tokens']:,} tokens for "
        f"{text['samples']:,} samples, {_mib(text['bytes'])}",
    ]
    if counts["retryable"]:
        lines.append(f"         {counts['retryable']:,} of the rejected may succeed when they are tried again")
    return lines


def _count_row(row: LedgerRow, totals: Counter[str], reasons: Counter[str]) -> None:
    totals[row.status] += 1
    totals["downloaded"] += row.bytes
    totals["retryable"] += row.retryable
    totals["samples"] += sum(window.status == "accepted" for window in row.windows)
    totals["windows_rejected"] += sum(window.status == "rejected" for window in row.windows)
    if row.status == "rejected":
        reasons[f"{row.stage}/{row.reason}"] += 1


def _count_texts(storage: Storage, set_name: str) -> dict[str, int]:
    totals = {"units": 0, "samples": 0, "embeddings": 0, "tokens": 0, "bytes": 0}
    for unit in committed_units(storage, text_kind(set_name)):
        commit = read_commit(storage, text_kind(set_name), unit).commit
        totals["units"] += 1
        totals["bytes"] += commit.tar.size
        for sample in commit.samples:
            if isinstance(sample.summary, TextSummary):
                totals["samples"] += 1
                totals["embeddings"] += sample.summary.variants
                totals["tokens"] += sum(sample.summary.tokens)
    return totals


def _rows(storage: Storage, commit: Commit) -> list[LedgerRow]:
    if commit.ledger is None:
        return []
    data = storage.get(commit.ledger.name, MAX_LEDGER_BYTES)
    return list(read_ledger(data, storage.url(commit.ledger.name)))


def _bucket_name(width: int, height: int) -> str:
    return f"{width}×{height}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
