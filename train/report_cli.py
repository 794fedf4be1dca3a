"""`wantrain report`: a run as one page."""

from __future__ import annotations

from pathlib import Path

import click

from shards.console import print_json, set_up_logging


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--embed-mib", type=click.FloatRange(0, 1000), default=2.0, show_default=True,
    help="Pictures inside the page; what is beyond is linked beside it.",
)  # fmt: skip
@click.option("--hardest", type=click.IntRange(0, 1000), default=20, show_default=True, help="Samples of highest loss.")
@click.option("--no-data", is_flag=True, help="Leave the dataset alone: no strips and captions of those samples.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as one JSON document, and write no page.")
def report(run: Path, out: Path | None, embed_mib: float, hardest: int, no_data: bool, as_json: bool) -> None:
    """Show RUN, the output of `wantrain fit`, as one page that needs no network: OUT [default: RUN/report.html].

    Loss and held-out loss by noise level and mode, speed, memory, skipped updates, the samples of highest loss, sampled
    videos, where to resume. It reads only, so a run that goes on is not disturbed; make it again for what is new.

    \b
    wantrain report demo/run
    wantrain report demo/run /tmp/run.html --embed-mib 10
    wantrain report demo/run --json
    """
    from train.report import summarise, write_report
    from train.run_files import read_run
    from train.run_stats import look_up_levels

    set_up_logging()
    found = read_run(run)
    if as_json:
        print_json(summarise(found, look_up_levels(found.steps, found.config), hardest))
        return
    target = out or run / "report.html"
    notes = write_report(found, target, budget_bytes=int(embed_mib * 2**20), num_hard=hardest, open_data=not no_data)
    for line in notes:
        click.echo(line)
    click.echo(f"{target}: {target.stat().st_size / 2**20:.2f} MiB")
