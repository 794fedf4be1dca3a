"""Progress on a terminal as a live bar, elsewhere as a plain line a unit, and nothing when it is to be quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shards.console import LOG
from shards.ledger import LedgerRow

_SECONDS_A_LINE = 10.0


class Progress:
    """Counts of one pass; the base class says nothing."""

    def row(self, row: LedgerRow) -> None:
        """One candidate is done."""

    def unit(self, unit: int) -> None:
        """One unit is committed."""


class _Lines(Progress):
    def __init__(self, title: str, num_units: int) -> None:
        self._title, self._num_units = title, num_units
        self._start = time.monotonic()
        self._done = self._accepted = self._rejected = 0

    def row(self, row: LedgerRow) -> None:
        self._accepted += row.status == "accepted"
        self._rejected += row.status == "rejected"

    def unit(self, unit: int) -> None:
        self._done += 1
        seconds = time.monotonic() - self._start
        clips = f", {self._accepted} accepted, {self._rejected} rejected" if self._accepted + self._rejected else ""
        LOG.info("%s: unit %d (%d of %d)%s, %.1f s", self._title, unit, self._done, self._num_units, clips, seconds)


class _Bar(Progress):
    def __init__(self, bar: object, task: object, by_clip: bool) -> None:
        self._bar, self._task, self._by_clip = bar, task, by_clip
        self._accepted = self._rejected = 0

    def row(self, row: LedgerRow) -> None:
        self._accepted += row.status == "accepted"
        self._rejected += row.status == "rejected"
        counts = f"{self._accepted} accepted, {self._rejected} rejected"
        self._bar.update(self._task, advance=1, counts=counts)  # type: ignore[attr-defined]

    def unit(self, unit: int) -> None:
        if not self._by_clip:
            self._bar.update(self._task, advance=1)  # type: ignore[attr-defined]


@contextmanager
def show_progress(title: str, *, num_units: int, num_clips: int | None, quiet: bool) -> Iterator[Progress]:
    """Progress of one pass over `num_units` units; counted by clips where their number is given."""
    if quiet:
        yield Progress()
    elif not sys.stderr.isatty():
        yield _Lines(title, num_units)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[counts]}"),
        )  # fmt: skip
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=num_units if num_clips is None else num_clips, counts="")
            yield _Bar(bar, task, num_clips is not None)


@contextmanager
def count_documents(title: str, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """How many documents of a corpus have been read, told by calls with further ones; None where nothing is shown."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _counted_lines(title)
    else:
        from rich.console import Console
        from rich.progress import Progress as RichProgress
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,.0f}"), TimeElapsedColumn())
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda number: bar.update(task, advance=number)


def _counted_lines(title: str) -> Callable[[int], None]:
    num_read, told = 0, time.monotonic()

    def tell(number: int) -> None:
        nonlocal num_read, told
        num_read += number
        if time.monotonic() - told >= _SECONDS_A_LINE:
            told = time.monotonic()
            LOG.info("%s %d", title, num_read)

    return tell
