"""What a block does between its GEMMs, forward and backward: norms, modulation, rotation, gates.

Each is computed in float32 and rounded once. Run eagerly they write straight into the compute dtype (`out=`);
under torch.compile, which fuses the rounding by itself, they are plain expressions.

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


def normalise(x_BLD: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LayerNorm without weights: the normalised input in `dtype`, and 1 / standard deviation, B × L × 1 float32."""
    n_BLD, _, r_BL1 = torch.native_layer_norm(x_BLD, x_BLD.shape[-1:], None, None, eps)
    return n_BLD.to(dtype), r_BL1


def layer_norm_backward(dn_BLD: Tensor, n_BLD: Tensor, zeros_BL1: Tensor, ones_BL1: Tensor) -> Tensor:
    """Gradient of LayerNorm's input, still to be multiplied by 1 / standard deviation."""
    dx_BLD: Tensor = _aten.native_layer_norm_backward(
        dn_BLD, n_BLD.float(), n_BLD.shape[-1:], zeros_BL1, ones_BL1, None, None, [True, False, False]
    )[0]
    return dx_BLD


def rms_scale(x_BLD: Tensor, eps: float) -> Tensor:
    """1 / root mean square, B × L × 1 float32."""
    norm = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x_BLD.shape[-1]).add_(eps).rsqrt_()


def scaled(x_BLD: Tensor, r_BL1: Tensor, weight_D: Tensor, heads: tuple[int, int]) -> Tensor:
    """RMSNorm from its scale, heads apart."""
    y_BLD = x_BLD * weight_D
    if torch.compiler.is_compiling():
        return (y_BLD * r_BL1).to(x_BLD.dtype).unflatten(2, heads)
    return torch.mul(y_BLD, r_BL1, out=torch.empty_like(x_BLD)).unflatten(2, heads)


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


def unrotated(dy_BLNK: Tensor, weight_D: Tensor, rotation: Rotation) -> Tensor:
    """Gradient before rotation and the norm's weight, float32 B × L × D; what came in is used up."""
    if torch.compiler.is_compiling():
        dx_BLNK = (dy_BLNK * rotation.cos_L1K).addcmul_(swapped(dy_BLNK), rotation.sin_L1K, value=-1)
    else:
        dx_BLNK = dy_BLNK.float()
        _pairs(dx_BLNK).mul_(rotation.back_L1J)
    return dx_BLNK.flatten(2).mul_(weight_D)


def swapped(x_BLNK: Tensor) -> Tensor:
    """Channels 2j and 2j + 1 in each other's place."""
    return torch.stack([x_BLNK[..., 1::2], x_BLNK[..., ::2]], dim=-1).flatten(-2)


def _pairs(x_BLNK: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, in place."""
    return torch.view_as_complex(x_BLNK.unflatten(-1, (-1, 2)))


def rms_backward(dn_BLD: Tensor, x_BLD: Tensor, r_BL1: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of RMSNorm's input from that of its normalised output (float32, used up)."""
    dot_BL1 = (dn_BLD * x_BLD).sum(-1, keepdim=True).mul_(r_BL1.pow(3))
    if torch.compiler.is_compiling():
        return torch.addcmul(dn_BLD * r_BL1, x_BLD, dot_BL1, value=-1 / x_BLD.shape[-1]).to(dtype)
    out = torch.empty(x_BLD.shape, dtype=dtype, device=x_BLD.device)
    return torch.addcmul(dn_BLD.mul_(r_BL1), x_BLD, dot_BL1, value=-1 / x_BLD.shape[-1], out=out)


def gelu_backward_(grad: Tensor, x: Tensor) -> None:
    """Gradient of the tanh GELU's input, in place of its output's."""
    if torch.compiler.is_compiling():
        grad.copy_(_aten.gelu_backward(grad, x, approximate="tanh"))
    else:
        _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
