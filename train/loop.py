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
from train import checkpoint, evaluate
from train.config.train import TrainConfig
from train.data.loader import Loader
from train.device import choose_device, device_memory
from train.estimate.layout import choose_layout
from train.launch.heartbeat import HeartbeatWatch
from train.lora.export import export_metadata
from train.parallel.ranks import Ranks, make_ranks, process_group, read_world, run_pending, smallest
from train.run.log import HELD_OUT_FILE, METRICS_FILE, OwnLog, RunLog, StepRecord
from train.run.session import (
    AgreedStop,
    Session,
    StoppedBySignal,
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
from train.run.trainee import Trainee, describe_trainee
from train.sampling.preview import Preview
from train.sampling.sample import Ready, prepare_prompts, sample_prompts
from train.step import backward, num_batch_tokens, over_ranks, sigma_density

SAMPLES_FOLDER = "samples"


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
    """Train as configured and leave the run's folder as the design describes it.

    Args:
        resume: `auto` goes on from the run's newest checkpoint, `never` insists on beginning, else a checkpoint's path.
        verify: hash every byte of the dataset first.

    Under a launcher every process of the run calls it; rank 0 writes the folder, which all must see.

    Raises UserError for whatever the user can fix, before the first step where it can be known by then.
    """
    folder, world = Path(config.output), read_world()
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(HeartbeatWatch(world.rank, world.size, config.parallel))
        if world.rank == 0:
            stack.enter_context(locked(folder))
        stack.enter_context(log_file(folder, world.rank))
        stack.enter_context(determinism(config.precision.deterministic))
        device = choose_device(config.precision.device, world.local_rank if world.size > 1 else None)
        stack.enter_context(process_group(config.parallel, world, device))
        ranks = make_ranks(*choose_layout(config, world, smallest(world, device_memory(device))))
        start = _choose_start(folder, resume, ranks)
        session = open_session(config, verify=verify, start=start, ranks=ranks)
        trainee, progress = session.trainee, TrainingState(session)
        if start is not None:
            progress.restore(start)
        stop = AgreedStop(stack.enter_context(stop_signals()), ranks, watch.pulse)
        log = _open_log(progress, start)
        stack.callback(log.close)
        for line in (*describe_trainee(trainee, session.dataset), *describe_data(session)):
            log.say(line)
        if not ranks.alone:
            log.say(f"layout: {ranks.layout}{ranks.reason and f' ({ranks.reason})'}")
        log.say(f"resuming from {start}" if start else f"beginning in {folder}")

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
        pictures = _prepare_pictures(session, config)
        preview = Preview(config.sample if ranks.is_first else None, folder)
        stack.callback(preview.close)
        meter = Throughput(trainee, ranks.layout)
        for line in meter.before(list(session.order.buckets)):
            log.say(line)
        saved, first_step = (progress.step, progress.owed) if start else None, progress.step + 1
        if start is None:
            progress.owed = progress.due()
        # The beginning may stay the best, and what a signal cut short may turn out to be.
        if _settle(progress, log, pictures, stop) and (start or config.checkpoint.export == "best"):
            saved = _save(progress, log)

        while progress.step < config.max_steps and not stop.look() and not _exhausted(progress):
            began = time.perf_counter()
            watch.at(progress.step + 1, "reading its batch")
            batch, position = next(loader)
            waited = time.perf_counter() - began
            if progress.telemetry is not None:
                progress.telemetry.begin_step()
            watch.at(batch.step, "its micro-batches")
            own_loss = backward(trainee, batch, progress.scaler.scale_loss, stop.look)
            if own_loss is None:
                break  # step and position have not moved: the checkpoint below is exact
            watch.at(batch.step, "the sum of the gradients")
            rate, norm, overflow = progress.update()
            loss = over_ranks(ranks, batch, own_loss, config.data.global_batch)
            if batch.step == first_step:
                run_pending(config.parallel)
            progress.step, progress.position = batch.step, position
            seconds = time.perf_counter() - began
            progress.seconds += seconds
            log.write_step(
                StepRecord(
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
            )
            progress.owed = progress.due()
            watch.at(batch.step, "what follows a step")
            is_best = _settle(progress, log, pictures, stop)
            last = progress.step == config.max_steps
            if last or is_best or stop.checkpoint or progress.step % config.checkpoint.every_steps == 0:
                saved = _save(progress, log)
                stop.checkpoint = False

        if (progress.step, progress.owed) != saved:
            _save(progress, log)
        for line in meter.after():
            log.say(line)
        watch.at(progress.step, "the end of the run")
        result = _finish(progress, log, stop.signal)
        if result.stopped_by is None:
            preview.finish()
        ranks.barrier()  # nobody calls the run done before its files are there
        return result


def _choose_start(folder: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint that all ranks go on from: rank 0 clears up and chooses."""
    chosen = None
    if ranks.is_first:
        checkpoint.remove_leftovers(folder / "checkpoints")
        start = choose_checkpoint(folder, resume)
        chosen = None if start is None else str(start)
    chosen = ranks.broadcast(chosen)
    return None if chosen is None else Path(chosen)


def _open_log(progress: TrainingState, start: Path | None) -> RunLog | OwnLog:
    """On rank 0 cut the run's files back to where it goes on from, write its settings, and open its log."""
    if not progress.session.ranks.is_first:
        return OwnLog()
    folder, config = progress.session.folder, progress.config
    if start is not None:
        for path in checkpoint.drop_later(folder / "checkpoints", progress.step):
            LOG.warning("%s is of the course that is given up; removed", path.name)
    kept = progress.step if start else -1
    checkpoint.cut_back(folder / METRICS_FILE, kept)
    checkpoint.cut_back(folder / HELD_OUT_FILE, kept - ("evaluation" in progress.owed))
    settings = write_settings(progress.session, config)
    return RunLog(folder, config.log, first_step=progress.step + 1, max_steps=config.max_steps, settings=settings)


def _settle(progress: TrainingState, log: RunLog | OwnLog, pictures: list[Ready], stop: AgreedStop) -> bool:
    """Do what the step owes beside training, and return whether its held-out loss is the best so far.

    What a signal cuts short stays owed: it goes into the checkpoint, and a resume does it from its beginning.
    """
    is_best = False
    with contextlib.suppress(StoppedBySignal):
        if "evaluation" in progress.owed:
            is_best = _evaluate(progress, log, stop.raise_if_asked)
            progress.owed = tuple(name for name in progress.owed if name != "evaluation")
        if "pictures" in progress.owed:
            _sample(progress, pictures, stop.raise_if_asked)
            progress.owed = ()
    return is_best


def _evaluate(progress: TrainingState, log: RunLog | OwnLog, look_up: Callable[[], None]) -> bool:
    """Take the held-out loss, of the moving average where there is one; return whether it is the best so far."""
    config, session, trainee = progress.config, progress.session, progress.trainee
    if config.eval is None:
        return False
    began = time.perf_counter()
    with _inference(trainee), trainee.holding(progress.average):
        held_out = evaluate.evaluate(
            trainee.model,
            session.dataset,
            session.held_out,
            config.eval,
            sigma_density(config.objective),
            trainee.dims.text_len,
            trainee.device,
            look_up,
        )
    seconds = time.perf_counter() - began
    progress.seconds += seconds
    progress.eval_seconds += seconds
    before = log.evaluations()
    log.write_held_out(progress.step, held_out, seconds)
    share = 100 * progress.eval_seconds / progress.seconds
    found = evaluate.describe_held_out(held_out, before[0] if before else None)
    log.say(f"step {progress.step}  {found}; {share:.0f} % of the time")
    return progress.judge(held_out.mean)


def _prepare_pictures(session: Session, config: TrainConfig) -> list[Ready]:
    if config.sample is None:
        return []
    return prepare_prompts(config.sample.prompts, config.sample.sampler, session.trainee.dims, session.dataset)


def _sample(progress: TrainingState, pictures: list[Ready], look_up: Callable[[], None]) -> None:
    """Write latents of the configured prompts; `wanprep decode --watch` shows them, the trainer has no VAE."""
    if progress.config.sample is None:
        return
    trainee, began = progress.trainee, time.perf_counter()
    folder = progress.session.folder / SAMPLES_FOLDER / checkpoint.checkpoint_name(progress.step)
    with trainee.holding(progress.average):
        first = progress.session.ranks.is_first
        sample_prompts(trainee.model, pictures, progress.config.sample.sampler, folder if first else None, look_up)
    progress.seconds += time.perf_counter() - began


@contextlib.contextmanager
def _inference(trainee: Trainee) -> Iterator[None]:
    trainee.model.eval()
    try:
        yield
    finally:
        trainee.model.train()


def _exhausted(progress: TrainingState) -> bool:
    patience = progress.config.eval.patience if progress.config.eval else None
    return patience is not None and progress.evaluations_since_best >= patience


def _save(progress: TrainingState, log: RunLog | OwnLog) -> tuple[int, tuple[checkpoint.Owed, ...]]:
    """Write a checkpoint, on rank 0; return what tells it from the next one."""
    if progress.session.ranks.is_first:
        log.sync()
        log.say(f"checkpoint {progress.save()}")
    return progress.step, progress.owed


def _finish(progress: TrainingState, log: RunLog | OwnLog, stopped_by: int | None) -> FitResult:
    evaluations = log.evaluations()
    before, after = (evaluations[0]["mean"], evaluations[-1]["mean"]) if evaluations else (None, None)
    if stopped_by is not None:
        log.say(f"stopped by signal {stopped_by} after step {progress.step}; `wantrain fit` goes on from there")
        return FitResult(progress.step, before, after, None, stopped_by)
    if _exhausted(progress):
        log.say(f"stopped early: {progress.evaluations_since_best} evaluations without improvement")
    if before is not None and after is not None:
        change = 100 * (after / before - 1)
        log.say(
            f"held-out loss {before:.4f} before, {after:.4f} after ({change:+.1f} %), best at step {progress.best_step}"
        )
    share = 100 * progress.eval_seconds / max(progress.seconds, 1e-9)
    log.say(
        f"{progress.updates} updates, {progress.skipped} skipped, {progress.seconds:.0f} s, held-out loss {share:.0f} %"
    )
    if not progress.session.ranks.is_first:
        return FitResult(progress.step, None, None, None, None)
    path = _export(progress)
    log.say(f"exported {path}")
    return FitResult(progress.step, before, after, path, None)


def _export(progress: TrainingState) -> Path:
    """Write the weights for use elsewhere: the last or the best, of the moving average where there is one."""
    trainee, step = progress.trainee, progress.step
    tensors = progress.average or trainee.tensors()
    if progress.config.checkpoint.export == "best" and progress.best_step is not None and progress.best_step != step:
        step = progress.best_step
        folder = progress.folder / checkpoint.checkpoint_name(step)
        tensors = checkpoint.load_tensors(folder / (checkpoint.AVERAGE_FILE if progress.average else trainee.file_name))
    config = progress.config
    metadata = export_metadata(progress.session.identity, step, config.checkpoint.licence, config.model.checkpoint)
    path = progress.session.folder / trainee.file_name
    trainee.export(path, tensors, metadata)
    return path
