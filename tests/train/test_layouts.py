"""One run on any layout of processes: the same samples, losses and weights, and a checkpoint that all of them read.

`make test` holds a star: every layout against one process, by a resume there and back. `make test-all` holds the rest:
twenty steps of each alone, and a resume from each to each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ranks import run_ranks
from shards_data import write_dataset
from streamed import late_copies
from train_runs import DIMS, checkpoint_bytes, make_config, read_metrics, train_spoiled

from shards.console import set_up_logging
from train import checkpoint
from train.config.train import TrainConfig
from train.loop import fit

STEPS, SHORT_STEPS = 20, 10
EXACT = ("step", "keys", "num_image_to_video", "bucket", "updates", "tokens", "skipped")
VARIED = {
    "model": {"dims": {**DIMS, "dim": 192, "num_heads": 24}},
    "lora__dropout": 0.1,
    "data__caption_dropout": 0.3,
    "objective__image_to_video_share": 0.5,
    "optim__lr": 3e-3,
    "optim__ema_decay": 0.9,
    "eval": {"num_clips": 1, "every_steps": 5},
}
"""24 heads; tokens of the tiny shards' clips and images, 75 and 15, divide neither by 2 nor by 4."""


class Way(NamedTuple):
    """How many processes, on machines of how many, and what else of a run may differ without changing it."""

    num_ranks: int
    local_size: int
    changes: dict[str, Any]


WAYS = {
    "one": Way(1, 1, {}),
    "replicate-2": Way(2, 2, {"data__micro_batch": 1}),
    "replicate-4": Way(4, 4, {"data__micro_batch": 1, "data__workers": 2}),
    "shard-2": Way(2, 2, {"parallel": {"shard": "full"}}),
    "shard-4": Way(4, 4, {"data__micro_batch": 1, "parallel": {"shard": "full", "offload": True}}),
    "ulysses-2": Way(2, 2, {"data__micro_batch": 4, "parallel": {"ulysses": 2}}),
    "ulysses-4": Way(4, 4, {"checkpointing": {"policy": "full"}, "parallel": {"ulysses": 4}}),
    "replicate-2-shard-2": Way(4, 2, {"data__micro_batch": 1, "parallel": {"shard": "hybrid"}}),
    "replicate-2-ulysses-2": Way(4, 4, {"data__workers": 3, "parallel": {"ulysses": 2}}),
    "shard-2-ulysses-2": Way(4, 4, {"data__micro_batch": 1, "parallel": {"shard": "full", "ulysses": 2}}),
}
MANY = [name for name in WAYS if name != "one"]
STREAMED = {"model": {**VARIED["model"], "stream_blocks": True}}
WAYS |= {
    "streamed": Way(1, 1, {**STREAMED, "checkpointing": {"policy": "full", "offload_inputs": True}}),
    "streamed-2": Way(2, 2, {**STREAMED, "data__micro_batch": 1}),
    "streamed-ulysses-2": Way(2, 2, {**STREAMED, "data__micro_batch": 4, "parallel": {"ulysses": 2}}),
}


def train(config: TrainConfig, local_size: int) -> str:
    """One rank of a run; rank 0 returns its log."""
    os.environ |= {"LOCAL_WORLD_SIZE": str(local_size), "LOCAL_RANK": str(int(os.environ["RANK"]) % local_size)}
    set_up_logging(terminal=False)
    with late_copies():
        fit(config)
    return (Path(config.output) / "logs" / "rank-0.log").read_text() if os.environ["RANK"] == "0" else ""


def run(shards: Path, output: Path, name: str, max_steps: int, **more: Any) -> str:
    """Train up to a step in one of the ways, going on from what is there."""
    way = WAYS[name]
    config = make_config(shards, output, **VARIED | more | way.changes, max_steps=max_steps)
    return run_ranks(way.num_ranks, train, config, way.local_size)[0]


@pytest.fixture(scope="module")
def alone(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of one process that never stops, by its steps and what is changed in it."""
    made: dict[str, Path] = {}

    def make(max_steps: int, shards: Path = tiny_shards, **more: Any) -> Path:
        key = repr((max_steps, shards, more))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone")
            run(shards, made[key], "one", max_steps, **more)
        return made[key]

    return make


def assert_same_run(one: Path, other: Path, rel: float = 1e-5) -> None:
    """Step by step the same samples, modes, losses of the batch and of each slot; held-out losses; weights."""
    ours, theirs = read_metrics(one), read_metrics(other)
    assert [[line[key] for key in EXACT] for line in ours] == [[line[key] for key in EXACT] for line in theirs]
    for line, same in zip(ours, theirs, strict=True):
        assert same["loss"] == pytest.approx(line["loss"], rel=rel)
        assert same["grad_norm"] == pytest.approx(line["grad_norm"], rel=10 * rel)
        assert same["slot_losses"] == pytest.approx(line["slot_losses"], rel=max(rel, 1e-4))  # written to five digits
    # Every stop takes the held-out loss once more.
    held_out = {line["step"]: line["mean"] for line in read_metrics(other, "held_out.jsonl")}
    for line in read_metrics(one, "held_out.jsonl"):
        assert held_out[line["step"]] == pytest.approx(line["mean"], rel=rel)
    for file in ("lora.safetensors", "average.safetensors"):
        a, b = (
            checkpoint.load_tensors(r / "checkpoints" / checkpoint.checkpoint_name(len(ours)) / file)
            for r in (one, other)
        )
        assert all(float((a[name] - b[name]).norm() / b[name].norm()) < 100 * rel for name in a)


@pytest.mark.parametrize("name", [*MANY, "streamed", "streamed-2", "streamed-ulysses-2"])
def test_a_run_goes_from_any_layout_to_one_process_and_back(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    """Four steps there, three in one process, three there again: the run of one process that never stopped."""
    log = run(tiny_shards, tmp_path, name, 4)
    assert ("layout: " if WAYS[name].num_ranks > 1 else "blocks streamed") in log
    run(tiny_shards, tmp_path, "one", 7)
    run(tiny_shards, tmp_path, name, SHORT_STEPS)
    assert_same_run(alone(SHORT_STEPS), tmp_path)
    if name == "streamed":  # on one process nothing is added in another order
        ours, theirs = (checkpoint_bytes(folder, SHORT_STEPS) for folder in (tmp_path, alone(SHORT_STEPS)))
        assert ours.keys() == theirs.keys() and [file for file in ours if ours[file] != theirs[file]] == []


@pytest.mark.parametrize("name", ["replicate-2", "shard-2-ulysses-2"])
def test_the_eight_bit_optimizer_goes_along(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    """Its codes and scales are the checkpoint's; a code flips where a last bit does, so losses agree less closely."""
    more = {"optim__name": "adamw8bit", "optim__min_8bit_size": 32}
    run(tiny_shards, tmp_path, name, 4, **more)
    run(tiny_shards, tmp_path, "one", 7, **more)
    run(tiny_shards, tmp_path, name, SHORT_STEPS, **more)
    assert_same_run(alone(SHORT_STEPS, **more), tmp_path, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replicate-2", "shard-2-ulysses-2"])
def test_a_schedule_free_optimizer_goes_along(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    """Its two sets of weights too: `assert_same_run` compares the averaged ones."""
    more = {"optim": {"name": "schedulefree.AdamWScheduleFree", "lr": 3e-3}, "optim__ema_decay": None}
    run(tiny_shards, tmp_path, name, 4, **more)
    run(tiny_shards, tmp_path, "one", 7, **more)
    run(tiny_shards, tmp_path, name, SHORT_STEPS, **more)
    assert_same_run(alone(SHORT_STEPS, **more), tmp_path)


UNEVEN = {
    "data__weights": {"category:news": 2.5, "clip-1*": 0.5},
    "objective__stratified": True,
    "objective__sigma_min": 0.1,
    "objective__sigma_max": 0.95,
}


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two lengths and images, in buckets of frames × height × width."""
    root = tmp_path_factory.mktemp("mixed")
    write_dataset(root, num_units=8, lengths=(9, 17), scratch=tmp_path_factory.mktemp("scratch"))
    return root


@pytest.mark.parametrize(
    "name", ["replicate-2", *(pytest.param(name, marks=pytest.mark.slow) for name in MANY if name != "replicate-2")]
)
def test_mixed_lengths_weights_and_strata_go_along(
    alone: Callable[..., Path], mixed_shards: Path, tmp_path: Path, name: str
) -> None:
    """The same samples, noise levels and losses wherever a run goes; several lengths, one a step."""
    run(mixed_shards, tmp_path, name, 4, **UNEVEN)
    run(mixed_shards, tmp_path, "one", 7, **UNEVEN)
    run(mixed_shards, tmp_path, name, SHORT_STEPS, **UNEVEN)
    assert_same_run(alone(SHORT_STEPS, shards=mixed_shards, **UNEVEN), tmp_path)
    assert {line["bucket"].rpartition("×")[2] for line in read_metrics(tmp_path)} >= {"9", "17"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_twenty_steps_on_any_layout_are_those_of_one_process(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    """Without a stop between."""
    run(tiny_shards, tmp_path, name, STEPS)
    assert_same_run(alone(STEPS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("after", MANY)
@pytest.mark.parametrize("before", MANY)
def test_a_run_goes_from_any_layout_to_any(
    alone: Callable[..., Path], tiny_shards: Path, tmp_path: Path, before: str, after: str
) -> None:
    """Five steps there, five here."""
    run(tiny_shards, tmp_path, before, 5)
    run(tiny_shards, tmp_path, after, SHORT_STEPS)
    assert_same_run(alone(SHORT_STEPS), tmp_path)


@pytest.mark.parametrize("name", ["replicate-2", "ulysses-2"])
def test_an_overflow_of_one_rank_is_everybodys(tiny_shards: Path, tmp_path: Path, name: str) -> None:
    """Judged after the one sum: all skip, halve their scale, blame the same block, and go on with the same weights."""
    changes = VARIED | {"precision__compute": "fp16", "eval": None} | WAYS[name].changes
    config = make_config(tiny_shards, tmp_path, **changes, max_steps=4)
    first, second = run_ranks(2, train_spoiled, config, 1, 3)
    assert first == second
    assert [step["skipped"] for step in first] == [0, 0, 1, 1]
    assert first[2]["scale"] == first[1]["scale"] / 2 and first[2]["blamed"].startswith("blocks.")
    assert first[2]["weights"] == first[1]["weights"] != first[3]["weights"]
