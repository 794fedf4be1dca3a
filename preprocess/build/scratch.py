"""The scratch folder of a process, and what it says to others: who is at work on an output, on what, how fast.

OUTPUT/.tmp-build-<host>-…/              of one process, which holds a lock on it; removed by the next one when dead
OUTPUT/.tmp-build-<host>-…/at-work.json  of a build: process, part of the work, progress, open units; rewritten every
                                         few seconds
OUTPUT/.tmp-build-<host>-…/outage-….json a host that it is waiting for (`preprocess.fetch.hosts`)

Where the output is in a bucket, the scratch folder is in /tmp, and the note is an object of the bucket:

OUTPUT/.tmp-build-<host>-<process>-…/at-work.json  the same, with the outages
OUTPUT/.tmp-build-claims/<kind>/<unit>.<number>    whose unit it is, by the name of its owner's note
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
from typing import TYPE_CHECKING, Any, Literal, cast

from shards.console import LOG
from shards.errors import MissingObject, StorageFailure, UserError
from shards.format.commit import is_committed
from shards.storage import open_storage
from shards.storage.base import Storage
from shards.storage.local import LocalStorage, is_dead, lock_file, temporary_name

if TYPE_CHECKING:
    from shards.storage.s3 import S3Storage

IfBusy = Literal["wait", "share", "refuse"]
"""What a build does that finds another at work on the same units."""
NOTE_SECONDS, STALE_SECONDS, POLL_SECONDS = 5.0, 180.0, 0.5
"""Between two notes of a build; age at which another machine's note counts no longer; between two looks at others."""
BUCKET_NOTE_SECONDS, BUCKET_POLL_SECONDS = 15.0, 5.0
"""The same for a bucket, where each is a request."""
MAX_NOTE_BYTES = 1 << 20

_FOLDERS = ".tmp-build-"
# The host is in the name because some network file systems do not show another machine's locks.
_PREFIX = f"{_FOLDERS}{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
_NOTE = "at-work.json"
_CLAIMS = f"{_FOLDERS}claims/"
_KEYS = {"key", "host", "pid", "passes", "units", "works", "open", "progress"}


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


def builds_at_work(output: str) -> list[dict[str, Any]]:
    """The notes of the builds that work on `output` now, the oldest first."""
    return _open_board(open_storage(output), output, None).others()


def describe_note(note: dict[str, Any]) -> str:
    """Who is at work, in one line."""
    since = datetime.fromtimestamp(note["key"][0]).astimezone()
    return f"process {note['pid']} on {note['host']}, at work since {since:%d %b %H:%M:%S}"


class AtWork:
    """A build's own note, and its share of the units where another build works beside it.

    Args:
        folder: its scratch folder.
        passes: kinds of shards that it writes, such as `latents` and `text/default`.
        units: first and last unit of its part; None: all.
    """

    def __init__(
        self, storage: Storage, output: str, folder: Path, passes: Iterable[str], units: tuple[int, int] | None
    ) -> None:
        self._output = output
        self._board = _open_board(storage, output, folder)
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
        self._board.close(is_done=exception[0] is None)

    def begin(self, if_busy: IfBusy) -> None:
        """Wait for builds that are at work on the same units, or refuse, or go on beside them.

        Of two that begin at the same time the one with the lower key goes first.
        """
        told = False
        while others := [note for note in self._board.others() if self._is_before(note)]:
            who = f"{self._output}: {describe_note(others[0])}, builds the same units"
            if if_busy == "refuse":
                raise UserError(who, fix="wait for it, stop it, or use --if-busy wait or --if-busy share")
            if if_busy == "share":
                LOG.warning("%s: the units are shared", who)
                break
            if not told:
                LOG.warning("%s: waiting until it ends (--if-busy share works beside it)", who)
            told = True
            time.sleep(self._board.poll_seconds())
        self._note["works"] = True
        self._write()

    def claim(self, kind: str, units: Iterable[int]) -> Iterator[int]:
        """`units` one by one, as they are asked for, without those that another build has done or is doing."""
        for unit in units:
            if self._board.claim(kind, unit):
                yield unit

    def wait_for_others(self, kind: str, units: Iterable[int]) -> list[int]:
        """Wait while others are doing `units`; those that are left to be done here, without a commit."""
        while True:
            left = [unit for unit in units if not is_committed(self._board.storage, kind, unit)]
            if not left or not self._board.all_taken(kind, left):
                return left
            time.sleep(self._board.poll_seconds())

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
            self._write()

    def _write(self) -> None:
        self._board.write({**self._note, "progress": self.progress() if self.progress else None})


class _FolderBoard:
    """Notes in the scratch folders; the lock on its folder says whether a build lives. A note lists its open units."""

    def __init__(self, storage: Storage, parent: Path, own: Path | None) -> None:
        self.storage, self._parent, self._own = storage, parent, own
        self._note: dict[str, Any] = {}
        self._open: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def poll_seconds(self) -> float:
        return POLL_SECONDS

    def others(self) -> list[dict[str, Any]]:
        found = []
        for path in self._parent.glob(f"{_FOLDERS}*/{_NOTE}"):
            is_ours = path.parent.name.startswith(_PREFIX)
            try:
                if path.parent == self._own or (is_ours and not _is_locked(path.parent)):
                    continue
                if not is_ours and time.time() - path.stat().st_mtime > STALE_SECONDS:
                    continue
                note = _parse_note(path.read_bytes())
                note["outages"] = _outages(path.parent)
            except (OSError, ValueError):  # removed or rewritten meanwhile
                continue
            found.append(note)
        return sorted(found, key=lambda note: note["key"])

    def write(self, note: dict[str, Any], opened: tuple[str, int] | None = None) -> None:
        if self._own is None:
            return
        with self._lock, suppress(OSError):  # the build itself finds out
            self._note, self._open = note, self._open | ({opened} if opened else set())
            path = self._own / f".{_NOTE}"
            path.write_text(json.dumps({**note, "open": sorted(self._open)}), encoding="utf-8")
            path.replace(self._own / _NOTE)

    def claim(self, kind: str, unit: int) -> bool:
        lock = os.open(self._parent, os.O_RDONLY)
        try:
            lock_file(lock, self._parent)  # others must not claim between the look and the note
            if [kind, unit] in self._taken() or is_committed(self.storage, kind, unit):
                return False
            self.write(self._note, (kind, unit))
        finally:
            os.close(lock)
        return True

    def all_taken(self, kind: str, units: list[int]) -> bool:
        taken = self._taken()
        return all([kind, unit] in taken for unit in units)

    def close(self, is_done: bool) -> None:
        """The note goes with its folder."""

    def _taken(self) -> list[list[Any]]:
        return [each for note in self.others() for each in note["open"]]


class _BucketBoard:
    """Notes and claims as objects of the bucket, for builds of any machine.

    A claim is a numbered object that names the note of its owner. A unit belongs to the owner of its last claim as
    long as that one's note is refreshed; who takes it over writes the next number, with `if_absent`: only one can. Ages
    are differences of the server's own times. Where a server ignores `If-None-Match`, two builds that claim a unit
    within the same moment may both do it; its commit decides, as ever.
    """

    def __init__(self, storage: S3Storage, folder: Path | None) -> None:
        self.storage, self._folder = storage, folder
        self._name = f"{temporary_name('build')}/{_NOTE}"
        self._written: dict[str, Any] | None = None
        self._next_write = 0.0
        self._claims: set[tuple[str, int]] = set()

    def poll_seconds(self) -> float:
        return BUCKET_POLL_SECONDS

    def others(self) -> list[dict[str, Any]]:
        found, now = [], self._now()
        for name in self._notes():
            if name != self._name and self._lives(name, now):
                with suppress(MissingObject, ValueError):
                    found.append(_parse_note(self.storage.get(name, MAX_NOTE_BYTES)))
        return sorted(found, key=lambda note: note["key"])

    def write(self, note: dict[str, Any]) -> None:
        if self._folder is None:
            return
        is_first, was = self._written is None, self._written or {}
        if time.monotonic() < self._next_write and was.get("works") == note["works"]:
            return
        note = {**note, "open": [], "outages": _outages(self._folder)}
        try:
            self.storage.put(self._name, json.dumps(note).encode(), patient=is_first)
        except UserError as error:
            if not is_first:
                return  # the build itself finds out; the next note may come through
            if not isinstance(error, StorageFailure):
                raise
            LOG.warning("other machines cannot see that this build is at work: %s", error.problem)
        self._written, self._next_write = note, time.monotonic() + BUCKET_NOTE_SECONDS
        if is_first:
            self._drop_dead()

    def claim(self, kind: str, unit: int) -> bool:
        for each in [each for each in self._claims if is_committed(self.storage, *each)]:
            self._release(*each)
        try:
            return self._claim(kind, unit)
        except MissingObject:  # its owner has just finished it
            return False

    def _claim(self, kind: str, unit: int) -> bool:
        number, owner = self._last_claim(kind, unit)
        if owner not in (None, self._name) and self._lives(owner, self._now()):
            return False
        if owner != self._name:
            name, ours = f"{_claims_of(kind, unit)}{number:04d}", self._name.encode()
            self.storage.put(name, ours, if_absent=True)  # False too where only the answer to the first was lost
            if self.storage.get(name, MAX_NOTE_BYTES) != ours:
                return False
        self._claims.add((kind, unit))
        if is_committed(self.storage, kind, unit):
            self._release(kind, unit)
            return False
        return True

    def all_taken(self, kind: str, units: list[int]) -> bool:
        now = self._now()
        owners = {unit: self._last_claim(kind, unit)[1] for unit in units}
        return all(owner not in (None, self._name) and self._lives(owner, now) for owner in owners.values())

    def close(self, is_done: bool) -> None:
        """Remove the note, which frees the units that are not done. The claims stay where the storage may be out."""
        with suppress(UserError):  # what is left counts no longer after some minutes, and `wanshards sweep` removes it
            for kind, unit in sorted(self._claims) if is_done else ():
                self._release(kind, unit, patient=False)
            self.storage.delete(self._name, patient=False)

    def _notes(self) -> list[str]:
        return [entry.name for entry in self.storage.list(_FOLDERS) if entry.name.endswith(f"/{_NOTE}")]

    def _now(self) -> float:
        """The server's time, at most some seconds ago."""
        if self._written is not None:
            with suppress(MissingObject):
                return self.storage.modified(self._name)
        return time.time()

    def _lives(self, name: str | None, now: float) -> bool:
        """Whether the build of a note lives: it is not a dead process of this machine, and the note is refreshed."""
        if name is None or is_dead(name.partition("/")[0]):
            return False
        try:
            return now - self.storage.modified(name) <= STALE_SECONDS
        except MissingObject:
            return False

    def _last_claim(self, kind: str, unit: int) -> tuple[int, str | None]:
        """The number that the next claim of a unit has, and the note of the last one's owner."""
        found = [entry.name for entry in self.storage.list(_claims_of(kind, unit))]
        numbers = [int(name.rpartition(".")[2]) for name in found if name.rpartition(".")[2].isdecimal()]
        if not numbers:
            return 0, None
        with suppress(MissingObject):  # released meanwhile
            name = f"{_claims_of(kind, unit)}{max(numbers):04d}"
            return max(numbers) + 1, self.storage.get(name, MAX_NOTE_BYTES).decode(errors="replace")
        return 0, None

    def _release(self, kind: str, unit: int, *, patient: bool = True) -> None:
        for entry in reversed(list(self.storage.list(_claims_of(kind, unit)))):
            self.storage.delete(entry.name, patient=patient)
        self._claims.discard((kind, unit))

    def _drop_dead(self) -> None:
        """Remove notes of dead builds, and their claims of units that are done: nobody claims those again."""
        now = self._now()
        with suppress(UserError):
            for name in self._notes():
                if name != self._name and not self._lives(name, now):
                    self.storage.delete(name, patient=False)
            for entry in list(self.storage.list(_CLAIMS)):
                kind, _, unit = entry.name.removeprefix(_CLAIMS).partition(".")[0].rpartition("/")
                if kind and unit.isdecimal() and is_committed(self.storage, kind, int(unit)):
                    self.storage.delete(entry.name, patient=False)


def _open_board(storage: Storage, output: str, folder: Path | None) -> _FolderBoard | _BucketBoard:
    if isinstance(storage, LocalStorage):
        return _FolderBoard(storage, _parent(output, False), folder)
    return _BucketBoard(cast("S3Storage", storage), folder)


def _claims_of(kind: str, unit: int) -> str:
    return f"{_CLAIMS}{kind}/{unit:06d}."


def _parse_note(data: bytes) -> dict[str, Any]:
    """A note as it was written. Raises ValueError for anything else."""
    note = json.loads(data)
    if not isinstance(note, dict) or not note.keys() >= _KEYS:
        raise ValueError("not a note")
    return {"outages": [], **note}


def _outages(folder: Path) -> list[dict[str, Any]]:
    """What `preprocess.fetch.hosts` says of hosts that are waited for."""
    found = []
    for path in folder.glob("outage-*.json"):
        with suppress(OSError, ValueError):  # removed or rewritten meanwhile
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


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
