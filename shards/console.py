"""What the three command lines share: how errors, log lines and durations are shown."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import click

from shards.errors import SystemFailure, UserError

LOG = logging.getLogger("wan")
REPORT_SECONDS = 30.0
Item = TypeVar("Item")


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
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # under LC_ALL=C, or of a lone surrogate, no character is an error
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
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


def print_json(value: Any) -> None:
    """Write one JSON document to standard output, for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


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
    if sys.stderr.isatty():
        with click.progressbar(items, total, label, file=sys.stderr) as bar:
            yield from bar
        return
    said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > REPORT_SECONDS:
            said = time.monotonic()
            LOG.info("%s: %d of %d", label, number, total)


def set_up_logging(prefix: str = "", level: int = logging.INFO, *, terminal: bool = True) -> None:
    """Send the project's one logger to standard error, each line behind `prefix` (a rank, a worker).

    Without `terminal` it goes only to handlers added later: of several processes one writes to the terminal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    LOG.handlers[:] = [handler] if terminal else []
    LOG.setLevel(level)
    LOG.propagate = False
