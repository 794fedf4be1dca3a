"""Write a project folder: `prep.yaml` and `train.yaml`, commented, with which both stages run as they are."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.config import CorpusConfig, PrepConfig
from preprocess.project.choose import ProjectChoice, Sizes, choose, fitting_sizes
from preprocess.project.survey import Survey, survey_corpus
from shards.config import load_config, refuse_source_folder
from shards.console import counted
from shards.errors import UserError
from shards.gpus import GIB, Gpu, detect_gpu, find_gpu, vae_encode_tflop

TRIAL_DIMS = "{dim: 128, num_heads: 2, num_layers: 2, ffn_dim: 256, text_dim: 64, text_len: 512, freq_dim: 64}"
_PLAN_SECONDS = 300


class Planned(NamedTuple):
    """What `wantrain plan` says of one size, or why it could not be asked."""

    gpu: str | None
    gib: float = 0.0
    fits: bool | None = None
    train_days: float = 0.0
    encode_days: float = 0.0
    problem: str = ""


class Project(NamedTuple):
    """What was written."""

    lines: list[str]
    """What was chosen and why, for people."""
    commands: tuple[str, str]
    """What is typed next."""


def make_project(
    folder: Path, corpus: CorpusConfig, checkpoint: Path | None, gpu: str | None, num_gpus: int, **progress: Any
) -> Project:
    """Look at the corpus and the card and write the two configs. Raises UserError; writes over nothing."""
    typed, folder = folder, folder.absolute()
    prep, train = folder / "prep.yaml", folder / "train.yaml"
    corpus = _absolute(corpus)
    _check_folder(folder, corpus, (prep, train))
    if checkpoint is not None and not checkpoint.exists():
        raise UserError(f"--checkpoint {checkpoint}: no such folder", fix="`wanprep fetch-model FOLDER` gets the model")
    card, problem = _find_card(gpu)  # before the corpus is read for minutes
    survey = survey_corpus(corpus, **progress)
    for sizes in fitting_sizes(survey):
        choice = choose(survey, sizes, num_gpus)
        text = _train_text(folder, checkpoint, choice, card)
        planned = Planned(None, problem=problem) if card is None else _ask_plan(text, sizes, choice, card)
        if planned.fits is not False:
            break
    said = [*_describe(survey, sizes, choice), *_describe_plan(planned, choice.num_gpus)]
    if choice.num_gpus < num_gpus:
        said.append(
            f"GPUs       {choice.num_gpus} of {num_gpus}: about {choice.num_samples:,} samples are too few for more"
        )
    if checkpoint is None:
        said.append("model      random weights, small: a trial of the commands; --checkpoint names the real model")
    lines = [part for line in said for part in textwrap.wrap(line, 78, subsequent_indent=" " * 11)]
    prep_text = _prep_text(folder, corpus, checkpoint, survey, sizes, choice)
    folder.mkdir(parents=True, exist_ok=True)
    for path, body in ((prep, prep_text), (train, text)):
        comment = "".join(f"# {line}\n" for line in lines)
        path.write_text(f"# Written by `wanprep init`; every value may be changed.\n{comment}{body}", encoding="utf-8")
    load_config(PrepConfig, prep)
    return Project(lines, (build_command(typed / prep.name), fit_command(typed / train.name, choice.num_gpus)))


def build_command(prep: Path) -> str:
    """What is typed for stage 1: a name with a space in it is quoted."""
    return f"wanprep build-shards {shlex.quote(str(prep))}"


def fit_command(train: Path, num_gpus: int) -> str:
    """What is typed for stage 2."""
    return f"wantrain fit {shlex.quote(str(train))}" + (f" --nproc-per-node {num_gpus}" if num_gpus > 1 else "")


def _absolute(corpus: CorpusConfig) -> CorpusConfig:
    values = {name: getattr(corpus, name) for name in ("location", "root")}
    here = {
        name: os.path.normpath(Path(text).absolute()) for name, text in values.items() if text and "://" not in text
    }
    return corpus.model_copy(update=here)


def _check_folder(folder: Path, corpus: CorpusConfig, files: tuple[Path, ...]) -> None:
    refuse_source_folder(folder, "FOLDER")
    for path in files:
        if path.exists():
            raise UserError(f"{path} exists already", fix="name another FOLDER, or remove this file")
    location = Path(corpus.location)
    if "://" not in corpus.location and location.is_dir() and folder.resolve().is_relative_to(location.resolve()):
        raise UserError(
            f"{folder} is within the corpus {location}: files of the dataset would be read as clips",
            fix="name a folder outside of the corpus, such as ../project",
        )


def _find_card(gpu: str | None) -> tuple[Gpu | None, str]:
    """The GPU that is named, or this machine's; None, and why, where there is none. Raises UserError for a bad name."""
    if gpu is not None:
        return find_gpu(gpu), ""
    try:
        return detect_gpu(), ""
    except UserError as error:
        return None, error.problem


def _ask_plan(text: str, sizes: Sizes, choice: ProjectChoice, card: Gpu) -> Planned:
    """Memory and days by `wantrain plan --json` in a process of its own: this package does not import the trainer."""
    words = ["--gpu", card.name, "--gpus", str(choice.num_gpus), "--json"]
    for size in sizes.buckets:
        words += ["--size", f"{size.width}x{size.height}x{choice.num_frames}"]
    with tempfile.TemporaryDirectory(prefix="wanprep-init-") as place:
        path = Path(place, "train.yaml")
        path.write_text(text, encoding="utf-8")
        command = [sys.executable, "-P", "-m", "train.cli", "plan", str(path), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PLAN_SECONDS, check=False)
    if done.returncode:
        return Planned(card.name, problem=(done.stderr.strip() or "no answer").splitlines()[-1])
    made = json.loads(done.stdout)
    memory = made["chosen"]["memory"]
    tflop = sum(
        share * vae_encode_tflop(size.width, size.height, choice.num_frames)
        for size, share in zip(sizes.buckets, sizes.shares, strict=True)
    )
    encode_seconds = choice.num_samples * card.encode_seconds("fp32", tflop) / choice.num_gpus
    gib = memory["total"] / GIB if memory else 0.0
    return Planned(card.name, gib, made["chosen"]["fits"], made["train_days"], encode_seconds / 86_400)


def _describe(survey: Survey, sizes: Sizes, choice: ProjectChoice) -> list[str]:
    refused = ", ".join(f"{count:,} × {reason}" for reason, count in survey.refused_by.items())
    unread = ", ".join(f"{count} × {reason}" for reason, count in survey.unread_by.items())
    seconds = sorted(shape.seconds for shape in survey.shapes)
    shares = zip(sizes.buckets, sizes.shares, strict=True)
    shown = ", ".join(f"{size.width}×{size.height} {share:.0%}" for size, share in shares)
    lines = [f"corpus     {survey.layout.kind}, because {survey.layout.why}"]
    lines.append(f"clips      {survey.num_clips:,} with a caption")
    if refused:
        lines.append(f"refused    {refused}")
    if seconds:
        source = "probed" if survey.is_probed else "declared"
        lines.append(f"lengths    {seconds[0]:.1f} to {seconds[-1]:.1f} s, of {len(seconds)} {source} clips")
    if unread:
        lines.append(f"unread     {unread}")
    lines.append(
        f"sizes      {shown}; {counted(choice.num_frames, 'frame')}; about {counted(choice.num_samples, 'sample')}"
    )
    held_out = f"{choice.num_held_out:,} of the clips, chosen by a hash of their ids"
    return [*lines, f"held out   {held_out if choice.num_held_out else 'none: one clip is too few'}"]


def _describe_plan(planned: Planned, num_gpus: int) -> list[str]:
    if planned.gpu is None:
        return [f"memory     not planned ({planned.problem}); --gpu NAME plans for a card that is elsewhere"]
    if planned.problem:
        return [f"memory     not planned for {planned.gpu}: {planned.problem}"]
    fits = "" if planned.fits else "; this does NOT fit: lower data.micro_batch or the sizes"
    return [
        f"memory     {planned.gib:.1f} GiB on each of {num_gpus} × {planned.gpu}{fits}",
        f"days       {planned.encode_days:.2f} for stage 1 (encoding), {planned.train_days:.2f} for stage 2; estimates",
    ]


def _text_len(checkpoint: Path | None) -> int:
    """Tokens that the model's text takes: what its config.json says, 512 where it says nothing."""
    for name in ("config.json", "transformer/config.json"):
        path = checkpoint / name if checkpoint is not None else None
        if path is not None and path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8")).get("text_len")
            except (ValueError, AttributeError):
                continue
            if isinstance(found, int) and 1 < found < 512:
                return found
    return 512


def _quote(value: object) -> str:
    """A value as YAML: JSON is YAML."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _prep_text(
    folder: Path, corpus: CorpusConfig, checkpoint: Path | None, survey: Survey, sizes: Sizes, choice: ProjectChoice
) -> str:
    buckets = "\n".join(f"    - {{width: {size.width}, height: {size.height}}}" for size in sizes.buckets)
    changed = corpus.model_dump(exclude_defaults=True, exclude={"location", "format", "limit"})
    others = "".join(f"\n  {name}: {_quote(value)}" for name, value in changed.items())
    return f"""\
#   {build_command(folder / "prep.yaml")}
output: {_quote(folder / "shards")}
corpus:
  location: {_quote(corpus.location)}
  format: {survey.layout.kind}{others}
sieve:
  min_seconds: {choice.min_seconds}
  max_seconds: {choice.max_seconds}
  images: {_quote(survey.images)}
window:
  num_frames: {choice.num_frames}                # 24 frames a second; 4k+1
  policy: {choice.policy}
  max_windows: {choice.max_windows}               # samples of one clip
buckets:
  sizes:
{buckets}
  max_upscale: {sizes.max_upscale}               # a clip that would have to be enlarged more is refused
captions:
  prefix: ""                    # a trigger word before every caption
  max_tokens: {_text_len(checkpoint)}
fetch:
  allow_hosts: {_quote(list(survey.hosts))}
encoders:
{_checkpoint(checkpoint, "small random encoders")}
"""


def _checkpoint(checkpoint: Path | None, instead: str) -> str:
    if checkpoint is None:
        return f"  checkpoint: null              # {instead}, for a trial; the real one: /path/to/Wan2.2-TI2V-5B"
    return f"  checkpoint: {_quote(checkpoint.absolute())}"


def _train_text(folder: Path, checkpoint: Path | None, choice: ProjectChoice, card: Gpu | None) -> str:
    steps = min(10_000, max(500, -(-100 * choice.num_samples // choice.global_batch))) if checkpoint else 50
    every = max(10, steps // 20)
    model = _checkpoint(checkpoint, "a small random model") + ("" if checkpoint else f"\n  dims: {TRIAL_DIMS}")
    optimizer = "adamw8bit" if card is not None and card.memory_gib < 40 else "adamw"
    evaluation = f"\n  every_steps: {every}\n  num_clips: {min(16, choice.num_held_out)}"
    return f"""\
#   {fit_command(folder / "train.yaml", choice.num_gpus)}
output: {_quote(folder / "run")}
seed: 0
max_steps: {steps}                  # {steps * choice.global_batch:,} samples
model:
{model}
data:
  root: {_quote(folder / "shards")}
  validation_fraction: {choice.validation_fraction}    # by a hash of the clip's id: a clip never changes sides
  global_batch: {choice.global_batch}
  micro_batch: 1
lora:
  rank: 16
  targets: [self_attn, cross_attn]
optim:
  name: {optimizer}
  lr: 1e-4
  warmup_updates: {min(100, steps // 10)}
checkpoint:
  every_steps: {every}
eval:{evaluation if choice.num_held_out else " null"}
"""
