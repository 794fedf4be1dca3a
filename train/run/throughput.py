"""Planned speed and memory, reported at the start; measured speed, in every step's line and at the end."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

from shards.gpus import Gpu, by_driver_name
from train.device import device_info
from train.estimate.communication import local_shape, rank_work
from train.estimate.flops import Work, step_flops
from train.estimate.memory import Memory
from train.estimate.plan import OPTIMISTIC, PESSIMISTIC
from train.estimate.plan_text import describe_memory
from train.estimate.saves import GIB, describe_saves, run_memory
from train.geometry import SAVE_GROUPS, Bucket, Shape, num_tokens
from train.parallel.ranks import Layout
from train.run.trainee import Trainee

WARM_UP_STEPS = 3
"""Left out of the comparison: kernels are chosen and memory is allocated in them."""


class Rate(NamedTuple):
    """How fast a step was, a GPU."""

    tflops: float
    """Executed FLOPs, recomputation included, ÷ seconds, in 10¹²/s."""
    mfu: float | None
    """The model's own FLOPs, without recomputation, ÷ seconds ÷ the peak; None where no peak is known."""


class Throughput:
    """Counts a run's FLOPs by its buckets, against the peak of the GPU where that is known."""

    def __init__(self, trainee: Trainee, layout: Layout | None = None) -> None:
        self._trainee, self._config, self._dims = trainee, trainee.config, trainee.dims
        self._layout = layout or Layout()
        self._gpu = gpu_of(trainee)
        self._num_passes = trainee.config.data.global_batch / trainee.config.data.micro_batch / self._layout.dp_size
        self._rates: list[Rate] = []
        self._seconds: dict[Bucket, list[float]] = {}

    def rate(self, bucket: Bucket, seconds: float) -> Rate:
        """Record a step of a bucket; return its rate."""
        executed, own = self._flops(bucket)
        peak = self._gpu.peak_tflops * 1e12 if self._gpu else None
        rate = Rate(executed / seconds / 1e12, own / seconds / peak if peak else None)
        self._rates.append(rate)
        self._seconds.setdefault(bucket, []).append(seconds)
        return rate

    def before(self, buckets: list[Bucket]) -> tuple[dict[str, Any], list[str]]:
        """The plan's figures for the bucket that takes most: for events.jsonl, and for people."""
        largest = max(buckets, key=self._tokens)
        executed, own = self._flops(largest)
        lines = [
            f"plan, largest bucket {largest}: {executed / 1e12:.3g} TFLOP a step and process, {executed / own:.2f} × "
            "what it takes without recomputing" + self._expected_seconds(largest)
        ]
        memory, saves = self._memory(largest), self._saves(largest)
        if self._trainee.device.type == "cuda":  # on a CPU it would be a GPU's workspace, and zeros for a small model
            lines_of = describe_memory(self._config.checkpointing.policy, describe_saves(saves), memory)
            parts = [" ".join(line.split()) for line in lines_of]
            lines.append(f"plan, {memory.total / GIB:.2f} GiB: {'; '.join(parts)}")
        return {"bucket": str(largest), "tflop": executed / 1e12, "gib": memory.total / GIB}, lines

    def after(self) -> list[str]:
        """Measured beside planned figures, for people."""
        rates = self._rates[WARM_UP_STEPS:]
        if not rates:
            return []
        mfu = [rate.mfu for rate in rates if rate.mfu is not None]
        line = f"measured: {statistics.median(rate.tflops for rate in rates):.3g} TFLOP/s a GPU"
        line += f", MFU {statistics.median(mfu):.1%}" if mfu else ""
        lines = [line]
        for bucket, seconds in sorted(self._seconds.items()):
            median = statistics.median(seconds)
            lines.append(f"measured, {bucket}: {median:.3g} s a step" + self._expected_seconds(bucket))
        largest = max(self._seconds, key=self._tokens)
        memory = self._memory(largest)
        if self._trainee.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._trainee.device)
            lines.append(
                f"measured: {peak / GIB:.2f} GiB allocated at the peak, {peak / memory.allocated:.3f} × the planned "
                f"{memory.allocated / GIB:.2f}"
            )
        return lines

    def _tokens(self, bucket: Bucket) -> int:
        return num_tokens(self._dims, *bucket)

    def _shape(self, bucket: Bucket) -> Shape:
        return Shape(self._config.data.micro_batch, self._tokens(bucket))

    def _saves(self, bucket: Bucket) -> Sequence[Collection[str]]:
        """What each block keeps; everything where autograd decides."""
        saves = self._trainee.saves(local_shape(self._shape(bucket), self._layout.ulysses))
        return saves or (SAVE_GROUPS,) * self._dims.num_layers

    def _flops(self, bucket: Bucket) -> tuple[float, float]:
        """Of one process's share of a step: executed, and without recomputation."""
        own = step_flops(self._dims, self._shape(bucket), self._config.lora, num_rows=2) / self._layout.ulysses
        return self._work(bucket).flops, own * self._num_passes

    def _work(self, bucket: Bucket) -> Work:
        config, saves = self._config, self._saves(bucket)
        ranks, compiled = self._layout.ulysses, config.model.compile is True
        work = rank_work(self._dims, self._shape(bucket), config.lora, saves, ranks, compiled=compiled)
        return work.scaled(self._num_passes)

    def _memory(self, bucket: Bucket) -> Memory:
        saves = self._saves(bucket)
        compute_bytes = self._trainee.precision.dtype.itemsize
        layout, shape = self._layout, local_shape(self._shape(bucket), self._layout.ulysses)
        return run_memory(
            self._config, self._dims, shape, saves, compute_bytes, *layout.memory_parts, num_ranks=layout.world_size
        )

    def _expected_seconds(self, bucket: Bucket) -> str:
        if self._gpu is None:
            return "; the device's peak is not known here"
        at_peak = self._flops(bucket)[0] / (self._gpu.peak_tflops * 1e12)
        likely = sum(self._work(bucket).seconds(self._gpu, self._trainee.precision.dtype.itemsize))
        low, high = OPTIMISTIC * likely, PESSIMISTIC * likely
        return f"; planned {likely:.3g} s on {self._gpu.name} ({low:.3g} to {high:.3g}; {at_peak:.3g} at its peak)"


def gpu_of(trainee: Trainee) -> Gpu | None:
    """The GPU a run is on, when it is one whose peak is known and the run computes in 16 bits."""
    facts = device_info(trainee.device)
    return by_driver_name(facts.name) if facts.kind == "cuda" and trainee.precision.dtype.itemsize == 2 else None
