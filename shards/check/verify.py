"""`verify`: compares a dataset with its commits, by sizes (fast), every byte (hash) or every array (deep)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

from shards.check.tar_check import HashingReader, ReportBytes, check_ledger, check_tar
from shards.errors import FutureFormat, MissingObject, ShardDamage, UserError
from shards.format.commit import MAX_COMMIT_BYTES, Blob, StoredCommit, read_commit
from shards.format.dataset_info import DatasetInfo, read_info
from shards.format.names import INDEX_NAME, LATENTS, NULL_UNIT, commit_name, text_kind
from shards.format.sealed_json import canonical_digest, open_document
from shards.read.index import Listing, is_current, list_root, read_index, text_sets, unit_of
from shards.read.table import unit_columns
from shards.storage.base import Storage
from shards.storage.patience import reader_pool

_PLAN_COMMIT = re.compile(r"plan/gen-\d{3,}\.json")
_PRECISION = "plan/vae.json"
_MAX_MISSING = 1000
"""Units that are named one by one."""
_PLANNED = re.compile(r"gen-\d{3,}-[0-9a-f]{8}")
"""A generation with a commit. A plan of one object alone is named without a digest, such as gen-000, and has none."""
Level = Literal["fast", "hash", "deep"]


class Problem(NamedTuple):
    """One thing that is wrong: the file, the tar member and byte offset where known, and what."""

    file: str
    member: str | None
    offset: int | None
    what: str
    kind: Literal["damaged", "unfinished"] = "damaged"
    """`damaged`: something was lost or changed; `unfinished`: not built yet."""


class Report(NamedTuple):
    """The result of a verification."""

    problems: list[Problem]
    num_units: int
    num_samples: int
    num_bytes: int


def verify(
    storage: Storage,
    level: Level = "hash",
    *,
    jobs: int = 1,
    partial: bool = False,
    progress: ReportBytes | None = None,
) -> Report:
    """Check a complete root: all latents, all text sets, all null embeddings, plans and ledgers.

    Args:
        storage: the root.
        level: 'fast' checks documents, sizes and completeness; 'hash' reads every byte; 'deep' also decodes every
            array and checks that it is finite and what its JSON says.
        jobs: threads (hashing and decompression run outside the interpreter's lock).
        partial: units that are not built yet are not reported.
        progress: called with the number of bytes read since the last call.
    """
    info = read_info(storage)
    kinds = [LATENTS, *(text_kind(name) for name in sorted({*info.text_sets, *text_sets(storage)}))]
    listing = list_root(storage, kinds)
    problems: list[Problem] = []
    commits = list(_commits(storage, info, listing, problems))
    problems += _completeness(storage, info, kinds, commits, listing, partial)
    problems += _index(storage, commits, listing)
    problems += _plans(storage, info)
    problems += _plan_commits(storage, info)
    with reader_pool(max(1, jobs)) as pool:
        for found in pool.map(lambda item: _unit(storage, item, listing, level, progress or (lambda _: None)), commits):
            problems += found
    num_samples = sum(len(item.commit.samples) for item in commits if item.commit.kind == LATENTS)
    return Report(problems, len(commits), num_samples, sum(item.commit.tar.size for item in commits))


def total_bytes(storage: Storage) -> int:
    """Bytes of all tars under the root, for a progress bar."""
    return sum(entry.size for entry in storage.list() if entry.name.endswith(".tar"))


def _problem(damage: UserError) -> Problem:
    if isinstance(damage, ShardDamage):
        return Problem(damage.file, damage.member, damage.offset, damage.what)
    return Problem("", None, None, damage.problem)


def _commits(storage: Storage, info: DatasetInfo, listing: Listing, problems: list[Problem]) -> Iterator[StoredCommit]:
    for kind, unit in sorted(listing.commits):
        name = commit_name(kind, unit)
        try:
            stored = read_commit(storage, kind, unit)
            identity = canonical_digest(info.kind_identity(kind))
        except (ShardDamage, FutureFormat) as damage:
            problems.append(_problem(damage))
            continue
        except UserError as error:  # a text set that dataset.json does not know
            problems.append(Problem(storage.url(name), None, None, error.problem))
            continue
        if stored.commit.identity_sha256 != identity:
            what = f"its identity is {stored.commit.identity_sha256}, the dataset's {identity}"
            problems.append(Problem(storage.url(name), None, None, what))
        yield stored


def _completeness(
    storage: Storage, info: DatasetInfo, kinds: list[str], commits: list[StoredCommit], listing: Listing, partial: bool
) -> Iterator[Problem]:
    there = {kind: {unit for of_kind, unit in listing.commits if of_kind == kind} - {NULL_UNIT} for kind in kinds}
    for kind in kinds:
        for unit in sorted(unit for unit in there[kind] if unit not in info.planned_units()):
            yield Problem(storage.url(commit_name(kind, unit)), None, None, "no generation of the plan has this unit")
        for problem in _missing(storage, info, kind, there):
            if not (partial and problem.kind == "unfinished"):
                yield problem
        if kind != LATENTS and (kind, NULL_UNIT) not in listing.commits and not partial:
            what = "the null embeddings are missing"
            yield Problem(storage.url(commit_name(kind, NULL_UNIT)), None, None, what, "unfinished")
    keys: dict[tuple[str, str], str] = {}
    for stored in commits:
        where = storage.url(commit_name(stored.commit.kind, stored.commit.unit))
        for sample in stored.commit.samples:
            first = keys.setdefault((stored.commit.kind, sample.key), where)
            if first != where:
                yield Problem(where, None, None, f"sample {sample.key} is in {first} too")
    yield from _text_keys(storage, commits)


def _missing(storage: Storage, info: DatasetInfo, kind: str, there: dict[str, set[int]]) -> Iterator[Problem]:
    """The units of a kind that are planned and have no commit. Two things show that a unit was built and is lost: its
    text, which is made from the latents, and the counts of a finished build."""
    planned, latents = info.planned_units(), there[LATENTS]
    counts = info.totals.get("units")
    built = [counts.get(name) if isinstance(counts, dict) else None for name in ("planned", "latents")]
    num_planned, num_built = [count if isinstance(count, int) else 0 for count in built]
    some_lost = sum(unit < num_planned for unit in latents) < num_built
    with_text = set().union(*(units for name, units in there.items() if name != LATENTS))
    beyond = sorted(unit for unit in latents if unit not in planned) if kind != LATENTS else []
    missing = (unit for unit in chain(planned, beyond) if unit not in there[kind])
    for number, unit in enumerate(islice(missing, _MAX_MISSING + 1)):
        is_lost = kind == LATENTS and (unit in with_text or (some_lost and unit < num_planned))
        what = f"unit {unit} is missing: {'lost, because it had been built' if is_lost else 'not built yet'}"
        if number == _MAX_MISSING:
            what = f"unit {unit} and others are missing: {len(there[kind]):,} of {len(planned):,} are there"
        file = storage.url(commit_name(kind, unit))
        yield Problem(file, None, None, what, "damaged" if is_lost else "unfinished")


def _text_keys(storage: Storage, commits: list[StoredCommit]) -> Iterator[Problem]:
    """Every unit of text holds exactly the keys of its unit of latents."""
    keys = {(item.commit.kind, item.commit.unit): {s.key for s in item.commit.samples} for item in commits}
    for (kind, unit), found in keys.items():
        expected = keys.get((LATENTS, unit))
        if kind == LATENTS or unit == NULL_UNIT or expected is None or found == expected:
            continue
        what = f"its keys are not those of the latents: {len(expected - found)} missing, {len(found - expected)} extra"
        yield Problem(storage.url(commit_name(kind, unit)), None, None, what)


def _plans(storage: Storage, info: DatasetInfo) -> Iterator[Problem]:
    for gen in info.generations:
        for name, sha256 in (
            (f"plan/{gen.name}.jsonl.zst", gen.plan_sha256),
            (f"plan/{gen.name}.ledger.jsonl.zst", gen.ledger_sha256),
        ):
            if sha256 is None:
                continue
            try:
                found = HashingReader(storage, name, storage.size(name), lambda _: None).hexdigest()
            except MissingObject as damage:
                yield _problem(damage)
                continue
            if found != sha256:
                yield Problem(storage.url(name), None, None, f"sha256 {found}, dataset.json says {sha256}")


def _plan_commits(storage: Storage, info: DatasetInfo) -> Iterator[Problem]:
    """The sealed documents of plans: each is intact and of its kind, and agrees with dataset.json.

    A generation whose name carries a digest has a commit; its fields that dataset.json repeats are the same there.
    """
    commits: dict[str, dict[str, Any] | None] = {}
    for entry in storage.list("plan/"):
        if not entry.name.endswith(".json"):
            continue
        file = storage.url(entry.name)
        try:
            body = open_document(storage.get(entry.name, MAX_COMMIT_BYTES), file)
        except ShardDamage as damage:
            commits[entry.name] = None
            yield _problem(damage)
            continue
        commits[entry.name] = body
        if _PLAN_COMMIT.fullmatch(entry.name) and not {"name", "plan_version"} <= body.keys():
            commits[entry.name] = None
            yield Problem(file, None, None, f"not the commit of a plan: its keys are {_keys(body)}")
        elif entry.name == _PRECISION and "mode" not in body:
            yield Problem(file, None, None, f"it is not the record of a precision mode: its keys are {_keys(body)}")
    for number, gen in enumerate(info.generations):
        name = f"plan/gen-{number:03d}.json"
        found = commits.get(name)
        if name not in commits and _PLANNED.fullmatch(gen.name):
            yield Problem(storage.url(name), None, None, f"missing, but dataset.json lists generation {gen.name}")
        if found is None:
            continue
        frames = found.get("frame_bytes")
        found = {**found, "num_units": len(frames) if isinstance(frames, list) else None}
        for field in ("name", "plan_sha256", "ledger_sha256", "first_unit", "num_units", "num_candidates"):
            if found.get(field) != getattr(gen, field):
                what = f"{field} is {found.get(field)!r}, dataset.json says {getattr(gen, field)!r}"
                yield Problem(storage.url(name), None, None, what)
                break


def _keys(body: dict[str, Any]) -> str:
    shown = ", ".join(sorted(body)[:8])
    return shown if len(shown) <= 200 else shown[:200] + "…"


def _index(storage: Storage, commits: list[StoredCommit], listing: Listing) -> Iterator[Problem]:
    """The index: each of its lines that readers would use says what the unit's commit says."""
    file = storage.url(INDEX_NAME)
    by_unit = {(stored.commit.kind, stored.commit.unit): stored for stored in commits}
    try:
        for number, columns in enumerate(read_index(storage), 2):
            if not is_current(columns, listing):
                continue
            stored = by_unit.get(unit_of(columns))
            if stored is not None and columns != unit_columns(stored):
                kind, unit = unit_of(columns)
                what = f"line {number} is not what the commit {commit_name(kind, unit)} says"
                yield Problem(file, None, None, f"{what}; `wanshards index` rebuilds it")
    except MissingObject:
        return
    except ShardDamage as damage:
        yield Problem(file, None, None, f"{damage.what}; `wanshards index` rebuilds it")


def _unit(
    storage: Storage, stored: StoredCommit, listing: Listing, level: Level, progress: ReportBytes
) -> list[Problem]:
    commit = stored.commit
    problems: list[Problem] = []
    for blob in filter(None, (commit.tar, commit.ledger)):
        try:
            _check_size(storage, blob, listing)
            if level != "fast":
                check_tar(storage, commit, blob, progress) if blob is commit.tar else check_ledger(
                    storage, commit, blob
                )
        except (ShardDamage, FutureFormat) as damage:
            problems.append(_problem(damage))
    if level == "deep" and not problems:
        from shards.check.array_check import check_arrays

        problems += [_problem(damage) for damage in check_arrays(storage, commit)]
    return problems


def _check_size(storage: Storage, blob: Blob, listing: Listing) -> None:
    found = listing.objects.get(blob.name)
    if found is None:
        raise MissingObject(storage.url(blob.name), "missing, but its commit is there")
    if found != blob.size:
        what = f"{found} bytes, its commit says {blob.size}: {'truncated' if found < blob.size else 'too long'}"
        raise ShardDamage(storage.url(blob.name), what, offset=min(found, blob.size))
