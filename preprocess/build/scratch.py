"""The scratch folder of a process, and what it says to others: who is at work on an output, on what, how fast.

OUTPUT/.tmp-build-<host>-…/              of one process, which holds a lock on it; removed by the next one when dead
OUTPUT/.tmp-build-<host>-…/at-work.json  of a build: process, part of the work, progress, open units; rewritten every
                                         few seconds
OUTPUT/.tmp-build-<host>-…/outage-….json a host that it is waiting for (`preprocess.fetch.hosts`)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from shards.console import LOG
from shards.errors import UserError
from shards.format.commit import is_committed
from shards.storage.base import Storage
from shards.storage.local import lock_file

IfBusy = Literal["wait", "share", "refuse"]
"""What a build does that finds another at work on the same units."""
NOTE_SECONDS, STALE_SECONDS, POLL_SECONDS = 5.0, 180.0, 0.5
"""Between two notes of a build; age at which another machine's note counts no longer; between two looks at others."""

_FOLDERS = ".tmp-build-"
# The host is in the name because some network file systems do not show another machine's locks.
_PREFIX = f"{_FOLDERS}{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
_NOTE = "at-work.json"


@contextmanager
def scratch_folder(output: str, *, on_this_machine: bool = False) -> Iterator[Path]:
    """A folder that exists during the block: inside a local dataset, else (or with `on_this_machine`) in /tmp.

    Each process locks its own folder; this machine's folders of the same root that nobody locks are removed first.
    `wanshards sweep` removes those of other machines.
    """
    parent = _parent(output, on_this_machine)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        problem = f"output: {output!r}: {error.strerror}"
        raise UserError(problem, expected="a folder that can be written, or s3://bucket/prefix") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        lock_file(lock, folder)
        for other in parent.glob(f"{_PREFIX}*"):
            if other != folder and not _is_locked(other):
                shutil.rmtree(other, ignore_errors=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def builds_at_work(output: str, own: Path | None = None) -> list[dict[str, Any]]:
    """The notes of the builds that work on `output` now, but for that of the folder `own`, the oldest first.

    Of an output in a bucket only those of this machine and user are known.
    """
    found = []
    for path in _parent(output, False).glob(f"{_FOLDERS}*/{_NOTE}"):
        is_ours = path.parent.name.startswith(_PREFIX)
        try:
            if path.parent == own or (is_ours and not _is_locked(path.parent)):
                continue
            if not is_ours and time.time() - path.stat().st_mtime > STALE_SECONDS:
                continue
            note = json.loads(path.read_text(encoding="utf-8"))
            note["outages"] = [json.loads(outage.read_text()) for outage in path.parent.glob("outage-*.json")]
        except (OSError, ValueError):  # removed or rewritten meanwhile
            continue
        found.append(note)
    return sorted(found, key=lambda note: note["key"])


def describe_note(note: dict[str, Any]) -> str:
    """Who is at work, in one line."""
    since = datetime.fromtimestamp(note["key"][0]).astimezone()
    return f"process {note['pid']} on {note['host']}, at work since {since:%d %b %H:%M:%S}"


class AtWork:
    """A build's own note, and its share of the units where another build works beside it.

    Args:
        passes: kinds of shards that it writes, such as `latents` and `text/default`.
        units: first and last unit of its part; None: all.
    """

    def __init__(
        self, storage: Storage, output: str, folder: Path, passes: Iterable[str], units: tuple[int, int] | None
    ) -> None:
        self._storage, self._output, self._folder = storage, output, folder
        self._open: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="at-work", daemon=True)
        self._note: dict[str, Any] = {
            "key": [time.time(), os.getpid()], "host": socket.gethostname(), "pid": os.getpid(),
            "passes": sorted(passes), "units": units, "works": False,
        }  # fmt: skip
        self.progress: Callable[[], dict[str, Any]] | None = None
        """Gives the figures of the pass that runs now."""

    def __enter__(self) -> AtWork:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    def begin(self, if_busy: IfBusy) -> None:
        """Wait for builds that are at work on the same units, or refuse, or go on beside them.

        Of two that begin at the same time the one with the lower key goes first.
        """
        told = False
        while others := [note for note in builds_at_work(self._output, self._folder) if self._is_before(note)]:
            who = f"{self._output}: {describe_note(others[0])}, builds the same units"
            if if_busy == "refuse":
                raise UserError(who, fix="wait for it, stop it, or use --if-busy wait or --if-busy share")
            if if_busy == "share":
                LOG.warning("%s: the units are shared", who)
                break
            if not told:
                LOG.warning("%s: waiting until it ends (--if-busy share works beside it)", who)
            told = True
            time.sleep(POLL_SECONDS)
        self._note["works"] = True
        self._write()

    def claim(self, kind: str, units: Iterable[int]) -> Iterator[int]:
        """`units` one by one, as they are asked for, without those that another build has done or is doing."""
        for unit in units:
            lock = os.open(self._folder.parent, os.O_RDONLY)
            try:
                lock_file(lock, self._folder.parent)  # others must not claim between the look and the note
                taken = _open_units(builds_at_work(self._output, self._folder))
                if [kind, unit] in taken or is_committed(self._storage, kind, unit):
                    continue
                self._write((kind, unit))
            finally:
                os.close(lock)
            yield unit

    def wait_for_others(self, kind: str, units: Iterable[int]) -> list[int]:
        """Wait while others are doing `units`; those that are left to be done here, without a commit."""
        while True:
            taken = _open_units(builds_at_work(self._output, self._folder))
            left = [unit for unit in units if not is_committed(self._storage, kind, unit)]
            if not all([kind, unit] in taken for unit in left) or not left:
                return left
            time.sleep(POLL_SECONDS)

    def _is_before(self, note: dict[str, Any]) -> bool:
        """Whether a build has part of this one's work and came first."""
        ours, theirs = self._note["units"], note["units"]
        if not set(self._note["passes"]) & set(note["passes"]):
            return False
        if ours is not None and theirs is not None and (ours[0] > theirs[1] or theirs[0] > ours[1]):
            return False
        return note["works"] or note["key"] < self._note["key"]

    def _keep(self) -> None:
        while not self._closed.wait(NOTE_SECONDS):
            with suppress(OSError):  # the build itself finds out
                self._write()

    def _write(self, opened: tuple[str, int] | None = None) -> None:
        with self._lock:
            self._open |= {opened} if opened else set()
            note = {**self._note, "open": sorted(self._open), "progress": self.progress() if self.progress else None}
            path = self._folder / f".{_NOTE}"
            path.write_text(json.dumps(note), encoding="utf-8")
            path.replace(self._folder / _NOTE)


def _open_units(notes: Iterable[dict[str, Any]]) -> list[list[Any]]:
    return [each for note in notes for each in note["open"]]


def _parent(output: str, on_this_machine: bool) -> Path:
    if not output.startswith("s3://") and not on_this_machine:
        return Path(output)
    digest = hashlib.sha256(output.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"wanprep-{os.getuid()}-{digest}"


def _is_locked(folder: Path) -> bool:
    """Whether a process of this machine holds its lock, or nobody can know; False for a folder that is gone."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not lock_file(lock, folder, wait=False)
    finally:
        os.close(lock)
