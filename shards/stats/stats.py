"""`wanshards stats`: a dataset in numbers, and what is wrong with it, by name.

Two passes. The first reads each unit once, a sample at a time, and leaves a few numbers a sample in the cache. The
second reads these back and compares shards and samples with the whole. In memory are one sample a thread, the counts,
and of each sample its key, clip and fingerprint: some 300 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from shards.format.commit import dataset_revision
from shards.format.dataset_info import DatasetInfo, read_info
from shards.format.names import text_kind
from shards.stats.cache import StatsCache
from shards.stats.counter import Histograms
from shards.stats.drift import ReferenceBuilder, ShardVerdict, judge_shard, largest, sample_distances
from shards.stats.duplicates import Alike, find_alike, find_equal
from shards.stats.findings import Evidence, find_all
from shards.stats.funnel import OnRefused, funnel_steps, read_funnel, reason_rows
from shards.stats.passes import Passes, Unit
from shards.stats.result import counted
from shards.stats.unit import UnitStats, latent_unit
from shards.storage import open_storage
from shards.storage.base import Storage

ReportUnits = Callable[[int, int], None]
"""Told units done and units in all."""
_MAX_GROUPS = 200


def dataset_stats(
    root: str | Path,
    *,
    text_set: str | None = None,
    sample: int | None = None,
    cache: Path | None = None,
    jobs: int = 1,
    progress: ReportUnits | None = None,
    on_refused: OnRefused | None = None,
) -> dict[str, Any]:
    """Everything about a dataset as plain JSON values.

    Args:
        root: a folder or `s3://bucket/prefix`; a build may be writing to it.
        text_set: whose captions to count; None: `default` where it is there.
        sample: read only so many samples, chosen by a hash of their keys; counts of records are never sampled.
        cache: folder for finished units; None: a temporary one.
        jobs: units read at a time.
        progress: told how far it is.
        on_refused: shown each refused record's ledger row.

    Raises UserError when there is no dataset. A damaged sample or shard is a finding, not an error.
    """
    storage = open_storage(root)
    info = read_info(storage)
    text_set = _text_set(info, text_set)
    with ExitStack() as stack:
        kept = StatsCache(cache or Path(stack.enter_context(TemporaryDirectory(prefix="wanshards-stats-"))))
        passes = Passes(storage, text_set, sample, kept, jobs)
        first, damaged = _FirstPass(), list[str]()
        latents, texts = list[Unit](), list[Unit]()
        for unit, stats in passes.latents(damaged):
            latents.append(unit)
            first.add_latents(unit, stats)
            if progress:
                progress(len(latents), passes.num_units)
        for unit, tally in passes.texts(damaged):
            texts.append(unit)
            first.texts.merge([tally])
            if progress:
                progress(len(latents) + len(texts), passes.num_units)
        verdicts, outliers = _second_pass(latents, first, kept, storage)
    funnel = read_funnel(storage, info, [unit.ref for unit in latents], on_refused)
    num_samples = sum(len(unit.ref.keys) for unit in latents)
    num_with_text = sum(len(unit.ref.keys) for unit in _read_only_matching(texts, latents))
    evidence = Evidence(
        info, first.tally, first.texts, [*damaged, *funnel.problems], first.builder.channels(),
        first.builder.references(), verdicts, outliers, first.duplicates(),
        {unit.ref.unit: unit.ref.tar.name for unit in latents},
    )  # fmt: skip
    return {
        # As it was given: a report that is mailed around need not tell where this machine keeps its files.
        "root": storage.url() if str(root).startswith("s3://") else str(root),
        "identity_sha256": info.identity_digest,
        "revision": _revision([*latents, *texts]),
        "notes": info.notes,
        "text_set": text_set,
        "sampled": {"asked": sample, "read": len(first.keys), "of": num_samples},
        "funnel": funnel_steps(funnel.tally, info, num_samples, num_with_text),
        "reasons": reason_rows(funnel.tally),
        "window_reasons": funnel.tally.rows("window_reason"),
        "findings": find_all(evidence),
        **counted(evidence),
    }


class _FirstPass:
    """What the first pass leaves: counts, the reference, and of each sample what finds its likes."""

    def __init__(self) -> None:
        self.tally, self.texts = Histograms(), Histograms()
        self.builder = ReferenceBuilder()
        self.keys: list[str] = []
        self._clips: list[str] = []
        self._digests: list[str] = []
        self._previews: list[str] = []
        self._prints: list[np.ndarray] = []

    def add_latents(self, unit: Unit, stats: UnitStats) -> None:
        """Take one unit."""
        self.tally.merge([stats.tally])
        self.builder.add(stats)
        if self._prints and stats.prints.shape[1:] != self._prints[0].shape[1:]:
            if len(stats.keys):
                self.tally.add("problem", "latents of another number of channels than before", unit.ref.tar.name)
            return
        if len(stats.keys):
            self.keys += stats.keys
            self._clips += stats.clips
            # Constant latents are a finding of their own: they show no pictures that could be the same.
            varies: list[bool] = np.any(stats.prints, axis=1).tolist()
            self._digests += [digest if it else "" for digest, it in zip(stats.digests, varies, strict=True)]
            self._previews += stats.previews
            self._prints.append(stats.prints)

    def duplicates(self) -> list[dict[str, Any]]:
        """Groups of samples that show the same, as plain values: what is equal, and the members."""
        if not self._prints:
            return []
        found: list[dict[str, Any]] = []
        seen: set[frozenset[int]] = set()
        for what, groups in (
            ("the same latent", find_equal(self._digests, self._clips)),
            ("the same preview strip", find_equal(self._previews, self._clips)),
            ("nearly the same latent", find_alike(np.concatenate(self._prints), self._clips)),
        ):
            for group in groups:
                if frozenset(group.members) not in seen:
                    seen.add(frozenset(group.members))
                    found.append(self._group(what, group))
        return sorted(found, key=lambda item: (item["difference"], -item["num"]))[:_MAX_GROUPS]

    def _group(self, what: str, group: Alike) -> dict[str, Any]:
        keys = [self.keys[place] for place in group.members]
        clips = sorted({self._clips[place] for place in group.members})
        return {
            "what": what,
            "difference": round(group.largest_difference, 4),
            "num": len(keys),
            "keys": keys[:20],
            "clips": clips[:20],
        }


def _second_pass(
    latents: list[Unit], first: _FirstPass, kept: StatsCache, storage: Storage
) -> tuple[list[ShardVerdict], list[dict[str, Any]]]:
    references = first.builder.references()
    verdicts: list[ShardVerdict] = []

    def distances() -> Iterator[tuple[float, str, str]]:
        for unit in latents:
            stats = kept.read_latents(unit.cache_name) or latent_unit(storage, unit.ref.commit(storage), unit.wanted)
            verdict = judge_shard(unit.ref.unit, stats, references)
            if verdict:
                verdicts.append(verdict)
            yield from sample_distances(stats, references)

    return verdicts, largest(distances())


def _text_set(info: DatasetInfo, text_set: str | None) -> str | None:
    if text_set is None:
        return "default" if "default" in info.text_sets else next(iter(sorted(info.text_sets)), None)
    info.kind_identity(text_kind(text_set))
    return text_set


def _read_only_matching(texts: list[Unit], latents: list[Unit]) -> list[Unit]:
    there = {unit.ref.unit for unit in latents}
    return [unit for unit in texts if unit.ref.unit in there]


def _revision(units: list[Unit]) -> str:
    return dataset_revision((unit.ref.kind, unit.ref.unit, unit.ref.revision) for unit in units)


# Statistics with a progress bar on standard error.


def run_stats(root: str, **options: Any) -> dict[str, Any]:
    """`dataset_stats` with its options, and a bar where someone watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress("stats", *columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("stats", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return dataset_stats(root, progress=advance, **options)
