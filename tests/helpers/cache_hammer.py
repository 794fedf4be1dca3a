"""A process that keeps and takes clips of a shared cache until it is told to end, or killed; quick to start."""

from __future__ import annotations

import errno
import hashlib
import random
from pathlib import Path

from preprocess.fetch.cache import ClipCache

KIB = 1024
BOUND = 64 * KIB


def content_of(name, num_bytes):
    return (hashlib.sha256(name.encode()).digest() * (num_bytes // 32 + 1))[:num_bytes]


def hammer(folder, scratch, seed, copies):
    """Keep and take clips of 1 to 8 KiB at random until told to end, checking every byte that comes back."""
    if copies:

        def no_link(self, target):
            if not Path(target).exists():
                raise FileNotFoundError(errno.ENOENT, "no such file")
            raise OSError(errno.EXDEV, "another file system")

        Path.hardlink_to = no_link
    draw, cache = random.Random(seed), ClipCache(folder, BOUND / 2**30)
    hits = 0
    (scratch / f"at-work-{seed}").touch()
    while not (scratch / "end").exists():
        name = str(draw.randrange(40))
        size = (int(name) % 8 + 1) * KIB
        path = scratch / f"clip-{seed}"
        if cache.take(name, path):
            hits += 1
        else:
            path.write_bytes(content_of(name, size))
            cache.keep(name, path)
        assert path.read_bytes() == content_of(name, size)
        path.unlink()
    assert hits
