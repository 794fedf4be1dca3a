"""LoRA: inject, load, merge, unmerge, and the raw state of training.

`inject`, `load`, `merge` and `unmerge` take any module whose linears are called as in Wan2.2's own `WanModel` or as in
diffusers' `WanTransformer3DModel`, besides the `WanDiT` of this project: docs/how-to/inference.md shows them.

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
from train.lora.formats import LoRAFile, official_name, refuse_other_model
from train.lora.targets import describe_targets, match_targets
from train.model.block import DropoutKey, Linear

_MERGED = "_wan_merged_lora"


class LoRALinear(Linear):
    """A frozen linear with a low-rank update: W x + b + scale · B A drop(x)."""

    def __init__(self, base: nn.Linear, config: LoRAConfig, layer: int, device: torch.device) -> None:
        """`device`: of the update."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.quantised = getattr(base, "quantised", None)
        self.output_scale = getattr(base, "output_scale", 1.0)
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, dtype=torch.float32, device=device))
        self.scale = config.scale
        self.dropout = config.dropout
        self.layer = layer

    def forward(self, x: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """Base and update in x's dtype; the multiplication applies the scale."""
        out = super().forward(x)
        scale = self.scale * self.output_scale
        if self.training and self.dropout:
            if dropout is None:
                raise ValueError("LoRA dropout in training needs dropout_key_B: one int64 a sample")
            x = x * keep_mask(dropout, self.layer, x.shape[1], x.shape[2], self.dropout)
            scale /= 1 - self.dropout
        low_Mr = nn.functional.linear(x.flatten(0, -2), self.lora_A.to(x.dtype))
        return torch.addmm(out.flatten(0, -2), low_Mr, self.lora_B.to(x.dtype).t(), alpha=scale).view(out.shape)


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


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze the model and put a LoRA beside every targeted linear of its blocks.

    A starts uniform in ±1/√I as in peft, from (seed, module name), so that it does not depend on what else is targeted;
    B starts at zero, so the model's output does not change.

    Returns: official names of the adapted modules, in the model's order.
    Raises: UserError when a target matches nothing, or when the model has a LoRA already.
    """
    _refuse_second(model)
    places = {name: path for name, path in linears(model).items() if name.startswith("blocks.")}
    chosen = match_targets(list(places), config.targets)
    model.requires_grad_(False)
    for layer, (name, path) in enumerate(places.items()):
        if name in chosen:
            _init_a(_adapt(model, path, config, layer).lora_A, name, seed)
    return [name for name in places if name in chosen]


def linears(model: nn.Module) -> dict[str, str]:
    """Every linear that a LoRA may adapt: its official name → its path in the model, in the model's order."""
    named = ((official_name(path), path) for path, one in model.named_modules() if isinstance(one, nn.Linear))
    found = {name: path for name, path in named if name is not None}
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear that is called as in Wan2.2 or in diffusers",
            expected="Wan2.2's WanModel (`WanTI2V(…).model`), diffusers' WanTransformer3DModel (`pipe.transformer`)",
        )
    return found


def _adapt(model: nn.Module, path: str, config: LoRAConfig, layer: int) -> LoRALinear:
    linear: nn.Linear = model.get_submodule(path)  # type: ignore[assignment]
    # A streamed block is in the host's memory until its turn, and a quantised linear's weight is on `meta`.
    is_elsewhere = getattr(model, "stream", None) is not None or getattr(linear, "quantised", None) is not None
    device = model.get_parameter("patch_embedding.weight").device if is_elsewhere else linear.weight.device
    adapted = LoRALinear(linear, config, layer, device)
    adapted.train(model.training)
    model.set_submodule(path, adapted)
    return adapted


def _refuse_second(model: nn.Module) -> None:
    if lora_modules(model) or hasattr(model, _MERGED):
        raise UserError("the model has a LoRA already", fix="`detach` it, or build a new model")


@torch.no_grad()
def attach_lora(model: nn.Module, lora: LoRAFile, strength: float = 1.0) -> None:
    """Put a file that is read already into a model, as `train.lora.load.load` does."""
    places, held = linears(model), lora_modules(model)
    if hasattr(model, _MERGED):
        _refuse_second(model)
    modules = {name: model.get_submodule(path) for name, path in places.items()}
    sizes = {name: (one.out_features, one.in_features) for name, one in modules.items() if isinstance(one, nn.Linear)}
    refuse_other_model(lora, sizes, "the model")
    if held:
        _refuse_other_settings(lora, held, places)
    else:
        for name, pair in lora.pairs.items():
            _adapt(model, places[name], LoRAConfig(rank=pair.rank), 0).requires_grad_(False)
    for name, module in lora_modules(model).items():
        pair = lora.pairs[name]
        module.lora_A.copy_(pair.down_rI.float())
        module.lora_B.copy_(pair.up_Or.float() * (pair.scale * strength / module.scale))


def _refuse_other_settings(lora: LoRAFile, held: Mapping[str, LoRALinear], places: Mapping[str, str]) -> None:
    """Raise UserError, naming the file's own rank and targets, unless they are those of the injected LoRA."""
    ranks = sorted({pair.rank for pair in lora.pairs.values()})
    own = f"lora.rank={ranks[-1]} 'lora.targets=[{', '.join(describe_targets(places, lora.pairs))}]'"
    rank = next(iter(held.values())).lora_A.shape[0]
    if len(ranks) > 1:
        raise UserError(f"{lora.origin}: ranks {', '.join(map(str, ranks))} in one file", expected="one rank")
    missing, unexpected = sorted(held.keys() - lora.pairs.keys()), sorted(lora.pairs.keys() - held.keys())
    if missing or unexpected:
        raise UserError(
            f"{lora.origin}: {len(missing)} modules are missing{_first(missing)}, {len(unexpected)} are unexpected"
            f"{_first(unexpected)}",
            expected=f"the {len(held)} modules of lora.targets",
            fix=own,
        )
    if ranks != [rank]:
        raise UserError(f"{lora.origin}: rank {ranks[0]}, lora.rank is {rank}", fix=own)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add scale · B A to every adapted weight, rounded once, so that a forward pass costs what it did without a LoRA.

    `unmerge` restores the weights to the bit: the adapted ones are kept on the CPU meanwhile.

    Raises: UserError for no LoRA, a base kept in few bits, and a weight that overflows its dtype; nothing is changed.
    """
    paths = linears(model)
    kept: dict[str, LoRALinear] = {}
    for name, module in lora_modules(model).items():
        if module.quantised is not None:
            raise UserError(
                f"{name}: the base is kept in {module.quantised.kind}, and a LoRA is merged into the original weights",
                fix="`wantrain lora merge` reads them from the checkpoint",
            )
        merged = module.weight.float() + module.scale * (module.lora_B @ module.lora_A)
        merged = merged.to(module.weight.dtype)
        if not torch.isfinite(merged).all():
            setattr(model, _MERGED, kept)
            unmerge(model)  # those before it: the model is left as it was
            raise UserError(
                f"{name}: not finite as {module.weight.dtype} with the LoRA in it".replace("torch.", ""),
                fix="load the base in bfloat16 or float32, or the LoRA at a lower strength; `wantrain lora info` "
                "shows a LoRA's broken modules",
            )
        plain = _plain(module)
        plain.weight = nn.Parameter(merged, requires_grad=False)
        if module.bias is not None:  # its own: the adapted module's moves to the CPU
            plain.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        model.set_submodule(paths[name], plain)
        kept[paths[name]] = module.to("cpu")
    if not kept:
        raise UserError("the model has no LoRA to merge", fix="`load` one first")
    setattr(model, _MERGED, kept)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the LoRA is beside the weights again, and those are what they were, to the bit.

    They go where the merged ones are now: pipelines move a model between the CPU and the GPU.
    """
    for path, module in getattr(model, _MERGED, {}).items():
        model.set_submodule(path, module.to(model.get_parameter(f"{path}.weight").device))
    if hasattr(model, _MERGED):
        delattr(model, _MERGED)


def detach(model: nn.Module) -> None:
    """Take the LoRA out of the model: what is left are the weights that it was put beside."""
    unmerge(model)
    paths = linears(model)
    for name, module in lora_modules(model).items():
        model.set_submodule(paths[name], _plain(module))


def _plain(module: LoRALinear) -> Linear:
    plain = Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight, plain.bias, plain.quantised = module.weight, module.bias, module.quantised
    plain.output_scale = module.output_scale
    return plain.train(module.training)


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
    """Adapted modules by official name, in the model's order."""
    named = model.named_modules()
    return {official_name(path) or path: module for path, module in named if isinstance(module, LoRALinear)}


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
