"""Commands of `wantrain` that handle LoRA files: export, merge, unmerge, lora info."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from shards.console import echo_lines, print_json, set_up_logging
from shards.errors import UserError

_PATH = click.Path(path_type=Path)
_DTYPES = click.Choice(["float32", "bfloat16", "float16"])
_LAYOUT = click.option(
    "--layout", type=click.Choice(["official", "diffusers"]), default="official", show_default=True,
    help="Layout of OUT: as in the official repository, or as in Diffusers (with transformer/).",
)  # fmt: skip
_DTYPE = click.option(
    "--dtype", type=_DTYPES, default="float32", show_default=True, help="Type of the tensors written."
)


@click.command()
@click.argument("source", type=_PATH)
@click.argument("out", type=_PATH)
@click.option(
    "--format", "written", default="comfyui", show_default=True,
    type=click.Choice(["comfyui", "musubi", "videox", "diffusers", "diffsynth"]),
    help="Tool whose tensor names are written; all of these tools except musubi-tuner also read comfyui.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["official", "diffusers"]),
    help="If SOURCE is a run with lora: null: write the complete model to the folder OUT, as in the official "
    "repository, or as in Diffusers (with transformer/).",
)  # fmt: skip
@_DTYPE
@click.option("--step", type=int, help="If SOURCE is a run: step of the checkpoint.  [default: the newest]")
@click.option("--licence", help="Licence text for the header of OUT.")
@click.option(
    "--card", is_flag=True, help="If SOURCE is a run: also write a model card, README.md, beside OUT, for `hf upload`."
)
def export(
    source: Path,
    out: Path,
    written: Any,
    layout: Any,
    dtype: str,
    step: int | None,
    licence: str | None,
    card: bool,
) -> None:
    """Write the LoRA of SOURCE to the file OUT, or with --layout the model that a run trained.

    SOURCE is a run, a checkpoint, a LoRA of any tool, or a folder of peft or diffusers. `wantrain export`
    and `wantrain lora convert` are the same command. The LoRA's scale is multiplied into B, so every loader applies it
    once.

    \b
    wantrain export demo/run lora.safetensors
    wantrain export demo/run shared/lora.safetensors --dtype float16 --licence "CC BY-NC 4.0" --card
    wantrain export demo/base /models/mine --layout diffusers --dtype bfloat16
    wantrain lora convert theirs.safetensors ours.safetensors
    wantrain lora convert lora.safetensors for-musubi.safetensors --format musubi
    """
    import torch

    from train.lora.card import check_card, write_card
    from train.lora.export import export_lora

    set_up_logging()
    if layout is not None:
        from train.lora.merge import export_model

        if card or written != "comfyui":
            raise UserError("--format and --card are for a LoRA, and --layout writes a model", fix="leave them out")
        files = export_model(source, out, layout, getattr(torch, dtype), step=step, licence=licence)
        click.echo(f"wrote {', '.join(map(str, files))} ({layout}, {dtype})")
        return
    if card:
        check_card(source, out)
    metadata = export_lora(source, out, written, getattr(torch, dtype), step=step, licence=licence)
    for name, value in sorted(metadata.items()):
        click.echo(f"{name}: {value}")
    click.echo(f"wrote {out} ({written}, {dtype})")
    if card:
        written_card, folder = write_card(source, out, metadata, step), shlex.quote(str(out.parent))
        click.echo(f"wrote {written_card}; `hf upload NAME/REPOSITORY {folder}` shares it")


@click.command()
@click.argument("base", type=_PATH)
@click.argument("lora", type=_PATH)
@click.argument("out", type=_PATH)
@_LAYOUT
@_DTYPE
@click.option("--scale", default=1.0, show_default=True, help="Strength of the LoRA.")
def merge(base: Path, lora: Path, out: Path, layout: Any, dtype: str, scale: float) -> None:
    """Merge LORA into the checkpoint BASE. The result goes to the folder OUT, one tensor at a time.

    \b
    wantrain merge /models/Wan2.2-TI2V-5B demo/run/lora.safetensors /models/merged
    wantrain merge demo/base/model.safetensors demo/run/lora.safetensors merged --layout diffusers --dtype bfloat16
    """
    from train.lora.export import locate_lora
    from train.lora.formats import read_lora
    from train.lora.merge import DTYPES, merge_checkpoint

    set_up_logging()
    merged = merge_checkpoint(base, read_lora(locate_lora(lora)[0]), out, layout, DTYPES[dtype], scale)
    click.echo(
        f"{merged.num_changed} of {merged.num_tensors} tensors changed; wrote {', '.join(map(str, merged.files))}"
    )


@click.command()
@click.argument("merged", type=_PATH)
@click.argument("lora", type=_PATH)
@click.argument("out", type=_PATH)
@_LAYOUT
@_DTYPE
@click.option("--unrecorded-scale", type=float, help="Strength, if another tool merged the LoRA and did not record it.")
def unmerge(merged: Path, lora: Path, out: Path, layout: Any, dtype: str, unrecorded_scale: float | None) -> None:
    """Remove LORA from the checkpoint MERGED.

    The result goes to the folder OUT. It is exact up to rounding if the merge was in float32.

    \b
    wantrain unmerge /models/merged demo/run/lora.safetensors /models/base-again
    """
    from train.lora.export import locate_lora
    from train.lora.formats import read_lora
    from train.lora.merge import DTYPES, unmerge_checkpoint

    set_up_logging()
    done = unmerge_checkpoint(
        merged, read_lora(locate_lora(lora)[0]), out, layout, DTYPES[dtype], unrecorded_scale=unrecorded_scale
    )
    click.echo(f"{done.num_changed} of {done.num_tensors} tensors changed; wrote {', '.join(map(str, done.files))}")


@click.group()
def lora() -> None:
    """Inspect and convert LoRA files."""


lora.add_command(export, "convert")


@lora.command("info")
@click.argument("file", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info(file: Path, as_json: bool) -> None:
    """Show rank, alpha, targets, norms, tool and model of a LoRA. FILE: a LoRA of any tool, a run or a checkpoint.

    \b
    wantrain lora info demo/run/lora.safetensors
    wantrain lora info someone-elses.safetensors --json
    """
    from train.lora.export import locate_lora
    from train.lora.formats import read_lora
    from train.lora.info import describe_lora, lines_of

    facts = describe_lora(read_lora(locate_lora(file)[0]))
    if as_json:
        print_json(facts)
    else:
        echo_lines(lines_of(facts))
