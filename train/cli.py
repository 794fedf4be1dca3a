"""`wantrain`: train a LoRA from sealed shards, look into a run, check the machine, handle LoRA files."""

from __future__ import annotations

from pathlib import Path

import click

from shards.config import load_config
from shards.console import CommandGroup, set_up_logging
from train.lora_cli import export, lora, merge, unmerge
from train.sample_cli import sample

SIGNAL_EXIT = 128

OVERRIDES = click.option(
    "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config: -o optim.lr=2e-4"
)
CONFIG = click.argument("config", type=click.Path(path_type=Path))


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wan-broadcast-lora")
def main() -> None:
    """Train a LoRA of Wan2.2-TI2V-5B from sealed shards.

    \b
    wantrain doctor configs/demo/train.yaml
    wantrain fit configs/demo/train.yaml
    wantrain fit configs/demo/train.yaml -o max_steps=10 -o output=/elsewhere
    wantrain show-step configs/demo/train.yaml 7
    """


@main.command()
@CONFIG
@OVERRIDES
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="Go on from the run's newest checkpoint, insist on beginning, or go on from a checkpoint's folder.",
)
@click.option("--verify", is_flag=True, help="Hash every byte of the dataset first.")
def fit(config: Path, overrides: tuple[str, ...], resume: str, verify: bool) -> None:
    """Train as CONFIG says.

    SIGTERM and Ctrl-C write a checkpoint and end the run, SIGUSR1 writes one and goes on. The same command goes on from
    the newest checkpoint.

    \b
    wantrain fit configs/demo/train.yaml
    wantrain fit configs/ti2v_5b_1xh200.yaml -o model.checkpoint=/models/Wan2.2-TI2V-5B --verify
    wantrain fit run.yaml --resume demo/run/checkpoints/step-0000040
    """
    from train.config import TrainConfig

    loaded = load_config(TrainConfig, config, overrides)
    set_up_logging()
    from train.loop import fit as run

    result = run(loaded, resume=resume, verify=verify)
    if result.stopped_by is not None:
        raise SystemExit(SIGNAL_EXIT + result.stopped_by)


for command in (sample, export, merge, unmerge, lora):
    main.add_command(command)


if __name__ == "__main__":
    main()
