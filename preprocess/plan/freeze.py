"""Making a plan: read the corpus once, sieve, order by a hash of the clip id, cut into units, freeze.

The corpus may be larger than memory. Lines of candidates and of refused records go to a scratch file as they come; in
memory stays an index of some thirty bytes a record, which is sorted and then read out. What is frozen depends on the
documents, the sieve, the limit and the generations before, and on nothing else: not on the order of folders, the number
of processes, or the machine.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from preprocess.config import PrepConfig, SieveConfig
from preprocess.corpus.archives import Document
from preprocess.corpus.corpus import Chunk, map_chunks, read_chunk
from preprocess.corpus.layouts import open_corpus
from preprocess.corpus.records import read_about, read_json, read_words
from preprocess.plan.external_sort import LineBatch, Spill, Superseded
from preprocess.plan.filter import sieve_about, sieve_words
from preprocess.plan.plan import (
    PLAN_VERSION,
    DeclaredSize,
    GenerationInfo,
    Plan,
    open_plan,
    plan_commit_name,
    plan_ledger_name,
    plan_name,
)
from preprocess.rejection import Rejection, short
from shards.console import LOG
from shards.errors import UserError
from shards.format.keys import clip_hash
from shards.format.sealed_json import seal_document
from shards.storage.base import Storage

# A generation of the plan put into the storage: its two objects, then its commit, if absent.


def store_generation(plan: Plan, plan_file: Path, ledger_file: Path, **fields: Any) -> Plan:
    """Append a generation behind those of `plan`; the plan as it then is, with another's where that was first.

    Args:
        plan: the generations before.
        plan_file: its candidates, as `Spill.write_frames` wrote them.
        ledger_file: its refused records, as `Spill.write_frame` wrote them.
        fields: what else `GenerationInfo` says.
    """
    number = len(plan.generations)
    plan_sha256, ledger_sha256 = _sha256(plan_file), _sha256(ledger_file)
    info = GenerationInfo(
        plan_version=PLAN_VERSION,
        name=f"gen-{number:03d}-{hashlib.sha256((plan_sha256 + ledger_sha256).encode()).hexdigest()[:8]}",
        plan_sha256=plan_sha256,
        ledger_sha256=ledger_sha256,
        first_unit=plan.num_units,
        first_candidate=plan.num_candidates,
        **fields,
    )
    _check_counts(info)
    storage = plan.storage
    storage.put(plan_name(info.name), plan_file)
    storage.put(plan_ledger_name(info.name), ledger_file)
    if not storage.put(plan_commit_name(number), seal_document(info.model_dump(mode="json")), if_absent=True):
        LOG.info("another process froze generation %d first; its plan counts", number)
    return open_plan(storage)


def _check_counts(info: GenerationInfo) -> None:
    accounted = info.num_new + info.num_refused + info.num_planned_before + info.num_refused_before
    if accounted + info.num_beyond_limit != info.records_read:
        raise RuntimeError(f"{info.records_read} documents read, {accounted + info.num_beyond_limit} accounted for")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_CAPTIONS = ("object", "scene", "semantic", "application")
_QUOTE = json.encoder.encode_basestring_ascii

ReportDocuments = Callable[[int], None]
"""Told how many documents have been read since it was last told."""


class ChunkResult(NamedTuple):
    """What became of the documents of one chunk, made in a worker process."""

    num_documents: int
    candidates: LineBatch
    """Lines of the plan, tagged with the declared size."""
    refused: LineBatch
    """Lines of its ledger, tagged `stage/reason`."""


def freeze_plan(
    storage: Storage,
    config: PrepConfig,
    *,
    progress: ReportDocuments | None = None,
    num_workers: int | None = None,
    scratch: Path | None = None,
) -> Plan:
    """Freeze what the corpus holds and no generation has yet; the plan as it then is.

    Again over an unchanged corpus it adds nothing. Raises UserError where there is no corpus, or no document in it.

    Args:
        storage: root of the dataset.
        config: `corpus`, `sieve` and `shards.unit_size` are read.
        progress: called with counts of documents as they are read.
        num_workers: processes that read and parse; None: one a core.
        scratch: folder for the scratch file (about the corpus's size); None: the system's temporary folder.
    """
    plan = open_plan(storage)
    _warn_of_changes(plan, config)
    work = partial(read_and_sieve, config=config.sieve)
    with (
        tempfile.TemporaryDirectory(prefix="wanprep-plan-", dir=scratch) as folder,
        closing(Spill(Path(folder, "candidates"))) as candidates,
        closing(Spill(Path(folder, "refused"))) as refused,
    ):
        num_documents = 0
        for result in map_chunks(open_corpus(config.corpus), work, num_workers):
            num_documents += result.num_documents
            candidates.add(result.candidates)
            refused.add(result.refused)
            if progress is not None:
                progress(result.num_documents)
        if num_documents == 0:
            raise UserError(
                f"corpus.location: {config.corpus.location}: no annotation in it",
                expected="JSON files, one a media item",
            )
        return _freeze(plan, config, num_documents, candidates, refused, Path(folder))


def ensure_plan(
    storage: Storage, config: PrepConfig, *, progress: ReportDocuments | None = None, scratch: Path | None = None
) -> Plan:
    """The frozen plan as it is, or a first one: a build that is started again does not read the corpus again.

    `freeze_plan` takes in records that were added later. A limit above what is planned grows the plan.
    """
    plan = open_plan(storage)
    last = plan.last_read
    grows = (
        last is not None
        and last.num_beyond_limit + last.num_refused_beyond_limit > 0
        and (config.corpus.limit is None or config.corpus.limit > plan.num_candidates)
    )
    if not plan.generations or grows:
        return freeze_plan(storage, config, progress=progress, scratch=scratch)
    _warn_of_changes(plan, config)
    return plan


def read_and_sieve(chunk: Chunk, config: SieveConfig) -> ChunkResult:
    """Read, parse and sieve the documents of a chunk; their lines for the plan and its ledger."""
    result = ChunkResult(len(chunk.items), LineBatch.empty(), LineBatch.empty())
    for document in read_chunk(chunk):
        _sort_document(document, config, result)
    return result


def _sort_document(document: Document, config: SieveConfig, result: ChunkResult) -> None:
    """Put one document among the candidates or the refused. Its words are read only where the rest passes."""
    defects: set[str] = set()
    root = document.rejection or document.fields or read_json(document.data, defects)
    if isinstance(root, Rejection):
        append_refused(result.refused, "", document.source, root)
        return
    about = document.fields or read_about(root, document.source, defects)
    if isinstance(about, Rejection):
        append_refused(result.refused, "", document.source, about)
        return
    rejection = sieve_about(about["media_type"], about["declared_seconds"], config)
    if rejection is None:
        words = document.fields or read_words(root, about, defects)
        rejection = sieve_words([caption["text"] for level in _CAPTIONS for caption in words[level]], config)
    if rejection is not None:
        append_refused(result.refused, about["clip_id"], document.source, rejection)
        return
    # Absent fields are left out of the line; `Record.model_validate_json` gives the record that `parse_record` gives.
    line = orjson.dumps({name: value for name, value in (about | words).items() if value})
    size = f"{about['declared_width'] or 0}x{about['declared_height'] or 0}"
    result.candidates.append(clip_hash(about["clip_id"]), line, size, about["declared_seconds"] or 0.0)


def append_refused(batch: LineBatch, clip_id: str, source: str, rejection: Rejection) -> None:
    """Add the ledger row of a refused record (`shards.format.ledger.LedgerRow`; it is no candidate: ordinal −1).

    Canonical JSON, written out here: for half the corpus this row is most of the work.
    """
    line = (
        f'{{"attempts":1,"bytes":0,"candidate":-1,"clip_id":{_QUOTE(clip_id)},"detail":{_QUOTE(rejection.detail)},'
        f'"reason":"{rejection.reason}","retryable":{"true" if rejection.retryable else "false"},"seconds":{{}},'
        f'"source":{_QUOTE(source)},"stage":"{rejection.stage}","status":"rejected","windows":[]}}'
    ).encode()
    batch.append(clip_hash(clip_id or source), line, f"{rejection.stage}/{rejection.reason}")


def _warn_of_changes(plan: Plan, config: PrepConfig) -> None:
    """Say what of the config no longer bears on what is frozen already."""
    limit = config.corpus.limit
    if limit is not None and limit < plan.num_candidates:
        LOG.warning("corpus.limit %d is below the %d candidates planned already; they stay", limit, plan.num_candidates)
    if plan.last_read is not None and plan.last_read.sieve != config.sieve:
        LOG.warning("the sieve has changed since the plan was frozen: it bears on records that are not candidates yet")


class _Selection(NamedTuple):
    """What of the new documents goes into the generation; places in their spills, in order."""

    candidates: list[int]
    refused: list[int]
    counts: dict[str, int]
    superseded_by: dict[str, int]


def _freeze(
    plan: Plan, config: PrepConfig, num_documents: int, candidates: Spill, refused: Spill, folder: Path
) -> Plan:
    candidates.flush()
    selection = _select(plan, config, candidates, refused)
    if not selection.candidates and not selection.refused:
        return plan
    plan_file, ledger_file = folder / "plan", folder / "ledger"
    frame_bytes = candidates.write_frames(selection.candidates, config.shards.unit_size, plan_file)
    refused.write_frame(selection.refused, ledger_file)
    return store_generation(
        plan,
        plan_file,
        ledger_file,
        unit_size=config.shards.unit_size,
        frame_bytes=frame_bytes,
        records_read=num_documents,
        num_candidates=len(selection.candidates),
        num_refused=len(selection.refused),
        refused_by=refused.tag_counts(selection.refused),
        declared_sizes=_sizes(candidates.tag_counts(selection.candidates)),
        declared_seconds=candidates.total_seconds(selection.candidates),
        limit=config.corpus.limit,
        sieve=config.sieve,
        superseded_by=selection.superseded_by,
        **selection.counts,
    )


def _select(plan: Plan, config: PrepConfig, candidates: Spill, refused: Spill) -> _Selection:
    """Order the new records, find duplicates and what earlier generations have, and cut at the limit."""
    planned = {candidate.record.clip_id: candidate.record.source for candidate in plan.candidates()}
    planned_hashes = {clip_hash(name) for pair in planned.items() for name in pair}
    chosen: list[int] = []
    num_planned = 0
    duplicates = LineBatch.empty()
    for line_hash, places in candidates.groups():
        if len(places) == 1 and line_hash not in planned_hashes:
            chosen += places
            continue
        for clip in _by_clip(candidates, places):
            kept = _kept(clip, planned)
            if clip[0].clip_id in planned:
                num_planned += 1
            else:
                chosen.append(kept.place)
            for other in clip:
                if other is not kept:
                    detail = f"another record of this clip id is {short(kept.source, 200)}"
                    rejection = Rejection("read", "duplicate-clip", detail)
                    append_refused(duplicates, other.clip_id, other.source, rejection)
    refused.add(duplicates)
    limit = config.corpus.limit
    room = len(chosen) if limit is None else max(0, limit - plan.num_candidates)
    standing = Superseded(plan, planned.values())
    for place in chosen[:room]:
        standing.supersede(candidates.line(place))
    # Until such a record is a candidate its row stands: it is not counted as beyond the limit too.
    num_refused_beyond = sum(standing.has_source(candidates.line(place)) for place in chosen[room:])
    rows, num_known, num_planned_rows = _new_rows(standing, refused, planned, planned_hashes)
    counts = {
        "num_planned_before": num_planned + num_planned_rows,
        "num_refused_before": num_known + num_refused_beyond,
        "num_beyond_limit": len(chosen[room:]) - num_refused_beyond,
        "num_refused_beyond_limit": num_refused_beyond,
    }
    return _Selection(chosen[:room], rows, counts, dict(sorted(standing.superseded_by.items())))


class _Found(NamedTuple):
    clip_id: str
    source: str
    place: int


def _by_clip(candidates: Spill, places: list[int]) -> Iterator[list[_Found]]:
    """The records of one hash by clip id, each clip's by source."""
    found = []
    for place in places:
        record: dict[str, Any] = json.loads(candidates.line(place))
        found.append(_Found(record["clip_id"], record["source"], place))
    found.sort()
    for clip_id in dict.fromkeys(each.clip_id for each in found):
        yield [each for each in found if each.clip_id == clip_id]


def _kept(clip: list[_Found], planned: dict[str, str]) -> _Found:
    """Which of the records of one clip counts: the planned one, or the first by source."""
    source = planned.get(clip[0].clip_id)
    return next((each for each in clip if each.source == source), clip[0])


def _new_rows(
    standing: Superseded, refused: Spill, planned: dict[str, str], planned_hashes: set[int]
) -> tuple[list[int], int, int]:
    """Places of rows that do not stand yet, in order; how many do; how many are of planned candidates."""
    refused.flush()
    new: list[int] = []
    num_known = num_planned = 0
    for line_hash, places in refused.groups():
        for place in sorted(places, key=refused.line) if len(places) > 1 else places:
            if standing.knows(refused.line(place)):
                num_known += 1
            elif line_hash in planned_hashes and _is_planned(refused.line(place), planned):
                num_planned += 1
            else:
                standing.supersede(refused.line(place))
                new.append(place)
    return new, num_known, num_planned


def _is_planned(line: bytes, planned: dict[str, str]) -> bool:
    """Whether a row is of a record that is a candidate already: what is frozen stays, though the sieve has changed."""
    row = json.loads(line)
    if row["clip_id"]:
        return planned.get(row["clip_id"]) == row["source"]
    return row["source"] in planned.values()


def _sizes(counts: dict[str, int]) -> tuple[DeclaredSize, ...]:
    """Declared sizes from their tags, `1920x1080`."""
    parts = ((tag.partition("x"), count) for tag, count in counts.items())
    return tuple(DeclaredSize(width=int(width), height=int(height), count=count) for (width, _, height), count in parts)
