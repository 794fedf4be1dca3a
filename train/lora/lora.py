"""LoRA: inject, freeze, the raw state and loading it.

Shapes: B slots, L tokens, I input channels, O output channels, r rank.

A and B are float32 parameters beside a frozen weight, cast to the run's dtype for the multiplication. Checkpoints hold
them raw; only an export (`formats.save_lora`) folds the scale into B.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from shards.errors import UserError
from train.config.model import LoRAConfig
from train.lora.targets import match_targets
from train.model.block import DropoutKey, Linear
from train.model.dit import WanDiT


class LoRALinear(Linear):
    """A frozen linear with a low-rank update: W x + b + scale · B A drop(x)."""

    def __init__(self, base: Linear, config: LoRAConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, dtype=torch.float32, device=device))
        self.scale = config.scale
        self.dropout = config.dropout
        self.layer = layer

    @property
    def loras(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B: what trains."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """Base and update in x's dtype; the multiplication applies the scale."""
        out = super().forward(x)
        scale = self.scale
        if self.training and self.dropout:
            if dropout is None:
                raise ValueError("LoRA dropout in training needs dropout_key_B: one int64 a sample")
            x = x * keep_mask(dropout, self.layer, x.shape[1], x.shape[2], self.dropout)
            scale /= 1 - self.dropout
        low_Mr = nn.functional.linear(x.flatten(0, 1), self.lora_A.to(x.dtype))
        return torch.addmm(out.flatten(0, 1), low_Mr, self.lora_B.to(x.dtype).t(), alpha=scale).view(out.shape)


def keep_mask(key: DropoutKey, layer: int, num_tokens: int, width: int, rate: float) -> Bool[Tensor, "b l i"]:
    """Which inputs of a layer's update are kept: a hash of (slot, layer, global token, channel), no state.

    A token's 64-bit hash (splitmix64's finaliser) gives 32 bits, added to a channel's and mixed again; an element is
    kept where the result, uniform over int32, reaches the share `rate`.
    """
    device = key.slot_B.device
    token_L = torch.arange(key.token_offset, key.token_offset + num_tokens, dtype=torch.int64, device=device)
    layer_B = _mix64(key.slot_B + _wrap((layer + 1) * _GOLDEN))
    token_BL = _mix64(layer_B[:, None] + token_L * _GOLDEN)
    channel_I = _mix64(torch.arange(width, dtype=torch.int64, device=device) * _GOLDEN)
    bits_BLI = (token_BL >> 32).to(torch.int32)[..., None] + (channel_I >> 32).to(torch.int32)
    for multiplier in (0x7FEB352D, 0x046CA68B):
        bits_BLI ^= (bits_BLI >> 16) & 0xFFFF
        bits_BLI *= multiplier
    bits_BLI ^= (bits_BLI >> 16) & 0xFFFF
    return bits_BLI >= int(rate * 2**32) - 2**31


def _wrap(number: int) -> int:
    """The int64 with the same low 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _wrap(0x9E3779B97F4A7C15)


def _mix64(x: Tensor) -> Tensor:
    # Right shifts of int64 carry the sign along; the masks make them logical.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _wrap(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def inject(model: WanDiT, config: LoRAConfig, seed: int) -> list[str]:
    """Freeze the model and put a LoRA beside every targeted linear of its blocks.

    A starts uniform in ±1/√I as in peft, from (seed, module name), so that it does not depend on what else is targeted;
    B starts at zero, so the model's output does not change.

    Returns: names of the adapted modules, in the model's order.
    Raises: UserError when a target matches nothing, or when the model has a LoRA already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("the model has a LoRA already", fix="merge it or build a new model")
    names = [f"blocks.{name}" for name, module in model.blocks.named_modules() if isinstance(module, Linear)]
    chosen = match_targets(names, config.targets)
    model.requires_grad_(False)
    for layer, name in enumerate(names):
        if name not in chosen:
            continue
        parent, _, leaf = name.rpartition(".")
        adapted = LoRALinear(model.get_submodule(name), config, layer)  # type: ignore[arg-type]
        _init_a(adapted.lora_A, name, seed)
        adapted.train(model.training)
        setattr(model.get_submodule(parent), leaf, adapted)
    return [name for name in names if name in chosen]


@torch.no_grad()
def reset(model: nn.Module, seed: int) -> None:
    """Initialise every LoRA of a model: for one that was injected on the meta device."""
    for name, module in lora_modules(model).items():
        _init_a(module.lora_A, name, seed)
        module.lora_B.zero_()


@torch.no_grad()
def _init_a(lora_a_rI: nn.Parameter, name: str, seed: int) -> None:
    if lora_a_rI.is_meta:
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(lora_a_rI.shape[1])
    lora_a_rI.copy_(torch.empty(lora_a_rI.shape).uniform_(-bound, bound, generator=generator))


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Adapted modules by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted module, in the model's order: what the optimizer is given."""
    return [weight for module in lora_modules(model).values() for weight in module.loras]


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Raw A (r × I) and B (O × r), `blocks.N.….lora_A.weight`: the live float32 tensors, not copies."""
    state = {}
    for name, module in lora_modules(model).items():
        state[f"{name}.lora_A.weight"] = module.lora_A.detach()
        state[f"{name}.lora_B.weight"] = module.lora_B.detach()
    return state


def load_lora_state(model: nn.Module, state: Mapping[str, Tensor], origin: str = "LoRA state") -> None:
    """Copy raw A and B into an injected model.

    Raises: UserError naming missing and unexpected modules, another rank, a wrong shape; nothing is copied then.
    """
    ours = lora_state(model)
    missing, unexpected = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    if missing or unexpected:
        raise UserError(
            f"{origin}: {len(missing)} tensors are missing{_first(missing)}, {len(unexpected)} are unexpected"
            f"{_first(unexpected)}",
            expected=f"the {len(ours)} tensors of this run's lora.targets",
            fix="resume with the lora.targets it was trained with",
        )
    for name, tensor in ours.items():
        if state[name].shape != tensor.shape:
            axis = 0 if ".lora_A." in name else 1
            ranks = state[name].shape[axis], tensor.shape[axis]
            what = f"rank {ranks[0]}, this run has {ranks[1]}" if ranks[0] != ranks[1] else "a layer of another size"
            raise UserError(
                f"{origin}: {name} is {tuple(state[name].shape)}: {what}", expected=str(tuple(tensor.shape))
            )
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name])


def _first(names: list[str]) -> str:
    return f" ({names[0]}{', …' if len(names) > 1 else ''})" if names else ""
