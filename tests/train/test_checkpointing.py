"""What a block keeps moves no bit, and the block's written-out backward pass is its plain twin's."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from shards.errors import UserError
from train.config.model import DiTConfig, LoRAConfig
from train.geometry import SAVE_GROUPS, Shape
from train.lora.lora import inject, lora_modules
from train.model import kernels
from train.model.block import Block, BlockInputs
from train.model.dit import WanDiT, build_model, set_checkpointing
from train.recompute.runner import ChooseSaves, keep

DIMS = DiTConfig(dim=48, num_heads=2, num_layers=3, ffn_dim=96, text_dim=32, text_len=16)
ATTENTION = ("self_attn", "cross_attn")
EVERY_LINEAR = (*ATTENTION, "ffn")
SUBSETS = [subset for size in (1, 2) for subset in itertools.combinations(SAVE_GROUPS, size)]


def make_model(lora: LoRAConfig, dtype: torch.dtype = torch.float32) -> WanDiT:
    model = build_model(DIMS, dtype, seed=0)
    inject(model, lora, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.normal_(0, 0.1, generator=generator)
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.train()


def run(model: WanDiT, image_first: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    velocity = model(*_inputs(image_first))
    generator = torch.Generator().manual_seed(3)
    (velocity * torch.randn(velocity.shape, generator=generator)).mean().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return velocity.detach(), grads


def _inputs(image_first: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 48, 3, 4, 6, generator=generator)
    text = torch.randn(2, 16, 32, generator=generator)
    return latent, torch.tensor([300.0, 700.0]), torch.tensor([image_first, False]), text, torch.tensor([5, 6])


def everywhere(saves: tuple[str, ...]) -> ChooseSaves:
    return lambda shape: (saves,) * DIMS.num_layers


def assert_same_bits(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []


@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, EVERY_LINEAR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_moves_no_bit(dtype: torch.dtype, targets: tuple[str, ...], image_first: bool) -> None:
    results = []
    policies: list[ChooseSaves | str] = ["none", "full", *map(everywhere, SUBSETS)]
    policies.append(lambda shape: [(), ("attention",), SAVE_GROUPS])
    for policy in policies:
        model = make_model(LoRAConfig(rank=4, targets=targets, dropout=0.3), dtype)
        keep(model, policy)
        results.append(run(model, image_first))
    for result in results[1:]:
        assert_same_bits(results[0], result)


@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(rank=4, targets=EVERY_LINEAR),
        LoRAConfig(rank=4, targets=EVERY_LINEAR, alpha=10.0, dropout=0.4),
        LoRAConfig(rank=4, targets=("cross_attn",)),
        LoRAConfig(rank=4, targets=("blocks.1.cross_attn.k", "blocks.2.ffn.2")),
        LoRAConfig(rank=4, targets=("v",)),
    ],
    ids=["all", "scale-and-dropout", "cross", "late", "values"],
)
def test_the_backward_pass_is_the_plain_twins(lora: LoRAConfig, image_first: bool) -> None:
    plain, lean = make_model(lora), make_model(lora)
    set_checkpointing(plain, "none")
    keep(lean, "none")
    velocity, grads = run(plain, image_first)
    our_velocity, our_grads = run(lean, image_first)
    assert float((our_velocity - velocity).norm() / velocity.norm()) < 1e-6
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert float((our_grads[name] - grad).norm() / grad.norm()) < 2e-6, name


def test_in_16_bit_it_is_as_near_to_float32_as_the_plain_twin() -> None:
    def error(dtype: torch.dtype, lean: bool) -> float:
        model = make_model(LoRAConfig(rank=4, targets=EVERY_LINEAR), dtype)
        if lean:
            keep(model, "none")
        _, grads = run(model)
        return float(torch.cat([(grads[name] - exact[name]).flatten() for name in exact]).norm() / norm)

    _, exact = run(make_model(LoRAConfig(rank=4, targets=EVERY_LINEAR)))
    norm = torch.cat([grad.flatten() for grad in exact.values()]).norm()
    for dtype in (torch.bfloat16, torch.float16):
        assert error(dtype, lean=True) < 1.15 * error(dtype, lean=False)


def test_the_residual_stream_and_its_gradient_are_never_rounded() -> None:
    """Trap 3: blocks whose branches add nothing hand a float32 stream on, and its gradient back, to the bit."""
    model = make_model(LoRAConfig(rank=4), torch.bfloat16)
    with torch.no_grad():
        for block in model.blocks:
            for last in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                last.weight.zero_()
                last.bias.zero_()
        for module in lora_modules(model).values():
            module.lora_B.zero_()
    keep(model, "none")
    lean, streams = model.run_block, []

    def watched(index: int, block: Block, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        if index == 0:
            x_BLD = x_BLD + 1e-3 * torch.randn(x_BLD.shape, generator=torch.Generator().manual_seed(0))
            streams.append(x_BLD.requires_grad_())
        streams.append(lean(index, block, streams[-1], inputs))
        streams[-1].retain_grad()
        return streams[-1]

    model.run_block = watched
    run(model)
    first, last = streams[0], streams[-1]
    assert len(streams) == DIMS.num_layers + 1
    assert not torch.equal(first, first.bfloat16().float()) and torch.equal(last, first)
    assert not torch.equal(last.grad, last.grad.bfloat16().float()) and torch.equal(first.grad, last.grad)


def test_gradients_add_up_over_micro_steps_and_passes_may_overlap() -> None:
    lora = LoRAConfig(rank=4, targets=EVERY_LINEAR)
    once, twice = make_model(lora, torch.bfloat16), make_model(lora, torch.bfloat16)
    keep(once, "none")
    keep(twice, lambda shape: [(), ("attention",), SAVE_GROUPS])
    _, single = run(once)
    run(twice)
    _, double = run(twice)
    assert all(torch.equal(double[name], 2 * single[name]) for name in single)


def test_hooks_on_blocks_still_fire() -> None:
    model = make_model(LoRAConfig(rank=4))
    keep(model, "full")
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    run(model)
    assert len(seen) == DIMS.num_layers


def test_without_gradients_blocks_run_plainly() -> None:
    model = make_model(LoRAConfig(rank=4))
    keep(model, "full")
    latent, text = torch.randn(1, 48, 1, 4, 4), torch.randn(1, 16, 32)
    arguments = (latent, torch.tensor([500.0]), torch.tensor([False]), text)
    with torch.no_grad():
        ours = model(*arguments)
        set_checkpointing(model, "none")
        assert torch.equal(ours, model(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_gradients_in_16_bit_the_numbers_are_those_of_training(dtype: torch.dtype) -> None:
    """The hand-written forward pass, not the plain block: between two forward passes of training, too."""
    model = make_model(LoRAConfig(rank=4, targets=EVERY_LINEAR), dtype)
    keep(model, "full")
    trained, grads = run(model)
    model.zero_grad()

    def look(module: WanDiT, arguments: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            seen.append(WanDiT.forward(module, *arguments))

    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(look)
    again = run(model)
    hook.remove()
    assert torch.equal(seen[0], trained)
    assert_same_bits((trained, grads), again)
    plain = make_model(LoRAConfig(rank=4, targets=EVERY_LINEAR), dtype)
    with torch.no_grad():
        assert not torch.equal(plain(*_inputs()), trained)


def test_the_choice_follows_the_shape() -> None:
    asked = []

    def choose(shape: Shape) -> list[tuple[str, ...]]:
        asked.append(shape)
        return [SAVE_GROUPS] * DIMS.num_layers

    model = make_model(LoRAConfig(rank=4))
    keep(model, choose)
    run(model)
    assert asked == [Shape(2, 18)]


def test_a_whole_model_is_not_checkpointed_selectively() -> None:
    model = build_model(DIMS, torch.float32, seed=0)
    with pytest.raises(UserError, match="every weight trains"):
        keep(model, everywhere(SAVE_GROUPS))
    keep(model, "none")
    velocity, grads = run(model)
    assert len(grads) == len(list(model.parameters()))
    model.zero_grad()
    keep(model, "full")
    assert_same_bits((velocity, grads), run(model))


@pytest.mark.parametrize(("name", "backend"), [("cpu", SDPBackend.FLASH_ATTENTION), ("math", SDPBackend.MATH)])
def test_kernels_are_sdpa_under_autograd(name: str, backend: SDPBackend) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, length, 3, 16, generator=generator) for length in (20, 12, 12, 20))
    out, residue = kernels.attend_forward(name, q, k, v)
    ours = (out, *kernels.attend_backward(name, grad, q, k, v, out, residue))
    for mine, other in zip(ours, kernels._under_autograd(backend, (q, k, v), grad), strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_cuda_kernels_take_what_they_are_given(name: str) -> None:
    """Their schemas and shapes on pretended CUDA tensors; that they compute the same is asked of the card itself."""
    with FakeTensorMode():
        make = partial(torch.empty, dtype=torch.bfloat16, device="cuda")
        q, k, v, grad = (make(2, length, 24, 128) for length in (256, 64, 64, 256))
        out, residue = kernels.attend_forward(name, q, k, v)
        assert out.shape == q.shape
        grads = kernels.attend_backward(name, grad, q, k, v, out, residue)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
        assert all(x.is_contiguous() for x in (out, *grads))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own, inside Inductor
@pytest.mark.parametrize("image_first", [False, True])
def test_compiled_blocks_are_two_graphs_without_a_break(image_first: bool) -> None:
    """Forward and backward; the first trained block's backward pass has no input gradient and runs as it is."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    lora = LoRAConfig(rank=4)
    eager, compiled = make_model(lora), make_model(lora)
    keep(eager, "none")
    keep(compiled, lambda shape: [("attention",)] * DIMS.num_layers, compiled=True)
    dynamo.reset()
    counters.clear()
    velocity, grads = run(eager, image_first)
    our_velocity, our_grads = run(compiled, image_first)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert float((our_velocity - velocity).norm() / velocity.norm()) < 1e-6
    for name, grad in grads.items():
        assert float((our_grads[name] - grad).norm() / grad.norm()) < 2e-6, name
