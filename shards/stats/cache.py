"""Statistics of units, kept by their tar's digest: a run that was stopped, or that comes again, reads only what is new.

One `.npz` without pickles a unit, about 45 kB for 64 samples of 48 channels; a file that cannot be read is made anew.
"""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from pathlib import Path

import numpy as np

from shards.stats.counter import Histograms
from shards.stats.unit import UnitStats

VERSION = 2
"""Of what is kept: raise it when a number changes its meaning."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/wanshards/stats`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanshards" / "stats"


class StatsCache:
    """A folder of finished units. Processes may share it: files are whole or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / f"v{VERSION}"

    def read_latents(self, name: str) -> UnitStats | None:
        """What was kept under `name`; None where there is nothing, or nothing that can be read."""
        try:
            with np.load(self._path(name), allow_pickle=False) as file:
                head = json.loads(file["head"].tobytes())
                return UnitStats(
                    head["keys"],
                    head["clips"],
                    file["is_image"],
                    file["features"],
                    file["prints"],
                    head["digests"],
                    head["previews"],
                    Histograms.of(head["tally"]),
                )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def write_latents(self, name: str, stats: UnitStats) -> None:
        """Keep a unit."""
        head = {field: getattr(stats, field) for field in ("keys", "clips", "digests", "previews")}
        arrays = {field: getattr(stats, field) for field in ("is_image", "features", "prints")}
        self._write(name, {**head, "tally": stats.tally.plain()}, arrays)

    def read_tally(self, name: str) -> Histograms | None:
        """A text unit's counts; None as above."""
        try:
            with np.load(self._path(name), allow_pickle=False) as file:
                return Histograms.of(json.loads(file["head"].tobytes())["tally"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def write_tally(self, name: str, tally: Histograms) -> None:
        """Keep a text unit's counts."""
        self._write(name, {"tally": tally.plain()}, {})

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.npz"

    def _write(self, name: str, head: dict[str, object], arrays: dict[str, np.ndarray]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".writing-{secrets.token_hex(8)}")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
        temporary.replace(path)
