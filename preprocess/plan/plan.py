"""The frozen plan: which records are candidates, in which order, in which unit of work.

A plan is a list of generations. Generation N is two objects and a commit, written last:

    plan/gen-000-3fa9c1d2.jsonl.zst          candidates, one JSON record a line, one zstd frame a unit
    plan/gen-000-3fa9c1d2.ledger.jsonl.zst   one row a record that was refused, and why
    plan/gen-000.json                        sealed: counts, digests, the length of each unit's frame

The order is by a hash of the clip id, so it depends neither on folders nor on machines nor on `corpus.limit`. Records
that come later make a further generation behind the others; nothing frozen changes. A unit is read by one ranged
read.

A retry is a generation too: its candidates are of earlier generations and keep their ordinals (`retried`). The latest
attempt counts, and an earlier unit that has to be made again leaves out what a later generation takes up again: those
candidates gave it no sample, so its tar repeats byte for byte.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import pydantic

from preprocess.config import Choice, SieveConfig
from preprocess.corpus.records import Record
from shards.config import Config, validate_config
from shards.errors import ShardDamage, UserError
from shards.format.commit import MAX_COMMIT_BYTES
from shards.format.dataset_info import Generation
from shards.format.ledger import LedgerRow, read_ledger, read_ledger_lines
from shards.format.sealed_json import open_document
from shards.read.outcomes import MAX_LEDGER_BYTES
from shards.storage.base import Storage

PLAN_VERSION = 1


class Candidate(NamedTuple):
    """One record of the plan."""

    ordinal: int
    """Its place in the plan, from 0, over all generations."""
    record: Record
    is_retry: bool = False
    """Whether it was rejected before, and this is the attempt of a retry."""


class DeclaredSize(Config):
    """How many candidates declare a size; 0×0: none declared."""

    width: int
    height: int
    count: int


class GenerationInfo(Config):
    """The commit of one generation: `records_read` is the sum of the five counts below it."""

    plan_version: int
    name: str
    """`gen-000-<digest>`: its objects are `plan/<name>.jsonl.zst` and `plan/<name>.ledger.jsonl.zst`."""
    plan_sha256: str
    ledger_sha256: str
    first_unit: int
    first_candidate: int
    unit_size: int
    """Candidates of a unit; the generation's last unit may have fewer."""
    frame_bytes: tuple[int, ...]
    """Length of each unit's frame in the plan object, in order."""
    records_read: int
    """Documents found in the corpus, of whatever kind."""
    num_candidates: int
    num_refused: int
    """Rows of this generation's ledger."""
    num_planned_before: int
    """Records that are candidates of earlier generations."""
    num_refused_before: int
    """Records whose row in an earlier ledger still counts."""
    num_beyond_limit: int
    """Records that pass, and that `corpus.limit` leaves for a later generation."""
    refused_by: dict[str, int]
    """Rows by `stage/reason`."""
    superseded_by: dict[str, int] = pydantic.Field(default_factory=dict)
    """Earlier ledgers' rows that count no longer, by their `stage/reason`: the record is a candidate of this
    generation now, or has a row in it."""
    num_refused_beyond_limit: int = 0
    """Of `num_refused_before`: records that pass now, and that `corpus.limit` leaves for a later generation."""
    declared_sizes: tuple[DeclaredSize, ...]
    """Declared sizes of the candidates, most frequent first, each once."""
    declared_seconds: float
    """Sum over the candidates that declare a length."""
    limit: int | None
    sieve: SieveConfig
    choices: dict[str, Choice] = pydantic.Field(default_factory=dict)
    """Lengths and thresholds that its units are built with (`preprocess.config.FROZEN`); empty: an older plan."""
    retried: tuple[int, ...] = ()
    """Of a retry: the ordinals of its candidates, in order, all of earlier generations; it read no records."""
    retried_reasons: dict[str, int] = pydantic.Field(default_factory=dict)
    """How these had ended before, by `stage/reason`."""

    @property
    def num_new(self) -> int:
        """Candidates that no earlier generation has: all, or, of a retry, none."""
        return 0 if self.retried else self.num_candidates

    def ordinals(self, within: int) -> Sequence[int]:
        """The ordinals of its unit number `within`, counted from its first."""
        start = within * self.unit_size
        stop = min(start + self.unit_size, self.num_candidates)
        return self.retried[start:stop] or range(self.first_candidate + start, self.first_candidate + stop)

    @property
    def num_units(self) -> int:
        """Units of this generation."""
        return len(self.frame_bytes)

    @property
    def units(self) -> range:
        """Their numbers."""
        return range(self.first_unit, self.first_unit + self.num_units)

    @property
    def generation(self) -> Generation:
        """The entry of `dataset.json`."""
        return Generation(
            name=self.name,
            plan_sha256=self.plan_sha256,
            first_unit=self.first_unit,
            num_units=self.num_units,
            num_candidates=self.num_candidates,
            num_records=self.num_new + self.num_refused,
            ledger_sha256=self.ledger_sha256,
        )


class Plan:
    """A frozen plan, opened: counts in memory, units read when asked for. Can be pickled and forked."""

    def __init__(self, storage: Storage, generations: tuple[GenerationInfo, ...]) -> None:
        self.storage = storage
        self.generations = generations
        self._ends = list(accumulate(generation.num_units for generation in generations))
        self._offsets = [list(accumulate(generation.frame_bytes, initial=0)) for generation in generations]
        self._last_unit = {
            ordinal: generation.first_unit + place // generation.unit_size
            for generation in generations
            for place, ordinal in enumerate(generation.retried)
        }

    @property
    def num_units(self) -> int:
        """Units of all generations; they are numbered 0 … num_units − 1."""
        return self._ends[-1] if self._ends else 0

    @property
    def num_candidates(self) -> int:
        """Candidates of all generations."""
        return sum(generation.num_new for generation in self.generations)

    @property
    def last_read(self) -> GenerationInfo | None:
        """The latest generation that came of reading the corpus; None where nothing is planned."""
        return next((each for each in reversed(self.generations) if not each.retried), None)

    @property
    def num_refused(self) -> int:
        """Records that the plan refuses: rows of all its ledgers but those that later generations supersede."""
        return sum(each.num_refused - sum(each.superseded_by.values()) for each in self.generations)

    def unit(self, number: int) -> tuple[Candidate, ...]:
        """The candidates of one unit that no later generation takes up again.

        Raises UserError for no such unit, ShardDamage.
        """
        return tuple(
            Candidate(ordinal, _read_record(line, file), ordinal in self._last_unit)
            for ordinal, line, file in self.unit_lines(number)
        )

    def unit_lines(self, number: int) -> Iterator[tuple[int, bytes, str]]:
        """(ordinal, frozen line, its file) of the candidates of `unit`, by one ranged read."""
        place = self._place(number)
        generation = self.generations[place]
        within = number - generation.first_unit
        start, end = self._offsets[place][within : within + 2]
        name = plan_name(generation.name)
        data = self.storage.get_range(name, start, end - start)
        file = f"{self.storage.url(name)} (unit {number})"
        if len(data) != end - start:
            raise ShardDamage(file, f"cut short: {len(data):,} of {end - start:,} bytes", offset=start)
        lines, ordinals = list(read_ledger_lines(data, file)), generation.ordinals(within)
        if len(lines) != len(ordinals):
            raise ShardDamage(file, f"{len(lines)} candidates, the commit says {len(ordinals)}", offset=start)
        for ordinal, line in zip(ordinals, lines, strict=True):
            if self._has(number, ordinal):
                yield ordinal, line, file

    def choices(self, number: int) -> dict[str, Choice]:
        """What the generation of `unit` was frozen with. Raises UserError for no such unit."""
        return self.generations[self._place(number)].choices

    def unit_ordinals(self, number: int) -> list[int]:
        """The ordinals of the candidates of `unit`; nothing is read. Raises UserError for no such unit."""
        generation = self.generations[self._place(number)]
        return [each for each in generation.ordinals(number - generation.first_unit) if self._has(number, each)]

    def unit_length(self, number: int) -> int:
        """How many candidates `unit` gives; nothing is read. Raises UserError for no such unit."""
        return len(self.unit_ordinals(number))

    def _place(self, number: int) -> int:
        if not 0 <= number < self.num_units:
            raise UserError(f"unit {number} is not in the plan", expected=f"0 to {self.num_units - 1}")
        return bisect_right(self._ends, number)

    def _has(self, unit: int, ordinal: int) -> bool:
        return self._last_unit.get(ordinal, unit) <= unit

    def candidates(self) -> Iterator[Candidate]:
        """All candidates, in order."""
        for number in range(self.num_units):
            yield from self.unit(number)

    def ledger(self) -> Iterator[LedgerRow]:
        """What the plan refused, and why: one row a record, generation by generation. Raises ShardDamage."""
        for generation in self.generations:
            name = plan_ledger_name(generation.name)
            yield from read_ledger(self.storage.get(name, MAX_LEDGER_BYTES), self.storage.url(name))

    def ledger_lines(self, generation: int) -> Iterator[bytes]:
        """The rows of one generation's ledger as they are written. Raises ShardDamage."""
        name = plan_ledger_name(self.generations[generation].name)
        yield from read_ledger_lines(self.storage.get(name, MAX_LEDGER_BYTES), self.storage.url(name))

    def refused_by(self) -> Mapping[str, int]:
        """Records that the plan refuses by `stage/reason`, most frequent first; the latest row of each counts."""
        total: Counter[str] = Counter()
        for generation in self.generations:
            total.update(generation.refused_by)
            total.subtract(generation.superseded_by)
        return most_frequent(+total)


def most_frequent(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts, most frequent first, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def open_plan(storage: Storage) -> Plan:
    """The frozen plan of a dataset; one without generations where there is none yet. Raises ShardDamage."""
    generations: list[GenerationInfo] = []
    while storage.exists(plan_commit_name(len(generations))):
        name = plan_commit_name(len(generations))
        file = storage.url(name)
        body = open_document(storage.get(name, MAX_COMMIT_BYTES), file)
        if body.get("plan_version") != PLAN_VERSION:
            raise UserError(f"{file}: plan version {body.get('plan_version')!r}", expected=str(PLAN_VERSION))
        try:
            generation = validate_config(GenerationInfo, body, origin=file)
        except UserError as error:
            raise ShardDamage(file, error.problem) from None
        _check_follows(generation, generations, file)
        generations.append(generation)
    return Plan(storage, tuple(generations))


def plan_commit_name(number: int) -> str:
    """Name of a generation's commit."""
    return f"plan/gen-{number:03d}.json"


def plan_name(generation: str) -> str:
    """Name of the object that holds a generation's candidates."""
    return f"plan/{generation}.jsonl.zst"


def plan_ledger_name(generation: str) -> str:
    """Name of the object that holds a generation's refused records."""
    return f"plan/{generation}.ledger.jsonl.zst"


def _check_follows(generation: GenerationInfo, earlier: list[GenerationInfo], file: str) -> None:
    first_unit = sum(each.num_units for each in earlier)
    first_candidate = sum(each.num_new for each in earlier)
    if (generation.first_unit, generation.first_candidate) != (first_unit, first_candidate):
        raise ShardDamage(file, f"starts at unit {generation.first_unit}, expected {first_unit}")
    retried = generation.retried
    is_sound = list(retried) == sorted(set(retried)) and all(0 <= each < first_candidate for each in retried)
    if retried and not (is_sound and len(retried) == generation.num_candidates):
        raise ShardDamage(file, f"{len(retried)} retried candidates that are not its {generation.num_candidates}")


def _read_record(line: bytes, file: str) -> Record:
    try:
        return Record.model_validate_json(line)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ShardDamage(file, f"not a record: {problem['msg']}") from None
