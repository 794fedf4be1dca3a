"""Progress of a pass: a live bar on a terminal, log lines elsewhere, JSON lines for programs, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from preprocess.build.pools import POOLS, find_bottleneck
from shards.console import LOG, ShowProgress, counted, duration_words, live_bar

if TYPE_CHECKING:
    from shards.format.ledger import LedgerRow

Style = Literal["auto", "bar", "lines", "json", "none"]
STYLES: tuple[Style, ...] = ("auto", "bar", "lines", "json", "none")

_SECONDS_A_LINE = 10.0
_SECONDS_A_DOCUMENT = 1.0


class PassProgress:
    """What a pass has done so far; the base class counts and prints nothing.

    Args:
        title: of the pass.
        num_units: units to do.
        num_clips: clips in them, where the pass is counted by clips.
    """

    def __init__(self, title: str, num_units: int, num_clips: int | None) -> None:
        self.title, self.num_units, self.num_clips = title, num_units, num_clips
        self.num_workers = self.units = self.accepted = self.rejected = self.num_bytes = 0
        self._busy_seconds = 0.0
        self._pool_seconds: Counter[str] = Counter()
        self._start = time.monotonic()

    def worker(self) -> None:
        """Count one more loaded encoder; rates are measured from the first one on."""
        if not self.num_workers:
            self._start = time.monotonic()
        self.num_workers += 1

    def row(self, row: LedgerRow, pool_seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        """Count one finished candidate, and what its encoder did and waited for since the one before."""
        self._pool_seconds.update(pool_seconds)
        self.accepted += row.status == "accepted"
        self.rejected += row.status == "rejected"
        self.num_bytes += row.bytes
        self._busy_seconds += row.seconds.get("encode", 0.0)
        self._changed(False)

    def unit(self, unit: int) -> None:
        """Count one committed unit."""
        self.units += 1
        self._changed(self.units == self.num_units)

    def facts(self) -> dict[str, Any]:
        """All figures as plain JSON; rates are measured from the first loaded encoder on."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        clips = self.accepted + self.rejected
        done, total = (self.units, self.num_units) if self.num_clips is None else (clips, self.num_clips)
        rate = done / seconds
        pools = sum(self._pool_seconds.values())
        return {
            "pass": self.title,
            "units": self.units,
            "of_units": self.num_units,
            "clips": clips,
            "of_clips": self.num_clips,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "bytes": self.num_bytes,
            "clips_per_second": round(clips / seconds, 3),
            "encoder_busy": round(self._busy_seconds / seconds / max(1, self.num_workers), 3),
            "pools": {name: round(each / pools, 3) for name, each in self._pool_seconds.items()} if pools else {},
            "bottleneck": find_bottleneck(self._pool_seconds),
            "seconds": round(seconds, 1),
            "seconds_left": round((total - done) / rate) if rate else None,
        }

    def _changed(self, is_last: bool) -> None:
        """Print the figures; `is_last`: all units are done."""


class _Lines(PassProgress):
    """A log line every `seconds_between` seconds, and one at the end."""

    seconds_between = _SECONDS_A_LINE

    def __init__(self, title: str, num_units: int, num_clips: int | None) -> None:
        super().__init__(title, num_units, num_clips)
        self._printed = time.monotonic()

    def _changed(self, is_last: bool) -> None:
        if is_last or time.monotonic() - self._printed >= self.seconds_between:
            self._printed = time.monotonic()
            self._print(self.facts())

    def _print(self, facts: dict[str, Any]) -> None:
        done = f"{self.units:,} of {counted(self.num_units, 'unit')}"
        LOG.info("%s: %s%s", self.title, done, describe_facts(facts))


class _Documents(_Lines):
    seconds_between = _SECONDS_A_DOCUMENT

    def _print(self, facts: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps({"event": "progress", **facts}, ensure_ascii=False) + "\n")
        sys.stderr.flush()


class _Bar(PassProgress):
    def __init__(self, title: str, num_units: int, num_clips: int | None, show: ShowProgress) -> None:
        super().__init__(title, num_units, num_clips)
        self._show = show

    def worker(self) -> None:
        super().worker()
        self._changed(False)

    def _changed(self, is_last: bool) -> None:
        facts = self.facts()
        done = facts["units"] if self.num_clips is None else facts["clips"]
        self._show(
            done, "first clips" if facts["seconds_left"] is None else facts["seconds_left"], describe_clips(facts)
        )


def describe_facts(facts: dict[str, Any]) -> str:
    """The figures as text behind a comma, the time that is left first; with clips, rates for a pass over clips."""
    left = "" if facts["seconds_left"] is None else f"{duration_words(facts['seconds_left'])} left"
    return "".join(f", {part}" for part in (left, describe_clips(facts)) if part)


def describe_clips(facts: dict[str, Any]) -> str:
    """The figures of a pass over clips; nothing for another pass."""
    if not facts["clips"]:
        return ""
    return (
        f"{facts['accepted']:,} accepted, {facts['rejected']:,} rejected, {facts['clips_per_second']:.2f} clips/s, "
        f"encoder busy {facts['encoder_busy']:.0%}"
        + (f", bound by {facts['bottleneck']}" if facts.get("bottleneck") else "")
        + f", {facts['bytes'] / 2**20:,.0f} MiB fetched"
    )


def describe_pools(facts: dict[str, Any]) -> list[str]:
    """What the encoder did and waited for, as a line of text; none before anything was measured."""
    if not facts.get("pools"):  # a note of an older release has none
        return []
    shares = {name: f"{share:.0%}" for name, share in facts["pools"].items()}
    waits = ", ".join(f"{shares[name]} for {name}" for name in POOLS if name != "encode")
    return [f"pools    encoder at work {shares['encode']}, waiting {waits}: bound by {facts['bottleneck']}"]


@contextmanager
def show_progress(title: str, *, num_units: int, num_clips: int | None, style: Style) -> Iterator[PassProgress]:
    """Progress of one pass over `num_units` units; counted by clips where their number is given.

    `auto` is a bar on a terminal and lines elsewhere.
    """
    if style == "auto":
        style = "bar" if sys.stderr.isatty() else "lines"
    if style == "bar":
        with live_bar(title, num_units if num_clips is None else num_clips, state="loading") as show:
            yield _Bar(title, num_units, num_clips, show)
    else:
        yield {"none": PassProgress, "lines": _Lines, "json": _Documents}[style](title, num_units, num_clips)


@contextmanager
def count_documents(title: str, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A function that adds to the number of documents read and shows it; None when `quiet`."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _counted_lines(title)
    else:
        with live_bar(title, None) as show:
            num_read = 0

            def add(number: int) -> None:
                nonlocal num_read
                num_read += number
                show(num_read)

            yield add


def _counted_lines(title: str) -> Callable[[int], None]:
    num_read, printed = 0, time.monotonic()

    def add(number: int) -> None:
        nonlocal num_read, printed
        num_read += number
        if time.monotonic() - printed >= _SECONDS_A_LINE:
            printed = time.monotonic()
            LOG.info("%s %d", title, num_read)

    return add
