"""`wanshards`: inspect a dataset, check it, copy samples out of it. ROOT is a folder or s3://bucket/prefix."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from shards import __version__
from shards.console import CommandGroup, as_typed, counted, echo_lines, print_json, set_up_logging
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.check.verify import Level

ROOT = click.argument("root")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document, for programs.")
TEXT_SET = click.option(
    "--text-set", default=None, metavar="NAME", help="Text set.  [default: 'default', if it exists]"
)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Inspect a dataset of shards, check it, copy samples out of it.

    ROOT is a folder or s3://bucket/prefix (append ?endpoint=URL for another server).

    Exit codes: 0 all is well, 1 damage was found, 2 the command could not run, 75 try again later: the storage does
    not answer, or the disk is full.
    """
    set_up_logging()


@main.command("ls")
@ROOT
@AS_JSON
@click.option("--keys", is_flag=True, help="List the keys of the samples, one per line.")
def list_command(root: str, as_json: bool, keys: bool) -> None:
    """Show identity, revision, units, buckets and text sets.

    \b
    wanshards ls demo/shards
    wanshards ls s3://bucket/prefix --json
    """
    from shards.show.overview import dataset_overview, print_overview

    if keys:
        from shards.read.dataset import open_dataset

        dataset = open_dataset(root, None)
        names = [sample.key for sample in dataset.samples]
        if as_json:
            print_json(names)
        else:
            for name in names:
                click.echo(name)
        return
    found = dataset_overview(root)
    if as_json:
        print_json(found)
    else:
        print_overview(found)


@main.command()
@ROOT
@click.argument("key", metavar="KEY|CLIP", callback=as_typed)
@AS_JSON
@click.option(
    "--preview", type=click.Path(path_type=Path), help="Also write the sample's strip of frames to this JPEG file."
)
def show(root: str, key: str, as_json: bool, preview: Path | None) -> None:
    """Show one sample, or what became of one clip.

    For a key: the shard, the JSON, the captions in every text set. For a clip id, or the name of an annotation: every
    attempt at it, why it was refused, and whether a retry can help. `wantrain show-clip` says which steps of a run used
    a clip.

    \b
    wanshards show demo/shards clip-1@0-49-480x832
    wanshards show demo/shards clip-1@0-49-480x832 --preview strip.jpg
    wanshards show demo/shards 3338992
    """
    from shards.show.clip import describe_clip, find_clip
    from shards.show.overview import print_sample, sample_details, write_preview
    from shards.storage import open_storage

    if not re.fullmatch(r"[a-z0-9_~-]+@\d+-\d+-\d+x\d+", key):
        history = find_clip(open_storage(root), key)
        if as_json:
            print_json(history)
        else:
            echo_lines(describe_clip(history))
        return

    if preview is not None:
        write_preview(root, key, preview)

    found = sample_details(root, key)
    if as_json:
        print_json(found)
    else:
        print_sample(found)


@main.command()
@ROOT
@AS_JSON
@click.option("--fast", "level", flag_value="fast", help="Check only JSON documents, file sizes and completeness.")
@click.option("--deep", "level", flag_value="deep", help="Also decode every array and check that it is finite.")
@click.option("--partial", is_flag=True, help="Accept that units are missing: the build is not finished.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Files read at a time.")
def verify(root: str, as_json: bool, level: str | None, partial: bool, jobs: int) -> None:
    """Check every byte against the commits. Exit code 1 when damage was found.

    \b
    wanshards verify demo/shards --jobs 4
    wanshards verify s3://bucket/prefix --fast --json
    """
    from shards.show.overview import print_report, run_verify

    report = run_verify(root, cast("Level", level or "hash"), jobs, partial)
    if as_json:
        print_json({**report._asdict(), "problems": [problem._asdict() for problem in report.problems]})
    else:
        print_report(report)
    sys.exit(1 if report.problems else 0)


@main.command()
@ROOT
def index(root: str) -> None:
    """Write an index, so that a large dataset opens faster.

    index.jsonl.zst holds all commits in one file. It is only a cache: an old or missing index changes only the time to
    open.
    """
    from shards.read.index import write_index
    from shards.storage import open_storage

    click.echo(f"{write_index(open_storage(root))} shards indexed")


@main.command()
@ROOT
@click.argument("member", metavar="KEY.SUFFIX")
@TEXT_SET
@click.option("--npy", is_flag=True, help="Decompress, and write a plain .npy.")
def cat(root: str, member: str, text_set: str | None, npy: bool) -> None:
    """Write one member of a sample to standard output. Its digest is checked first.

    \b
    wanshards cat demo/shards clip-1@0-49-480x832.json
    wanshards cat demo/shards clip-1@0-49-480x832.preview.jpg > strip.jpg
    wanshards cat demo/shards clip-1@0-49-480x832.text.npy.zst --npy > text.npy
    """
    from shards.show.member import member_bytes

    sys.stdout.buffer.write(member_bytes(root, member, text_set, npy))


@main.command()
@ROOT
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--plain", is_flag=True, help="One uncompressed tar per unit, with latents and text (webdataset).")
@TEXT_SET
def export(root: str, target: Path, plain: bool, text_set: str | None) -> None:
    """Copy the samples into the folder TARGET in another format.

    \b
    wanshards export --plain demo/shards plain/
    """
    from shards.format.dataset_info import read_info
    from shards.read.dataset import open_dataset
    from shards.show.export_plain import export_plain
    from shards.storage import open_storage

    if not plain:
        raise UserError("no output format is named", expected="--plain")
    if text_set is None and "default" in read_info(open_storage(root)).text_sets:
        text_set = "default"
    dataset = open_dataset(root, text_set)
    written = export_plain(dataset, target)
    text = f"text set {text_set}" if text_set else "no text"
    click.echo(f"{counted(len(written), 'tar')}, {counted(len(dataset), 'sample')}, {text} in {target}")


@main.command()
@ROOT
@AS_JSON
@TEXT_SET
@click.option(
    "--sample", type=click.IntRange(1), metavar="N", help="Read only N samples, chosen by a hash of their keys."
)
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Units read at a time.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of the cached results.  [default: ~/.cache/wanshards]"
)
@click.option("--no-cache", is_flag=True, help="Do not read or write the cache.")
@click.option("--check", is_flag=True, help="Exit with 1 if a finding has the severity 'bad'.")
def stats(
    root: str,
    as_json: bool,
    text_set: str | None,
    sample: int | None,
    jobs: int,
    cache: Path | None,
    no_cache: bool,
    check: bool,
) -> None:
    """Show statistics of the dataset, and what looks wrong.

    Looks wrong: shifted channels, another VAE, duplicates, constant latents. Every latent is read once. The results of
    each unit are cached, so a second run, also after the dataset grew, is quick. A build may be running: units without
    a commit are counted as waiting.

    \b
    wanshards stats demo/shards
    wanshards stats s3://bucket/prefix --sample 2000 --jobs 8 --json
    """
    from shards.stats.stats import dataset_stats, stats_lines
    from shards.stats.unit import default_cache

    found = dataset_stats(
        root, text_set=text_set, sample=sample, jobs=jobs, cache=None if no_cache else cache or default_cache()
    )
    if as_json:
        print_json(found)
    else:
        echo_lines(stats_lines(found))
    sys.exit(1 if check and any(item["severity"] == "bad" for item in found["findings"]) else 0)


@main.command()
@ROOT
@click.argument("out", metavar="OUT.html", type=click.Path(path_type=Path))
@AS_JSON
@click.option(
    "--sample", type=click.IntRange(1), metavar="N", help="Latents to read for the statistics.  [default: 2000]"
)
@click.option("--all", "read_all", is_flag=True, help="Read every latent, except those that `stats` has cached.")
@click.option(
    "--max-mb", type=click.FloatRange(1, 1000), default=20.0, show_default=True, help="Largest size of the page, MB."
)
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Units read at a time.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of the cached results.  [default: ~/.cache/wanshards]"
)
def report(
    root: str,
    out: Path,
    as_json: bool,
    sample: int | None,
    read_all: bool,
    max_mb: float,
    jobs: int,
    cache: Path | None,
) -> None:
    """Write one HTML page about the dataset.

    It shows how many records became samples, distributions, findings, and samples with pictures and captions. The page
    needs no network and can be sent to others: it holds only data of the dataset. OUT.html#KEY opens it at a sample.

    \b
    wanshards report demo/shards demo/shards.html
    wanshards report s3://bucket/prefix dataset.html --sample 5000 --jobs 8
    """
    from shards.report.report import DEFAULT_SAMPLE, write_dataset_report
    from shards.stats.unit import default_cache

    if read_all and sample is not None:
        raise UserError("--sample and --all are both given", expected="one of them")
    number = None if read_all else sample or DEFAULT_SAMPLE
    made = write_dataset_report(
        root, out, sample=number, max_megabytes=max_mb, cache=cache or default_cache(), jobs=jobs
    )
    if as_json:
        print_json(made)
        return
    click.echo(
        f"{made['file']}: {made['bytes'] / 1e6:.1f} MB, {made['samples']:,} of {made['of_samples']:,} samples "
        f"({made['samples_with_pictures']:,} with pictures), {made['refused']:,} of {made['of_refused']:,} refused "
        f"records, {made['findings']} findings"
    )


@main.command()
@ROOT
@AS_JSON
@click.option("--delete", is_flag=True, help="Remove them; without it they are only listed.")
@click.option(
    "--older-than-hours",
    type=click.FloatRange(0),
    default=24.0,
    show_default=True,
    help="Leave files younger than this.",
)
def sweep(root: str, as_json: bool, delete: bool, older_than_hours: float) -> None:
    """List or remove the files that killed writers left.

    Tars and ledgers that no commit names, temporary files, unfinished uploads. The newest tar of a running build has no
    commit yet: --older-than-hours must be longer than the upload of one unit.
    """
    from shards.check.orphans import sweep as find
    from shards.storage import open_storage

    found = find(open_storage(root), older_than_hours * 3600, delete=delete)
    if as_json:
        print_json({"deleted": delete, "orphans": [orphan._asdict() for orphan in found]})
        return
    for orphan in found:
        click.echo(f"{orphan.size:>14,}  {orphan.name}")
    what = "removed" if delete else "found (--delete removes them)"
    click.echo(f"{len(found)} orphans, {sum(orphan.size for orphan in found):,} bytes {what}")


if __name__ == "__main__":
    main()
