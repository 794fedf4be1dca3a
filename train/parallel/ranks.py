"""Many processes, one run: their layout, each one's share of the work, and what they exchange.

    rank = (replica · shard size + shard) · ulysses + place in the sequence

Ranks that share a sample's tokens (Ulysses) are neighbours, and so are those that one copy of the base is sharded over.
A step's slots are divided among the groups of `ulysses` ranks. Trained weights are on every rank, unless the base
trains and is sharded (train/parallel/fsdp.py). Their gradients are summed over all ranks once an optimizer step: a
slot's loss is already divided by the global batch, and each rank of a sequence holds a part of its slots' gradients. So
a sum is right in every layout, and a mean in none.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from shards.errors import UserError
from train.config.train import ParallelConfig
from train.launch.failure import LAUNCHER_VARIABLE

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

WATCH_MARGIN_SECONDS = 60.0
"""An exchange gives up later than the watch (train/launch/heartbeat.py), which can say who is missing."""


class World(NamedTuple):
    """Where a launcher has put this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of the process on its machine, and of its GPU there."""
    local_size: int = 1
    """Processes on this machine."""


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run share samples, tokens and the base."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    base_shards: int = 1
    """Neighbouring ranks that one copy of the base is sharded over; 1: every rank holds all of it."""
    ulysses: int = 1
    """Neighbouring ranks that share the tokens of one sample."""
    streamed: bool = False
    """Frozen blocks lie in the host's memory."""

    @property
    def shard(self) -> int:
        """Size of the mesh along its second axis: groups of `ulysses` ranks that share one copy of the base."""
        return max(1, self.base_shards // self.ulysses)

    @property
    def replicate(self) -> int:
        """Size of the mesh along its first axis."""
        return self.world_size // (self.shard * self.ulysses)

    @property
    def memory_parts(self) -> tuple[int, int, bool]:
        """What of it decides a rank's memory: `base_shards`, `ulysses`, `streamed`."""
        return self.base_shards, self.ulysses, self.streamed

    @property
    def dp_size(self) -> int:
        """Shares that a step's slots are divided into."""
        return self.world_size // self.ulysses

    @property
    def dp_rank(self) -> int:
        """Which of them is this rank's."""
        return self.rank // self.ulysses

    @property
    def ulysses_rank(self) -> int:
        """Which part of its samples' tokens is this rank's."""
        return self.rank % self.ulysses

    def __str__(self) -> str:
        names = {"replicate": self.replicate, "shard": self.shard, "ulysses": self.ulysses}
        mesh = " × ".join(f"{name} {size}" for name, size in names.items())
        sharded = f", base over {self.base_shards}" if self.base_shards > 1 else ""
        streamed = ", blocks streamed from the host's memory" if self.streamed else ""
        return f"{self.world_size} processes: {mesh}{sharded}{streamed}"


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as launchers set them; one process where none has.

    Raises UserError for values that cannot be, or when only some are there.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, and {', '.join(missing)} not set",
            expected=f"all of {', '.join(names)}, as torchrun sets them",
        )
    rank, size, local_rank = (int(environment[name]) for name in names[:3])
    local_size = int(environment.get("LOCAL_WORLD_SIZE", "0")) or size
    if not (0 <= rank < size and 0 <= local_rank < local_size):
        raise UserError(f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size}")
    return World(rank, size, local_rank, local_size)


class Ranks:
    """The processes of a run as one of them sees them. Alone, nothing is exchanged."""

    def __init__(self, layout: Layout | None = None, sequence: ProcessGroup | None = None, reason: str = "") -> None:
        self.layout = layout or Layout()
        self.sequence = sequence
        """Those that share this rank's samples; None without Ulysses."""
        self.reason = reason
        """Why this layout, for people."""

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.layout.world_size == 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.layout.rank == 0

    @property
    def writes_rows(self) -> bool:
        """Whether this rank writes its rows of what is sharded: those of one copy do."""
        return self.layout.rank < self.layout.base_shards

    def reduce_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of all ranks into each one's `.grad`, by one exchange of one flat bucket.

        Called once an optimizer step, before the overflow check: what overflowed on one rank overflows on all.
        """
        if self.alone or not weights:
            return
        import torch
        import torch.distributed as dist

        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view(weight.shape)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Sums over all ranks, in float64."""
        return self._exchange(numbers, "SUM")

    def all_reduce_max(self, *numbers: float) -> list[float]:
        """Maxima over all ranks, in float64."""
        return self._exchange(numbers, "MAX")

    def _exchange(self, numbers: Sequence[float], operation: str) -> list[float]:
        if self.alone:
            return list(numbers)
        import torch
        import torch.distributed as dist

        # On the CPU: the host waits for its peers, not for the GPU's queue.
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        result: list[float] = values.tolist()
        return result

    def broadcast(self, value: Any) -> Any:
        """A JSON value of rank 0's, on every rank."""
        return value if self.alone else self.gather(value if self.is_first else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, by rank."""
        if self.alone:
            return [value]
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.layout.world_size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def base_mesh(self, device_type: str, *, trained: bool = False) -> DeviceMesh:
        """The ranks that this one's copy of the base is sharded over; of a base that trains with its other copies, if
        any, as the first axis. Every rank must call it, at the same place."""
        from torch.distributed.device_mesh import init_device_mesh

        size = self.layout.base_shards
        sizes = (self.layout.world_size // size, size)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("copy", "part"))
        return mesh if trained and sizes[0] > 1 else mesh["part"]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_reduce_max(0.0)


ALONE = Ranks()


@contextlib.contextmanager
def process_group(
    config: ParallelConfig, world: World, device: torch.device, patience_seconds: float = 0.0
) -> Iterator[World]:
    """The process group of the run, met at MASTER_ADDR and MASTER_PORT. An existing one is used as it is.

    Tensors of the CPU are exchanged by gloo, those of a GPU by NCCL. Until `use_step_timeout` the timeout is that
    of the start: it includes loading, channels that are built at their first use, and compiling.
    """
    import torch.distributed as dist

    from train.launch.heartbeat import open_store

    if world.size == 1 or dist.is_initialized():
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    seconds = config.start_timeout_seconds + patience_seconds + WATCH_MARGIN_SECONDS
    timeout = datetime.timedelta(seconds=seconds)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    if LAUNCHER_VARIABLE in os.environ:
        options["store"] = open_store(world.rank, world.size, timeout)
    dist.init_process_group(backend, timeout=timeout, rank=world.rank, world_size=world.size, **options)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def use_step_timeout(config: ParallelConfig, patience_seconds: float) -> None:
    """From here on exchanges have the shorter timeout of a step, and of a storage that another rank waits for."""
    import torch.distributed as dist

    if dist.is_initialized():
        timeout = datetime.timedelta(seconds=config.step_timeout_seconds + patience_seconds + WATCH_MARGIN_SECONDS)
        dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)


def make_ranks(layout: Layout, reason: str = "") -> Ranks:
    """Build the groups of a layout. Every rank must call it, at the same place."""
    if layout.world_size == 1:
        return Ranks(layout, reason=reason)
    import torch.distributed as dist

    sequence = None
    if layout.ulysses > 1:
        starts = range(0, layout.world_size, layout.ulysses)
        groups = [list(range(start, start + layout.ulysses)) for start in starts]
        sequence, _ = dist.new_subgroups_by_enumeration(groups)
    return Ranks(layout, sequence, reason)


def smallest(world: World, device_bytes: int | None) -> int | None:
    """The smallest device memory of all ranks, so that all choose the same layout; None where one has no GPU."""
    return int(-Ranks(Layout(world.rank, world.size)).all_reduce_max(-float(device_bytes or 0))[0]) or None
