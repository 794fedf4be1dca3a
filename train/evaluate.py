"""The held-out loss: the same clips, noise levels, noise and modes every time, so that only the weights change it.

Nine noise levels represent the density that is trained on: the 10 %, 20 % … 90 % quantiles of it. Each clip is seen at
each level as text-to-video and, where it has more than one latent frame, as image-to-video, with its first caption.
The mean is over clips, then levels, then modes, and carries no loss weight.

    clips → groups of a bucket → passes (group, level, mode) ─ divided among ranks, round by round ─▶ losses ─▶ means

A pass holds the same clips on every layout, and each clip's own loss is exchanged, not a sum: the figures are those of
one process. Threads read and draw for the next passes while the model works on one.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from shards.console import counted
from shards.errors import UserError
from shards.storage.patience import abandon_waits, result_within
from train.config.train import DataConfig, EvalConfig
from train.data.batch import check_text, pad_texts, read_latent
from train.data.draws import Purpose, draw_noise
from train.data.sampler import hash_key
from train.geometry import TEMPORAL_STRIDE, Bucket
from train.parallel.ranks import ALONE, Layout, Ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.read.dataset import Dataset
    from train.objective import SigmaDensity

NUM_QUANTILES = 9
NUM_RESAMPLES = 2000
HELD_OUT_SEED = 0  # not the run's: runs of different seeds are compared on the same noise

Forward = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
"""(noisy latent, timestep, image_first, text) → velocity, in inference mode."""


class HeldOut(NamedTuple):
    """One evaluation."""

    mean: float
    """Mean of the modes' means."""
    t2v: tuple[float, ...]
    """Mean over clips by quantile, lowest noise first."""
    i2v: tuple[float, ...]
    """The same for image-to-video; empty when every clip is one frame."""
    num_clips: int
    sigmas: tuple[float, ...]
    """Noise levels, shifted."""
    t2v_clips: Tensor
    """Loss of each clip at each level (clips × levels, float64), in an order that only the dataset decides."""
    i2v_clips: Tensor
    """The same for image-to-video; zero for clips of one frame."""
    moving: Tensor
    """Which clips have more than one latent frame."""

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """JSON values, as they go into held_out.jsonl."""
        t2v, i2v, sigmas = list(self.t2v), list(self.i2v), list(self.sigmas)
        return {"mean": self.mean, "t2v": t2v, "i2v": i2v, "num_clips": self.num_clips, "sigmas": sigmas}


def choose_held_out(dataset: Dataset, ordinals: Sequence[int], config: EvalConfig) -> list[int]:
    """One sample of each of `num_clips` held-out clips, by hash: adding clips changes few of them.

    Raises UserError when the validation side is empty.
    """
    first: dict[str, int] = {}
    for ordinal in sorted(ordinals, key=lambda ordinal: dataset.samples[ordinal].key):
        first.setdefault(dataset.samples[ordinal].clip_id, ordinal)
    if not first:
        raise UserError(
            "no clip is held out, so there is no held-out loss",
            fix="raise data.validation_fraction, add shards, or set eval: null",
        )
    return [first[clip] for clip in sorted(first, key=hash_key)[: config.num_clips]]


class Pass(NamedTuple):
    """One forward pass of an evaluation."""

    group: int
    """Which clips: of one bucket, `eval.batch` at most."""
    level: int
    image_first: bool
    counts: bool = True
    """False: another rank's, done only because ranks that share the base must run the model equally often."""


class Evaluator:
    """Takes the held-out loss of one set of clips again and again.

    Args:
        ordinals: the clips, from `choose_held_out`.
        data: how many threads read and draw, how many passes ahead, and the longest wait for them.
        ranks: the processes that share the passes; all of them call `take` together.
    """

    def __init__(
        self,
        dataset: Dataset,
        ordinals: Sequence[int],
        config: EvalConfig,
        data: DataConfig,
        density: SigmaDensity,
        text_len: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        import torch

        from train.objective import sample_sigma

        self._dataset, self._data, self._text_len, self._device, self._ranks = dataset, data, text_len, device, ranks
        self._sigmas = sample_sigma(
            torch.arange(1, NUM_QUANTILES + 1, dtype=torch.float64) / (NUM_QUANTILES + 1), density
        )
        self._groups = _groups(dataset, ordinals, config.batch)
        frames = [dataset.samples[group[0]].frames for group in self._groups]
        modes = [(False, True) if count > TEMPORAL_STRIDE else (False,) for count in frames]
        self._moving = [len(modes[place]) > 1 for place, group in enumerate(self._groups) for _ in group]
        passes = [
            Pass(group, level, mode)
            for group in range(len(self._groups))
            for level in range(NUM_QUANTILES)
            for mode in modes[group]
        ]
        self._own = _divide(passes, ranks.layout)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="held-out")
        self._left: Iterator[Pass] | None = None
        """Passes of the next evaluation that nothing is read for yet; None: it has not begun."""
        self._ahead: collections.deque[_Ahead] = collections.deque()

    @property
    def num_clips(self) -> int:
        """Clips that are evaluated."""
        return len(self._moving)

    def read_ahead(self) -> None:
        """Begin to read and draw for the next evaluation, as many passes ahead as configured."""
        if self._left is None:
            self._left = iter([one for one in self._own if one is not None])
        while len(self._ahead) <= self._data.prefetch_steps and (one := next(self._left, None)) is not None:
            self._ahead.append(self._begin(one))

    def take(self, forward: Forward, check_stop: Callable[[], None] = lambda: None) -> HeldOut:
        """The held-out loss of `forward`. Every rank calls `check_stop` before each of its passes and after the last;
        it may raise."""
        import torch

        losses = torch.zeros(2, len(self._moving), NUM_QUANTILES, dtype=torch.float64)
        starts = [sum(map(len, self._groups[:place])) for place in range(len(self._groups))]
        try:
            for one in self._own:
                inputs = None if one is None else self._next()
                check_stop()
                if one is None or inputs is None:
                    continue
                taken = self._losses(forward, one, *inputs)
                if one.counts:
                    losses[int(one.image_first), starts[one.group] : starts[one.group] + len(taken), one.level] = taken
            check_stop()  # who failed in the last round meets the others here, not in the exchange
        finally:
            self._left = None
            self._ahead.clear()
        if self._ranks.layout.ulysses_rank:  # the ranks of a sequence have the same losses
            losses.zero_()
        # One rank has each clip's loss, the others a zero: the order of this sum changes nothing.
        exchanged = self._ranks.all_reduce_sum(*losses.flatten().tolist())
        return self._summary(*torch.tensor(exchanged, dtype=torch.float64).view(losses.shape))

    def close(self) -> None:
        """Stop reading ahead. Safe to call twice."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        abandon_waits()
        self._pool.shutdown(wait=True)

    def _begin(self, one: Pass) -> _Ahead:
        """What the pass before has read or drawn already is taken from it."""
        before = self._ahead[-1] if self._ahead else None
        group = self._groups[one.group]
        if before is not None and before.one.group == one.group:
            clips = before.clips
        else:
            clips = self._pool.submit(_read, self._dataset, group, self._text_len)
        if before is not None and before.one[:2] == one[:2]:
            return _Ahead(one, clips, before.noise)
        # Behind its clips in the queue, so that when it runs they are done or running: it cannot wait for itself.
        return _Ahead(one, clips, self._pool.submit(_draw, self._dataset, group, one.level, clips))

    def _next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latent, text and noise of the next pass. Raises what reading raised, UserError where nothing arrives."""
        self.read_ahead()
        _, clips, noise = self._ahead.popleft()
        limit = self._data.read_timeout_seconds
        try:
            return *result_within(clips, limit), result_within(noise, limit)
        except TimeoutError:
            raise UserError(
                f"the held-out loss: its clips did not arrive within {limit:g} s",
                fix="check that the storage answers and how fast it is, or raise data.read_timeout_seconds",
            ) from None

    def _losses(self, forward: Forward, one: Pass, latent: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """Of each clip of the pass, float64."""
        import torch

        from train.objective import add_noise, model_timestep, slot_losses

        device = self._device
        sigma_B = self._sigmas[one.level].expand(len(latent))
        image_first_B = torch.full((len(latent),), one.image_first)
        with torch.no_grad():
            noisy, target = add_noise(latent.to(device), noise.to(device), sigma_B.to(device), image_first_B.to(device))
            velocity = forward(noisy, model_timestep(sigma_B).to(device), image_first_B, text.to(device))
            return slot_losses(velocity, target, image_first_B.to(device)).double().cpu()

    def _summary(self, t2v_clips: Tensor, i2v_clips: Tensor) -> HeldOut:
        import torch

        moving = torch.tensor(self._moving)
        t2v, i2v = (
            tuple(math.fsum(level) / len(rows) for level in rows.T.tolist()) if len(rows) else ()
            for rows in (t2v_clips, i2v_clips[moving])
        )
        means = [math.fsum(levels) / len(levels) for levels in (t2v, i2v) if levels]
        return HeldOut(
            mean=sum(means) / len(means),
            t2v=t2v,
            i2v=i2v,
            num_clips=len(moving),
            sigmas=tuple(self._sigmas.tolist()),
            t2v_clips=t2v_clips,
            i2v_clips=i2v_clips,
            moving=moving,
        )


class Change(NamedTuple):
    """How one model's held-out loss differs from another's, over all levels of a mode or at one."""

    mode: str
    """T2V, I2V, or all: the mean of the modes."""
    sigma: float | None
    """Noise level; None: the mean over levels."""
    before: float
    after: float
    share: float
    """after ÷ before − 1."""
    low: float | None
    """Of the share, the 2.5 % quantile over resampled clips; None with one clip."""
    high: float | None
    """The 97.5 % quantile."""


def changes(before: HeldOut, after: HeldOut) -> list[Change]:
    """Compare two evaluations of the same clips, with a paired bootstrap over clips: both models are seen on the same
    resampled clips, so that what makes a clip easy or hard cancels."""
    import torch

    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    num_clips = len(before.moving)
    drawn = torch.randint(num_clips, (NUM_RESAMPLES, num_clips), generator=generator)
    weights = torch.zeros(NUM_RESAMPLES, num_clips, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    weights = torch.cat([torch.ones(1, num_clips, dtype=torch.float64), weights])  # first the clips themselves
    tables = []
    for one in (before, after):
        modes = {"T2V": _weighted_means(weights, one.t2v_clips)}
        if one.moving.any():
            modes["I2V"] = _weighted_means(weights * one.moving, one.i2v_clips)
        tables.append(modes)
    found = []
    for mode in tables[0]:
        a, b = (table[mode] for table in tables)
        count = num_clips if mode == "T2V" else int(before.moving.sum())
        found += [_change(mode, sigma, a[:, n], b[:, n], count) for n, sigma in enumerate(before.sigmas)]
        found.append(_change(mode, None, a.mean(1), b.mean(1), count))
    a, b = (torch.stack([table.mean(1) for table in modes.values()]).mean(0) for modes in tables)
    return [*found, _change("all", None, a, b, num_clips)]


def _weighted_means(weights: Tensor, losses: Tensor) -> Tensor:
    """Resamples × levels; NaN where a resample holds no clip of the mode."""
    return (weights @ losses) / weights.sum(1, keepdim=True)


def _change(mode: str, sigma: float | None, before: Tensor, after: Tensor, num_clips: int) -> Change:
    """From a value and its resamples, of both models."""
    import torch

    share, low, high = after / before - 1, None, None
    if num_clips > 1:
        low, high = torch.nanquantile(share[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Change(mode, sigma, float(before[0]), float(after[0]), float(share[0]), low, high)


class Evaluation(NamedTuple):
    """Held-out losses of a base and of what was put into it, on the same clips and draws."""

    dataset: str
    revision: str
    results: dict[str, HeldOut]
    """By name, the base first."""

    def pairs(self) -> list[tuple[str, str]]:
        """What is compared: each against the base, then the last two with each other."""
        base, *others = self.results
        return [(base, name) for name in others] + [(others[0], name) for name in others[1:]]

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {
            "dataset": self.dataset,
            "revision": self.revision,
            "num_clips": next(iter(self.results.values())).num_clips,
            "results": {name: result.as_dict() for name, result in self.results.items()},
            "changes": [
                {"from": a, "to": b, **change._asdict()}
                for a, b in self.pairs()
                for change in changes(self.results[a], self.results[b])
            ],
        }

    def lines(self) -> list[str]:
        """A table a comparison, for people."""
        num_clips = next(iter(self.results.values())).num_clips
        lines = [f"held-out loss over {counted(num_clips, 'clip')} of {self.dataset} (revision {self.revision[:12]})"]
        for a, b in self.pairs():
            lines += ["", f"{a} → {b}", f"{'':4} {'σ':>6} {'before':>8} {'after':>8} {'change':>8}  95 % over clips"]
            for one in changes(self.results[a], self.results[b]):
                level = "mean" if one.sigma is None else f"{one.sigma:.2f}"
                spread = "" if one.low is None else f"[{100 * one.low:+z.1f}, {100 * (one.high or 0):+z.1f}] %"
                share = f"{100 * one.share:+z.1f} %"
                lines.append(
                    f"{one.mode:4} {level:>6} {one.before:8.4f} {one.after:8.4f} {share:>8}  {spread}".rstrip()
                )
        if num_clips == 1:
            lines.append("one clip gives no interval: raise eval.num_clips or data.validation_fraction")
        return lines


def describe_held_out(now: HeldOut, before: Mapping[str, float] | None = None) -> str:
    """One line for people."""
    parts = [f"held-out loss {now.mean:.4f} over {counted(now.num_clips, 'clip')}"]
    for name, losses in (("T2V", now.t2v), ("I2V", now.i2v)):
        if losses:
            parts.append(
                f"{name} {sum(losses) / len(losses):.4f} (σ {now.sigmas[0]:.2f}: {losses[0]:.3f}, "
                f"σ {now.sigmas[-1]:.2f}: {losses[-1]:.3f})"
            )
    if before and before["mean"] is not None:
        parts.append(f"{100 * (now.mean / before['mean'] - 1):+z.1f} % since the start")
    return "; ".join(parts)


class _Ahead(NamedTuple):
    """A pass that is being read and drawn for."""

    one: Pass
    clips: Future[tuple[Tensor, Tensor]]
    """Latent and text."""
    noise: Future[Tensor]


def _groups(dataset: Dataset, ordinals: Sequence[int], size: int) -> list[list[int]]:
    buckets: dict[Bucket, list[int]] = {}
    for ordinal in ordinals:
        sample = dataset.samples[ordinal]
        buckets.setdefault(Bucket(sample.frames, sample.height, sample.width), []).append(ordinal)
    return [some[start : start + size] for _, some in sorted(buckets.items()) for start in range(0, len(some), size)]


def _divide(passes: Sequence[Pass], layout: Layout) -> list[Pass | None]:
    """This rank's passes, one a round. Those of a round are neighbours, most of them of one bucket: no rank waits long
    for another. In the last round some ranks have none; of a sharded base these repeat the last one."""
    size = layout.dp_size
    places = range(layout.dp_rank, -(-len(passes) // size) * size, size)
    beyond = passes[-1]._replace(counts=False) if layout.base_shards > 1 else None
    return [passes[place] if place < len(passes) else beyond for place in places]


def _read(dataset: Dataset, group: Sequence[int], text_len: int) -> tuple[Tensor, Tensor]:
    import numpy as np
    import torch

    samples = [dataset.samples[ordinal] for ordinal in group]
    latents = [read_latent(dataset, ordinal, sample) for ordinal, sample in zip(group, samples, strict=True)]
    texts = [check_text(dataset.text(ordinal, 0), text_len, dataset.samples[ordinal].key) for ordinal in group]
    return torch.from_numpy(np.stack(latents)), pad_texts(texts, text_len)


def _draw(dataset: Dataset, group: Sequence[int], level: int, clips: Future[tuple[Tensor, Tensor]]) -> Tensor:
    import numpy as np
    import torch

    shape = clips.result()[0].shape[1:]
    keys = [hash_key(dataset.samples[ordinal].key) for ordinal in group]
    drawn = [draw_noise(HELD_OUT_SEED, key, level, shape, Purpose.HELD_OUT_NOISE) for key in keys]
    return torch.from_numpy(np.stack(drawn))
