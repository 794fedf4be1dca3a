"""Opening a dataset: list each root, read its commits or index, check identities and sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from shards.console import LOG
from shards.errors import MissingObject, ShardDamage, UserError
from shards.format.commit import dataset_revision
from shards.format.dataset_info import DatasetInfo, read_info, text_command
from shards.format.identity import IdentityMismatch, refuse_mismatch
from shards.format.names import INDEX_NAME, LATENTS, NULL_UNIT, commit_name, text_kind
from shards.format.sealed_json import canonical_digest
from shards.read.index import Listing, list_root, load_columns
from shards.read.table import Shard, Table, TableBuilder, refusing_odd_columns
from shards.storage import open_storage
from shards.storage.base import Storage

_MAX_NAMED = 12


class Opened(NamedTuple):
    """The state of an open dataset: plain values and storages, so that it can be pickled."""

    storages: list[Storage]
    info: DatasetInfo
    text_set: str | None
    latents: Table
    text: Table | None
    text_rows: np.ndarray
    """int64 [N]: the row in `text` of each row of `latents`."""
    num_variants: np.ndarray
    """int64 [N]."""
    null: Table | None
    revision: str
    num_planned: list[int]
    """Units that each root's plan has."""

    @property
    def text_identity_digest(self) -> str | None:
        """sha256 of the identity of the open text set."""
        return canonical_digest(self.info.kind_identity(text_kind(self.text_set))) if self.text_set else None

    def where(self) -> str:
        """The roots, for messages."""
        return ", ".join(storage.url() for storage in self.storages)

    def shards(self) -> list[Shard]:
        """All shards of the dataset."""
        return [shard for table in (self.latents, self.text, self.null) if table for shard in table.shards]

    def pin(self) -> dict[str, Any]:
        """The revision and the commits behind it."""
        commits = sorted([shard.kind, shard.unit, shard.revision] for shard in self.shards())
        return {"revision": self.revision, "commits": commits}

    def forget(self, shard: Shard) -> None:
        """Drop a cached copy of a shard that was found damaged."""
        forget = getattr(self.storages[shard.root], "forget", None)
        if forget:
            forget(shard.tar)


def open_roots(
    roots: Sequence[str | Path],
    text_set: str | None,
    revision: str | None,
    pin: dict[str, Any] | None,
    cache: Path | None,
    cache_gib: float,
) -> Opened:
    """Open all roots as one dataset; see `open_dataset`."""
    if not roots:
        raise UserError("no root to read", expected="at least one folder or s3://bucket/prefix")
    storages = [_storage(root, cache, cache_gib) for root in roots]
    infos = [read_info(storage) for storage in storages]
    _check_union(storages, infos, text_set)
    kinds = [LATENTS, *([text_kind(text_set)] if text_set else [])]
    builders = {kind: TableBuilder(kind) for kind in (*kinds, "null")}
    pinned = Counter((kind, unit, seal) for kind, unit, seal in pin["commits"]) if pin else None
    provenance: dict[str, Counter[str]] = {}
    for root, (storage, info) in enumerate(zip(storages, infos, strict=True)):
        _add_root(root, storage, info, kinds, builders, pinned, provenance)
    where = ", ".join(storage.url() for storage in storages)
    if pinned and (lost := sorted(unit for unit, count in pinned.items() if count > 0)):
        raise UserError(
            f"{where}: {len(lost)} commits of the pinned revision {pin and pin['revision']} are missing or changed: "
            f"{lost[:_MAX_NAMED]}",
            fix="restore these units, or start a new run on the current revision",
        )
    for kind, found in provenance.items():
        _warn_provenance(kind, found)
    tables = {name: builder.table(where) for name, builder in builders.items()}
    opened = _join(storages, infos, text_set, tables)
    _refuse_doubled(opened)
    if revision is not None and opened.revision != revision:
        raise UserError(
            f"{where}: its revision is {opened.revision}, expected {revision}: shards were added, removed or rebuilt",
            fix="open it with the run's pin to keep its shards, or ask for the current revision",
        )
    return opened


def _storage(root: str | Path, cache: Path | None, cache_gib: float) -> Storage:
    storage = open_storage(root)
    if cache is None or not str(root).startswith("s3://"):
        return storage
    from shards.storage.cache import CachedStorage

    return cast("Storage", CachedStorage(storage, cache, int(cache_gib * 2**30)))


def _check_union(storages: list[Storage], infos: list[DatasetInfo], text_set: str | None) -> None:
    urls = [storage.address() for storage in storages]
    if len(set(urls)) < len(urls):
        raise UserError(f"a root is named twice: {urls}")
    first = infos[0]
    for url, info in zip(urls[1:], infos[1:], strict=True):
        refuse_mismatch(first.identity, info.identity, f"{url} (against {urls[0]})")
        if text_set:
            kind = text_kind(text_set)
            what = f"text set {text_set!r} of {url} (against {urls[0]})"
            refuse_mismatch(first.kind_identity(kind), info.kind_identity(kind), what)


def _add_root(
    root: int,
    storage: Storage,
    info: DatasetInfo,
    kinds: list[str],
    builders: dict[str, TableBuilder],
    pinned: Counter[tuple[str, int, str]] | None,
    provenance: dict[str, Counter[str]],
) -> None:
    listing = list_root(storage, kinds)
    digests = {kind: canonical_digest(info.kind_identity(kind)) for kind in kinds}
    has_null, index = False, storage.url(INDEX_NAME)
    for columns in load_columns(storage, kinds, listing):
        with refusing_odd_columns(columns, index):
            kind, unit = columns["kind"], columns["unit"]
            if pinned is not None:
                pinned[kind, unit, columns["revision"]] -= 1
                if pinned[kind, unit, columns["revision"]] < 0:
                    continue
            _check_unit(columns, listing, digests[kind], storage)
        is_null = unit == NULL_UNIT
        # The null embeddings of one identity are the same in every root: the first root's are read.
        if not (is_null and root > 0 and has_null):
            builders["null" if is_null else kind].add(root, columns, index)
        has_null = has_null or is_null
        provenance.setdefault(kind, Counter())[str(columns.get("provenance"))] += 1


def _check_unit(columns: dict[str, Any], listing: Listing, identity: str, storage: Storage) -> None:
    name, size, _ = columns["tar"]
    if columns["identity_sha256"] != identity:
        commit = commit_name(columns["kind"], columns["unit"])
        raise IdentityMismatch(
            f"{storage.url(commit)}: its identity is {columns['identity_sha256']}, the dataset's {identity}; they may "
            "not be mixed",
            fix=f"remove this unit (its commit, {commit}) and build it again",
        )
    if name not in listing.objects:
        commit = storage.url(commit_name(columns["kind"], columns["unit"]))
        raise MissingObject(storage.url(name), f"missing, but its commit {commit} is there")
    if listing.objects[name] != size:
        raise ShardDamage(
            storage.url(name),
            f"{listing.objects[name]} bytes, its commit says {size}",
            offset=min(size, listing.objects[name]),
        )


def _join(storages: list[Storage], infos: list[DatasetInfo], text_set: str | None, tables: dict[str, Table]) -> Opened:
    latents, null = tables[LATENTS], tables["null"]
    text = tables[text_kind(text_set)] if text_set else None
    rows = np.zeros(len(latents.keys), np.int64)
    variants = np.zeros(len(latents.keys), np.int64)
    if text is not None:
        rows = _text_rows(latents, text, text_set or "", storages)
        variants = np.diff(text.start)[rows]
    shards = [shard for table in (latents, text, null) if table for shard in table.shards]
    revision = dataset_revision((shard.kind, shard.unit, shard.revision) for shard in shards)
    planned = [len(info.planned_units()) for info in infos]
    return Opened(
        storages, infos[0], text_set, latents, text, rows, variants, null if null.keys else None, revision, planned
    )


def _text_rows(latents: Table, text: Table, text_set: str, storages: list[Storage]) -> np.ndarray:
    """The row in `text` of every latent, int64 [N]: the same key in the same root and unit."""
    spans = {(shard.root, shard.unit): span for shard, span in _spans(text)}
    missing: dict[tuple[int, int], int] = {}
    found = np.zeros(len(latents.keys), np.int64)
    for shard, rows in _spans(latents):
        there = spans.get((shard.root, shard.unit), slice(0, 0))
        if latents.keys[rows] == text.keys[there]:
            found[rows] = np.arange(there.start, there.stop)
            text.keys[there] = latents.keys[rows]  # one object for each key
            continue
        by_key = {key: row for row, key in enumerate(text.keys[there], there.start)}
        found[rows] = [by_key.get(key, -1) for key in latents.keys[rows]]
        if absent := int((found[rows] < 0).sum()):
            missing[shard.root, shard.unit] = absent
    if missing:
        raise missing_text(missing, text_set, storages)
    return found


def _spans(table: Table) -> Iterator[tuple[Shard, slice]]:
    """Every shard with the rows it holds, which are together."""
    ends = np.searchsorted(table.shard, np.arange(len(table.shards)), side="right").tolist()
    for shard, start, end in zip(table.shards, [0, *ends], ends, strict=False):
        yield shard, slice(start, end)


def missing_text(missing: dict[tuple[int, int], int], text_set: str, storages: list[Storage]) -> UserError:
    """The error of latents without text: names the units and the command that makes them."""
    units = sorted(missing)
    shown = ", ".join(f"{unit} ({missing[root, unit]} samples)" for root, unit in units[:_MAX_NAMED])
    more = f" and {len(units) - _MAX_NAMED} more" if len(units) > _MAX_NAMED else ""
    where = ", ".join(sorted({storages[root].url() for root, _ in units}))
    return UserError(
        f"{where}: text set {text_set!r} has no embeddings for samples of units {shown}{more}",
        expected="a text shard for every unit of latents",
        fix=f"{text_command(text_set)} makes them",
    )


def _refuse_doubled(opened: Opened) -> None:
    keys = opened.latents.keys
    if len(set(keys)) == len(keys):
        return
    seen: dict[str, Shard] = {}
    for key, place in zip(keys, opened.latents.shard.tolist(), strict=True):
        shard = opened.latents.shards[place]
        if key in seen:
            first = opened.storages[seen[key].root].url(seen[key].tar)
            raise ShardDamage(
                opened.storages[shard.root].url(shard.tar),
                f"sample {key} is in {first} too",
                fix="remove one of the two units, or name only one of the roots",
            )
        seen[key] = shard


def _warn_provenance(kind: str, found: Counter[str]) -> None:
    """Latents and texts come of different libraries, so each is compared with its own."""
    if len(found) > 1:
        kinds = "; ".join(f"{count} shards: {text}" for text, count in found.most_common(4))
        LOG.warning("%s: shards of %d different provenances (versions or devices): %s", kind, len(found), kinds)
