"""`wantrain report`: a run as one page, while it is running or finished; it needs no network and no server."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.console import counted, duration_words
from shards.errors import UserError
from shards.files.write_file import named_errors, write_text
from shards.page.html_page import Child, Html, Section, join, number, page, table, tag
from shards.read.dataset import Dataset, open_dataset
from shards.show.member import preview_bytes
from train.checkpoint import PIN_FILE, read_pin
from train.config.train import dataset_roots
from train.data.loader import select_samples
from train.data.weights import expected_shares, make_order, real_shares
from train.report.charts import loss_charts, memory_charts, noise_charts, speed_charts
from train.report.curves import Hard, Levels, hard_samples, look_up_levels
from train.report.pictures import Pictures, pictures_section
from train.report.read_run import Run

DATA_WAIT_SHARE = 0.05
"""More than this of a step spent waiting for data is said at the top."""


def summarise(run: Run, levels: Levels, num_hard: int = 20, dataset: Dataset | None = None) -> dict[str, Any]:
    """The page's numbers as plain values; shares of `data.weights` where the dataset is given."""
    columns, steps = run.steps.numbers, len(run.steps)
    seconds = float(np.nansum(columns["seconds"]))
    best = min((e for e in run.evaluations if e["mean"] is not None), key=lambda e: e["mean"], default=None)
    last = int(columns["step"][-1]) if steps else 0
    return {
        "run": str(run.folder),
        "step": last,
        "max_steps": run.config.max_steps,
        "samples_seen": int(run.steps.uses.sum()),
        "tokens_seen": int(np.nansum(columns["tokens"])),
        "seconds": seconds,
        "loss": _last(columns["loss"]),
        "held_out_first": run.evaluations[0]["mean"] if run.evaluations else None,
        "held_out_last": run.evaluations[-1]["mean"] if run.evaluations else None,
        "held_out_best": best["mean"] if best else None,
        "best_step": best["step"] if best else None,
        "tokens_per_second": _ratio(np.nansum(columns["tokens"]), seconds),
        "data_wait_share": _ratio(np.nansum(columns["data_wait_seconds"]), seconds),
        "memory_gib": _largest(columns["memory_gib"]),
        "planned_gib": run.history.planned_gib,
        "skipped_updates": [skip._asdict() for skip in run.steps.skips],
        "substituted": [one._asdict() for one in run.steps.substitutes],
        "events": [event._asdict() for event in run.history.events],
        "checkpoints": [str(path) for path, _ in run.states],
        "highest_losses": [hard._asdict() for hard in hard_samples(run.steps, levels, num_hard)],
        "weights": weight_shares(run, dataset) if dataset is not None and run.config.data.weights else None,
    }


def weight_shares(run: Run, dataset: Dataset) -> list[dict[str, Any]]:
    """Of each glob of `data.weights`: its share of the samples, and of the training, expected and so far."""
    config, weights = run.config, run.config.data.weights
    ordinals, _ = select_samples(dataset, config.data, hold_out_one=config.eval is not None)
    expected = expected_shares(dataset, ordinals, make_order(dataset, ordinals, config), weights)
    uses = dict(zip(run.steps.keys, run.steps.uses.tolist(), strict=True))
    real = [share.seen for share in real_shares(dataset, uses, weights)] if uses else [None] * len(expected)
    return [
        {"glob": one.glob, "weight": one.weight, "samples": one.samples, "expected": one.seen, "real": seen}
        for one, seen in zip(expected, real, strict=True)
    ]


def write_run_report(
    run: Run, out: Path, *, budget_bytes: int = 3 << 20, num_hard: int = 20, open_data: bool = True
) -> list[str]:
    """Write the page, complete or not at all, and return what it says at its top.

    Args:
        budget_bytes: of pictures inside the page; what is beyond is linked.
        num_hard: samples of the highest losses that are shown.
        open_data: show their strips and captions, and shares by weight, which need the dataset.
    """
    levels = look_up_levels(run.steps, run.config)
    dataset, note = open_for(run) if open_data else (None, None)
    summary = summarise(run, levels, num_hard, dataset)
    pictures = Pictures(out, budget_bytes)
    hard = hard_samples(run.steps, levels, num_hard)
    shown = pictures_section(pictures, run.pictures, run.folder)
    made = [
        shown,
        Section("overview", "Overview", join((_facts(run, summary), _findings(run, summary),
                                                     _weights(summary)))),
        Section("loss", "Loss", loss_charts(run)),
        Section("noise", "By noise level", noise_charts(run, levels)),
        Section("speed", "Speed", speed_charts(run)),
        Section("memory", "Memory and updates", memory_charts(run)),
        Section("hard", "Highest losses", _hard(run, hard, pictures, dataset, note)),
        Section("resume", "Resume points", _resume(run)),
        Section("config", "Config", tag("div", tag("pre", run.config_text), class_="scroll", tabindex=0, role="region",
                                        aria_label="config.yaml")),
    ]  # fmt: skip
    name = "/".join(run.folder.resolve().parts[-2:])
    text = page(
        f"Training run {name}",
        [section for section in made if section is not None],
        lead=_lead(run, summary),
        styles=("run.css",),
        sources={"media-src": "data:"},
        footer=f"From {run.folder}, made by wantrain report; make it again at any time, also while the run continues.",
    )
    with named_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return [str(line) for _, line in _notes(run, summary)]


def _lead(run: Run, summary: Mapping[str, Any]) -> Html:
    base = run.history.base or run.config.model.checkpoint or "random weights"
    return tag("p", f"Step {summary['step']:,} of {run.config.max_steps:,}. Base: {base}.")


def _facts(run: Run, summary: Mapping[str, Any]) -> Html:
    first, last, best = (summary[f"held_out_{name}"] for name in ("first", "last", "best"))
    change = f"{first:.4f} → {last:.4f} ({100 * (last / first - 1):+z.1f} %)" if first and last else None
    share = summary["data_wait_share"]
    left = _seconds_left(run)
    pairs: list[tuple[str, Child]] = [
        ("Steps", f"{summary['step']:,} of {run.config.max_steps:,}"),
        ("Time in steps", duration_words(summary["seconds"])),
        ("Left, about", duration_words(left) if left else None),
        ("Training loss, last", None if summary["loss"] is None else f"{summary['loss']:.4f}"),
        ("Held-out loss", change),
        ("Best held-out", f"{best:.4f} at step {summary['best_step']:,}" if best else None),
        ("Samples seen", f"{summary['samples_seen']:,} ({len(run.steps.keys):,} different)"),
        ("Video tokens a second", number(summary["tokens_per_second"]) if summary["tokens_per_second"] else None),
        ("Waiting for data", None if share is None else f"{100 * share:.1f} %"),
        ("Memory, peak", _memory_words(summary)),
        ("Skipped updates", f"{len(run.steps.skips):,}"),
    ]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value), class_="facts")


def _memory_words(summary: Mapping[str, Any]) -> str | None:
    peak, planned = summary["memory_gib"], summary["planned_gib"]
    if peak is None:
        return None
    return f"{peak:.1f} GiB" + (f" of {planned:.1f} planned" if planned else "")


def _findings(run: Run, summary: Mapping[str, Any]) -> Html:
    notes = _notes(run, summary)
    return tag("ul", *(tag("li", line, class_=f"is-{kind}") for kind, line in notes), class_="findings")


def _notes(run: Run, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What should be seen first: (bad, warn or good; words)."""
    notes: list[tuple[str, str]] = []
    if not len(run.steps):
        return [("warn", "No step is finished yet.")]
    skips, substitutes = run.steps.skips, run.steps.substitutes
    if bad := int((~np.isfinite(run.steps.numbers["loss"])).sum()):
        notes.append(("bad", f"The loss was not a finite number in {counted(bad, 'step')}."))
    if skips:
        blocks = sorted({skip.block for skip in skips})
        where = ", ".join(blocks[:3]) + (" …" if len(blocks) > 3 else "")
        notes.append(("warn", f"{counted(len(skips), 'update was', 'updates were')} skipped for overflow, "
                              f"the last at step {skips[-1].step:,} ({where})."))  # fmt: skip
    if substitutes:
        notes.append(
            ("bad", f"{counted(len(substitutes), 'sample')} could not be read and others were taken: see below.")
        )
    share = summary["data_wait_share"]
    if share is not None and share > DATA_WAIT_SHARE:
        notes.append(("warn", f"{100 * share:.0f} % of the time went into waiting for data: raise data.workers or "
                              "data.prefetch_steps, or bring the shards nearer."))  # fmt: skip
    later = [e for e in run.evaluations if summary["best_step"] is not None and e["step"] > summary["best_step"]]
    if len(later) >= 2:
        notes.append(("warn", f"The held-out loss has not fallen below that of step {summary['best_step']:,} in "
                              f"{len(later)} evaluations: checkpoint.export: best takes that step."))  # fmt: skip
    first, last = summary["held_out_first"], summary["held_out_last"]
    if first and last and last < first and len(later) < 2:
        notes.append(("good", f"The held-out loss fell by {100 * (1 - last / first):.1f} % since the start."))
    if len(run.steps) and not len(run.steps.slots.step):
        notes.append(("warn", "metrics.jsonl has no losses by slot (a run of an earlier version): curves by noise "
                              "level and the highest losses are left out."))  # fmt: skip
    if not run.history.events:
        notes.append(("warn", "The run has no events.jsonl (an earlier version made it): starts, stops, device "
                              "and plan are in logs/rank-0.log alone."))  # fmt: skip
    return notes


def _weights(summary: Mapping[str, Any]) -> Html | None:
    if not summary["weights"]:
        return None
    rows = []
    for one in summary["weights"]:
        shares = (one[name] for name in ("samples", "expected", "real"))
        words = ("" if share is None else f"{100 * share:.1f} %" for share in shares)
        rows.append((one["glob"], f"{one['weight']:g}", *words))
    head = ("samples", "weight", "share of the samples", "of the training, expected", "so far")
    return table(head, rows, "Weights")


def _hard(run: Run, hard: Sequence[Hard], pictures: Pictures, dataset: Dataset | None, note: str | None) -> Html:
    if not hard:
        return tag("p", "No losses by slot were recorded.")
    words = (
        "Samples whose loss was highest for the noise and the mode that they were drawn with: 2 is twice the typical "
        "loss of its kind at that time. Look at them: cuts, captions of something else, test cards, noise."
    )
    cards = [_hard_card(run, one, place, dataset, pictures) for place, one in enumerate(hard, start=1)]
    return join(
        (
            tag("p", words, class_="quiet"),
            tag("p", note) if note else None,
            tag("ol", *cards, class_="hard", role="list"),
        )
    )


def _hard_card(run: Run, hard: Hard, place: int, dataset: Dataset | None, pictures: Pictures) -> Html:
    clip = caption = strip = None
    if dataset is not None:
        try:
            sample = dataset.samples[dataset.ordinal(hard.key)]
            clip = f"{sample.clip_id} from {sample.start_ms / 1000:.2f} s"
            caption = str(dataset.text_meta(hard.key)["captions"][0])
            content = preview_bytes(dataset, hard.key)
            source = pictures.data(content, "image/jpeg") if content else None
            strip = tag("img", src=source, alt=f"frames of {hard.key}") if source else None
        except UserError as error:
            caption = f"({error})"
    times = "once" if hard.uses == 1 else f"{hard.uses:,} times"
    facts = f"{hard.ratio:.2f} × typical, mean loss {hard.loss:.4f}, seen {times}"
    worst = f"wantrain show-step {shlex.quote(f'{run.folder}/config.yaml')} {hard.worst_step}"
    return tag(
        "li", strip, tag("h3", f"{place} · {clip or hard.key}"),
        tag("p", caption, class_="prompt") if caption else None,
        tag("p", facts), tag("p", tag("code", hard.key), class_="quiet") if clip else None,
        tag("p", f"highest at step {hard.worst_step:,}, {hard.worst_ratio:.2f} × typical: ", tag("code", worst),
            class_="quiet"),
        id=f"hard-{place}",
    )  # fmt: skip


def open_for(run: Run) -> tuple[Dataset | None, str | None]:
    """The dataset as a run reads it; or what to say where it cannot be opened."""
    data = run.config.data
    pin = read_pin(run.folder) if (run.folder / PIN_FILE).exists() else None
    try:
        return open_dataset(dataset_roots(data), data.text_set, pin=pin), None
    except UserError as error:
        return None, f"Strips and captions are left out: the dataset could not be opened: {error}"


def _resume(run: Run) -> Html:
    events = [(event.time, event.what, f"{event.step:,}") for event in run.history.events]
    rows: list[Sequence[Child]] = []
    for path, state in reversed(run.states):
        kept = " (best)" if state.best_step == state.step else ""
        pending = f"; a resume begins with {' and '.join(state.owed)}" if state.owed else ""
        rows.append(
            (
                f"{state.step:,}",
                f"{path.name}{kept}{pending}",
                state.updates,
                state.epoch,
                duration_words(state.seconds),
            )
        )
    command = tag("code", f"wantrain fit {shlex.quote(f'{run.folder}/config.yaml')}")
    return join(
        (
            tag("p", command, " resumes from the newest; ", tag("code", "--resume PATH"), " from another."),
            table(("step", "checkpoint", "updates", "epoch of the next batch", "time so far"), rows, "Checkpoints"),
            table(("time", "what", "step"), events, "Beginnings, resumes and stops"),
        )
    )


def _seconds_left(run: Run) -> float | None:
    """By the median of the last steps; None when nothing is left or nothing is known."""
    seconds = run.steps.numbers["seconds"][-200:]
    if not len(seconds):
        return None
    left = run.config.max_steps - int(run.steps.numbers["step"][-1])
    return left * float(np.median(seconds)) if left > 0 else None


def _ratio(part: float, total: float) -> float | None:
    return float(part) / total if total else None


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None


def _largest(values: np.ndarray) -> float | None:
    return float(np.nanmax(values)) if np.isfinite(values).any() else None
