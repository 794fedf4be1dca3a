"""Several devices on one machine: a process for each, units handed out as they are asked for.

The parent loads no encoder. A child asks for one unit after the other. When its encoder is loaded it says what it would
write (its identity), and waits for BEGIN; decoders, encoder and writer are those of `worker.py`.

    child → parent   any of: ASK, Description (once), ClipDone, a committed unit's number; last END or an exception
    parent → child   a unit's number or None for each ASK; BEGIN for the Description
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.build.work_queue import WorkQueue
from preprocess.build.worker import Description
from preprocess.config import PrepConfig
from shards.console import LOG, set_up_logging
from shards.errors import UserError

BEGIN, ASK, END = "begin", "ask", "end"
_END_SECONDS = 60.0


class _Child(NamedTuple):
    device: str
    process: BaseProcess
    pipe: Connection


def run_processes(
    config: PrepConfig,
    devices: Sequence[str],
    units: Iterable[int],
    scratch: Path,
    make_worker: Callable[..., Any],
    *,
    on_description: Callable[[Description], None],
    on_row: Callable[[Any], None],
    on_unit: Callable[[int], None],
) -> None:
    """Encode `units` on `devices`, a process each. Raises what a child raised, or UserError where one was killed.

    `make_worker`, which can be pickled, makes a `UnitWorker` or what has its `commits`. Left by
    an exception it ends the children, which drop their open units; what is committed stays.
    """
    children: list[_Child] = []
    queue = WorkQueue(units)
    try:
        children += [_start(config, device, scratch, len(devices), make_worker) for device in devices]
        by_pipe = {child.pipe: child for child in children}
        while by_pipe:
            for pipe in wait(list(by_pipe)):
                child = by_pipe[pipe]  # type: ignore[index]
                message = _receive(child)
                if message == END:
                    del by_pipe[child.pipe]
                elif isinstance(message, BaseException):
                    raise message
                elif isinstance(message, Description):
                    on_description(message)
                    child.pipe.send(BEGIN)
                elif message == ASK:
                    child.pipe.send(queue.next(child.pipe))
                elif isinstance(message, int):
                    queue.done(child.pipe, message)
                    on_unit(message)
                else:
                    on_row(message)
    finally:
        _end(children)


def _start(config: PrepConfig, device: str, scratch: Path, num_workers: int, make_worker: Callable[..., Any]) -> _Child:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_work,
        args=(theirs, config, device, scratch, num_workers, make_worker, LOG.level),
        name=f"encoder-{device}",
        daemon=True,
    )
    process.start()
    theirs.close()
    return _Child(device, process, ours)


def _receive(child: _Child) -> Any:
    try:
        return child.pipe.recv()
    except (EOFError, ConnectionResetError):
        child.process.join()
        how = child.process.exitcode or 0
    if how > 0:  # its traceback is on the terminal
        raise RuntimeError(f"the worker on {child.device} ended with {how}")
    raise UserError(
        f"the worker on {child.device} was ended by {signal.Signals(-how).name if how else 'an unknown cause'}",
        fix="see whether memory ran out (dmesg), then run the same command: it continues after the last unit",
    )


def _end(children: Sequence[_Child]) -> None:
    """End the children that still run, as SIGTERM ends a build, and collect all of them."""
    for child in children:
        # First the signal, so that a child leaves by it and not by the end of the pipe: it would get both.
        if child.process.is_alive():
            child.process.terminate()
        child.pipe.close()
    for child in children:
        child.process.join(_END_SECONDS)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        child.process.close()


def _work(
    pipe: Connection,
    config: PrepConfig,
    device: str,
    scratch: Path,
    num_workers: int,
    make_worker: Callable[..., Any],
    level: int,
) -> None:
    """The child. SIGTERM unwinds it; the parent passes Ctrl-C on; the end of the parent ends it too."""

    def leave(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the unwinding short
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    set_up_logging(f"[{device}] ", level)
    sending = threading.Lock()

    def send(message: Any) -> None:
        with sending:  # rows come from the writer's thread
            pipe.send(message)

    def units() -> Iterator[int]:
        while True:
            send(ASK)
            unit = pipe.recv()
            if unit is None:
                return
            yield unit

    def describe(about: Description) -> None:
        send(about)
        if pipe.recv() != BEGIN:
            raise RuntimeError("the parent did not say to begin")

    try:
        worker = make_worker(config, scratch, device=device, num_workers=num_workers)
        for commit in worker.commits(units(), on_row=send, on_description=describe):
            send(commit.unit)
        send(END)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended: nobody would read an error
        sys.exit(1)
    except (UserError, OSError) as error:  # the parent reports it; a bug ends with its traceback
        send(error)
