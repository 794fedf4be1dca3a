"""The parts of a dataset's report, from what `stats` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from shards.page.charts import Bar, Line, bar_list, line_chart
from shards.page.html_page import Child, Html, Section, details, join, number, table, tag
from shards.report.gallery import Gallery
from shards.stats.drift import MAX_SHARD_Z
from shards.stats.unit import MEASURED

_WORDS = {"bad": "To fix", "warn": "To look at", "info": "To know"}
_MAX_FINDINGS, _MAX_BARS = 40, 15
_TITLES = {"vbi_lines": "VBI lines"}


def overview(stats: Mapping[str, Any], gallery: Gallery) -> Section:
    """The most important numbers, what was sampled, and the findings."""
    funnel, sampled = stats["funnel"], stats["sampled"]
    units = funnel["units"]
    facts = [
        ("Records read", number(funnel["records"])),
        ("Samples", number(funnel["samples"])),
        ("Refused records", number(funnel["refused_before"] + funnel["rejected"])),
        ("Waiting", number(funnel["waiting"])),
        ("Shards of latents", f"{units['with_latents']:,} of {units['planned']:,}"),
        ("Text tokens", number(stats["captions"]["token_total"])),
    ]
    tiles = tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="facts")
    return Section("overview", "Overview", join([tiles, _what_was_sampled(sampled, gallery), _findings(stats)]))


def funnel(stats: Mapping[str, Any]) -> Section:
    """From records to samples, and why records fell out."""
    steps = stats["funnel"]
    records = [
        Bar("records read", steps["records"], ""),
        Bar("candidates", steps["candidates"], f"{steps['refused_before']:,} refused by the sieve"),
        Bar("accepted clips", steps["accepted"], f"{steps['rejected']:,} rejected, {steps['waiting']:,} waiting"),
    ]
    windows = [
        Bar("windows of accepted and rejected clips", steps["windows"], ""),
        Bar("samples", steps["samples"], f"{steps['windows_rejected']:,} rejected"),
        Bar("samples with text", steps["samples_with_text"], ""),
    ]
    rows = [
        (
            row["stage"],
            row["reason"],
            row["count"],
            f"{row['retryable']:,}" if row["retryable"] else "",
            join([tag("div", example, class_="mono") for example in row["examples"]]),
        )
        for row in stats["reasons"]
    ]
    head = ("step", "count", "fell out")
    blocks = (bar_list("Records and clips", records, head), bar_list("Windows and samples", windows, head))
    parts = [tag("div", *map(_card, blocks), class_="charts flow wide")]
    if rows:
        columns = ("stage", "reason", "records", "a retry can help", "examples")
        parts += [tag("h3", "Why records were refused"), table(columns, rows, "Reasons by stage")]
    if stats["window_reasons"]:
        parts += [
            tag("h3", "Why windows of accepted clips were refused"),
            _counts("Windows", stats["window_reasons"], "reason"),
        ]
    return Section("funnel", "Records and reasons", join(parts))


def samples(gallery: Gallery) -> Section:
    """The gallery, which the page's script fills."""
    refused = f"{len(gallery.rejected):,} of {gallery.num_rejected:,} refused records"
    lead = tag(
        "p",
        f"{len(gallery.samples):,} of {gallery.num_samples:,} samples are on this page, {gallery.num_pictures:,} with "
        f"pictures, and {refused}. The address of a sample is this page's with #key.",
        class_="quiet",
    )
    none = tag("noscript", tag("p", "The list of samples needs JavaScript; all numbers are here without."))
    return Section("samples", "Samples", join([lead, none, tag("div", id="gallery")]))


def distributions(stats: Mapping[str, Any]) -> Section:
    """What the samples are like."""
    captions, clip_seconds = stats["captions"], stats["clip_seconds"]
    charts: list[Html] = [
        _counts("Samples by bucket (frames × height × width)", stats["buckets"], "bucket"),
        _counts("Samples by category", stats["categories"], "category"),
    ]
    if any(clip_seconds["counts"]):
        charts.append(_binned("Clips by duration", clip_seconds, "seconds"))
    for name, counts in stats["measured"].items():
        if any(counts["counts"]):
            charts.append(_binned(f"Samples by {MEASURED[name]}", counts, "share"))
    if any(captions["tokens"]["counts"]):
        charts += [
            _binned("Captions by tokens", captions["tokens"], "tokens"),
            _binned("Captions by length", captions["characters"], "characters"),
            _counts("Captions by script", captions["scripts"], "script"),
        ]
    if captions["cut"]:
        charts.append(_counts("What was cut from captions", captions["cut"], "level: why"))
    if stats["windows_by_ground"]:
        charts.append(_counts("Windows by ground", stats["windows_by_ground"], "ground"))
    return Section("distributions", "Distributions", tag("div", *map(_card, charts), class_="charts flow"))


def decisions(stats: Mapping[str, Any]) -> Section:
    """What was decided of each clip and on what ground; and how files differ from their records."""
    differences = stats["differences"]
    parts: list[Child] = [
        tag("p", f"{differences['clips_that_differ']:,} of {differences['clips']:,} clips differ from their record."),
    ]
    blocks = [_counts("JSON against file", differences["fields"], "field")] if differences["fields"] else []
    blocks += [
        _counts(f"JSON against file: {name}", differences[name], "difference")
        for name in ("size", "fps", "seconds")
        if differences.get(name)
    ]
    blocks += [
        _counts(_TITLES.get(name) or name.replace("_", " ").capitalize(), rows, "value · ground")
        for name, rows in stats["decisions"].items()
    ]
    if stats["defects"]:
        blocks.append(_counts("Defects of annotations", stats["defects"], "defect"))
    sources = {name.replace("_", " "): rows for name, rows in stats["sources"].items()}
    blocks += [_counts(f"Source {name}", rows, name) for name, rows in sources.items()]
    parts.append(tag("div", *map(_card, blocks), class_="charts flow wide"))
    return Section("decisions", "Decisions", join(parts))


def latents(stats: Mapping[str, Any], gallery: Gallery) -> Section:
    """The latents' statistics: channels, shards, outliers, duplicates."""
    found = stats["latents"]
    here = {item["key"] for item in gallery.samples}
    channels = found["channels"]
    numbers = [float(row["channel"]) for row in channels]
    parts: list[Child] = [
        tag(
            "p", f"From {found['samples']:,} latents. A normalised latent has mean 0 and deviation 1 in every channel."
        ),
    ]
    if channels:
        lines = [Line("mean", numbers, [row["mean"] for row in channels]),
                 Line("deviation", numbers, [row["std"] for row in channels])]  # fmt: skip
        charts = [line_chart("Mean and deviation by channel", lines, "channel", "value")]
        shards = found["shards"]
        if len(shards) > 1:
            units = [float(row["unit"]) for row in shards]
            worst = [Line("largest drift", units, [row["largest_errors"] for row in shards]),
                     Line(f"named beyond {MAX_SHARD_Z:g}", [min(units), max(units)], [MAX_SHARD_Z] * 2)]  # fmt: skip
            charts.append(line_chart("Drift of shards: farthest feature from the dataset's median", worst, "unit",
                                     "standard errors", from_zero=True))  # fmt: skip
        parts.append(tag("div", *charts, class_="charts"))
    if found["outliers"]:
        rows = [(_key(item["key"], here), item["what"], f"{item['spreads']:.1f}") for item in found["outliers"]]
        parts += [tag("h3", "Samples far from all others"),
                  table(("sample", "what", "spreads"), rows, "Outliers, at most 50")]  # fmt: skip
    if stats["duplicates"]:
        rows = [
            (item["what"], ", ".join(item["clips"]), join(tag("div", _key(key, here)) for key in item["keys"][:6]))
            for item in stats["duplicates"]
        ]
        parts += [tag("h3", "The same pictures under several ids"),
                  table(("what", "clips", "samples"), rows, "Duplicates, at most 200 groups")]  # fmt: skip
    return Section("latents", "Latents", join(parts))


def _what_was_sampled(sampled: Mapping[str, Any], gallery: Gallery) -> Html | None:
    words = []
    if sampled["read"] < sampled["of"]:
        words.append(f"Distributions and latents are of {sampled['read']:,} of {sampled['of']:,} samples, chosen by a "
                     "hash of their keys; records and reasons are all counted.")  # fmt: skip
    if len(gallery.samples) < gallery.num_samples:
        words.append(f"The gallery holds {len(gallery.samples):,} samples: those that a finding names, then by hash.")
    return tag("p", " ".join(words), class_="quiet", id="sampled") if words else None


def _findings(stats: Mapping[str, Any]) -> Html:
    found = stats["findings"]
    if not found:
        return tag("ul", tag("li", "No findings.", class_="is-good"), class_="findings")
    items = [_finding(item) for item in found[:_MAX_FINDINGS]]
    rest = found[_MAX_FINDINGS:]
    more = details(f"{len(rest)} more findings", tag("ul", *map(_finding, rest), class_="findings")) if rest else None
    return join([tag("h3", f"Findings ({len(found)})"), tag("ul", *items, class_="findings"), more])


def _finding(item: Mapping[str, Any]) -> Html:
    keys = [_key(name) if "@" in name else tag("span", name, class_="mono") for name in item["where"][:6]]
    spaced = [part for key in keys for part in (key, "  ")][:-1]
    more = f" and {item['num'] - len(keys):,} more" if keys and item["num"] > len(keys) else None
    words = (tag("strong", f"{_WORDS[item['severity']]}: {item['code']}. "), item["what"])
    where = tag("div", *spaced, more) if keys else None
    return tag("li", *words, where, class_="is-bad" if item["severity"] == "bad" else None)


def _key(key: str, here: set[str] | None = None) -> Html:
    if here is not None and key not in here:
        return tag("span", key, class_="mono")
    return tag("a", key, href=f"#{quote(key, safe='')}", class_="mono")


def _counts(caption: str, rows: Sequence[Mapping[str, Any]], what: str) -> Html:
    total, head = sum(row["count"] for row in rows), (what, "count", "share")
    bars = [Bar(row["label"], row["count"], f"{100 * row['count'] / total:.1f} %") for row in rows]
    first, rest = bar_list(caption, bars[:_MAX_BARS], head), bars[_MAX_BARS:]
    if not rest:
        return first
    return tag("div", first, details(f"{len(rest):,} more", bar_list(f"{caption}: the others", rest, head)))


def _binned(caption: str, found: Mapping[str, Any], unit: str) -> Html:
    """Bins of unequal width as bars: a histogram's areas would mislead."""
    edges, counts = found["edges"], found["counts"]
    bars = [Bar(f"{number(a)} – {number(b)} {unit}", n) for a, b, n in zip(edges, edges[1:], counts, strict=False) if n]
    return bar_list(caption, bars, (unit, "count", "share"))


def _card(block: Html) -> Html:
    return block if block.startswith("<figure") else tag("div", block, class_="card")
