"""The DiT against diffusers' WanTransformer3DModel, in fp32, forward and backward, and its precision islands.

Traps of docs (numbers as in the technical contract): 1, 2, 3, 8, 9, 11, 13, 14; see each test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train.config.model import TI2V_5B, DiTConfig
from train.model.attention import Backend, attend
from train.model.block import Block, BlockInputs
from train.model.dit import WanDiT, build_model, check_inputs, init_random, set_checkpointing, sinusoids
from train.model.load import diffusers_key
from train.model.patchify import patchify, token_grid, unpatchify
from train.model.rope import axis_sizes, rope_table, rotate

Twin = Callable[[WanDiT], nn.Module]
SMALL = {"in_channels": 8, "out_channels": 8, "text_len": 12, "text_dim": 16, "freq_dim": 32}
SIZES = [
    # dim, heads, layers, ffn, latent frames, rows, columns
    (96, 4, 2, 160, 3, 4, 6),
    (96, 4, 1, 160, 1, 4, 4),
    (60, 6, 3, 96, 5, 6, 10),
    (256, 2, 1, 512, 2, 8, 4),  # heads of 128, as the real model: 44, 42, 42
]


def make(dim: int, heads: int, layers: int, ffn: int) -> WanDiT:
    """A model with every parameter random."""
    config = DiTConfig(dim=dim, num_heads=heads, num_layers=layers, ffn_dim=ffn, **SMALL)
    model = build_model(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(model: WanDiT, frames: int, rows: int, columns: int, size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps (fractional), ragged text padded by zeros."""
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(size, model.config.in_channels, frames, rows, columns, generator=generator)
    timestep = torch.linspace(713.25, 61.5, size)
    text = torch.zeros(size, model.config.text_len, model.config.text_dim)
    for i in range(size):
        text[i, : 3 + 4 * (i % 3)] = torch.randn(3 + 4 * (i % 3), model.config.text_dim, generator=generator)
    return latent, timestep, text


def per_token(timestep_B: Tensor, image_first_B: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Timesteps as diffusers takes them: one a token, 0 in the first frame of image-to-video samples."""
    frames, rows, columns = grid
    table_BL = timestep_B[:, None].repeat(1, frames * rows * columns)
    for i, first in enumerate(image_first_B.tolist()):
        if first:
            table_BL[i, : rows * columns] = 0
    return table_BL


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference ÷ largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("image_first", [(False, False), (True, False), (True, True)])
def test_forward_and_input_gradients_match_diffusers(
    size: tuple[int, ...], image_first: tuple[bool, bool], diffusers_twin: Twin
) -> None:
    """Traps 8 (t = 0 on the first frame's tokens), 9 (padding is attended), 11 (norm2/norm3), 13 (a zero head)."""
    model = make(*size[:4])
    twin = diffusers_twin(model)
    latent, timestep, text = batch(model, *size[4:])
    first_B = torch.tensor(image_first)
    grid = token_grid(model.config, latent.shape)
    ours_in, theirs_in = latent.clone().requires_grad_(), latent.clone().requires_grad_()
    text_ours, text_theirs = text.clone().requires_grad_(), text.clone().requires_grad_()

    ours = model(ours_in, timestep, first_B, text_ours)
    theirs = twin(theirs_in, per_token(timestep, first_B, grid), text_theirs).sample
    assert theirs.std() > 0.1, "a zero head passes any test"
    assert relative(ours, theirs) < 1e-5

    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(6))
    ours.backward(cotangent)
    theirs.backward(cotangent)
    assert relative(ours_in.grad, theirs_in.grad) < 1e-5
    assert relative(text_ours.grad, text_theirs.grad) < 1e-5
    gradients = {name: weight.grad for name, weight in twin.named_parameters()}
    for name, weight in model.named_parameters():
        if name.endswith("attn.k.bias"):
            continue  # softmax does not see a constant added to a score: this gradient is rounding only
        assert relative(weight.grad, gradients[diffusers_key(name)]) < 2e-5, name


@pytest.mark.parametrize("size", SIZES)
def test_what_is_left_of_the_difference_is_diffusers_sinusoid(
    size: tuple[int, ...], diffusers_twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers computes the timestep's sinusoids in float32, the official model and ours in float64: given theirs, the
    models agree to 2e-6 where they agree to 1e-5 otherwise.
    """
    from diffusers.models.embeddings import get_timestep_embedding

    def theirs_in_float32(timestep: Tensor, width: int) -> Tensor:
        flat = get_timestep_embedding(timestep.flatten(), width, flip_sin_to_cos=True, downscale_freq_shift=0)
        return flat.unflatten(0, timestep.shape)

    monkeypatch.setattr("train.model.dit.sinusoids", theirs_in_float32)
    model = make(*size[:4])
    latent, timestep, text = batch(model, *size[4:])
    first_B = torch.tensor([True, False])
    table_BL = per_token(timestep, first_B, token_grid(model.config, latent.shape))
    with torch.no_grad():
        theirs = diffusers_twin(model)(latent, table_BL, text).sample
        assert relative(model(latent, timestep, first_B, text), theirs) < 2e-6


def test_scalar_timesteps_equal_the_mixed_path_without_image(tiny_dit: WanDiT, diffusers_twin: Twin) -> None:
    """A batch without image-to-video samples takes one modulation row; the same samples beside one take two."""
    latent, timestep, text = batch(tiny_dit, 3, 4, 6, size=3)
    alone = tiny_dit(latent[:2], timestep[:2], torch.zeros(2, dtype=torch.bool), text[:2])
    mixed = tiny_dit(latent, timestep, torch.tensor([False, False, True]), text)
    assert relative(mixed[:2], alone) < 1e-6
    scalar = diffusers_twin(tiny_dit)(latent[:2], timestep[:2], text[:2]).sample
    assert relative(alone, scalar) < 1e-5


def test_the_first_frame_takes_timestep_zero_only_where_asked(tiny_dit: WanDiT) -> None:
    """Trap 8: t = 0 on the first frame's tokens of image-to-video samples, and on no others."""
    timestep = torch.tensor([800.0, 300.0])
    rows, _ = tiny_dit.embed_time(timestep, torch.tensor([True, False]), two_rows=True)
    plain, _ = tiny_dit.embed_time(torch.tensor([0.0, 800.0, 300.0]), torch.zeros(3, dtype=torch.bool), two_rows=False)
    assert torch.allclose(rows[0], plain[[0, 1], 0], atol=1e-5)
    assert torch.allclose(rows[1], plain[[2, 2], 0], atol=1e-5)


def test_real_configuration_has_the_published_keys(diffusers_twin: Twin) -> None:
    """825 tensors, 4,999,787,712 parameters, and a bijection onto diffusers' names with equal shapes. Trap 11."""
    model = build_model(TI2V_5B, torch.bfloat16, "meta")
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert len(shapes) == 825
    assert sum(weight.numel() for weight in model.parameters()) == 4_999_787_712
    assert sum(4 * weight.numel() for weight in model.parameters()) == 19_999_150_848, (
        "the published fp32 shards' bytes"
    )
    theirs = {name: tuple(weight.shape) for name, weight in diffusers_twin(model).state_dict().items()}
    assert {diffusers_key(name): shape for name, shape in shapes.items()} == theirs
    assert sum(isinstance(module, nn.Linear) for module in model.blocks.modules()) == 300
    assert model.head.head.weight.dtype == model.blocks[0].modulation.dtype == torch.float32
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16


def test_key_map_is_the_conversion_script_of_diffusers() -> None:
    """The map once more, against diffusers' single-file loader; norm3 must become norm2. Trap 11."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = build_model(DiTConfig(dim=96, num_heads=4, num_layers=2, ffn_dim=160, **SMALL), seed=0)
    marked = {name: torch.full((1,), float(index)) for index, name in enumerate(model.state_dict())}
    converted = convert_wan_transformer_to_diffusers(dict(marked))
    assert {name: value.item() for name, value in converted.items()} == {
        diffusers_key(name): value.item() for name, value in marked.items()
    }


def test_sixteen_bit_compute_keeps_the_islands_in_fp32(tiny_dit: WanDiT) -> None:
    """Trap 3: residual stream, norms, modulation, time embedding, rotation and head in float32 under bf16 compute."""
    model = build_model(tiny_dit.config, torch.bfloat16)
    model.load_state_dict(tiny_dit.state_dict())
    seen: dict[str, set[torch.dtype]] = {}

    def note(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen.setdefault(kind, set()).add(output.dtype)
            seen.setdefault(f"{kind} in", set()).add(inputs[0].dtype)

        return hook

    for name, module in model.named_modules():
        kind = {
            "Block": "residual",
            "RMSNorm": "q and k norm",
            "LayerNorm": "norm3",
            "Head": "head",
            "Attention": "attention",
        }.get(type(module).__name__)
        kind = kind or ("time" if name in ("time_embedding", "time_projection") else None)
        kind = kind or ("block linear" if name.startswith("blocks") and isinstance(module, nn.Linear) else None)
        if kind:
            module.register_forward_hook(note(kind))
    latent, timestep, text = batch(model, 3, 4, 6)
    out = model(latent, timestep, torch.tensor([True, False]), text)

    islands = ("residual", "residual in", "q and k norm", "norm3", "norm3 in", "head", "head in", "time", "time in")
    assert {kind: seen[kind] for kind in islands} == {kind: {torch.float32} for kind in islands}
    assert seen["block linear"] == seen["block linear in"] == seen["attention"] == {torch.bfloat16}
    assert out.dtype == torch.float32
    cos, sin = rope_table(24, (3, 2, 3), 0, 18, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32


def test_queries_and_keys_are_turned_in_float32(tiny_dit: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 3: under bf16 compute q, k and their angles meet in float32; only the result is rounded."""
    seen: list[torch.dtype] = []
    attended: list[torch.dtype] = []

    def spy_rotate(*tensors: Tensor) -> Tensor:
        seen.extend(tensor.dtype for tensor in tensors)
        return rotate(*tensors)

    def spy_attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        attended.extend((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, backend)

    monkeypatch.setattr("train.model.block.rotate", spy_rotate)
    monkeypatch.setattr("train.model.block.attend", spy_attend)
    model = build_model(tiny_dit.config, torch.bfloat16)
    model.load_state_dict(tiny_dit.state_dict())
    latent, timestep, text = batch(model, 3, 4, 6)
    model(latent, timestep, torch.tensor([True, False]), text)
    assert len(seen) == 2 * 2 * 3
    assert set(seen) == {torch.float32}
    assert len(attended) == 2 * 2 * 3
    assert set(attended) == {torch.bfloat16}


def test_the_residual_stream_is_never_rounded(tiny_dit: WanDiT) -> None:
    """Trap 3: blocks whose branches add nothing hand on a float32 stream to the bit, rounded nowhere inside."""
    model = build_model(tiny_dit.config, torch.bfloat16)
    model.load_state_dict(tiny_dit.state_dict())
    with torch.no_grad():
        for block in model.blocks:
            for last in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                last.weight.zero_()
                last.bias.zero_()
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def run(index: int, block: Block, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        if index == 0:
            x_BLD = x_BLD + 1e-3 * torch.randn(x_BLD.shape, generator=torch.Generator().manual_seed(0))
            entered.append(x_BLD)
        left.append(block(x_BLD, inputs))
        return left[-1]

    model.run_block = run
    latent, timestep, text = batch(model, 3, 4, 6)
    model(latent, timestep, torch.tensor([True, False]), text)
    assert not torch.equal(entered[0], entered[0].bfloat16().float())
    assert torch.equal(left[-1], entered[0])


def test_the_time_embedding_is_never_rounded(tiny_dit: WanDiT) -> None:
    """Trap 3: under bf16 compute the modulation rows are those of float32, to the bit."""
    model = build_model(tiny_dit.config, torch.bfloat16)
    model.load_state_dict(tiny_dit.state_dict())
    call = (torch.tensor([713.25, 61.5]), torch.tensor([True, False]))
    for ours, exact in zip(
        model.embed_time(*call, two_rows=True), tiny_dit.embed_time(*call, two_rows=True), strict=True
    ):
        assert torch.equal(ours, exact)


def rms_error(ours: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference ÷ that of the exact value."""
    return ((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def test_half_precision_errors_stay_below_those_of_diffusers(diffusers_twin: Twin) -> None:
    """Trap 3: with an fp32 residual, bf16 stays clearly nearer to fp32 than diffusers' bf16; fp16 nearer still."""
    model = make(192, 4, 6, 384)
    latent, timestep, text = batch(model, 3, 8, 8, size=4)
    first_B = torch.tensor([True, False, True, False])
    grid = token_grid(model.config, latent.shape)
    errors = {}
    with torch.no_grad():
        exact = model(latent, timestep, first_B, text)
        for dtype in (torch.bfloat16, torch.float16):
            half = build_model(model.config, dtype)
            half.load_state_dict(model.state_dict())
            errors[dtype] = rms_error(half(latent, timestep, first_B, text), exact)
        twin = diffusers_twin(model).to(torch.bfloat16)
        theirs = twin(latent.bfloat16(), per_token(timestep, first_B, grid), text.bfloat16()).sample.float()
    assert errors[torch.bfloat16] < 0.01
    assert errors[torch.float16] < 0.002
    assert errors[torch.bfloat16] < 0.7 * rms_error(theirs, exact)


def test_fp32_weights_under_half_compute_equal_half_weights(tiny_dit: WanDiT) -> None:
    """Whole-model training in 16 bit keeps fp32 weights and casts them at use: the same numbers."""
    half = build_model(tiny_dit.config, torch.bfloat16)
    master = build_model(tiny_dit.config, torch.bfloat16, param_dtype=torch.float32)
    for model in (half, master):
        model.load_state_dict(tiny_dit.state_dict())
    latent, timestep, text = batch(half, 3, 4, 6)
    first_B = torch.tensor([True, False])
    assert torch.equal(half(latent, timestep, first_B, text), master(latent, timestep, first_B, text))
    assert master.blocks[0].ffn[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_a_rounded_timestep_is_refused(tiny_dit: WanDiT, dtype: torch.dtype) -> None:
    """Traps 1 and 2: 713.25 must reach the sinusoids as 713.25."""
    latent, timestep, text = batch(tiny_dit, 3, 4, 6)
    with pytest.raises(TypeError, match=r"713\.25|Float\[Tensor"):  # shape checks of the tests may see it first
        tiny_dit(latent, timestep.to(dtype), torch.zeros(2, dtype=torch.bool), text)


def test_a_rounded_timestep_would_matter(tiny_dit: WanDiT) -> None:
    """Traps 1 and 2: the output really depends on the fraction of a timestep that bf16 or an integer loses."""
    latent, timestep, text = batch(tiny_dit, 3, 4, 6)
    none_B = torch.zeros(2, dtype=torch.bool)
    exact = tiny_dit(latent, timestep, none_B, text)
    assert relative(tiny_dit(latent, timestep.bfloat16().float(), none_B, text), exact) > 1e-3
    assert relative(tiny_dit(latent, timestep + 1, none_B, text), exact) > 1e-3


def test_sinusoids_match_the_official_formula() -> None:
    """Cosines first, then sines, in float64 (Wan model.py, sinusoidal_embedding_1d). Traps 1 and 2."""
    timestep = torch.tensor([0.0, 61.5, 713.25, 999.8])
    steps = torch.arange(16, dtype=torch.float64)
    angles = torch.outer(timestep.double(), torch.pow(10000, -steps / 16))
    assert torch.equal(sinusoids(timestep, 32), torch.cat([angles.cos(), angles.sin()], dim=1).float())


def test_unpadded_text_is_refused_and_padding_is_attended(tiny_dit: WanDiT, diffusers_twin: Twin) -> None:
    """Trap 9: zero rows become text_embedding(0), which is not zero; text that is not padded must not pass."""
    latent, timestep, text = batch(tiny_dit, 3, 4, 6)
    none_B = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="padded to text_len"):
        tiny_dit(latent, timestep, none_B, text[:, :7])
    twin = diffusers_twin(tiny_dit)
    short = twin(latent[:1], timestep[:1], text[:1, :3]).sample
    assert relative(tiny_dit(latent, timestep, none_B, text)[:1], short) > 1e-3


@pytest.mark.parametrize(
    ("latent_shape", "message"),
    [((2, 8, 3, 5, 6), "divide by 2"), ((2, 4, 3, 4, 6), "expected 8 channels")],
)
def test_latents_that_do_not_fit_are_refused(tiny_dit: WanDiT, latent_shape: tuple[int, ...], message: str) -> None:
    """A row too many would be cut off by the patches in silence."""
    _, timestep, text = batch(tiny_dit, 3, 4, 6)
    with pytest.raises(ValueError, match=message):
        tiny_dit(torch.zeros(latent_shape), timestep, torch.zeros(2, dtype=torch.bool), text)


def test_first_frame_flags_must_be_bool(tiny_dit: WanDiT) -> None:
    """An integer mask would index where a bool selects."""
    latent, timestep, text = batch(tiny_dit, 3, 4, 6)
    with pytest.raises(TypeError, match=r"not bool|Bool\[Tensor"):  # shape checks of the tests may see it first
        tiny_dit(latent, timestep, torch.ones(2, dtype=torch.int64), text)
    with pytest.raises(ValueError, match="image_first"):
        check_inputs(tiny_dit.config, latent, timestep, torch.ones(3, dtype=torch.bool), text)


@pytest.mark.parametrize("image_first", [(False, False), (True, False)])
def test_full_checkpointing_changes_nothing(tiny_dit: WanDiT, image_first: tuple[bool, bool]) -> None:
    """Recomputing blocks gives the same loss and gradients, to the bit."""
    latent, timestep, text = batch(tiny_dit, 3, 4, 6)
    results, runs = [], []
    for block in tiny_dit.blocks:
        # Before, not after: recomputation stops inside a block once it has what it needs.
        block.register_forward_pre_hook(lambda module, inputs: runs.append(mode))
    for mode in ("none", "full"):
        set_checkpointing(tiny_dit, mode)
        tiny_dit.zero_grad()
        loss = tiny_dit(latent, timestep, torch.tensor(image_first), text).square().mean()
        loss.backward()
        results.append([loss, *(weight.grad.clone() for weight in tiny_dit.parameters())])
    assert (runs.count("none"), runs.count("full")) == (2, 4), "blocks run once, and once more in the backward pass"
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_random_weights_repeat_and_have_a_live_head() -> None:
    """Trap 13: the published head is zero, and a random model with it computes zero whatever is wrong."""
    config = DiTConfig(dim=96, num_heads=4, num_layers=1, ffn_dim=160, **SMALL)
    a, b, c = build_model(config, seed=7), build_model(config, seed=7), build_model(config, seed=8)
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(a.blocks[0].self_attn.q.weight, c.blocks[0].self_attn.q.weight)
    assert a.head.head.weight.std() > 0
    init_random(a, 7, zero_head=True)
    assert a.head.head.weight.abs().max() == 0


@settings(max_examples=30, deadline=None)
@given(
    frames=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.sampled_from([(1, 2, 2), (1, 1, 1), (1, 3, 2)]),
)
def test_patches_round_trip(frames: int, rows: int, columns: int, patch: tuple[int, int, int]) -> None:
    """Patches reach the tokens channels first and leave them channels last; both orders invert."""
    latent = torch.arange(2 * 3 * frames * rows * columns * patch[1] * patch[2]).float()
    latent = latent.view(2, 3, frames, rows * patch[1], columns * patch[2])
    tokens = patchify(latent, patch)
    assert tokens.shape == (2, frames * rows * columns, 3 * patch[1] * patch[2])
    channels_last = tokens.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channels_last, (frames, rows, columns), patch), latent)
    conv = nn.Conv3d(3, 5, patch, patch, bias=False)
    by_hand = nn.functional.linear(tokens, conv.weight.flatten(1))
    assert torch.allclose(conv(latent).flatten(2).transpose(1, 2), by_hand, rtol=1e-4, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(
    head_dim=st.sampled_from([10, 24, 64, 128]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
)
def test_rotation_by_parts_equals_the_whole(head_dim: int, grid: tuple[int, int, int], data: st.DataObject) -> None:
    """Trap 14: a part of the sequence is turned by its global positions. Lengths of pairs are kept."""
    total = grid[0] * grid[1] * grid[2]
    offset = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - offset))
    cpu = torch.device("cpu")
    x = torch.randn(1, total, 2, head_dim, generator=torch.Generator().manual_seed(0))
    whole = rotate(x, *rope_table(head_dim, grid, 0, total, cpu))
    part = rotate(x[:, offset : offset + length], *rope_table(head_dim, grid, offset, length, cpu))
    assert torch.equal(part, whole[:, offset : offset + length])
    pairs, turned = x.unflatten(-1, (-1, 2)), whole.unflatten(-1, (-1, 2))
    assert torch.allclose(pairs.norm(dim=-1), turned.norm(dim=-1), atol=1e-5)
    assert torch.equal(whole[:, 0], x[:, 0]), "the first token stands at position 0 on every axis"


def test_rotation_matches_complex_multiplication() -> None:
    """The official formula in complex128: interleaved pairs, 44/42/42 of 128, positions from 0, theta 10,000."""
    assert axis_sizes(128) == (44, 42, 42)
    grid, total = (5, 3, 4), 60
    turns = []
    for axis, size in enumerate((44, 42, 42)):
        place = torch.cartesian_prod(*(torch.arange(n) for n in grid))[:, axis].double()
        frequency = 1.0 / torch.pow(10000, torch.arange(0, size, 2).double() / size)
        turns.append(torch.polar(torch.ones(total, size // 2).double(), torch.outer(place, frequency)))
    x = torch.randn(1, total, 2, 128, generator=torch.Generator().manual_seed(0))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    exact = torch.view_as_real(pairs * torch.cat(turns, dim=1)[:, None]).flatten(-2)
    ours = rotate(x, *rope_table(128, grid, 0, total, torch.device("cpu")))
    assert (ours - exact).abs().max() < 1e-6


def test_positions_beyond_the_trained_ones_are_refused() -> None:
    """No angle outside the grid or beyond 1,024 positions an axis."""
    with pytest.raises(ValueError, match="1024 positions"):
        rope_table(24, (1, 1025, 1), 0, 10, torch.device("cpu"))
    with pytest.raises(ValueError, match="outside a grid"):
        rope_table(24, (1, 2, 2), 3, 2, torch.device("cpu"))


def test_the_rotation_table_survives_inference_mode(tiny_dit: WanDiT) -> None:
    """A held-out pass under inference_mode may come first; training afterwards uses the same cached table."""
    rope_table.cache_clear()
    latent, timestep, text = batch(tiny_dit, 3, 4, 6)
    none_B = torch.zeros(2, dtype=torch.bool)
    with torch.inference_mode():
        tiny_dit(latent, timestep, none_B, text)
    tiny_dit(latent, timestep, none_B, text).sum().backward()
    assert tiny_dit.blocks[0].self_attn.q.weight.grad is not None


def test_a_block_sees_the_first_frame_boundary_by_global_token(tiny_dit: WanDiT) -> None:
    """Trap 14: on a part of the sequence the first modulation row ends where the first frame does.

    Self-attention is switched off, so that a part alone can be compared with the whole.
    """
    with torch.no_grad():
        for block in tiny_dit.blocks:
            assert isinstance(block, Block)
            block.self_attn.o.weight.zero_()
    latent, timestep, text = batch(tiny_dit, 3, 4, 6)
    first_B, grid = torch.tensor([True, False]), (3, 2, 3)
    tokens = patchify(latent, tiny_dit.config.patch)
    call = {"timestep_B": timestep, "image_first_B": first_B, "text_BSE": text}
    whole = tiny_dit.forward_tokens(tokens, grid, 0, **call)
    for start, stop in ((0, 4), (4, 9), (9, 18)):
        part = tiny_dit.forward_tokens(tokens[:, start:stop], grid, start, **call)
        assert relative(part, whole[:, start:stop]) < 1e-5, (start, stop)
