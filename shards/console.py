"""What the three command lines share: how errors, log lines and durations are shown."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from shards.errors import SystemFailure, UserError

if TYPE_CHECKING:
    from rich.console import Console

LOG = logging.getLogger("wan")
REPORT_SECONDS = 30.0
_PASSWORD = re.compile(r"://[^/?#\s]*@")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LABEL = re.compile(r" *\S+ {2,}(?=\S)| +")
"""What further pieces of a long line are set under: what follows `days       `, or its own indentation."""
Item = TypeVar("Item")


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things in words: `1 clip`, `1,500 clips`. `many` is the plural where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def as_typed(context: click.Context, parameter: click.Parameter, text: str) -> str:
    """A callback for text that is no path: under LC_ALL=C bytes beyond ASCII come as surrogates; they were UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


class CommandGroup(click.Group):
    """A click group that prints a UserError, or an error of the operating system, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn an error into its message and exit code (2 or 75), Ctrl-C into 130."""
        # Read when torch is imported, later: its threads wait for each other asleep and not by spinning, which on cores
        # that others use too made a step take twelve times as long. No number depends on it.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # under LC_ALL=C, or of a lone surrogate, no character is an error
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {without_passwords(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head`: click ends quietly
                raise
            failure = SystemFailure(error)
            click.echo(f"error: {failure}", err=True)
            ctx.exit(failure.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command continues where it stopped, unless it says otherwise", err=True)
            ctx.exit(130)


def without_passwords(text: str) -> str:
    """A message in which no URL has a user or a password, as one that was typed in a root or in -o may have."""
    return _PASSWORD.sub("://…@", text)


def print_json(value: Any) -> None:
    """Write one JSON document to standard output, for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def echo_lines(lines: Iterable[str]) -> None:
    """Lines for people on standard output; on a terminal too long ones are broken between words."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        # What a server answered may hold characters that move the cursor.
        line = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], line)  # noqa: PLW2901
        label = _LABEL.match(line)
        indent = min(len(label[0]) if label else 0, 30)
        click.echo(line if width is None else "\n".join(break_line(line, width, indent)))


def break_line(line: str, width: int, indent: int) -> list[str]:
    """A line in pieces of a width, broken between words alone, so that a path stays one word."""
    if len(line) <= width:
        return [line]
    pieces = textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, tabsize=1
    )
    return pieces or [line]


def duration_words(seconds: float) -> str:
    """A duration for people: '3 d 4 h', '4 h 05 min', '5 min 09 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def with_progress(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """The items, with a bar on standard error where that is a terminal, and elsewhere a log line every 30 seconds."""
    began = said = time.monotonic()
    with live_bar(label, total) if sys.stderr.isatty() else nullcontext() as show:
        for number, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if show is not None:
                show(number, (now - began) / number * (total - number))
            elif now - said > REPORT_SECONDS:
                said = now
                LOG.info("%s: %d of %d", label, number, total)


ShowProgress = Callable[..., None]
"""`show(done, left, facts, count)`, all but `done` optional; `left`: seconds, or a word such as `loading`."""


@contextmanager
def live_bar(title: str, total: float | None, done: int = 0, state: str = "") -> Iterator[ShowProgress]:
    """A line at the foot of the terminal, the time that is left first; log lines go above it, each on its own line.

    `state` is in the place of the time at first. Where `total` is not known there is no bar. Of a line that is wider
    than the terminal the end is cut off: the last of the facts.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column

    def column(name: str, **options: Any) -> TextColumn:
        return TextColumn(name, markup=False, table_column=Column(no_wrap=True, **options))

    def show(done: float, left: float | str = "", facts: str = "", count: str = "") -> None:
        left = left if isinstance(left, str) else f"{duration_words(left)} left"
        bar.update(task, completed=done, left=left, count=count or count_of(done), facts=facts)

    def count_of(done: float) -> str:
        return f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"

    terminals = [handler for handler in LOG.handlers if isinstance(handler, _Terminal)]
    if any(handler.console is not None for handler in terminals):  # one bar at a time
        yield lambda *_: None
        return
    title_column, count_column = column("{task.description}"), column("{task.fields[count]}")
    columns: list[ProgressColumn] = [title_column, count_column]
    if total is not None:
        columns = [column("{task.fields[left]}"), title_column, BarColumn(bar_width=12), count_column]
    columns.append(column("{task.fields[facts]}", ratio=1, overflow="ellipsis"))
    with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task(title, total=total, completed=done, left=state, count=count_of(done), facts="")
        try:
            for handler in terminals:
                handler.console = bar.console
            yield show
        finally:
            for handler in terminals:
                handler.console = None


class _Terminal(logging.StreamHandler[TextIO]):
    """Log lines on standard error, on a terminal broken between words; above the bar while one is shown."""

    console: Console | None = None

    def format(self, record: logging.LogRecord) -> str:
        """The line, with breaks where the terminal would break within a word; a long word (a path) stays whole."""
        text = super().format(record)
        if not self.stream.isatty():
            return text
        width = shutil.get_terminal_size().columns - 1
        return "\n".join(part for line in text.split("\n") for part in break_line(line, width, 9))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, whatever it holds, without cutting or colouring it."""
        if self.console is None:
            super().emit(record)
        else:
            self.console.print(self.format(record), markup=False, emoji=False, highlight=False, soft_wrap=True)


def set_up_logging(prefix: str = "", level: int = logging.INFO, *, terminal: bool = True) -> None:
    """Send the project's one logger to standard error, each line behind `prefix` (a rank, a worker).

    Without `terminal` it goes only to handlers added later: of several processes one writes to the terminal.
    """
    handler = _Terminal(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    LOG.handlers[:] = [handler] if terminal else []
    LOG.setLevel(level)
    LOG.propagate = False
