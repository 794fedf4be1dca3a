"""What the three command lines share: one way to fail, one way to speak, one way to show progress."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import click

from shards.errors import UserError

LOG = logging.getLogger("wan")


class CommandGroup(click.Group):
    """A click group that prints a UserError, or a lacking permission, without a traceback and exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn a UserError into its message and exit code 2, Ctrl-C into 130."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except PermissionError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {where}{error.strerror or error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command continues where it stopped, unless it says otherwise", err=True)
            ctx.exit(130)


def print_json(value: Any) -> None:
    """Write one JSON document to standard output, for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def duration_words(seconds: float) -> str:
    """What a person waits by: '3 d 4 h', '4 h 05 min', '5 min 09 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def set_up_logging(prefix: str = "", level: int = logging.INFO, *, terminal: bool = True) -> None:
    """Send the project's one logger to standard error, each line behind `prefix` (a rank, a worker).

    Without `terminal` it goes only where handlers are added: one process of several speaks there.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    LOG.handlers[:] = [handler] if terminal else []
    LOG.setLevel(level)
    LOG.propagate = False
