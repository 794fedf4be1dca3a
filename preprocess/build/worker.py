"""A worker: the encoder on one device, with pools that fetch, decode and write around it. Every engine runs this.

    units ─▶ candidates ─▶ fetch (threads) ─▶ decode (threads) ─▶ encode (the caller's) ─▶ write (a thread) ─▶ commits

A unit's commit is a function of the unit and the config alone: not of the engine, the device's number, the units that
this worker did before, or how often the unit was begun. So an engine only hands out units, and may hand out a unit
twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from preprocess.build.clip import (
    Encoded,
    Fetched,
    Prepared,
    Preparer,
    encode_clip,
    latent_identity,
    write_clip,
)
from preprocess.build.pools import Pools
from preprocess.config import PrepConfig, with_choices
from preprocess.encoders.encoders import devices_of
from preprocess.fetch.fetcher import Fetcher
from preprocess.fetch.transfer import TransferStopped
from preprocess.plan.plan import Candidate, Plan, open_plan
from preprocess.rejection import INTERNAL_ERROR, Rejection
from preprocess.video.ffmpeg import ffmpeg_version, runs_that_end
from shards.errors import UserError
from shards.format.commit import Commit
from shards.format.ledger import LedgerRow
from shards.format.names import LATENTS
from shards.machine import usable_cores
from shards.storage import open_storage
from shards.storage.patience import set_patience
from shards.write.shard_writer import ShardWriter

if TYPE_CHECKING:
    from preprocess.encoders.encoders import Tokenizer

MAX_ERRORS_IN_A_ROW = 10


class ClipDone(NamedTuple):
    """A clip that is written."""

    row: LedgerRow
    pool_seconds: dict[str, float]
    """Since the clip before: how long the encoder's thread worked, and how long it waited for each other pool."""


OnClip = Callable[[ClipDone], None]


class Description(NamedTuple):
    """What a worker says of itself before it is given work; can be pickled."""

    identity: dict[str, Any]
    """Of the latents it would write: all workers of a dataset must agree."""
    note: str | None
    """Of an encoder that is not the published one: `random weights`."""
    provenance: dict[str, str]
    """Versions and device: a difference warns."""


class UnitWorker:
    """An encoder and what goes with it. Called with a unit's number, it returns the unit's commit.

    The encoder is loaded while the first clips are being fetched.

    Args:
        config: its `encoders.vae_precision` is no longer `auto`.
        scratch: a folder on this machine for downloaded clips and unfinished tars.
        device: overrides `encoders.device`.
        num_workers: how many such workers share this machine's cores.
    """

    def __init__(self, config: PrepConfig, scratch: Path, *, device: str | None = None, num_workers: int = 1) -> None:
        if device is not None:
            config = config.model_copy(update={"encoders": config.encoders.model_copy(update={"device": device})})
        self.config, self.scratch, self._num_workers = config, scratch, num_workers
        on_cpu = not (device or devices_of(config)[0]).startswith("cuda")
        self._num_decoders = config.engine.num_decoders(usable_cores(), num_workers, on_cpu)
        set_patience(config.storage)
        self._storage = open_storage(config.output)
        self._plan = open_plan(self._storage)
        self._description: Description | None = None
        self._tokenizer: Tokenizer | None = None
        self._has_tokenizer, self._stop = threading.Event(), threading.Event()

    def load(self) -> Description:
        """Load the tokenizer and the encoder, once, and return what this worker says of itself. Raises UserError."""
        from preprocess.encoders.encoders import load_tokenizer, load_vae_encoder

        if self._description is None:
            self._tokenizer = load_tokenizer(self.config.encoders)
            self._has_tokenizer.set()
            self.vae = load_vae_encoder(self.config.encoders)
            identity = latent_identity(self.config, self.vae)
            self._description = Description(identity, self.vae.note, {**library_versions(), **self.vae.provenance()})
        return self._description

    def count_tokens(self, text: str) -> int:
        """Tokens of a text; the threads that decode wait here for the tokenizer. Raises TransferStopped."""
        while not self._has_tokenizer.wait(0.1):
            if self._stop.is_set():
                raise TransferStopped("before the tokenizer was loaded")
        return cast("Tokenizer", self._tokenizer).count(text)

    def __call__(self, unit: int) -> Commit:
        """Encode one unit, and return the commit that is in the storage then. Raises UserError."""
        (commit,) = self.commits([unit])
        return commit

    def commits(
        self,
        units: Iterable[int],
        on_row: OnClip | None = None,
        on_description: Callable[[Description], None] = lambda about: None,
    ) -> Generator[Commit, None, None]:
        """Encode units as they are handed out. A unit's number is taken only when its first clip is begun.

        The next unit begins before the last one is complete. Commits come as units are complete, not in order: a clip
        that takes minutes delays only its own unit. `on_description` is called when the encoder is loaded, before
        anything is encoded; `on_row` with each clip that is written, by the writer's thread. If an exception ends it
        (Ctrl-C too), the open units are dropped and the committed ones stay. Raises UserError; a bad clip is a ledger
        row.
        """
        from preprocess.encoders.encoders import cpu_threads

        config = self.config
        self._stop = stop = threading.Event()
        num_fetchers = max(config.fetch.per_host, self._num_decoders)
        with (
            ExitStack() as stack,
            runs_that_end() as end_runs,
            Fetcher(config.fetch, config.corpus, self.scratch, stop, num_fetchers) as fetcher,
            closing(_ClipStages(self, fetcher, on_row)) as stages,
        ):

            def load() -> None:
                on_description(self.load())
                stack.enter_context(cpu_threads(self._num_decoders, self._num_workers))

            self.pools = Pools(
                stages,
                num_fetchers=num_fetchers,
                num_decoders=self._num_decoders,
                max_bytes=config.engine.max_queue_mib << 20,
                stop=stop,
                on_stop=end_runs,
                on_begun=load,
            )
            with closing(self.pools.run(_tasks(self._plan, units))) as commits:
                yield from commits

    def config_of(self, unit: int) -> PrepConfig:
        """The config with the choices that the unit's generation was frozen with."""
        return with_choices(self.config, self._plan.choices(unit))

    def open_writer(self, unit: int) -> ShardWriter:
        """A writer of one unit of latents, with this worker's identity."""
        about = self.load()
        return ShardWriter(self._storage, LATENTS, unit, about.identity, self.scratch, about.provenance)


class _Task(NamedTuple):
    unit: int
    place: int
    """Index in the unit."""
    candidate: Candidate | None
    """None: the unit is built again after later generations took over all its candidates; its tar is empty."""
    is_last: bool
    """Whether it is the last task of its unit."""


def _tasks(plan: Plan, units: Iterable[int]) -> Iterator[_Task]:
    for unit in units:
        candidates = plan.unit(unit) or (None,)
        for place, candidate in enumerate(candidates):
            yield _Task(unit, place, candidate, place == len(candidates) - 1)


@dataclass
class _OpenUnit:
    """A shard that is being written: clips in the plan's order, and those that came before their turn."""

    shard: ShardWriter
    rows: list[LedgerRow] = field(default_factory=list)
    num_written: int = 0
    early: dict[int, tuple[_Task, Encoded | None]] = field(default_factory=dict)


class ErrorsInARow:
    """Counts clips in a row that ended by an internal error. Raises UserError at the tenth."""

    def __init__(self) -> None:
        self._num = 0

    def add(self, clip_id: str, outcome: LedgerRow | Rejection | None) -> None:
        """Count a clip by its ledger row or its rejection; None: it was not rejected."""
        if outcome is None or outcome.reason != INTERNAL_ERROR:
            self._num = 0
            return
        self._num += 1
        if self._num == MAX_ERRORS_IN_A_ROW:
            raise UserError(
                f"{MAX_ERRORS_IN_A_ROW} clips in a row ended by an internal error, the last {clip_id} in stage "
                f"{outcome.stage}: {outcome.detail}",
                expected="an internal error now and then at most: this is the machine, or a defect of this program",
                fix="read the tracebacks above, then run the same command: it resumes at the open unit",
            )


class _ClipStages:
    """The stages of `pools.py` for clips. Several units may be open; each is written in the plan's order."""

    def __init__(self, worker: UnitWorker, fetcher: Fetcher, on_row: OnClip | None) -> None:
        self._worker, self._on_row = worker, on_row
        self._preparer = Preparer(worker.config, fetcher, worker.count_tokens, worker.scratch)
        self._open: dict[int, _OpenUnit] = {}
        self._errors = ErrorsInARow()
        self.held_bytes = 0

    def fetch(self, task: _Task) -> Fetched | None:
        """The clip's file."""
        return self._preparer.fetch(task.candidate) if task.candidate else None

    def decode(self, task: _Task, fetched: Fetched | None, reserve: Callable[[int], None]) -> Prepared | None:
        """Its windows' frames."""
        if fetched is None:
            return None
        return self._preparer.decode(fetched, reserve, self._worker.config_of(task.unit))

    def encode(self, task: _Task, prepared: Prepared | None) -> Encoded | None:
        """Their latents."""
        return encode_clip(prepared, self._worker.vae) if prepared else None

    def write(self, task: _Task, encoded: Encoded | None) -> Iterator[Commit]:
        """Write each clip whose turn has come, and the unit's commit after its last clip.

        Raises UserError: too many internal errors in a row.
        """
        unit = self._open.get(task.unit)
        if unit is None:
            unit = self._open[task.unit] = _OpenUnit(self._worker.open_writer(task.unit))
        unit.early[task.place] = task, encoded
        self.held_bytes += _num_bytes(encoded)
        while upcoming := unit.early.pop(unit.num_written, None):
            written, clip = upcoming
            self.held_bytes -= _num_bytes(clip)
            unit.num_written += 1
            row = write_clip(clip, unit.shard, self._worker.config) if clip else None
            if row:
                unit.rows.append(row)
                self._errors.add(row.clip_id, row)
            if written.is_last:
                commit = unit.shard.seal(unit.rows)
                self._open.pop(task.unit).shard.close()
                yield commit
            if self._on_row is not None and row:
                self._on_row(ClipDone(row, self._worker.pools.lap()))

    def close(self) -> None:
        """Drop the open units."""
        for unit in self._open.values():
            unit.shard.close()
        self._open.clear()


def _num_bytes(encoded: Encoded | None) -> int:
    if encoded is None:
        return 0
    previews = sum(len(window.preview or b"") for window in encoded.prepared.windows)
    return previews + sum(latent.nbytes for latent in encoded.latents if latent is not None)


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
