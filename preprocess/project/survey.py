"""What a corpus holds, as far as a config needs it: how many clips, their sizes and lengths, the hosts they are on."""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from preprocess.config import CorpusConfig, FetchConfig, PrepConfig, SieveConfig
from preprocess.corpus.layouts import CorpusLayout, find_layout
from preprocess.corpus.records import Record
from preprocess.fetch.fetcher import Fetcher
from preprocess.plan.freeze import ReportDocuments, freeze_plan
from preprocess.rejection import ClipRejected
from preprocess.video.probe import probe_clip
from shards.console import LOG, counted
from shards.errors import UserError
from shards.storage import open_storage

NUM_PROBED = 24
_MAX_UNREAD = 4
_NUM_READ = 20_000
"""Candidates whose ids and hosts are looked at; their order is a hash, so they are a fair sample."""
_ANY_LENGTH = SieveConfig(min_seconds=0.05, max_seconds=100_000.0, max_caption_characters=1_000_000)


class ClipShape(NamedTuple):
    """How one clip shows, and how long it is (0: a picture)."""

    width: float
    height: float
    seconds: float


class Survey(NamedTuple):
    """What was found."""

    layout: CorpusLayout
    num_clips: int
    """Records that have a caption and are videos; pictures where there are no videos."""
    refused_by: dict[str, int]
    clip_ids: tuple[str, ...]
    shapes: tuple[ClipShape, ...]
    """Of the clips that were probed, or as declared where none could be."""
    is_probed: bool
    unread_by: dict[str, int]
    """Clips that could not be probed, by `stage/reason`."""
    hosts: tuple[str, ...]
    images: bool
    has_times: bool
    """Whether captions speak of stretches of a clip."""


def survey_corpus(corpus: CorpusConfig, progress: ReportDocuments | None = None) -> Survey:
    """Read the corpus and probe a few clips. Raises UserError where there is nothing to train on."""
    layout = find_layout(corpus)
    corpus = corpus.model_copy(update={"format": layout.kind})
    for images in (False, True):
        sieve = _ANY_LENGTH.model_copy(update={"images": images})
        config = PrepConfig(output="", corpus=corpus, sieve=SieveConfig(images=images) if _is_mbc(layout) else sieve)
        with tempfile.TemporaryDirectory(prefix="wanprep-init-") as folder:
            plan = freeze_plan(open_storage(folder), config, progress=progress, scratch=Path(folder))
            if not plan.num_candidates:
                continue
            records = [candidate.record for candidate in islice(plan.candidates(), _NUM_READ)]
            hosts = _hosts(records)
            # A host that does not answer is reported, not waited for.
            fetch = FetchConfig(
                allow_hosts=hosts, attempts=1, timeout_seconds=20.0, deadline_seconds=120.0, outage_minutes=0.0
            )
            config = config.model_copy(update={"fetch": fetch})
            shapes, unread = _probe(records[:NUM_PROBED], config, Path(folder))
            return Survey(
                layout=layout,
                num_clips=plan.num_candidates,
                refused_by=dict(plan.refused_by()),
                clip_ids=tuple(record.clip_id for record in records),
                shapes=tuple(shapes or _declared(records)),
                is_probed=bool(shapes),
                unread_by=dict(unread),
                hosts=hosts,
                images=images,
                has_times=any(each.start_seconds is not None for record in records for each in record.object),
            )
    reasons = ", ".join(f"{count} × {reason}" for reason, count in plan.refused_by().items())
    raise UserError(
        f"{corpus.location}: no clip with a caption (read as {layout.kind}: {layout.why}); "
        f"refused: {reasons or 'nothing'}"
    )


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the sorted values are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def median_seconds(survey: Survey) -> float:
    """The median length of the clips; 0 where none is known."""
    return statistics.median([shape.seconds for shape in survey.shapes] or [0.0])


def _is_mbc(layout: CorpusLayout) -> bool:
    return layout.kind == "mbc"


def _hosts(records: list[Record]) -> tuple[str, ...]:
    """What `fetch.allow_hosts` needs for these records."""
    hosts = set()
    for record in records:
        parts = urlsplit(record.url or "")
        if parts.scheme == "s3":
            hosts.add(f"s3://{parts.netloc}")
        elif parts.scheme in ("http", "https") and parts.hostname:
            is_cdn = parts.hostname.endswith(".cloudfront.net")
            hosts.add("*.cloudfront.net" if is_cdn else parts.hostname)
    return tuple(sorted(hosts))


def _probe(records: list[Record], config: PrepConfig, scratch: Path) -> tuple[list[ClipShape], Counter[str]]:
    LOG.info("probing %s", counted(len(records), "clip"))
    shapes: list[ClipShape] = []
    unread: Counter[str] = Counter()
    with Fetcher(config.fetch, config.corpus, scratch, threading.Event()) as fetcher:
        for record in records:
            try:
                with fetcher.fetched(record) as clip:
                    facts = probe_clip(clip.path, record, config)
                shapes.append(ClipShape(facts.display_width, facts.display_height, facts.duration_seconds))
            except ClipRejected as rejected:
                unread[f"{rejected.rejection.stage}/{rejected.rejection.reason}"] += 1
                if not shapes and unread.total() == _MAX_UNREAD:
                    break  # a host that does not answer
    return shapes, unread


def _declared(records: list[Record]) -> list[ClipShape]:
    return [
        ClipShape(record.declared_width, record.declared_height, record.declared_seconds or 0.0)
        for record in records[:1000]
        if record.declared_width and record.declared_height
    ]
