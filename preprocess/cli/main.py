"""`wanprep`: annotated clips in, sealed shards out. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from preprocess.build.progress import STYLES, Style
from preprocess.cli.model_commands import (
    OVERRIDES,
    decode,
    doctor,
    embed,
    encode_image,
    fetch_model,
    load_prep,
    tokenizer_of,
)
from preprocess.cli.plan_command import plan
from preprocess.cli.why_command import why
from shards import __version__
from shards.console import CommandGroup, counted, echo_lines, print_json, set_up_logging

if TYPE_CHECKING:
    from preprocess.build.scratch import IfBusy
    from preprocess.config import PrepConfig

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_FILE = click.Path(path_type=Path, dir_okay=False)
_CONFIG = click.argument("config", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
_PROGRESS = click.option(
    "--progress",
    "style",
    type=click.Choice(STYLES),
    default="auto",
    show_default=True,
    help="How progress is shown, on standard error; auto: a bar on a terminal, elsewhere a line every 10 s.",
)
_QUIET = click.option("--quiet", is_flag=True, help="Print only the result and errors.")


class _UnitRange(click.ParamType):
    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, colon, end = str(value).partition(":")
        if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
            self.fail(f"{value!r}: expected A:B with 0 ≤ A < B, such as 0:250", param, ctx)
        return range(int(first), int(end))


UNIT_RANGE = _UnitRange()


@click.group(cls=CommandGroup, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="wanprep")
def main() -> None:
    """Turn an annotated archive of clips into shards of latents and text embeddings.

    \b
    wanprep init FOLDER --corpus CLIPS               write the configs of both stages for your own clips
    wanprep demo-corpus demo/corpus                  a small archive to try everything on
    wanprep scan CONFIG                              count the annotations: lengths, captions, defects
    wanprep plan CONFIG                              write the list of clips to encode, and count them
    wanprep build-shards CONFIG                      download, decode, encode; run it again to resume
    wanprep retry CONFIG --retryable                 try again what failed and may succeed now
    wanprep recaption SET CONFIG                     another set of captions over the same latents
    wanprep status CONFIG                            progress of a build
    wanprep why CLIP CONFIG                          what became of one clip, and why
    """


@main.command("demo-corpus")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--clip", "clips", multiple=True, type=click.Path(path_type=Path), help="Add a video file of your own.")
@click.option("--base-url", default=None, help="URL at which OUT will be served.  [default: http://127.0.0.1:8765/]")
@_QUIET
def demo_corpus(out: Path, clips: tuple[Path, ...], base_url: str | None, quiet: bool) -> None:
    """Write a small annotated corpus into OUT: good and bad clips.

    \b
    wanprep demo-corpus demo/corpus
    wanprep demo-corpus demo/corpus --clip holiday.mp4 --clip news.mov
    """
    from preprocess.demo.corpus import BASE_URL, write_corpus

    _start(quiet)
    written = write_corpus(out, clips, base_url or BASE_URL)
    records, files = counted(written.num_records, "record"), counted(written.num_media, "media file")
    click.echo(f"{out}: {records}, {files} ({written.num_made} made now)")


@main.command("serve-corpus")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--port", default=8765, show_default=True, help="Port on 127.0.0.1; 0: any free port.")
def serve_corpus(folder: Path, port: int) -> None:
    """Serve the demo corpus FOLDER over HTTP, until Ctrl-C.

    It takes the place of the server that the demo's annotations name.

    \b
    wanprep serve-corpus demo/corpus --port 8765
    """
    from preprocess.demo.server import FolderServer

    with FolderServer(folder, port) as server:
        click.echo(f"serving {folder} at {server.url} (Ctrl-C ends it)")
        server.serve_forever()


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--corpus", required=True, metavar="LOCATION", help="A folder, table, archive or s3:// prefix of clips.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The model, official or Diffusers layout.")
@click.option("--gpu", metavar="NAME", help="Plan for this GPU, such as rtx4090 or h100.  [default: this machine's]")
@click.option("--gpus", "num_gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Number of GPUs.")
@click.option(
    "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a key of `corpus`: -o corpus.format=table"
)
@_QUIET
def init(
    folder: Path,
    corpus: str,
    checkpoint: Path | None,
    gpu: str | None,
    num_gpus: int,
    overrides: tuple[str, ...],
    quiet: bool,
) -> None:
    """Write FOLDER/prep.yaml and FOLDER/train.yaml for your clips.

    Reads the corpus, probes a few clips, and chooses sizes, lengths, batch and held-out share that fit them. Without
    --checkpoint the configs use small encoders and a small model with random weights, to try the commands.

    \b
    wanprep init project --corpus clips --checkpoint /models/Wan2.2-TI2V-5B
    wanprep init project --corpus clips.csv --checkpoint /models/Wan2.2-TI2V-5B --gpu rtx4090
    wanprep init trial --corpus clips
    """
    from preprocess.build.progress import count_documents
    from preprocess.config import CorpusConfig
    from preprocess.project.project import make_project
    from shards.config import apply_overrides, validate_config

    _start(quiet)
    values = apply_overrides({"corpus": {"location": corpus}}, overrides)
    config = validate_config(CorpusConfig, values["corpus"], origin="--corpus")
    with count_documents("records read", quiet=quiet) as progress:
        made = make_project(folder, config, checkpoint, gpu, num_gpus, progress=progress)
    echo_lines([*made.lines, "", "next:", *(f"  {command}" for command in made.commands)])


@main.command()
@_CONFIG
@OVERRIDES
@_JSON
@_QUIET
@click.option("--out", type=_FILE, default="scan.json", show_default=True, help="JSON file to write.")
def scan(config: Path, overrides: tuple[str, ...], as_json: bool, quiet: bool, out: Path) -> None:
    """Count what the corpus holds, before anything is planned.

    Types, sizes, lengths, captions, defects, and what the filter would keep. Caption tokens are counted by the text
    encoder's tokenizer, for a sample of the records.

    \b
    wanprep scan configs/mbc_832x480.yaml
    wanprep scan configs/mbc_832x480.yaml --out mbc.json -o sieve.max_seconds=60
    """
    from preprocess.build.progress import count_documents
    from preprocess.encoders.encoders import load_tokenizer
    from preprocess.plan.scan import describe_scan, scan_corpus, write_scan

    _start(quiet)
    loaded = load_prep(config, overrides)
    encoders, note = tokenizer_of(loaded)
    tokenizer = load_tokenizer(encoders)
    with count_documents("annotations read", quiet=quiet) as progress:
        report = scan_corpus(loaded, count_tokens=tokenizer.count, progress=progress)
    write_scan(report, out)
    _show(report.model_dump(mode="json"), [*describe_scan(report), *note, f"written to {out}"], as_json)


@main.command("build-shards")
@_CONFIG
@OVERRIDES
@click.option(
    "--serve", type=click.Path(path_type=Path), help="Serve this demo corpus on a free local port during the build."
)
@click.option("--dry-run", is_flag=True, help="Print what would be done; write nothing, download nothing.")
@click.option("--only", type=click.Choice(["latents", "text"]), help="Run only this pass.")
@click.option(
    "--unit-range", type=UNIT_RANGE, help="Build only units A to B-1 of the plan: for several machines, a Slurm array."
)
@click.option(
    "--if-busy",
    type=click.Choice(["wait", "share", "refuse"]),
    default="wait",
    show_default=True,
    help="If another build works on the same units: wait until it ends, share the units, or exit.",
)
@_JSON
@_PROGRESS
@_QUIET
def build_shards(
    config: Path,
    overrides: tuple[str, ...],
    serve: Path | None,
    dry_run: bool,
    only: Literal["latents", "text"] | None,
    unit_range: range | None,
    if_busy: IfBusy,
    as_json: bool,
    style: Style,
    quiet: bool,
) -> None:
    """Build the dataset that CONFIG describes, or resume it. Finished units are not built again.

    \b
    wanprep build-shards configs/demo/prep.yaml --serve demo/corpus
    wanprep build-shards configs/mbc_832x480.yaml -o corpus.limit=100 -o output=/data/try
    wanprep build-shards configs/mbc_832x480.yaml -o 'engine.devices=[cuda:0, cuda:1]'
    wanprep build-shards configs/mbc_832x480.yaml --only latents --unit-range 0:250
    wanprep build-shards configs/mbc_832x480.yaml --dry-run
    """
    from preprocess.build.progress import describe_pools
    from preprocess.build.summary import describe_build
    from preprocess.pipeline import Part
    from preprocess.pipeline import build_shards as build

    _start(quiet)
    loaded = load_prep(config, overrides)
    if dry_run:
        _dry_run(loaded, as_json)
        return
    with ExitStack() as stack:
        if serve is not None:
            loaded = _serve(stack, serve, loaded)
        part = Part(only, unit_range)
        latents: dict[str, Any] = {}
        counts = build(
            loaded, quiet=quiet, part=part, style=style, if_busy=if_busy, on_latents=latents.update
        )  # fmt: skip
    _show({**counts, "latent_pass": latents}, [*describe_build(counts), *describe_pools(latents)], as_json)
    sys.exit(1 if counts["internal_errors"] else 0)


@main.command()
@_CONFIG
@OVERRIDES
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    metavar="CODE",
    help="Try again what was rejected for this reason; may be repeated.",
)
@click.option("--retryable", is_flag=True, help="Try again everything that a retry may fix.")
@click.option("--serve", type=click.Path(path_type=Path), help="Serve this demo corpus on a free local port.")
@click.option("--dry-run", is_flag=True, help="Print what would be tried again; write nothing, download nothing.")
@_JSON
@_PROGRESS
@_QUIET
def retry(
    config: Path,
    overrides: tuple[str, ...],
    reasons: tuple[str, ...],
    retryable: bool,
    serve: Path | None,
    dry_run: bool,
    as_json: bool,
    style: Style,
    quiet: bool,
) -> None:
    """Try rejected candidates again, in new shards. Finished shards are never rewritten.

    Of several attempts at a clip, the latest counts. A retry that was stopped is resumed by the same command or by
    `build-shards`. A candidate with an accepted window counts as accepted, and is not tried again.

    \b
    wanprep retry configs/mbc_832x480.yaml --reason fetch-timeout --reason fetch-503
    wanprep retry configs/mbc_832x480.yaml --retryable --dry-run
    """
    from preprocess.build.progress import describe_pools
    from preprocess.build.summary import describe_build
    from preprocess.pipeline import retry as build
    from preprocess.plan.retry import Wanted, describe_choice
    from shards.errors import UserError

    _start(quiet)
    loaded = load_prep(config, overrides)
    if not (reasons or retryable):
        fix = "`wanprep status CONFIG` lists the reasons"
        raise UserError("neither --reason nor --retryable is given", expected="--reason CODE, or --retryable", fix=fix)
    wanted = Wanted(frozenset(reasons), retryable)
    with ExitStack() as stack:
        if serve is not None:
            loaded = _serve(stack, serve, loaded)
        latents: dict[str, Any] = {}
        choice, counts = build(
            loaded, wanted, dry_run=dry_run, quiet=quiet, style=style, on_latents=latents.update
        )  # fmt: skip
    chosen = {"candidates": len(choice.ordinals), "by_reason": choice.reasons, "units_gone_on_with": choice.open_units}
    lines = [
        *describe_choice(choice, wanted),
        *(["dry run: nothing was written"] if dry_run else [*describe_build(counts), *describe_pools(latents)]),
    ]
    _show({**counts, "latent_pass": latents, "retry": {**chosen, "dry_run": dry_run}}, lines, as_json)
    sys.exit(1 if counts["internal_errors"] else 0)


@main.command()
@click.argument("text_set", metavar="SET")
@_CONFIG
@OVERRIDES
@_JSON
@_PROGRESS
@_QUIET
def recaption(
    text_set: str, config: Path, overrides: tuple[str, ...], as_json: bool, style: Style, quiet: bool
) -> None:
    """Write the text set SET for all finished latents. It has CONFIG's captions; no video is read.

    \b
    wanprep recaption short configs/mbc_832x480.yaml -o 'captions.template="{object}"'
    """
    from preprocess.build.summary import describe_build
    from preprocess.pipeline import recaption as write

    _start(quiet)
    counts = write(load_prep(config, overrides), text_set, quiet=quiet, style=style)
    _show(counts, describe_build(counts), as_json)


@main.command()
@_CONFIG
@OVERRIDES
@_JSON
def status(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print how far a build is, and why clips were rejected.

    \b
    wanprep status configs/mbc_832x480.yaml
    """
    from preprocess.build.summary import count_dataset, count_work, describe_build, describe_work
    from preprocess.plan.plan import open_plan
    from shards.errors import UserError
    from shards.storage import open_storage

    loaded = load_prep(config, overrides)
    storage = open_storage(loaded.output)
    frozen = open_plan(storage)
    if not frozen.generations:
        fix = "`wanprep plan CONFIG` or `wanprep build-shards CONFIG`"
        raise UserError(f"output: {loaded.output!r}: nothing has been planned there", fix=fix)
    counts = count_dataset(storage, frozen, "default")
    counts["work"] = count_work(storage, loaded.output, counts)
    _show(counts, [*describe_build(counts), *describe_work(counts["work"])], as_json)


def _start(quiet: bool) -> None:
    import logging

    set_up_logging(level=logging.ERROR if quiet else logging.INFO)


def _show(counts: dict[str, Any], lines: list[str], as_json: bool) -> None:
    if as_json:
        print_json(counts)
    else:
        echo_lines(lines)


def _serve(stack: ExitStack, folder: Path, config: PrepConfig) -> PrepConfig:
    """Serve `folder` on a free port, with a mirror that redirects the demo corpus's fixed URLs to it."""
    from preprocess.demo.corpus import BASE_URL
    from preprocess.demo.server import served

    mirrors = {**config.fetch.mirrors, BASE_URL: stack.enter_context(served(folder))}
    return config.model_copy(update={"fetch": config.fetch.model_copy(update={"mirrors": mirrors})})


def _dry_run(config: PrepConfig, as_json: bool) -> None:
    """Count on the frozen plan if there is one, else on a temporary one."""
    from preprocess.forecast.forecast import count_plan, describe_plan
    from preprocess.plan.freeze import freeze_plan
    from preprocess.plan.plan import open_plan
    from shards.storage import open_storage

    frozen = open_plan(open_storage(config.output))
    if frozen.generations:
        counts = count_plan(frozen, config)
    else:
        with tempfile.TemporaryDirectory(prefix="wanprep-dry-run-") as folder:
            counts = count_plan(freeze_plan(open_storage(folder), config), config)
    _show(counts, [*describe_plan(counts), "dry run: nothing was written"], as_json)


for command in (plan, why, fetch_model, doctor, embed, encode_image, decode):
    main.add_command(command)


if __name__ == "__main__":
    main()
