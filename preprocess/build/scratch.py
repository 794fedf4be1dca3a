"""A scratch folder; what a killed process leaves is removed by the next process on the same root."""

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
# The host is in the name because some network file systems do not show another machine's locks.


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
