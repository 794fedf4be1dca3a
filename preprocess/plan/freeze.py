"""Making a plan: read the corpus once, filter, order by a hash of the clip id, cut into units, freeze.

The corpus may be larger than memory: candidates and refused records go to tables of a scratch database as they come,
and are read out in order. What is frozen depends on the documents, the filter, the limit and the generations before,
and on nothing else: not on the order of folders, the number of processes, or the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from preprocess.config import PrepConfig, SieveConfig, frozen_choices
from preprocess.corpus.archives import Document
from preprocess.corpus.corpus import Chunk, map_chunks, read_chunk
from preprocess.corpus.layouts import open_corpus
from preprocess.corpus.records import read_about, read_json, read_words
from preprocess.plan.external_sort import EarlierRows, Row, scratch_database, write_frame, write_in_frames
from preprocess.plan.filter import caption_texts, filter_captions, filter_metadata
from preprocess.plan.plan import (
    PLAN_VERSION,
    DeclaredSize,
    GenerationInfo,
    Plan,
    most_frequent,
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

_QUOTE = json.encoder.encode_basestring_ascii

ReportDocuments = Callable[[int], None]
"""Called with how many documents have been read since it was last called."""


class ChunkResult(NamedTuple):
    """What became of the documents of one chunk, made in a worker process."""

    num_documents: int
    candidates: list[Row]
    refused: list[Row]


def store_generation(plan: Plan, plan_file: Path, ledger_file: Path, **fields: Any) -> Plan:
    """Append a generation: its two objects, then its commit, if absent; the plan as it then is.

    Where another process was first, that one's generation is in the plan.

    Args:
        plan: the generations before.
        plan_file: its candidates, as `write_in_frames` wrote them.
        ledger_file: its refused records, as `write_frame` wrote them.
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
    accounted = info.num_new + info.num_refused + info.num_planned_before + info.num_refused_before
    if accounted + info.num_beyond_limit != info.records_read:
        raise RuntimeError(f"{info.records_read} documents read, {accounted + info.num_beyond_limit} accounted for")
    storage = plan.storage
    storage.put(plan_name(info.name), plan_file)
    storage.put(plan_ledger_name(info.name), ledger_file)
    if not storage.put(plan_commit_name(number), seal_document(info.model_dump(mode="json")), if_absent=True):
        LOG.info("another process froze generation %d first; its plan counts", number)
    return open_plan(storage)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        scratch: folder for the scratch database (about the corpus's size); None: the system's temporary folder.
    """
    plan = open_plan(storage)
    _warn_of_changes(plan, config)
    work = partial(read_and_filter, config=config.sieve)
    with (
        tempfile.TemporaryDirectory(prefix="wanprep-plan-", dir=scratch) as folder,
        scratch_database(Path(folder, "records")) as database,
    ):
        num_documents = 0
        for result in map_chunks(open_corpus(config.corpus), work, num_workers):
            num_documents += result.num_documents
            database.executemany("INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?)", result.candidates)
            database.executemany("INSERT INTO refused VALUES (?, ?, ?, ?, ?, ?)", result.refused)
            if progress is not None:
                progress(result.num_documents)
        if num_documents == 0:
            raise UserError(
                f"corpus.location: {config.corpus.location}: no annotation in it",
                expected="JSON files, one a media item",
            )
        return _freeze(plan, config, num_documents, database, Path(folder))


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
    if not plan.num_candidates or grows:  # a plan that refused every record is made again: the config may be another
        return freeze_plan(storage, config, progress=progress, scratch=scratch)
    _warn_of_changes(plan, config)
    return plan


def read_and_filter(chunk: Chunk, config: SieveConfig) -> ChunkResult:
    """Read, parse and filter the documents of a chunk; their lines for the plan and its ledger."""
    result = ChunkResult(len(chunk.items), [], [])
    for document in read_chunk(chunk):
        try:
            _sort_document(document, config, result)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            LOG.exception("annotation %s: internal error; the plan continues", document.source)
            rejection = Rejection("read", "internal-error", type(error).__name__, True)
            result.refused.append(refused_row("", document.source, rejection))
    return result


def _sort_document(document: Document, config: SieveConfig, result: ChunkResult) -> None:
    """Put one document among the candidates or the refused. Its captions are read only where the rest passes."""
    defects: set[str] = set()
    root = document.rejection or document.fields or read_json(document.data, defects)
    if isinstance(root, Rejection):
        result.refused.append(refused_row("", document.source, root))
        return
    about = document.fields or read_about(root, document.source, defects)
    if isinstance(about, Rejection):
        result.refused.append(refused_row("", document.source, about))
        return
    rejection = filter_metadata(about["media_type"], about["declared_seconds"], config)
    if rejection is None:
        words = document.fields or read_words(root, about, defects)
        rejection = filter_captions(caption_texts(words), config)
    if rejection is not None:
        result.refused.append(refused_row(about["clip_id"], document.source, rejection))
        return
    # Absent fields are left out of the line; `Record.model_validate_json` gives the record that `parse_record` gives.
    line = orjson.dumps({name: value for name, value in (about | words).items() if value})
    size = f"{about['declared_width'] or 0}x{about['declared_height'] or 0}"
    result.candidates.append(_row(about["clip_id"], document.source, size, about["declared_seconds"] or 0.0, line))


def refused_row(clip_id: str, source: str, rejection: Rejection) -> Row:
    """The ledger row of a refused record (`shards.format.ledger.LedgerRow`; it is no candidate: ordinal −1).

    Canonical JSON, written out here: for half the corpus this row is most of the work.
    """
    line = (
        f'{{"attempts":1,"bytes":0,"candidate":-1,"clip_id":{_QUOTE(clip_id)},"detail":{_QUOTE(rejection.detail)},'
        f'"reason":"{rejection.reason}","retryable":{"true" if rejection.retryable else "false"},"seconds":{{}},'
        f'"source":{_QUOTE(source)},"stage":"{rejection.stage}","status":"rejected","windows":[]}}'
    ).encode()
    return _row(clip_id, source, f"{rejection.stage}/{rejection.reason}", 0.0, line)


def _row(clip_id: str, source: str, tag: str, seconds: float, line: bytes) -> Row:
    return Row(clip_hash(clip_id or source) - 2**63, _utf8(clip_id), _utf8(source), tag, seconds, line)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(utf8: bytes) -> str:
    return utf8.decode("utf-8", "surrogatepass")


def _warn_of_changes(plan: Plan, config: PrepConfig) -> None:
    """Say what of the config has no effect on what is frozen already."""
    limit = config.corpus.limit
    if limit is not None and limit < plan.num_candidates:
        LOG.warning("corpus.limit %d is below the %d candidates planned already; they stay", limit, plan.num_candidates)
    if plan.last_read is not None and plan.last_read.sieve != config.sieve:
        LOG.warning("the sieve has changed since the plan was frozen: it applies to records that are no candidates yet")
    choices = plan.last_read.choices if plan.last_read is not None else {}
    for name, value in frozen_choices(config).items():
        if choices.get(name, value) != value:
            LOG.warning("%s is %s, the plan was frozen with %s: its units keep that", name, value, choices[name])


@dataclass
class _Counts:
    """What became of the documents, by the names of `GenerationInfo`."""

    num_candidates: int = 0
    num_refused: int = 0
    num_planned_before: int = 0
    num_refused_before: int = 0
    num_beyond_limit: int = 0
    num_refused_beyond_limit: int = 0
    declared_seconds: float = 0.0
    declared_sizes: Counter[str] = field(default_factory=Counter)
    """By tags such as `1920x1080`."""
    refused_by: Counter[str] = field(default_factory=Counter)


def _freeze(plan: Plan, config: PrepConfig, num_documents: int, database: sqlite3.Connection, folder: Path) -> Plan:
    planned = {_utf8(candidate.record.clip_id): _utf8(candidate.record.source) for candidate in plan.candidates()}
    sources = frozenset(planned.values())
    earlier, counts = EarlierRows(database, plan, sources), _Counts()
    limit = config.corpus.limit
    room = math.inf if limit is None else limit - plan.num_candidates
    plan_file, ledger_file = folder / "plan", folder / "ledger"
    frame_bytes = write_in_frames(_choose(database, planned, earlier, room, counts), config.shards.unit_size, plan_file)
    write_frame(_new_rows(database, planned, sources, earlier, counts), ledger_file)
    if not counts.num_candidates and not counts.num_refused:
        return plan
    parts = [(*map(int, tag.split("x")), count) for tag, count in most_frequent(counts.declared_sizes).items()]
    sizes = tuple(DeclaredSize(width=width, height=height, count=count) for width, height, count in parts)
    return store_generation(
        plan,
        plan_file,
        ledger_file,
        unit_size=config.shards.unit_size,
        frame_bytes=frame_bytes,
        records_read=num_documents,
        superseded_by=dict(sorted(earlier.superseded_by.items())),
        limit=limit,
        sieve=config.sieve,
        choices=frozen_choices(config),
        **vars(counts) | {"refused_by": most_frequent(counts.refused_by), "declared_sizes": sizes},
    )


def _choose(
    database: sqlite3.Connection, planned: Mapping[bytes, bytes], earlier: EarlierRows, room: float, counts: _Counts
) -> Iterator[bytes]:
    """The lines of the generation's candidates, in order.

    Of several records of one clip the planned one counts, or the first by source; the others become refused records.
    """
    query = "SELECT clip, source, tag, seconds, line FROM candidates ORDER BY hash, clip, source, rowid"
    for clip, group in groupby(database.execute(query), key=itemgetter(0)):
        records = list(group)
        kept = next((record for record in records if record[1] == planned.get(clip)), records[0])
        _, source, size, seconds, line = kept
        for other in records:
            if other is not kept:
                rejection = Rejection(
                    "read", "duplicate-clip", f"another record of this clip id is {short(_text(source), 200)}"
                )
                row = refused_row(_text(clip), _text(other[1]), rejection)
                database.execute("INSERT INTO refused VALUES (?, ?, ?, ?, ?, ?)", row)
        if clip in planned:
            counts.num_planned_before += 1
        elif counts.num_candidates < room:
            earlier.supersede(source)
            counts.num_candidates += 1
            counts.declared_sizes[size] += 1
            counts.declared_seconds += seconds
            yield line
        elif earlier.has_source(source):
            # Until such a record is a candidate its row counts: it is not counted as beyond the limit too.
            counts.num_refused_before += 1
            counts.num_refused_beyond_limit += 1
        else:
            counts.num_beyond_limit += 1


def _new_rows(
    database: sqlite3.Connection,
    planned: Mapping[bytes, bytes],
    sources: frozenset[bytes],
    earlier: EarlierRows,
    counts: _Counts,
) -> Iterator[bytes]:
    """The lines of refused records that no earlier ledger has, in order.

    A record that is a candidate already stays one, though the filter has changed.
    """
    for clip, source, tag, line in database.execute("SELECT clip, source, tag, line FROM refused ORDER BY hash, line"):
        if earlier.knows(source, line):
            counts.num_refused_before += 1
        elif planned.get(clip) == source if clip else source in sources:
            counts.num_planned_before += 1
        else:
            earlier.supersede(source)
            counts.num_refused += 1
            counts.refused_by[tag] += 1
            yield line
