"""What the commands show: plain values, for `--json`, and tables of them, for people."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from shards.check.verify import Level, Report, total_bytes, verify
from shards.console import counted, live_bar
from shards.errors import MissingObject, ShardDamage, UserError
from shards.format.commit import dataset_revision, read_commit
from shards.format.dataset_info import read_info, text_command
from shards.format.names import INDEX_NAME, JSON_MEMBER, LATENTS, NULL_UNIT, commit_name, text_kind
from shards.format.sealed_json import canonical_digest, parse_json
from shards.read.dataset import open_dataset
from shards.read.index import list_root, load_columns, text_sets
from shards.read.table import NUMBERS, refusing_odd_columns, unpack
from shards.show.member import preview_bytes, read_member
from shards.storage import open_storage
from shards.storage.base import Storage


def dataset_overview(root: str) -> dict[str, Any]:
    """What a root holds, as plain values. Counts what is there; `verify` says whether it is complete."""
    storage = open_storage(root)
    info = read_info(storage)
    names = sorted({*info.text_sets, *text_sets(storage)})
    kinds = [LATENTS, *(text_kind(name) for name in names)]
    listing = list_root(storage, kinds)
    buckets: Counter[tuple[int, int, int]] = Counter()
    totals = {kind: {"units": 0, "samples": 0, "bytes": 0, "has_null": False} for kind in kinds}
    revisions = []
    for columns in load_columns(storage, kinds, listing):
        with refusing_odd_columns(columns, storage.url(INDEX_NAME)):
            kind, unit = columns["kind"], columns["unit"]
            revisions.append((kind, unit, columns["revision"]))
            totals[kind]["bytes"] += columns["tar"][1]
            if unit == NULL_UNIT:
                totals[kind]["has_null"] = True
                continue
            totals[kind]["units"] += 1
            totals[kind]["samples"] += len(columns["key"])
            if kind == LATENTS:
                buckets.update(zip(*(unpack(columns[field]).tolist() for field in NUMBERS[1:]), strict=True))
    return {
        "root": storage.url(),
        "format_version": info.format_version,
        "identity_sha256": info.identity_digest,
        "identity": info.identity,
        "revisions": {name: _revision(revisions, name) for name in [*names, None]} if names else {},
        "revision": _revision(revisions, "default" if "default" in names else None),
        "planned_units": len(info.planned_units()),
        "generations": [gen.model_dump(mode="json") for gen in info.generations],
        "latents": totals[LATENTS],
        "text_sets": {
            name: {**totals[text_kind(name)], "identity_sha256": canonical_digest(info.text_sets[name].identity)}
            for name in names
            if name in info.text_sets
        },
        "unknown_text_sets": [name for name in names if name not in info.text_sets],
        "buckets": [{"frames": f, "height": h, "width": w, "samples": n} for (f, h, w), n in sorted(buckets.items())],
        "notes": info.notes,
        "totals": info.totals,
    }


def _revision(revisions: list[tuple[str, int, str]], text_set: str | None) -> str:
    kinds = {LATENTS, *([text_kind(text_set)] if text_set else [])}
    return dataset_revision(item for item in revisions if item[0] in kinds)


def print_overview(found: dict[str, Any]) -> None:
    """Tables of an overview on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, markup=False)  # a path may hold [red]
    console.print(f"{found['root']}   format {found['format_version']}")
    console.print(f"identity {found['identity_sha256']}\nrevision {found['revision']}")
    for name, text in found["notes"].items():
        console.print(f"{name}: {text}")
    table = Table("shards", "units", "of", "samples", "GiB", "null embeddings")
    rows = {"latents": found["latents"], **{f"text/{name}": row for name, row in found["text_sets"].items()}}
    for name, row in rows.items():
        null = "" if name == "latents" else "yes" if row["has_null"] else "missing"
        size = f"{row['bytes'] / 2**30:.3f}"
        table.add_row(name, str(row["units"]), str(found["planned_units"]), str(row["samples"]), size, null)
    console.print(table)
    if found["latents"]["units"] < found["planned_units"]:
        console.print(
            f"{found['latents']['units']:,} of {found['planned_units']:,} planned units are there: the build is not "
            "finished, or units were lost; `wanshards verify` names them"
        )
    table = Table("frames", "height", "width", "samples")
    for bucket in found["buckets"]:
        table.add_row(*(str(bucket[field]) for field in ("frames", "height", "width", "samples")))
    console.print(table)
    for name in found["unknown_text_sets"]:
        console.print(f"text set {name!r} is not in dataset.json")


def sample_details(root: str, key: str) -> dict[str, Any]:
    """Everything about one sample, as plain values."""
    latents = open_dataset(root, None)
    ordinal = latents.ordinal(key)
    shard = latents.shard(ordinal)
    array = latents.latent(ordinal, plausible=False)
    storage = latents.storage(shard)
    captions = {name: _text_details(storage, name, shard.unit, key) for name in sorted(latents.info.text_sets)}
    return {
        "key": key,
        "unit": shard.unit,
        "tar": storage.url(shard.tar),
        "summary": latents.samples[ordinal]._asdict(),
        "json": latents.meta(ordinal),
        "latent": {
            "dtype": latents.latent_dtype(ordinal),
            "shape": list(array.shape),
            **_statistics(array, latents.latent_dtype(ordinal)),
        },
        "text_sets": captions,
    }


def write_preview(root: str, key: str, path: Path) -> None:
    """Write a sample's strip of frames. Raises UserError where it was sealed without one, or the file cannot be."""
    content = preview_bytes(open_dataset(root, None), key)
    if content is None:
        raise UserError(f"sample {key} was sealed without a preview", fix="build with shards.preview_frames above 0")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _text_details(storage: Storage, name: str, unit: int, key: str) -> dict[str, Any]:
    """A sample in one text set, by its own unit's commit alone: other units may not be there yet."""
    try:
        commit = read_commit(storage, text_kind(name), unit).commit
    except MissingObject:
        return {"status": f"not there yet; {text_command(name)} makes it"}
    sample = next((sample for sample in commit.samples if sample.key == key), None)
    member = sample.member(JSON_MEMBER) if sample else None
    if member is None:
        raise ShardDamage(storage.url(commit_name(text_kind(name), unit)), f"it has no sample {key}")
    data = read_member(storage, commit.tar.name, f"{key}.{JSON_MEMBER}", member)
    return {"tar": storage.url(commit.tar.name), "json": parse_json(data, storage.url(commit.tar.name))}


def _statistics(array: np.ndarray, dtype: str) -> dict[str, float]:
    values = array.astype(np.uint32) << 16 if dtype == "bfloat16" else array
    numbers = (values.view(np.float32) if dtype == "bfloat16" else values).astype(np.float64)
    if not numbers.size:
        return {}
    return {"mean": float(numbers.mean()), "std": float(numbers.std()), "max_abs": float(np.abs(numbers).max())}


def print_sample(found: dict[str, Any]) -> None:
    """One sample on standard output, for people."""
    import yaml
    from rich.console import Console

    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=110)
    Console(highlight=False, soft_wrap=True).print(text, markup=False, end="")


def run_verify(root: str, level: Level, jobs: int, partial: bool) -> Report:
    """Verify with a progress bar on standard error."""
    storage, done, began, lock = open_storage(root), 0, time.monotonic(), threading.Lock()
    total = total_bytes(storage) if level != "fast" else None
    with live_bar("verify", total) if sys.stderr.isatty() else nullcontext() as show:

        def advance(num_bytes: int) -> None:
            nonlocal done
            if show is None:
                return
            with lock:  # several threads read
                done += num_bytes
                rate = done / max(time.monotonic() - began, 1e-9)
                left = "" if total is None or not rate else max(0, total - done) / rate
                of = f"{done / 2**30:.2f}" + ("" if total is None else f"/{total / 2**30:.2f}")
                show(done, left, f"{rate / 2**20:,.0f} MiB/s", f"{of} GiB")

        return verify(storage, level, jobs=jobs, partial=partial, progress=advance)


def print_report(report: Report) -> None:
    """Print the result of a verification: one line per problem, then a summary line."""
    import click

    for problem in report.problems:
        place = f": member {problem.member}" if problem.member else ""
        at = f" at offset {problem.offset}" if problem.offset is not None else ""
        click.echo(f"{problem.file}{place}{at}: {problem.what}")
    counts = Counter(problem.kind for problem in report.problems)
    verdict = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no problems"
    size = report.num_bytes / 2**30
    click.echo(
        f"{verdict}: {counted(report.num_units, 'shard')}, {counted(report.num_samples, 'sample')}, {size:.3f} GiB"
    )
