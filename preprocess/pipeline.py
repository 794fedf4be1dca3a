"""`build-shards`, `retry` and `recaption` from end to end: plan, latents, texts, summary. All resume unit by unit."""

from __future__ import annotations

import ctypes
import errno
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from preprocess.build.dataset_info import find_info, set_totals
from preprocess.build.latent_pass import build_latents, check_settled_identity, chosen_units, pending_units
from preprocess.build.progress import Style, show_progress
from preprocess.build.scratch import AtWork, IfBusy, scratch_folder
from preprocess.build.summary import count_dataset
from preprocess.build.text_pass import TextCounts, build_texts, check_settled_texts
from preprocess.build.vae_precision import measure_apart, settle_precision
from preprocess.config import PrepConfig
from preprocess.plan.freeze import ensure_plan
from preprocess.plan.plan import Plan, open_plan
from preprocess.plan.retry import RetryChoice, Wanted, choose_retries, freeze_retry, retry_units
from shards.check.orphans import sweep_committed
from shards.console import LOG, counted
from shards.errors import DISK_FULL, EXIT_TEMPORARY, UserError, WorkLeftUndone
from shards.format.commit import committed_units
from shards.format.names import LATENTS, text_kind
from shards.read.outcomes import read_outcomes
from shards.storage import open_storage
from shards.storage.base import Storage
from shards.storage.local import LocalStorage
from shards.storage.patience import abandon_waits

DEFAULT_SET = "default"
_TEXTS = text_kind(DEFAULT_SET)
_GONE = {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.EPERM}


class Part(NamedTuple):
    """Which part of a build a process does, for machines that share the work without communicating."""

    only: Literal["latents", "text"] | None = None
    """One pass alone, for example on the machine that has its encoder."""
    units: Collection[int] | None = None
    """These units alone (one task of a Slurm array, or a retry)."""


WHOLE = Part()


class Retried(NamedTuple):
    """What `retry` chose, and the counts of the dataset afterwards."""

    choice: RetryChoice
    counts: dict[str, Any]


OnLatents = Callable[[dict[str, Any]], None]
"""Is given the figures of the pass over clips (`PassProgress.facts`), empty where nothing was left to do."""


def build_shards(
    config: PrepConfig,
    *,
    quiet: bool = False,
    part: Part = WHOLE,
    style: Style = "auto",
    if_busy: IfBusy = "wait",
    on_latents: OnLatents = lambda figures: None,
) -> dict[str, Any]:
    """Plan, encode and embed what is not there yet; return the counts of the dataset afterwards.

    `if_busy`: what to do where another build is at work on the same units.
    Raises UserError: a bad setting, a changed identity, a full disk, a dataset that is still empty.
    """
    style = "none" if quiet else style
    storage = open_storage(config.output)
    passes = {kind for name, kind in (("latents", LATENTS), ("text", _TEXTS)) if part.only in (None, name)}
    with _working(storage, config.output, passes, part, if_busy) as (scratch, at_work):
        plan = ensure_plan(storage, config, scratch=scratch)
        candidates, units = counted(plan.num_candidates, "candidate"), counted(plan.num_units, "unit")
        LOG.info("plan: %s in %s, %d refused", candidates, units, plan.num_refused)
        if part == WHOLE:
            plan = _retry_if_all_refused(storage, plan, config, scratch)
        if part.only != "text":
            on_latents(_latent_pass(storage, plan, config, scratch, style, part, at_work))
        if part.only != "latents":
            _text_pass(storage, plan, DEFAULT_SET, config, scratch, style, part, at_work)
        counts = count_dataset(storage, plan, DEFAULT_SET)
        if part == WHOLE:  # one of several processes does not know what the others did
            set_totals(storage, plan, counts)
    if not counts["samples"] and part == WHOLE:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in counts["rejected_by"].items())
        problem = f"{config.output}: the dataset is empty: {reasons or 'the corpus has no records'}"
        raise UserError(problem, fix=_fix_of(next(iter(counts["rejected_by"]), "read/none")))
    return counts


def _retry_if_all_refused(storage: Storage, plan: Plan, config: PrepConfig, scratch: Path) -> Plan:
    """Try again what fetching refused, if a finished build accepted nothing: its cause may be fixed by now."""
    done = committed_units(storage, LATENTS)
    if not plan.num_units or len(done) < plan.num_units:
        return plan
    reasons = set()
    for _, row, is_latest in read_outcomes(storage):
        if row.status == "accepted":
            return plan
        reasons |= {f"fetch/{row.reason}"} if is_latest and row.stage == "fetch" else set()
    choice = choose_retries(plan, Wanted(frozenset(reasons), retryable=True), done)
    if choice.ordinals:
        LOG.warning("every clip was rejected before: %d of them are tried again", len(choice.ordinals))
    return freeze_retry(plan, config, choice, scratch)


def _fix_of(reason: str) -> str:
    """What helps a build that was refused everything, by its most frequent `stage/reason`."""
    stage, _, code = reason.partition("/")
    fixes = {
        "fetch-host-refused": "add the host to fetch.allow_hosts",
        "fetch-address-refused": "name the host itself in fetch.allow_hosts, without a wildcard",
        "fetch-401": "set fetch.sign, or the AWS credentials",
        "fetch-403": "set fetch.sign, or the AWS credentials",
        "no-source": "put the clips beside their JSON files, or give URLs in the annotations",
        "fetch": "check the network, fetch.mirrors and the URLs",
        "sieve": "`wanprep scan CONFIG` shows what the records hold; change the keys of sieve",
        "read": "check corpus.location",
    }
    fix = fixes.get(code) or fixes.get(stage)
    if fix is not None:
        return f"{fix}, then run the same command again"
    return f"change the config (keys of {stage}), then `wanprep retry CONFIG --reason {code}`"


def recaption(config: PrepConfig, set_name: str, *, quiet: bool = False, style: Style = "auto") -> dict[str, Any]:
    """Write text set `set_name` over all finished latents; return the counts of the dataset afterwards."""
    text_kind(set_name)
    storage = open_storage(config.output)
    plan = open_plan(storage)
    if not committed_units(storage, LATENTS):
        fix = "`wanprep build-shards CONFIG` first"
        raise UserError(f"{config.output}: no finished latents to write captions for", fix=fix)
    with _working(storage, config.output, {text_kind(set_name)}, WHOLE, "wait") as (scratch, at_work):
        _text_pass(storage, plan, set_name, config, scratch, "none" if quiet else style, WHOLE, at_work)
        return count_dataset(storage, plan, set_name)


def retry(
    config: PrepConfig,
    wanted: Wanted,
    *,
    dry_run: bool = False,
    quiet: bool = False,
    style: Style = "auto",
    on_latents: OnLatents = lambda figures: None,
) -> Retried:
    """Try rejected candidates again in new units; finished units are not rewritten.

    Retries that were stopped before are resumed. Raises UserError where nothing has been planned.
    """
    style = "none" if quiet else style
    storage = open_storage(config.output)
    plan = open_plan(storage)
    if not plan.generations:
        fix = "`wanprep build-shards CONFIG` first"
        raise UserError(f"output: {config.output!r}: nothing has been planned there", fix=fix)
    choice = choose_retries(plan, wanted, committed_units(storage, LATENTS))
    if dry_run or not (choice.ordinals or choice.open_units):
        return Retried(choice, count_dataset(storage, plan, DEFAULT_SET))
    with _working(storage, config.output, {LATENTS, _TEXTS}, WHOLE, "wait") as (scratch, at_work):
        info = find_info(storage)
        if info is not None:  # before anything is frozen
            check_settled_identity(info, config, f"the dataset at {storage.url()}")
        plan = open_plan(storage)
        choice = choose_retries(plan, wanted, committed_units(storage, LATENTS))
        plan = freeze_retry(plan, config, choice, scratch)
        part = Part(units=retry_units(plan))
        on_latents(_latent_pass(storage, plan, config, scratch, style, part, at_work))
        _text_pass(storage, plan, DEFAULT_SET, config, scratch, style, part, at_work)
        counts = count_dataset(storage, plan, DEFAULT_SET)
        set_totals(storage, plan, counts)
    return Retried(choice, counts)


def _latent_pass(
    storage: Storage, plan: Plan, config: PrepConfig, scratch: Path, style: Style, part: Part, at_work: AtWork
) -> dict[str, Any]:
    """Its figures; empty where nothing was left to do."""
    pending = pending_units(storage, plan, LATENTS, part.units)
    info = find_info(storage)
    if info is not None:
        check_settled_identity(info, config, f"the dataset at {storage.url()}", plan)
    if not pending.units:
        LOG.info("latents: all %s done", counted(len(chosen_units(plan, part.units)), "unit is", "units are"))
        return {}
    config = settle_precision(storage, config, measure_apart)
    while pending.units:
        num_units = len(pending.units)
        with show_progress("latents", num_units=num_units, num_clips=pending.num_candidates, style=style) as progress:
            at_work.progress = progress.facts
            units = at_work.claim(LATENTS, pending.units)
            build_latents(storage, plan, units, config, scratch, progress=progress)
        # What is left is being done by a build beside this one; if that one ends without it, it is done here.
        at_work.wait_for_others(LATENTS, pending.units)
        pending = pending_units(storage, plan, LATENTS, part.units)
    _release_memory()
    return progress.facts()


def _text_pass(
    storage: Storage, plan: Plan, set_name: str, config: PrepConfig, scratch: Path, style: Style, part: Part,
    at_work: AtWork,
) -> None:  # fmt: skip
    chosen = set(chosen_units(plan, part.units))
    done = committed_units(storage, LATENTS) & chosen
    there = committed_units(storage, text_kind(set_name)) & chosen
    if not done and part.only == "text":
        fix = "`wanprep build-shards CONFIG --only latents` first: captions are chosen by the windows of the latents"
        raise UserError(f"{storage.url()}: no finished latents to write captions for", fix=fix)
    units = sorted(done - there)
    info = find_info(storage)
    if info is not None and set_name in info.text_sets:
        check_settled_texts(info.text_sets[set_name].identity, config, f"text set {set_name!r} at {storage.url()}")
    if not units and done:
        LOG.info("text set %r: all %s done", set_name, counted(len(there), "unit is", "units are"))
        return
    kind = text_kind(set_name)
    with show_progress(f"text {set_name}", num_units=len(units), num_clips=None, style=style) as progress:
        at_work.progress = progress.facts

        failed: set[int] = set()

        def on_unit(unit: int, counts: TextCounts | None) -> None:
            if counts is None:
                failed.add(unit)
                return
            if counts.without_words:
                LOG.warning(
                    "text set %r: unit %d: %s an empty caption",
                    set_name,
                    unit,
                    counted(counts.without_words, "sample has", "samples have"),
                )
            progress.unit(unit)

        while units:
            claimed = at_work.claim(kind, units)
            build_texts(storage, set_name, claimed, config, scratch, on_unit=on_unit, on_worker=progress.worker)
            units = [unit for unit in at_work.wait_for_others(kind, units) if unit not in failed]
    if failed:
        what = counted(len(failed), "unit has", "units have")
        raise WorkLeftUndone(
            f"text set {set_name!r}: {what} no texts yet, because an internal error ended one of its texts; all others "
            "are done",
            fix="read the tracebacks above, then run the same command: it embeds these units alone",
        )


def _release_memory() -> None:
    """Return the frames' memory to the system before the text encoder allocates its own, where malloc is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _working(
    storage: Storage, output: str, passes: set[str], part: Part, if_busy: IfBusy
) -> Iterator[tuple[Path, AtWork]]:
    """A scratch folder and the note that says who is at work; files that dead writers left are removed around it."""
    units = (min(part.units), max(part.units)) if part.units else None
    with (
        _storage_errors(output), scratch_folder(output) as scratch, _terminate_cleanly(),
        AtWork(storage, output, scratch, passes, units) as at_work,
    ):  # fmt: skip
        at_work.begin(if_busy)
        if isinstance(storage, LocalStorage):
            storage.drop_dead_temporaries()
        try:
            yield scratch, at_work
        except (FileNotFoundError, UserError):  # UserError: a reader found its dataset missing
            if scratch.exists():
                raise
            fix = "mount it again, then run the same command: it resumes at the last unit"
            raise UserError(f"{output}: the disk under it is gone", fix=fix) from None
        if isinstance(storage, LocalStorage):
            sweep_committed(storage)


@contextmanager
def _terminate_cleanly() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C: scratch files are removed, the open unit is dropped, committed units stay."""

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the unwinding short
        abandon_waits()
        LOG.warning("asked to stop: the open unit is dropped, the next run does it again")
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread, where no signal handler can be set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _storage_errors(output: str) -> Iterator[None]:
    """A full or vanished disk is the user's to fix: one message, no traceback; committed work is intact."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            fix = "free some space or move the output, then run the same command: it resumes at the last unit"
            full = UserError(f"no space left while writing to {output}", fix=fix)
            full.exit_code = EXIT_TEMPORARY
            raise full from None
        if error.errno in _GONE:
            fix = "fix it, then run the same command: it resumes at the last unit"
            raise UserError(f"{output}: {error.strerror}: {error.filename}", fix=fix) from None
        raise
