"""Names of files that are not yet there. They say whose they are: a dead process's are known, a living one's spared."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
from pathlib import Path

TEMPORARY = ".tmp-"
"""Start of the base name of a file that is not yet there, or of a scratch folder; no list shows them."""


def temporary_name() -> str:
    """A new name of this process's own."""
    return f"{_here()}{os.getpid()}-{secrets.token_hex(8)}"


def is_dead(name: str) -> bool:
    """Whether a process of this machine made that name and is gone. False of what cannot be known."""
    pid = name.removeprefix(_here()).partition("-")[0]
    if not name.startswith(_here()) or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def _here() -> str:
    """Where a process number means what it means here: on this machine, among this container's processes."""
    place = socket.gethostname()
    with contextlib.suppress(OSError):
        place += f" {Path('/proc/self/ns/pid').readlink()}"
    return f"{TEMPORARY}put-{hashlib.sha256(place.encode()).hexdigest()[:8]}-"
