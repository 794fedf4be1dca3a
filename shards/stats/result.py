"""The counted part of `stats` as plain values, and all of it for people."""

from __future__ import annotations

from typing import Any

from shards.stats.findings import Evidence
from shards.stats.unit import CHARACTER_EDGES, MEASURED, SECONDS_EDGES, SHARE_EDGES, TOKEN_EDGES


def counted(evidence: Evidence) -> dict[str, Any]:
    """Distributions, decisions, differences, and the latents' tables."""
    tally, texts = evidence.tally, evidence.texts
    return {
        "buckets": tally.rows("bucket"),
        "categories": tally.rows("category"),
        "clip_seconds": tally.histogram("clip_seconds", SECONDS_EDGES),
        "windows_by_ground": tally.rows("window"),
        "measured": {name: tally.histogram(name, SHARE_EDGES) for name in MEASURED},
        "sources": {name.removeprefix("source_"): tally.rows(name) for name in tally.names("source_")},
        "decisions": {name.removeprefix("decision/"): tally.rows(name) for name in tally.names("decision/")},
        "differences": {
            "clips": tally.total("differs"),
            "clips_that_differ": tally.counts("differs").get("some", 0),
            "fields": tally.rows("difference"),
            **{name.removeprefix("difference/"): tally.rows(name) for name in tally.names("difference/")},
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
        "latents": _latents(evidence),
        "duplicates": evidence.duplicates,
    }


def _latents(evidence: Evidence) -> dict[str, Any]:
    channels = evidence.channels
    rows = []
    if channels is not None:
        reference = evidence.references.get(False) or evidence.references.get(True)
        for place in range(len(channels.mean)):
            row = {
                "channel": place,
                "mean": float(channels.mean[place]),
                "std": float(channels.std[place]),
                "smoothness": float(channels.smoothness[place]),
            }
            if reference is not None:
                row["median_mean"] = float(reference.median[0, place])
                row["median_std"] = float(reference.median[1, place])
            rows.append(row)
    return {
        "samples": channels.num_samples if channels else 0,
        "expected": {"mean": 0.0, "std": 1.0},
        "channels": rows,
        "shards": [
            {
                "unit": shard.unit,
                "tar": evidence.tars[shard.unit],
                "samples": shard.num_samples,
                "largest_errors": shard.worst,
                "share_off": shard.share_off,
                "off": shard.off,
            }
            for shard in evidence.shards
        ],
        "outliers": evidence.outliers,
    }


def print_stats(found: dict[str, Any]) -> None:
    """The most important numbers as tables on standard output; `--json` has them all."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    sampled = found["sampled"]
    console.print(f"{found['root']}   revision {found['revision'][:12]}", markup=False)
    for name, text in found["notes"].items():
        console.print(f"{name}: {text}", markup=False)
    if sampled["read"] < sampled["of"]:
        console.print(f"sampled: {sampled['read']:,} of {sampled['of']:,} samples were read; records are all counted")
    for line in funnel_lines(found["funnel"]):
        console.print(line, markup=False)
    for row in found["reasons"]:
        example = f"   {row['examples'][0]}" if row["examples"] else ""
        console.print(f"  {row['count']:>9,}  {row['stage']}/{row['reason']}{example}", markup=False)
    for row in found["window_reasons"]:
        console.print(f"  {row['count']:>9,}  windows: {row['label']}", markup=False)
    _print_counts(console, "buckets", found["buckets"])
    _print_counts(console, "categories", found["categories"])
    _print_counts(console, "clips by duration", _binned(found["clip_seconds"], "s"), in_order=True)
    for name, counts in found["measured"].items():
        _print_counts(console, f"samples by {MEASURED[name]}", _binned(counts, ""), in_order=True)
    for name, rows in found["decisions"].items():
        _print_counts(console, name, rows)
    differences = found["differences"]
    console.print(f"{differences['clips_that_differ']:,} of {differences['clips']:,} clips differ from their JSON")
    for row in differences["fields"]:
        console.print(f"  {row['count']:>9,}  {row['label']}", markup=False)
    captions = found["captions"]
    console.print(
        f"captions: {captions['token_total']:,} tokens, {captions['samples_shortened']:,} samples shortened to the "
        f"limit, {captions['samples_without_words']:,} without words"
    )
    _print_counts(console, "captions by tokens", _binned(captions["tokens"], "tokens"), in_order=True)
    _print_counts(console, "scripts", captions["scripts"])
    _print_counts(console, "cut", captions["cut"])
    _print_latents(console, found["latents"])
    _print_findings(console, found["findings"])


def funnel_lines(funnel: dict[str, Any]) -> list[str]:
    """The funnel in words."""
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


def _binned(found: dict[str, Any], unit: str) -> list[dict[str, Any]]:
    """A histogram's bins as rows; those that nothing fell into are left out."""
    edges = found["edges"]
    bins = zip(edges, edges[1:], found["counts"], strict=False)
    return [{"label": f"{low} to {high} {unit}", "count": count} for low, high, count in bins if count]


def _print_counts(
    console: Any, title: str, rows: list[dict[str, Any]], limit: int = 12, *, in_order: bool = False
) -> None:
    if not rows:
        return
    limit = len(rows) if in_order else limit
    console.print(f"{title}", style="bold", markup=False)
    for row in rows[:limit]:
        console.print(f"  {row['count']:>9,}  {row['label']}", markup=False)
    if len(rows) > limit:
        console.print(f"  {sum(row['count'] for row in rows[limit:]):>9,}  {len(rows) - limit} more kinds")


def _print_latents(console: Any, latents: dict[str, Any]) -> None:
    rows = latents["channels"]
    if not rows:
        return
    means, stds = [row["mean"] for row in rows], [row["std"] for row in rows]
    console.print(
        f"latents: {latents['samples']:,} samples of {len(rows)} channels; channel means {min(means):.3f} to "
        f"{max(means):.3f} (expected 0), deviations {min(stds):.3f} to {max(stds):.3f} (expected 1)"
    )


def _print_findings(console: Any, findings: list[dict[str, Any]]) -> None:
    console.print(f"findings: {len(findings)}" if findings else "findings: none", style="bold")
    for item in findings:
        where = f"   {', '.join(item['where'][:3])}{' …' if item['num'] > 3 else ''}" if item["where"] else ""
        console.print(f"  {item['severity']:<4}  {item['code']}: {item['what']}{where}", markup=False)
