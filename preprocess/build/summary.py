"""What a dataset holds and how every record ended, counted from the plan, the commits and their ledgers."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from preprocess.build.dataset_info import find_info
from preprocess.build.progress import describe_facts, describe_pools
from preprocess.build.scratch import builds_at_work, describe_note
from preprocess.plan.plan import Plan
from preprocess.plan.retry import retry_units
from preprocess.rejection import INTERNAL_ERROR
from shards.console import counted, duration_words
from shards.format.commit import LatentSummary, TextSummary, committed_units, read_commit
from shards.format.dataset_info import BucketInfo
from shards.format.names import LATENTS, commit_name, text_kind
from shards.read.outcomes import Outcome, read_outcomes
from shards.storage.base import Storage

NUM_PACE_UNITS = 20
"""Units whose commits give the pace of a build that nobody is at work on."""


def count_dataset(storage: Storage, plan: Plan, set_name: str) -> dict[str, Any]:
    """All figures of `build-shards`, `retry` and `status` as plain JSON. Raises ShardDamage.

    `accepted` + `rejected` + `waiting` is always `records`; what `corpus.limit` leaves out is not in `records`.
    Of several attempts at one candidate the latest counts.
    """
    info = find_info(storage)
    reasons: Counter[str] = Counter(dict(plan.refused_by()))
    sizes = info.buckets if info else ()
    name_of = partial(_bucket_name, with_frames=len({each.frames for each in sizes}) > 1)
    buckets: Counter[str] = Counter({name_of(each): 0 for each in sizes})
    totals: Counter[str] = Counter()
    units = committed_units(storage, LATENTS)
    for unit in units:
        commit = read_commit(storage, LATENTS, unit).commit
        totals["latent_bytes"] += commit.tar.size
        for sample in commit.samples:
            if isinstance(sample.summary, LatentSummary):
                buckets[name_of(sample.summary)] += 1
    for outcome in read_outcomes(storage):
        _count_row(outcome, totals, reasons)
    refused, last = plan.num_refused, plan.last_read
    retries = retry_units(plan)
    return {
        "records": plan.num_candidates + refused,
        "accepted": totals["accepted"],
        "rejected": totals["rejected"] + refused,
        "waiting": plan.num_candidates - totals["accepted"] - totals["rejected"],
        "beyond_limit": last.num_beyond_limit if last else 0,
        "rejected_by": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "internal_errors": totals["internal_errors"],
        "retryable": totals["retryable"],
        "retried": totals["retried"],
        "retries_waiting": sum(plan.unit_length(unit) for unit in retries if unit not in units),
        "units": {"planned": plan.num_units, "latents": len(units)},
        "samples": totals["samples"],
        "windows_rejected": totals["windows_rejected"],
        "buckets": dict(buckets),
        "empty_buckets": [name for name, count in buckets.items() if not count],
        "bytes": {"downloaded": totals["downloaded"], "latents": totals["latent_bytes"]},
        "text": {"set": set_name, **_count_texts(storage, set_name)},
    }


def describe_build(counts: dict[str, Any]) -> list[str]:
    """The counts as lines of text."""
    units, text, is_done = counts["units"], counts["text"], not counts["waiting"]
    beyond = counts["beyond_limit"]
    lines = [
        f"records  {counts['records'] + beyond:,} read = {counts['accepted']:,} accepted + "
        f"{counts['rejected']:,} rejected"
        + (f" + {counts['waiting']:,} waiting" if counts["waiting"] else "")
        + (f" + {beyond:,} beyond corpus.limit" if beyond else ""),
        *(f"  {count:>7,}  {reason}" for reason, count in counts["rejected_by"].items()),
        f"samples  {counts['samples']:,} in {units['latents']:,} of {counted(units['planned'], 'unit')}, "
        f"{_mib(counts['bytes']['latents'])} of latents"
        + (f"; {counted(counts['windows_rejected'], 'window')} rejected" if counts["windows_rejected"] else ""),
        *(f"  {count:>7,}  {name}" for name, count in counts["buckets"].items() if count),
        # What an unfinished build has not filled yet is no finding.
        *(f"  {'none':>7}  {name}: this bucket stayed empty" for name in counts["empty_buckets"] if is_done),
        f"text     set {text['set']!r}: {counted(text['embeddings'], 'embedding')} of "
        f"{counted(text['tokens'], 'token')} for {counted(text['samples'], 'sample')}, {_mib(text['bytes'])}",
    ]
    if counts["rejected"]:
        lines.append("         `wanprep why CLIP CONFIG` says what became of one clip, and why")
    if counts["retried"] or counts["retries_waiting"]:
        waiting = f", {counts['retries_waiting']:,} waiting" if counts["retries_waiting"] else ""
        lines.append(
            f"retries  {counted(counts['retried'], 'earlier attempt is', 'earlier attempts are')} superseded{waiting}"
        )
    if counts["internal_errors"]:
        lines.append(
            f"errors   {counted(counts['internal_errors'], 'clip')} met an internal error, a defect of this program:"
        )
        lines.append("         the log has the tracebacks; `wanprep retry CONFIG --reason internal-error`")
    if counts["retryable"]:
        lines.append(f"         {counts['retryable']:,} of the rejected may succeed when they are tried again:")
        lines.append("         `wanprep retry CONFIG --retryable`")
    return lines


def count_work(storage: Storage, output: str, counts: dict[str, Any]) -> dict[str, Any]:
    """Who is at work, how fast, and how long the rest will take, as plain JSON.

    While nobody is at work, the pace is that of the last units: the middle of the times between their commits.
    """
    notes = builds_at_work(output)
    num_left = counts["units"]["planned"] - counts["units"]["latents"]
    last = sorted(committed_units(storage, LATENTS))[-NUM_PACE_UNITS:] if num_left and not notes else []
    times = sorted(storage.modified(commit_name(LATENTS, unit)) for unit in last)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    seconds = median(gaps) if gaps else None
    return {
        "builds": notes,
        "units_left": num_left,
        "seconds_a_unit": round(seconds, 3) if seconds is not None else None,
        "seconds_left": round(seconds * num_left) if seconds is not None else None,
    }


def describe_work(work: dict[str, Any]) -> list[str]:
    """Who is at work, as lines of text."""
    lines = []
    for note in work["builds"]:
        progress = note["progress"]
        what = (
            "loading" if progress is None else f"{progress['pass']}: {progress['units']:,} of {progress['of_units']:,}"
        )
        lines.append(f"at work  {describe_note(note)}")
        lines.append(f"         {what}{'' if progress is None else ' units' + describe_facts(progress)}")
        lines += describe_pools(progress) if progress else []
        lines += [
            f"         {outage['host']} has not answered since {outage['since']} ({outage['reason']}): it is waited for"
            for outage in note["outages"]
        ]
    if not work["builds"] and work["units_left"]:
        seconds = work["seconds_left"]
        pace = "" if seconds is None else f"; at the pace of the last units {duration_words(seconds)} are left"
        lines.append(
            f"at work  nobody: {counted(work['units_left'], 'unit of latents is', 'units of latents are')} left{pace}"
        )
        lines.append("         `wanprep build-shards CONFIG` resumes")
    return lines


def _count_row(outcome: Outcome, totals: Counter[str], reasons: Counter[str]) -> None:
    row = outcome.row
    totals["downloaded"] += row.bytes
    if not outcome.is_latest:
        totals["retried"] += 1
        return
    totals[row.status] += 1
    totals["retryable"] += row.retryable
    is_internal = row.reason == INTERNAL_ERROR or any(window.reason == INTERNAL_ERROR for window in row.windows)
    totals["internal_errors"] += is_internal
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


def _bucket_name(size: BucketInfo | LatentSummary, with_frames: bool) -> str:
    return f"{size.width}×{size.height}" + (f"×{size.frames}" if with_frames else "")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
