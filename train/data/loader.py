"""Makes batches ahead of the training step: takes samples in their order, reads them, adds draws, pads, stacks.

    position → ordinals of the step → this rank's slots → [threads: latent, text, noise] → stack → (batch, position)

The position that comes with a batch is that of the next batch: a checkpoint that is written after the batch resumes
there. Every random number is a function of (seed, step, slot), so the timing of threads changes nothing.
"""

from __future__ import annotations

import collections
import fnmatch
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from shards.errors import ShardDamage, StorageOutage, UserError
from shards.format.keys import clip_hash, is_validation
from shards.storage.patience import abandon_waits, result_within
from train.config.train import DataConfig, TrainConfig, slots_per_rank
from train.data.batch import Batch, SlotItem, SlotPlan, check_text, read_latent, stack
from train.data.draws import Purpose, SlotDraws, draw_integer, draw_noise, draw_slot
from train.data.sampler import START, Order, OrderedBatch, Position
from train.data.weights import sample_weights
from train.geometry import Bucket

if TYPE_CHECKING:
    from shards.read.dataset import Dataset, Sample

LOG = logging.getLogger("wan.data")
MAX_SUBSTITUTES = 8


def select_samples(dataset: Dataset, config: DataConfig, *, hold_out_one: bool = False) -> tuple[list[int], list[int]]:
    """Ordinals of the training and of the validation side, after include, exclude, and (to train on) weights of 0.

    With `hold_out_one`, if no clip is on the validation side, the clip with the smallest hash moves there: it is the
    clip that would be held out first if `validation_fraction` grew.

    Raises UserError that says why when nothing is left to train on.
    """
    chosen = [ordinal for ordinal, sample in enumerate(dataset.samples) if _included(sample.clip_id, config)]
    sides: tuple[list[int], list[int]] = ([], [])
    for ordinal in chosen:
        held_out = is_validation(dataset.samples[ordinal].clip_id, config.validation_fraction)
        sides[held_out].append(ordinal)
    if hold_out_one and not sides[1]:
        sides = _hold_out_one(dataset, chosen, config)
    if sides[0]:
        if not config.weights:
            return sides
        weights = sample_weights(dataset, sides[0], config.weights)
        if any(weights):
            return [ordinal for ordinal, weight in zip(sides[0], weights, strict=True) if weight], sides[1]
        raise UserError(f"data.weights leave none of {len(weights):,} samples to train on: all are 0")
    total = len(dataset.samples)
    if total == 0:
        raise UserError(
            "the dataset has no samples: no unit of it is finished, or every record was rejected",
            fix="`wanprep status CONFIG` shows how far the build is and why records were rejected; "
            "`wanprep build-shards CONFIG` continues it",
        )
    if not chosen:
        raise UserError(
            f"data.include {list(config.include)} and data.exclude {list(config.exclude)} leave none of {total}",
            fix=f"clip ids look like {dataset.samples[0].clip_id!r}",
        )
    raise UserError(
        f"data.validation_fraction {config.validation_fraction} puts all {len(chosen)} samples on the validation side",
        fix="lower data.validation_fraction",
    )


def _hold_out_one(dataset: Dataset, chosen: list[int], config: DataConfig) -> tuple[list[int], list[int]]:
    clip_ids = {dataset.samples[ordinal].clip_id for ordinal in chosen}
    shares = {clip_id: clip_hash(clip_id, "split") / 2.0**64 for clip_id in clip_ids}
    if len(shares) < 2:
        return chosen, []
    held_out = min(shares, key=lambda clip_id: (shares[clip_id], clip_id))
    fraction = math.ceil(shares[held_out] * 10_000 + 1) / 10_000
    LOG.warning(
        "data.validation_fraction %g holds out none of %d clips, so the clip with the smallest hash, %r, is held out; "
        "set data.validation_fraction: %g to keep it held out when clips are added",
        config.validation_fraction, len(shares), held_out, fraction,
    )  # fmt: skip
    sides: tuple[list[int], list[int]] = ([], [])
    for ordinal in chosen:
        sides[dataset.samples[ordinal].clip_id == held_out].append(ordinal)
    return sides


def _included(clip_id: str, config: DataConfig) -> bool:
    wanted = not config.include or any(fnmatch.fnmatchcase(clip_id, glob) for glob in config.include)
    return wanted and not any(fnmatch.fnmatchcase(clip_id, glob) for glob in config.exclude)


def check_model_fits(dataset: Dataset, ordinal: int, *, channels: int, text_dim: int, text_len: int) -> None:
    """Raise UserError when latents or text of the dataset are not what the model takes, before the first step."""
    text = dataset.text(ordinal, 0)
    for found, key in dataset.latent_channels().items():
        if found != channels:
            raise UserError(
                f"the dataset's latents have {found} channels (sample {key}), the model takes {channels} "
                "(model.dims.in_channels)"
            )
    if text.shape[1] != text_dim:
        raise UserError(
            f"the dataset's text embeddings are {text.shape[1]} wide, the model takes {text_dim} (model.dims.text_dim)",
            fix="use the text encoder that belongs to the model, or change model.dims",
        )
    longest = max(text.shape[0], *(dataset.null_text(name).shape[0] for name in ("empty", "negative")))
    if longest > text_len:
        raise UserError(f"a caption has {longest} tokens, the model takes {text_len} (model.dims.text_len)")


def plan_step(
    config: TrainConfig, dataset: Dataset, ordinals: Sequence[int], step: int, slots: range
) -> list[SlotPlan]:
    """The plan of each of `slots` of `step`: it depends only on (seed, step, slot) and on the samples of the step."""
    plans = []
    for slot in slots:
        sample = dataset.samples[ordinals[slot]]
        plans.append(SlotPlan(slot, ordinals[slot], _draw(config, sample, step, slot)))
    return plans


def _draw(config: TrainConfig, sample: Sample, step: int, slot: int) -> SlotDraws:
    draws = draw_slot(
        config.seed,
        step,
        slot,
        image_to_video_share=config.objective.image_to_video_share,
        num_captions=sample.num_variants,
        caption_dropout=config.data.caption_dropout,
        num_strata=config.num_strata,
    )
    # With one latent frame, the clean first frame would be the complete sample, and nothing would be left to learn.
    return draws._replace(image_to_video=draws.image_to_video and sample.frames > 1)


class Loader:
    """Iterates over (batch, position of the next batch), starting at `position`; reads ahead in threads.

    Args:
        dataset: the opened dataset.
        order: the order of the training side; its ordinals are indices into `train_ordinals`.
        train_ordinals: for each of them, the index into `dataset.samples`.
        text_len: tokens (rows) that text embeddings are padded to.
        step: number of the first batch (from 1).
        position: the place of the first batch in the order.
        dp_rank, dp_size: this process loads the dp_rank-th of dp_size equal, contiguous shares of each step's slots.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        train_ordinals: Sequence[int],
        config: TrainConfig,
        *,
        text_len: int,
        step: int = 1,
        position: Position = START,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        share = slots_per_rank(config.data, dp_size)
        self._dataset, self._order, self._ordinals, self._config = dataset, order, train_ordinals, config
        self._text_len = text_len
        self._slots = range(dp_rank * share, (dp_rank + 1) * share)
        self._step, self._position = step, position
        self._pool = ThreadPoolExecutor(config.data.workers, thread_name_prefix="loader")
        self._pending: collections.deque[_Pending] = collections.deque()
        self._read_ahead()  # the first batch is read while the run still evaluates or writes its settings

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        return self

    def __next__(self) -> tuple[Batch, Position]:
        """The next batch and the position after it. Raises UserError for a bad sample, and other errors of reading."""
        self._read_ahead()
        pending = self._pending.popleft()
        limit = self._config.data.read_timeout_seconds
        try:
            batch = result_within(pending.batch, limit)
        except TimeoutError:
            raise UserError(
                f"step {pending.step}: its samples did not arrive within {limit:g} s",
                fix="check that the storage answers and how fast it is, or raise data.read_timeout_seconds",
            ) from None
        return batch, pending.after

    def close(self) -> None:
        """Stop reading ahead. Safe to call twice."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        abandon_waits()
        self._pool.shutdown(wait=True)
        self._pending.clear()

    def _read_ahead(self) -> None:
        while len(self._pending) <= self._config.data.prefetch_steps:
            self._enqueue()

    def _enqueue(self) -> None:
        chosen = self._order.batch(self._position)
        ordinals = [self._ordinals[place] for place in chosen.ordinals]
        plans = plan_step(self._config, self._dataset, ordinals, self._step, self._slots)
        items = [self._pool.submit(self._load, plan, self._step) for plan in plans]
        # Submitted after its items: when it runs, they are done or running in other threads, so it cannot block them.
        batch = self._pool.submit(self._stack, self._step, chosen, items)
        self._position = self._order.next(self._position)
        self._pending.append(_Pending(self._step, batch, self._position))
        self._step += 1

    def _stack(self, step: int, chosen: OrderedBatch, futures: Sequence[Future[SlotItem]]) -> Batch:
        items = [future.result() for future in futures]
        for item in items:  # a text that is too long is the user's mistake, not damage: no substitute is taken
            check_text(item.text, self._text_len, item.key)
        keys = [self._dataset.samples[self._ordinals[place]].key for place in chosen.ordinals]
        return stack(step, chosen, keys, items, self._text_len)

    def _load(self, plan: SlotPlan, step: int) -> SlotItem:
        try:
            return self._read(plan, step, None)
        except StorageOutage:  # no sample is bad
            raise
        except (UserError, OSError) as error:
            bad = self._dataset.samples[plan.ordinal]
            if self._config.data.on_bad_sample == "fatal":
                problem, expected, fix = str(error), None, None
                if isinstance(error, UserError):
                    problem, expected = error.problem, error.expected
                    fix = None if isinstance(error, ShardDamage) else error.fix
                raise UserError(
                    f"step {step}: sample {bad.key} cannot be read, tried twice: {problem}",
                    expected=expected,
                    fix=fix
                    or "`wanshards verify ROOT --deep` lists all damage; delete the commit of the sample's unit and "
                    "run `wanprep build-shards` again, or set data.on_bad_sample=substitute",
                ) from error
            LOG.warning("sample %s cannot be read: %s", bad.key, error)
            return self._substitute(plan, step, bad)

    def _substitute(self, plan: SlotPlan, step: int, bad: Sample) -> SlotItem:
        """Another sample of the same bucket, drawn by (seed, step, slot): every rank would choose the same one."""
        pool = [
            ordinal
            for ordinal in self._ordinals
            if _bucket(sample := self._dataset.samples[ordinal]) == _bucket(bad) and sample.key != bad.key
        ]
        for attempt in range(MAX_SUBSTITUTES if pool else 0):
            place = draw_integer(self._config.seed + attempt, step, plan.slot, Purpose.SUBSTITUTE, len(pool))
            other = self._dataset.samples[pool[place]]
            try:
                draws = _draw(self._config, other, step, plan.slot)
                item = self._read(SlotPlan(plan.slot, pool[place], draws), step, bad.key)
            except (UserError, OSError) as error:
                LOG.warning("sample %s cannot be read: %s", other.key, error)
                continue
            LOG.warning("step %d slot %d: sample %s is used in place of %s", step, plan.slot, other.key, bad.key)
            return item
        raise UserError(f"sample {bad.key} cannot be read and no readable substitute was found among {len(pool)}")

    def _read(self, plan: SlotPlan, step: int, replaced: str | None) -> SlotItem:
        sample = self._dataset.samples[plan.ordinal]
        if plan.draws.drop_caption:
            text = self._dataset.null_text(self._config.data.null_caption)
        else:
            text = self._dataset.text(plan.ordinal, plan.draws.caption)
        latent = read_latent(self._dataset, plan.ordinal, sample)
        noise = draw_noise(self._config.seed, step, plan.slot, latent.shape)
        return SlotItem(plan, sample.key, latent, noise, text, replaced)


class _Pending(NamedTuple):
    step: int
    batch: Future[Batch]
    after: Position


def _bucket(sample: Any) -> Bucket:
    return Bucket(sample.frames, sample.height, sample.width)
