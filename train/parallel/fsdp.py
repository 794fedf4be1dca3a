"""The model sharded over ranks by FSDP2: a block's weights are gathered when it runs, and freed after it.

A frozen base (`shard_base`): only blocks are sharded; embeddings and head, 2 % of the real model, are replicated on
every rank. So are the LoRA's weights, plain tensors that FSDP2 ignores: their gradients are summed once per optimizer
step, as without sharding (train/parallel/ranks.py), and optimizers, clipping and checkpoints see no shard. The base has
no gradients, so none are reduced.

A model that trains (`shard_trained`): float32 weights, gradients and optimizer states are sharded by rows. A block's
linears are gathered in the compute dtype; what is outside the blocks, the root's group, in float32, because it is
computed in float32. A block's float32 norms and modulation, 0.02 % of the real model, are replicated: in the block's
group they would be rounded with the linears. Gradients are summed in float32 in the backward pass of a step's last
micro-batch.

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


def shard_trained(model: WanDiT, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard a float32 model that was built on `meta`, and allocate the local shards.

    `requires_grad` says which weights train. Weights are unset afterwards; `settle` must be called when they are set.

    Args:
        mesh: one axis (the ranks that one copy is sharded over), or two (the copies, then the ranks of a copy).
            Gradients are summed over all ranks of the mesh.
    """
    narrow, kept = model.compute_dtype, torch.float32
    linears = MixedPrecisionPolicy(narrow if narrow != kept else None, kept, cast_forward_inputs=False)
    for block in model.blocks:
        islands = {
            weight for one in block.modules() if not isinstance(one, nn.Linear) for weight in one.parameters(False)
        }
        fully_shard(block, mesh=mesh, ignored_params=islands, mp_policy=linears)
    # Freed after the forward pass too: else it would stay gathered after an evaluation, with values from before a step.
    root = MixedPrecisionPolicy(None, kept, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=root, reshard_after_forward=True)
    for module in (*model.blocks, model):
        # A sum, no average, as everywhere: gloo has no average, and the loss is divided by the global batch already.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _allocate(model, device, device)


def settle(model: WanDiT) -> None:
    """Let FSDP2 register the shards as they are now.

    It moves those whose rows do not divide evenly, so only a `local_shard` taken after this call is valid.
    """
    model.unshard()  # type: ignore[operator]
    model.reshard()  # type: ignore[operator]


def sum_in_backward(model: nn.Module, *, wanted: bool) -> None:
    """Set whether the next backward pass of a trained, sharded model sums the gradients over the ranks.

    If not, each rank adds them to its own gradients.
    """
    model.set_requires_gradient_sync(wanted)  # type: ignore[operator]


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
    axis = weight.device_mesh.ndim - 1
    rank, size = weight.device_mesh.get_local_rank(axis), weight.device_mesh.size(axis)
    rows = -(-weight.shape[0] // size)
    start = min(rank * rows, weight.shape[0])
    local = weight.to_local()
    return local, slice(start, start + local.shape[0])
