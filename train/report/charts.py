"""Charts and tables of a run's page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.page.charts import Line, Mark, line_chart, spark
from shards.page.html_page import Child, Html, join, table, tag
from train.config.train import TrainConfig
from train.report.curves import MODES, NUM_LEVELS, Curve, Levels, bucket_speeds, level_curves, smooth, thin
from train.report.read_run import Run

MAX_MARKS = 6
SHOWN_LEVELS = 5


def loss_charts(run: Run) -> Html:
    """Loss, held-out loss, learning rate, gradient norm."""
    columns, marks = run.steps.numbers, _marks(run)
    step, loss = columns["step"], columns["loss"]
    lines = [_line("each step", thin(step, loss)), _line("mean", smooth(step, loss))] if len(step) else []
    held = _held_out(run, lambda e: e["mean"])
    modes = [_held_out(run, lambda e, m=mode: _mean(e[m])) for mode in ("t2v", "i2v")]
    charts = [
        line_chart("Training loss", lines, "step", "loss", marks=marks),
        line_chart(
            "Held-out loss",
            [_line("mean", held), *(_line(name, curve) for name, curve in zip(MODES, modes, strict=True))],
            "step", "loss", marks=marks,
        ),
        line_chart("Learning rate", [_line("rate", thin(step, columns["lr"]))], "step", "rate", from_zero=True),
        line_chart(
            "Gradient norm, before clipping", [_line("norm", thin(step, columns["grad_norm"]))], "step", "norm",
            from_zero=True, marks=marks,
        ),
    ]  # fmt: skip
    words = "A loss of training depends on what noise the step drew; the held-out one is always taken on the same."
    return join((tag("p", words, class_="quiet"), tag("div", *charts, class_="charts")))


def noise_charts(run: Run, levels: Levels) -> Html:
    """Training and held-out loss apart by noise level and mode."""
    charts: list[Html] = []
    names = _fifth_names(run.config)
    for mode, image_to_video in zip(MODES, (False, True), strict=True):
        curves = level_curves(run.steps, levels, image_to_video)
        lines = [_line(name, curve) for name, curve in zip(names, curves, strict=True) if curve.x]
        charts.append(line_chart(f"Training loss, {mode}, by noise level", lines, "step", "loss"))
    for mode in ("t2v", "i2v"):
        taken = [e for e in run.evaluations if e[mode]]
        if not taken:
            continue
        sigmas = taken[-1]["sigmas"]
        shown = sorted({round(n * (len(sigmas) - 1) / (SHOWN_LEVELS - 1)) for n in range(SHOWN_LEVELS)})
        lines = [
            Line(
                f"σ {sigmas[at]:.2f}",
                [e["step"] for e in taken],
                [_change(e[mode][at], taken[0][mode][at]) for e in taken],
            )
            for at in shown
        ]
        caption = f"Held-out loss, {mode.upper()}, change since the first evaluation by noise level"
        charts.append(line_chart(caption, lines, "step", "%", marks=_marks(run)))
    words = (
        "Low noise is fine detail, high noise is what is where. A LoRA that gets better at one and worse at the other "
        "shows here and not in the mean."
    )
    return join((tag("p", words, class_="quiet"), tag("div", *charts, class_="charts"), _level_table(run)))


def _level_table(run: Run) -> Html | None:
    rows: list[Sequence[Child]] = []
    for mode in ("t2v", "i2v"):
        taken = [e for e in run.evaluations if e[mode]]
        for at, sigma in enumerate(taken[-1]["sigmas"] if taken else ()):
            values = [e[mode][at] for e in taken]
            change = _change(values[-1], values[0])
            words = f"{mode.upper()} at σ {sigma:.2f}: from {values[0]:.4f} to {values[-1]:.4f}"
            rows.append(
                (f"{mode.upper()} σ {sigma:.2f}", values[0], min(values), values[-1],
                 None if change is None else f"{change:+z.1f} %", spark(values, words))
            )  # fmt: skip
    if not rows:
        return None
    head = ("mode and noise level", "first", "lowest", "last", "change", "course")
    return table(head, rows, "Held-out loss at every noise level")


def speed_charts(run: Run) -> Html:
    """Throughput, waiting for data, FLOPs; a table by bucket."""
    columns, marks = run.steps.numbers, _marks(run)
    step, seconds = columns["step"], columns["seconds"]
    tokens = columns["tokens"] / np.maximum(seconds, 1e-9)
    wait = 100 * columns["data_wait_seconds"] / np.maximum(seconds, 1e-9)
    charts = [
        line_chart(
            "Throughput", [_line("each step", thin(step, tokens)), _line("mean", smooth(step, tokens))], "step",
            "video tokens a second", from_zero=True, marks=marks,
        ),
        line_chart(
            "Waiting for data", [_line("share of the step", thin(step, wait))], "step", "% of the step",
            from_zero=True, marks=marks,
        ),
        line_chart("Executed", [_line("TFLOP/s", thin(step, columns["tflops"]))], "step", "TFLOP/s", from_zero=True),
    ]  # fmt: skip
    if np.isfinite(columns["mfu"]).any():
        mfu = [_line("MFU", thin(step, 100 * columns["mfu"]))]
        charts.append(line_chart("Model FLOPs utilisation", mfu, "step", "% of the GPU's peak", from_zero=True))
    head = ("bucket", "steps", "seconds a step, median", "95 % are below", "tokens a second")
    speeds = table(head, bucket_speeds(run.steps), "By bucket")
    return join((tag("div", *charts, class_="charts"), speeds))


def memory_charts(run: Run) -> Html:
    """Memory against the plan; the loss scale; what was skipped or substituted."""
    columns = run.steps.numbers
    step = columns["step"]
    lines = [_line("peak so far", thin(step, columns["memory_gib"]))]
    if run.history.planned_gib is not None and len(step):
        ends = [float(step[0]), float(step[-1])]
        lines.append(Line("planned", ends, [run.history.planned_gib] * 2))
    words = f"Device: {run.history.device}." if run.history.device else ""
    if run.history.device and run.history.device.startswith("cpu"):
        words += " On a CPU the peak is that of the whole process; the plan counts a GPU's."
    parts: list[Child] = [tag("p", words, class_="quiet"), tag("div",
        line_chart("Memory", lines, "step", "GiB", from_zero=True),
        line_chart("Loss scale", [_line("scale", thin(step, columns["loss_scale"]))], "step", "", from_zero=True)
        if len(set(columns["loss_scale"].tolist())) > 1 else None, class_="charts")]  # fmt: skip
    if run.steps.skips:
        parts.append(table(("step", "overflow in", "loss scale after"), [(f"{s.step:,}", s.block, s.loss_scale)
                            for s in run.steps.skips[-200:]], "Skipped updates (the last 200)"))  # fmt: skip
    else:
        parts.append(tag("p", "No update was skipped."))
    if run.steps.substitutes:
        rows = [(f"{s.step:,}", s.key, s.taken) for s in run.steps.substitutes[-200:]]
        parts.append(table(("step", "unreadable", "taken instead"), rows, "Substituted samples (the last 200)"))
    return join(parts)


def _marks(run: Run) -> list[Mark]:
    steps = [event.step for event in run.history.events if event.what == "resumed"]
    return [Mark(step, "resumed") for step in steps[-MAX_MARKS:] if step]


def _line(name: str, curve: Curve) -> Line:
    return Line(name, curve.x, curve.y)


def _held_out(run: Run, value: Any) -> Curve:
    return Curve(
        [e["step"] for e in run.evaluations], [value(e) if e["mean"] is not None else math.nan for e in run.evaluations]
    )


def _fifth_names(config: TrainConfig) -> list[str]:
    """`σ 0.00–0.56` of each fifth of the noise levels, as the objective draws them."""
    import torch

    from train.objective import sample_sigma, sigma_density

    edges = torch.linspace(0, 1, NUM_LEVELS + 1, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    sigmas = sample_sigma(edges, sigma_density(config.objective)).tolist()
    return [f"σ {low:.2f}–{high:.2f}" for low, high in itertools.pairwise(sigmas)]


def _change(now: float, first: float) -> float | None:
    return 100 * (now / first - 1) if first and math.isfinite(now) and math.isfinite(first) else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
