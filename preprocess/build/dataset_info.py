"""How the build updates dataset.json: it adds generations, text sets and totals, and changes nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preprocess.config import PrepConfig, with_choices
from preprocess.plan.plan import Plan
from shards.errors import MissingObject
from shards.format.dataset_info import BucketInfo, DatasetInfo, Generation, TextSetInfo, read_info, write_info
from shards.format.names import INFO_NAME
from shards.storage.base import Storage

ENCODERS_NOTE = "encoders"


def find_info(storage: Storage) -> DatasetInfo | None:
    """dataset.json, or None where there is none yet."""
    try:
        return read_info(storage) if storage.exists(INFO_NAME) else None
    except MissingObject:
        return None


def grow_info(
    storage: Storage, plan: Plan, *, identity: Mapping[str, Any], config: PrepConfig, note: str | None
) -> DatasetInfo:
    """Write the latents' identity, the plan's generations and the buckets. Raises IdentityMismatch."""
    old = find_info(storage)
    info = DatasetInfo(
        identity=dict(identity),
        text_sets=old.text_sets if old else {},
        buckets=tuple(
            BucketInfo(frames=frames, height=size.height, width=size.width)
            for frames in planned_lengths(plan, config)
            for size in config.buckets.sizes
        ),
        generations=_generations(old, plan),
        notes={**(old.notes if old else {}), **({ENCODERS_NOTE: note} if note else {})},
        totals=old.totals if old else {},
    )
    _write_if_changed(storage, old, info)
    return info


def planned_lengths(plan: Plan, config: PrepConfig) -> dict[int, None]:
    """Frames of windows, generation by generation; of an older plan, and where there is none, the config's own."""
    choices = [generation.choices for generation in plan.generations] or [{}]
    return dict.fromkeys(length for each in choices for length in with_choices(config, each).window.lengths)


def add_text_set(storage: Storage, name: str, identity: Mapping[str, Any], note: str | None) -> DatasetInfo:
    """Write a text set's identity. Raises IdentityMismatch when the set already has another."""
    old = read_info(storage)
    text_set = TextSetInfo(identity=dict(identity), notes={ENCODERS_NOTE: note} if note else {})
    info = old.model_copy(update={"text_sets": {**old.text_sets, name: text_set}})
    _write_if_changed(storage, old, info)
    return info


def set_totals(storage: Storage, plan: Plan, totals: Mapping[str, Any]) -> None:
    """Write the last build's counts, and the generations in case another process overwrote them."""
    old = read_info(storage)
    info = old.model_copy(update={"totals": dict(totals), "generations": _generations(old, plan)})
    _write_if_changed(storage, old, info)


def _generations(old: DatasetInfo | None, plan: Plan) -> tuple[Generation, ...]:
    """The plan's generations, or those already written when another process has frozen more since."""
    ours = tuple(generation.generation for generation in plan.generations)
    theirs = old.generations if old else ()
    return theirs if theirs[: len(ours)] == ours else ours


def _write_if_changed(storage: Storage, old: DatasetInfo | None, new: DatasetInfo) -> None:
    if old is None or old.model_dump(mode="json") != new.model_dump(mode="json"):
        write_info(storage, new)
