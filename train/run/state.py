"""The state of a run that changes from step to step; saving it to a checkpoint and restoring it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shards.console import LOG
from shards.errors import UserError
from shards.files.write_file import TEMPORARY
from shards.format.identity import refuse_mismatch
from train import checkpoint
from train.checkpoint import Owed
from train.data import draws
from train.data import sampler as order
from train.data.sampler import Position
from train.lora.export import export_metadata
from train.optim import (
    averaged_weights,
    clip_gradients,
    has_modes,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    pack_optimizer,
    set_learning_rate,
    total_norm,
    unpack_optimizer,
    update_average,
)
from train.parallel.rows import digest_files, read_rows, together, write_rows
from train.precision import LossScaler, OverflowTelemetry, has_overflow
from train.run.session import Session, provenance
from train.run.sharded import state_rows, state_span
from train.run.trainee import check_names

COPIED_BYTES = 4 << 30
"""The largest state that is copied, into the host's memory, so that the next step need not wait for its checkpoint."""


class Saved(NamedTuple):
    """A checkpoint that is complete."""

    step: int
    path: Path


class TrainingState:
    """Counters, position, optimizer, loss scale, moving average: at step 0 until `restore`."""

    def __init__(self, session: Session) -> None:
        trainee, config = session.trainee, session.trainee.config
        self.session, self.trainee, self.config = session, trainee, config
        self.step = 0
        """Batches consumed."""
        self.updates = 0
        """Optimizer steps applied."""
        self.skipped = 0
        """Optimizer steps skipped for overflow."""
        self.skipped_in_a_row = 0
        self.position = Position(0, 0)
        """Of the next batch."""
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self.evaluations_since_best = 0
        self.pending: tuple[Owed, ...] = ()
        """What is still to be done after the step: see `due`. On disk it is called `owed`."""
        self.is_exact = True
        """Whether weights, optimizer, step and position belong together: not within an update."""
        self.may_agree = True
        """Whether an error of this rank can be agreed on at the others' next sync: not from backward to the update."""
        self._saved: tuple[int, tuple[Owed, ...]] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Saved] | None = None
        self.seconds = 0.0
        """Wall clock of all steps and evaluations."""
        self.eval_seconds = 0.0
        # Of short weights the last ranks of a sharded model hold nothing.
        self._moved = {name: weight for name, weight in trainee.weights.items() if weight.numel()}
        shapes = None if trainee.adapted else {weight: trainee.span(name)[0] for name, weight in self._moved.items()}
        by_rows = bool(trainee.sharded)
        self.optimizer = make_optimizer(self._moved.values(), config.optim, shapes, by_rows=by_rows)
        self.scaler = LossScaler(
            trainee.precision.scales_loss,
            init_scale=config.precision.initial_scale,
            growth_interval=config.precision.scale_growth_updates,
            max_skips=config.precision.max_skipped_in_a_row,
        )
        self.telemetry = OverflowTelemetry(trainee.model) if trainee.precision.scales_loss else None
        self._moving_average: dict[str, Tensor] | None = None
        if config.optim.ema_decay is not None:
            if has_modes(self.optimizer):
                raise UserError(
                    f"optim.ema_decay: {config.optim.name} averages the weights itself", fix="set optim.ema_decay=null"
                )
            self._moving_average = {name: weight.clone() for name, weight in trainee.tensors().items()}

    @property
    def average(self) -> dict[str, Tensor] | None:
        """What evaluation, pictures and the export use where it is not the trained weights: their moving average, or
        copies of the weights in a schedule-free optimizer's evaluation mode."""
        return self._moving_average or averaged_weights(self.optimizer, self.trainee.weights)

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.session.folder / "checkpoints"

    def update(self) -> tuple[float, float | None, str | None]:
        """Sum the gathered gradients over the ranks and apply them, or skip them, on all, when any is not finite.

        Returns: learning rate, gradient norm before clipping (None if skipped), and the block that a skip is blamed on.
        Raises UserError when too many updates in a row were skipped.
        """
        weights, ranks = list(self.trainee.weights.values()), self.session.ranks
        ranks.reduce_gradients(self.trainee.replicated)
        self.trainee.take_gradients()
        self.is_exact = False
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self.scaler.unscale_(gradients)
        overflow = bool(has_overflow(gradients))
        if self.trainee.sharded:  # what is not finite on one rank is on that rank alone
            overflow = bool(ranks.all_reduce_max(float(overflow))[0])
        rate = learning_rate(self.config.optim, self.updates, self.config.max_steps)
        blamed = None
        if overflow:
            blamed = self._blame()
            norm = None
            self.skipped += 1
            self._bound_skips()
        else:
            set_learning_rate(self.optimizer, rate)
            norm = clip_gradients(weights, self.config.optim.max_grad_norm, self._norm_over_ranks())
            self.optimizer.step()
            self.updates += 1
            self.skipped_in_a_row = 0
            if self._moving_average is not None and self.config.optim.ema_decay is not None:
                update_average(self._moving_average, self.trainee.tensors(), self.config.optim.ema_decay, self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update(overflow)
        return rate, norm, blamed

    def _norm_over_ranks(self) -> Tensor | None:
        """The norm of all gradients where they are sharded; what several ranks hold counts once."""
        trainee, layout = self.trainee, self.session.ranks.layout
        if not trainee.sharded:
            return None
        rows, whole = [trainee.weights[name] for name in trainee.sharded], trainee.replicated
        own, common = (float(total_norm([w.grad for w in some if w.grad is not None])) ** 2 for some in (rows, whole))
        (rows_of_all,) = self.session.ranks.all_reduce_sum(own * layout.base_shards / layout.world_size)
        return torch.tensor((rows_of_all + common) ** 0.5, device=trainee.device)

    def finish_step(self, step: int, position: Position) -> None:
        """The update of `step` is done: from here on the state is that of the step, with what is pending after it."""
        self.step, self.position = step, position
        self.pending = self.due(step)
        self.is_exact = self.may_agree = True

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint holds this very state, or will when it is written."""
        return self._saved == (self.step, self.pending)

    def mark_saved(self) -> None:
        """The newest checkpoint is of this state."""
        self._saved = (self.step, self.pending)

    def _blame(self) -> str:
        if self.telemetry is None:
            return "gradients"
        return self.telemetry.blame(self.trainee.weights.items(), self.session.ranks.all_reduce_max)

    def _bound_skips(self) -> None:
        """Without a loss scale to lower nothing recovers by itself; with one the scaler has its own limit."""
        self.skipped_in_a_row += 1
        if not self.scaler.enabled and self.skipped_in_a_row > self.config.precision.max_skipped_in_a_row:
            raise UserError(
                f"gradients were not finite {self.skipped_in_a_row} times in a row in {self.trainee.precision.name}",
                expected="finite gradients",
                fix="start in another output with a lower optim.lr, from the last good weights: lora.start_from=FILE",
            )

    def due(self, step: int) -> tuple[Owed, ...]:
        """What the configuration asks for after a step; both also before the first and after the last step."""
        sections: dict[Owed, Any] = {"evaluation": self.config.eval, "pictures": self.config.sample}
        last = step == self.config.max_steps
        return tuple(name for name, its in sections.items() if its and (last or step % its.every_steps == 0))

    def judge(self, held_out_loss: float) -> bool:
        """Record an evaluation; return whether it is the best so far."""
        margin = self.config.eval.min_improvement if self.config.eval else 0.0
        if math.isfinite(held_out_loss) and (self.best_loss is None or held_out_loss < self.best_loss * (1 - margin)):
            self.best_loss, self.best_step, self.evaluations_since_best = held_out_loss, self.step, 0
            return True
        self.evaluations_since_best += 1
        return False

    def save(self) -> None:
        """Begin to write a checkpoint in a thread, which then removes those that need not be kept: see `written`.

        What the next step changes is copied first; a state that is too large for that is written before this returns.
        That of a sharded model is written by all ranks, each its rows, before this returns: every rank calls it then.
        """
        values: dict[str, Any] = {}
        if self.config.optim.is_own:
            moments = optimizer_tensors(self.optimizer, {weight: name for name, weight in self._moved.items()})
        else:
            moments, values = pack_optimizer(self.optimizer, self._moved)
        tensors = {self.trainee.file_name: self.trainee.tensors(), checkpoint.OPTIMIZER_FILE: moments}
        if (average := self.average) is not None:
            tensors[checkpoint.AVERAGE_FILE] = average
        if self.trainee.sharded:
            saved = self._write_together(self._state(values), tensors)
            self._writing = Future()
            self._writing.set_result(saved)
            return
        size = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
        if size <= COPIED_BYTES:
            tensors = {
                file: {name: x.to("cpu", copy=True) for name, x in named.items()} for file, named in tensors.items()
            }
        self._writing = self._writer.submit(self._write, self._state(values), tensors)
        if size > COPIED_BYTES:
            wait([self._writing])

    def _write_together(self, state: checkpoint.CheckpointState, tensors: Mapping[str, Mapping[str, Tensor]]) -> Saved:
        ranks, temporary = self.session.ranks, self.folder / f"{TEMPORARY}{checkpoint.checkpoint_name(state.step)}"
        path = self.folder / checkpoint.checkpoint_name(state.step)
        together(ranks, lambda: checkpoint.begin_checkpoint(self.folder, state.step) if ranks.is_first else None)
        try:
            for file, named in tensors.items():
                parts = {name: state_rows(self.trainee, name, tensor) for name, tensor in named.items()}
                kept = {n: p for n, p in parts.items() if ranks.is_first or (p.is_own and ranks.writes_rows)}
                write_rows(temporary / file, {n: p.rows for n, p in kept.items()}, ranks)
            digests = digest_files([temporary / file for file in tensors], ranks)
        except UserError:  # on all ranks
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

        def seal() -> None:
            if ranks.is_first:
                checkpoint.seal_checkpoint(self.folder, state, digests, self.session.dataset.pin())
                checkpoint.prune_checkpoints(self.folder, self.config.checkpoint.keep_last, state.best_step)

        together(ranks, seal)
        return Saved(state.step, path)

    def _write(self, state: checkpoint.CheckpointState, tensors: Mapping[str, Mapping[str, Tensor]]) -> Saved:
        path = checkpoint.write_checkpoint(self.folder, state, tensors, self.session.dataset.pin())
        checkpoint.prune_checkpoints(self.folder, self.config.checkpoint.keep_last, state.best_step)
        return Saved(state.step, path)

    def written(self, *, to_end: bool = False) -> Saved | None:
        """The checkpoint whose write has ended since the last call; `to_end` waits for it. Raises its error."""
        writing = self._writing
        if writing is None or not (to_end or writing.done()):
            return None
        wait([writing])
        self._writing = None
        if writing.exception() is not None:
            self._saved = None
        return writing.result()

    def close(self) -> None:
        """Wait for the end of a checkpoint's write, whatever it comes to."""
        self._writer.shutdown(wait=True)

    def export(self) -> Path:
        """Write the weights for use elsewhere: the last or the best, of the average where there is one. Of a sharded
        model every rank calls it."""
        trainee, config, step = self.trainee, self.config, self.step
        average = self.average
        tensors = trainee.tensors() if average is None else average
        if config.checkpoint.export == "best" and self.best_step is not None and self.best_step != step:
            step = self.best_step
            folder = self.folder / checkpoint.checkpoint_name(step)
            tensors = self._read(folder / (checkpoint.AVERAGE_FILE if average is not None else trainee.file_name))
        metadata = export_metadata(self.session.identity, step, config.checkpoint.licence, config.model.checkpoint)
        path = self.session.folder / trainee.file_name
        if trainee.sharded:
            trainee.export_rows(path, tensors, metadata, self.session.ranks)
        else:
            trainee.export(path, tensors, metadata)
        return path

    def _read(self, path: Path) -> dict[str, Tensor]:
        """A file of a checkpoint; of a sharded model this rank's rows of it."""
        if not self.trainee.sharded:
            return checkpoint.load_tensors(path)
        return read_rows(path, partial(state_span, self.trainee))

    def restore(self, path: Path) -> None:
        """Load a checkpoint. Raises UserError when it belongs to another configuration, model or dataset."""
        state = checkpoint.read_checkpoint(path)
        refuse_mismatch(
            self.session.identity,
            _without_reading(state.identity, self.session.identity),
            f"checkpoint {path}",
            fix="undo the change, or start a new run in another output folder; to train these weights on with other "
            f"settings, such as optim.lr, start it from them: lora.start_from={path}",
        )
        draws.check_draws_version(state.draws_version)
        order.check_order_version(state.order_version)
        for name, was in state.provenance.items():
            if (now := provenance(self.trainee).get(name)) != was:
                LOG.warning("resuming on another %s: was %s, is %s; the last bits may differ", name, was, now)
        self.trainee.load(self._read(path / self.trainee.file_name))
        moments = self._read(path / checkpoint.OPTIMIZER_FILE)
        if self.config.optim.is_own:
            load_optimizer_tensors(self.optimizer, {weight: name for name, weight in self._moved.items()}, moments)
        else:
            saved = state.optimizer.get("state", {})
            held = {name: of for name, of in saved.items() if name in self._moved or name not in self.trainee.weights}
            unpack_optimizer(self.optimizer, self._moved, moments, state.optimizer | {"state": held})
        if self._moving_average is not None:
            loaded = self._read(path / checkpoint.AVERAGE_FILE)
            check_names(self._moving_average, loaded, "the checkpoint's average")
            for name, kept in self._moving_average.items():
                kept.copy_(loaded[name])
        self.scaler.load_state_dict(state.scaler)
        if self.telemetry is not None:
            self.telemetry.load_state_dict(state.overflows)
        self.step, self.updates, self.skipped = state.step, state.updates, state.skipped
        self.skipped_in_a_row = state.skipped_in_a_row
        self.position = Position(state.epoch, state.batch)
        self.best_step, self.best_loss = state.best_step, state.best_loss
        self.evaluations_since_best, self.pending = state.evaluations_since_best, state.owed
        self.seconds, self.eval_seconds = state.seconds, state.eval_seconds

    def _state(self, optimizer: dict[str, Any]) -> checkpoint.CheckpointState:
        return checkpoint.CheckpointState(
            step=self.step,
            updates=self.updates,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            epoch=self.position.epoch,
            batch=self.position.batch,
            scaler=self.scaler.state_dict(),
            overflows=self.telemetry.state_dict() if self.telemetry else {},
            best_step=self.best_step,
            best_loss=self.best_loss,
            evaluations_since_best=self.evaluations_since_best,
            owed=self.pending,
            seconds=self.seconds,
            eval_seconds=self.eval_seconds,
            optimizer=optimizer,
            draws_version=draws.DRAWS_VERSION,
            order_version=order.ORDER_VERSION,
            identity=self.session.identity,
            provenance=provenance(self.trainee),
        )


def _without_reading(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity as if `on_bad_sample` had been the same: it decides nothing before a substitution."""
    data = {**was["config"]["data"], "on_bad_sample": now["config"]["data"]["on_bad_sample"]}
    return {**was, "config": {**was["config"], "data": data}}
