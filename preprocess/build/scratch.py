"""A scratch folder that a killed process leaves nothing of for long: the next one on the same root sweeps it up."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError
from shards.storage.local import lock_file

_PREFIX = f".tmp-build-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
# Of this machine alone: on some network file systems a lock that another machine holds is not seen.


@contextmanager
def scratch_folder(output: str, *, on_this_machine: bool = False) -> Iterator[Path]:
    """A folder for the length of the block, on the dataset's own file system where it is a folder (unless it may be
    another machine's, and `on_this_machine` is asked for).

    Each process holds a lock on its own; this machine's folders of the same root whose lock nobody holds are removed
    first. Those of other machines are `wanshards sweep`'s.
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
        _sweep(parent, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _parent(output: str, on_this_machine: bool) -> Path:
    if not output.startswith("s3://") and not on_this_machine:
        return Path(output)
    digest = hashlib.sha256(output.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"wanprep-{os.getuid()}-{digest}"


def _sweep(parent: Path, own: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        if folder == own:
            continue
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            if lock_file(lock, folder, wait=False):  # else its process lives, or nobody can know
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
