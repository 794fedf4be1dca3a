"""Attention through SDPA: which kernel a device gets, and a refusal of the one that stores every score.

Shapes: B slots, L query tokens, S key tokens, N heads, K channels a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shards.errors import UserError
from train.device import DeviceInfo

MAX_MATH_SCORES = 1024 * 1024
"""Query tokens × key tokens up to which a GPU may use the "math" kernel: 4 MiB a head in fp32."""
MAX_FUSED_HEAD_DIM = 256
LAST_WRONG_CUDNN = 91500
"""cuDNN up to 9.15.0 reads out of bounds where 128 does not divide the length (pytorch #169849, #171627)."""
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Backend(NamedTuple):
    """SDPA kernels in the order they are tried, and why these."""

    kernels: tuple[SDPBackend, ...]
    reason: str

    def __str__(self) -> str:
        names = ", ".join(kernel.name.removesuffix("_ATTENTION").lower() for kernel in self.kernels)
        return f"{names or 'chosen by torch'} ({self.reason})"


def choose_backend(facts: DeviceInfo, dtype: torch.dtype, num_tokens: int, head_dim: int) -> Backend:
    """Kernels for self-attention over `num_tokens` on a device.

    cuDNN (above 9.15.0) then flash on Hopper and later, flash on Ampere and Ada, memory-efficient below and for fp32;
    the CPU's own choice is left alone. "math" is offered on a GPU only up to MAX_MATH_SCORES.

    Raises: UserError where a GPU would be left with "math" at a size beyond that.
    """
    if facts.kind != "cuda" or facts.capability is None:
        return Backend((), f"{facts.kind} kernels store no scores or are small")
    kernels, reason = _fused_kernels(facts.capability, facts.cudnn, dtype, head_dim)
    if num_tokens * num_tokens <= MAX_MATH_SCORES:
        return Backend((*kernels, SDPBackend.MATH), f"{reason}; math allowed at {num_tokens:,} tokens")
    if not kernels:
        gib = 4 * num_tokens * num_tokens / 2**30
        raise UserError(
            f"attention over {num_tokens:,} tokens in {_name(dtype)} on {facts.name} would use the math kernel: "
            f"{reason}; it stores every score, {gib:.1f} GiB a head and layer in fp32",
            expected="a memory-efficient, flash or cuDNN kernel",
            fix="precision: auto (fp16 below compute capability 8.0), and heads of at most 256 channels",
        )
    return Backend(kernels, reason)


def _fused_kernels(
    capability: tuple[int, int], cudnn: int, dtype: torch.dtype, head_dim: int
) -> tuple[tuple[SDPBackend, ...], str]:
    architecture = f"sm_{capability[0]}{capability[1]}"
    if head_dim > MAX_FUSED_HEAD_DIM or head_dim % 8 or dtype not in _NAMES:
        return (), f"no fused kernel takes heads of {head_dim} channels in {_name(dtype)}"
    if dtype == torch.float32:
        return (SDPBackend.EFFICIENT_ATTENTION,), f"fp32 on {architecture}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return (), f"bf16 is only emulated on {architecture}"
    if capability < (8, 0):
        return (SDPBackend.EFFICIENT_ATTENTION,), f"fp16 on {architecture}, which has no flash kernel"
    fused = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if capability >= (9, 0) and head_dim <= 128 and cudnn > LAST_WRONG_CUDNN:
        return (SDPBackend.CUDNN_ATTENTION, *fused), f"{_name(dtype)} on {architecture}"
    return fused, f"{_name(dtype)} on {architecture}"


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))


def attend(
    q_BLNK: Float[Tensor, "b l n k"],
    k_BSNK: Float[Tensor, "b s n k"],
    v_BSNK: Float[Tensor, "b s n k"],
    backend: Backend,
) -> Float[Tensor, "b l n*k"]:
    """Softmax attention without a mask, heads joined again. All three in one dtype.

    Raises: UserError when none of the backend's kernels takes these inputs (never a silent fall to "math").
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    if not backend.kernels:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    with sdpa_kernel(list(backend.kernels), set_priority=True):
        try:
            out_BNLK = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
                raise
            raise UserError(
                f"attention {tuple(q.shape)} in {_name(q.dtype)}: none of {backend} takes it; math stores every score",
                expected="a torch build whose fused kernels match this card",
                fix="wantrain doctor",
            ) from error
    return out_BNLK.transpose(1, 2).flatten(2)
