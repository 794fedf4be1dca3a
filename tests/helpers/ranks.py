"""Several real processes over gloo for a test, quickly: forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = [
    "train.loop",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "bitsandbytes",
]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 240.0) -> list[Any]:
    """Call `function(*args)` in `world_size` processes under the environment that a launcher makes.

    Returns what each returned, by rank. Raises AssertionError with the traceback of the first that failed, or naming
    those that did not end in time. The store that they meet at is held here, so that no port is guessed.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        process = context.Process(target=_work, args=(environment, theirs, function, args))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[r for r in range(len(pipes)) if r not in results]} did not end in {seconds:.0f} s"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, "died without a word"
            assert ok, f"rank {rank}: {value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _work(environment: dict[str, str], pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads free tensors while the interpreter comes down, and now and then abort it.
    os._exit(0)


def in_a_group(work: Any, *arguments: Any) -> Any:
    """Call `work(*arguments)` within a gloo group."""
    import torch

    torch.distributed.init_process_group("gloo")
    try:
        return work(*arguments)
    finally:
        torch.distributed.destroy_process_group()
