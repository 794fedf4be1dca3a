"""`fit`: the training loop, top to bottom.

    open, check, build → resume or begin → [batch → loss → update → log → evaluate → checkpoint] → export

`step` counts batches consumed and keys every draw; `updates` counts those applied and drives schedule and average.
Shape letters: B slots, C latent channels, T H W latent frames and sides, S text tokens, E text width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from shards.console import LOG
from shards.errors import UserError
from shards.files.tensor_files import SAMPLES_FOLDER
from shards.storage.patience import on_wait
from train import checkpoint
from train.config.train import TrainConfig
from train.data.loader import Loader
from train.device import available_memory, choose_device, device_info, explained_out_of_memory
from train.estimate.layout import choose_layout
from train.estimate.saves import GIB
from train.evaluate import describe_held_out
from train.launch.failure import RankLost
from train.launch.heartbeat import HeartbeatWatch
from train.parallel.ranks import Ranks, make_ranks, process_group, read_world, smallest, use_step_timeout
from train.run.events import write_event
from train.run.log import HELD_OUT_FILE, METRICS_FILE, RunLog, StepRecord, describe_step
from train.run.session import (
    StoppedBySignal,
    StopSignal,
    choose_checkpoint,
    describe_data,
    determinism,
    locked,
    log_file,
    open_session,
    peak_memory_gib,
    stop_signals,
    write_settings,
)
from train.run.state import TrainingState
from train.run.throughput import Throughput
from train.run.trainee import describe_base, describe_trainee
from train.sampling.preview import Preview
from train.sampling.sample import Ready, prepare_prompts, sample_prompts
from train.step import backward, num_batch_tokens, over_ranks


class FitResult(NamedTuple):
    """How a run ended."""

    step: int
    loss_before: float | None
    """Held-out loss before the first step; None on other ranks than the first, as the next two."""
    loss_after: float | None
    """Held-out loss at the end."""
    export: Path | None
    """The weights for use elsewhere; None too when a signal stopped the run."""
    stopped_by: int | None
    """Signal that stopped it."""


def fit(config: TrainConfig, *, resume: str = "auto", verify: bool = False) -> FitResult:  # noqa: PLR0912, PLR0915
    """Train as configured, and write the run's folder (the README shows it).

    Args:
        resume: `auto` resumes from the run's newest checkpoint, `never` insists on a new run, else a checkpoint's path.
        verify: hash every byte of the dataset first.

    Under a launcher every process of the run calls it; rank 0 writes the folder, which all must see.

    Raises UserError for what the user can fix, before the first step where possible.
    """
    folder, world = Path(config.output), read_world()
    with contextlib.ExitStack() as stack:
        patience_seconds = config.storage.patience_minutes * 60
        watch = stack.enter_context(HeartbeatWatch(world.rank, world.size, config.parallel))
        if world.rank == 0:
            stack.enter_context(locked(folder))
            stack.callback(on_wait(lambda waiting: write_event(folder, "waiting", watch.step, **waiting._asdict())))
        stack.enter_context(log_file(folder, world.rank))
        stack.enter_context(determinism(config.precision.deterministic))
        device = choose_device(config.precision.device, world.local_rank if world.size > 1 else None)
        stack.enter_context(process_group(config.parallel, world, device, patience_seconds))
        settings = {"checkpointing.policy": config.checkpointing.policy, "data.micro_batch": config.data.micro_batch}
        stack.enter_context(explained_out_of_memory(device, settings))
        free = smallest(world, available_memory(device))  # once: every rank's plan must be the same
        ranks = make_ranks(*choose_layout(config, world, free))
        start = _choose_start(folder, resume, ranks)
        session = open_session(config, verify=verify, start=start, ranks=ranks, device_bytes=free)
        trainee, progress = session.trainee, stack.enter_context(contextlib.closing(TrainingState(session)))
        if start is not None:
            progress.restore(start)
        stop = stack.enter_context(stop_signals(StopSignal(ranks, watch.pulse)))
        log = _open_log(progress, start)
        if log is not None:
            stack.push(log.close_after)
        for line in (*describe_trainee(trainee, session.dataset), *describe_data(session)):
            LOG.info("%s", line)
        if not ranks.alone:
            LOG.info("layout: %s%s", ranks.layout, ranks.reason and f" ({ranks.reason})")
        LOG.info("%s", f"resuming from {start}" if start else f"beginning in {folder}")
        if log is not None:
            _write_start(progress, log, start)

        loader = stack.enter_context(
            contextlib.closing(
                Loader(
                    session.dataset,
                    session.order,
                    session.ordinals,
                    config,
                    text_len=trainee.dims.text_len,
                    step=progress.step + 1,
                    position=progress.position,
                    dp_rank=ranks.layout.dp_rank,
                    dp_size=ranks.layout.dp_size,
                )
            )
        )
        if session.held_out is not None:
            stack.enter_context(contextlib.closing(session.held_out))
        pictures: list[Ready] = []
        if config.sample is not None:
            pictures = prepare_prompts(config.sample.prompts, config.sample.sampler, trainee.dims, session.dataset)
        preview = stack.enter_context(Preview(config.sample if ranks.is_first else None, folder))
        meter = Throughput(trainee, ranks.layout)
        planned, lines = meter.before(list(session.order.buckets))
        for line in lines:
            LOG.info("%s", line)
        if log is not None:
            log.event("plan", progress.step, **planned)
        first_step = progress.step + 1
        if start is not None:
            progress.mark_saved()
        else:
            progress.pending = progress.due(0)
        with _saved_on_error(progress, log, stop):
            # Step 0 may stay the best, and an evaluation that a signal interrupted may turn out to be.
            if _run_pending(progress, log, pictures, stop) and (start or config.checkpoint.export == "best"):
                _save(progress, log)
            while progress.step < config.max_steps and not stop.sync() and not _exhausted(progress):
                began = time.perf_counter()
                watch.at(progress.step + 1, "reading its batch")
                if session.held_out is not None and "evaluation" in progress.due(progress.step + 1):
                    session.held_out.read_ahead()
                batch, position = next(loader)
                waited = time.perf_counter() - began
                if progress.telemetry is not None:
                    progress.telemetry.begin_step()
                watch.at(batch.step, "its micro-batches")
                progress.may_agree = False
                own_loss = backward(trainee, batch, progress.scaler.scale_loss, stop.sync)
                if own_loss is None:
                    break  # step and position have not moved: the checkpoint below is exact
                watch.at(batch.step, "the sum of the gradients")
                rate, norm, overflow = progress.update()
                progress.finish_step(batch.step, position)
                loss = over_ranks(ranks, batch, own_loss, config.data.global_batch)
                if batch.step == first_step:
                    use_step_timeout(config.parallel, patience_seconds)
                seconds = time.perf_counter() - began
                progress.seconds += seconds
                record = StepRecord(
                    step=batch.step,
                    epoch=batch.epoch,
                    bucket=str(batch.bucket),
                    loss=loss.mean,
                    lr=rate,
                    grad_norm=norm,
                    updates=progress.updates,
                    skipped=progress.skipped,
                    loss_scale=progress.scaler.scale,
                    seconds=seconds,
                    data_wait_seconds=waited,
                    tokens=num_batch_tokens(trainee, batch),
                    **meter.rate(batch.bucket, seconds)._asdict(),
                    memory_gib=peak_memory_gib(trainee.device),
                    num_image_to_video=loss.num_image_to_video,
                    keys=loss.keys,
                    slot_losses=[float(f"{slot:.5g}") for slot in loss.slots],
                    overflow=overflow,
                    substituted=loss.substituted,
                )
                if record.step % config.log.every_steps == 0 or record.overflow:
                    LOG.info("%s", describe_step(record))
                if log is not None:
                    log.write_step(record)
                watch.at(batch.step, "what follows a step")
                is_best = _run_pending(progress, log, pictures, stop)
                last = progress.step == config.max_steps
                if last or is_best or stop.checkpoint or progress.step % config.checkpoint.every_steps == 0:
                    _save(progress, log)
                    stop.checkpoint = False
                _note_written(progress, log)
            if not progress.is_saved and stop.failed is None:
                _save(progress, log)
            _note_written(progress, log, to_end=True)
            stopped_by = stop.signal  # one that comes from here on is too late
            stop.sync()  # here the others meet a rank that could not save or log the last step
            if stop.failed is not None:
                raise RankLost(f"rank {stop.failed} failed")
        for line in meter.after():
            LOG.info("%s", line)
        watch.at(progress.step, "the end of the run")
        result = _finish(progress, log, stopped_by)
        ranks.barrier()  # no rank ends before the run's files are there
    if result.stopped_by is None:
        preview.finish()  # a VAE on a CPU takes minutes, and no other rank waits for it
    return result


@contextlib.contextmanager
def _saved_on_error(progress: TrainingState, log: RunLog | None, stop: StopSignal) -> Iterator[None]:
    """Around the training: an error ends the run with a checkpoint, where weights, step and position are exact.

    With several ranks the others learn of the error at their next `stop.sync`, rank 0 saves, and then all end. That
    needs the failing rank to be where it can pair with that sync: not within an exchange of its own (the backward
    pass, the update, the forward pass of a sharded model).
    """
    ranks = progress.session.ranks
    try:
        yield
    except Exception as error:
        is_own = stop.failed is None
        is_split = ranks.layout.base_shards * ranks.layout.ulysses > 1
        may_agree = progress.may_agree and (isinstance(error, UserError | OSError) or not is_split)
        agreed = not ranks.alone and (may_agree or not is_own)
        if agreed and is_own:
            stop.fail()
        _save_after(error, progress, log, agreed=agreed)
        if agreed:
            messages = ranks.gather(f"{type(error).__name__}: {error}" if is_own else None)
            if not is_own:
                first = next(message for message in messages if message is not None)
                raise RankLost(f"rank {stop.failed} failed: {first}") from None
        raise


def _save_after(error: Exception, progress: TrainingState, log: RunLog | None, *, agreed: bool) -> None:
    """Save what an error leaves exact, and record the error. A step 0 is not worth a checkpoint."""
    try:
        may_save = agreed or not progress.trainee.sharded  # which all ranks write
        if may_save and progress.is_exact and progress.step > 0 and not progress.is_saved:
            _save(progress, log, sync=False)
        if log is None:
            return
        _note_written(progress, log, to_end=True)
        log.event("stop", progress.step, reason="error", signal=None, error=str(error), export=None)
    except Exception as another:  # not this one
        LOG.error("after the error below, nothing could be saved of step %d: %s", progress.step, another)


def _choose_start(folder: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint that all ranks resume from: rank 0 removes leftovers and chooses."""
    chosen = None
    if ranks.is_first:
        checkpoint.remove_leftovers(folder / "checkpoints")
        start = choose_checkpoint(folder, resume)
        chosen = None if start is None else str(start)
    chosen = ranks.broadcast(chosen)
    return None if chosen is None else Path(chosen)


def _open_log(progress: TrainingState, start: Path | None) -> RunLog | None:
    """On rank 0 cut the run's files back to where it resumes, write its settings, and open its log."""
    if not progress.session.ranks.is_first:
        return None
    folder, config = progress.session.folder, progress.config
    if start is not None:
        for path in checkpoint.drop_later(folder / "checkpoints", progress.step):
            LOG.warning("%s is after the step that this resume starts from; removed", path.name)
    kept = progress.step if start else -1
    checkpoint.cut_back(folder / METRICS_FILE, kept)
    checkpoint.cut_back(folder / HELD_OUT_FILE, kept - ("evaluation" in progress.pending))
    settings = write_settings(progress.session, config)
    return RunLog(folder, config.log, first_step=progress.step + 1, max_steps=config.max_steps, settings=settings)


def _write_start(progress: TrainingState, log: RunLog, start: Path | None) -> None:
    """The first events of a start: of what, on what."""
    trainee, dataset = progress.trainee, progress.session.dataset
    facts = {
        "base": describe_base(trainee.config),
        "parameters": sum(weight.numel() for weight in trainee.model.parameters()),
        "trained": trainee.num_trained,
        "revision": dataset.revision,
        "processes": progress.session.ranks.layout.world_size,
    }
    if start is None:
        log.event("start", progress.step, **facts)
    else:
        log.event("resume", progress.step, checkpoint=str(start), **facts)
    precision = trainee.precision
    name = device_info(trainee.device).name
    gib = None if trainee.device_bytes is None else trainee.device_bytes / GIB
    log.event("device", progress.step, name=name, precision=precision.name, reason=precision.reason, available_gib=gib)


def _run_pending(progress: TrainingState, log: RunLog | None, pictures: list[Ready], stop: StopSignal) -> bool:
    """Do what is pending after the step, and return whether its held-out loss is the best so far.

    What a signal interrupts stays pending: it goes into the checkpoint, and a resume does it from its beginning.
    """
    is_best = False
    with contextlib.suppress(StoppedBySignal):
        if "evaluation" in progress.pending:
            is_best = _evaluate(progress, log, stop.raise_if_asked)
            progress.pending = tuple(name for name in progress.pending if name != "evaluation")
        if "pictures" in progress.pending:
            _sample(progress, pictures, stop.raise_if_asked)
            progress.pending = ()
    return is_best


def _evaluate(progress: TrainingState, log: RunLog | None, check_stop: Callable[[], None]) -> bool:
    """Take the held-out loss, of the moving average where there is one; return whether it is the best so far."""
    session, trainee = progress.session, progress.trainee
    if session.held_out is None:
        return False
    began = time.perf_counter()
    with trainee.inference(), trainee.holding(progress.average):
        held_out = session.held_out.take(trainee.model, check_stop)
    seconds = time.perf_counter() - began
    progress.seconds += seconds
    progress.eval_seconds += seconds
    if log is not None:
        before = log.evaluations()
        log.write_held_out(progress.step, held_out, seconds)
        share = 100 * progress.eval_seconds / progress.seconds
        found = describe_held_out(held_out, before[0] if before else None)
        LOG.info("step %d  %s; %.0f %% of the time", progress.step, found, share)
    return progress.judge(held_out.mean)


def _sample(progress: TrainingState, pictures: list[Ready], check_stop: Callable[[], None]) -> None:
    """Write latents of the configured prompts; `wanprep decode --watch` shows them, the trainer has no VAE."""
    if progress.config.sample is None:
        return
    trainee, began = progress.trainee, time.perf_counter()
    folder = progress.session.folder / SAMPLES_FOLDER / checkpoint.checkpoint_name(progress.step)
    sampler, layout = progress.config.sample.sampler, progress.session.ranks.layout
    with trainee.holding(progress.average):
        sample_prompts(trainee.model, pictures, sampler, folder, check_stop, layout)
    progress.seconds += time.perf_counter() - began


def _exhausted(progress: TrainingState) -> bool:
    patience = progress.config.eval.patience if progress.config.eval else None
    return patience is not None and progress.evaluations_since_best >= patience


def _save(progress: TrainingState, log: RunLog | None, *, sync: bool = True) -> None:
    """Begin a checkpoint: on rank 0, of a sharded model on all. Without `sync` a failing log is not in its way."""
    if log is not None:
        _note_written(progress, log, to_end=True)  # one at a time
        if sync:
            log.sync()
    if log is not None or progress.trainee.sharded:
        progress.save()
    progress.mark_saved()


def _note_written(progress: TrainingState, log: RunLog | None, *, to_end: bool = False) -> None:
    """Report the checkpoint whose write has ended, or raise what it raised; `to_end` waits for it."""
    saved = progress.written(to_end=to_end)
    if saved is not None and log is not None:
        LOG.info("checkpoint %s", saved.path)
        log.event("checkpoint", saved.step, path=str(saved.path))


def _finish(progress: TrainingState, log: RunLog | None, stopped_by: int | None) -> FitResult:
    """Report the end, on rank 0, and write the export."""
    if log is None:
        if progress.trainee.sharded and stopped_by is None:
            progress.export()
        return FitResult(progress.step, None, None, None, stopped_by)
    evaluations = log.evaluations()
    before, after = (evaluations[0]["mean"], evaluations[-1]["mean"]) if evaluations else (None, None)
    if stopped_by is not None:
        LOG.info("stopped by signal %d after step %d; the same command resumes there", stopped_by, progress.step)
        log.event("stop", progress.step, reason="signal", signal=stopped_by, error=None, export=None)
        return FitResult(progress.step, before, after, None, stopped_by)
    if stopped_early := _exhausted(progress):
        LOG.info("stopped early: %d evaluations without improvement", progress.evaluations_since_best)
    if before is not None and after is not None:
        words = f"held-out loss {before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+z.1f} %)"
        LOG.info("%s, best at step %s", words, progress.best_step)
    share = 100 * progress.eval_seconds / max(progress.seconds, 1e-9)
    words = f"{progress.updates} updates, {progress.skipped} skipped, {progress.seconds:.0f} s"
    LOG.info("%s, held-out loss %.0f %%", words, share)
    path = progress.export()
    LOG.info("exported %s", path)
    reason = "patience" if stopped_early else "done"
    log.event("stop", progress.step, reason=reason, signal=None, error=None, export=str(path))
    return FitResult(progress.step, before, after, path, None)
