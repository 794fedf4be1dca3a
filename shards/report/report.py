"""`wanshards report`: one HTML file of a dataset: what it holds, what was refused and why, and samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.format.dataset_info import read_info
from shards.page.html_page import page, tag
from shards.report.gallery import REFUSED_SHARE, Gallery, RefusedKeeper, choose_samples
from shards.report.sections import decisions, distributions, funnel, latents, overview, samples
from shards.stats.stats import dataset_stats
from shards.storage import open_storage

DEFAULT_SAMPLE = 2000
_OVERHEAD_BYTES = 600_000
"""For the page's own text, tables and charts."""


def write_dataset_report(
    root: str,
    out: Path,
    *,
    sample: int | None = DEFAULT_SAMPLE,
    max_megabytes: float = 20.0,
    cache: Path | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Write the report of `root` to the file `out`, completely or not at all; what it holds, in numbers.

    Args:
        root: a folder or `s3://bucket/prefix`; a build may be writing to it.
        out: an `.html` file.
        sample: latents to read for the statistics; None: all.
        max_megabytes: most the page may have, in 10⁶ bytes.
        cache: of `dataset_stats`.
        jobs: units read at a time.

    Raises UserError when there is no dataset, or `out` is no name for a page.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: the report is a page", expected="a file that ends in .html", fix=f"{out}.html")
    keeper = RefusedKeeper()
    stats = dataset_stats(root, sample=sample, cache=cache, jobs=jobs, on_refused=keeper.add)
    storage = open_storage(root)
    max_bytes = int(max_megabytes * 1e6) - _OVERHEAD_BYTES
    refused = keeper.rows(int(max_bytes * REFUSED_SHARE))
    shown, num_pictures = choose_samples(storage, read_info(storage), _named(stats), max_bytes)
    bad = tuple(sorted({item["code"] for item in stats["findings"] if item["severity"] == "bad"}))
    gallery = Gallery(shown, refused, stats["funnel"]["samples"], num_pictures, keeper.num_seen, bad)
    text = report_page(stats, gallery)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".writing-{out.name}")
    # Lone surrogates of a broken record cannot be written as UTF-8.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(out)
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "samples": len(shown),
        "samples_with_pictures": num_pictures,
        "of_samples": gallery.num_samples,
        "refused": len(refused),
        "of_refused": gallery.num_rejected,
        "latents_read": stats["sampled"]["read"],
        "findings": len(stats["findings"]),
    }


def report_page(stats: Mapping[str, Any], gallery: Gallery) -> str:
    """The page."""
    notes = "; ".join(f"{name}: {text}" for name, text in stats["notes"].items())
    lead = tag(
        "p",
        tag("span", stats["root"], class_="mono"),
        f", revision {stats['revision'][:12]}, identity {stats['identity_sha256'][:12]}",
        f". {notes}" if notes else None,
    )
    sections = [
        overview(stats, gallery),
        funnel(stats),
        samples(gallery),
        distributions(stats),
        decisions(stats),
        latents(stats, gallery),
    ]
    return page(
        f"Dataset {stats['root'].split('?')[0].rstrip('/').rpartition('/')[2] or stats['root']}",
        sections,
        lead=lead,
        data={"gallery-data": gallery.data()},
        scripts=("gallery.js",),
        styles=("gallery.css",),
        footer=f"Made by `wanshards report`. Text set: {stats['text_set'] or 'none'}.",
    )


def _named(stats: Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys that a finding, the list of outliers or a duplicate names, and the codes they are named for."""
    named: dict[str, list[str]] = {}
    pairs = [(key, item["code"]) for item in stats["findings"] for key in item["where"]]
    pairs += [(item["key"], "sample-outlier") for item in stats["latents"]["outliers"]]
    pairs += [(key, "duplicate") for item in stats["duplicates"] for key in item["keys"]]
    for key, code in pairs:
        # A finding may also name a tar or a file; only a key has this sign.
        if "@" in key and code not in named.setdefault(key, []):
            named[key].append(code)
    return named
