"""What became of one clip: every attempt at it, its samples with their decisions, and whether a retry can help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pydantic

from shards.errors import ShardDamage, UserError
from shards.format.commit import committed_units, read_commit
from shards.format.dataset_info import read_info
from shards.format.ledger import LedgerRow, read_ledger_lines
from shards.format.names import JSON_MEMBER, LATENTS
from shards.format.sealed_json import parse_json
from shards.read.outcomes import MAX_LEDGER_BYTES
from shards.show.member import read_member
from shards.storage.base import Storage
from shards.storage.patience import reader_pool

_THREADS = 16


def clip_history(storage: Storage, clip: str) -> dict[str, Any]:
    """What the ledgers say of a clip, given by its id or by the name of its annotation, as plain values.

    `attempts` are in the order they were made; the last one counts. Where nothing is known of it, `status` is
    "unknown" and `attempts` is empty. Raises ShardDamage, and UserError where the clip has no name.
    """
    if not clip:
        raise UserError("the clip is empty", expected="a clip id, or the name of its annotation")
    attempts = _plan_attempts(storage, clip)
    units = sorted(committed_units(storage, LATENTS))
    with reader_pool(_THREADS) as pool:
        for found in pool.map(lambda unit: _unit_attempts(storage, unit, clip), units):
            attempts += found
    last = attempts[-1] if attempts else {"status": "unknown", "retryable": False, "reason": None}
    samples = [sample for attempt in attempts for sample in _samples(storage, attempt)]
    retry = f"wanprep retry CONFIG --reason {last['reason']}" if last["retryable"] else None
    return {
        "clip": attempts[-1]["clip_id"] if attempts else clip,
        "source": attempts[-1]["source"] if attempts else None,
        "status": last["status"],
        "attempts": attempts,
        "samples": samples,
        "retry": {"can_help": bool(last["retryable"]), "command": retry},
    }


def _plan_attempts(storage: Storage, clip: str) -> list[dict[str, Any]]:
    """Rows of the plan's ledgers: records that were refused before anything was downloaded."""
    names = [entry.name for entry in storage.list("plan/") if entry.name.endswith(".ledger.jsonl.zst")]
    found = []
    for name in names:
        generation = name.removeprefix("plan/").partition(".")[0]
        found += [{"generation": generation, "unit": None, **row} for row in _rows(storage, name, clip)]
    return found


def _unit_attempts(storage: Storage, unit: int, clip: str) -> list[dict[str, Any]]:
    ledger = read_commit(storage, LATENTS, unit).commit.ledger
    rows = _rows(storage, ledger.name, clip) if ledger else ()
    return [{"generation": None, "unit": unit, **row} for row in rows]


def _rows(storage: Storage, ledger: str, clip: str) -> Iterator[dict[str, Any]]:
    """The rows of one clip; of the others no line is parsed."""
    file = storage.url(ledger)
    marks = [json.dumps(clip).encode(), json.dumps(clip, ensure_ascii=False).encode("utf-8", "surrogatepass")]
    for number, line in enumerate(read_ledger_lines(storage.get(ledger, MAX_LEDGER_BYTES), file), 1):
        if not any(mark in line for mark in marks):
            continue
        try:
            row = LedgerRow.model_validate_json(line)
        except pydantic.ValidationError as error:
            raise ShardDamage(file, f"line {number}: {error.errors(include_url=False)[0]['msg']}") from None
        if clip in (row.clip_id, row.source):
            yield row.model_dump(mode="json")


def _samples(storage: Storage, attempt: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON of the samples that an attempt gave: the facts of the file, and the decisions with their grounds."""
    keys = {window["key"] for window in attempt["windows"] if window["status"] == "accepted"}
    if not keys:
        return
    commit = read_commit(storage, LATENTS, attempt["unit"]).commit
    for sample in commit.samples:
        member = sample.member(JSON_MEMBER)
        if sample.key in keys and member:
            data = read_member(storage, commit.tar.name, f"{sample.key}.{JSON_MEMBER}", member)
            yield {"key": sample.key, "unit": commit.unit, "json": parse_json(data, storage.url(commit.tar.name))}


def find_clip(storage: Storage, clip: str) -> dict[str, Any]:
    """`clip_history` of a clip that the dataset knows. Raises UserError where it does not, or is no dataset."""
    read_info(storage)
    found = clip_history(storage, clip)
    if not found["attempts"]:
        raise UserError(
            f"{storage.url()}: no sample and no ledger row of {clip!r}",
            expected="the key of a sample, a clip id, or the name of an annotation",
            fix="`wanshards ls ROOT --keys` lists the samples; a clip that is planned and not built yet has no row: "
            "`wanprep why CLIP CONFIG` reads the plan too",
        )
    return found


def describe_clip(found: dict[str, Any]) -> list[str]:
    """A history as lines for people."""
    lines = [f"clip {found['clip']}: {found['status']}"]
    if found["source"]:
        lines.append(f"annotation  {found['source']}")
    for number, attempt in enumerate(found["attempts"], 1):
        where = f"plan {attempt['generation']}" if attempt["unit"] is None else f"unit {attempt['unit']}"
        lines.append(f"attempt {number}   {where}: {_outcome(attempt)}")
        if attempt["detail"]:
            lines.append(f"            {attempt['detail']}")
        spent = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in attempt["seconds"].items())
        if attempt["bytes"] or spent:
            tries = f" in {attempt['attempts']} downloads" if attempt["attempts"] > 1 else ""
            lines.append(f"            {attempt['bytes']:,} bytes{tries}{', ' if spent else ''}{spent}")
        for window in attempt["windows"]:
            reason = f": {window['reason']}: {window['detail']}" if window["reason"] else f": {window['key']}"
            lines.append(f"  window at {window['start_seconds']:.2f} s {window['status']}{reason}")
        lines += _fact_lines(attempt.get("facts") or {})
    for sample in found["samples"]:
        lines.append(f"sample {sample['key']}")
        for name in ("probed", "window", "bucket", "decisions"):
            lines += [f"  {name}.{key}: {value}" for key, value in (sample["json"].get(name) or {}).items()]
    if found["status"] == "rejected":
        command = found["retry"]["command"]
        lines.append(f"a retry can help: `{command}`" if command else "a retry gives the same result")
    return lines


def _fact_lines(facts: dict[str, Any]) -> list[str]:
    decisions = facts.get("decisions")
    found = {f"probed.{name}": value for name, value in facts.items() if name != "decisions"}
    found |= {f"decisions.{name}": value for name, value in (decisions.items() if isinstance(decisions, dict) else ())}
    return [f"  {name}: {value}" for name, value in found.items()]


def _outcome(attempt: dict[str, Any]) -> str:
    if attempt["status"] == "accepted":
        return "accepted"
    return f"rejected at {attempt['stage']}: {attempt['reason']}"
