"""A base spread over ranks: the same numbers as one process, a rank holds and reads its part alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import resident_bytes
from ranks import in_a_group, run_ranks
from torch import Tensor
from train_runs import finish, lora_parameters, make_config

from shards.errors import UserError
from train.config.model import DiTConfig, LoRAConfig
from train.estimate.layout import choose_layout
from train.lora.lora import inject, reset
from train.model.dit import WanDiT, build_model, init_random
from train.model.load import load_dit, save_dit
from train.parallel.fsdp import local_shard, shard_base
from train.parallel.ranks import World

DIMS = DiTConfig(dim=48, num_heads=2, num_layers=3, ffn_dim=100, text_dim=32, text_len=16)
LORA = LoRAConfig(rank=4, targets=("self_attn", "cross_attn", "ffn"))
POLICIES: dict[str, Any] = {
    "none": "none",
    "full": "full",
    "mixed": lambda shape: [(), ("attention",), ("attention", "projections", "ffn_up")],
}


def whole(policy: str, dtype: torch.dtype, checkpoint: Path | None = None) -> WanDiT:
    model = build_model(DIMS, dtype, seed=None if checkpoint else 7)
    if checkpoint:
        load_dit(model, checkpoint)
    inject(model, LORA, 0)
    return finish(model, POLICIES[policy])


def parted(policy: str, dtype: torch.dtype, *, offload: bool = False, checkpoint: Path | None = None) -> WanDiT:
    from torch.distributed.device_mesh import init_device_mesh

    model = build_model(DIMS, dtype, "meta")
    inject(model, LORA, 0)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    shard_base(model, mesh, torch.device("cpu"), offload=offload)
    if checkpoint:
        load_dit(model, checkpoint)
    else:
        init_random(model, 7)
    reset(model, 0)
    return finish(model, POLICIES[policy])


def steps(model: WanDiT, dtype: torch.dtype) -> list[Tensor]:
    """Velocities and LoRA gradients of two micro-steps that add up, and an evaluation."""
    generator = torch.Generator().manual_seed(2)
    results = []
    for first in (True, False):
        latent = torch.randn(2, 48, 3, 4, 6, generator=generator)
        text = torch.randn(2, 16, 32, generator=generator)
        velocity = model(latent, torch.tensor([300.0, 713.25]), torch.tensor([first, False]), text)
        velocity.square().mean().backward()
        results.append(velocity.detach())
    with torch.no_grad():
        results.append(model.eval()(latent, torch.tensor([1.0, 2.0]), torch.tensor([False, False]), text))
    model.train()
    return results + [weight.grad for weight in lora_parameters(model)]


def compare(policy: str, dtype: torch.dtype, offload: bool, checkpoint: Path | None) -> tuple[bool, list[int]]:
    exact = steps(whole(policy, dtype, checkpoint), dtype)
    model = parted(policy, dtype, offload=offload, checkpoint=checkpoint)
    ours = steps(model, dtype)
    same = len(ours) == len(exact) and all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    return same, list(resident_bytes(model))


@pytest.mark.parametrize(
    ("policy", "dtype", "offload"),
    [
        ("none", torch.float32, False),
        ("full", torch.bfloat16, False),
        pytest.param("mixed", torch.float16, True, marks=pytest.mark.slow),
        pytest.param("mixed", torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_a_spread_base_gives_the_bits_of_a_whole_one(policy: str, dtype: torch.dtype, offload: bool) -> None:
    """Forward, gradients over two micro-steps and an evaluation, for each policy and dtype: nothing rounds."""
    results = run_ranks(2, in_a_group, compare, policy, dtype, offload, None)
    assert [same for same, _ in results] == [True, True]
    model = build_model(DIMS, dtype, "meta")
    blocks = sum(w.numel() * w.element_size() for name, w in model.named_parameters() if name.startswith("blocks."))
    assert sum(sizes[0] for _, sizes in results) == blocks


def test_each_rank_reads_its_own_rows_of_a_checkpoint(tmp_path: Path) -> None:
    """Three ranks of rows that do not divide by three: 100 = 34 + 34 + 32, and modulation's single row on the first."""
    save_dit(build_model(DIMS, seed=9), tmp_path / "model.safetensors")
    results = run_ranks(3, in_a_group, compare, "none", torch.float32, False, tmp_path / "model.safetensors")
    assert [same for same, _ in results] == [True] * 3


def rows_read(checkpoint: Path) -> tuple[int, int]:
    """Elements of the blocks that a rank takes out of a file, and those that it holds."""
    from train.model import load as weights

    taken = 0
    plain = weights._stream

    class Counted:
        def __init__(self, name: str, stored: Any) -> None:
            self.name, self.stored = name, stored

        def __getitem__(self, rows: slice) -> Tensor:
            nonlocal taken
            part = self.stored[rows]
            taken += part.numel() if self.name.startswith("blocks.") else 0
            return part

    weights._stream = lambda places: ((name, Counted(name, stored)) for name, stored in plain(places))
    model = parted("none", torch.float32, checkpoint=checkpoint)
    own = [
        local_shard(w)[0].numel() for n, w in model.named_parameters() if n.startswith("blocks.") and "lora" not in n
    ]
    return taken, sum(own)


def test_nothing_is_read_that_is_not_kept(tmp_path: Path) -> None:
    """Two ranks take half of the blocks out of the file each."""
    model = build_model(DIMS, seed=9)
    save_dit(model, tmp_path / "model.safetensors")
    results = run_ranks(2, in_a_group, rows_read, tmp_path / "model.safetensors")
    assert all(taken == held for taken, held in results)
    assert sum(t for t, _ in results) == sum(w.numel() for n, w in model.named_parameters() if n.startswith("blocks."))


def test_a_layout_that_cannot_be_is_the_users(tiny_shards: Path, tmp_path: Path) -> None:
    """Before any process is met."""
    config = make_config(tiny_shards, tmp_path, parallel={"shard": "hybrid"})
    with pytest.raises(UserError, match="6 processes are not complete machines of 4"):
        choose_layout(config, World(0, 6, 0, 4), None)


@pytest.mark.parametrize("changes", [{"parallel": {"offload": True}}, {"model__compile": True}])
def test_what_a_sharded_model_that_trains_cannot_do_is_refused(
    tiny_shards: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    parallel = {"shard": "full", **changes.pop("parallel", {})}
    make_config(tiny_shards, tmp_path, lora=None, parallel={"shard": "full"})
    with pytest.raises(UserError, match=r"is for a frozen base|cannot follow the gathers"):
        make_config(tiny_shards, tmp_path, lora=None, parallel=parallel, **changes)


def test_auto_spreads_the_base_only_where_a_step_does_not_fit_beside_it(tiny_shards: Path, tmp_path: Path) -> None:
    """By the planner's bytes, over the processes of a machine, with its ground."""
    config = make_config(tiny_shards, tmp_path)
    for device_bytes, shards in ((None, 1), (80 << 30, 1), (1 << 20, 4)):
        layout, reason = choose_layout(config, World(0, 8, 0, 4), device_bytes)
        assert layout.base_shards == shards and reason


def test_a_model_with_memory_or_a_base_that_trains_is_refused() -> None:
    """Either would defeat the purpose, the second without a word."""
    with pytest.raises(ValueError, match="meta"):
        shard_base(build_model(DIMS, seed=0), None, torch.device("cpu"))
    with pytest.raises(ValueError, match="frozen"):
        shard_base(build_model(DIMS, device="meta"), None, torch.device("cpu"))
