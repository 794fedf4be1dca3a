"""From a run's columns to what a person looks at: curves that keep their extremes, losses by noise level, hard clips.

A slot's noise level and mode are drawn by (seed, step, slot) alone, so they are looked up, not recorded. Importing it
imports no torch.
"""

from __future__ import annotations

import itertools
import math
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from train.config.train import TrainConfig
from train.data.draws import Purpose, draw_quantile, draw_uniform
from train.report.read_run import Steps

MODES = ("T2V", "I2V")
NUM_LEVELS = 5
"""Noise levels that training losses are grouped by: fifths of what is drawn."""
MAX_DRAWN_SLOTS = 200_000
"""Beyond these, complete steps are left out evenly: computing one draw takes ten microseconds."""
WINDOW_SLOTS = 40
"""Slots of one mode and noise level that a typical loss is taken over, at least."""


class Curve(NamedTuple):
    """Points of a line."""

    x: list[float]
    y: list[float]


class Levels(NamedTuple):
    """What each recorded slot was drawn to be; columns as `Steps.slots`, of the steps that were looked up."""

    rows: np.ndarray
    """Places in `Steps.slots`."""
    quantile: np.ndarray
    """0 … 1, lowest noise first."""
    image_to_video: np.ndarray
    """bool."""
    every: int
    """One step in so many was looked up."""


class Hard(NamedTuple):
    """A sample by its losses."""

    key: str
    uses: int
    ratio: float
    """Mean of loss ÷ the typical loss of the same mode and noise level at that time of the run, drawn towards 1."""
    loss: float
    """Mean."""
    worst_step: int
    worst_ratio: float


def thin(x: np.ndarray, y: np.ndarray, most: int = 400) -> Curve:
    """At most `most` points: of each interval its lowest and its highest, in their order, so that no spike is lost.

    Where an interval holds a NaN beside numbers, the numbers stay; an interval of NaN alone is one NaN.
    """
    if len(x) <= most:
        return Curve(x.tolist(), y.tolist())
    edges = np.linspace(0, len(x), max(1, most // 2) + 1).astype(int)
    places: list[int] = []
    for low, high in itertools.pairwise(edges):
        part = y[low:high]
        if not np.isfinite(part).any():
            places.append(int(low))
            continue
        filled = np.where(np.isfinite(part), part, np.nan)
        places += sorted({int(low + np.nanargmin(filled)), int(low + np.nanargmax(filled))})
    return Curve(x[places].tolist(), y[places].tolist())


def smooth(x: np.ndarray, y: np.ndarray, num_points: int | None = None) -> Curve:
    """Means over intervals of equal length, at their middle; NaN does not count. By default ten values an interval
    or more, at most sixty intervals."""
    num_points = num_points or max(5, min(60, len(x) // 10))
    edges = np.unique(np.linspace(0, len(x), min(num_points, len(x)) + 1).astype(int))
    points = [(float(x[low:high].mean()), _mean(y[low:high])) for low, high in itertools.pairwise(edges)]
    return Curve([a for a, _ in points], [b for _, b in points])


def look_up_levels(steps: Steps, config: TrainConfig) -> Levels:
    """Noise level and mode of the recorded slots."""
    slots = steps.slots
    all_steps = np.unique(slots.step)
    every = max(1, math.ceil(len(slots.step) / MAX_DRAWN_SLOTS))
    rows = np.flatnonzero(np.isin(slots.step, all_steps[::every]))
    share, strata = config.objective.image_to_video_share, config.num_strata
    frames = [bucket.rpartition("×")[2] for bucket in steps.buckets]
    moving = {int(step): many != "1" for step, many in zip(steps.numbers["step"], frames, strict=True)}
    quantile = np.empty(len(rows))
    mode = np.empty(len(rows), dtype=bool)
    for place, row in enumerate(rows.tolist()):
        step, slot = int(slots.step[row]), int(slots.slot[row])
        quantile[place] = draw_quantile(config.seed, step, slot, strata)
        mode[place] = moving[step] and draw_uniform(config.seed, step, slot, Purpose.MODE) < share
    return Levels(rows, quantile, mode, every)


def level_curves(steps: Steps, levels: Levels, image_to_video: bool) -> list[Curve]:
    """Training loss of each fifth of noise levels, lowest first, smoothed over steps."""
    slots = steps.slots
    curves = []
    for level in range(NUM_LEVELS):
        chosen = levels.rows[(levels.image_to_video == image_to_video) & (_fifth(levels.quantile) == level)]
        curves.append(smooth(slots.step[chosen].astype(float), slots.loss[chosen], _num_windows(len(chosen))))
    return curves


def hard_samples(steps: Steps, levels: Levels, most: int) -> list[Hard]:
    """The samples whose losses were highest for their noise level and mode, hardest first.

    A loss says little by itself: at low noise it is several times what it is at high noise. So each is divided by the
    median of its kind in its interval of the run.
    """
    slots = steps.slots
    step, key, loss = slots.step[levels.rows], slots.key[levels.rows], slots.loss[levels.rows]
    good = np.isfinite(loss)
    step, key, loss = step[good], key[good], loss[good]
    if not len(loss):
        return []
    kind = _fifth(levels.quantile[good]) + NUM_LEVELS * levels.image_to_video[good]
    num_intervals = max(1, len(loss) // (2 * NUM_LEVELS * WINDOW_SLOTS))
    interval = np.minimum((np.arange(len(loss)) * num_intervals) // len(loss), num_intervals - 1)
    group = interval * 2 * NUM_LEVELS + kind
    typical = {int(g): float(np.median(loss[group == g])) for g in np.unique(group)}
    ratio = loss / np.maximum([typical[int(g)] for g in group], 1e-12)
    return _ranked(steps, step, key, loss, ratio, most)


def _ranked(steps: Steps, step: Any, key: Any, loss: Any, ratio: Any, most: int) -> list[Hard]:
    count = np.bincount(key, minlength=len(steps.keys))
    seen = np.flatnonzero(count)
    # One draw more, of the typical loss: a sample that was seen once does not lead by luck alone.
    mean_ratio = (np.bincount(key, ratio, len(steps.keys))[seen] + 1) / (count[seen] + 1)
    mean_loss = np.bincount(key, loss, len(steps.keys))[seen] / count[seen]
    order = np.argsort(-mean_ratio, kind="stable")[:most]
    found = []
    for place in order.tolist():
        own = np.flatnonzero(key == seen[place])
        worst = own[np.argmax(ratio[own])]
        found.append(
            Hard(
                steps.keys[int(seen[place])], int(steps.uses[seen[place]]), float(mean_ratio[place]),
                float(mean_loss[place]), int(step[worst]), float(ratio[worst]),
            )
        )  # fmt: skip
    return found


def uses_of(steps: Steps, levels: Levels, pattern: str) -> list[dict[str, Any]]:
    """Every recorded use of the samples whose key is `pattern` or matches it as a glob, in the order of steps."""
    wanted = [place for place, key in enumerate(steps.keys) if key == pattern or fnmatchcase(key, pattern)]
    slots = steps.slots
    return [
        {
            "step": int(slots.step[row]),
            "slot": int(slots.slot[row]),
            "key": steps.keys[int(slots.key[row])],
            "mode": MODES[int(image_to_video)].lower(),
            "quantile": round(float(quantile), 4),
            "loss": float(slots.loss[row]) if math.isfinite(slots.loss[row]) else None,
        }
        for row, quantile, image_to_video in zip(levels.rows, levels.quantile, levels.image_to_video, strict=True)
        if slots.key[row] in wanted
    ]


def bucket_speeds(steps: Steps) -> list[tuple[str, int, float, float, float]]:
    """Of each bucket: name, steps, median and 95th percentile of seconds a step, median of tokens a second."""
    names = np.array(steps.buckets)
    seconds, tokens = steps.numbers["seconds"], steps.numbers["tokens"]
    found = []
    for name in sorted(set(steps.buckets)):
        own = names == name
        speed = tokens[own] / np.maximum(seconds[own], 1e-9)
        found.append(
            (
                name,
                int(own.sum()),
                float(np.median(seconds[own])),
                float(np.percentile(seconds[own], 95)),
                float(np.median(speed)),
            )
        )
    return found


def _fifth(quantile: np.ndarray) -> np.ndarray:
    return np.minimum((quantile * NUM_LEVELS).astype(int), NUM_LEVELS - 1)


def _num_windows(num_slots: int) -> int:
    """As many points as leave 20 slots to each, between 10 and 60."""
    return max(10, min(60, num_slots // 20))


def _mean(values: np.ndarray) -> float:
    good = values[np.isfinite(values)]
    return float(good.mean()) if len(good) else math.nan
