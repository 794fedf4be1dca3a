"""A scan's figures as lines for a terminal, and as a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from preprocess.scan import Lengths, ScanReport
from shards.errors import UserError

_BAR_CHARACTERS = 30


def describe_scan(report: ScanReport) -> list[str]:
    """The report as text: every count with its share, histograms with bars."""
    lines = [
        f"documents  {report.documents:,} = {report.passed:,} pass the sieve + {report.refused:,} refused + "
        f"{report.unreadable:,} unreadable",
        *_counts("unreadable", report.unreadable_by, report.documents),
        *_counts("refused by the sieve", report.refused_by, report.documents),
    ]
    if report.duplicate_clip_ids:
        lines.append(f"duplicates  {report.duplicate_clip_ids:,} records share the clip id of another one")
    readable = report.documents - report.unreadable
    lines += _counts("media type", report.media_types, readable)
    lines += _counts("category", report.categories, readable)
    lines += _counts("declared size", report.declared_sizes, readable)
    lines += _counts("declared frame rate", report.declared_fps, readable)
    lines += _histogram("declared length of videos, seconds", report.video_seconds)
    if report.video_seconds_not_declared:
        lines.append(f"  {report.video_seconds_not_declared:>9,}          not declared")
    for media, lengths in report.caption_characters.items():
        lines += _histogram(f"caption characters, all levels joined, {media}", lengths)
    if report.caption_tokens is None:
        lines.append("caption tokens: not counted, for want of the text encoder's tokenizer")
    else:
        lines += _histogram(f"caption tokens, a sample of {report.caption_tokens.count:,}", report.caption_tokens)
    lines += _counts("records with words at level", report.records_with, readable)
    lines += _counts("defects that records survived", report.defects, readable)
    return lines


def write_scan(report: ScanReport, path: Path) -> None:
    """Write the report as JSON. Raises UserError where the file cannot be written."""
    text = json.dumps(report.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}", mend="name another file with --out") from None


def _counts(title: str, counts: dict[str, int], total: int) -> list[str]:
    if not counts:
        return []
    return [title, *(f"  {count:>9,}  {100 * count / max(1, total):5.1f} %  {name}" for name, count in counts.items())]


def _histogram(title: str, lengths: Lengths) -> list[str]:
    lines = [f"{title}: {lengths.count:,}, mean {lengths.mean:,.1f}, largest {lengths.largest:,.1f}"]
    names = [f"below {lengths.edges[0]:,}"]
    names += [f"{low:,} to {high:,}" for low, high in zip(lengths.edges, lengths.edges[1:], strict=False)]
    names.append(f"{lengths.edges[-1]:,} and more")
    for name, count in zip(names, lengths.histogram, strict=True):
        share = count / max(1, lengths.count)
        if count:
            lines.append(f"  {count:>9,}  {100 * share:5.1f} %  {name:<18} {'█' * round(_BAR_CHARACTERS * share)}")
    return lines
