"""Which attention kernel a device gets; a GPU is described, not needed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from shards.errors import UserError
from train.device import DeviceInfo, device_info
from train.model.attention import Backend, attend, choose_backend

H100 = DeviceInfo("cuda", "H100", (9, 0))
RTX4090 = DeviceInfo("cuda", "RTX 4090", (8, 9))
A100 = DeviceInfo("cuda", "A100", (8, 0))
V100 = DeviceInfo("cuda", "V100", (7, 0))
CPU = DeviceInfo("cpu", "cpu", None)
CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
REAL = 11_440  # tokens of 49 frames at 1280×704


@pytest.mark.parametrize(
    ("facts", "dtype", "kernels"),
    [
        (H100, torch.bfloat16, (CUDNN, FLASH, EFFICIENT)),
        (A100, torch.bfloat16, (FLASH, EFFICIENT)),
        (RTX4090, torch.float16, (FLASH, EFFICIENT)),
        (V100, torch.float16, (EFFICIENT,)),
        (V100, torch.float32, (EFFICIENT,)),
        (H100, torch.float32, (EFFICIENT,)),
        (CPU, torch.float32, ()),
    ],
)
def test_kernels_at_real_sizes_never_hold_math(
    facts: DeviceInfo, dtype: torch.dtype, kernels: tuple[SDPBackend, ...]
) -> None:
    """The first choice of each card; "math" is not among them."""
    assert choose_backend(facts, dtype, REAL, 128).kernels == kernels


@pytest.mark.parametrize(
    ("facts", "dtype", "head_dim", "why"),
    [
        (V100, torch.bfloat16, 128, "bf16 is only emulated on sm_70"),
        (H100, torch.bfloat16, 512, "heads of 512 channels"),
        (H100, torch.float64, 128, "in torch.float64"),
    ],
)
def test_math_alone_at_real_sizes_is_an_error_that_says_why(
    facts: DeviceInfo, dtype: torch.dtype, head_dim: int, why: str
) -> None:
    """bf16 on a V100 stored every score and looked like a slow card; here it does not start."""
    with pytest.raises(UserError, match=why) as caught:
        choose_backend(facts, dtype, REAL, head_dim)
    assert "stores every score, 0.5 GiB a head" in str(caught.value)
    assert choose_backend(facts, dtype, 512, head_dim).kernels == (MATH,)


def test_the_choice_is_shown() -> None:
    """A line for the start of a run."""
    assert str(choose_backend(H100, torch.bfloat16, REAL, 128)) == ("cudnn, flash, efficient (bf16 on sm_90)")
    assert str(choose_backend(V100, torch.float16, REAL, 128)) == (
        "efficient (fp16 on sm_70, which has no flash kernel)"
    )
    assert "chosen by torch" in str(choose_backend(device_info("cpu"), torch.float32, REAL, 128))


def test_attention_equals_softmax_by_hand() -> None:
    """Scale 1/√K, no mask, heads joined in order."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / 8**0.5
    by_hand = torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), v).flatten(2)
    assert torch.allclose(attend(q, k, v, Backend((), "")), by_hand)


def test_a_kernel_that_does_not_take_the_inputs_is_named() -> None:
    """No silent fall to math: cuDNN on a CPU's tensors is an error that says what was tried."""
    x = torch.randn(1, 4, 2, 8)
    assert attend(x, x, x, Backend((FLASH, MATH), "here")).shape == (1, 4, 16)
    with pytest.raises(UserError, match="none of cudnn"):
        attend(x, x, x, Backend((CUDNN,), "here"))
