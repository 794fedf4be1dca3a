"""Tables for people: a step's slots, the doctor's findings, ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.config.train import TrainConfig
from train.data.loader import plan_step, select_samples
from train.data.weights import make_order
from train.precision import FOLDED, FP16_MAX

FOLD_FROM = 4.0
"""Times below fp16's largest number from which an output counts as near it: training moves it."""


def describe_slots(config: TrainConfig, step: int) -> list[dict[str, Any]]:
    """What each slot of a step is, as JSON values: a function of the seed, the step and the dataset's revision."""
    import torch

    from train.checkpoint import PIN_FILE, read_pin
    from train.data.open import open_data
    from train.objective import loss_weight, model_timestep, sample_sigma, sigma_density

    folder = Path(config.output)
    dataset = open_data(config, read_pin(folder) if (folder / PIN_FILE).exists() else None)
    ordinals, _ = select_samples(dataset, config.data, hold_out_one=config.eval is not None)
    order = make_order(dataset, ordinals, config)
    batch = order.batch(order.position_of_step(step))
    places = [ordinals[place] for place in batch.ordinals]
    density = sigma_density(config.objective)
    slots = []
    for plan in plan_step(config, dataset, places, step, range(config.data.global_batch)):
        sample, draws = dataset.samples[plan.ordinal], plan.draws
        sigma = sample_sigma(torch.tensor(draws.sigma_quantile, dtype=torch.float64), density)
        caption = config.data.null_caption if draws.drop_caption else draws.caption
        slots.append(
            {
                "slot": plan.slot,
                "epoch": batch.epoch,
                "key": sample.key,
                "clip": sample.clip_id,
                "start_seconds": sample.start_ms / 1000,
                "frames": sample.frames,
                "width": sample.width,
                "height": sample.height,
                "mode": "i2v" if draws.image_to_video else "t2v",
                "sigma": float(sigma),
                "timestep": float(model_timestep(sigma)),
                "weight": float(loss_weight(sigma, config.objective.weighting, density)),
                "caption": caption,
                "text": "" if draws.drop_caption else dataset.text_meta(plan.ordinal)["captions"][draws.caption],
            }
        )
    return slots


def print_slots(slots: Sequence[Mapping[str, Any]]) -> None:
    """A step's slots."""
    table = Table(title=f"epoch {slots[0]['epoch']}, {len(slots)} slots")
    for name in ("slot", "clip", "window", "size", "mode", "timestep", "caption", "text"):
        table.add_column(name, overflow="fold")
    for slot in slots:
        end = slot["start_seconds"] + slot["frames"] / 24
        size = f"{slot['width']}×{slot['height']}×{slot['frames']}"
        window = f"{slot['start_seconds']:.2f}–{end:.2f} s"
        text = slot["text"] if len(slot["text"]) <= 60 else slot["text"][:59] + "…"
        cells = (
            slot["slot"],
            slot["clip"],
            window,
            size,
            slot["mode"],
            f"{slot['timestep']:.1f}",
            slot["caption"],
            text,
        )
        table.add_row(*map(str, cells))
    _print(table)


def print_ranges(ranges: Mapping[str, float]) -> None:
    """Largest magnitudes, and how far below fp16's largest number the linears stay."""
    from train.precision import fp16_headroom

    headroom = fp16_headroom(ranges)
    table = Table(title=f"largest |output| in fp32; fp16 ends at {FP16_MAX:,.0f}")
    for name in ("module", "largest", "times below fp16's end"):
        table.add_column(name)
    for name, largest in ranges.items():
        table.add_row(name, f"{largest:.4g}", f"{headroom[name]:.3g}" if name in headroom else "(fp32 stream)")
    _print(table)
    tight = min(headroom, key=lambda name: headroom[name])
    verdict = "fits" if headroom[tight] > 1 else "does NOT fit"
    print(f"fp16 {verdict}: the nearest is {tight}, {headroom[tight]:.3g} times below")
    beyond = [name for name, factor in headroom.items() if factor < FOLD_FROM]
    folded = [name for name in beyond if name.split(".", 2)[2] in FOLDED]
    if folded:
        blocks = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in folded))
        print(f"near the end are outputs that a run folds a power of two into when they overflow: {blocks}")
    if others := [name for name in beyond if name not in folded]:
        print(f"near the end are outputs that cannot be folded: {', '.join(others)}; precision.compute=fp32 holds them")


def _print(table: Table) -> None:
    Console(width=None if Console().is_terminal else 160).print(table)
