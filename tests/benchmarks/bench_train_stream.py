"""Does a copier that takes half of a block's time cost the pass anything?

    python tests/benchmarks/bench_train_stream.py [--copy 0.05] [--block 0.1] [--blocks 12]

The copier's thread and the blocks sleep, so that the figure is of the order of copies and waits alone, on any machine:
a forward and a backward pass over streamed blocks ÷ the blocks' own time. Promise: at most 1.05.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import nn

from train.model import stream
from train.model.stream import BlockStream, Copier


class Sleeper(nn.Module):
    """A block that takes its time, and computes one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 64, device="meta"), requires_grad=False)


def main() -> int:
    """Print the seconds of three steps and their ratio to the computation; 1 where it breaks the promise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--copy", type=float, default=0.05, help="seconds that a copy takes")
    parser.add_argument("--block", type=float, default=0.1, help="seconds that a block takes, each way")
    parser.add_argument("--blocks", type=int, default=12)
    options = parser.parse_args()
    stream.make_copier = lambda device: Copier(device, lambda: time.sleep(options.copy))
    blocks = [Sleeper() for _ in range(options.blocks)]
    streamed = BlockStream(blocks, torch.device("cpu"))
    with torch.no_grad():
        for index, block in enumerate(blocks):
            block.weight.fill_(index)

    def compute(index: int) -> None:
        value = float(blocks[index].weight.sum())  # read as the block begins, and again as it ends
        time.sleep(options.block)
        if not value == float(blocks[index].weight.sum()) == 64 * 64 * index:
            raise SystemExit(f"block {index} computed with {value}")

    ratios = []
    for step in range(3):
        began = time.perf_counter()
        for index in range(options.blocks):
            streamed.forward(index)
            compute(index)
        for index in reversed(range(options.blocks)):
            streamed.backward(index, 0)
            compute(index)
        seconds = time.perf_counter() - began
        ratios.append(seconds / (2 * options.blocks * options.block))
        print(f"step {step}: {seconds:.3f} s, {ratios[-1]:.3f} × the blocks' own")
    print(f"later steps: {max(ratios[1:]):.3f} (promise: at most 1.05)")
    return int(max(ratios[1:]) > 1.05)


if __name__ == "__main__":
    sys.exit(main())
