"""`wanprep why`: what became of one clip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.console import as_typed, echo_lines, print_json

if TYPE_CHECKING:
    from preprocess.plan.plan import Plan


@click.command()
@click.argument("clip", callback=as_typed)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def why(clip: str, config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say what became of CLIP, and why.

    Every attempt with its stage and reason, and whether a retry can help. CLIP is a clip id, or the name of its
    annotation. For a clip with samples: the decisions and their reasons.

    \b
    wanprep why 3338992 prep.yaml
    """
    from preprocess.config import PrepConfig
    from preprocess.plan.plan import open_plan
    from shards.config import load_config
    from shards.errors import UserError
    from shards.show.clip import clip_history, describe_clip
    from shards.storage import open_storage
    from shards.storage.patience import set_patience

    loaded = load_config(PrepConfig, config, overrides)
    set_patience(loaded.storage)
    storage = open_storage(loaded.output)
    found = clip_history(storage, clip)
    units = sorted({attempt["unit"] for attempt in found["attempts"] if attempt["unit"] is not None})
    plan = open_plan(storage)
    planned = None
    if units or not found["attempts"]:  # refused by the plan itself: it is in no unit
        planned = _planned(plan, clip, units or range(plan.num_units))
    if planned is None and not found["attempts"]:
        raise UserError(
            f"{loaded.output}: no record of clip {clip!r} has been planned there",
            expected="a clip id, or the name of an annotation in the corpus",
            fix="`wanprep plan CONFIG` reads the corpus; with corpus.limit a clip can be beyond the limit",
        )
    found |= {"planned": planned}
    if not found["attempts"]:
        found["status"] = "waiting"
    if as_json:
        print_json(found)
        return
    lines = describe_clip(found)
    if planned is not None:
        lines.insert(1, f"planned     candidate {planned['candidate']} in unit {planned['unit']}")
        lines[2:2] = [f"  declared.{name}: {value}" for name, value in planned["record"].items() if value is not None]
    if found["status"] == "waiting":
        lines.append("no attempt yet: `wanprep build-shards CONFIG` builds its unit")
    echo_lines(lines)


def _planned(plan: Plan, clip: str, units: Sequence[int]) -> dict[str, Any] | None:
    """The candidate of that clip id or annotation in these units, as its annotation declares it."""
    mark = clip.encode("utf-8", "surrogatepass")
    for unit in units:
        for ordinal, line, _ in plan.unit_lines(unit):
            if mark not in line and json.dumps(clip).encode() not in line:
                continue
            record = json.loads(line)
            if clip in (record["clip_id"], record["source"]):
                captions = ("object", "scene", "semantic", "application", "speech")
                declared = {name: value for name, value in record.items() if name not in captions}
                return {"candidate": ordinal, "unit": unit, "record": declared}
    return None
