"""The layout of a run: how its ranks share samples, tokens and the base."""

from __future__ import annotations

from shards.errors import UserError
from train.config.train import TrainConfig
from train.estimate import plan
from train.parallel.ranks import Layout, World


def choose_layout(config: TrainConfig, world: World, device_bytes: int | None) -> tuple[Layout, str]:
    """The configured layout, and why. Raises UserError for one that these processes cannot form.

    Args:
        device_bytes: memory of the GPU; None on a CPU, whose memory is not asked.
    """
    if config.parallel.shard == "hybrid" and world.size % world.local_size:
        raise UserError(
            f"parallel.shard: hybrid: {world.size} processes are not complete machines of {world.local_size}",
            expected="as many processes on every machine",
        )
    num_nodes = 1 if world.size % world.local_size else world.size // world.local_size
    mesh, reason = plan.choose_run_mesh(config, world.size, num_nodes, device_bytes)
    return Layout(world.rank, world.size, world.local_rank, *mesh.memory_parts), reason
