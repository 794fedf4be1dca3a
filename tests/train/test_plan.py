"""The plan: figures of the reference come out, settings are compared, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shards.config import load_config
from shards.errors import UserError
from shards.gpus import GPUS, by_driver_name, find_gpu
from train.cli.main import main
from train.config.model import TI2V_5B, LoRAConfig
from train.config.train import (
    CheckpointingConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)
from train.estimate.flops import forward_work, step_flops, step_work, with_compile
from train.estimate.memory import BASES, block_bytes, num_lora_parameters, num_parameters, step_memory
from train.estimate.plan import Estimate, make_plan
from train.estimate.plan_text import describe_estimate
from train.estimate.saves import GIB, make_chooser, rank_groups, run_memory, total_kept
from train.estimate.sizes import Size, parse_size
from train.geometry import SAVE_GROUPS, Bucket, Shape

CONFIGS = Path(__file__).parents[2] / "configs"
CLIP = Size(Bucket(49, 704, 1280), 1.0)


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "output": "run",
        "max_steps": 10_000,
        "model": ModelConfig(dims=TI2V_5B),
        "data": DataConfig(root="shards"),
    }
    return TrainConfig(**(values | changes))


def setting(plan: Estimate, name: str) -> Any:
    return next(setting for setting in plan.settings if setting.name == name)


def test_parameters_are_counted() -> None:
    assert sum(num_parameters(TI2V_5B)) == 4_999_787_712
    every = LoRAConfig(targets=("self_attn", "cross_attn", "ffn"))
    assert num_lora_parameters(TI2V_5B, every) == 2_519_040 * 32
    assert num_lora_parameters(TI2V_5B, LoRAConfig()) == 1_474_560 * 32


def test_days_of_the_seed_are_the_references() -> None:
    """Table 1: 160,000 samples of 1280×704×49 on two V100 take 8.8 days at 50 %, with every block run twice."""
    plan = make_plan(config(), GPUS["v100-32gb"], 2, [CLIP], efficiency=0.5)
    full = setting(plan, "full")
    # Ours leaves the feed-forward's way down out of the second run: 1.32 in place of 1.40.
    assert full.seconds * 10_000 / 86_400 == pytest.approx(8.8 * 498.4 / 531.7, rel=0.01)
    assert full.seconds_at_peak < full.seconds
    assert setting(plan, "none").fits is False
    assert setting(plan, "full").fits is True
    assert plan.fastest is not None and plan.fastest.seconds <= full.seconds
    assert 12 < plan.encode_days < 14  # of encoding in fp32 there


def test_seconds_follow_gpus_and_efficiency() -> None:
    one = make_plan(config(), GPUS["h100"], 1, [CLIP])
    eight = make_plan(config(), GPUS["h100"], 8, [CLIP])
    assert one.chosen.exchange.seconds == 0
    assert eight.chosen.seconds_at_peak == pytest.approx(one.chosen.seconds_at_peak / 8)
    # fp32 gradients of the LoRA, there and back, over seven eighths: 1.6 ms at r 32 on all linears (Table 3).
    assert eight.chosen.exchange.seconds == pytest.approx(1.6e-3 * 1_474_560 / 2_519_040, rel=0.05)
    assert one.chosen.work_seconds.scaled(1 / 8) == pytest.approx(eight.chosen.work_seconds)
    quarter, half = (make_plan(config(), GPUS["h100"], 1, [CLIP], efficiency=share) for share in (0.25, 0.5))
    assert quarter.chosen.seconds == 2 * half.chosen.seconds == 4 * one.chosen.seconds_at_peak


@pytest.mark.parametrize(
    ("gpu", "gpus", "size", "seconds", "low", "high"),
    [("v100-32gb", 2, (49, 704, 1280), 96.5, 73, 138), ("v100-32gb", 2, (49, 480, 832), 24.3, 18.5, 34)],
)
def test_a_v100s_seconds_are_those_of_the_roofline(gpu, gpus, size, seconds, low, high) -> None:
    """GEMMs, attention forward, attention backward and memory traffic each at their own rate."""
    plan = make_plan(config(eval=None), GPUS[gpu], gpus, [Size(Bucket(*size), 1.0)])
    assert plan.chosen.seconds == pytest.approx(seconds, rel=0.06)
    assert [days * 86_400 / 10_000 for days in plan.train_days_range] == pytest.approx([low, high], rel=0.08)


def test_an_h100_is_expected_at_42_percent_and_compiled_near_48() -> None:
    shares = []
    for compiled in (False, True):
        chosen = make_plan(config(model=ModelConfig(dims=TI2V_5B, compile=compiled)), GPUS["h100"], 1, [CLIP]).chosen
        shares.append(chosen.seconds_at_peak / sum(chosen.work_seconds))
    assert shares == pytest.approx([0.42, 0.475], abs=0.015)


def test_attention_and_gemms_add_up_to_the_executed_flops() -> None:
    for saves in ((SAVE_GROUPS,) * 30, ((),) * 30, (("attention",),) * 30):
        work = step_work(TI2V_5B, Shape(1, 11_440), LoRAConfig(), saves)
        assert work.flops == pytest.approx(step_flops(TI2V_5B, Shape(1, 11_440), LoRAConfig(), saves))
    # Traced: 46 % of 380 TFLOP is attention at this size, 359 GB are moved, 466 GB where all is computed again.
    kept, again = (step_work(TI2V_5B, Shape(1, 11_440), LoRAConfig(), (s,) * 30) for s in (SAVE_GROUPS, ()))
    assert (kept.attention_flops + kept.attention_backward_flops) / kept.flops == pytest.approx(0.46, abs=0.01)
    assert [kept.traffic_bytes / 1e9, again.traffic_bytes / 1e9] == pytest.approx([359, 466], rel=0.01)


def test_stage_1_takes_the_days_of_its_precision() -> None:
    """On an H100 fp32 takes 6.1 days, where 0.74 were promised once."""
    full, fast = (make_plan(config(), GPUS["h100"], 1, [CLIP], vae_mode=mode) for mode in ("fp32", "fp16"))
    assert full.encode_days == pytest.approx(6.1, abs=0.1) and fast.encode_days == full.encode_days_fast < 2


def test_what_shortens_a_run_is_said_with_figures() -> None:
    plan = make_plan(config(), GPUS["v100-32gb"], 2, [CLIP])
    small = make_plan(config(), GPUS["v100-32gb"], 2, [Size(Bucket(49, 480, 832), 1.0)])
    text = "\n".join(describe_estimate(plan))
    days = small.chosen.days(10_000)
    assert f"832×480, where the clips are no larger: training {days:.2f} days" in plan.shorter[0]
    for words in ("for four epochs", "lora.start_from", "vae_precision=auto", "optimistic"):
        assert words in text
    assert not any("832×480" in line for line in small.shorter)
    slow = make_plan(config(precision=PrecisionConfig(compute="fp32")), GPUS["h200"], 1, [CLIP])
    assert any("precision.compute=auto" in line for line in slow.shorter)


def test_the_held_out_share_counts_its_forward_passes() -> None:
    assert make_plan(config(eval=None), GPUS["h200"], 1, [CLIP]).held_out_share == 0
    share = make_plan(config(), GPUS["h200"], 1, [CLIP], efficiency=0.5).held_out_share
    forward, step = 151.3, 16 * 377.4
    held_out = 21 * 16 * 18 * forward
    assert share == pytest.approx(held_out / (held_out + 10_000 * step), rel=0.01)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("1xh200", "h200"),
        ("8xh100", "h100"),
        ("8xh100_full", "h100"),
        ("2xv100", "v100-32gb"),
        ("1xrtx4090", "rtx4090"),
    ],
)
def test_the_held_out_loss_takes_at_most_a_fiftieth_on_any_number_of_gpus(name: str, gpu: str) -> None:
    """Of the shipped configs; each replica took all of it once: 10 % on 8 GPUs."""
    shipped = load_config(TrainConfig, CONFIGS / f"ti2v_5b_{name}.yaml", ["model.checkpoint=/nowhere"])
    sizes = [Size(Bucket(17, 480, 832), 1.0)]  # the smallest: where the share is largest
    for num_gpus, num_nodes in ((1, 1), (8, 1), (64, 8)):
        assert 0.005 < make_plan(shipped, GPUS[gpu], num_gpus, sizes, num_nodes=num_nodes).held_out_share <= 0.02


def test_held_out_passes_are_divided_round_by_round() -> None:
    """288 of 16 clips; on 64 ranks five rounds of 64; a clip of one frame has nine; a sharded base is gathered once."""

    def days(num_gpus: int, *sizes: Size, **changes: Any) -> float:
        plan = make_plan(config(data=DataConfig(root="x", global_batch=64), **changes), GPUS["h100"], num_gpus, sizes)
        return plan.held_out_share * plan.train_days

    one = days(1, CLIP)
    assert days(8, CLIP) == pytest.approx(one / 8)
    assert days(64, CLIP) == pytest.approx(one * 5 / 288)
    image = Size(Bucket(1, 704, 1280), 1.0)
    still = make_plan(config(), GPUS["h100"], 1, [image])
    forward = forward_work(TI2V_5B, Shape(1, 880), LoRAConfig()).seconds(GPUS["h100"], 2)
    assert still.held_out_share * still.train_days * 86_400 == pytest.approx(21 * 16 * 9 * sum(forward))
    sharded = days(8, CLIP, parallel=ParallelConfig(shard="full"))
    gathered = TI2V_5B.num_layers * block_bytes(TI2V_5B, 2, 8) * 7 / 8 / (1e9 * GPUS["h100"].link_gb_per_second)
    assert (sharded - one / 8) * 86_400 == pytest.approx(21 * 36 * gathered)


def test_sizes_are_weighted_and_the_largest_decides_memory() -> None:
    small, large = Bucket(17, 480, 832), Bucket(49, 704, 1280)
    both = make_plan(config(), GPUS["h200"], 1, [Size(small, 0.75), Size(large, 0.25)])
    alone = [make_plan(config(), GPUS["h200"], 1, [Size(bucket, 1.0)]) for bucket in (small, large)]
    assert both.chosen.memory == alone[1].chosen.memory
    mean = 0.75 * alone[0].chosen.step_flops + 0.25 * alone[1].chosen.step_flops
    assert both.chosen.step_flops == pytest.approx(mean)


@pytest.mark.parametrize(("gpu", "tokens"), [(g, t) for g in GPUS for t in (1_950, 4_400, 11_440, 27_280)])
def test_auto_keeps_as_much_as_fits(gpu: str, tokens: int) -> None:
    limit, shape = int(GPUS[gpu].memory_gib * GIB), Shape(1, tokens)
    choose = make_chooser(config(), TI2V_5B, device_bytes=limit)
    memory_gib = GPUS[gpu].memory_gib
    # A resident base of 16 bits: 12 GB cards hold it beside no sample of any length.
    if memory_gib < 12 or (memory_gib < 16 and tokens > 4_400) or (memory_gib < 24 and tokens == 27_280):
        with pytest.raises(UserError, match=f"{tokens:,} tokens need"):
            choose(shape)
        return
    saves = choose(shape)
    memory = run_memory(config(), TI2V_5B, shape, saves, 2).total
    assert memory <= 0.97 * limit
    if saves != (SAVE_GROUPS,) * 30 and any(len(groups) < 3 for groups in saves):
        assert memory > 0.94 * limit
    fewest, most = len(saves[0]), len(saves[-1])
    assert fewest <= most


SMALL = Size(Bucket(49, 480, 832), 1.0)


def test_auto_streams_where_a_step_does_not_fit_otherwise_and_only_there() -> None:
    own = dict(lora=LoRAConfig(rank=16), optim=OptimConfig(name="adamw8bit"))
    for gpu, streamed in (("rtx4070", True), ("rtx4080", False), ("rtx4090", False), ("t4", False)):
        plan = make_plan(config(**own), GPUS[gpu], 1, [SMALL])
        assert plan.chosen.fits and plan.chosen.mesh.streamed is streamed, gpu
    # By name it is done, or not done, everywhere.
    for asked, gpu in ((True, "h100"), (False, "h100")):
        chosen = make_plan(config(model=ModelConfig(dims=TI2V_5B, stream_blocks=asked)), GPUS[gpu], 1, [SMALL]).chosen
        assert chosen.mesh.streamed is asked and (chosen.host_bytes > 9 * GIB) is asked
    with pytest.raises(UserError, match="tokens need"):
        make_plan(config(model=ModelConfig(dims=TI2V_5B, stream_blocks=False)), GPUS["rtx4070"], 1, [SMALL])
    # Several GPUs shard the base first; fp8 and nf4 are never chosen, nor sharded.
    assert make_plan(config(**own), GPUS["rtx4070"], 2, [SMALL]).chosen.mesh[2:] == (2, 1, False)
    quantised = config(**own, model=ModelConfig(dims=TI2V_5B, base_dtype="fp8"))
    assert make_plan(quantised, GPUS["rtx4070"], 2, [SMALL]).chosen.mesh[2:] == (1, 1, False)


@pytest.mark.parametrize(
    ("name", "least_gib"),
    [("fp8", 8.8), ("nf4", 6.7), ("16 bit, streamed", 4.7), ("16 bit, streamed, inputs offloaded", 3.0)],
)
def test_the_least_memory_of_each_way_to_keep_the_base(name: str, least_gib: float) -> None:
    shape, lora = Shape(1, 5_070), LoRAConfig(rank=16)
    memory = step_memory(TI2V_5B, shape, lora, ((),) * 30, store=BASES[name], optimizer_bytes=2.1)
    assert least_gib - 0.3 < memory.total / GIB <= least_gib


def test_the_plan_recommends_the_fastest_way_that_fits() -> None:
    """On PCIe 4 streaming is hidden, so that what it frees keeps activations; on a slow link it is not."""
    plan = make_plan(config(lora=LoRAConfig(rank=16)), GPUS["rtx4080"], 1, [SMALL])
    ways = {base.name: base for base in plan.bases}
    assert plan.fastest_exact is ways["16 bit, streamed"] and plan.fastest_base is plan.fastest_exact
    assert ways["16 bit, streamed"].transfer.exposed_seconds == 0
    assert ways["16 bit"].seconds > 1.15 * ways["16 bit, streamed"].seconds
    moved = ways["16 bit, streamed"].transfer.num_bytes
    assert moved == pytest.approx(16 * 2 * 28 * block_bytes(TI2V_5B, 2), rel=1e-6)
    text = "\n".join(describe_estimate(plan))
    assert "◀ recommended" in text and "model.stream_blocks=true: " in text
    slow = make_plan(config(lora=LoRAConfig(rank=16)), GPUS["rtx4080"]._replace(host_gb=3), 1, [SMALL])
    ways = {base.name: base for base in slow.bases}
    way = ways["16 bit, streamed"]
    assert slow.fastest_exact is ways["16 bit, inputs offloaded"]
    assert way.seconds == pytest.approx(way.transfer.seconds) and way.seconds > 2 * sum(way.work_seconds)
    assert slow.fastest_base is ways["nf4"] and "rounded weights, chosen by name only" in "\n".join(
        describe_estimate(slow)
    )


def test_selective_lands_on_its_budget() -> None:
    shape = Shape(1, 11_440)
    lora = LoRAConfig()
    previous = None
    for budget in (5.0, 10.0, 15.0, 20.0, 26.0, 40.0):
        chosen = config(checkpointing=CheckpointingConfig(policy="selective", budget_gib=budget))
        saves = make_chooser(chosen, TI2V_5B, device_bytes=None)(shape)
        kept = total_kept(TI2V_5B, shape, lora, saves) / GIB
        assert kept <= budget
        assert kept > min(budget, 27.2) - 0.4
        flops = step_flops(TI2V_5B, shape, lora, saves)
        assert previous is None or flops < previous
        previous = flops
    assert previous == step_flops(TI2V_5B, shape, lora)


def test_what_costs_most_a_byte_is_kept_first() -> None:
    assert rank_groups(TI2V_5B, Shape(1, 11_440)) == ["attention", "projections", "ffn_up"]
    # Short sequences: scores are cheap, GEMMs are not.
    assert rank_groups(TI2V_5B, Shape(1, 1_950))[-1] == "attention"


def test_a_budget_below_the_blocks_inputs_is_refused() -> None:
    chosen = config(checkpointing=CheckpointingConfig(policy="selective", budget_gib=1.0))
    with pytest.raises(UserError, match="less than the blocks' inputs"):
        make_chooser(chosen, TI2V_5B, device_bytes=None)(Shape(1, 11_440))


@pytest.mark.parametrize(("policy", "budget"), [("selective", None), ("full", 4.0)])
def test_a_budget_belongs_to_selective(policy: Any, budget: float | None) -> None:
    with pytest.raises(ValueError, match="selective takes one"):
        CheckpointingConfig(policy=policy, budget_gib=budget)


def test_every_weight_trained_is_planned_and_sharded_where_it_must_be() -> None:
    """16 bytes a number do not fit an H100 beside a step; over eight they do, and over 64 they are a 64th."""
    whole = make_plan(config(lora=None), GPUS["h100"], 1, [CLIP])
    assert whole.chosen.fits is False and whole.chosen.memory.optimizer == 8 * sum(num_parameters(TI2V_5B))
    eight = make_plan(config(lora=None), GPUS["h100"], 8, [CLIP])
    assert eight.chosen.mesh.base_shards == 8 and eight.chosen.fits
    assert eight.chosen.memory.optimizer / whole.chosen.memory.optimizer == pytest.approx(1 / 8, rel=0.01)
    replicate = next(setting for setting in eight.layouts if setting.mesh.base_shards == 1)
    assert replicate.fits is False and replicate.exchange.base_bytes == 0
    assert "GiB" in "\n".join(describe_estimate(eight))
    sharded = ParallelConfig(shard="full")
    some = make_plan(config(lora=None, train=("blocks.25-29", "head"), parallel=sharded), GPUS["h100"], 8, [CLIP])
    assert some.chosen.memory.optimizer < 0.2 * eight.chosen.memory.optimizer
    assert some.chosen.memory.total < eight.chosen.memory.total


def test_bf16_on_a_v100_is_refused() -> None:
    with pytest.raises(UserError, match="only emulated"):
        make_plan(config(precision=PrecisionConfig(compute="bf16")), GPUS["v100-sxm"], 1, [CLIP])


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="does not divide by 3"):
        make_plan(config(), GPUS["h100"], 3, [CLIP])


@pytest.mark.parametrize("text", ["1280x704", "1280x704x0", "axbxc", "1280,704,49"])
def test_a_size_is_width_height_frames(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)


def test_a_size_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(UserError, match="multiples of 32"):
        make_plan(config(), GPUS["h100"], 1, [Size(Bucket(49, 720, 1280), 1.0)])


def test_gpus_have_names() -> None:
    with pytest.raises(UserError, match="did you mean h100"):
        find_gpu("h10")
    for driver, name in {
        "Tesla V100-PCIE-32GB": "v100-32gb",
        "Tesla V100-SXM2-32GB": "v100-sxm",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "Tesla V100-PCIE-16GB": "v100-16gb",
        "NVIDIA GeForce RTX 3060": "rtx3060",
        "NVIDIA GeForce RTX 4070": "rtx4070",
        "NVIDIA GeForce RTX 4080 SUPER": "rtx4080",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA GeForce RTX 3090 Ti": "rtx3090",
        "NVIDIA GeForce RTX 5090": "rtx5090",
        "NVIDIA L40S": "l40s",
        "NVIDIA A10": "a10",
        "Tesla T4": "t4",
        "NVIDIA B200": "b200",
    }.items():
        assert by_driver_name(driver) is GPUS[name]
    assert by_driver_name("NVIDIA L4") is None and by_driver_name("NVIDIA A10G") is None


def test_the_command_plans(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output: run\nmax_steps: 100\nmodel: {checkpoint: /nowhere}\ndata: {root: /nowhere}\n")
    result = CliRunner().invoke(main, ["plan", str(path), "--gpu", "v100-32gb", "--gpus", "2"])
    assert result.exit_code == 0, result.output
    for words in (
        "◀ configured",
        "workspace",
        "(an estimate)",
        "stage 1 before it",
        "held-out loss",
        "sizes of Wan2.2",
    ):
        assert words in result.output
    arguments = ["plan", str(path), "--gpu", "h200", "--size", "832x480x49", "--json"]
    values = json.loads(CliRunner().invoke(main, arguments).output)
    assert values["sizes"] == [{"size": "832×480×49", "share": 1.0}]
    assert values["chosen"]["memory"]["total"] > values["chosen"]["memory"]["base"] > 9 * GIB


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "run.yaml"
    path.write_text("output: run\nmax_steps: 100\nmodel: {checkpoint: /nowhere}\ndata: {root: /nowhere}\n")
    script = (
        "import sys\nfrom train.cli.main import main\n"
        f"main(['plan', {str(path)!r}, '--gpu', 'h200', '--size', '832x480x49'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("changes", "gpu", "sizes", "compiles", "why"),
    [
        ({}, "h100", 1, True, "minutes"),
        ({"max_steps": 50}, "h100", 1, False, "it would save about 0 minutes and take about 2"),
        ({"lora": LoRAConfig(dropout=0.1)}, "h100", 1, False, "LoRA dropout"),
        ({}, "h100", 17, False, "17 sizes"),
        ({}, None, 1, False, "no GPU"),
    ],
)
def test_compile_auto_pays_for_itself(changes, gpu, sizes, compiles, why) -> None:
    asked = config(model=ModelConfig(dims=TI2V_5B, compile="auto"), **changes)
    notes: list[str] = []
    shapes = [Shape(1, 11_440 - size) for size in range(sizes)]
    decided = with_compile(asked, TI2V_5B, gpu and GPUS[gpu], shapes, 8, notes)
    assert decided.model.compile is compiles and why in notes[0]
    assert with_compile(decided, TI2V_5B, None, shapes, 8, notes) is decided and len(notes) == 1
    if gpu and sizes == 1:
        plan = make_plan(asked, GPUS[gpu], 8, [CLIP])
        same = make_plan(decided, GPUS[gpu], 8, [CLIP])
        assert any("model.compile: auto" in note for note in plan.notes)
        assert plan.chosen.seconds == same.chosen.seconds
