"""A block with a frozen base and its backward pass written out, so that what is kept for it is a choice.

    x ─ n1 ─ q k v ─ a ─ o ─▶ + ─ n2 ─ q2 ─ a2 ─ o2 ─▶ + ─ n3 ─ h ─ down ─▶ +
                                   text ─ k2 v2

`forward_block` computes these values and hands back those it was asked to keep; `backward_block` computes the others
again, by the same operators from the same inputs, so that keeping more or less does not move a bit. It keeps the
normalised input of each part in the compute dtype with one scale a token, which is all that LayerNorm's and LoRA's
gradients need, so the float32 residual stream is kept once per block, or not at all. The same block
under autograd is `Block` in train/model/block.py.

Shapes: B slots, L tokens, M = B·L, D width, N heads, K channels a head, S text tokens, R modulation rows, r LoRA rank,
I O input and output channels of a linear. Numbers as in train/model/dit.py: residual and norms float32, GEMMs and
attention in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor

from train.recompute.attention import attention, attention_backward, self_attention, self_attention_backward
from train.recompute.ops import (
    add_gated,
    add_gated_,
    gelu_backward_,
    layer_norm_backward,
    modulate,
    norm_dtype,
    normalise,
    product,
    rms_scale,
    rotated_backward,
    rounded,
    scaled,
    scaled_backward,
    times,
)
from train.recompute.parts import (
    BlockParts,
    Gradients,
    Shared,
    Values,
    linear,
    linear_backward,
    lora_backward,
    low_rank,
)


def kept_names(saves: Collection[str], values: Collection[str]) -> list[str]:
    """Which of a block's values are kept under some of `flops.SAVE_GROUPS`: the input where its norms are not."""
    return [name for name in values if group_of(name) in saves or (name == "x" and "projections" not in saves)]


def group_of(name: str) -> str | None:
    """The save group of a value; none for the block's input, and for what other ranks sent."""
    if name == "x" or name.startswith("sent."):
        return None
    if name.startswith("ffn") or name == "h":
        return "ffn_up"
    return "attention" if name.partition(".")[0] in ("a", "a2") else "projections"


def forward_block(x_BLD: Tensor, parts: BlockParts, shared: Shared, saves: Collection[str]) -> tuple[Tensor, Values]:
    """The block's output, and the values to keep."""
    mod = _modulation(parts, shared)
    values: Values = {"x": x_BLD}
    x_BLD = _fill(values, parts, shared, mod, for_backward=False)
    down = linear(values, "ffn.2", torch.nn.functional.gelu(values["h"], approximate="tanh"), parts)
    x_BLD = add_gated_(x_BLD, down, _gate(mod, 5, parts, "ffn.2"), shared.num_first)
    return x_BLD, {name: values[name] for name in kept_names(saves, values)}


def _fill(values: Values, parts: BlockParts, shared: Shared, mod: Tensor, *, for_backward: bool) -> Tensor:
    """Compute what is missing of the values up to `h`; return the residual ahead of the feed-forward if it was made.

    `for_backward`: the backward pass follows at once, so what other ranks sent is held for it.
    """
    # The input is kept wherever something below reads it.
    x_BLD, dtype = cast(Tensor, values.get("x")), shared.text_BSD.dtype
    if "n1" not in values:
        values["n1"], values["r1"] = normalise(x_BLD, shared.eps, dtype, shared.zeros_BL1)
        y_BLD = modulate(values["n1"], mod[:, :, 0], mod[:, :, 1], shared.num_first)
        for name, leaf in (("q", "q"), ("k", "k"), ("v", "v")):
            values[name] = linear(values, f"self_attn.{leaf}", y_BLD, parts)
        values["rq"], values["rk"] = rms_scale(values["q"], shared.eps), rms_scale(values["k"], shared.eps)
        del y_BLD
    if "a" not in values:
        self_attention(values, parts, shared, for_backward=for_backward)
    if "n2" not in values:
        out = linear(values, "self_attn.o", values["a"], parts)
        x_BLD = add_gated(x_BLD, out, _gate(mod, 2, parts, "self_attn.o"), shared.num_first)
        del out
        values["n2"], values["r2"] = normalise(x_BLD, shared.eps, dtype, shared.zeros_BL1)
        y_BLD = rounded(parts.norms["norm3.bias"], values["n2"], parts.norms["norm3"], dtype)
        values["q2"] = linear(values, "cross_attn.q", y_BLD, parts)
        del y_BLD
        values["k2"], values["v2"] = (linear(values, f"cross_attn.{n}", shared.text_BSD, parts) for n in "kv")
        values["rq2"], values["rk2"] = rms_scale(values["q2"], shared.eps), rms_scale(values["k2"], shared.eps)
    if "a2" not in values:
        q, k = (scaled(values[f"{n}2"], values[f"r{n}2"], parts.norms[f"cross_attn.{n}"], shared.heads) for n in "qk")
        attention(values, "a2", q, k, values["v2"].unflatten(2, shared.heads), shared)
        del q, k
    if "n3" not in values:
        out = linear(values, "cross_attn.o", values["a2"], parts)
        x_BLD.add_(out, alpha=1 / parts.linears["cross_attn.o"].output_scale)
        del out
        values["n3"], values["r3"] = normalise(x_BLD, shared.eps, dtype, shared.zeros_BL1)
    if "h" not in values:
        y_BLD = modulate(values["n3"], mod[:, :, 3], mod[:, :, 4], shared.num_first)
        values["h"] = linear(values, "ffn.0", y_BLD, parts)
    return x_BLD


def backward_block(
    values: Values, parts: BlockParts, shared: Shared, grad_BLD: Tensor, needs_input_gradient: bool
) -> tuple[Tensor | None, Gradients]:
    """Gradients of the block's input (float32) and of its LoRA, from the values kept."""
    values = dict(values)
    grads: Gradients = {}
    mod = _modulation(parts, shared)
    _fill(values, parts, shared, mod, for_backward=True)
    values.pop("x", None)
    grad_BLD = _feed_forward_backward(values, parts, shared, mod, grad_BLD, grads)
    _cross_backward_(values, parts, shared, grad_BLD, grads)
    if needs_input_gradient or any(name.startswith("self") and part.lora for name, part in parts.linears.items()):
        _self_backward_(values, parts, shared, mod, grad_BLD, grads, needs_input_gradient)
    return grad_BLD if needs_input_gradient else None, grads


def _feed_forward_backward(
    values: Values, parts: BlockParts, shared: Shared, mod: Tensor, grad_BLD: Tensor, grads: Gradients
) -> Tensor:
    h_BLF, up, down = values.pop("h"), parts.linears["ffn.0"], parts.linears["ffn.2"]
    out_BLD = times(grad_BLD, mod[:, :, 5], shared.num_first, h_BLF.dtype)
    act_BLF = h_BLF if down.lora is None else torch.nn.functional.gelu(h_BLF, approximate="tanh")
    if down.lora is not None and "ffn.2.low" not in values:
        values["ffn.2.low"] = low_rank(down.lora, act_BLF.flatten(0, 1))
    dh_BLF = linear_backward(values, "ffn.2", out_BLD, act_BLF, parts, grads)
    del out_BLD, act_BLF
    gelu_backward_(dh_BLF, h_BLF)
    del h_BLF
    y_BLD = values["n3"]
    if up.lora is not None:
        y_BLD = modulate(y_BLD, mod[:, :, 3], mod[:, :, 4], shared.num_first)
    dy_BLD = linear_backward(values, "ffn.0", dh_BLF, y_BLD, parts, grads)
    del dh_BLF, y_BLD
    dn_BLD = times(dy_BLD, mod[:, :, 4], shared.num_first, norm_dtype(dy_BLD.dtype))
    del dy_BLD
    # The gradient that came in is autograd's; from here on it is ours and grows in place.
    return torch.addcmul(
        grad_BLD, layer_norm_backward(dn_BLD, values.pop("n3"), shared.zeros_BL1, shared.ones_BL1), values["r3"]
    )


def _cross_backward_(values: Values, parts: BlockParts, shared: Shared, grad_BLD: Tensor, grads: Gradients) -> None:
    dtype, norms, linears = shared.text_BSD.dtype, parts.norms, parts.linears
    da_BLD = linear_backward(values, "cross_attn.o", grad_BLD.to(dtype), values["a2"], parts, grads)
    q, k = (scaled(values[f"{n}2"], values[f"r{n}2"], norms[f"cross_attn.{n}"], shared.heads) for n in "qk")
    dq, dk, dv = attention_backward(values, "a2", da_BLD, q, k, values.pop("v2"), shared)
    del da_BLD, q, k
    if lora := linears["cross_attn.k"].lora:
        dk = scaled_backward(dk, values["k2"], values["rk2"], norms["cross_attn.k"])
        lora_backward(values, "cross_attn.k", dk, shared.text_BSD, lora, grads)
    if lora := linears["cross_attn.v"].lora:
        lora_backward(values, "cross_attn.v", dv.flatten(2), shared.text_BSD, lora, grads)
    del dk, dv
    dq = scaled_backward(dq, values.pop("q2"), values["rq2"], norms["cross_attn.q"])
    y_BLD = values["n2"]
    if linears["cross_attn.q"].lora:
        y_BLD = rounded(norms["norm3.bias"], y_BLD, norms["norm3"], dtype)
    dy_BLD = linear_backward(values, "cross_attn.q", dq, y_BLD, parts, grads)
    del dq, y_BLD
    dn_BLD = product(dy_BLD, norms["norm3"], norm_dtype(dtype))
    del dy_BLD
    grad_BLD.addcmul_(layer_norm_backward(dn_BLD, values.pop("n2"), shared.zeros_BL1, shared.ones_BL1), values["r2"])


def _self_backward_(
    values: Values,
    parts: BlockParts,
    shared: Shared,
    mod: Tensor,
    grad_BLD: Tensor,
    grads: Gradients,
    needs_input_gradient: bool,
) -> None:
    dtype, norms = shared.text_BSD.dtype, parts.norms
    out_BLD = times(grad_BLD, mod[:, :, 2], shared.num_first, dtype)
    da_BLD = linear_backward(values, "self_attn.o", out_BLD, values["a"], parts, grads)
    del out_BLD
    given = dict(zip("qkv", self_attention_backward(values, parts, shared, da_BLD), strict=True))
    del da_BLD
    dy_BLD, y_BLD = None, values["n1"]
    if any(parts.linears[f"self_attn.{leaf}"].lora for leaf in "qkv"):
        y_BLD = modulate(y_BLD, mod[:, :, 0], mod[:, :, 1], shared.num_first)
    for leaf in "vqk":
        name = f"self_attn.{leaf}"
        if leaf == "v":
            out_BLD = given.pop(leaf).flatten(2)
        else:
            out_BLD = rotated_backward(
                given.pop(leaf), values.pop(leaf), values[f"r{leaf}"], norms[name], shared.rotation
            )
        lora = parts.linears[name].lora
        if needs_input_gradient:
            dy_BLD = linear_backward(values, name, out_BLD, y_BLD, parts, grads, dy_BLD)
        elif lora is not None:
            lora_backward(values, name, out_BLD, y_BLD, lora, grads)
        del out_BLD
    del y_BLD
    if dy_BLD is not None:
        dn_BLD = times(dy_BLD, mod[:, :, 1], shared.num_first, norm_dtype(dtype))
        del dy_BLD
        grad_BLD.addcmul_(
            layer_norm_backward(dn_BLD, values.pop("n1"), shared.zeros_BL1, shared.ones_BL1), values["r1"]
        )


def _gate(mod: Tensor, place: int, parts: BlockParts, name: str) -> Tensor:
    """A gate that undoes its linear's `output_scale`."""
    scale = parts.linears[name].output_scale
    return mod[:, :, place] if scale == 1 else mod[:, :, place] / scale


def _modulation(parts: BlockParts, shared: Shared) -> Tensor:
    """Shift, 1 + scale, gate, shift, 1 + scale, gate: B × R × 6 × D."""
    mod_BR6D = parts.modulation_16D + shared.rows_BR6D
    mod_BR6D[:, :, 1::3].add_(1)
    return mod_BR6D
