"""Probe a few of a plan\'s clips before a build: what their files are, whatever their records declare."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.config import PrepConfig
from preprocess.corpus.corpus import map_ahead
from preprocess.fetch.fetcher import Fetcher
from preprocess.plan.plan import Candidate, Plan
from preprocess.rejection import ClipRejected, Rejection
from preprocess.video.bucket import choose_bucket
from preprocess.video.probe import probe_clip


class Probed(NamedTuple):
    """What one clip turned out to be."""

    outcome: str
    """The bucket, `832×480`, or `stage/reason`."""
    num_bytes: int


def probe_clips(plan: Plan, config: PrepConfig, num_clips: int, scratch: Path) -> dict[str, Any]:
    """Fetch and probe the plan's first `num_clips` candidates; plain JSON counts, with what they mean for the plan.

    The plan's order is a hash, so its first candidates are a fair sample. Nothing is kept of them but the cache that
    `fetch.cache` names. Windows and captions are not checked: they can still refuse a clip.
    """
    candidates = islice(plan.candidates(), num_clips)
    sizes = [f"{size.width}×{size.height}" for size in config.buckets.sizes]
    outcomes: Counter[str] = Counter()
    num_bytes = 0
    decoders = config.engine.decoders
    stop = threading.Event()
    with (
        Fetcher(config.fetch, config.corpus, scratch, stop, decoders) as fetcher,
        ThreadPoolExecutor(decoders) as pool,
    ):
        try:
            for seen in map_ahead(pool, partial(_look, config, fetcher), candidates, num_ahead=2 * decoders):
                outcomes[seen.outcome] += 1
                num_bytes += seen.num_bytes
        finally:
            stop.set()  # what is still being fetched when this ends early is of no use
    num_seen = sum(outcomes.values())
    scale = plan.num_candidates / num_seen if num_seen else 0.0
    refused = {name: count for name, count in outcomes.most_common() if name not in sizes}
    return {
        "clips": num_seen,
        "by_bucket": {size: outcomes[size] for size in sizes},
        "refused_by": refused,
        "estimate_by_bucket": {size: round(outcomes[size] * scale) for size in sizes},
        "estimate_refused": round(sum(refused.values()) * scale),
        "estimate_download_gib": round(num_bytes * scale / 2**30, 3),
    }


def describe_probe(seen: dict[str, Any]) -> list[str]:
    """The figures of `probe_clips` as lines for people."""
    return [
        f"probed     {seen['clips']:,} clips; in brackets what that means for the complete plan, "
        f"{seen['estimate_download_gib']:,.1f} GiB to download",
        *(
            f"  {count:>9,}  {size}  (about {seen['estimate_by_bucket'][size]:,})"
            for size, count in seen["by_bucket"].items()
        ),
        *(f"  {count:>9,}  {reason}" for reason, count in seen["refused_by"].items()),
    ]


def _look(config: PrepConfig, fetcher: Fetcher, candidate: Candidate) -> Probed:
    num_bytes = 0
    try:
        with fetcher.fetched(candidate.record) as clip:
            num_bytes = clip.num_bytes
            bucket = choose_bucket(probe_clip(clip.path, candidate.record, config), config.buckets)
    except ClipRejected as rejected:
        return Probed(f"{rejected.rejection.stage}/{rejected.rejection.reason}", num_bytes)
    if isinstance(bucket, Rejection):
        return Probed(f"{bucket.stage}/{bucket.reason}", num_bytes)
    return Probed(f"{bucket.width}×{bucket.height}", num_bytes)
