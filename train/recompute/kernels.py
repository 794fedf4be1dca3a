"""Attention kernels, forward and backward by name, for a block that writes its own backward pass.

They are the very operators that SDPA and its derivative call (torch, derivatives.yaml). On a GPU each is held against
SDPA under autograd once, on a small input, before it is used.

Shapes: B slots, L query tokens, S key tokens, N heads, K channels a head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shards.errors import UserError
from train.model.attention import Backend

PROBE_TOKENS = 128
PROBE_TOLERANCE = 0.02
Residue = tuple[Tensor, ...]
"""What a kernel's backward wants beside its inputs and its output: log-sum-exp and, on a GPU, unused random states."""

_BY_BACKEND = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.MATH: "math",
}
_aten: Any = torch.ops.aten


def kernel_name(backend: Backend, device: torch.device, dtype: torch.dtype, heads: tuple[int, int]) -> str:
    """The first of the backend's kernels that takes such inputs: cpu, flash, efficient, cudnn or math.

    Raises: UserError when none does; RuntimeError when one disagrees with SDPA under autograd.
    """
    if device.type != "cuda":
        return "cpu"
    return _probe(backend.kernels, device, dtype, heads)


@lru_cache(maxsize=64)
def _probe(kernels: tuple[SDPBackend, ...], device: torch.device, dtype: torch.dtype, heads: tuple[int, int]) -> str:
    generator = torch.Generator(device).manual_seed(0)
    size = (1, PROBE_TOKENS, *heads)
    q, k, v, grad = (torch.randn(size, dtype=dtype, device=device, generator=generator) for _ in range(4))
    for kernel in kernels:
        name = _BY_BACKEND[kernel]
        if _usable(name, q, k, v):
            _compare(name, kernel, (q, k, v), grad)
            return name
    raise UserError(
        f"no attention kernel of this torch build takes {heads[0]} heads of {heads[1]} in {dtype} on {device}",
        fix="wantrain doctor",
    )


def _usable(name: str, *inputs: Tensor) -> bool:
    if name == "math":
        return True
    q, k, v = (x.transpose(1, 2) for x in inputs)
    params: Any = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return bool(getattr(torch.backends.cuda, f"can_use_{name}_attention")(params))


def _compare(name: str, kernel: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor], grad_BLNK: Tensor) -> None:
    out, residue = attend_forward(name, *inputs)
    ours = (out, *attend_backward(name, grad_BLNK, *inputs, out, residue))
    theirs = _under_autograd(kernel, inputs, grad_BLNK)
    for mine, other in zip(ours, theirs, strict=True):
        difference = float((mine.float() - other.float()).norm() / other.float().norm())
        if not difference < PROBE_TOLERANCE:
            raise RuntimeError(
                f"attention kernel {name} of torch {torch.__version__} differs from SDPA by {difference:.1%}"
            )


def _under_autograd(
    kernel: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor], grad_BLNK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SDPA's output and gradients by one kernel, as autograd has them."""
    with torch.enable_grad(), sdpa_kernel(kernel):
        leaves = [x.detach().requires_grad_() for x in inputs]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad_BLNK)
    return out.detach(), dq, dk, dv


def attend_forward(kernel: str, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> tuple[Tensor, Residue]:
    """Softmax attention without a mask: B × L × N × K out, and what `attend_backward` needs."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), (lse,)
    if kernel == "flash":
        out, lse, _, _, _, _, state, unused, _ = _aten._scaled_dot_product_flash_attention(q, k, v)
        return out.transpose(1, 2), (lse, state, unused)
    if kernel == "efficient":
        out, lse, seed, offset = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        return out.transpose(1, 2), (lse, seed, offset)
    if kernel == "cudnn":
        out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out.transpose(1, 2), (lse, seed, offset)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), ()


def attend_backward(
    kernel: str,
    grad_BLNK: Tensor,
    q_BLNK: Tensor,
    k_BSNK: Tensor,
    v_BSNK: Tensor,
    out_BLNK: Tensor,
    residue: Residue,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each laid out as its input."""
    if kernel == "math":
        _, *grads = _under_autograd(SDPBackend.MATH, (q_BLNK, k_BSNK, v_BSNK), grad_BLNK)
        return grads[0], grads[1], grads[2]
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BLNK, q_BLNK, k_BSNK, v_BSNK, out_BLNK))
    lse, sizes = residue[0], (q.shape[2], k.shape[2])
    if kernel == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    elif kernel == "flash":
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *sizes, 0.0, False, *residue[1:]
        )
    elif kernel == "efficient":
        wanted = [True, True, True, False]
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, *residue[1:], 0.0, wanted, False
        )
    else:
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, *residue[1:], None, None, None, *sizes, 0.0, False
        )
    dq, dk, dv = (x.transpose(1, 2) for x in grads[:3])
    return dq, dk, dv
