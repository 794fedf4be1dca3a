"""A model card beside an exported LoRA: what it was made from and how, for people, and for `hf upload`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shards.config import parse_yaml
from shards.console import counted
from shards.errors import UserError
from train.lora.export import NOT_STATED, locate_lora
from train.lora.formats import read_lora
from train.lora.info import base_model

CARD_NAME = "README.md"
PICTURES = ("contact-sheet.jpg", "side-by-side.mp4")
# Identifiers of licences that the hub knows; another one is named in the card's text.
_HUB_LICENCES = re.compile(r"apache-2\.0|mit|cc0-1\.0|cc-by(-[a-z]+)*-[\d.]+|openrail(\+\+)?")


def check_card(source: Path, out: Path) -> None:
    """Raise UserError for a source that is no run or checkpoint, and for a card that is there already."""
    file, identity, _ = locate_lora(source)
    if identity is None or not (file.resolve().parents[2] / "config.yaml").is_file():
        raise UserError(
            f"{source}: a card is made from a run", expected="with --card, SOURCE is RUN or RUN/checkpoints/step-…"
        )
    if out.with_name(CARD_NAME).exists():
        raise UserError(f"{out.with_name(CARD_NAME)} is there already", fix="export into another folder, or remove it")


def write_card(source: Path, out: Path, metadata: Mapping[str, str], step: int | None = None) -> Path:
    """Write README.md beside the exported file `out`, with the run's sampled pictures, and return its path.

    No path of this machine is in it.
    """
    file, identity, found_step = locate_lora(source, step)
    run, card = file.resolve().parents[2], out.with_name(CARD_NAME)
    config = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
    pictures = [run / "samples" / name for name in PICTURES if (run / "samples" / name).is_file()]
    for picture in pictures:
        shutil.copyfile(picture, out.with_name(picture.name))
    parts = [
        _front_matter(metadata),
        f"# {out.stem}\n\nA LoRA of {base_model(read_lora(out))}, for text-to-video and image-to-video.",
        _pictures(pictures),
        _use(out),
        "## Training\n\n" + _table("setting", "value", _settings(config, identity or {}, metadata, found_step)),
        _losses(run / "held_out.jsonl", found_step),
        f"## Licence\n\n{metadata.get('licence', NOT_STATED)}",
    ]
    card.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return card


def _front_matter(metadata: Mapping[str, str]) -> str:
    values: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-video"}
    values["tags"] = ["lora", "wan2.2", "text-to-video", "image-to-video"]
    if "base_model" in metadata:
        values |= {"base_model": metadata["base_model"], "base_model_relation": "adapter"}
    licence = metadata.get("licence", NOT_STATED)
    if licence != NOT_STATED:
        name = licence.lower().replace(" ", "-")
        values |= {"license": name} if _HUB_LICENCES.fullmatch(name) else {"license": "other", "license_name": name}
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _pictures(pictures: list[Path]) -> str:
    if not pictures:
        return ""
    shown = {picture.name for picture in pictures}
    lines = ["The same prompts, first frames and noise at each step of training; the first row is without the LoRA."]
    if PICTURES[0] in shown:
        lines.append(f"![Samples, a row a step]({PICTURES[0]})")
    if PICTURES[1] in shown:
        lines.append(f"[The same as a video, side by side]({PICTURES[1]})")
    return "## Before and after\n\n" + "\n\n".join(lines)


def _use(out: Path) -> str:
    return f"""## Use

```python
import torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights(".", weight_name="{out.name}")
```

ComfyUI (`LoraLoaderModelOnly`), DiffSynth-Studio and VideoX-Fun load the same file. The scale is in the weights: use
strength 1."""


def _settings(
    config: Mapping[str, Any], identity: Mapping[str, Any], metadata: Mapping[str, str], step: int | None
) -> list[tuple[str, Any]]:
    lora, optim, objective, data = (config.get(name) or {} for name in ("lora", "optim", "objective", "data"))
    base = metadata.get("base_model", "not compared with the published weights")
    return [
        ("base", base),
        ("digest of the base's weights", metadata.get("base_weights")),
        ("identity of the data", metadata.get("dataset_identity")),
        ("revision of the data", metadata.get("dataset_revision")),
        ("steps", step),
        ("samples a step", data.get("global_batch")),
        ("rank, alpha", f"{lora.get('rank')}, {lora.get('alpha') or lora.get('rank')}"),
        ("targets", ", ".join(lora.get("targets", ()))),
        ("optimizer, learning rate, schedule", f"{optim.get('name')}, {optim.get('lr')}, {optim.get('schedule')}"),
        ("image-to-video share", objective.get("image_to_video_share")),
        ("noise level, shift", f"{objective.get('sigma')}, {objective.get('shift')}"),
        ("precision", identity.get("precision")),
        ("seed", config.get("seed")),
        ("digest of the configuration", metadata.get("config_digest")),
        ("made with", metadata.get("software")),
    ]


def _losses(file: Path, step: int | None) -> str:
    """The held-out loss at the beginning and at the exported step, by noise level."""
    data = file.read_bytes() if file.is_file() else b""
    try:
        lines = [json.loads(line) for line in data.split(b"\n")[:-1]]  # a kill may have cut the last one short
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {error}", fix="`wantrain verify RUN` names the line: remove it") from None
    lines = [line for line in lines if step is None or line["step"] <= step]
    if not lines:  # not evaluated, or only later
        return ""
    before, after = lines[0], lines[-1]
    rows = []
    for name, mode in (("T2V", "t2v"), ("I2V", "i2v")):
        levels = after["sigmas"] if after[mode] else []  # clips of one frame have no image-to-video
        rows += [
            (f"{name}, σ {sigma:.2f}", a, b) for sigma, a, b in zip(levels, before[mode], after[mode], strict=True)
        ]
    rows.append(("all", before["mean"], after["mean"]))
    clips = counted(after["num_clips"], "clip")
    head = f"## Held-out loss\n\nOver {clips} that training did not see, lower is better.\n\n"
    table = [f"| | step {before['step']} | step {after['step']} | change |", "| --- | --- | --- | --- |"]
    return head + "\n".join(
        table + [f"| {name} | {a:.4f} | {b:.4f} | {100 * (b / a - 1):+z.1f} % |" for name, a, b in rows]
    )


def _table(left: str, right: str, rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows if value not in (None, "")])
