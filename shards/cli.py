"""`wanshards`: look into a dataset, check it, copy out of it. A root is a folder or s3://bucket/prefix."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import click

from shards.console import CommandGroup, print_json, set_up_logging

if TYPE_CHECKING:
    from shards.verify import Level

ROOT = click.argument("root")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document, for programs.")
TEXT_SET = click.option("--text-set", default=None, metavar="NAME", help="Text set [default: 'default' if there].")


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wan-broadcast-lora")
def main() -> None:
    """Look into a dataset of sealed shards, check it, copy out of it.

    ROOT is a folder or s3://bucket/prefix (append ?endpoint=URL for another server).

    Exit codes: 0 all is well, 1 damage was found, 2 the command could not be carried out.
    """
    set_up_logging()


@main.command("ls")
@ROOT
@AS_JSON
@click.option("--keys", is_flag=True, help="List the samples, one key a line.")
def list_command(root: str, as_json: bool, keys: bool) -> None:
    """What the dataset holds: identity, revision, units, samples by bucket, text sets.

    \b
    wanshards ls demo/shards
    wanshards ls s3://bucket/prefix --json
    """
    from shards.overview import overview, print_overview

    if keys:
        from shards.dataset import open_dataset

        dataset = open_dataset(root, None)
        names = [sample.key for sample in dataset.samples]
        if as_json:
            print_json(names)
        else:
            for name in names:
                click.echo(name)
        return
    found = overview(root)
    if as_json:
        print_json(found)
    else:
        print_overview(found)


@main.command()
@ROOT
@click.argument("key")
@AS_JSON
def show(root: str, key: str, as_json: bool) -> None:
    """One sample: where it lies, its JSON, its captions in every text set.

    \b
    wanshards show demo/shards clip-1@0-49-480x832
    """
    from shards.overview import print_sample, sample_details

    found = sample_details(root, key)
    if as_json:
        print_json(found)
    else:
        print_sample(found)


@main.command()
@ROOT
@AS_JSON
@click.option("--fast", "level", flag_value="fast", help="Documents, sizes and completeness only.")
@click.option("--deep", "level", flag_value="deep", help="Also decode every array and check that it is finite.")
@click.option("--partial", is_flag=True, help="Planned units that are not there yet are no problem.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Files read at a time.")
def verify(root: str, as_json: bool, level: str | None, partial: bool, jobs: int) -> None:
    """Check every byte against the commits. Exit code 1 when damage was found.

    \b
    wanshards verify demo/shards --jobs 4
    wanshards verify s3://bucket/prefix --fast --json
    """
    from shards.overview import print_report, run_verify

    report = run_verify(root, cast("Level", level or "hash"), jobs, partial)
    if as_json:
        print_json({**report._asdict(), "problems": [problem._asdict() for problem in report.problems]})
    else:
        print_report(report)
    sys.exit(1 if report.problems else 0)
