"""`wanprep plan`: freeze the units of work, and say what a build of them will take."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from preprocess.cli.model_commands import OVERRIDES, load_prep, tokenizer_of
from shards.console import echo_lines, print_json, set_up_logging

POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--quiet", is_flag=True, help="No progress and no notes; the result and errors only.")
@click.option(
    "--probe",
    "num_probed",
    type=click.IntRange(min=1),
    metavar="N",
    help="Fetch and decode N clips, and time this machine's encoders on a few of them: buckets, bytes and seconds as "
    "they are here. The forecast uses them.",
)
@click.option("--gpu", metavar="NAME", help="Forecast the build on this GPU, such as v100-32gb, h100, or auto.")
@click.option("--memory-gib", type=POSITIVE, help="Of a card by hand, or of the named one in place of its own.")
@click.option("--tflops", type=POSITIVE, help="Its dense 16-bit peak, TFLOP/s.")
@click.option("--bandwidth", type=POSITIVE, help="Of its memory, GB/s.")
@click.option(
    "--gpus",
    "num_gpus",
    type=click.IntRange(min=1),
    help="How many of them.  [default: those that the config names, else this machine's with auto, else 1]",
)
@click.option("--cores", type=click.IntRange(min=1), metavar="N", help="Cores.  [default: this machine's, or 4 a GPU]")
@click.option("--mbit", type=POSITIVE, default=1000.0, show_default=True, help="Network.")
def plan(
    config: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    num_probed: int | None,
    gpu: str | None,
    memory_gib: float | None,
    tflops: float | None,
    bandwidth: float | None,
    num_gpus: int | None,
    cores: int | None,
    mbit: float,
) -> None:
    """Filter the records, and write the plan: units of clips.

    Records that were added since the last plan become a further generation; nothing frozen changes. With --gpu, or
    where --probe has timed this machine's encoders, the command prints how long the build will take, what limits it,
    and what would make it shorter. Connections, decoders and devices are the config's.

    \b
    wanprep plan configs/mbc_832x480.yaml
    wanprep plan configs/mbc_832x480.yaml -o corpus.limit=1000
    wanprep plan configs/mbc_832x480.yaml --probe 200
    wanprep plan configs/mbc_832x480.yaml --gpu v100-32gb --gpus 2
    wanprep plan configs/mbc_832x480.yaml --gpu auto --probe 50 --json
    """
    from preprocess.build.progress import count_documents
    from preprocess.build.scratch import scratch_folder
    from preprocess.build.vae_precision import find_precision
    from preprocess.encoders.encoders import load_tokenizer
    from preprocess.forecast.forecast import count_plan, describe_forecast, describe_plan, forecast
    from preprocess.forecast.hardware import find_hardware
    from preprocess.forecast.probe_some import can_forecast, describe_probe, probe_clips
    from preprocess.plan.freeze import freeze_plan
    from shards.gpus import find_gpu
    from shards.storage import open_storage

    set_up_logging(level=logging.ERROR if quiet else logging.INFO)
    by_hand = (memory_gib, tflops, bandwidth)
    # Before the corpus is read for minutes.
    card = find_gpu(gpu or "auto", *by_hand) if gpu is not None or any(by_hand) else None
    loaded = load_prep(config, overrides)
    is_here = gpu == "auto" or card is None
    hardware = find_hardware(loaded, card, is_here, num_gpus, cores, mbit) if card or num_probed else None
    storage = open_storage(loaded.output)
    encoders, note = tokenizer_of(loaded)
    with scratch_folder(loaded.output) as scratch:
        with count_documents("annotations read", quiet=quiet) as progress:
            frozen = freeze_plan(storage, loaded, scratch=scratch, progress=progress)
        counts = count_plan(frozen, loaded)
        lines = describe_plan(counts)
        count_tokens = load_tokenizer(encoders).count if hardware else len
        if num_probed is not None:
            counts["probed"] = probe_clips(frozen, loaded, num_probed, scratch, count_tokens)
            lines += describe_probe(counts["probed"])
    if hardware is not None and (card is not None or can_forecast(counts["probed"])):
        settled = find_precision(storage)
        mode = settled.mode if settled else None
        counts["forecast"] = forecast(frozen, loaded, counts, hardware, count_tokens, mode)
        lines += [*describe_forecast(counts["forecast"]), *note]
    if as_json:
        print_json(counts)
    else:
        echo_lines(lines)
