"""The attentions of a block with a written-out backward pass (train/recompute/block.py), by heads where
ranks share the tokens.

Shapes: B slots, L tokens, l of them held here, S text tokens, N heads, n of them worked on here, K channels a head.
"""

from __future__ import annotations

from torch import Tensor

from train.model.kernels import attend_backward, attend_forward
from train.recompute.ops import rotated
from train.recompute.parts import BlockParts, Shared, Values


def _rotated(values: Values, parts: BlockParts, shared: Shared, name: str) -> Tensor:
    """Self-attention's queries or keys, heads apart."""
    weight = parts.norms[f"self_attn.{name}"]
    return rotated(values[name], values[f"r{name}"], weight, shared.rotation, shared.heads)


def self_attention(values: Values, parts: BlockParts, shared: Shared, *, for_backward: bool) -> None:
    """Self-attention's output, B × l × D, into the values; by heads where several ranks share the tokens.

    `for_backward`: the backward pass follows at once, so what other ranks sent is held for it.
    """
    ulysses, tokens = shared.ulysses, shared.num_tokens
    if ulysses is None:
        q, k = (_rotated(values, parts, shared, name) for name in "qk")
        attention(values, "a", q, k, values["v"].unflatten(2, shared.heads), shared)
        return
    q, k = (ulysses.to_heads(_rotated(values, parts, shared, name), tokens) for name in "qk")
    v = ulysses.to_heads(values["v"].unflatten(2, shared.heads), tokens)
    out_BLnK, residue = attend_forward(shared.kernel, q, k, v)
    values["a"] = ulysses.to_tokens(out_BLnK).flatten(2)
    _save_residue(values, "a", residue)
    if for_backward:
        values |= {"sent.q": q, "sent.k": k, "sent.v": v, "sent.a": out_BLnK}
        del values["v"]


def self_attention_backward(
    values: Values, parts: BlockParts, shared: Shared, grad_BLD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rotated queries and keys and of the values, B × l × N × K; uses up what was saved for it."""
    ulysses, tokens = shared.ulysses, shared.num_tokens
    if ulysses is None:
        q, k = (_rotated(values, parts, shared, name) for name in "qk")
        return attention_backward(values, "a", grad_BLD, q, k, values.pop("v"), shared)
    if "sent.q" not in values:  # kept as this rank's tokens, so it is exchanged once more
        values |= {f"sent.{name}": ulysses.to_heads(_rotated(values, parts, shared, name), tokens) for name in "qk"}
        values["sent.v"] = ulysses.to_heads(values.pop("v").unflatten(2, shared.heads), tokens)
        values["sent.a"] = ulysses.to_heads(values["a"].unflatten(2, shared.heads), tokens)
    del values["a"]
    grad = ulysses.to_heads(grad_BLD.unflatten(2, shared.heads), tokens)
    q, k, v, out = (values.pop(f"sent.{name}") for name in "qkva")
    given = attend_backward(shared.kernel, grad, q, k, v, out, _residue(values, "a"))
    del grad, q, k, v, out
    dq, dk, dv = (ulysses.to_tokens(x) for x in given)
    return dq, dk, dv


def attention(values: Values, name: str, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> None:
    """Attention over what is here, B × L × D, into the values."""
    out_BLNK, residue = attend_forward(shared.kernel, q, k, v)
    values[name] = out_BLNK.flatten(2)
    _save_residue(values, name, residue)


def _save_residue(values: Values, name: str, residue: tuple[Tensor, ...]) -> None:
    for place, tensor in enumerate(residue):
        values[f"{name}.{place}"] = tensor


def _residue(values: Values, name: str) -> tuple[Tensor, ...]:
    return tuple(values[f"{name}.{place}"] for place in range(4) if f"{name}.{place}" in values)


def attention_backward(
    values: Values, name: str, grad_BLD: Tensor, q: Tensor, k: Tensor, v_BSD: Tensor, shared: Shared
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients of queries, keys and values, heads apart."""
    grad, v, out = (x.unflatten(2, shared.heads) for x in (grad_BLD, v_BSD, values.pop(name)))
    return attend_backward(shared.kernel, grad, q, k, v, out, _residue(values, name))
