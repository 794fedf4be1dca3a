"""What a plan promises before it runs: candidates, units, samples per bucket, and what the upscaling limit excludes."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

from preprocess.aspect import is_sd
from preprocess.bucket import choose_size
from preprocess.config import PrepConfig
from preprocess.plan import Plan
from preprocess.rejection import Rejection

TOO_SMALL = "too small for every bucket"
UNKNOWN = "size not declared"


def count_plan(plan: Plan, config: PrepConfig) -> dict[str, Any]:
    """The plan in figures, as plain JSON; buckets are estimated from the declared sizes alone."""
    buckets: Counter[str] = Counter({f"{size.width}×{size.height}": 0 for size in config.buckets.sizes})
    for generation in plan.generations:
        for size in generation.declared_sizes:
            buckets[_bucket_of(size.width, size.height, config)] += size.count
    return {
        "records": plan.num_candidates + plan.num_refused,
        "candidates": plan.num_candidates,
        "refused": plan.num_refused,
        "refused_by": dict(plan.refused_by()),
        "beyond_limit": plan.last_read.num_beyond_limit if plan.last_read else 0,
        "units": plan.num_units,
        "generations": len(plan.generations),
        "declared_hours": round(sum(each.declared_seconds for each in plan.generations) / 3600, 3),
        "candidates_by_bucket": dict(buckets),
    }


def describe_plan(counts: dict[str, Any]) -> list[str]:
    """The figures as lines for people."""
    beyond = f" + {counts['beyond_limit']:,} beyond corpus.limit" if counts["beyond_limit"] else ""
    return [
        f"records    {counts['records'] + counts['beyond_limit']:,} read = {counts['candidates']:,} candidates + "
        f"{counts['refused']:,} refused{beyond}",
        *(f"  {count:>9,}  {reason}" for reason, count in counts["refused_by"].items()),
        f"plan       {counts['units']:,} units in {counts['generations']:,} generation(s), "
        f"{counts['declared_hours']:,.2f} h of video by their records",
        "buckets    by the declared sizes; the files may differ, and the build's summary tells the truth",
        *(f"  {count:>9,}  {name}" for name, count in counts["candidates_by_bucket"].items()),
    ]


def _bucket_of(width: int, height: int, config: PrepConfig) -> str:
    if not width or not height:
        return UNKNOWN
    shown = width
    if is_sd(width, height):
        shown = round(height * Fraction(*map(int, config.decode.sd_display_aspect.split(":"))))
    bucket = choose_size(shown, height, config.buckets)
    return TOO_SMALL if isinstance(bucket, Rejection) else f"{bucket.width}×{bucket.height}"
