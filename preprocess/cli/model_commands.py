"""Commands of `wanprep` around the model: fetch it, encode prompts and images for it, decode what it makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.console import counted, print_json, set_up_logging
from shards.errors import UserError

if TYPE_CHECKING:
    from preprocess.config import EncodersConfig, PrepConfig

_PATH = click.Path(path_type=Path)
_CONFIG = click.option(
    "-c", "--config", type=_PATH, required=True, help="Config of the shards, for its encoders and sizes."
)
OVERRIDES = click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config.")


@click.command("fetch-model")
@click.argument("folder", type=_PATH)
@click.option("--layout", type=click.Choice(["official", "diffusers"]), default="official", show_default=True)
@click.option(
    "--only", "part", type=click.Choice(["encoders", "transformer"]), help="Download only this part.  [default: all]"
)
@click.option("--repo", "repository", help="Repository on the hub.  [default: the published one of the layout]")
@click.option("--revision", help="Commit, branch or tag.  [default: the commit this project was written against]")
def fetch_model(folder: Path, layout: Any, part: Any, repository: str | None, revision: str | None) -> None:
    """Download Wan2.2-TI2V-5B into FOLDER.

    Every digest is checked, and the same command resumes a download that was stopped.

    \b
    wanprep fetch-model /models/Wan2.2-TI2V-5B
    wanprep fetch-model /models/Wan2.2-TI2V-5B --only encoders
    """
    from preprocess.encoders.download import fetch_model as fetch

    set_up_logging()
    done = fetch(folder, layout, part=part or "all", repository=repository, revision=revision)
    click.echo(
        f"revision {done.revision}: {counted(len(done.downloaded), 'file')} downloaded ({done.num_bytes / 1e9:.2f} GB)"
    )
    num_files = len(done.downloaded + done.present)
    click.echo(f"{len(done.present)} were already there; the digests of all {num_files} are right")


@click.command()
@click.argument("config", type=_PATH, required=False)
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def doctor(config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check this machine for encoding, or for the build of CONFIG.

    Says what is wrong and how to fix it. Exits with 1 if there is a problem.

    \b
    wanprep doctor
    wanprep doctor configs/demo/prep.yaml
    """
    from preprocess.tools.doctor import examine
    from shards.machine import is_healthy, print_findings

    if config is None and overrides:
        raise UserError("-o needs a CONFIG", fix="wanprep doctor CONFIG -o …")
    findings = list(examine(None if config is None else load_prep(config, overrides)))
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_findings(findings)
    if not is_healthy(findings):
        raise SystemExit(1)


@click.command()
@click.argument("prompts", nargs=-1, required=True)
@click.option("--out", type=_PATH, required=True, help="File to write, for `embeddings:` of a sample config.")
@_CONFIG
@OVERRIDES
def embed(prompts: tuple[str, ...], out: Path, config: Path, overrides: tuple[str, ...]) -> None:
    """Embed PROMPTS into one file for `wantrain sample`.

    The file also holds the embeddings of the empty text and of the negative prompt.

    \b
    wanprep embed "바닷가를 걷는 사람" "A market at night" --out prompts.safetensors -c configs/demo/prep.yaml
    """
    from preprocess.tools.embed import embed_prompts

    set_up_logging()
    written = embed_prompts(prompts, load_prep(config, overrides), out)
    for place, (text, array) in enumerate(zip(written.texts, written.embeddings, strict=True)):
        click.echo(f"{place}: {counted(len(array), 'token')}: {text}")


@click.command("encode-image")
@click.argument("image", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--width", type=int, required=True, help="Pixels, a multiple of 32.")
@click.option("--height", type=int, required=True, help="Pixels, a multiple of 32.")
@_CONFIG
@OVERRIDES
def encode_image(image: Path, out: Path, width: int, height: int, config: Path, overrides: tuple[str, ...]) -> None:
    """Encode IMAGE as a first frame for image-to-video.

    It is scaled to cover the size, then cropped, as training frames are.

    \b
    wanprep encode-image still.jpg first.safetensors --width 832 --height 480 -c configs/mbc_832x480.yaml
    """
    from preprocess.config import PictureSize
    from preprocess.tools.embed import encode_image as encode
    from shards.config import validate_config

    set_up_logging()
    size = validate_config(PictureSize, {"width": width, "height": height}, origin="--width, --height")
    encode(image, size, load_prep(config, overrides), out)
    click.echo(f"wrote {out}")


@click.command()
@click.argument("latents", type=_PATH, required=False)
@click.argument("out", type=_PATH, required=False)
@click.option("--watch", "run", type=_PATH, help="Decode the latents that RUN samples while it trains.")
@click.option("--every-seconds", default=10.0, show_default=True, help="Time between two checks of --watch.")
@click.option("--once", is_flag=True, help="With --watch: decode the latents that exist now, then exit.")
@click.option("--with-parent", is_flag=True, help="With --watch: end when the parent process has ended.")
@_CONFIG
@OVERRIDES
def decode(
    latents: Path | None, out: Path | None, run: Path | None, every_seconds: float, once: bool,
    with_parent: bool, config: Path, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Decode latents to a video; or, with --watch, those of a run.

    LATENTS is a file of `wantrain sample`; OUT ends in .mp4, or in .png for the first frame alone. --watch writes
    NAME.mp4 beside each latent of a run, and samples/contact-sheet.jpg and samples/side-by-side.mp4 with all of them.

    \b
    wanprep decode demo/samples/sea.safetensors sea.mp4 -c configs/demo/prep.yaml
    wanprep decode --watch demo/run -c configs/demo/prep.yaml
    """
    from preprocess.tools.decode_latents import check_suffix, decode_file, decode_new, load_decoder, watch_run

    set_up_logging()
    if (run is None) == (latents is None) or (latents is None) != (out is None):
        raise UserError("LATENTS and OUT, or --watch RUN, must be given", expected="one of the two, not both")
    if out is not None:
        check_suffix(out)
    decoder = load_decoder(load_prep(config, overrides).encoders)
    if decoder.note:
        click.echo(f"VAE: {decoder.note}: the pictures are for demonstration only", err=True)
    if latents is not None and out is not None:
        click.echo(f"{out}: {counted(len(decode_file(decoder, latents, out)), 'frame')}")
    elif run is not None and once:
        for video in decode_new(decoder, run):
            click.echo(str(video))
    elif run is not None:
        watch_run(decoder, run, every_seconds, with_parent=with_parent)


def load_prep(path: Path, overrides: tuple[str, ...]) -> PrepConfig:
    from preprocess.config import PrepConfig
    from shards.config import load_config, refuse_source_folder
    from shards.storage.patience import set_patience

    config = load_config(PrepConfig, path, overrides)
    set_patience(config.storage)
    if "://" not in config.output:
        refuse_source_folder(Path(config.output), "output")
    return config


def tokenizer_of(config: PrepConfig) -> tuple[EncodersConfig, list[str]]:
    """Whose tokenizer counts, and a note where it is not the model's: a scan needs no checkpoint of 34 GB."""
    encoders = config.encoders
    if encoders.checkpoint is None or not Path(encoders.checkpoint).exists():
        why = f" ({encoders.checkpoint} is not here)" if encoders.checkpoint else ""
        note = [f"caption tokens by the demonstration's tokenizer, not the model's{why}"]
        return encoders.model_copy(update={"checkpoint": None}), note
    return encoders, []
