"""A worker: the encoder on one device, decoders ahead of it, a writer behind. Every engine runs this and nothing else.

    units ─▶ candidates ─▶ decoders (threads) ─▶ encoder (the caller's thread) ─▶ writer (a thread) ─▶ commits

A unit's commit is a function of the unit and the config alone: not of the engine, the device's number, the units that
this worker did before, or how often the unit was begun. So an engine only deals units, and may deal one again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from preprocess.build.clip import Encoded, Prepared, Preparer, encode_clip, latent_identity, write_clip
from preprocess.build.ordered_pool import in_order
from preprocess.config import PrepConfig
from preprocess.fetch.fetcher import Fetcher
from preprocess.plan.plan import Candidate, Plan, open_plan
from preprocess.video.ffmpeg import ffmpeg_version, runs_that_end
from shards.format.commit import Commit
from shards.format.ledger import LedgerRow
from shards.format.names import LATENTS
from shards.storage import open_storage
from shards.storage.patience import set_patience
from shards.write.shard_writer import ShardWriter

OnRow = Callable[[LedgerRow], None]


class Description(NamedTuple):
    """What a worker says of itself before it is given work; can be pickled."""

    identity: dict[str, Any]
    """Of the latents it would write: all workers of a dataset must agree."""
    note: str | None
    """`random weights`."""
    provenance: dict[str, str]
    """Versions and device: a difference warns."""


class UnitWorker:
    """The loaded encoder and what goes with it. Called with a unit's number, it returns the unit's commit.

    Args:
        config: with `encoders.vae_precision` settled (not `auto`).
        scratch: a folder of this machine for clips and growing tars.
        device: overrides `encoders.device`.
        num_workers: how many such workers share this machine's cores.
    """

    def __init__(self, config: PrepConfig, scratch: Path, *, device: str | None = None, num_workers: int = 1) -> None:
        from preprocess.encoders.encoders import load_tokenizer, load_vae_encoder

        if device is not None:
            config = config.model_copy(update={"encoders": config.encoders.model_copy(update={"device": device})})
        self._config, self._scratch, self._num_workers = config, scratch, num_workers
        set_patience(config.storage)
        self._storage = open_storage(config.output)
        self._plan = open_plan(self._storage)
        self._tokenizer = load_tokenizer(config.encoders)
        self._vae = load_vae_encoder(config.encoders)
        identity = latent_identity(config, self._vae)
        self.description = Description(identity, self._vae.note, {**library_versions(), **self._vae.provenance()})

    def __call__(self, unit: int) -> Commit:
        """Encode one unit, and return the commit that is in the storage then. Raises UserError."""
        (commit,) = self.commits([unit])
        return commit

    def commits(self, units: Iterable[int], on_row: OnRow | None = None) -> Generator[Commit, None, None]:
        """Encode units as they are dealt, decoding ahead into the next: a unit's number is taken when it is needed.

        `on_row` is told each candidate's row, by the writer's thread. Left by an exception (Ctrl-C among them) the
        open units are dropped; what is committed stays. Raises UserError; a bad clip is a ledger row.
        """
        from preprocess.encoders.encoders import cpu_threads

        config, stop = self._config, threading.Event()
        with (
            runs_that_end() as end_runs,
            Fetcher(config.fetch, config.corpus, self._scratch, stop, config.engine.decoders) as fetcher,
            _UnitWriter(self, on_row) as writer,
            cpu_threads(config.engine.decoders, self._num_workers),
        ):
            preparer = Preparer(config, fetcher, self._tokenizer.count)
            prepared = in_order(
                _tasks(self._plan, units),
                lambda task, reserve: (task, task.candidate and preparer.prepare(task.candidate, reserve)),
                num_workers=config.engine.decoders,
                max_bytes=config.engine.max_queue_mib << 20,
                stop=stop,
                on_stop=end_runs,
            )
            with closing(prepared), closing(self._written(prepared, writer)) as written:
                yield from (commit for commit in written if commit is not None)

    def _written(
        self, prepared: Iterator[tuple[_Task, Prepared | None]], writer: _UnitWriter
    ) -> Generator[Commit | None]:
        """Encode in this thread, write in another, a few clips behind."""
        encoded = ((task, clip and encode_clip(clip, self._vae)) for task, clip in prepared)
        return in_order(
            encoded, lambda item, _: writer.write(*item), num_workers=1, max_bytes=0, stop=threading.Event(),
            name="writer",
        )  # fmt: skip

    def open_writer(self, unit: int) -> ShardWriter:
        """A writer of one unit of latents, with this worker's identity."""
        about = self.description
        return ShardWriter(self._storage, LATENTS, unit, about.identity, self._scratch, about.provenance)

    @property
    def config(self) -> PrepConfig:
        """The config it works by."""
        return self._config


class _Task(NamedTuple):
    unit: int
    candidate: Candidate | None
    """None: of the unit made anew, later generations have taken up every candidate; its tar is empty."""
    is_last: bool
    """Of its unit."""


def _tasks(plan: Plan, units: Iterable[int]) -> Iterator[_Task]:
    for unit in units:
        candidates = plan.unit(unit) or (None,)
        for place, candidate in enumerate(candidates, 1):
            yield _Task(unit, candidate, place == len(candidates))


class _UnitWriter:
    """The shard that is being written; one thread calls it, clip by clip in order."""

    def __init__(self, worker: UnitWorker, on_row: OnRow | None) -> None:
        self._worker, self._on_row = worker, on_row
        self._shard: ShardWriter | None = None
        self._rows: list[LedgerRow] = []

    def __enter__(self) -> _UnitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, task: _Task, encoded: Encoded | None) -> Commit | None:
        """Write one clip; the unit's commit after its last."""
        if self._shard is None:
            self._shard = self._worker.open_writer(task.unit)
        row = write_clip(encoded, self._shard, self._worker.config) if encoded else None
        self._rows += [row] if row else []
        commit = self._shard.seal(self._rows) if task.is_last else None
        if task.is_last:
            self._close()
        if self._on_row is not None and row:
            self._on_row(row)
        return commit

    def _close(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard, self._rows = None, []


def library_versions() -> dict[str, str]:
    """Versions that are recorded with each shard; a difference warns and refuses nothing."""
    import platform

    import diffusers
    import numpy
    import torch
    import transformers

    return {
        "ffmpeg": ffmpeg_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
