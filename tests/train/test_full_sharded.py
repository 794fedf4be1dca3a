"""Every weight trained, sharded over ranks: the run of one process, and checkpoints that any layout resumes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ranks import in_a_group, run_ranks
from torch import Tensor, nn
from train_runs import DIMS, make_config, read_metrics, train_spoiled

from shards.config import load_config, validate_config
from shards.console import set_up_logging
from shards.errors import UserError
from train import checkpoint
from train.cli.main import main
from train.config.model import DiTConfig
from train.config.train import TrainConfig
from train.loop import fit
from train.lora.merge import export_model
from train.lora.targets import match_weights
from train.model.dit import WanDiT, build_model, init_random
from train.model.load import diffusers_key, load_dit, read_dit_config, save_dit
from train.parallel.fsdp import local_shard, settle, shard_trained, sum_in_backward
from train.precision import OverflowTelemetry
from train.recompute.runner import keep

_DIMS = DiTConfig(dim=48, num_heads=2, num_layers=3, ffn_dim=100, text_dim=32, text_len=16)
STEPS, SHORT_STEPS = 20, 10
FULL: dict[str, Any] = {
    "model": {"dims": {**DIMS, "dim": 192, "num_heads": 24}},
    "lora": None,
    "data__caption_dropout": 0.3,
    "objective__image_to_video_share": 0.5,
    "optim__lr": 1e-4,
    "optim__ema_decay": 0.9,
    "eval": {"num_clips": 1, "every_steps": 5},
}
SHARDED = {"parallel": {"shard": "full"}}
WAYS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one": (1, 1, {}),
    "replicate-2": (2, 2, {"data__micro_batch": 1}),
    "replicate-4": (4, 4, {"data__micro_batch": 1}),
    "full-2": (2, 2, {"data__micro_batch": 1, **SHARDED}),
    "full-4": (4, 4, {"data__micro_batch": 1, **SHARDED}),
    "full-2-recomputed": (2, 2, {"checkpointing": {"policy": "full"}, **SHARDED}),
    "full-2-ulysses-2": (2, 2, {"parallel": {"shard": "full", "ulysses": 2}}),
    "full-4-ulysses-2": (4, 4, {"data__micro_batch": 1, "parallel": {"shard": "full", "ulysses": 2}}),
    "hybrid-2x2": (4, 2, {"data__micro_batch": 1, "parallel": {"shard": "hybrid"}}),
    "hybrid-2x2-ulysses-2": (4, 2, {"parallel": {"shard": "hybrid", "ulysses": 2}}),
}
"""Ranks, ranks of a machine, and what is changed."""
EXACT = ("step", "keys", "num_image_to_video", "bucket", "updates", "tokens", "skipped")
QUICK = ("full-2", "full-2-recomputed", "full-2-ulysses-2")
OTHERS = [name for name in WAYS if name != "one"]


def some_slow(names: list[str], quick: tuple[str, ...]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def train(config: TrainConfig, local_size: int) -> None:
    """One rank of a run."""
    os.environ |= {"LOCAL_WORLD_SIZE": str(local_size), "LOCAL_RANK": str(int(os.environ["RANK"]) % local_size)}
    set_up_logging(terminal=False)
    fit(config)


def run(shards: Path, output: Path, name: str, max_steps: int, **more: Any) -> None:
    """Train up to a step in one of the ways, going on from what is there."""
    num_ranks, local_size, changes = WAYS[name]
    config = make_config(shards, output, **FULL | more | changes, max_steps=max_steps)
    run_ranks(num_ranks, train, config, local_size)


@pytest.fixture(scope="module")
def alone(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of one process that never stops."""
    made: dict[str, Path] = {}

    def make(max_steps: int, **more: Any) -> Path:
        key = repr((max_steps, more))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone")
            run(tiny_shards, made[key], "one", max_steps, **more)
        return made[key]

    return make


def assert_same_run(one: Path, other: Path, rel: float = 1e-6) -> None:
    """Step by step the same samples and losses, held-out losses, weights, averages and states."""
    ours, theirs = read_metrics(one), read_metrics(other)
    assert [[line[key] for key in EXACT] for line in ours] == [[line[key] for key in EXACT] for line in theirs]
    for line, same in zip(ours, theirs, strict=True):
        assert same["loss"] == pytest.approx(line["loss"], rel=rel)
        assert same["grad_norm"] == pytest.approx(line["grad_norm"], rel=10 * rel)
    held_out = {line["step"]: line["mean"] for line in read_metrics(other, "held_out.jsonl")}
    for line in read_metrics(one, "held_out.jsonl"):
        assert held_out[line["step"]] == pytest.approx(line["mean"], rel=rel)
    step = Path("checkpoints") / checkpoint.checkpoint_name(len(ours))
    for file in ("model.safetensors", step / "model.safetensors", step / "optimizer.safetensors"):
        a, b = checkpoint.load_tensors(one / file), checkpoint.load_tensors(other / file)
        assert {name: (x.shape, x.dtype) for name, x in a.items()} == {n: (x.shape, x.dtype) for n, x in b.items()}
        if str(file).endswith("model.safetensors"):
            assert all(float((a[n] - b[n]).norm()) <= 100 * rel * float(a[n].norm()) for n in a)
    assert {one.state for one in checkpoint.verify_run(other)} == {"good"}


@pytest.mark.parametrize("name", some_slow(OTHERS, QUICK))
def test_twenty_steps_are_those_of_one_process(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    run(tiny_shards, tmp_path, name, STEPS)
    assert_same_run(alone(STEPS), tmp_path)


@pytest.mark.parametrize("name", some_slow(OTHERS, ("full-2",)))
def test_a_run_goes_from_any_layout_to_one_process_and_back(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    run(tiny_shards, tmp_path, name, 4)
    run(tiny_shards, tmp_path, "one", 7)
    run(tiny_shards, tmp_path, name, SHORT_STEPS)
    assert_same_run(alone(SHORT_STEPS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["replicate-2", "full-2", "full-4", "hybrid-2x2"])
@pytest.mark.parametrize("before", ["replicate-2", "full-2", "full-4", "hybrid-2x2"])
def test_a_run_goes_from_any_layout_to_any(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, before: str, after: str
) -> None:
    run(tiny_shards, tmp_path, before, 5)
    run(tiny_shards, tmp_path, after, SHORT_STEPS)
    assert_same_run(alone(SHORT_STEPS), tmp_path)


EIGHT_BIT = {
    "model": {"dims": {**DIMS, "dim": 256, "num_heads": 4, "ffn_dim": 300}},
    "optim__name": "adamw8bit",
    "optim__min_8bit_size": 1024,
    "optim__ema_decay": None,
}
"""300 rows by 2 are 150, which are whole blocks of 256 channels; rows of 300 are not, and their state is float32."""


def test_the_eight_bit_optimizer_goes_along(alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path) -> None:
    """The same tensors have 8-bit state on every layout; a code flips where a last bit does."""
    run(tiny_shards, tmp_path, "full-2", 4, **EIGHT_BIT)
    run(tiny_shards, tmp_path, "one", 7, **EIGHT_BIT)
    run(tiny_shards, tmp_path, "full-2", SHORT_STEPS, **EIGHT_BIT)
    assert_same_run(alone(SHORT_STEPS, **EIGHT_BIT), tmp_path, rel=1e-4)
    state = checkpoint.load_tensors(tmp_path / "checkpoints/step-0000010/optimizer.safetensors")
    kept = {name: tensor.dtype for name, tensor in state.items() if name.endswith("state1")}
    assert kept["blocks.0.ffn.0.weight.state1"] == kept["blocks.1.self_attn.q.weight.state1"] == torch.uint8
    assert kept["blocks.0.ffn.2.weight.state1"] == kept["blocks.0.ffn.0.bias.state1"] == torch.float32


@pytest.mark.slow
def test_a_schedule_free_optimizer_goes_along(alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path) -> None:
    more = {"optim": {"name": "schedulefree.AdamWScheduleFree", "lr": 1e-4}, "optim__ema_decay": None}
    run(tiny_shards, tmp_path, "full-2", 4, **more)
    run(tiny_shards, tmp_path, "one", 7, **more)
    run(tiny_shards, tmp_path, "full-2", SHORT_STEPS, **more)
    assert_same_run(alone(SHORT_STEPS, **more), tmp_path)


def test_an_optimizer_that_needs_complete_matrices_is_refused() -> None:
    from train.optim import probe_rows

    probe_rows("torch.optim.RMSprop", "{}")
    with pytest.raises(UserError, match="moves rows by more than themselves"):
        probe_rows("torch.optim.Adafactor", "{}")


def whole_model(dtype: torch.dtype, policy: str, path: Path | None) -> WanDiT:
    model = build_model(_DIMS, dtype, param_dtype=torch.float32, seed=None if path else 7)
    if path:
        load_dit(model, path)
    keep(model, policy)
    return model.train()


def sharded_model(dtype: torch.dtype, policy: str, path: Path | None) -> WanDiT:
    from torch.distributed.device_mesh import init_device_mesh

    model = build_model(_DIMS, dtype, "meta", param_dtype=torch.float32)
    shard_trained(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), torch.device("cpu"))
    if path:
        load_dit(model, path)
    else:
        init_random(model, 7)
    settle(model)
    keep(model, policy)
    return model.train()


def gradients(model: WanDiT, *, sharded: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Velocities and gradients of three micro-steps that add up, with an evaluation between."""
    generator, velocities = torch.Generator().manual_seed(2), []
    for place in range(3):
        latent = torch.randn(2, 48, 3, 4, 6, generator=generator)
        text = torch.randn(2, 16, 32, generator=generator)
        times = torch.tensor([300.0, 713.25])
        if sharded:
            sum_in_backward(model, wanted=place == 2)
        velocity = model(latent, times, torch.tensor([place == 0, False]), text)
        velocity.square().mean().backward()
        velocities.append(velocity.detach())
        with torch.no_grad():
            velocities.append(model(latent, times, torch.tensor([False, False]), text))
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return velocities, {name: grad for name, grad in found.items() if grad is not None}


def compare(dtype: torch.dtype, policy: str, path: Path | None) -> list[str]:
    """What differs of a whole and of a sharded model whose ranks all see the same samples: the sum is a multiple."""
    exact, meant = gradients(whole_model(dtype, policy, path), sharded=False)
    model = sharded_model(dtype, policy, path)
    ours, found = gradients(model, sharded=True)
    wrong = [f"velocity {place}" for place, (a, b) in enumerate(zip(ours, exact, strict=True)) if not a.equal(b)]
    ranks = torch.distributed.get_world_size()
    for name, grad in meant.items():
        local, rows = local_shard(found[name])
        factor = ranks if name in found and local is not found[name] else 1  # what is replicated is summed elsewhere
        # FSDP2 has each block's part of the text's gradient added up before the blocks' are: another order.
        close = 4 * torch.finfo(dtype).eps * float(grad.norm()) if name.startswith("text_embedding") else 0.0
        if float((local - factor * grad[rows]).norm()) > factor * close:
            wrong.append(f"{name} {local.dtype}")
    return wrong + sorted(meant.keys() ^ found.keys())


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        (torch.float32, "none"),
        (torch.bfloat16, "full"),
        *(
            pytest.param(dtype, policy, marks=pytest.mark.slow)
            for dtype, policy in ((torch.float32, "full"), (torch.bfloat16, "none"), (torch.float16, "full"))
        ),
    ],
)
def test_gradients_of_a_sharded_model_are_those_of_a_whole_one_to_the_bit(dtype: torch.dtype, policy: str) -> None:
    """Casts, islands and accumulation as in one process: two ranks with the same samples give twice its gradients."""
    assert run_ranks(2, in_a_group, compare, dtype, policy, None) == [[], []]


def test_each_rank_reads_its_own_rows_of_a_base(tmp_path: Path) -> None:
    """Four ranks of rows that do not divide by four; some hold no row of a short weight."""
    save_dit(build_model(_DIMS, seed=9), tmp_path / "model.safetensors")
    assert run_ranks(4, in_a_group, compare, torch.float32, "none", tmp_path / "model.safetensors") == [[]] * 4


def held(path: Path | None) -> tuple[int, int]:
    """Numbers that a rank holds in rows and whole."""
    model = sharded_model(torch.float32, "none", path)
    local = [(local_shard(weight)[0], weight) for weight in model.parameters()]
    return sum(a.numel() for a, b in local if a is not b), sum(a.numel() for a, b in local if a is b)


def test_a_rank_holds_its_rows_and_the_norms_of_the_blocks() -> None:
    (first, whole), (second, same) = run_ranks(2, in_a_group, held, None)
    model = build_model(_DIMS, torch.float32, "meta")
    islands = [
        weight
        for block in model.blocks
        for module in block.modules()
        if not isinstance(module, nn.Linear)
        for weight in module.parameters(False)
    ]
    assert whole == same == sum(weight.numel() for weight in islands)
    assert first + second + whole == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", ["full-2", pytest.param("hybrid-2x2", marks=pytest.mark.slow)])
def test_an_overflow_of_one_rank_is_everybodys(tiny_shards: Path, tmp_path: Path, name: str) -> None:
    """fp16: judged after the sums; all skip, halve their scale and go on, each with its own rows."""
    num_ranks, _, changes = WAYS[name]
    more = FULL | {"precision__compute": "fp16", "eval": None} | changes
    first, *others = run_ranks(num_ranks, train_spoiled, make_config(tiny_shards, tmp_path, **more, max_steps=4), 1, 3)
    for other in others:
        assert [{**step, "weights": ""} for step in other] == [{**step, "weights": ""} for step in first]
    for steps in (first, *others):
        assert [step["skipped"] for step in steps] == [0, 0, 1, 1]
        assert steps[2]["scale"] == steps[1]["scale"] / 2 and steps[2]["blamed"].startswith("blocks.")
        assert steps[2]["weights"] == steps[1]["weights"] != steps[3]["weights"]


SOME = {"train": ["blocks.1-1", "head", "blocks.0.ffn.2"]}


@pytest.mark.parametrize("name", some_slow(["one", *OTHERS], ("full-2",)))
def test_only_what_is_named_trains_and_the_export_is_the_complete_model(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    """Everything else is the base's to the bit; the checkpoint has what trains alone, and a resume goes on."""
    run(tiny_shards, tmp_path, name, 4, **SOME)
    run(tiny_shards, tmp_path, "one", 7, **SOME)
    run(tiny_shards, tmp_path, name, SHORT_STEPS, **SOME)
    assert_same_run(alone(SHORT_STEPS, **SOME), tmp_path)
    kept = checkpoint.load_tensors(tmp_path / "checkpoints/step-0000010/model.safetensors")
    base = build_model(DiTConfig(**FULL["model"]["dims"]), seed=0)
    named = ("blocks.1.", "head.", "blocks.0.ffn.2.")
    assert set(kept) == {weight_name for weight_name, _ in base.named_parameters() if weight_name.startswith(named)}
    export = checkpoint.load_tensors(tmp_path / "model.safetensors")
    for weight_name, weight in base.named_parameters():
        assert weight.equal(export[weight_name]) == (weight_name not in kept), weight_name


def test_a_pattern_that_selects_nothing_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'haed' matches no weight of the model; did you mean 'head'"):
        fit(make_config(tiny_shards, tmp_path, lora=None, train=["haed"]))
    with pytest.raises(UserError, match="train is for lora: null"):
        make_config(tiny_shards, tmp_path, train=["head"])
    names = [f"blocks.{index}.ffn.{part}.weight" for index in range(12) for part in (0, 2)]
    assert match_weights(names, ["blocks.9-11.ffn.2"]) == [f"blocks.{index}.ffn.2.weight" for index in (9, 10, 11)]
    with pytest.raises(UserError, match=r"blocks\.12-13"):
        match_weights(names, ["blocks.12-13"])


def test_a_gradient_that_overflows_in_another_ranks_rows_is_blamed_by_its_block() -> None:
    telemetry = OverflowTelemetry(build_model(_DIMS, seed=7))
    answers = iter([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert telemetry.blame([], lambda *own: next(answers)) == "blocks.1 backward"
    assert next(answers, None) is None


def demo_base(shards: Path, output: Path, max_steps: int, **more: Any) -> TrainConfig:
    """The demo's base model, on the tiny shards."""
    config = load_config(TrainConfig, Path(__file__).parents[2] / "configs/demo/base.yaml", [])
    values = config.model_dump(mode="json")
    values |= {"output": str(output), "max_steps": max_steps, **more}
    values["data"] |= {"root": str(shards), "include": [], "validation_fraction": 0.2, "micro_batch": 2}
    values["eval"]["every_steps"] = max_steps
    return validate_config(TrainConfig, values, origin="the demo's base")


@pytest.mark.parametrize("max_steps", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_the_demos_base_of_two_sharded_processes_is_that_of_one_and_loads_elsewhere(
    tiny_shards: Path, tmp_path: Path, max_steps: int
) -> None:
    """Twelve steps give the same weights; after all 400, where a last bit has become digits, the same held-out loss.
    The export is read by diffusers and, in the official layout, by this trainer: the same numbers."""
    from diffusers import WanTransformer3DModel

    run_ranks(1, train, demo_base(tiny_shards, tmp_path / "one", max_steps), 1)
    run_ranks(2, train, demo_base(tiny_shards, tmp_path / "two", max_steps, parallel={"shard": "full"}), 2)
    one, two = (read_metrics(tmp_path / name, "held_out.jsonl")[-1]["mean"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6 if max_steps == 12 else 0.01)
    trained = checkpoint.load_tensors(tmp_path / "two/model.safetensors")
    if max_steps == 12:
        alone = checkpoint.load_tensors(tmp_path / "one/model.safetensors")
        assert all(float((alone[n] - w).norm()) <= 1e-4 * float(w.norm()) for n, w in trained.items())
    for layout in ("official", "diffusers"):
        arguments = ["export", str(tmp_path / "two"), str(tmp_path / layout), "--layout", layout]
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert read_dit_config(tmp_path / "official").dim == 192
    loaded = build_model(read_dit_config(tmp_path / "official"))
    load_dit(loaded, tmp_path / "official")
    assert all(weight.equal(trained[name]) for name, weight in loaded.named_parameters())
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers/transformer").state_dict()
    assert all(theirs[diffusers_key(name)].equal(weight) for name, weight in trained.items())


def test_a_model_of_which_a_part_trained_is_exported_with_its_bases_other_weights(
    tiny_shards: Path, tmp_path: Path
) -> None:
    base = build_model(DiTConfig(**DIMS), seed=5)
    save_dit(base, tmp_path / "base.safetensors")
    model = {"checkpoint": str(tmp_path / "base.safetensors")}
    fit(make_config(tiny_shards, tmp_path / "run", lora=None, train=["head"], model=model, max_steps=2))
    export_model(tmp_path / "run", tmp_path / "out")
    found = checkpoint.load_tensors(tmp_path / "out/diffusion_pytorch_model.safetensors")
    complete = checkpoint.load_tensors(tmp_path / "run/model.safetensors")
    assert found.keys() == complete.keys() and all(found[name].equal(complete[name]) for name in found)
    changed = {name for name, weight in base.named_parameters() if not weight.equal(found[name])}
    assert changed == {"head.modulation", "head.head.weight", "head.head.bias"}
    fit(make_config(tiny_shards, tmp_path / "random", lora=None, train=["head"], max_steps=1))
    with pytest.raises(UserError, match="the base was random weights"):
        export_model(tmp_path / "random", tmp_path / "never")
    fit(make_config(tiny_shards, tmp_path / "lora", max_steps=1))
    with pytest.raises(UserError, match="trained a LoRA"):
        export_model(tmp_path / "lora", tmp_path / "never")
