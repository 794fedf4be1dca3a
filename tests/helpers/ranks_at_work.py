"""Ranks that meet in a gloo group and sum a number each step, with faults on request: the watch and launcher at work.

    python ranks_at_work.py FOLDER STEPS [FAULT RANK STEP]

A rank writes `FOLDER/at-RANK` at every step. Faults: raise, kill, stop (SIGSTOP), sleep, out-of-memory.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from shards.console import LOG, set_up_logging
from train.config.train import ParallelConfig
from train.launch import heartbeat as watch_module
from train.launch.failure import SIGNAL_EXIT, Reported
from train.launch.heartbeat import HeartbeatWatch

LIMITS = ParallelConfig(start_timeout_seconds=60, step_timeout_seconds=4, lost_seconds=3)
watch_module.BEAT_SECONDS = 0.5


def commit_fault(fault: str) -> None:
    """Do what goes wrong."""
    match fault:
        case "raise":
            raise ZeroDivisionError("a defect of this rank")
        case "kill" | "stop":
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        case "sleep":
            time.sleep(3600)
        case "out-of-memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def work(folder: Path, steps: int, fault: str, bad_rank: int, bad_step: int) -> int | None:
    """Sum until the steps are done or a signal was seen by any rank; the signal."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    with HeartbeatWatch(rank, size, LIMITS) as watch:
        dist.init_process_group("gloo")
        for step in range(1, steps + 1):
            watch.at(step, "its own work")
            (folder / f"at-{rank}").write_text(str(step))
            if (rank, step) == (bad_rank, bad_step):
                commit_fault(fault)
            time.sleep(0.02)
            watch.at(step, "the sum")
            total = torch.tensor([1.0, asked[0] if asked else 0.0])
            dist.all_reduce(total, dist.ReduceOp.MAX)
            if total[1]:
                (folder / f"saved-{rank}").write_text(str(step))
                return int(total[1])
        dist.destroy_process_group()
    return None


def main() -> None:
    """Run as a rank."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    fault, bad_rank, bad_step = (*sys.argv[3:4], "")[0], *(int(x) for x in (sys.argv[4:6] or ("-1", "-1")))
    rank = int(os.environ["RANK"])
    print(f"rank {rank} speaks", file=sys.stderr)
    set_up_logging(terminal=rank == 0)
    LOG.addHandler(logging.FileHandler(folder / "logs" / f"rank-{rank}.log"))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    with Reported():
        stopped = work(folder, steps, fault, bad_rank, bad_step)
    sys.stderr.flush()
    os._exit(SIGNAL_EXIT + stopped if stopped else 0)  # gloo's threads may abort the interpreter's own end


if __name__ == "__main__":
    main()
