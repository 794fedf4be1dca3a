"""The engine for many machines: the worker of `worker.py` on a Ray actor per GPU, units handed out by one more actor.

    driver       freezes the plan, starts the others, watches them; holds no frame, no latent, no encoder
    coordinator  an actor beside the driver: hands out units, and keeps what workers report until the driver reads it
    worker       an actor per GPU: fetches, decodes, encodes and writes to the storage; frames never leave its machine

Nothing of the build is stored in Ray: what has a commit is done. The units of a worker that dies (or its machine) are
handed out again; a driver that dies is started again, and hands out what has no commit yet.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from preprocess.build.scratch import scratch_folder
from preprocess.build.work_queue import WorkQueue
from preprocess.build.worker import ClipDone, Description, OnClip, UnitWorker
from preprocess.config import PrepConfig
from shards.console import LOG, set_up_logging
from shards.errors import UserError
from shards.storage import open_storage
from shards.storage.base import Storage
from shards.storage.local import TEMPORARY

Result = TypeVar("Result")
_LOOK_SECONDS = 0.2
_MAX_BROKEN_STARTS = 5
CORES_ON_CPU = 4
"""What a worker that encodes on the CPU is taken to share out, where nothing else is set: two decoders."""


class Placement(NamedTuple):
    """How many workers a cluster is asked for, and what each takes of a machine."""

    num_workers: int
    num_gpus: float
    num_cpus: float
    device: str


def place_workers(config: PrepConfig, machines: Sequence[Mapping[str, float]]) -> Placement:
    """A worker per GPU of the cluster; where it has none, as many as its cores allow. Raises UserError for neither.

    `machines`: what each has, in `GPU` and `CPU`. For `engine.decoders: auto` the machine counts that has the fewest
    cores a GPU.
    """
    resources = {name: sum(machine.get(name, 0) for machine in machines) for name in ("GPU", "CPU")}
    num_gpus = int(resources["GPU"])
    on_cpu = config.encoders.device == "cpu" or (config.encoders.device == "auto" and not num_gpus)
    num_cpus = config.engine.ray.num_cpus
    if num_cpus is None:
        shares = [int(each.get("CPU", 0) / each["GPU"]) for each in machines if not on_cpu and each.get("GPU", 0) >= 1]
        num_cpus = 1 + config.engine.num_decoders(min(shares, default=CORES_ON_CPU), 1, on_cpu)
    if not on_cpu and not num_gpus:
        raise UserError(
            f"encoders.device: {config.encoders.device!r}, but no machine of the Ray cluster has a GPU to lend",
            fix="`ray status` lists what there is; encoders.device=cpu encodes on processors",
        )
    room = int(resources["CPU"] // num_cpus) if on_cpu else num_gpus
    num_workers = config.engine.ray.num_workers or room
    if num_workers < 1:
        raise UserError(
            f"a worker takes {num_cpus} cores, and the cluster has {resources['CPU']:g} in all",
            fix="lower engine.ray.num_cpus or engine.decoders, or add machines",
        )
    return Placement(num_workers, 0 if on_cpu else 1, num_cpus, "cpu" if on_cpu else "cuda")


class Coordinator:
    """Hands out the units and keeps what the workers report. An actor: one call at a time, from many machines."""

    def __init__(self) -> None:
        self._queue = WorkQueue(())
        self._reports: list[ClipDone | int] = []
        self._lost: set[str] = set()

    def next(self, worker: str) -> int | None:
        """See WorkQueue. A worker that was taken for lost and is only out of reach gets nothing more."""
        return None if worker in self._lost else self._queue.next(worker)

    def add(self, units: list[int]) -> None:
        """See WorkQueue."""
        self._queue.add(units)

    def row(self, clip: ClipDone) -> None:
        """A candidate is written."""
        self._reports.append(clip)

    def done(self, worker: str, unit: int) -> None:
        """A unit is committed. A lost worker's counts when it is handed out again, and found to be there."""
        if worker not in self._lost:
            self._queue.done(worker, unit)
            self._reports.append(unit)

    def lost(self, worker: str) -> list[int] | UserError:
        """See WorkQueue; an error is a value here, since Ray would wrap it."""
        self._lost.add(worker)
        try:
            return self._queue.lost(worker)
        except UserError as error:
            return error

    def read(self) -> tuple[list[ClipDone | int], int, int]:
        """Reports since the last call; units that nobody has; units that somebody has."""
        reports, self._reports = self._reports, []
        return reports, self._queue.num_waiting, self._queue.num_out


class Worker:
    """A `UnitWorker` in an actor. What the user has to fix comes back as a value."""

    def __init__(self, config: PrepConfig, name: str, mark: str, device: str, num_cpus: float) -> None:
        self._config, self._name, self._mark = config, name, mark
        self._device, self._num_cpus = device, num_cpus
        self._worker: UnitWorker | None = None
        self._stack = ExitStack()

    def describe(self) -> Description | UserError | OSError:
        """Load the encoder; what it would write. An error where this machine does not see the driver's output."""
        set_up_logging(f"[{socket.gethostname()} {self._name}] ")
        try:
            if not open_storage(self._config.output).exists(self._mark):
                return UserError(
                    f"output: {self._config.output}: {socket.gethostname()} does not see what the driver wrote there",
                    expected="with engine.kind=ray, a folder that all machines share under one path, or s3://",
                )
            share = max(1, int(len(os.sched_getaffinity(0)) // self._num_cpus))
            scratch = self._stack.enter_context(scratch_folder(self._config.output, on_this_machine=True))
            self._worker = UnitWorker(self._config, scratch, device=self._device, num_workers=share)
            return self._worker.load()
        except (UserError, OSError) as error:
            return error

    def work(self, coordinator: Any) -> UserError | OSError | None:
        """Encode what the coordinator hands out until it has no more; an error that the user has to fix."""
        import ray

        if self._worker is None:
            raise RuntimeError("asked to work before describe")

        def units() -> Iterator[int]:
            while (unit := ray.get(coordinator.next.remote(self._name))) is not None:
                yield unit

        try:
            for commit in self._worker.commits(units(), on_row=coordinator.row.remote):
                ray.get(coordinator.done.remote(self._name, commit.unit))
        except (UserError, OSError) as error:
            return error
        return None

    def close(self) -> None:
        """Remove the scratch folder."""
        self._stack.close()


def run_ray(
    storage: Storage,
    config: PrepConfig,
    units: Iterable[int],
    *,
    on_description: Callable[[Description], None],
    on_row: OnClip,
    on_unit: Callable[[int], None],
) -> None:
    """Encode `units` on the workers of a Ray cluster. Raises UserError: no Ray, no cluster, no shared output.

    A worker that dies, alone or with its machine, is replaced as soon as the cluster has room, and its units are
    handed out again. Left by an exception the workers are ended; what is committed stays.
    """
    config = _with_absolute_paths(config)
    with _connected(config) as ray, _marked(storage) as mark:
        placement = place_workers(config, _machines(ray))
        decoders = config.engine.num_decoders(int(placement.num_cpus), 1, on_cpu=False)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"decoders": decoders})})
        LOG.info("ray: %d workers, each %g GPU, %g CPU and %d decoders", *placement[:3], decoders)
        driver = _Driver(ray, config, placement, mark, units)
        try:
            driver.run(on_description, on_row, on_unit)
        finally:
            driver.end()


def run_on_worker(config: PrepConfig, work: Callable[[PrepConfig], Result]) -> Result:
    """`work(config)` once, where a worker would run. Raises UserError as `run_ray` does, and what `work` raises."""
    config = _with_absolute_paths(config)
    with _connected(config) as ray:
        where = place_workers(config, _machines(ray))
        encoders = config.encoders.model_copy(update={"device": where.device})
        engine = config.engine.model_copy(update={"devices": ()})
        config = config.model_copy(update={"encoders": encoders, "engine": engine})
        task = ray.remote(_value_or_error).options(num_gpus=where.num_gpus, num_cpus=where.num_cpus)
        answer = ray.get(task.remote(work, config))
    if isinstance(answer, UserError | OSError):
        raise answer
    result: Result = answer
    return result


def _machines(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _value_or_error(work: Callable[[PrepConfig], Result], config: PrepConfig) -> Result | UserError | OSError:
    try:
        return work(config)
    except (UserError, OSError) as error:
        return error


class _Driver:
    """The living workers, and what each is doing."""

    def __init__(self, ray: Any, config: PrepConfig, placement: Placement, mark: str, units: Iterable[int]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._config, self._placement, self._mark = ray, config, placement, mark
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._coordinator = ray.remote(Coordinator).options(num_cpus=0, scheduling_strategy=here).remote()
        self._units = iter(units)
        self._workers: dict[str, Any] = {}
        self._asked: dict[Any, tuple[str, str]] = {}
        """By the reference of its answer: the worker, and `describe` or `work`."""
        self._idle: list[str] = []
        self._num_started = self._num_broken = 0
        self._seen: set[int] = set()

    def run(
        self, on_description: Callable[[Description], None], on_row: OnClip, on_unit: Callable[[int], None]
    ) -> None:
        """Until every unit is done."""
        while True:
            reports, num_waiting, num_out = self._ray.get(self._coordinator.read.remote())
            for report in reports:
                self._pass_on(report, on_row, on_unit)
            num_waiting += self._take_more(num_waiting)
            if not num_waiting and not num_out:
                return
            self._keep_busy(num_waiting, num_out)
            ready, _ = self._ray.wait(list(self._asked), timeout=_LOOK_SECONDS)
            for reference in ready:
                self._answer(reference, on_description)

    def end(self) -> None:
        """End the workers; those that are idle remove their scratch folders first."""
        with suppress(self._ray.exceptions.RayError):
            closing = [self._workers[name].close.remote() for name in self._idle]
            self._ray.wait(closing, num_returns=len(closing), timeout=10) if closing else None
        for worker in (*self._workers.values(), self._coordinator):
            self._ray.kill(worker)

    def _take_more(self, num_waiting: int) -> int:
        """Take units so that one waits for each worker, and no more: another build may want to share the rest."""
        units = list(islice(self._units, max(0, self._placement.num_workers - num_waiting)))
        if units:
            self._ray.get(self._coordinator.add.remote(units))
        return len(units)

    def _pass_on(self, report: ClipDone | int, on_row: OnClip, on_unit: Callable[[int], None]) -> None:
        if isinstance(report, int):
            on_unit(report)
        elif report.row.candidate not in self._seen:  # a unit that is done again reports its rows again
            self._seen.add(report.row.candidate)
            on_row(report)

    def _keep_busy(self, num_waiting: int, num_out: int) -> None:
        while num_waiting and self._idle:
            self._ask(self._idle.pop(), "work")
            num_waiting, num_out = num_waiting - 1, num_out + 1
        while len(self._workers) < min(self._placement.num_workers, num_waiting + num_out):
            self._start()

    def _start(self) -> None:
        name = f"worker-{self._num_started}"
        self._num_started += 1
        where = self._placement
        actor = self._ray.remote(Worker).options(
            num_gpus=where.num_gpus, num_cpus=where.num_cpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._workers[name] = actor.remote(self._config, name, self._mark, where.device, where.num_cpus)
        self._ask(name, "describe")

    def _ask(self, name: str, what: str) -> None:
        worker = self._workers[name]
        reference = worker.describe.remote() if what == "describe" else worker.work.remote(self._coordinator)
        self._asked[reference] = (name, what)

    def _answer(self, reference: Any, on_description: Callable[[Description], None]) -> None:
        name, what = self._asked.pop(reference)
        try:
            answer = self._ray.get(reference)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.WorkerCrashedError) as error:
            self._lose(name, what, str(error).splitlines()[0])
            return
        if isinstance(answer, UserError | OSError):
            raise answer
        if isinstance(answer, Description):
            on_description(answer)
            self._ask(name, "work")
        else:
            self._idle.append(name)

    def _lose(self, name: str, what: str, why: str) -> None:
        with suppress(self._ray.exceptions.RayError):  # a worker that is only out of reach must not ask for more
            self._ray.kill(self._workers.pop(name))
        again = self._ray.get(self._coordinator.lost.remote(name))
        if isinstance(again, UserError):
            raise again
        LOG.warning("ray: %s is lost (%s); its units are handed out again: %s", name, why, again or "it had none")
        self._num_broken = self._num_broken + 1 if what == "describe" else 0
        if self._num_broken >= _MAX_BROKEN_STARTS:
            raise UserError(
                f"{_MAX_BROKEN_STARTS} workers in a row died before they had loaded the encoder: {why}",
                fix="see the machines' memory (dmesg) and Ray's logs (/tmp/ray/session_latest/logs)",
            )


def _with_absolute_paths(config: PrepConfig) -> PrepConfig:
    """The config as it reads on another machine: no path is relative to this process's folder."""

    def absolute(value: str | None) -> str | None:
        return value if value is None or "://" in value else str(Path(value).absolute())

    return config.model_copy(
        update={
            "output": absolute(config.output),
            "corpus": config.corpus.model_copy(
                update={"location": absolute(config.corpus.location), "root": absolute(config.corpus.root)}
            ),
            "fetch": config.fetch.model_copy(update={"cache": absolute(config.fetch.cache)}),
            "encoders": config.encoders.model_copy(update={"checkpoint": absolute(config.encoders.checkpoint)}),
        }
    )


@contextmanager
def _marked(storage: Storage) -> Iterator[str]:
    """A small object for the block, by which other machines see that they read the same storage."""
    name = f"{TEMPORARY}ray-{secrets.token_hex(8)}"
    storage.put(name, b"")
    try:
        yield name
    finally:
        storage.delete(name)


@contextmanager
def _connected(config: PrepConfig) -> Iterator[Any]:
    """Ray, connected to the cluster that the config names, or to one of this machine alone for `local`."""
    ray = import_ray()
    address = config.engine.ray.address
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, log_to_driver=True, logging_level="ERROR", **options)
    except ray.exceptions.AuthenticationError:
        raise _no_cluster(address, "it asks for a token that this process does not have") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, str(error).splitlines()[0]) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """The module `ray`. Raises UserError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "engine.kind: ray, but Ray is not installed",
            fix="pip install -e '.[prep,ray]' -c constraints.txt, on every machine; or engine.kind=local",
        ) from None
    return ray


def _no_cluster(address: str, why: str) -> UserError:
    return UserError(
        f"engine.ray.address: {address!r}: no Ray cluster there: {why}",
        expected="auto (a cluster that this machine belongs to), host:port, or local",
        fix="`ray start --head` on one machine and `ray start --address=HOST:6379` on the others, with the same "
        "RAY_AUTH_MODE (and token) in the environment of every one of these and of wanprep: see "
        "docs/how-to/many-machines.md",
    )
