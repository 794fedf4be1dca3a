"""Many GPUs in closed form: the reference's Table 3, the split of a step, and that the page has these figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shards.errors import UserError
from shards.gpus import GPUS
from train.cli.main import main
from train.config.model import TI2V_5B, LoRAConfig
from train.config.train import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from train.estimate.communication import (
    Mesh,
    candidates,
    choose_mesh,
    count_exchange,
    make_mesh,
    num_passes,
    rank_flops,
)
from train.estimate.flops import score_flops, step_flops
from train.estimate.plan import make_plan
from train.estimate.sizes import Size
from train.geometry import SAVE_GROUPS, Bucket, Shape, num_tokens

ROOT = Path(__file__).parents[2]
CLIP = Shape(1, 11_440)
EVERY = LoRAConfig(targets=("self_attn", "cross_attn", "ffn"))
NOTHING, ALL = ((),) * 30, (SAVE_GROUPS,) * 30


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "output": "run",
        "max_steps": 10_000,
        "model": ModelConfig(dims=TI2V_5B),
        "data": DataConfig(root="shards", global_batch=16),
        "lora": EVERY,
    }
    return TrainConfig(**(values | changes))


def exchange(mesh: Mesh, gpu: str = "h100", saves: Any = NOTHING, global_batch: int = 16) -> Any:
    data = DataConfig(root="shards", global_batch=global_batch)
    return count_exchange(config(data=data), TI2V_5B, mesh, GPUS[gpu], CLIP, saves, 2)


@pytest.mark.parametrize(
    ("gpu", "mesh", "gigabytes", "seconds", "reduce_ms"),
    [
        ("v100-32gb", Mesh(2, 1, 2), 10.0, 0.91, 29),
        ("v100-sxm", Mesh(2, 1, 2), 10.0, 0.22, 7),
        ("a100-80gb", Mesh(8, 1, 8), 17.5, 0.076, 2.5),
        ("h100", Mesh(8, 1, 8), 17.5, 0.049, 1.6),
        ("h100", Mesh(64, 8, 64), 19.7, 0.060, 1.9),
    ],
)
def test_table_3_of_the_reference(gpu, mesh, gigabytes, seconds, reduce_ms):
    """All-gathers of the base a micro-step; the LoRA's gradients once a step, at rank 32 on every linear."""
    counted = exchange(mesh, gpu, global_batch=mesh.num_gpus)
    # The reference counts the embeddings and the head too, 2 % of it.
    assert counted.base_bytes / 1e9 == pytest.approx(gigabytes, rel=0.04)
    assert counted.base_bytes / mesh.link(GPUS[gpu], mesh.base_shards) == pytest.approx(seconds, rel=0.05)
    assert counted.gradient_bytes / mesh.link(GPUS[gpu], mesh.num_gpus) * 1e3 == pytest.approx(reduce_ms, rel=0.05)
    assert counted.token_bytes == 0


@pytest.mark.parametrize(("ulysses", "gigabytes"), [(2, 6.3), (8, 2.8)])
def test_ulysses_bytes_are_the_references(ulysses, gigabytes):
    """A sample's, three passes of thirty blocks."""
    mesh = Mesh(8, 1, 1, ulysses)
    assert exchange(mesh, global_batch=mesh.dp_size).token_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert num_passes(TI2V_5B, EVERY, NOTHING) == num_passes(TI2V_5B, EVERY, ALL) == 90
    assert num_passes(TI2V_5B, None, NOTHING) == 90 and num_passes(TI2V_5B, None, ALL) == 60


def test_gradients_cost_the_same_however_many_micro_steps():
    few, many = (exchange(Mesh(8, 1, 8), global_batch=batch) for batch in (8, 64))
    assert few.gradient_bytes == many.gradient_bytes and many.base_bytes == 8 * few.base_bytes


@pytest.mark.parametrize("saves", [NOTHING, ALL, (("attention",),) * 30])
@pytest.mark.parametrize("tokens", [11_440, 5_070])
def test_a_sequence_of_ranks_does_a_steps_work_once(saves, tokens):
    """All but text and time, which every rank computes, and padding; scores are divided by heads and never padded."""
    shape, lora = Shape(1, tokens), EVERY
    alone = step_flops(TI2V_5B, shape, lora, saves, num_rows=2)
    assert rank_flops(TI2V_5B, shape, lora, saves) == alone
    for ulysses in (2, 4, 8):
        together = ulysses * rank_flops(TI2V_5B, shape, lora, saves, ulysses)
        text = step_flops(TI2V_5B, Shape(1, 0), lora, saves, num_rows=2)
        padded = -(-tokens // ulysses) * ulysses
        square = score_flops(TI2V_5B, shape) - score_flops(TI2V_5B, Shape(1, 0)) - 4 * tokens * 3072 * 512
        scores = square * 30 * (3.5 if "attention" in saves[0] else 4.5)
        line = alone - text - scores
        assert together == pytest.approx(ulysses * text + line * padded / tokens + scores, rel=1e-9)
        assert alone < together < 1.06 * alone


def test_layouts_that_cannot_be_are_not_tried_or_are_refused():
    meshes = candidates(TI2V_5B, 64, 8, global_batch=16, micro_batch=1)
    assert {mesh.ulysses for mesh in meshes} == {4, 8}  # 64 and 32 shares of 16 samples are none
    assert {mesh.base_shards for mesh in meshes} == {1, 8, 64}
    with pytest.raises(UserError, match="24 heads"):
        make_mesh(10, 1, 1, 5, TI2V_5B)
    with pytest.raises(UserError, match="does not divide by --nodes"):
        make_mesh(8, 3, 1, 1, TI2V_5B)
    assert str(Mesh(64, 8, 8, 4)) == "shard over 8 × ulysses 4" and str(Mesh(8)) == "replicate 8"


def test_auto_replicates_where_the_base_fits_and_shards_where_it_does_not():
    size = [Size(Bucket(49, 704, 1280), 1.0)]
    assert make_plan(config(), GPUS["v100-32gb"], 2, size).chosen.mesh.base_shards == 1
    long = [Size(Bucket(121, 704, 1280), 1.0)]
    plan = make_plan(config(), GPUS["rtx4090"], 8, long)
    assert plan.chosen.mesh.base_shards == 8 and plan.chosen.fits
    assert plan.chosen.memory.base < 3 * 2**30
    replicate = [s for s in make_plan(config(), GPUS["h100"], 8, size).layouts if s.mesh.base_shards == 1]
    assert all(s.exchange.base_bytes == 0 for s in replicate)


def layout(gpu: str | None, num_gpus: int, num_nodes: int = 1, *, frames: int = 49, batch: int = 16, **parallel: Any):
    settings = config(
        data=DataConfig(root="shards", global_batch=batch),
        parallel=ParallelConfig(**parallel),
    )
    memory = int(GPUS[gpu].memory_gib * 2**30) if gpu else None
    shapes = [Shape(1, num_tokens(TI2V_5B, frames, 704, 1280))]
    return choose_mesh(settings, TI2V_5B, num_gpus, num_nodes, shapes, device_bytes=memory, compute_bytes=2)


@pytest.mark.parametrize(
    ("arguments", "mesh", "words"),
    [
        ({"gpu": "v100-32gb", "num_gpus": 2}, Mesh(2), "a step takes"),
        ({"gpu": "v100-32gb", "num_gpus": 2, "frames": 197}, Mesh(2, 1, 2), "and 3"),
        # 31.1 GiB would be within the card's 31.7, and is refused by `auto` checkpointing, which leaves 3 % free.
        ({"gpu": "v100-32gb", "num_gpus": 2, "frames": 201}, Mesh(2, 1, 1, 2), "and 35.2 as replicate 2"),
        ({"gpu": "rtx4090", "num_gpus": 8, "frames": 121}, Mesh(8, 1, 8), "and 26.1 as replicate 8"),
        ({"gpu": "rtx4090", "num_gpus": 8, "frames": 241}, Mesh(8, 1, 8, 2), "as replicate 8"),
        ({"gpu": "h100", "num_gpus": 64, "num_nodes": 8}, Mesh(64, 8, 1, 4), "16 samples divided among 64"),
        ({"gpu": None, "num_gpus": 64, "num_nodes": 8}, Mesh(64, 8, 1, 4), "so 4 share one"),
        ({"gpu": "h100", "num_gpus": 8, "shard": "full", "ulysses": 4}, Mesh(8, 1, 8, 4), "parallel.ulysses: 4"),
        ({"gpu": "h100", "num_gpus": 3}, Mesh(3), "auto"),  # refused where the batch is dealt, with sizes that can be
        ({"gpu": "rtx4090", "num_gpus": 2, "frames": 961}, Mesh(2, 1, 2, 2), "nothing fits"),
    ],
)
def test_auto_takes_the_first_layout_that_a_step_fits_in(arguments, mesh, words):
    """The base whole, then spread; samples whole, then shared; more ranks a sample where the batch is too small."""
    chosen, reason = layout(**arguments)
    assert chosen == mesh and words in reason, (chosen, reason)


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_those_that_do():
    with pytest.raises(UserError, match="24 heads and the 16 GPUs") as caught:
        layout("h100", 16, ulysses=16)
    assert caught.value.expected == "1, 2, 4, 8"


def test_the_command_compares_layouts_and_machines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output: run\nmax_steps: 100\nmodel: {checkpoint: /nowhere}\ndata: {root: /nowhere}\n")
    arguments = ["plan", str(path), "--gpu", "h100", "--gpus", "16", "--nodes", "2"]
    output = CliRunner().invoke(main, arguments).output
    for words in ("replicate 16", "◀ configured", "shard over 8", "shard over 16", "ulysses 8", "330 between them"):
        assert words in output, output
    assert "layout" not in CliRunner().invoke(main, [*arguments[:4], "--gpus", "1"]).output
    result = CliRunner().invoke(main, [*arguments[:-1], "3"])
    assert result.exit_code == 2 and "--nodes 3" in result.output


def load_tables():
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "docs/reference/scaling_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_ready_configs_have_these_figures():
    module = load_tables()
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    again = "run: python docs/reference/scaling_tables.py"
    assert module.filled(page) == page, again
    assert len(module.CONFIGS) >= 7
    for path in module.CONFIGS:
        assert module.headed(path) == path.read_text(encoding="utf-8"), f"{path.name}: {again}"
