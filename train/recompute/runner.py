"""How blocks are run, and what each keeps for its backward pass.

With a frozen base a block's backward pass is written out (train/recompute/block.py) and keeps the groups of
values that it is given by name:

    attention     outputs of both attentions: 4 bytes a channel and token
    projections   q k v of both, and the three normalised inputs in place of the block's own: 16 bytes
    ffn_up        the feed-forward's inner activation: 2 bytes an inner channel

(at 16 bit). `none` keeps all three: no GEMM is done twice. `full` keeps a block's input only. Whatever is kept, loss
and gradients are the same to the bit, where the kernels repeat. When every weight is trained, autograd decides what
`none` keeps, and `full` is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from shards.errors import UserError
from train.geometry import SAVE_GROUPS, Shape
from train.lora.lora import LoRALinear, keep_mask
from train.model import stream as streaming
from train.model.block import Block, BlockInputs, Linear
from train.model.dit import WanDiT, set_checkpointing
from train.model.kernels import kernel_name
from train.model.stream import Copier, HostInput
from train.recompute.block import backward_block, forward_block
from train.recompute.ops import make_rotation, norm_dtype, statistics_dtype
from train.recompute.parts import BlockParts, LinearParts, LoRAParts, Shared, Values

Saves = Sequence[Collection[str]]
"""For each block, the groups it keeps."""
ChooseSaves = Callable[[Shape], Saves]


class _Call(NamedTuple):
    """One block's forward pass and what its backward pass will want again."""

    block: Block
    shared: Shared
    inputs: BlockInputs
    saves: Collection[str]
    linears: dict[str, Linear]
    casts: dict[str, tuple[Tensor, Tensor]]
    """This block's LoRA in the compute dtype, by linear."""
    forward: Any
    backward: Any
    arrive: Callable[[], None]
    """Called ahead of the backward pass: brings the block's weights where they are streamed."""
    keep_input: Callable[[Tensor], HostInput] | None
    """Takes the block's input to the host's memory; None: it is kept on the device."""


class RecomputeRunner:
    """Runs blocks whose base is frozen; without gradients in float32 they run plainly."""

    def __init__(
        self, model: WanDiT, choose_saves: ChooseSaves, *, compiled: bool = False, offload_inputs: bool = False
    ) -> None:
        self.choose_saves = choose_saves
        self._stream = model.stream
        self._copier = streaming.make_copier(model.head.modulation.device) if offload_inputs else None
        self._before: HostInput | None = None
        self._linears = [
            {name: module for name, module in block.named_modules() if isinstance(module, Linear)}
            for block in model.blocks
        ]
        self._adapted = [_adapted(linears) for linears in self._linears]
        self._first = next((index for index, adapted in enumerate(self._adapted) if adapted), 0)
        self._casts: list[dict[str, tuple[Tensor, Tensor]]] = []
        self._shared: Shared | None = None
        self._saves: Saves = ()
        wrap = _compiled if compiled else _as_is
        self._forward, self._backward = wrap(forward_block), wrap(backward_block)

    def __call__(self, index: int, block: Block, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        """Run block `index`; blocks come in order, the first one opens a pass."""
        if not torch.is_grad_enabled():
            return self._without_gradients(index, block, x_BLD, inputs)
        if index == 0:
            self._begin(x_BLD, block, inputs)
            self._saves = self.choose_saves(Shape(*x_BLD.shape[:2]))
        adapted = self._adapted[index]
        if not adapted and not x_BLD.requires_grad:
            return block(x_BLD, inputs)
        # The first trained block's backward pass is another graph (nothing flows on), so it runs as it is.
        backward = self._backward if x_BLD.requires_grad else backward_block
        saves, stream = self._saves[index], self._stream
        arrive = _nothing if stream is None else partial(stream.backward, index, self._first)
        keep_input = None if self._copier is None or "projections" in saves else self._keep_input
        call = self._call(index, block, inputs)._replace(
            saves=saves, forward=self._forward, backward=backward, arrive=arrive, keep_input=keep_input
        )
        weights = [weight for module in adapted.values() for weight in (module.lora_A, module.lora_B)]
        # Through the block's own call, for whoever hooks it (sharding, telemetry).
        return block(x_BLD, inputs, lambda x: _RecomputeBlock.apply(x, call, *weights))

    def _call(self, index: int, block: Block, inputs: BlockInputs) -> _Call:
        own = self._linears[index], self._casts[index]
        shared = cast(Shared, self._shared)
        return _Call(block, shared, inputs, (), *own, forward_block, backward_block, _nothing, None)

    def _without_gradients(self, index: int, block: Block, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        """In 16 bits by the hand-written forward pass, which moves half of what the plain block does."""
        if inputs.text_BSD.dtype == torch.float32:
            return block(x_BLD, inputs)
        if index == 0:
            self._begin(x_BLD, block, inputs)
        call = self._call(index, block, inputs)
        return block(x_BLD, inputs, lambda x: forward_block(x, _parts(call), call.shared, ())[0])

    def _keep_input(self, x_BLD: Tensor) -> HostInput:
        self._before = HostInput(cast(Copier, self._copier), x_BLD, self._before)
        return self._before

    def _begin(self, x_BLD: Tensor, block: Block, inputs: BlockInputs) -> None:
        dtype, device = inputs.text_BSD.dtype, x_BLD.device
        batch, tokens = x_BLD.shape[:2]
        kind = statistics_dtype(norm_dtype(dtype), device)
        self._before = None
        self._casts = _cast_all(self._adapted, dtype)
        self._shared = Shared(
            rows_BR6D=inputs.rows_BR6D,
            text_BSD=inputs.text_BSD,
            rotation=make_rotation(*inputs.rope),
            zeros_BL1=torch.zeros(batch, tokens, 1, dtype=kind, device=device),
            ones_BL1=torch.ones(batch, tokens, 1, dtype=kind, device=device),
            num_first=inputs.num_first,
            heads=block.self_attn.heads,
            eps=block.eps,
            kernel=kernel_name(inputs.backend),
            ulysses=inputs.ulysses,
            num_tokens=inputs.num_tokens,
        )


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph a bucket, mode and save list. Dynamo's limit of eight is the calling thread's own, and on a GPU the
    backward pass has a thread of its own: so it is raised around each call."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            return compiled(*arguments)

    return call


def _as_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _nothing() -> None:
    return None


class _RecomputeBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, call: _Call, *weights: Tensor) -> Tensor:
        # Detached, so that the first block's input is like the others' and one compiled graph serves all.
        x_BLD = x_BLD.detach()
        ctx.held = call.keep_input(x_BLD) if call.keep_input is not None else None
        out_BLD, values = call.forward(x_BLD, _parts(call), call.shared, tuple(call.saves))
        if ctx.held is not None:
            ctx.held.leave()
            del values["x"]
        ctx.call, ctx.names = call, list(values)
        ctx.save_for_backward(*values.values())
        return out_BLD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        values: Values = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        call: _Call = ctx.call
        call.arrive()
        if ctx.held is not None:
            values["x"] = ctx.held.take()
        dx_BLD, grads = call.backward(values, _parts(call), call.shared, grad_BLD, ctx.needs_input_grad[0])
        return dx_BLD, None, *_to_float32([grad for name in call.casts for grad in grads[name]])


def _adapted(linears: dict[str, Linear]) -> dict[str, LoRALinear]:
    return {name: module for name, module in linears.items() if isinstance(module, LoRALinear)}


def _to_float32(grads: list[Tensor]) -> list[Tensor]:
    """All of a block's gradients by one copy."""
    if not grads or grads[0].dtype == torch.float32:
        return grads
    wide = [torch.empty(grad.shape, dtype=torch.float32, device=grad.device) for grad in grads]
    torch._foreach_copy_(wide, grads)
    return wide


def _cast_all(adapted: Sequence[dict[str, LoRALinear]], dtype: torch.dtype) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Every LoRA in the compute dtype, by one copy for a complete pass."""
    weights = [w.detach() for block in adapted for module in block.values() for w in (module.lora_A, module.lora_B)]
    if weights and weights[0].dtype != dtype:
        flat = torch.empty(sum(w.numel() for w in weights), dtype=dtype, device=weights[0].device)
        casts = [part.view(w.shape) for part, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True)]
        torch._foreach_copy_(casts, weights)
        weights = casts
    pairs = iter(zip(weights[::2], weights[1::2], strict=True))
    return [{name: next(pairs) for name in block} for block in adapted]


def _parts(call: _Call) -> BlockParts:
    """The block's tensors as they are now: a sharded base is gathered again for the backward pass."""
    block = call.block
    linears = {name: _linear_parts(name, module, call) for name, module in call.linears.items()}
    attentions = {"self_attn": block.self_attn, "cross_attn": block.cross_attn}
    norms: dict[str, Any] = {
        f"{part}.{n}": getattr(module, f"norm_{n}").weight for part, module in attentions.items() for n in "qk"
    }
    if call.shared.text_BSD.dtype != torch.float32:
        norms |= {"cross_attn.k": norms["cross_attn.k"] * norms["cross_attn.q"], "cross_attn.q": None}
    norms |= {"norm3": block.norm3.weight, "norm3.bias": block.norm3.bias}
    return BlockParts(linears, norms, block.modulation)


def _linear_parts(name: str, module: Linear, call: _Call) -> LinearParts:
    dtype = call.shared.text_BSD.dtype
    weight, bias = module.kept, module.bias.to(dtype)
    if not isinstance(module, LoRALinear):
        return LinearParts(weight, bias, None, module.output_scale)
    scale, live = module.scale, None
    if module.training and module.dropout:
        key = call.inputs.dropout
        if key is None:
            raise ValueError("LoRA dropout in training needs dropout_key_B: one int64 a sample")
        tokens = call.shared.zeros_BL1.shape[1]
        if name in ("cross_attn.k", "cross_attn.v"):
            key, tokens = key._replace(token_offset=0), call.shared.text_BSD.shape[1]
        live = keep_mask(key, module.layer, tokens, module.in_features, module.dropout).flatten(0, 1)
        scale /= 1 - module.dropout
    return LinearParts(weight, bias, LoRAParts(*call.casts[name], scale, live), module.output_scale)


def keep(model: WanDiT, saves: ChooseSaves | str, *, compiled: bool = False, offload_inputs: bool = False) -> None:
    """Choose how a model's blocks are run. Call it after the LoRA was injected.

    Args:
        saves: `none` (keep everything), `full` (keep nothing but a block's input), or a function from the shape of a
            forward pass to what each block keeps.
        compiled: run a block's forward and backward pass through torch.compile.
        offload_inputs: where a block keeps its input, keep it in the host's memory.
    Raises: UserError when every weight is trained and anything but none and full is asked for.
    """
    frozen = not any(weight.requires_grad for name, weight in model.named_parameters() if ".lora_" not in name)
    if frozen:
        kept = {"none": SAVE_GROUPS, "full": ()}
        choose = saves if callable(saves) else partial(_same, (kept[saves],) * len(model.blocks))
        model.run_block = RecomputeRunner(model, choose, compiled=compiled, offload_inputs=offload_inputs)
        return
    if callable(saves):
        raise UserError(
            "checkpointing.policy: selective keeps the values of blocks whose base is frozen, and every weight trains",
            expected="none or full with lora: null",
        )
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    set_checkpointing(model, saves)


def _same(saves: Saves, shape: Shape) -> Saves:
    return saves
