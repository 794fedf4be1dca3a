"""A generation of the plan put into the storage: its two objects, then its commit, if absent."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from preprocess.plan import PLAN_VERSION, GenerationInfo, Plan, commit_name, ledger_name, open_plan, plan_name
from shards.canonical import seal_document
from shards.console import LOG


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
    storage.put(ledger_name(info.name), ledger_file)
    if not storage.put(commit_name(number), seal_document(info.model_dump(mode="json")), if_absent=True):
        LOG.info("another process froze generation %d first; its plan counts", number)
    return open_plan(storage)


def _check_counts(info: GenerationInfo) -> None:
    accounted = info.num_new + info.num_refused + info.num_planned_before + info.num_refused_before
    if accounted + info.num_beyond_limit != info.records_read:
        raise RuntimeError(f"{info.records_read} documents read, {accounted + info.num_beyond_limit} accounted for")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
