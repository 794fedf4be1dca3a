"""Attention kernels, forward and backward by name, for a block that writes its own backward pass.

They are the very operators that SDPA and its derivative call (torch, derivatives.yaml). On a GPU each is compared with
math in float32 once, on a small input of the same remainder, before it is used.

Shapes: B slots, L query tokens, S key tokens, N heads, K channels a head.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shards.console import LOG
from shards.errors import UserError
from train.model.attention import Backend

PROBE_TOKENS, PROBE_KEYS = 128, 512
"""Kernels work in tiles of 128 tokens, and fail where a length leaves a rest; cross-attention has 512 keys."""
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


def kernel_name(backend: Backend) -> str:
    """What `attend_forward` calls the backend's first kernel: cpu, flash, efficient, cudnn or math."""
    return _BY_BACKEND[backend.kernels[0]] if backend.kernels else "cpu"


def probed(backend: Backend, device: torch.device, dtype: torch.dtype, num_tokens: int, head_dim: int) -> Backend:
    """The backend with only the first of its kernels that a device computes right at such lengths.

    A GPU's kernel is compared with math in float32 before its first use, forward and backward, at 128 tokens and the
    rest that `num_tokens` leaves of 128, for self-attention and for cross-attention.

    Raises: UserError when no kernel takes such inputs, or none is right.
    """
    if device.type != "cuda":
        return backend
    kernel = _probe(backend.kernels, device, dtype, PROBE_TOKENS + num_tokens % PROBE_TOKENS, head_dim)
    return Backend((kernel,), backend.reason)


@lru_cache(maxsize=256)
def _probe(
    kernels: tuple[SDPBackend, ...], device: torch.device, dtype: torch.dtype, num_tokens: int, head_dim: int
) -> SDPBackend:
    for kernel in kernels:
        name = _BY_BACKEND[kernel]
        found = [_error(name, device, dtype, num_tokens, keys, head_dim) for keys in (num_tokens, PROBE_KEYS)]
        errors = [error for error in found if error is not None]
        if len(errors) < len(found):
            continue
        if all(error <= PROBE_TOLERANCE for error in errors):  # false for NaN
            return kernel
        LOG.warning(
            "attention kernel %s of torch %s is not used: at %d tokens it differs from float32 by %.3g and %.3g",
            name, torch.__version__, num_tokens, *errors,
        )  # fmt: skip
    raise UserError(
        f"no attention kernel of this torch build takes heads of {head_dim} in {dtype} on {device} and is right at "
        f"lengths of {num_tokens} tokens and {PROBE_TOKENS} more",
        fix="another torch build, or buckets of another length; `wantrain doctor` shows what is installed",
    )


def _error(
    name: str, device: torch.device, dtype: torch.dtype, num_tokens: int, num_keys: int, head_dim: int
) -> float | None:
    """Largest relative error of a kernel's output and gradients against math in float32; None: it takes no such input.

    Inputs are followed by NaN in memory, so that a kernel that reads beyond their end is found out.
    """
    generator = torch.Generator(device).manual_seed(0)

    @torch.inference_mode(False)
    def make(length: int) -> Tensor:
        padded = torch.full((1, length + PROBE_TOKENS, 2, head_dim), math.nan, dtype=dtype, device=device)
        values = torch.randn((1, length, 2, head_dim), device=device, generator=generator)
        return padded[:, :length].copy_(values)

    q, k, v, grad = (make(length) for length in (num_tokens, num_keys, num_keys, num_tokens))
    if not _usable(name, q, k, v):
        return None
    out, residue = attend_forward(name, q, k, v)
    ours = (out, *attend_backward(name, grad, q, k, v, out, residue))
    exact = _under_autograd(SDPBackend.MATH, (q.float(), k.float(), v.float()), grad.float())
    errors = torch.stack([(x.float() - y).norm() / y.norm() for x, y in zip(ours, exact, strict=True)])
    return float(errors.max())


def _usable(name: str, *inputs: Tensor) -> bool:
    if name == "math":
        return True
    q, k, v = (x.transpose(1, 2) for x in inputs)
    params: Any = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return bool(getattr(torch.backends.cuda, f"can_use_{name}_attention")(params))


def _under_autograd(
    kernel: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor], grad_BLNK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SDPA's output and gradients by one kernel, as autograd has them."""
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(kernel):
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
