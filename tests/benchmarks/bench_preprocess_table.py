"""Memory of planning a table: the slope over the number of rows, for CSV, JSON lines and parquet.

Promise: at most 50 bytes a row, resident, from 100,000 rows (where all caches are full) on. `--full` takes a million.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from peak import peak_kib

BASE, SMALL, FULL = 100_000, 400_000, 1_000_000
PROMISED_BYTES = 50
KINDS = ("csv", "jsonl", "parquet")


def main() -> int:
    """Write the tables, plan each in a process of its own, print seconds, peak and slope; 1 where one is too steep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} rows instead of {SMALL:,}")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of table")
    parser.add_argument("--run", metavar="TABLE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(options.run)
        return 0
    steep = False
    most = FULL if options.full else SMALL
    for kind in options.kind or KINDS:
        with tempfile.TemporaryDirectory(prefix="bench-table-") as folder:
            few, many = (run_apart(write_table(Path(folder), kind, rows)) for rows in (BASE, most))
        slope = (many["kib"] - few["kib"]) * 1024 / (most - BASE)
        print(
            f"{kind:8}{most:>10,} rows  {many['seconds']:6.1f} s  {many['kib'] / 1024:6.0f} MiB resident  "
            f"{slope:6.1f} bytes a row  {'kept' if slope <= PROMISED_BYTES else 'NOT KEPT'}"
        )
        steep |= slope > PROMISED_BYTES
    return int(steep)


def write_table(folder: Path, kind: str, num_rows: int) -> Path:
    """A table of paths, captions and a tag; one caption in ten is missing."""
    path = folder / f"{num_rows}.{kind}"
    names = ("file_name", "caption", "mood")
    rows = (
        (f"{n % 997}/{n}.mp4", f"A shape number {n} moves over a field." * (n % 10 > 0), "calm")
        for n in range(num_rows)
    )
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
        parquet.write_table(table, path, row_group_size=100_000)
        return path
    with path.open("w", encoding="utf-8") as file:
        if kind == "csv":
            file.write(",".join(names) + "\n")
        for row in rows:
            file.write(",".join(row) + "\n" if kind == "csv" else json.dumps(dict(zip(names, row, strict=True))) + "\n")
    return path


def run_apart(table: Path) -> dict[str, float]:
    """Plan a table in a fresh process; its seconds and its peak."""
    command = [sys.executable, __file__, "--run", str(table)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600).stdout
    return json.loads(output.splitlines()[-1])


def run_here(table: str) -> None:
    """Plan one table in this process alone, and print what it took."""
    from preprocess.config import CorpusConfig, PrepConfig
    from preprocess.plan.freeze import freeze_plan
    from shards.storage import open_storage

    with tempfile.TemporaryDirectory(prefix="bench-table-out-") as out:
        start = time.perf_counter()
        plan = freeze_plan(
            open_storage(out), PrepConfig(output=out, corpus=CorpusConfig(location=table)), num_workers=1
        )
        seconds = time.perf_counter() - start
    if plan.num_candidates + plan.num_refused != int(Path(table).stem):
        raise SystemExit(f"{plan.num_candidates} + {plan.num_refused} of {Path(table).stem} rows")
    print(json.dumps({"seconds": seconds, "kib": peak_kib(), "pid": os.getpid()}))


if __name__ == "__main__":
    sys.exit(main())
