"""`wanshards stats`: a dataset in numbers, and what is wrong with it, by name.

Each unit is read once, a sample at a time, or found in the cache. In memory are one sample a thread, the counts, and of
each sample its key, clip, features and fingerprint: about a kilobyte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shards.console import with_progress
from shards.errors import UserError
from shards.format.commit import StoredCommit, dataset_revision
from shards.format.dataset_info import read_info
from shards.format.keys import clip_hash
from shards.format.names import LATENTS, text_kind
from shards.read.units import UnitRef, list_units, read_units, unit_numbers
from shards.stats.counter import Histograms
from shards.stats.drift import Reference, find_outliers, find_references, judge_shard, sum_channels
from shards.stats.duplicates import find_duplicates
from shards.stats.findings import Evidence, find_all
from shards.stats.funnel import OnRefused, funnel_steps, read_funnel, reason_rows
from shards.stats.unit import (
    CHARACTER_EDGES,
    MEASURED,
    SECONDS_EDGES,
    SHARE_EDGES,
    TOKEN_EDGES,
    UnitStats,
    latent_unit,
    read_cached,
    text_unit,
    write_cached,
)
from shards.storage import open_storage
from shards.storage.base import Storage


def dataset_stats(
    root: str | Path,
    *,
    text_set: str | None = None,
    sample: int | None = None,
    cache: Path | None = None,
    jobs: int = 1,
    on_refused: OnRefused | None = None,
) -> dict[str, Any]:
    """Everything about a dataset as plain JSON values; a progress bar where standard error is a terminal.

    Args:
        root: a folder or `s3://bucket/prefix`; a build may be writing to it.
        text_set: whose captions to count; None: `default` where it is there.
        sample: read only so many samples, chosen by a hash of their keys; counts of records are never sampled.
        cache: folder for finished units; None: nothing is kept.
        jobs: units read at a time.
        on_refused: called with each refused record's ledger row.

    Raises UserError when there is no dataset. A damaged sample or shard is a finding, not an error.
    """
    if sample is not None and sample < 1:
        raise UserError(f"--sample {sample}", expected="at least 1")
    storage = open_storage(root)
    info = read_info(storage)
    if text_set is not None:
        info.kind_identity(text_kind(text_set))  # refuses a set that is not there
    else:
        text_set = "default" if "default" in info.text_sets else min(info.text_sets, default=None)
    numbers = {kind: unit_numbers(storage, kind) for kind in (LATENTS, *([text_kind(text_set)] if text_set else []))}
    tally, texts, damaged = Histograms(), Histograms(), list[str]()
    refs: dict[str, list[UnitRef]] = {kind: [] for kind in numbers}
    read: list[tuple[UnitRef, UnitStats]] = []
    found = (each for kind in numbers for each in _read(storage, kind, numbers[kind], sample, cache, jobs, damaged))
    for ref, stats in with_progress(found, sum(map(len, numbers.values())), "stats"):
        refs[ref.kind].append(ref)
        (tally if ref.kind == LATENTS else texts).merge(stats.tally)
        if read and stats.keys and stats.features.shape[2] != read[0][1].features.shape[2]:
            tally.add("problem", "latents of another number of channels than before", ref.tar.name)
        elif stats.keys:
            read.append((ref, stats))
    latents, others = refs[LATENTS], [ref for kind in refs if kind != LATENTS for ref in refs[kind]]
    units = [stats for _, stats in read]
    references = find_references(units)
    shards = [
        {"unit": ref.unit, "tar": ref.tar.name, "samples": len(stats.keys), **verdict}
        for ref, stats in read
        if (verdict := judge_shard(stats, references))
    ]
    records = read_funnel(storage, info, latents, damaged, on_refused)
    evidence = Evidence(
        info, tally, texts, damaged, sum_channels(units), shards, find_outliers(units, references),
        find_duplicates(units),
    )  # fmt: skip
    num_samples = sum(len(ref.keys) for ref in latents)
    there = {ref.unit for ref in latents}
    num_with_text = sum(len(ref.keys) for ref in others if ref.unit in there)
    return {
        # As it was given: a report that is mailed around need not say where this machine keeps its files.
        "root": storage.url() if str(root).startswith("s3://") else str(root),
        "identity_sha256": info.identity_digest,
        "revision": dataset_revision((ref.kind, ref.unit, ref.revision) for ref in [*latents, *others]),
        "notes": info.notes,
        "text_set": text_set,
        "sampled": {"asked": sample, "read": sum(len(stats.keys) for stats in units), "of": num_samples},
        "funnel": funnel_steps(records, info, num_samples, num_with_text),
        "reasons": reason_rows(records),
        "window_reasons": records.rows("window_reason"),
        "findings": find_all(evidence),
        **_distributions(tally, texts),
        "latents": {
            "samples": evidence.channels.num_samples if evidence.channels else 0,
            "expected": {"mean": 0.0, "std": 1.0},
            "channels": _channel_rows(evidence, references.get(False) or references.get(True)),
            "shards": shards,
            "outliers": evidence.outliers,
        },
        "duplicates": evidence.duplicates,
    }


def _read(
    storage: Storage,
    kind: str,
    numbers: list[int],
    sample: int | None,
    cache: Path | None,
    jobs: int,
    damaged: list[str],
) -> Iterator[tuple[UnitRef, UnitStats]]:
    """Each unit of a kind with its statistics, a few at a time; unreadable commits go into `damaged`."""
    chosen = None if sample is None else _choose_keys(storage, kind, sample)
    one = partial(_read_unit, storage, chosen, cache)
    commits = read_units(storage, kind, numbers, damaged)
    with ThreadPoolExecutor(jobs) as pool:
        while batch := list(islice(commits, 4 * jobs)):
            yield from pool.map(one, batch)


def _read_unit(
    storage: Storage, chosen: frozenset[str] | None, cache: Path | None, stored: StoredCommit
) -> tuple[UnitRef, UnitStats]:
    ref = UnitRef.of(stored)
    wanted = None if chosen is None else chosen.intersection(ref.keys)
    # By the tar's digest, and by the keys where not all were asked for.
    which = "all" if wanted is None else hashlib.sha256(" ".join(sorted(wanted)).encode()).hexdigest()[:16]
    name = f"{ref.tar.sha256[:40]}-{which}"
    stats = read_cached(cache, name) if cache else None
    if stats is None:
        stats = (latent_unit if ref.kind == LATENTS else text_unit)(storage, stored.commit, wanted)
        if cache:
            write_cached(cache, name, stats)
    return ref, stats


def _choose_keys(storage: Storage, kind: str, num: int) -> frozenset[str] | None:
    """The `num` keys of smallest hash, whatever else is there; None: all."""
    keys = [key for unit in list_units(storage, kind) for key in unit.keys]
    if num >= len(keys):
        return None
    hashes = np.array([clip_hash(key, "stats") for key in keys], np.uint64)
    limit = np.partition(hashes, num - 1)[num - 1]
    return frozenset(key for key, value in zip(keys, hashes.tolist(), strict=True) if value <= limit)


def _distributions(tally: Histograms, texts: Histograms) -> dict[str, Any]:
    """What was counted of samples, clips and captions."""
    return {
        "buckets": tally.rows("bucket"),
        "categories": tally.rows("category"),
        "clip_seconds": tally.histogram("clip_seconds", SECONDS_EDGES),
        "windows_by_ground": tally.rows("window"),
        "measured": {name: tally.histogram(name, SHARE_EDGES) for name in MEASURED},
        "sources": tally.rows_below("source_"),
        "decisions": tally.rows_below("decision/"),
        "differences": {
            "clips": tally.total("differs"),
            "clips_that_differ": tally.counts("differs").get("some", 0),
            "fields": tally.rows("difference"),
            **tally.rows_below("difference/"),
        },
        "defects": tally.rows("defect"),
        "captions": {
            "tokens": texts.histogram("tokens", TOKEN_EDGES),
            "token_total": texts.total("token_total"),
            "characters": texts.histogram("caption_characters", CHARACTER_EDGES),
            "variants": texts.rows("variants"),
            "scripts": texts.rows("script"),
            "cut": texts.rows("cut"),
            "samples_shortened": texts.total("shortened"),
            "samples_without_words": texts.total("no_words"),
            "skipped_variants": texts.rows("skipped_variant"),
        },
    }


def _channel_rows(evidence: Evidence, reference: Reference | None) -> list[dict[str, Any]]:
    if evidence.channels is None:
        return []
    columns = {name: getattr(evidence.channels, name) for name in ("mean", "std", "smoothness")}
    if reference is not None:
        columns |= {"median_mean": reference.median[0], "median_std": reference.median[1]}
    places = range(len(columns["mean"]))
    return [{"channel": place} | {name: float(values[place]) for name, values in columns.items()} for place in places]


def stats_lines(found: dict[str, Any]) -> list[str]:
    """The most important numbers for people; `--json` has them all."""
    sampled, differences, captions = found["sampled"], found["differences"], found["captions"]
    lines = [f"{found['root']}   revision {found['revision'][:12]}"]
    lines += [f"{name}: {text}" for name, text in found["notes"].items()]
    if sampled["read"] < sampled["of"]:
        lines.append(f"sampled: {sampled['read']:,} of {sampled['of']:,} samples were read; records are all counted")
    lines += _funnel_lines(found["funnel"])
    for row in found["reasons"]:
        example = f"   {row['examples'][0]}" if row["examples"] else ""
        lines.append(f"  {row['count']:>9,}  {row['stage']}/{row['reason']}{example}")
    lines += [f"  {row['count']:>9,}  windows: {row['label']}" for row in found["window_reasons"]]
    lines += _count_lines("buckets", found["buckets"])
    lines += _count_lines("categories", found["categories"])
    lines += _bin_lines("clips by duration", found["clip_seconds"], "s")
    for name, counts in found["measured"].items():
        lines += _bin_lines(f"samples by {MEASURED[name]}", counts, "")
    for name, rows in found["decisions"].items():
        lines += _count_lines(name, rows)
    lines.append(f"{differences['clips_that_differ']:,} of {differences['clips']:,} clips differ from their JSON")
    lines += [f"  {row['count']:>9,}  {row['label']}" for row in differences["fields"]]
    lines.append(
        f"captions: {captions['token_total']:,} tokens, {captions['samples_shortened']:,} samples shortened to the "
        f"limit, {captions['samples_without_words']:,} without words"
    )
    lines += _bin_lines("captions by tokens", captions["tokens"], "tokens")
    lines += _count_lines("scripts", captions["scripts"])
    lines += _count_lines("cut", captions["cut"])
    if rows := found["latents"]["channels"]:
        means, stds = [row["mean"] for row in rows], [row["std"] for row in rows]
        lines.append(
            f"latents: {found['latents']['samples']:,} samples of {len(rows)} channels; channel means {min(means):.3f} "
            f"to {max(means):.3f} (expected 0), deviations {min(stds):.3f} to {max(stds):.3f} (expected 1)"
        )
    lines.append(f"findings: {len(found['findings']) or 'none'}")
    for item in found["findings"]:
        where = f"   {', '.join(item['where'][:3])}{' …' if item['num'] > 3 else ''}" if item["where"] else ""
        lines.append(f"  {item['severity']:<4}  {item['code']}: {item['what']}{where}")
    return lines


def _funnel_lines(funnel: dict[str, Any]) -> list[str]:
    units = funnel["units"]
    waiting = f" + {funnel['waiting']:,} waiting" if funnel["waiting"] else ""
    return [
        f"records    {funnel['records']:,} = {funnel['candidates']:,} candidates + {funnel['refused_before']:,} "
        "refused",
        f"candidates {funnel['candidates']:,} = {funnel['accepted']:,} accepted + {funnel['rejected']:,} rejected"
        + waiting,
        f"windows    {funnel['windows']:,}, {funnel['windows_rejected']:,} rejected",
        f"samples    {funnel['samples']:,} in {units['with_latents']:,} of {units['planned']:,} units; "
        f"{funnel['samples_with_text']:,} with text",
    ]


def _count_lines(title: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [title] if rows else []
    lines += [f"  {row['count']:>9,}  {row['label']}" for row in rows[:12]]
    if len(rows) > 12:
        lines.append(f"  {sum(row['count'] for row in rows[12:]):>9,}  {len(rows) - 12} more kinds")
    return lines


def _bin_lines(title: str, found: dict[str, Any], unit: str) -> list[str]:
    """A histogram's bins; those that nothing fell into are left out."""
    bins = zip(found["edges"], found["edges"][1:], found["counts"], strict=False)
    lines = [f"  {count:>9,}  {low} to {high} {unit}" for low, high, count in bins if count]
    return [title, *lines] if lines else []
