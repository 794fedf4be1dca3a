"""Which attention kernel a device gets; a GPU is described, not needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from shards.errors import UserError
from train.device import DeviceInfo, choose_device, device_info
from train.model import kernels
from train.model.attention import Backend, attend, choose_backend

H100 = DeviceInfo("cuda", "H100", (9, 0), 91600)
OLD_CUDNN = H100._replace(cudnn=91500)
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
        (OLD_CUDNN, torch.bfloat16, (FLASH, EFFICIENT)),  # it reads out of bounds where 128 does not divide the length
        (H100._replace(cudnn=91002), torch.float16, (FLASH, EFFICIENT)),
        (H100._replace(cudnn=0), torch.bfloat16, (FLASH, EFFICIENT)),
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


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A CPU whose kernel goes by the names of a GPU's; `wrong(name, part, num_tokens, num_keys)` breaks it."""
    state: dict[str, Any] = {"wrong": lambda *case: False, "calls": []}
    forward, backward = kernels.attend_forward, kernels.attend_backward

    def attend_forward(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        state["calls"].append((name, q.shape[1], k.shape[1]))
        out, residue = forward("cpu", q, k, v)
        if state["wrong"](name, "forward", q.shape[1], k.shape[1]):
            out[:, -1] *= 9
        return out, residue

    def attend_backward(name: str, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        grads = backward("cpu", grad, q, k, *rest)
        if state["wrong"](name, "backward", q.shape[1], k.shape[1]):
            grads[2][:, -1] = torch.nan
        return grads

    monkeypatch.setattr(kernels, "attend_forward", attend_forward)
    monkeypatch.setattr(kernels, "attend_backward", attend_backward)
    monkeypatch.setattr(kernels, "_usable", lambda name, *inputs: name != "efficient")
    kernels._probe.cache_clear()
    yield state
    kernels._probe.cache_clear()


def chosen(num_tokens: int, candidates: tuple[SDPBackend, ...] = (CUDNN, FLASH, EFFICIENT)) -> SDPBackend:
    length = kernels.PROBE_TOKENS + num_tokens % kernels.PROBE_TOKENS
    return kernels._probe(candidates, torch.device("cpu"), torch.float32, length, 64)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_kernel_that_is_wrong_at_one_remainder_is_not_chosen_there(broken: dict[str, Any], part: str) -> None:
    """11,440 tokens leave 48 of 128: a probe at 128 tokens would be the one case that is right."""
    broken["wrong"] = lambda name, at, tokens, keys: name == "cudnn" and at == part and tokens % 128 == 48
    assert REAL % 128 == 48 and chosen(REAL) is FLASH
    assert chosen(5_070) is CUDNN and chosen(128) is CUDNN
    calls = len(broken["calls"])
    assert chosen(REAL + 128) is FLASH and len(broken["calls"]) == calls  # once a remainder


def test_a_kernel_that_is_wrong_at_the_texts_512_keys_is_not_chosen(broken: dict[str, Any]) -> None:
    broken["wrong"] = lambda name, at, tokens, keys: name == "cudnn" and keys == 512
    assert chosen(REAL) is FLASH
    assert ("flash", 176, 176) in broken["calls"] and ("flash", 176, 512) in broken["calls"]


def test_where_no_kernel_is_right_or_usable_it_is_an_error(broken: dict[str, Any]) -> None:
    broken["wrong"] = lambda name, at, tokens, keys: name != "math"
    with pytest.raises(UserError, match="176 tokens and 128 more"):
        chosen(REAL)
    with pytest.raises(UserError, match="no attention kernel"):
        chosen(REAL, (EFFICIENT,))
    assert chosen(200, (CUDNN, FLASH, MATH)) is MATH


def test_a_kernel_that_reads_beyond_its_input_meets_nan(broken: dict[str, Any], monkeypatch: Any) -> None:
    inner = kernels.attend_forward

    def reads_on(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, residue = inner(name, q, k, v)
        beyond = v.as_strided((1,), (1,), v.storage_offset() + v.numel())
        return (out + beyond if name == "cudnn" else out), residue

    monkeypatch.setattr(kernels, "attend_forward", reads_on)
    assert chosen(REAL) is FLASH


def test_a_cpu_keeps_its_own_kernel_and_a_gpus_is_the_probed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend((CUDNN, FLASH), "bf16 on sm_90")
    assert kernels.probed(backend, torch.device("cpu"), torch.bfloat16, REAL, 128) is backend
    assert kernels.kernel_name(Backend((), "cpu")) == "cpu" and kernels.kernel_name(backend) == "cudnn"
    asked = []
    monkeypatch.setattr(kernels, "_probe", lambda *arguments: asked.append(arguments) or FLASH)
    found = kernels.probed(backend, torch.device("cuda:1"), torch.bfloat16, REAL, 128)
    assert found.kernels == (FLASH,) and asked == [((CUDNN, FLASH), torch.device("cuda:1"), torch.bfloat16, 176, 128)]


def test_a_local_rank_makes_its_gpu_current_and_products_sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every rank opens a context on GPU 0, and cuBLAS may add the parts of a LoRA gradient in fp16."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    flags = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(flags, name) for name in names]
    try:
        for name in names:
            setattr(flags, name, True)
        found = [choose_device("auto", rank) for rank in (0, 3)] + [choose_device("cuda"), choose_device("cuda:2")]
        assert [device.index for device in found] == [0, 3, 0, 2] and current == found
        assert [getattr(flags, name) for name in names] == [False, False]
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(flags, name, value)
