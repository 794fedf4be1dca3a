"""The frozen base sharded over ranks by FSDP2: a block's weights are gathered when it runs, and freed after it.

Only blocks are sharded: embeddings and head, 2 % of the real model, are replicated on every rank. So are the LoRA's
weights, plain tensors that FSDP2 ignores: their gradients are summed once an optimizer step, like any
(train/parallel/ranks.py), and optimizers, clipping and checkpoints see no shard. Nothing of the base is ever reduced.

The model is built without memory (`meta`), sharded, and then each rank allocates its local shards only and reads or
draws them: no rank holds the full model at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.model.dit import WanDiT


def shard_base(model: WanDiT, mesh: DeviceMesh, device: torch.device, *, offload: bool = False) -> None:
    """Shard a model that was built on `meta`, LoRA injected, over a mesh of one axis, and allocate the local shards.

    Weights are unset afterwards: see `load_dit` and `init_random` in train/model, and `reset` in train/lora.

    Args:
        mesh: the ranks that one copy of the base is sharded over. Copies exchange nothing: the base never changes.
        device: where blocks are computed and what is replicated is kept.
        offload: keep the shards in the host's memory; slower, and a GPU then holds little more than one block.
    Raises: ValueError for a model with memory already, or one whose base trains.
    """
    if any(not weight.is_meta for weight in model.parameters()):
        raise ValueError("shard_base needs a model on the meta device: else every rank would hold all of it first")
    adapters = {weight for name, weight in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    if any(weight.requires_grad for weight in model.parameters() if weight not in adapters):
        raise ValueError("shard_base needs a frozen base: gradients of shards are not reduced")
    # cast_forward_inputs would round the timestep to the compute dtype: 713.25 becomes 712 in bfloat16.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    host = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    replicated = adapters | {weight for name, weight in model.named_parameters() if not name.startswith("blocks.")}
    for module in (*model.blocks, model):  # the model itself holds no shard; as the root it orders the gathers
        fully_shard(module, mesh=mesh, ignored_params=replicated, mp_policy=policy, offload_policy=host)
    _allocate(model, device, torch.device("cpu") if offload else device)


def _allocate(model: nn.Module, device: torch.device, shard_device: torch.device) -> None:
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            place = shard_device if isinstance(weight, DTensor) else device
            empty = torch.empty_like(weight, device=place)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=weight.requires_grad))


def local_shard(weight: Tensor) -> tuple[Tensor, slice]:
    """The local shard of a parameter, sharing its memory, and which rows of the full parameter it is."""
    if not isinstance(weight, DTensor):
        return weight, slice(0, weight.shape[0] if weight.ndim else None)
    rank, size = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
    rows = -(-weight.shape[0] // size)
    start = min(rank * rows, weight.shape[0])
    local = weight.to_local()
    return local, slice(start, start + local.shape[0])
