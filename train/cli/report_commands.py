"""`wantrain report`: a run as one page."""

from __future__ import annotations

from pathlib import Path

import click

from shards.console import echo_lines, print_json, set_up_logging
from shards.errors import UserError


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--embed-mib", type=click.FloatRange(0, 1000), default=2.0, show_default=True,
    help="Most MiB of pictures inside the page; further ones are links to files beside it.",
)  # fmt: skip
@click.option(
    "--hardest", type=click.IntRange(0, 1000), default=20, show_default=True, help="How many samples of highest loss."
)
@click.option("--no-data", is_flag=True, help="Do not read the dataset: no frames and captions of these samples.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as one JSON document, and write no page.")
def report(run: Path, out: Path | None, embed_mib: float, hardest: int, no_data: bool, as_json: bool) -> None:
    """Write one HTML page about RUN, the output of `wantrain fit`.

    OUT is RUN/report.html by default; the page needs no network. Loss and held-out loss by noise level and mode, speed,
    memory, skipped updates, the samples of highest loss, sampled videos, where to resume. The command only reads, so it
    does not disturb a run; type it again to see newer steps.

    \b
    wantrain report demo/run
    wantrain report demo/run /tmp/run.html --embed-mib 10
    wantrain report demo/run --json
    """
    from train.report.curves import look_up_levels
    from train.report.page import open_for, summarise, write_run_report
    from train.report.read_run import read_run

    set_up_logging()
    found = read_run(run)
    if as_json:
        dataset = open_for(found)[0] if found.config.data.weights and not no_data else None
        print_json(summarise(found, look_up_levels(found.steps, found.config), hardest, dataset))
        return
    target = out or run / "report.html"
    notes = write_run_report(
        found, target, budget_bytes=int(embed_mib * 2**20), num_hard=hardest, open_data=not no_data
    )
    echo_lines([*notes, f"{target}: {target.stat().st_size / 2**20:.2f} MiB"])


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def verify(run: Path, as_json: bool) -> None:
    """Check every byte of the checkpoints of RUN.

    RUN may also be one checkpoint. The bytes are compared with the digests that were written with them. Exits with 1 if
    something is damaged. A checkpoint left unfinished by a kill is not damage: the next resume removes it.

    \b
    wantrain verify demo/run
    wantrain verify demo/run/checkpoints/step-0000040 --json
    """
    from train.checkpoint import verify_run

    set_up_logging()
    found = verify_run(run)
    if as_json:
        print_json([one._asdict() for one in found])
    else:
        for one in found:
            click.echo(f"{one.state:<10}  {one.path}{''.join(f'{chr(10)}            {what}' for what in one.problems)}")
        if any(one.state == "unverified" for one in found):
            click.echo("unverified: written without digests, by an earlier version of this program")
    if any(one.state == "damaged" for one in found):
        raise SystemExit(1)


@click.command("show-clip")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("key")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def show_clip(run: Path, key: str, as_json: bool) -> None:
    """List the steps of RUN that trained on a sample.

    KEY is a sample's key, or a glob over keys. A line shows slot, mode, noise level and loss. Noise is given as a
    quantile of the levels that training draws: 0 the lowest, 1 the highest. `show-step` shows the complete step.

    \b
    wantrain show-clip demo/run '3338992@0-17-160x96'
    wantrain show-clip demo/run '3338992@*' --json
    """
    from train.report.curves import look_up_levels, uses_of
    from train.report.read_run import read_run

    found = read_run(run)
    uses = uses_of(found.steps, look_up_levels(found.steps, found.config), key)
    if not uses:
        raise UserError(
            f"no step of {run} trained on {key!r}",
            expected="the key of a sample that a step has used, or a glob such as 'CLIP@*'",
            fix="held-out clips are never trained on; `wanshards ls ROOT --keys` lists all",
        )
    if as_json:
        print_json(uses)
        return
    for use in uses:
        loss = "not finite" if use["loss"] is None else f"{use['loss']:.4f}"
        where = f"step {use['step']:>7,}  slot {use['slot']:>3}  {use['mode']}  noise {use['quantile']:.2f}"
        click.echo(f"{where}  loss {loss}  {use['key']}")
