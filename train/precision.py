"""The dtype that a device computes in, loss scaling for fp16, and a record of which blocks overflowed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from shards.console import LOG
from shards.errors import UserError
from train.device import DeviceInfo

Name = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Name, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP16_MAX = 65_504.0


class Precision(NamedTuple):
    """What the linears and the attention compute in. The residual stream and the other islands are float32 always."""

    name: Name
    dtype: torch.dtype
    scales_loss: bool
    """Whether gradients need dynamic loss scaling: fp16 only."""
    reason: str


def resolve_precision(requested: Literal["auto", "bf16", "fp16", "fp32"], facts: DeviceInfo) -> Precision:
    """Turn `auto` into a dtype: bf16 where the chip computes it (compute capability 8.0 on), fp16 below, fp32 on a CPU.

    torch.cuda.is_bf16_supported() is not asked: it counts emulation, which sends attention to the math kernel.

    Raises: UserError for bf16 on a GPU that only emulates it.
    """
    if facts.capability is None:
        name, reason = (requested if requested != "auto" else "fp32"), f"{facts.kind}"
    else:
        major, minor = facts.capability
        computes_bf16 = facts.capability >= (8, 0)
        if requested == "bf16" and not computes_bf16:
            raise UserError(
                f"precision: bf16 on {facts.name} (compute capability {major}.{minor}) would be emulated",
                expected="bf16 from compute capability 8.0 on",
                fix="precision: auto (fp16 with loss scaling here)",
            )
        name = requested if requested != "auto" else ("bf16" if computes_bf16 else "fp16")
        reason = f"{facts.name}, compute capability {major}.{minor}"
    return Precision(name, DTYPES[name], name == "fp16", reason + ("" if requested == "auto" else ", as asked"))


class LossScaler:
    """Dynamic loss scaling: halve on overflow, double after a run of good updates.

    The caller judges the overflow, after gradients were reduced over ranks, so that every rank skips or none.
    Disabled, it does nothing and counts nothing.
    """

    def __init__(
        self, enabled: bool, init_scale: float = 2.0**16, growth_interval: int = 1000, max_skips: int = 50
    ) -> None:
        self.enabled = enabled
        self.scale = init_scale if enabled else 1.0
        self.growth_interval = growth_interval
        self.max_skips = max_skips
        self.good_updates = 0
        self.skipped_in_a_row = 0
        self.skipped = 0

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.scale if self.enabled else loss

    @torch.no_grad()
    def unscale_(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients in place."""
        if self.enabled:
            for gradient in gradients:
                gradient.mul_(1 / self.scale)

    def update(self, overflow: bool) -> None:
        """Record one optimizer step: applied, or skipped because of an overflow.

        Raises: UserError after `max_skips` skipped updates in a row: the run does not learn any more.
        """
        if not self.enabled:
            return
        if not overflow:
            self.skipped_in_a_row = 0
            self.good_updates += 1
            if self.good_updates % self.growth_interval == 0:
                self.scale = min(self.scale * 2, 2.0**24)
            return
        self.good_updates = 0
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skips:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row overflowed fp16, down to a loss scale of {self.scale:g}",
                expected="gradients that fit at some scale",
                fix="wantrain doctor --ranges names the layer: outputs of o and ffn.2 are folded by themselves, others "
                "need precision.compute=bf16, or fp32",
            )
        self.scale = max(self.scale / 2, 2.0**-14)

    def state_dict(self) -> dict[str, float | int]:
        """The state that a checkpoint keeps: plain numbers."""
        return {
            "scale": self.scale,
            "good_updates": self.good_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Take a state back. Raises: KeyError on another version's state."""
        self.scale = float(state["scale"])
        self.good_updates = int(state["good_updates"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self.skipped = int(state["skipped"])


@torch.no_grad()
def has_overflow(gradients: Iterable[Tensor]) -> Tensor:
    """Whether any gradient is infinite or not a number: a bool on the gradients' device, not yet fetched."""
    flags = [_not_finite(gradient) for gradient in gradients]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool)


def _not_finite(x: Tensor) -> Tensor:
    # A sum in float32 is infinite or NaN when an element is, and reads x once, with no mask of x's size.
    return ~torch.isfinite(x.sum(dtype=torch.float32))


FOLDED = ("self_attn.o", "cross_attn.o", "ffn.2")
"""Linears of a block whose outputs go into the float32 residual, and nowhere else."""
FOLD_STEP, FOLD_MOST = 4, 16
"""Powers of two by which a block's outputs are reduced at each of its forward overflows, and at most."""


def fold_outputs(block: nn.Module, exponent: int) -> None:
    """Let a block's FOLDED linears, their LoRA included, give 2^−exponent of their outputs.

    The factor is in the matrix product, ahead of the rounding to fp16, and the float32 gate divides by it: in float32
    every number is the same to the bit, and in fp16 what exceeded 65,504 is held. Weights and files are untouched.
    """
    for name in FOLDED:
        block.get_submodule(name).output_scale = 2.0**-exponent  # type: ignore[assignment]


def fold_overflows(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Fold into a model's blocks what a run with these `overflows` in its checkpoint folds; nothing with none."""
    for name, block in model.get_submodule("blocks").named_children():
        fold_outputs(block, _exponent(counts, f"blocks.{name}"))


def _exponent(counts: Mapping[str, int], name: str) -> int:
    """What is folded into a block: a function of its forward overflows, so the counts record it."""
    return min(FOLD_MOST, FOLD_STEP * counts.get(f"{name} forward", 0))


class OverflowTelemetry:
    """Names the block where numbers stopped being finite, and folds a power of two into one whose outputs were not.

    A hook a block notes on the device whether its output is finite (one read, no wait). Only when a step overflowed are
    the notes fetched: the first bad block forward; if all were finite, the last block with bad gradients, since the
    backward pass runs from there.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = model.get_submodule("blocks")
        self.names = [f"blocks.{name}" for name, _ in blocks.named_children()]
        self._blocks = dict(zip(self.names, blocks.children(), strict=True))
        self.counts: Counter[str] = Counter()
        self._bad: dict[str, Tensor] = {}
        self._handles = [
            block.register_forward_hook(self._note(name))
            for name, block in zip(self.names, blocks.children(), strict=True)
        ]

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            bad = _not_finite(output.detach())
            self._bad[name] = bad | self._bad[name] if name in self._bad else bad

        return hook

    def begin_step(self) -> None:
        """Forget the notes of the step before; micro-steps of one step add up."""
        self._bad.clear()

    def blame(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        over_ranks: Callable[..., list[float]] = lambda *numbers: list(numbers),
    ) -> str:
        """Name the block of this step's overflow and count it.

        Args:
            parameters: names (`blocks.N.…`) and parameters whose `.grad` overflowed.
            over_ranks: the maxima over all ranks; the overflow may be another's.

        Returns: `blocks.N forward`, `blocks.N backward`, or `outside the blocks`.
        """
        culprit = (
            self._first_bad_output(over_ranks)
            or self._last_bad_gradient(parameters, over_ranks)
            or "outside the blocks"
        )
        self.counts[culprit] += 1
        if culprit.endswith(" forward"):
            self._fold(culprit.removesuffix(" forward"))
        return culprit

    def exponent(self, name: str) -> int:
        """What is folded into a block, as a power of two."""
        return _exponent(self.counts, name)

    def _fold(self, name: str) -> None:
        exponent = self.exponent(name)
        fold_outputs(self._blocks[name], exponent)
        if exponent:
            linears = ", ".join(FOLDED)
            LOG.warning("%s: outputs of %s beyond fp16: computed at 2^-%d from here on", name, linears, exponent)

    def _first_bad_output(self, over_ranks: Callable[..., list[float]]) -> str | None:
        notes = over_ranks(*(float(name in self._bad and bool(self._bad[name])) for name in self.names))
        bad = [name for name, note in zip(self.names, notes, strict=True) if note]
        return f"{bad[0]} forward" if bad else None

    def _last_bad_gradient(
        self, parameters: Iterable[tuple[str, Tensor]], over_ranks: Callable[..., list[float]]
    ) -> str | None:
        bad = {
            ".".join(name.split(".")[:2])
            for name, parameter in parameters
            if parameter.grad is not None and bool(_not_finite(parameter.grad))
        }
        notes = over_ranks(*(float(name in bad) for name in self.names))  # of a sharded model a rank has rows alone
        ordered = [name for name, note in zip(self.names, notes, strict=True) if note]
        return f"{ordered[-1]} backward" if ordered else None

    def state_dict(self) -> dict[str, int]:
        """How often each block was blamed."""
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take the counts back, and with them what was folded."""
        self.counts = Counter(state)
        for name in self.names:
            self._fold(name)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def record_ranges(model: nn.Module) -> Iterator[dict[str, float]]:
    """Record the largest |output| of every block and of every linear in it while the context is open.

    What fp16 must hold is the linears' outputs (at most 65,504); a block's output is the float32 residual stream. Run
    it in float32, so that nothing overflows before it is measured.

    Yields: a dict that is filled, name → largest magnitude (inf or NaN stays visible), when the context closes.
    """
    largest: dict[str, Tensor] = {}
    ranges: dict[str, float] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            top = output.detach().abs().max().float()
            # torch.maximum keeps NaN, where max() of Python would lose it.
            largest[name] = torch.maximum(largest[name], top) if name in largest else top

        return hook

    blocks = model.get_submodule("blocks")
    handles = [
        module.register_forward_hook(hook_for(f"blocks.{name}"))
        for name, module in blocks.named_modules()
        if name and (name.isdigit() or isinstance(module, nn.Linear))
    ]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()
        ranges.update({name: top.item() for name, top in sorted(largest.items())})


def fp16_headroom(ranges: Mapping[str, float]) -> dict[str, float]:
    """How far each linear stays below fp16's largest number, as a factor: under 1 it overflows."""
    linears = {name: top for name, top in ranges.items() if name.count(".") > 1}
    return {name: FP16_MAX / top if top > 0 else math.inf for name, top in linears.items()}
