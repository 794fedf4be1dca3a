"""`wanprep retry`: rejected candidates are tried again, in units of their own behind all others.

A retry is a generation of the plan that lists the candidates which are rejected now and were selected. It is frozen
before anything is fetched, so a killed retry is continued like any build, by this command or by `build-shards`.
What is committed is never written again; of several rows of one candidate the one in the highest unit counts.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from preprocess.config import PrepConfig, frozen_choices
from preprocess.plan.external_sort import write_frame, write_in_frames
from preprocess.plan.freeze import store_generation
from preprocess.plan.plan import Plan, most_frequent
from shards.console import counted
from shards.format.ledger import LedgerRow
from shards.read.outcomes import read_outcomes


class Wanted(NamedTuple):
    """Which rejected candidates to try again: those of `reasons`, and all that a retry may help if `retryable`."""

    reasons: frozenset[str]
    """`fetch-timeout` or `fetch/fetch-timeout`."""
    retryable: bool

    def has(self, row: LedgerRow) -> bool:
        """Whether the candidate of this row is to be tried again."""
        names = {str(row.reason), f"{row.stage}/{row.reason}"}
        return row.status == "rejected" and (bool(names & self.reasons) or (self.retryable and row.retryable))


class RetryChoice(NamedTuple):
    """What a retry takes up, and what there is."""

    ordinals: tuple[int, ...]
    """Sorted."""
    reasons: dict[str, int]
    """How these ended before, by `stage/reason`, most frequent first."""
    rejected: dict[str, int]
    """All rejected candidates but those of a retry that is not done, likewise."""
    open_units: tuple[int, ...]
    """Units of earlier retries that are not there yet."""


def choose_retries(plan: Plan, wanted: Wanted, committed: Collection[int]) -> RetryChoice:
    """The candidates whose latest attempt was rejected as `wanted` says, but for those of a retry that is not done.

    So a retry that was stopped is continued, and ends as if it had not been stopped: what failed again in its first
    units is not tried a second time.
    """
    open_units = tuple(unit for unit in retry_units(plan) if unit not in committed)
    under_way = {
        ordinal
        for generation in plan.generations
        if any(unit in generation.units for unit in open_units)
        for ordinal in generation.retried
    }
    chosen: list[int] = []
    reasons: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for _, row, is_latest in read_outcomes(plan.storage):
        if not is_latest or row.status != "rejected" or row.candidate in under_way:
            continue
        tag = f"{row.stage}/{row.reason}"
        rejected[tag] += 1
        if wanted.has(row):
            chosen.append(row.candidate)
            reasons[tag] += 1
    return RetryChoice(tuple(sorted(chosen)), most_frequent(reasons), most_frequent(rejected), open_units)


def freeze_retry(plan: Plan, config: PrepConfig, choice: RetryChoice, scratch: Path) -> Plan:
    """Append a generation of the chosen candidates; the plan as it then is."""
    if not choice.ordinals:
        return plan
    with tempfile.TemporaryDirectory(prefix="retry-", dir=scratch) as folder:
        plan_file, ledger_file = Path(folder, "plan"), Path(folder, "ledger")
        frame_bytes = write_in_frames(_frozen_lines(plan, set(choice.ordinals)), config.shards.unit_size, plan_file)
        write_frame([], ledger_file)
        return store_generation(
            plan,
            plan_file,
            ledger_file,
            unit_size=config.shards.unit_size,
            frame_bytes=frame_bytes,
            records_read=0,
            num_candidates=len(choice.ordinals),
            num_refused=0,
            num_planned_before=0,
            num_refused_before=0,
            num_beyond_limit=0,
            refused_by={},
            declared_sizes=(),
            declared_seconds=0.0,
            limit=config.corpus.limit,
            sieve=config.sieve,
            choices=frozen_choices(config),
            retried=choice.ordinals,
            retried_reasons=choice.reasons,
        )


def retry_units(plan: Plan) -> list[int]:
    """The units of all retries, in order."""
    return [unit for generation in plan.generations if generation.retried for unit in generation.units]


def describe_choice(choice: RetryChoice, wanted: Wanted) -> list[str]:
    """What will be tried again, for people; where nothing is, why, and what there is."""
    lines = []
    if choice.open_units:
        lines.append(
            f"retry    not done yet of earlier retries, and continued: {counted(len(choice.open_units), 'unit')}"
        )
    if choice.ordinals:
        lines.append(f"retry    {counted(len(choice.ordinals), 'candidate is', 'candidates are')} tried again:")
        lines += [f"  {count:>7,}  {reason}" for reason, count in choice.reasons.items()]
        return lines
    asked = " or ".join([*sorted(wanted.reasons), *(["a retryable reason"] if wanted.retryable else [])])
    lines.append(f"retry    no further candidate is rejected for {asked}: nothing to retry")
    lines += [f"  {count:>7,}  {reason} is there" for reason, count in choice.rejected.items()]
    return lines


def _frozen_lines(plan: Plan, ordinals: set[int]) -> list[bytes]:
    """The frozen lines of these candidates, by rising ordinal."""
    found = sorted(
        (ordinal, line)
        for unit in range(plan.num_units)
        if not ordinals.isdisjoint(plan.unit_ordinals(unit))
        for ordinal, line, _ in plan.unit_lines(unit)
        if ordinal in ordinals
    )
    return [line for _, line in found]
