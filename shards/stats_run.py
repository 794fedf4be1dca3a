"""Statistics with a progress bar on standard error."""

from __future__ import annotations

import sys
from typing import Any

from shards.stats import dataset_stats


def run_stats(root: str, **options: Any) -> dict[str, Any]:
    """`dataset_stats` with its options, and a bar where someone watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress("stats", *columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("stats", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return dataset_stats(root, progress=advance, **options)
