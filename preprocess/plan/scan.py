"""What is in a corpus: counts, histograms, defects, and how many records the sieve would keep; nothing is frozen."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocess.config import PrepConfig, SieveConfig
from preprocess.corpus.corpus import Chunk, map_chunks, read_chunk
from preprocess.corpus.layouts import open_corpus
from preprocess.corpus.records import read_fields
from preprocess.plan.filter import TEXT_LEVELS, caption_texts, filter_captions, filter_metadata
from preprocess.plan.plan import most_frequent
from preprocess.rejection import Rejection, short
from preprocess.text.captions import CountTokens
from preprocess.text.clean import clean_text
from shards.config import Config
from shards.errors import UserError
from shards.format.keys import clip_hash

SECONDS_EDGES = (3, 5, 10, 15, 20, 25, 30, 45, 60, 120, 300, 600)
CHARACTER_EDGES = (1, 50, 100, 200, 300, 400, 600, 800, 1000, 1500, 3000, 10_000)
TOKEN_EDGES = (32, 64, 128, 192, 256, 320, 384, 448, 512, 1024)
MAX_NAMED = 40
"""Distinct values of a count that are named; the rest is summed as `others`."""
SAMPLED_PER_CHUNK = 32
MAX_SAMPLED = 4096
"""Texts whose tokens are counted: counting all would take longer than all the rest."""

NOT_DECLARED = "not declared"


class Lengths(Config):
    """Lengths of some texts or clips."""

    count: int
    mean: float
    largest: float
    edges: tuple[int, ...]
    histogram: tuple[int, ...]
    """Counts below the first edge, from each edge to the next, and from the last edge on."""


class ScanReport(Config):
    """The corpus in figures. `documents` = `unreadable` + `passed` + `refused`."""

    documents: int
    unreadable: int
    unreadable_by: dict[str, int]
    passed: int
    refused: int
    refused_by: dict[str, int]
    duplicate_clip_ids: int
    """Readable records whose clip id another one has too, less one a clip id."""
    media_types: dict[str, int]
    categories: dict[str, int]
    declared_sizes: dict[str, int]
    declared_fps: dict[str, int]
    video_seconds: Lengths
    video_seconds_not_declared: int
    caption_characters: dict[str, Lengths]
    """All caption levels joined, by media type."""
    caption_tokens: Lengths | None
    """The same, cleaned, of a sample of the records; None where no tokenizer was given."""
    records_with: dict[str, int]
    """Records that have text at each level."""
    defects: dict[str, int]
    """Records by kind of damage that they survived."""


class ScanCounts(NamedTuple):
    """The counts of one chunk."""

    counts: Counter[tuple[str, str]]
    """By (what is counted, its value)."""
    hashes: list[int]
    seconds: list[float]
    characters: list[tuple[str, int]]
    """(media type, characters of all captions joined)."""
    texts: list[tuple[int, str]]
    """(hash, captions joined) of the sample."""


def scan_corpus(
    config: PrepConfig,
    *,
    count_tokens: CountTokens | None = None,
    progress: Callable[[int], None] | None = None,
    num_workers: int | None = None,
) -> ScanReport:
    """Read the complete corpus and count. Raises UserError where there is none.

    Args:
        config: `corpus.location` and `sieve` are read (not `corpus.limit`: a scan reads everything).
        count_tokens: the text encoder's count for a cleaned text, end token included; called for a sample of texts.
        progress: called with counts of documents as they are read.
        num_workers: processes; None: one a core.
    """
    total = ScanCounts(Counter(), [], [], [], [])
    num_documents = 0
    work = partial(tally_chunk, config=config.sieve)
    for num_read, tally in map_chunks(open_corpus(config.corpus), work, num_workers):
        num_documents += num_read
        total.counts.update(tally.counts)
        total.hashes.extend(tally.hashes)
        total.seconds.extend(tally.seconds)
        total.characters.extend(tally.characters)
        total.texts.extend(tally.texts)
        if progress is not None:
            progress(num_read)
    if num_documents == 0:
        raise UserError(f"corpus.location: {config.corpus.location}: no annotation in it")
    return _report(num_documents, total, count_tokens)


def tally_chunk(chunk: Chunk, config: SieveConfig) -> tuple[int, ScanCounts]:
    """How many documents a chunk has, and their counts."""
    tally = ScanCounts(Counter(), [], [], [], [])
    texts: list[tuple[int, str]] = []
    for document in read_chunk(chunk):
        fields = document.rejection or document.fields or read_fields(document.data, document.source)
        if isinstance(fields, Rejection):
            tally.counts["unreadable", f"{fields.stage}/{fields.reason}"] += 1
        else:
            texts.append(_tally_record(fields, config, tally))
    tally.texts.extend(nsmallest(SAMPLED_PER_CHUNK, texts))
    return len(chunk.items), tally


def _tally_record(fields: Mapping[str, Any], config: SieveConfig, tally: ScanCounts) -> tuple[int, str]:
    counts = tally.counts
    media, seconds, fps = fields["media_type"] or "unknown", fields["declared_seconds"], fields["declared_fps"]
    texts = caption_texts(fields)
    refusal = filter_metadata(fields["media_type"], seconds, config) or filter_captions(texts, config)
    counts["sieve", "passed" if refusal is None else f"{refusal.stage}/{refusal.reason}"] += 1
    counts["media", media] += 1
    counts["category", fields["category"] or NOT_DECLARED] += 1
    width, height = fields["declared_width"], fields["declared_height"]
    counts["size", f"{width}×{height}" if width else NOT_DECLARED] += 1
    counts["fps", f"{fps:g}" if fps else NOT_DECLARED] += 1
    for level in (*TEXT_LEVELS, "speech"):
        if fields[level]:
            counts["level", level] += 1
    for defect in fields["defects"]:
        counts["defect", defect] += 1
    if media == "video":
        if seconds is None:
            counts["video seconds", NOT_DECLARED] += 1
        else:
            tally.seconds.append(seconds)
    joined = "\n".join(texts)
    tally.characters.append((media, len(joined)))
    line_hash = clip_hash(fields["clip_id"])
    tally.hashes.append(line_hash)
    return line_hash, joined


def _report(num_documents: int, total: ScanCounts, count_tokens: CountTokens | None) -> ScanReport:
    counts = total.counts
    unreadable, sieved = _of(counts, "unreadable"), _of(counts, "sieve")
    passed = sieved.pop("passed", 0)
    by_media: dict[str, list[float]] = {}
    tokens = None
    if count_tokens is not None:
        sample = nsmallest(MAX_SAMPLED, total.texts)
        tokens = _lengths([float(count_tokens(clean_text(text))) for _, text in sample], TOKEN_EDGES)
    for media, characters in total.characters:
        by_media.setdefault(media, []).append(characters)
    return ScanReport(
        documents=num_documents,
        unreadable=sum(unreadable.values()),
        unreadable_by=unreadable,
        passed=passed,
        refused=sum(sieved.values()),
        refused_by=sieved,
        duplicate_clip_ids=len(total.hashes) - len(np.unique(np.array(total.hashes, dtype=np.uint64))),
        media_types=_of(counts, "media"),
        categories=_named(_of(counts, "category")),
        declared_sizes=_named(_of(counts, "size")),
        declared_fps=_named(_of(counts, "fps")),
        video_seconds=_lengths(total.seconds, SECONDS_EDGES),
        video_seconds_not_declared=counts["video seconds", NOT_DECLARED],
        caption_characters={media: _lengths(values, CHARACTER_EDGES) for media, values in sorted(by_media.items())},
        caption_tokens=tokens,
        records_with=_of(counts, "level"),
        defects=_of(counts, "defect"),
    )


def _of(counts: Counter[tuple[str, str]], what: str) -> dict[str, int]:
    """The counts of one thing, most frequent first, then by name."""
    return most_frequent({value: count for (kind, value), count in counts.items() if kind == what})


def _named(counts: dict[str, int]) -> dict[str, int]:
    """The most frequent values by name, the rest as one sum."""
    items = list(counts.items())
    named = {short(value, 80): count for value, count in items[:MAX_NAMED]}
    rest = items[MAX_NAMED:]
    return named | ({f"others ({len(rest)})": sum(count for _, count in rest)} if rest else {})


def _lengths(values: list[float], edges: tuple[int, ...]) -> Lengths:
    histogram = [0] * (len(edges) + 1)
    for value in values:
        histogram[bisect_right(edges, value)] += 1
    mean = sum(values) / len(values) if values else 0.0
    largest = float(max(values, default=0.0))
    return Lengths(count=len(values), mean=mean, largest=largest, edges=edges, histogram=tuple(histogram))


# A scan's figures as lines for a terminal, and as a JSON file.

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
        lines.append("caption tokens: not counted, because there is no tokenizer of the text encoder")
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
        raise UserError(f"{path}: cannot be written: {error.strerror}", fix="name another file with --out") from None


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
