"""AdamW in fp32 or 8 bit or any other optimizer, the learning rate schedule, clipping, and the moving average.

`updates` counts the optimizer steps that were applied; it drives the schedule and the average, so that an update
skipped for overflow moves neither.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.config.optim import OptimConfig

STATE_8BIT = ("state1", "state2", "absmax1", "absmax2")
CODE_BOOKS = ("qmap1", "qmap2")
SCALED_NUMBERS = 256
"""Numbers of an 8-bit state that share a scale."""


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    shapes: Mapping[nn.Parameter, tuple[int, ...]] | None = None,
    *,
    by_rows: bool = False,
) -> torch.optim.Optimizer:
    """The configured optimizer over fp32 parameters, in its training mode where it has one.

    Args:
        shapes: of the complete weights, where parameters may be rows of them: then 8-bit state is for weights whose
            rows are whole blocks of one scale, so that it is the same however rows are shared out.
        by_rows: parameters are rows of weights.

    Raises UserError when it is not installed, is no optimizer, or refuses its arguments or what is trained.
    """
    kept = list(parameters)
    if not config.is_own:
        return _make_by_path(kept, config, by_rows=by_rows)
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        kind = import_bitsandbytes().optim.AdamW8bit
        if shapes is not None:
            kind = _eight_bit_by_rows(kind, shapes)
        optimizer: torch.optim.Optimizer = kind(kept, min_8bit_size=config.min_8bit_size, **common)
        return optimizer
    return torch.optim.AdamW(kept, fused=True, **common)


def _eight_bit_by_rows(kind: Any, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> Any:
    class AdamW8bit(kind):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = super().get_config(gindex, pindex, group)
            shape = shapes[self.param_groups[gindex]["params"][pindex]]
            is_large = math.prod(shape) >= found["min_8bit_size"] and math.prod(shape[1:]) % SCALED_NUMBERS == 0
            return {**found, "min_8bit_size": 0 if is_large else sys.maxsize}

    return AdamW8bit


def find_class(config: OptimConfig) -> type[torch.optim.Optimizer]:
    """The class at `optim.name`, which is imported here. Raises UserError; also for arguments that it does not name."""
    module, _, name = config.name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        fix = f"pip install the package that has {module}, or set optim.name to one that is there"
        raise UserError(f"optim.name: {config.name} cannot be imported: {error}", fix=fix) from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"optim.name: {config.name} is no optimizer", expected="a subclass of torch.optim.Optimizer")
    known: list[str] = []
    for cls in found.__mro__:
        given = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]
        known += [one.name for one in given[1:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        if not any(one.kind == one.VAR_KEYWORD for one in given):
            break
    if "lr" not in known:
        raise UserError(f"optim.name: {config.name} takes no lr", expected="an optimizer with one learning rate")
    arguments = [name for name in known if name not in ("params", "lr", "defaults")]
    for argument in config.args:
        if argument not in arguments:
            near = difflib.get_close_matches(argument, arguments, n=1)
            raise UserError(
                f"optim.args: {config.name} has no argument {argument!r}"
                + (f"; did you mean {near[0]}?" if near else ""),
                expected=f"of {', '.join(arguments)}" if arguments else "none",
            )
    return found


def _make_by_path(parameters: list[nn.Parameter], config: OptimConfig, *, by_rows: bool) -> torch.optim.Optimizer:
    probe_optimizer(config.name, json.dumps(config.args))
    if by_rows:
        probe_rows(config.name, json.dumps(config.args))
    return _construct(parameters, config)


@lru_cache(maxsize=8)
def probe_rows(name: str, args: str) -> None:
    """Raise UserError where the class at `name` moves halves of a matrix otherwise than all of it: with what it takes
    from complete matrices, or from all weights together, a run would depend on how rows are shared out."""
    config = OptimConfig(name=name, args=json.loads(args))
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(32, 512, generator=generator) for _ in range(4))
    moved = []
    for parts in (1, 2):
        weights = [nn.Parameter(part.clone()) for part in start.chunk(parts)]
        of_each = [_construct([weight], config) for weight in weights]
        for gradient in gradients:
            for weight, optimizer, part in zip(weights, of_each, gradient.chunk(parts), strict=True):
                weight.grad = part.clone()
                optimizer.step()
        moved.append(torch.cat([weight.detach() for weight in weights]))
    if not moved[0].equal(moved[1]):
        raise UserError(
            f"optim.name: {name} moves rows by more than themselves, and parallel.shard shares rows out",
            expected="an optimizer that moves each number by its own gradients",
            fix="parallel.shard=none, or another optimizer",
        )


def _construct(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    cls = find_class(config)
    arguments = {name: _tuples(value) for name, value in config.args.items()}
    try:
        optimizer = cls(parameters, lr=config.lr, **arguments)  # type: ignore[call-arg]
        if has_modes(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
    except Exception as error:  # an assertion, a ValueError, a TypeError: whatever a package does
        words = ", ".join(f"{name}={value!r}" for name, value in {"lr": config.lr, **arguments}.items())
        raise UserError(f"optim.name: {config.name} refuses {words}: {type(error).__name__}: {error}") from None
    return optimizer


@lru_cache(maxsize=8)
def probe_optimizer(name: str, args: str) -> float:
    """Bytes of state a trained number that the class at `name` with `args` (JSON) keeps, on two small matrices.

    Raises UserError where it does not work there, or where its state, saved and restored, does not give the same bits.
    """
    config = OptimConfig(name=name, args=json.loads(args))

    def make() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        # Large enough for packages that keep small tensors' state in float32.
        shapes = {"lora_A": (16, 512), "lora_B": (512, 16)}
        weights = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        return weights, _construct(list(weights.values()), config)

    def steps(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    weights, optimizer = make()
    try:
        steps(weights, optimizer, range(2))
    except Exception as error:
        raise UserError(
            f"optim.name: {name} cannot take a step: {type(error).__name__}: {error}",
            expected="an optimizer whose step() needs nothing but gradients",
        ) from None
    packed, values = pack_optimizer(optimizer, weights)
    kept = {key: tensor.clone() for key, tensor in packed.items()}
    num_bytes = sum(tensor.nbytes for tensor in kept.values() if tensor.ndim)
    resumed, fresh = make()
    with torch.no_grad():
        for key, weight in resumed.items():
            weight.copy_(weights[key])
    unpack_optimizer(fresh, resumed, kept, json.loads(json.dumps(values)))
    averaged_weights(fresh, resumed)
    for each, of in ((weights, optimizer), (resumed, fresh)):
        steps(each, of, range(2, 5))
    if not all(weights[key].equal(resumed[key]) for key in weights):
        raise UserError(
            f"optim.name: {name} does not continue to the bit from its saved state",
            expected="an optimizer whose `state` and `param_groups` are all of its state, and that draws nothing",
        )
    return num_bytes / sum(weight.numel() for weight in weights.values())


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its weights are others in evaluation than in training (schedule-free)."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def averaged_weights(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor] | None:
    """Copies of the weights in a schedule-free optimizer's evaluation mode; None for one without modes.

    The trained weights are put back from copies: the way there and back rounds, and a run would depend on how often
    it is evaluated.
    """
    if not has_modes(optimizer):
        return None
    trained = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer.eval()  # type: ignore[attr-defined]
    averaged = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer.train()  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(trained[name])
    return averaged


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


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together."""
    return torch.nn.utils.get_total_norm(gradients)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None, norm: Tensor | None = None) -> float:
    """Scale gradients down to `max_norm` together; return their norm before it. `norm` is theirs where others, of other
    ranks, belong to it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients) if norm is None else norm
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
                tensors[key] = value.detach()
            else:
                tensors[f"{name}.{key}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
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


def pack_optimizer(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All state of any optimizer: named tensors, and a JSON value that holds the rest and the tensors' places.

    Raises UserError for a value that is neither a tensor nor plain.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu()
            return {"tensor": name}
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [plain(item, f"{name}.{place}") for place, item in enumerate(value)]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"dict": {key: plain(item, f"{name}.{key}") for key, item in value.items()}}
        raise UserError(
            f"optim.name: the state of {type(optimizer).__name__} holds a {type(value).__name__} ({name})",
            expected="tensors, numbers and text, which a checkpoint can hold",
        )

    state = {name: plain(optimizer.state.get(weight, {}), name) for name, weight in weights.items()}
    groups = [
        {key: plain(value, f"group.{place}.{key}") for key, value in group.items() if key != "params"}
        for place, group in enumerate(optimizer.param_groups)
    ]
    return tensors, {"class": type(optimizer).__qualname__, "state": state, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Restore what `pack_optimizer` gave. Raises UserError when it is of another optimizer or model."""
    state, groups = values.get("state", {}), values.get("groups", [])
    same = values.get("class") == type(optimizer).__qualname__ and len(groups) == len(optimizer.param_groups)
    if not same or state.keys() != weights.keys():
        raise UserError(
            f"the checkpoint's optimizer state does not fit: it is of {values.get('class')}, {len(state)} tensors",
            expected=f"state of {type(optimizer).__name__} for {len(weights)} tensors",
        )

    def value_of(saved: Any, device: torch.device) -> Any:
        if not isinstance(saved, dict):
            return saved
        ((kind, inner),) = saved.items()
        if kind == "tensor":
            return tensors[inner].to(device)
        if kind == "dict":
            return {key: value_of(item, device) for key, item in inner.items()}
        items = [value_of(item, device) for item in inner] if kind != "float" else inner
        return {"float": float, "list": list, "tuple": tuple}[kind](items)

    cpu = torch.device("cpu")
    try:
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group |= {key: value_of(value, group["params"][0].device) for key, value in saved.items()}
        of = {weight: group for group in optimizer.param_groups for weight in group["params"]}
        for name, weight in weights.items():
            # As torch does: a counter stays with the host, unless the kernels read it.
            host = not (of[weight].get("capturable") or of[weight].get("fused"))
            saved = state[name]["dict"]
            restored = {key: value_of(v, cpu if key == "step" and host else weight.device) for key, v in saved.items()}
            if restored:
                optimizer.state[weight] = restored
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's optimizer state cannot be read: {error!r}") from None


def _tuples(value: Any) -> Any:
    """Lists of a config as the tuples that optimizers take."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _expected_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"step", *STATE_8BIT}


def _placed(tensor: Tensor, parameter: nn.Parameter) -> Tensor | int:
    if tensor.dtype == torch.int64 and tensor.ndim == 0:
        return int(tensor)
    return tensor.to(parameter.device)
