"""`wantrain`: train a LoRA from shards, inspect a run, check the machine, convert LoRA files."""

from __future__ import annotations

import os
from pathlib import Path

import click

from shards import __version__
from shards.config import load_config
from shards.console import LOG, CommandGroup, echo_lines, print_json, set_up_logging
from shards.errors import UserError
from train.cli.lora_commands import export, lora, merge, unmerge
from train.cli.report_commands import report, show_clip, verify
from train.cli.sample_commands import evaluate, sample
from train.launch.failure import SIGNAL_EXIT

OVERRIDES = click.option(
    "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config: -o optim.lr=2e-4"
)
POSITIVE = click.FloatRange(min=0, min_open=True)
CONFIG = click.argument("config", type=click.Path(path_type=Path))


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train a LoRA of Wan2.2-TI2V-5B from shards.

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
    help="auto: from the run's newest checkpoint, if any; never: start a new run or stop; PATH: from this checkpoint.",
)
@click.option("--verify", is_flag=True, help="First check every byte of the dataset against its digests.")
@click.option("--nproc-per-node", metavar="N|gpu", help="Start N processes on this machine, or one for each GPU.")
@click.option("--nnodes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of machines.")
@click.option("--node-rank", type=click.IntRange(min=0), help="Number of this machine, from 0.")
@click.option("--master", metavar="HOST:PORT", help="Address at which all machines reach machine 0.")
def fit(
    config: Path,
    overrides: tuple[str, ...],
    resume: str,
    verify: bool,
    nproc_per_node: str | None,
    nnodes: int,
    node_rank: int | None,
    master: str | None,
) -> None:
    """Train a LoRA, or all weights, as CONFIG says.

    SIGTERM and Ctrl-C write a checkpoint and end the run, SIGUSR1 writes one and continues. The same command resumes
    from the newest checkpoint, on any number of processes. A second Ctrl-C ends at once.

    Exit codes: 0 done, 1 a bug (see the traceback), 2 a mistake (the message says how to fix it), 75 try again (a rank,
    a machine or a storage was lost), 128 + n ended by signal n (143 SIGTERM and 130 Ctrl-C with a checkpoint, 137
    killed).

    \b
    wantrain fit configs/demo/train.yaml
    wantrain fit configs/ti2v_5b_1xh200.yaml -o model.checkpoint=/models/Wan2.2-TI2V-5B --verify
    wantrain fit run.yaml --resume demo/run/checkpoints/step-0000040
    wantrain fit run.yaml --nproc-per-node 8
    wantrain fit run.yaml --nproc-per-node gpu --nnodes 2 --node-rank 0 --master node0:29500
    """
    from train.config.train import TrainConfig, check_folders
    from train.launch.failure import Reported, end_now

    loaded = load_config(TrainConfig, config, overrides)
    output = Path(loaded.output)
    check_folders(loaded)
    if nproc_per_node is not None:
        from train.config.train import check_split
        from train.launch.launch import launch, make_place, own_command

        place = make_place(nproc_per_node, nnodes, node_rank, master)
        check_split(loaded, place.world_size)
        again = ["fit", str(config), *(word for pair in overrides for word in ("-o", pair)), "--resume", resume]
        command = own_command(again + ["--verify"] * verify)
        raise SystemExit(launch(command, place, output, loaded.parallel.grace_seconds))
    if nnodes > 1 or node_rank is not None or master is not None:
        raise UserError("--nnodes, --node-rank and --master belong to --nproc-per-node", fix="add --nproc-per-node")
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(terminal=rank == 0)
    LOG.info("loading torch")
    with Reported():
        from train.loop import fit as run

        result = run(loaded, resume=resume, verify=verify)
    code = 0 if result.stopped_by is None else SIGNAL_EXIT + result.stopped_by
    if "RANK" in os.environ:
        end_now(code)
    if code:
        raise SystemExit(code)


@main.command()
@CONFIG
@OVERRIDES
@click.option("--gpu", default="auto", show_default=True, help="GPU: v100-32gb, a100-80gb, h200, rtx4090 … or auto.")
@click.option("--memory-gib", type=POSITIVE, help="GPU memory, GiB: without --gpu, or to override it.")
@click.option("--tflops", type=POSITIVE, help="Dense 16-bit peak of the GPU, TFLOP/s.")
@click.option("--bandwidth", type=POSITIVE, help="Memory bandwidth, GB/s.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Number of GPUs.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of machines.")
@click.option(
    "--size", "sizes", multiple=True, metavar="WxHxF", help="Sample size, instead of the dataset's; repeatable."
)
@click.option("--efficiency", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak to assume.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def plan(
    config: Path,
    overrides: tuple[str, ...],
    gpu: str,
    memory_gib: float | None,
    tflops: float | None,
    bandwidth: float | None,
    gpus: int,
    nodes: int,
    sizes: tuple[str, ...],
    efficiency: float | None,
    as_json: bool,
) -> None:
    """Estimate memory and time of a run, and which settings fit.

    \b
    wantrain plan configs/ti2v_5b_2xv100.yaml --gpu v100-32gb --gpus 2
    wantrain plan configs/ti2v_5b_1xh200.yaml --gpu h200 --size 832x480x49 --size 1280x704x49
    wantrain plan configs/ti2v_5b_1xh200.yaml --memory-gib 44.5 --tflops 280 --bandwidth 864
    wantrain plan configs/ti2v_5b_8xh100.yaml --gpu h100 --gpus 64 --nodes 8 -o data.global_batch=64
    """
    from shards.gpus import find_gpu
    from train.config.train import TrainConfig
    from train.estimate import plan as planning
    from train.estimate import plan_text
    from train.estimate.sizes import read_sizes

    loaded = load_config(TrainConfig, config, overrides)
    card = find_gpu(gpu, memory_gib, tflops, bandwidth)
    buckets, origin, mode = read_sizes(loaded, sizes)
    made = planning.make_plan(loaded, card, gpus, buckets, efficiency=efficiency, num_nodes=nodes, vae_mode=mode)
    if as_json:
        print_json(plan_text.as_json(made) | {"sizes_from": origin})
    else:
        echo_lines(plan_text.describe_estimate(made, origin))


@main.command("show-step")
@CONFIG
@click.argument("step", type=click.IntRange(min=1))
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def show_step(config: Path, step: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """List what STEP (from 1) trains on.

    Clips, windows, timesteps, modes and captions. Nothing is trained and no model is loaded: all of this depends only
    on seed, step and dataset.

    \b
    wantrain show-step configs/demo/train.yaml 7
    wantrain show-step demo/run/config.yaml 7 --json
    """
    from train.config.train import TrainConfig
    from train.doctor.tables import describe_slots, print_slots

    slots = describe_slots(load_config(TrainConfig, config, overrides), step)
    if as_json:
        print_json(slots)
    else:
        print_slots(slots)


@main.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@OVERRIDES
@click.option("--ranges", is_flag=True, help="Measure each block's largest activation: does fp16 suffice?")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def doctor(config: Path | None, overrides: tuple[str, ...], ranges: bool, as_json: bool) -> None:
    """Check this machine; with CONFIG, also a run on it.

    Says what is wrong and how to fix it. Exits with 1 if there is a problem.

    \b
    wantrain doctor
    wantrain doctor configs/demo/train.yaml
    wantrain doctor configs/ti2v_5b_2xv100.yaml --ranges
    """
    from shards.machine import is_healthy, print_findings
    from train.config.train import TrainConfig
    from train.doctor.machine import examine, measure_ranges
    from train.doctor.tables import print_ranges

    if config is None and (ranges or overrides):
        raise UserError("--ranges and -o need a CONFIG", fix="wantrain doctor CONFIG --ranges")
    loaded = None if config is None else load_config(TrainConfig, config, overrides)
    if ranges and loaded is not None:
        measured = measure_ranges(loaded)
        print_json(measured) if as_json else print_ranges(measured)
        return
    findings = list(examine(loaded))
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_findings(findings)
    if not is_healthy(findings):
        raise SystemExit(1)


for command in (sample, evaluate, report, verify, show_clip, export, merge, unmerge, lora):
    main.add_command(command)


if __name__ == "__main__":
    main()
