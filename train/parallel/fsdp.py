"""The frozen base spread over ranks by FSDP2: a block's weights are gathered when it runs, and let go of again.

Only blocks are spread: embeddings and head, 2 % of the real model, stay whole on every rank. So do the LoRA's weights,
which are plain tensors that FSDP2 is told to ignore: their gradients are summed once an optimizer step, like any
(train/parallel/ranks.py), and optimizers, clipping and checkpoints see no shard. Nothing of the base is ever reduced.

The model is built without memory (`meta`), spread, and then each rank makes room for its own rows alone and reads or
draws them: no rank holds the whole model at any time.
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
    """Spread a model that was built on `meta`, its LoRA injected, over a mesh of one axis, and make room for its parts.

    Weights are unset afterwards: see `weights.load_dit`, `model.init_random`, `lora.reset`.

    Args:
        mesh: the ranks that one copy of the base is spread over. Other copies are other ranks' business: what never
            changes needs no word between them.
        device: where blocks are computed and all that is whole is kept.
        offload: keep the parts in the host's memory; slower, and a card then holds little more than one block.
    Raises: ValueError for a model with memory already, or one whose base trains.
    """
    if any(not weight.is_meta for weight in model.parameters()):
        raise ValueError("spread wants a model on the meta device: else every rank would hold it whole first")
    adapters = {weight for name, weight in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    if any(weight.requires_grad for weight in model.parameters() if weight not in adapters):
        raise ValueError("spread wants a frozen base: gradients of shards are not reduced")
    # cast_forward_inputs would round the timestep to the compute dtype: 713.25 becomes 712 in bfloat16.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    host = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    whole = adapters | {weight for name, weight in model.named_parameters() if not name.startswith("blocks.")}
    for module in (*model.blocks, model):  # the model itself holds no shard; it is the root that orders the gathers
        fully_shard(module, mesh=mesh, ignored_params=whole, mp_policy=policy, offload_policy=host)
    _make_room(model, device, torch.device("cpu") if offload else device)


def _make_room(model: nn.Module, device: torch.device, shard_device: torch.device) -> None:
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            place = shard_device if isinstance(weight, DTensor) else device
            empty = torch.empty_like(weight, device=place)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=weight.requires_grad))


def local_shard(weight: Tensor) -> tuple[Tensor, slice]:
    """What of a parameter this rank holds, sharing its memory, and which rows of the whole these are."""
    if not isinstance(weight, DTensor):
        return weight, slice(0, weight.shape[0] if weight.ndim else None)
    rank, size = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
    rows = -(-weight.shape[0] // size)
    start = min(rank * rows, weight.shape[0])
    local = weight.to_local()
    return local, slice(start, start + local.shape[0])
