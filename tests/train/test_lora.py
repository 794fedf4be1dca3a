"""LoRA: injection, gradients against peft, dropout without a generator, strict loading, a file that diffusers loads.

Trap 12 (alpha lost, applied twice, or names that load nothing) and 5, 14 (draws by global token): see each test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_runs import lora_parameters, merge

from shards.errors import UserError
from train.config.model import TI2V_5B, LoRAConfig
from train.lora.formats import name_tensors, raw_pairs, save_lora
from train.lora.lora import (
    LoRALinear,
    inject,
    keep_mask,
    load_lora_state,
    lora_modules,
    lora_state,
    match_targets,
)
from train.model.block import DropoutKey
from train.model.dit import WanDiT, build_model, set_checkpointing
from train.objective import add_noise, model_timestep, slot_losses

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
TRUE_SCALE = LoRAConfig(rank=4, alpha=8)  # scale 2: a lost or doubled alpha shows


def make_batch(model: WanDiT, size: int = 2) -> Batch:
    """Latents, timesteps, first-frame flags (mixed), text with zero rows at the end."""
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(size, model.config.in_channels, 3, 4, 6, generator=generator)
    text = torch.randn(size, model.config.text_len, model.config.text_dim, generator=generator)
    text[0, 5:] = 0
    return latent, torch.linspace(713.25, 61.5, size), torch.arange(size) % 2 == 0, text


def per_token(timestep_B: Tensor, first_B: Tensor, num_first: int, num_tokens: int) -> Tensor:
    """Timesteps as diffusers takes them."""
    table_BL = timestep_B[:, None].repeat(1, num_tokens)
    table_BL[first_B, :num_first] = 0
    return table_BL


def randomise(model: WanDiT) -> None:
    """Give B values, so that the update counts."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.copy_(0.05 * torch.randn(module.lora_B.shape, generator=generator))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference ÷ largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_injection_changes_nothing_and_freezes_the_rest(tiny_dit: WanDiT) -> None:
    """At the start B is zero: the output is the base's to the bit; only A and B train; the base keeps its names."""
    batch = make_batch(tiny_dit)
    before, names = tiny_dit(*batch), set(tiny_dit.state_dict())
    adapted = inject(tiny_dit, LoRAConfig(rank=4), seed=1)
    assert torch.equal(tiny_dit(*batch), before)
    assert len(adapted) == 2 * 8
    trainable = {name for name, weight in tiny_dit.named_parameters() if weight.requires_grad}
    assert trainable == {f"{name}.lora_{x}" for name in adapted for x in "AB"}
    assert set(tiny_dit.state_dict()) - trainable == names
    assert {weight.dtype for weight in lora_parameters(tiny_dit)} == {torch.float32}
    tiny_dit(*batch).sum().backward()
    assert all(weight.grad is not None for weight in lora_parameters(tiny_dit))
    assert all(w.grad is None for n, w in tiny_dit.named_parameters() if n not in trainable)


def test_real_model_has_the_counted_lora_parameters() -> None:
    """1,474,560 a rank on the 240 attention linears, 2,519,040 with the feed-forward (reference, section 1)."""
    for targets, modules, per_rank in ((("self_attn", "cross_attn"), 240, 1_474_560), (("*",), 300, 2_519_040)):
        model = build_model(TI2V_5B, torch.bfloat16, "meta")
        assert len(inject(model, LoRAConfig(rank=2, targets=targets), seed=0)) == modules
        assert sum(weight.numel() for weight in lora_parameters(model)) == 2 * per_rank


def test_a_starts_by_seed_and_name_whatever_else_is_targeted(tiny_dit: WanDiT) -> None:
    """The start of a module's A does not move when another target is added; another seed moves it."""
    states = []
    for targets, seed in ((("self_attn",), 1), (("self_attn", "ffn"), 1), (("self_attn",), 2)):
        model = build_model(tiny_dit.config, seed=0)
        inject(model, LoRAConfig(rank=4, targets=targets), seed=seed)
        states.append(lora_state(model)["blocks.1.self_attn.k.lora_A.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert states[0].abs().max() <= 96**-0.5


NAMES = [f"blocks.{n}.{a}.{x}" for n in range(12) for a in ("self_attn", "cross_attn") for x in "qkvo"]
NAMES += [f"blocks.{n}.ffn.{i}" for n in range(12) for i in (0, 2)]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("self_attn", "cross_attn"), 96),
        (("ffn",), 24),
        (("q", "v"), 48),
        (("blocks.1?.self_attn.*",), 8),
        (("blocks.[03].*",), 20),
        (("blocks.0.self_attn.q", "q"), 24),
    ],
)
def test_targets_by_part_and_by_pattern(targets: tuple[str, ...], count: int) -> None:
    """A part of a name or a pattern of whole names; overlaps count once."""
    assert len(match_targets(NAMES, targets)) == count


@pytest.mark.parametrize(
    ("target", "hint"), [("selfattn", "self_attn"), ("attn3", "self_attn"), ("blocks.0.self_attn.x", "blocks.0.self_")]
)
def test_a_target_that_matches_nothing_is_an_error(target: str, hint: str) -> None:
    """Nothing that was asked for is quietly ignored, even where other targets match."""
    with pytest.raises(UserError, match=f"did you mean '.*{hint.split('_', maxsplit=1)[0]}"):
        match_targets(NAMES, ("ffn", target))


def test_a_second_injection_is_refused(tiny_dit: WanDiT) -> None:
    """A LoRA on a LoRA would train the wrong thing."""
    inject(tiny_dit, LoRAConfig(rank=4), seed=1)
    with pytest.raises(UserError, match="already"):
        inject(tiny_dit, LoRAConfig(rank=4), seed=1)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (LoRAConfig(rank=16), 1.0),
        (LoRAConfig(rank=4, alpha=8), 2.0),
        (LoRAConfig(rank=16, alpha=8, rs_lora=True), 2.0),
        (LoRAConfig(rank=32, alpha=1), 1 / 32),
    ],
)
def test_scale(config: LoRAConfig, scale: float) -> None:
    """alpha / rank, or alpha / √rank; alpha defaults to the rank, not to 1. Trap 12."""
    assert config.scale == pytest.approx(scale)


@pytest.mark.parametrize("rs_lora", [False, True])
@pytest.mark.parametrize("targets", [("self_attn", "cross_attn"), ("self_attn", "cross_attn", "ffn")])
def test_output_loss_and_gradients_match_peft(
    tiny_dit: WanDiT, diffusers_twin: Callable[[Any], Any], rs_lora: bool, targets: tuple[str, ...]
) -> None:
    """Against diffusers + peft in fp32 with the same A and B: output, loss, gradients of A and B to 1e-5. Trap 12."""
    import peft

    twin = diffusers_twin(tiny_dit)
    modules = ["to_q", "to_k", "to_v", "to_out.0", *(["ffn.net.0.proj", "ffn.net.2"] if "ffn" in targets else [])]
    twin.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rs_lora, target_modules=modules))
    inject(tiny_dit, LoRAConfig(rank=4, alpha=8, rs_lora=rs_lora, targets=targets), seed=1)
    randomise(tiny_dit)
    theirs = dict(twin.named_parameters())
    pairs = {}
    for name, module in lora_modules(tiny_dit).items():
        other = _diffusers_module(name)
        for ours, which in ((module.lora_A, "A"), (module.lora_B, "B")):
            parameter = theirs[f"{other}.lora_{which}.default.weight"]
            with torch.no_grad():
                parameter.copy_(ours)
            pairs[f"{name}.{which}"] = (ours, parameter)
    assert len(pairs) == sum(weight.requires_grad for weight in twin.parameters())

    x0, timestep, first_B, text = make_batch(tiny_dit)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    sigma = timestep.double() / 1000
    noised, target = add_noise(x0, noise, sigma, first_B)
    ours_out = tiny_dit(noised, model_timestep(sigma), first_B, text)
    ours_loss = slot_losses(ours_out, target, first_B).sum() / 2

    # The same by hand: sample 0 is image-to-video, its first latent frame clean and without loss.
    weights = sigma.float().view(-1, 1, 1, 1, 1)
    by_hand = (1 - weights) * x0 + weights * noise
    by_hand[0, :, 0] = x0[0, :, 0]
    theirs_out = twin(by_hand, per_token(timestep, first_B, 6, 18), text).sample
    assert relative(ours_out, theirs_out) < 1e-5
    squared = (theirs_out - (noise - x0)).square()
    theirs_loss = (squared[0, :, 1:].mean() + squared[1].mean()) / 2
    assert relative(ours_loss, theirs_loss) < 1e-5
    ours_loss.backward()
    theirs_loss.backward()
    for name, (ours, parameter) in pairs.items():
        assert relative(ours.grad, parameter.grad) < 1e-5, name


def _diffusers_module(name: str) -> str:
    from train.model.load import diffusers_key

    return diffusers_key(f"{name}.weight").removesuffix(".weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lora_gradients_are_fp32_and_near(tiny_dit: WanDiT, dtype: torch.dtype) -> None:
    """Weights and gradients of the LoRA stay float32 under 16-bit compute; the error is the compute's."""
    gradients = []
    for compute in (torch.float32, dtype):
        model = build_model(tiny_dit.config, compute)
        model.load_state_dict(tiny_dit.state_dict())
        inject(model, TRUE_SCALE, seed=1)
        randomise(model)
        model(*make_batch(model)).square().mean().backward()
        gradients.append([weight.grad for weight in lora_parameters(model)])
    assert {gradient.dtype for gradient in gradients[1]} == {torch.float32}
    exact, half = (torch.cat([g.flatten() for g in side]) for side in gradients)
    error = (half - exact).norm() / exact.norm()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_micro_batches_add_up_to_the_batch(tiny_dit: WanDiT) -> None:
    """1×8, 2×4, 4×2, 8×1 of a mixed T2V/I2V batch: the same loss and gradients to 1e-6 in fp32. Trap 8."""
    inject(tiny_dit, TRUE_SCALE, seed=1)
    randomise(tiny_dit)
    latent, timestep, first_B, text = make_batch(tiny_dit, 8)
    first_B = torch.tensor([True, False, False, True, True, True, False, False])
    target = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for size in (8, 4, 2, 1):
        tiny_dit.zero_grad()
        total = 0.0
        for part in torch.arange(8).split(size):
            out = tiny_dit(latent[part], timestep[part], first_B[part], text[part])
            loss = slot_losses(out, target[part], first_B[part]).sum() / 8
            loss.backward()
            total += loss.item()
        results.append((total, torch.cat([weight.grad.flatten() for weight in lora_parameters(tiny_dit)])))
    for total, gradient in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-6)
        assert (gradient - results[0][1]).abs().max() < 1e-6 * results[0][1].abs().max()


# --- dropout --------------------------------------------------------------------------------------------------------


def key(*slots: int, offset: int = 0) -> DropoutKey:
    """A dropout key for these slots."""
    return DropoutKey(torch.tensor(slots), offset)


def test_dropout_is_a_function_of_slot_layer_and_global_token() -> None:
    """Traps 5 and 14: any split over samples or tokens gives the same mask; slots, layers and tokens differ."""
    whole = keep_mask(key(3, -7, 2**62), 5, 40, 64, 0.25)
    assert torch.equal(keep_mask(key(-7), 5, 40, 64, 0.25)[0], whole[1])
    assert torch.equal(keep_mask(key(3, -7, 2**62, offset=13), 5, 27, 64, 0.25), whole[:, 13:])
    others = [
        whole[0],
        whole[1],
        keep_mask(key(3), 6, 40, 64, 0.25)[0],
        keep_mask(key(3, offset=1), 5, 40, 64, 0.25)[0],
    ]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert 0.5 < (a == b).float().mean() < 0.75  # independent: 0.625


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_stated_share_everywhere(rate: float) -> None:
    """Every sample, token and channel keeps 1 − rate within four standard deviations; neighbours do not agree."""
    mask = keep_mask(key(1, 2, 3, 4), 0, 256, 256, rate).float()
    spread = (rate * (1 - rate)) ** 0.5
    for axes in ((1, 2), (0, 2), (0, 1)):
        share = mask.mean(dim=axes)
        count = mask.numel() / share.numel()
        assert (share - (1 - rate)).abs().max() <= 4.5 * spread / count**0.5 + 1e-9
    centred = mask - (1 - rate)
    for a, b in ((centred[0], centred[1]), (centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1])):
        assert (a * b).mean().abs() <= 4.5 * spread**2 / a.numel() ** 0.5 + 1e-9


def test_dropout_mask_is_the_one_on_record() -> None:
    """The hash must never change: a resumed run would draw other masks."""
    mask = keep_mask(key(123456789), 7, 2, 8, 0.5)[0].int().tolist()
    assert mask == [[0, 0, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 0]]


def test_dropout_agrees_across_micro_batches_and_recomputation(tiny_dit: WanDiT) -> None:
    """The same gradients from one batch, from one sample at a time, with blocks recomputed; no generator is read."""
    inject(tiny_dit, LoRAConfig(rank=4, alpha=8, dropout=0.3, targets=("*",)), seed=1)
    randomise(tiny_dit)
    latent, timestep, first_B, text = make_batch(tiny_dit, 4)
    slots = torch.tensor([10, 11, 12, 13])
    results = []
    state = torch.get_rng_state()
    for size, mode in ((4, "none"), (1, "none"), (4, "full")):
        set_checkpointing(tiny_dit, mode)
        tiny_dit.zero_grad()
        for part in torch.arange(4).split(size):
            tiny_dit(latent[part], timestep[part], first_B[part], text[part], slots[part]).square().sum().backward()
        results.append(torch.cat([weight.grad.flatten() for weight in lora_parameters(tiny_dit)]))
    assert torch.equal(results[0], results[2])
    assert relative(results[1], results[0]) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_on_in_training_only_and_keeps_the_mean(tiny_dit: WanDiT) -> None:
    """Without a key training refuses; eval computes the plain update; kept inputs are scaled up by 1 / (1 − rate)."""
    inject(tiny_dit, LoRAConfig(rank=4, dropout=0.5), seed=1)
    randomise(tiny_dit)
    batch = make_batch(tiny_dit)
    with pytest.raises(ValueError, match="dropout_key_B"):
        tiny_dit(*batch)
    slots = torch.tensor([1, 2])
    dropped = tiny_dit(*batch, slots)
    assert not torch.equal(dropped, tiny_dit(*batch, slots + 2))
    tiny_dit.eval()
    assert torch.equal(tiny_dit(*batch), tiny_dit(*batch, slots))

    layer = tiny_dit.blocks[0].self_attn.q
    x = torch.randn(1, 18, 96, generator=torch.Generator().manual_seed(0))
    plain = layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
    layer.train()
    mean = torch.stack([layer(x, key(slot)) for slot in range(400)]).mean(0)
    mean -= torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert (mean - plain).norm() / plain.norm() < 0.2
    assert 0.9 < (mean * plain).sum() / plain.square().sum() < 1.1


# --- files ----------------------------------------------------------------------------------------------------------


def test_raw_state_round_trips(tiny_dit: WanDiT) -> None:
    """A and B raw, without the scale: what a checkpoint holds."""
    names = inject(tiny_dit, TRUE_SCALE, seed=1)
    randomise(tiny_dit)
    state = {name: tensor.clone() for name, tensor in lora_state(tiny_dit).items()}
    assert list(state) == [f"{name}.lora_{x}.weight" for name in names for x in "AB"]
    module = tiny_dit.blocks[0].self_attn.q
    assert torch.equal(state["blocks.0.self_attn.q.lora_B.weight"], module.lora_B)
    other = build_model(tiny_dit.config)
    other.load_state_dict({n: w for n, w in tiny_dit.state_dict().items() if "lora_" not in n})
    inject(other, TRUE_SCALE, seed=99)
    load_lora_state(other, state)
    assert torch.equal(other(*make_batch(other)), tiny_dit(*make_batch(tiny_dit)))


def _without(state: dict[str, Tensor]) -> None:
    del state["blocks.1.cross_attn.o.lora_B.weight"]


def _extra(state: dict[str, Tensor]) -> None:
    state["blocks.0.ffn.0.lora_A.weight"] = torch.zeros(4, 96)


def _other_rank(state: dict[str, Tensor]) -> None:
    state["blocks.0.self_attn.q.lora_A.weight"] = torch.zeros(8, 96)


def _other_width(state: dict[str, Tensor]) -> None:
    state["blocks.0.self_attn.q.lora_A.weight"] = torch.zeros(4, 64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, r"1 tensors are missing \(blocks\.1\.cross_attn\.o\.lora_B\.weight\)"),
        (_extra, r"1 are unexpected \(blocks\.0\.ffn\.0\.lora_A\.weight\)"),
        (_other_rank, "rank 8, this run has 4"),
        (_other_width, "another size"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(
    tiny_dit: WanDiT, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    """Missing, unexpected, another rank or width: one error that names it, and nothing is copied."""
    inject(tiny_dit, TRUE_SCALE, seed=1)
    before = {name: tensor.clone() for name, tensor in lora_state(tiny_dit).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    spoil(state)
    with pytest.raises(UserError, match=message):
        load_lora_state(tiny_dit, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state(tiny_dit).items())


def test_export_folds_the_scale_once(tiny_dit: WanDiT, tmp_path: Path) -> None:
    """Trap 12: scale in B, .alpha = rank, no lora_adapter_metadata: loaders with and without alpha agree."""
    from safetensors import safe_open

    names = inject(tiny_dit, TRUE_SCALE, seed=1)
    randomise(tiny_dit)
    path = tmp_path / "lora.safetensors"
    save_lora(path, name_tensors(raw_pairs(lora_state(tiny_dit), TRUE_SCALE)), {"step": "10"})
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "10"}
        keys = set(opened.keys())
        for name in names:
            module = tiny_dit.get_submodule(name)
            assert isinstance(module, LoRALinear)
            prefix = f"diffusion_model.{name}"
            assert opened.get_tensor(f"{prefix}.alpha").item() == 4
            assert torch.equal(opened.get_tensor(f"{prefix}.lora_A.weight"), module.lora_A)
            assert torch.equal(opened.get_tensor(f"{prefix}.lora_B.weight"), module.lora_B * 2)
            keys -= {f"{prefix}.{part}" for part in ("alpha", "lora_A.weight", "lora_B.weight")}
    assert not keys
    save_lora(path, {"x": torch.zeros(1)}, {"lora_adapter_metadata": "{}"})
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    halved = name_tensors(raw_pairs(lora_state(tiny_dit), TRUE_SCALE), dtype=torch.bfloat16)
    assert halved["diffusion_model.blocks.0.self_attn.q.lora_A.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [("self_attn", "cross_attn"), ("*",), ("blocks.1.cross_attn.v",)])
def test_exported_file_loads_in_a_diffusers_pipeline_at_the_right_scale(
    tiny_dit: WanDiT, diffusers_twin: Callable[[Any], Any], tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """Trap 12: WanPipeline.load_lora_weights takes every tensor; sampling equals a pipeline on our merged weights."""
    config = LoRAConfig(rank=4, alpha=8, targets=targets)
    pipeline = _pipeline(diffusers_twin(tiny_dit))
    names = inject(tiny_dit, config, seed=1)
    randomise(tiny_dit)
    save_lora(tmp_path / "lora.safetensors", name_tensors(raw_pairs(lora_state(tiny_dit), config)), {})
    base = _sample(pipeline, tiny_dit)

    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    loaded = [name for name, _ in pipeline.transformer.named_parameters() if "lora_A" in name]
    assert len(loaded) == len(names)
    with torch.no_grad():
        batch = make_batch(tiny_dit)
        theirs = pipeline.transformer(batch[0], per_token(batch[1], batch[2], 6, 18), batch[3]).sample
        assert relative(tiny_dit(*batch), theirs) < 1e-5
    sampled = _sample(pipeline, tiny_dit)

    merge(tiny_dit)
    plain = build_model(tiny_dit.config)
    plain.load_state_dict({n: w for n, w in tiny_dit.state_dict().items() if "lora_" not in n})
    merged = _sample(_pipeline(diffusers_twin(plain)), plain)
    assert relative(sampled, merged) < 1e-4
    assert relative(base, merged) > 1e-3, "the LoRA must change the picture for this to prove anything"


def _pipeline(transformer: Any) -> Any:
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=transformer,
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sample(pipeline: Any, model: WanDiT) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(1, model.config.text_len, model.config.text_dim, generator=generator)
    return pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=3,
        latents=torch.randn(1, model.config.in_channels, 3, 4, 6, generator=generator),
        output_type="latent",
    ).frames
