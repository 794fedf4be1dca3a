"""Where every rank of a run is, read twice: which are absent, silent, behind. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from train.launch.failure import name_ranks


class Beat(NamedTuple):
    """What a rank reports of itself."""

    number: int
    """Grows with every heartbeat: a rank whose number does not change is silent."""
    host: str
    step: int
    part: str
    """The part of the step."""
    arrivals: int
    """Places passed: the program is the same on every rank, so fewer means behind."""
    waits: bool = False
    """Waits for storage."""


class RankStatus(NamedTuple):
    """What one reading of all ranks shows."""

    absent: list[int]
    """Never connected."""
    silent: dict[int, Beat]
    behind: dict[int, Beat]
    here: Beat

    def describe(self, world_size: int, seconds: float) -> str:
        """Which ranks did not arrive, where, and their state."""
        at = f"step {self.here.step}, {self.here.part}"
        lines = [f"{name_ranks([*self.absent, *self.silent, *self.behind])} did not arrive at {at} in {seconds:.0f} s"]
        if not (self.absent or self.silent or self.behind):
            return (
                f"all {world_size} ranks are at {at}, none continues for {seconds:.0f} s: the exchange itself hangs\n"
                "  to fix:  NCCL_DEBUG=INFO shows where; on PCIe machines NCCL_P2P_DISABLE=1 often helps"
            )
        if self.absent:
            words = "was it started, with the same WANTRAIN_SECRET, and does it reach MASTER_ADDR?"
            lines.append(f"{name_ranks(self.absent)}: never connected; {words}")
        for rank, beat in self.silent.items():
            lines.append(
                f"rank {rank} on {beat.host}: silent, last at step {beat.step}, {beat.part}; its process was killed or "
                "stopped, or its machine is gone"
            )
        for rank, beat in self.behind.items():
            lines.append(
                f"rank {rank} on {beat.host}: alive, still at step {beat.step}, {beat.part}; its log has its stack"
            )
        return "\n  ".join(lines)


def compare(before: Sequence[Beat | None], after: Sequence[Beat | None], own_rank: int, here: Beat) -> RankStatus:
    """Which ranks never connected, which were silent between two readings, which are behind the farthest."""
    absent = [rank for rank, beat in enumerate(after) if beat is None and rank != own_rank]
    known = {rank: beat for rank, beat in enumerate(after) if beat is not None}
    silent = {rank: beat for rank, beat in known.items() if rank != own_rank and beat == before[rank]}
    farthest = max((beat.arrivals for beat in [*known.values(), here]), default=0)
    behind = {r: beat for r, beat in known.items() if r not in silent and beat.arrivals < farthest and r != own_rank}
    if here.arrivals < farthest:
        behind[own_rank] = here
    return RankStatus(absent, silent, behind, max([*known.values(), here], key=lambda beat: beat.arrivals))
