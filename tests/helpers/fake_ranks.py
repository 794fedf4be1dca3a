"""One rank of as many as you like, in this process: a group whose exchanges go nowhere, and a count of their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from shards.config import validate_config
from shards.gpus import GPUS
from train.config.model import DiTConfig
from train.config.train import TrainConfig
from train.estimate.communication import Exchange, Mesh, count_exchange
from train.geometry import SAVE_GROUPS, Shape
from train.parallel.fsdp import local_shard, sum_in_backward
from train.parallel.ranks import Layout, make_ranks
from train.run.trainee import make_trainee

DIMS = DiTConfig(dim=192, num_heads=24, num_layers=3, ffn_dim=448, text_dim=32, text_len=16)
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
        # torch 2.9 remembers shardings together with the mesh, and with it a group that is gone.
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()


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
        elif packet is _c10d._reduce_scatter_base_:
            self._note("reduce-scatter", _size(args[1]), dist.ProcessGroup.unbox(args[2]).size())
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


def exchange_of(layout: Layout, policy: str, shape: Shape, micro_steps: int, **more: Any) -> CountedExchange:
    """What rank 0 of a layout exchanges in an optimizer step of a small model: forward, backward, and the one sum.

    Args:
        shape: samples of a micro-step, and their tokens: a multiple of 15, the tokens of a latent frame.
    """
    config = small_config(layout, policy, shape, micro_steps, **more)
    with fake_group(layout.world_size):
        ranks = make_ranks(layout)
        trainee = make_trainee(config, ranks)
        latent = torch.zeros(shape.batch, DIMS.in_channels, shape.tokens // 15, 6, 10)
        text = torch.zeros(shape.batch, DIMS.text_len, DIMS.text_dim)
        image_first = torch.arange(shape.batch) == 0
        with CountedExchange() as counted:
            for place in range(micro_steps):
                if trainee.sharded:
                    sum_in_backward(trainee.model, wanted=place == micro_steps - 1)
                trainee.model(latent, torch.ones(shape.batch), image_first, text).sum().backward()
            ranks.reduce_gradients(trainee.replicated)
    return counted


def small_config(layout: Layout, policy: str, shape: Shape, micro_steps: int, **more: Any) -> TrainConfig:
    """A run of the small model whose global batch gives each share so many micro-steps."""
    values = {
        "output": "run",
        "max_steps": 1,
        "model": {"dims": DIMS.model_dump()},
        "data": {
            "root": "shards",
            "global_batch": shape.batch * micro_steps * layout.dp_size,
            "micro_batch": shape.batch,
        },
        "precision": {"compute": "bf16", "device": "cpu"},
        "checkpointing": {"policy": policy},
        **more,
    }
    return validate_config(TrainConfig, values, origin="the count's config")


def planned(layout: Layout, policy: str, shape: Shape, micro_steps: int, **more: Any) -> Exchange:
    """The same in closed form."""
    config = small_config(layout, policy, shape, micro_steps, **more)
    saves = [SAVE_GROUPS if policy == "none" else ()] * DIMS.num_layers
    mesh = Mesh(layout.world_size, 1, layout.base_shards, layout.ulysses)
    return count_exchange(config, DIMS, mesh, GPUS["h100"], shape, saves, compute_bytes=2)


def resident_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of this rank's parts of the base, and of what is whole on every rank, LoRA included."""
    parts = whole = 0
    for weight in model.parameters():
        local, _ = local_shard(weight)
        size = local.numel() * local.element_size()
        parts, whole = (parts + size, whole) if isinstance(weight, DTensor) else (parts, whole + size)
    return parts, whole
