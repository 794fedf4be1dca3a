"""What is wrong with a dataset, named: each finding says what, where, and what it may come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from shards.console import counted
from shards.format.dataset_info import DatasetInfo
from shards.stats.counter import Histograms
from shards.stats.drift import OTHER_VAE_SHARE, Channels, channels_off

Severity = Literal["bad", "warn", "info"]
_MAX_NAMED = 10


class Evidence(NamedTuple):
    """All that was found in a dataset."""

    info: DatasetInfo
    tally: Histograms
    texts: Histograms
    damaged: list[str]
    channels: Channels | None
    shards: list[dict[str, Any]]
    """Of `drift.judge_shard`, with the unit and its tar."""
    outliers: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]


def find_all(evidence: Evidence) -> list[dict[str, Any]]:
    """Every finding, the worst first: code, severity, what in words, samples or shards it is about, their number."""
    found = [
        *_damage(evidence),
        *_drift(evidence),
        *_channels(evidence),
        *_outliers(evidence),
        *_duplicates(evidence),
        *_captions(evidence),
    ]
    order = ("bad", "warn", "info")
    return sorted(found, key=lambda item: order.index(item["severity"]))


def _finding(
    code: str, severity: Severity, what: str, keys: Sequence[str] = (), num: int | None = None
) -> dict[str, Any]:
    count = len(keys) if num is None else num
    return {"code": code, "severity": severity, "what": what, "num": count, "where": list(keys[:_MAX_NAMED])}


def _damage(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for problem in evidence.damaged:
        yield _finding("damage", "bad", problem)
    for tally, kind in ((evidence.tally, "latents"), (evidence.texts, "text")):
        for row in tally.rows("problem"):
            code, _, what = row["label"].partition(": ")
            words = {
                "constant": "latents in which no channel varies: an encoder that failed, or an empty picture",
                "not finite": "latents with infinities or NaN: training on one would end the run",
            }.get(code, f"{code} in the {kind}: {what}")
            code = code.split(" of ")[0].replace(" ", "-")
            yield _finding(f"latent-{code}", "bad", f"{row['count']:,} {words}", row["examples"], row["count"])


def _drift(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for shard in evidence.shards:
        words = [
            f"{item['feature']} of channel {item['channel']}: {item['found']:.3g}, elsewhere {item['reference']:.3g}"
            for item in shard["off"][:3]
        ]
        features = "; ".join(words) + (f"; and {len(shard['off']) - 3} more" if len(shard["off"]) > 3 else "")
        if shard["share_off"] >= OTHER_VAE_SHARE:
            what = (
                f"unit {shard['unit']} has the statistics of another VAE or another normalisation, whatever its "
                f"identity says: {100 * shard['share_off']:.0f} % of its channels' features are off ({features})"
            )
            yield _finding("other-vae", "bad", what, [shard["tar"]])
        elif shard["share_off"]:
            what = f"unit {shard['unit']} drifts from the others: {features}"
            yield _finding("shard-drift", "bad", what, [shard["tar"]])


def _channels(evidence: Evidence) -> Iterator[dict[str, Any]]:
    if evidence.channels is None:
        return
    # Random weights are normalised with the trained VAE's numbers: theirs need not be 0 and 1.
    note = evidence.info.notes.get("encoders")
    for channel, mean, std in channels_off(evidence.channels):
        what = (
            f"channel {channel} has mean {mean:.3g} and deviation {std:.3g} over the dataset; "
            "a normalised latent has about 0 and 1"
        )
        severity: Severity = "info" if note else "bad"
        yield _finding("channel-off", severity, what + (f" (encoders: {note})" if note else ""), num=1)


def _outliers(evidence: Evidence) -> Iterator[dict[str, Any]]:
    if evidence.outliers:
        worst = evidence.outliers[0]
        what = (
            f"{counted(len(evidence.outliers), 'sample is', 'samples are')} far from all others; "
            f"the farthest by {worst['spreads']:.0f} spreads: {worst['what']}"
        )
        yield _finding("sample-outlier", "warn", what, [item["key"] for item in evidence.outliers])


def _duplicates(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for group in evidence.duplicates:
        more = f" and {len(group['clips']) - 3} more" if len(group["clips"]) > 3 else ""
        what = f"{group['what']} under several ids: {', '.join(group['clips'][:3])}{more}"
        if group["difference"]:
            what += f" ({100 * group['difference']:.1f} % of the fingerprint differs)"
        yield _finding("duplicate", "warn", what, group["keys"], group["num"])


def _captions(evidence: Evidence) -> Iterator[dict[str, Any]]:
    scripts = evidence.texts.rows("script")
    total = sum(row["count"] for row in scripts)
    for row in scripts[1:]:
        # The rare ones: a set of two languages is no mistake.
        if row["count"] < 0.05 * total and row["label"] not in ("empty",):
            mostly = f"{counted(row['count'], 'caption is', 'captions are')} mostly {row['label']}"
            what = f"{mostly}, where the others are {scripts[0]['label']}"
            yield _finding("caption-language", "info", what, row["examples"], row["count"])
    for row in evidence.texts.rows("no_words"):
        what = f"{counted(row['count'], 'sample has', 'samples have')} no caption: {row['label']}"
        yield _finding("no-caption", "warn", what, row["examples"], row["count"])
    for row in evidence.texts.rows("shortened"):
        yield _finding("caption-cut", "info", f"{row['count']:,} {row['label']}", row["examples"], row["count"])
