"""dataset.json: what a root holds, and its identity. Sealed; entries are added and never changed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, NonNegativeInt

from shards.config import Config, validate_config
from shards.errors import FutureFormat, MissingObject, ShardDamage, UserError
from shards.format.identity import refuse_mismatch
from shards.format.names import FORMAT_VERSION, INFO_NAME, MAX_UNIT, text_kind
from shards.format.sealed_json import canonical_digest, open_document, seal_document
from shards.storage.base import Storage

_MAX_BYTES = 2**24
Json = Any
"""A plain JSON value."""


class BucketInfo(Config):
    """A size that samples have: frames, and pixels."""

    frames: NonNegativeInt
    height: NonNegativeInt
    width: NonNegativeInt


class Generation(Config):
    """One plan, frozen: later records make a further generation and never change this one."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    """Such as gen-000; the plan is `plan/<name>.jsonl.zst`."""
    plan_sha256: str
    """sha256 of that object's bytes."""
    first_unit: NonNegativeInt
    num_units: NonNegativeInt
    num_candidates: NonNegativeInt
    """Candidates in its units."""
    num_records: NonNegativeInt
    """Records read, including those that the filter refused."""
    ledger_sha256: str | None = None
    """sha256 of `plan/<name>.ledger.jsonl.zst`, what the filter refused and why."""


class TextSetInfo(Config):
    """One set of text embeddings over the keys of the latents."""

    identity: dict[str, Json]
    """What decides its numbers: text encoder, cleaning, templates."""
    notes: dict[str, str] = Field(default_factory=dict)


class DatasetInfo(Config):
    """The document `dataset.json`."""

    format_version: int = FORMAT_VERSION
    identity: dict[str, Json]
    """What decides the latents' numbers: encoder, transform, dtype, format."""
    text_sets: dict[str, TextSetInfo] = Field(default_factory=dict)
    buckets: tuple[BucketInfo, ...] = ()
    generations: tuple[Generation, ...] = ()
    notes: dict[str, str] = Field(default_factory=dict)
    """For people, such as {"encoders": "random weights"}."""
    totals: dict[str, Json] = Field(default_factory=dict)
    """What the last build counted."""

    @property
    def identity_digest(self) -> str:
        """sha256 of the canonical identity of the latents."""
        return canonical_digest(self.identity)

    def kind_identity(self, kind: str) -> dict[str, Json]:
        """The identity of 'latents' or 'text/<set>'. Raises UserError naming the sets there are."""
        if kind == "latents":
            return self.identity
        name = kind.removeprefix("text/")
        if name not in self.text_sets:
            there = ", ".join(sorted(self.text_sets)) or "none"
            raise UserError(
                f"text set {name!r} is not in the dataset",
                expected=f"one of its text sets: {there}",
                fix=f"{text_command(name)} makes it",
            )
        return self.text_sets[name].identity

    def planned_units(self) -> range:
        """The units of all generations, consecutive from 0. Not a set: the number in a file may be huge."""
        return range(sum(gen.num_units for gen in self.generations))


def text_command(text_set: str) -> str:
    """The command that makes a text set, in backticks, for messages."""
    return "`wanprep build-shards CONFIG`" if text_set == "default" else f"`wanprep recaption {text_set} CONFIG`"


def read_info(storage: Storage) -> DatasetInfo:
    """Read dataset.json. Raises UserError when there is none, ShardDamage, or FutureFormat."""
    try:
        data = storage.get(INFO_NAME, _MAX_BYTES)
    except MissingObject:
        raise UserError(
            f"{storage.url()}: no dataset here ({INFO_NAME} is missing)",
            expected="the root of a dataset: a folder or s3://bucket/prefix",
            fix="`wanprep build-shards CONFIG` makes one",
        ) from None
    return parse_info(data, storage.url(INFO_NAME))


def parse_info(data: bytes, file: str) -> DatasetInfo:
    """dataset.json from its bytes. Raises ShardDamage or FutureFormat."""
    body = open_document(data, file)
    check_format_version(body.get("format_version"), file)
    try:
        info = validate_config(DatasetInfo, body, origin=file)
    except UserError as error:
        raise ShardDamage(file, error.problem) from None
    _check_generations(info, file)
    return info


def write_info(storage: Storage, info: DatasetInfo) -> None:
    """Write dataset.json, as growth of the one that is there.

    Raises IdentityMismatch when the identity, or that of a text set, is another; UserError when a generation that is
    there would change.
    """
    where = storage.url(INFO_NAME)
    for name in info.text_sets:
        text_kind(name)
    _check_generations(info, where)
    if storage.exists(INFO_NAME):
        _check_growth(read_info(storage), info, storage.url())
    storage.put(INFO_NAME, seal_document(info.model_dump(mode="json"), indent=1))


def check_format_version(found: object, file: str) -> None:
    """Raises FutureFormat unless `found` is the version this code reads."""
    if found != FORMAT_VERSION:
        raise FutureFormat(file, found, FORMAT_VERSION)


def _check_growth(old: DatasetInfo, new: DatasetInfo, root: str) -> None:
    refuse_mismatch(new.identity, old.identity, f"the dataset at {root}")
    for name, text_set in old.text_sets.items():
        if name in new.text_sets:
            fix = f"give the new text set another name ({text_command('NAME')}), or take back the change"
            refuse_mismatch(new.text_sets[name].identity, text_set.identity, f"text set {name!r} at {root}", fix)
    if new.generations[: len(old.generations)] != old.generations:
        raise UserError(
            f"{root}: its {len(old.generations)} frozen plan(s) would change",
            expected="the same generations, with new ones appended",
            fix="build into another root, or run with the corpus settings that made these plans",
        )
    if missing := sorted(old.text_sets.keys() - new.text_sets.keys()):
        raise UserError(f"{root}: text sets {missing} would vanish from dataset.json", expected="they stay")


def _check_generations(info: DatasetInfo, file: str) -> None:
    next_unit = 0
    for gen in info.generations:
        if gen.first_unit != next_unit:
            raise ShardDamage(file, f"generation {gen.name} starts at unit {gen.first_unit}, expected {next_unit}")
        next_unit += gen.num_units
        if next_unit > MAX_UNIT + 1:
            raise ShardDamage(file, f"generation {gen.name} has {gen.num_units:,} units, at most {MAX_UNIT + 1:,} fit")
