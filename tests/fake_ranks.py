"""One rank of as many as you like, in this process: a group whose exchanges go nowhere, and a count of their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

_functional = torch.ops._c10d_functional
_c10d = torch.ops.c10d


@contextmanager
def fake_group(world_size: int, rank: int = 0) -> Iterator[None]:
    """The default group is one of `world_size` ranks, none of which is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class CountedExchange(TorchDispatchMode):
    """Calls and bytes that come in over the wire, by kind. A sum over the ranks comes twice: in parts, then whole."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is _c10d.allreduce_:
            (tensor,), group = args[0], dist.ProcessGroup.unbox(args[1])
            self._note("all-reduce", 2 * _size(tensor), group.size())
        elif packet is _c10d._allgather_base_:
            self._note("all-gather", _size(args[0]), dist.ProcessGroup.unbox(args[2]).size())
        elif packet is _functional.all_gather_into_tensor:
            self._note("velocity", _size(out), args[1])
        elif packet is _functional.all_to_all_single:
            self._note("all-to-all", _size(out), len(args[1]))
        elif packet is not _functional.wait_tensor and packet._qualified_op_name.startswith(("c10d", "_c10d")):
            raise AssertionError(f"{packet._qualified_op_name} is not counted")
        return out

    def _note(self, kind: str, size: int, ranks: int) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += size * (ranks - 1) // ranks


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
