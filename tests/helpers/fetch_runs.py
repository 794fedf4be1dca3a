"""One fetch at a time, as a build does it, with what every fetch must leave behind: nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.records import Record
from preprocess.fetch.fetcher import FetchCounts, Fetcher
from preprocess.rejection import ClipRejected, Rejection


class FetchRun:
    """run(url, **config) -> the bytes that came; the scratch folder is empty and no thread is left afterwards."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.attempts = 0
        self.counts: FetchCounts | None = None

    def __call__(
        self, *urls: str | None, location: object = "nowhere", source: str = "video/a.json",
        defects: tuple[str, ...] = (), **config: Any,
    ) -> bytes:  # fmt: skip
        """The last URL's bytes; all are fetched one after another by one Fetcher."""
        options = {
            "allow_hosts": ("127.0.0.1",),
            "timeout_seconds": 5.0,
            "deadline_seconds": 20.0,
            "outage_minutes": 0.0,
            **config,
        }
        self._scratch.mkdir(exist_ok=True)
        threads = set(threading.enumerate())
        corpus = CorpusConfig(location=str(location))
        fetcher = Fetcher(FetchConfig(**options), corpus, self._scratch, threading.Event())
        content = b""
        try:
            with fetcher:
                for url in urls:
                    record = Record(clip_id="a", source=source, url=url, media_type="video", defects=defects)
                    with fetcher.fetched(record) as clip:
                        assert clip.num_bytes == clip.path.stat().st_size
                        self.attempts = clip.attempts
                        content = clip.path.read_bytes()
            return content
        finally:
            self.counts = fetcher.counts
            assert not list(self._scratch.iterdir())
            left = set(threading.enumerate()) - threads
            assert not [thread for thread in left if thread.name == "fetch-watchdog"]

    def refused(self, *urls: str | None, **options: Any) -> tuple[Rejection, int]:
        """The rejection and the attempts of a fetch that must fail; it tells no secret."""
        with pytest.raises(ClipRejected) as caught:
            self(*urls, **options)
        rejection = caught.value.rejection
        assert rejection.stage == "fetch"
        told = f"{caught.value} {caught.value!r} {chain_of(caught.value)}"
        assert "hush" not in told
        return rejection, caught.value.attempts


def chain_of(error: BaseException) -> str:
    """An exception and all that stand behind it."""
    behind = error.__cause__ or error.__context__
    return f"{error!r} {chain_of(behind) if behind else ''}"
