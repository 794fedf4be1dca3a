"""What a block does between its GEMMs, forward and backward: norms, modulation, rotation, gates.

Each is computed in float32 and rounded once. Run eagerly they write straight into the compute dtype (`out=`);
under torch.compile, which fuses the rounding by itself, they are plain expressions. Eager and in 16 bit, gradients of
the norms are rounded once more on their way, which spares a third of the traffic (docs/decisions/146-*).

Shapes: B slots, L tokens, D width, N heads, K channels a head, R modulation rows a sample (the first one for the first
`num_first` tokens where there are two).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten: Any = torch.ops.aten


def segments(num_tokens: int, num_first: int, num_rows: int) -> list[tuple[slice, slice]]:
    """Tokens and the modulation row that they take."""
    if num_rows == 1:
        return [(slice(0, num_tokens), slice(0, 1))]
    return [(slice(0, num_first), slice(0, 1)), (slice(num_first, num_tokens), slice(1, 2))]


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether what lies between GEMMs is kept in 16 bit: eager, in a 16-bit compute dtype."""
    return dtype.itemsize == 2 and not torch.compiler.is_compiling()


def product(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in float32, rounded once."""
    if torch.compiler.is_compiling():
        return (x * factor).to(dtype)
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def rounded(add: Tensor, x: Tensor, times: Tensor, dtype: torch.dtype) -> Tensor:
    """add + x · times in float32, rounded once."""
    if torch.compiler.is_compiling():
        return torch.addcmul(add, x, times).to(dtype)
    return torch.addcmul(add, x, times, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def modulate(n_BLD: Tensor, shift_BRD: Tensor, scale_BRD: Tensor, num_first: int) -> Tensor:
    """shift + n · scale by each token's row, in float32, rounded once to n's dtype."""
    parts = segments(n_BLD.shape[1], num_first, shift_BRD.shape[1])
    if torch.compiler.is_compiling():
        y = [torch.addcmul(shift_BRD[:, row], n_BLD[:, at], scale_BRD[:, row]).to(n_BLD.dtype) for at, row in parts]
        return y[0] if len(y) == 1 else torch.cat(y, dim=1)
    out = torch.empty_like(n_BLD)
    for at, row in parts:
        torch.addcmul(shift_BRD[:, row], n_BLD[:, at], scale_BRD[:, row], out=out[:, at])
    return out


def times(x_BLD: Tensor, factor_BRD: Tensor, num_first: int, dtype: torch.dtype) -> Tensor:
    """x times its token's row, in float32, rounded once."""
    parts = segments(x_BLD.shape[1], num_first, factor_BRD.shape[1])
    if torch.compiler.is_compiling():
        y = [(x_BLD[:, tokens] * factor_BRD[:, row]).to(dtype) for tokens, row in parts]
        return y[0] if len(y) == 1 else torch.cat(y, dim=1)
    out = torch.empty(x_BLD.shape, dtype=dtype, device=x_BLD.device)
    for tokens, row in parts:
        torch.mul(x_BLD[:, tokens], factor_BRD[:, row], out=out[:, tokens])
    return out


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_BRD: Tensor, num_first: int) -> Tensor:
    """x + y · gate by each token's row, float32."""
    if gate_BRD.shape[1] == 1:
        return torch.addcmul(x_BLD, y_BLD, gate_BRD)
    return add_gated_(x_BLD.clone(), y_BLD, gate_BRD, num_first)


def add_gated_(x_BLD: Tensor, y_BLD: Tensor, gate_BRD: Tensor, num_first: int) -> Tensor:
    """The same into x."""
    for tokens, row in segments(x_BLD.shape[1], num_first, gate_BRD.shape[1]):
        x_BLD[:, tokens].addcmul_(y_BLD[:, tokens], gate_BRD[:, row])
    return x_BLD


def normalise(x_BLD: Tensor, eps: float, dtype: torch.dtype, zeros_BL1: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm without weights: the normalised input in `dtype`, and 1 / standard deviation, B × L × 1 float32."""
    if is_narrow(dtype):
        variance_BL1, mean_BL1 = torch.var_mean(x_BLD, dim=-1, correction=0, keepdim=True)
        r_BL1 = variance_BL1.add_(eps).rsqrt_()
        return rounded(torch.addcmul(zeros_BL1, mean_BL1, r_BL1, value=-1), x_BLD, r_BL1, dtype), r_BL1
    n_BLD, _, r_BL1 = torch.native_layer_norm(x_BLD, x_BLD.shape[-1:], None, None, eps)
    return n_BLD.to(dtype), r_BL1


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gradient of a LayerNorm's output is given in, by the compute dtype."""
    return dtype if is_narrow(dtype) else torch.float32


def statistics_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What LayerNorm's backward kernel wants mean and scale in: its gradient's dtype on a CPU, float32 on CUDA."""
    return dtype if device.type == "cpu" else torch.float32


def layer_norm_backward(dn_BLD: Tensor, n_BLD: Tensor, zeros_BL1: Tensor, ones_BL1: Tensor) -> Tensor:
    """Gradient of LayerNorm's input in `dn`'s dtype, still to be multiplied by 1 / standard deviation."""
    kind = statistics_dtype(dn_BLD.dtype, dn_BLD.device)
    mean_BL1, scale_BL1 = zeros_BL1.to(kind), ones_BL1.to(kind)
    dx_BLD: Tensor = _aten.native_layer_norm_backward(
        dn_BLD, n_BLD.to(dn_BLD.dtype), n_BLD.shape[-1:], mean_BL1, scale_BL1, None, None, [True, False, False]
    )[0]
    return dx_BLD


def rms_scale(x_BLD: Tensor, eps: float) -> Tensor:
    """1 / root mean square, B × L × 1 float32."""
    norm = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x_BLD.shape[-1]).add_(eps).rsqrt_()


def scaled(x_BLD: Tensor, r_BL1: Tensor, weight_D: Tensor | None, heads: tuple[int, int]) -> Tensor:
    """RMSNorm from its scale, heads apart; without a weight where the other side of the attention carries it."""
    y_BLD = x_BLD if weight_D is None else x_BLD * weight_D
    return product(y_BLD, r_BL1, x_BLD.dtype).unflatten(2, heads)


def scaled_backward(dy_BLNK: Tensor, x_BLD: Tensor, r_BL1: Tensor, weight_D: Tensor | None) -> Tensor:
    """Gradient of `scaled`'s input, in its dtype."""
    dn_BLD = dy_BLNK.flatten(2)
    dn_BLD = dn_BLD if weight_D is None else dn_BLD * weight_D
    if is_narrow(x_BLD.dtype):
        return _narrow_rms_backward(x_BLD, r_BL1, dn_BLD, r_BL1)
    return _rms_backward(dn_BLD.float(), x_BLD, r_BL1)


class Rotation(NamedTuple):
    """Rotary factors of the tokens held here (train/model/rope.py): real if compiled, complex if eager."""

    cos_L1K: Tensor
    sin_L1K: Tensor
    """Of channel 2j with the rotation's minus sign."""
    factor_L1J: Tensor
    """cos + i sin of each pair of channels, complex64; J = K ÷ 2."""
    back_L1J: Tensor
    """Its conjugate, for the backward pass."""


def make_rotation(cos_L1K: Tensor, sin_L1K: Tensor) -> Rotation:
    """The factors in both forms, from `rope_table`'s."""
    cos, sin = cos_L1K[..., ::2].contiguous(), sin_L1K[..., 1::2].contiguous()
    return Rotation(cos_L1K, sin_L1K, torch.complex(cos, sin), torch.complex(cos, -sin))


def rotated(x_BLD: Tensor, r_BL1: Tensor, weight_D: Tensor, rotation: Rotation, heads: tuple[int, int]) -> Tensor:
    """RMSNorm and rotary positions, B × L × N × K; the norm's scale is folded into the rotation's factors."""
    y_BLNK, r_BL11 = (x_BLD * weight_D).unflatten(2, heads), r_BL1.unsqueeze(-1)
    if torch.compiler.is_compiling():
        y_BLNK = torch.addcmul(y_BLNK * (rotation.cos_L1K * r_BL11), swapped(y_BLNK), rotation.sin_L1K * r_BL11)
    else:
        _pairs(y_BLNK).mul_(rotation.factor_L1J * r_BL11)
    return y_BLNK.to(x_BLD.dtype)


def rotated_backward(dy_BLNK: Tensor, x_BLD: Tensor, r_BL1: Tensor, weight_D: Tensor, rotation: Rotation) -> Tensor:
    """Gradient of `rotated`'s input, in its dtype; what came in is used up."""
    if torch.compiler.is_compiling():
        dn_BLNK = (dy_BLNK * rotation.cos_L1K).addcmul_(swapped(dy_BLNK), rotation.sin_L1K, value=-1)
        return _rms_backward(dn_BLNK.flatten(2) * weight_D, x_BLD, r_BL1)
    dn_BLNK, narrow = dy_BLNK.float(), is_narrow(x_BLD.dtype)
    _pairs(dn_BLNK).mul_(rotation.back_L1J * r_BL1.unsqueeze(-1) if narrow else rotation.back_L1J)
    if narrow:
        return _narrow_rms_backward(x_BLD, r_BL1, dn_BLNK.flatten(2), weight_D)
    return _rms_backward(dn_BLNK.flatten(2).mul_(weight_D), x_BLD, r_BL1)


def swapped(x_BLNK: Tensor) -> Tensor:
    """Channels 2j and 2j + 1 in each other's place."""
    return torch.stack([x_BLNK[..., 1::2], x_BLNK[..., ::2]], dim=-1).flatten(-2)


def _pairs(x_BLNK: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, in place."""
    return torch.view_as_complex(x_BLNK.unflatten(-1, (-1, 2)))


def _rms_backward(dn_BLD: Tensor, x_BLD: Tensor, r_BL1: Tensor) -> Tensor:
    """Gradient of RMSNorm's input from that of its normalised output (float32, used up)."""
    dot_BL1 = (dn_BLD * x_BLD).sum(-1, keepdim=True).mul_(r_BL1.pow(3))
    if torch.compiler.is_compiling():
        return torch.addcmul(dn_BLD * r_BL1, x_BLD, dot_BL1, value=-1 / x_BLD.shape[-1]).to(x_BLD.dtype)
    out = torch.empty_like(x_BLD)
    return torch.addcmul(dn_BLD.mul_(r_BL1), x_BLD, dot_BL1, value=-1 / x_BLD.shape[-1], out=out)


def _narrow_rms_backward(x_BLD: Tensor, r_BL1: Tensor, dn_BLD: Tensor, factor: Tensor) -> Tensor:
    """The same from two factors of that gradient times the norm's scale, rounded once beside the small term's own."""
    width = x_BLD.shape[-1]
    rows, columns = product(dn_BLD, factor, x_BLD.dtype).flatten(0, 1).unsqueeze(1), x_BLD.reshape(-1, width, 1)
    # Neither a sum nor a mean: as large as a typical number of the gradient, so that float16 holds it. At a beta of 0
    # the first operand is not read.
    dot_M11 = torch.baddbmm(columns[:, :1], rows, columns, beta=0, alpha=width**-0.5)
    back_BL1 = dot_M11.view_as(r_BL1) * r_BL1.square().mul_(-(width**-0.5))
    out_BLD = torch.mul(x_BLD, back_BL1, out=rows.view_as(x_BLD))
    return torch.addcmul(out_BLD, dn_BLD, factor, out=out_BLD)


def gelu_backward_(grad: Tensor, x: Tensor) -> None:
    """Gradient of the tanh GELU's input, in place of its output's."""
    if torch.compiler.is_compiling():
        grad.copy_(_aten.gelu_backward(grad, x, approximate="tanh"))
    else:
        _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
