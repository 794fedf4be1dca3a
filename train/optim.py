"""AdamW in fp32 or 8 bit, the learning rate schedule, clipping, and the moving average of the trained weights.

`updates` counts the optimizer steps that were applied; it drives the schedule and the average, so that an update
skipped for overflow moves neither.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.config.train import OptimConfig

STATE_8BIT = ("state1", "state2", "absmax1", "absmax2")
CODE_BOOKS = ("qmap1", "qmap2")


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer over fp32 parameters. Raises UserError when bitsandbytes is asked for and absent."""
    kept = list(parameters)
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        optimizer: torch.optim.Optimizer = import_bitsandbytes().optim.AdamW8bit(
            kept, min_8bit_size=config.min_8bit_size, **common
        )
        return optimizer
    return torch.optim.AdamW(kept, fused=True, **common)


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, from 0.50 where its CPU optimizers begin. Raises UserError with the fix."""
    # On import it logs an error about an optional kernel package that has nothing to do with optimizers.
    chatter = logging.getLogger("bitsandbytes")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"optim.name: adamw8bit needs bitsandbytes, which cannot be imported: {error}",
            fix="pip install 'bitsandbytes>=0.50' -c constraints.txt, or set optim.name=adamw",
        ) from None
    finally:
        chatter.setLevel(level)
    version = tuple(int(part) for part in bitsandbytes.__version__.split(".")[:2])
    if version < (0, 50):
        raise UserError(
            f"bitsandbytes {bitsandbytes.__version__} is too old",
            expected="0.50 or newer",
            fix="pip install 'bitsandbytes>=0.50' -c constraints.txt",
        )
    return bitsandbytes


def learning_rate(config: OptimConfig, updates: int, max_steps: int) -> float:
    """The rate of the update that follows `updates` applied ones: a rise in a line, then the schedule."""
    if updates < config.warmup_updates:
        return config.lr * (updates + 1) / config.warmup_updates
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (updates - config.warmup_updates) / max(1, max_steps - config.warmup_updates))
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients down to `max_norm` together; return their norm before it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return float(norm)


def update_average(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float, updates: int) -> None:
    """Move `average` towards `weights` in place. Early on the decay is smaller, so that the start is forgotten."""
    decay = min(decay, (1 + updates) / (10 + updates))
    with torch.no_grad():
        for name, kept in average.items():
            kept.lerp_(weights[name].to(kept.dtype), 1 - decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, codes and scales of the 8-bit one as they are.

    bitsandbytes counts steps in a Python int, which becomes a 0-d int64. Its two code books are the same for all
    parameters and are stored once.
    """
    tensors: dict[str, Tensor] = {}
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in CODE_BOOKS:
                tensors[key] = value.detach().cpu()
            else:
                tensors[f"{name}.{key}"] = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` gave. Raises UserError when the tensors belong to another optimizer or model."""
    owners = {name: parameter for parameter, name in names.items()}
    expected = _expected_keys(optimizer)
    restored: dict[nn.Parameter, dict[str, Any]] = {}
    strange = []
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name in owners and key in expected:
            restored.setdefault(owners[name], {})[key] = _placed(tensor, owners[name])
        elif full_name not in CODE_BOOKS:
            strange.append(full_name)
    if strange or (restored and len(restored) < len(names)):
        raise UserError(
            f"the checkpoint's optimizer state does not fit: {len(restored)} tensors, and {sorted(strange)[:5]}",
            expected=f"state of {type(optimizer).__name__} for {len(names)} tensors",
        )
    for parameter, state in restored.items():
        if "absmax1" in state:
            state |= {key: tensors[key].to(parameter.device) for key in CODE_BOOKS}
        optimizer.state[parameter] = state


def _expected_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"step", *STATE_8BIT}


def _placed(tensor: Tensor, parameter: nn.Parameter) -> Tensor | int:
    if tensor.dtype == torch.int64 and tensor.ndim == 0:
        return int(tensor)
    return tensor.to(parameter.device)
