"""`wantrain sample`: pictures from a checkpoint, with or without a LoRA, as latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
from pydantic import Field, model_validator

from shards.config import Config, load_config
from shards.console import set_up_logging
from train.config.sampling import Prompt, SamplerConfig, refuse_twice
from train.config.train import BaseModelConfig, ComputeConfig

if TYPE_CHECKING:
    from train.model.dit import WanDiT


class SampleDataConfig(Config):
    """The dataset that prompts with a `key` come from."""

    root: str | tuple[str, ...]
    """Folder or `s3://bucket/prefix` of sealed shards, or several."""
    text_set: str = "default"
    """Which set of captions."""


class SampleRun(Config):
    """`wantrain sample`: prompts, model, solver."""

    output: str
    """Folder of the latents, NAME.safetensors each."""
    model: BaseModelConfig
    lora: str | None = None
    """A LoRA file of any tool, a run or a checkpoint; null: the base alone."""
    lora_scale: float = 1.0
    """Strength of the LoRA, on top of its own scale."""
    data: SampleDataConfig | None = None
    """Needed by prompts with a key."""
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]
    """What to make."""
    sampler: SamplerConfig = SamplerConfig()
    """How."""
    precision: ComputeConfig = ComputeConfig()
    """In what numbers, and where."""

    @model_validator(mode="after")
    def _named(self) -> SampleRun:
        refuse_twice(self.prompts)
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"lora_scale: {self.lora_scale:g} scales a LoRA, and lora is null")
        return self


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: -o sampler.steps=20")
def sample(config: Path, overrides: tuple[str, ...]) -> None:
    """Make a latent of each prompt of CONFIG, as Wan2.2's own inference does; `wanprep decode` makes videos of them.

    \b
    wantrain sample configs/demo/sample.yaml
    wantrain sample configs/demo/sample.yaml -o lora=null -o output=demo/samples-base
    """
    loaded = load_config(SampleRun, config, overrides)
    set_up_logging()
    for path in sample_run(loaded):
        click.echo(str(path))


def sample_run(config: SampleRun) -> list[Path]:
    """Load the model, its LoRA and the prompts, and write the latents. Raises UserError before any step is taken."""
    from shards.read.dataset import open_dataset
    from train.model.load import read_dit_config
    from train.run.session import determinism
    from train.sampling.sample import prepare_prompts, sample_prompts

    dims = config.model.dims or read_dit_config(str(config.model.checkpoint))
    dataset = None
    if config.data is not None:
        roots = (config.data.root,) if isinstance(config.data.root, str) else config.data.root
        dataset = open_dataset(roots, config.data.text_set)
    ready = prepare_prompts(config.prompts, config.sampler, dims, dataset)
    with determinism(config.precision.deterministic):
        return sample_prompts(_load_model(config), ready, config.sampler, Path(config.output))


def _load_model(config: SampleRun) -> WanDiT:
    from train.device import choose_device, device_info
    from train.lora.export import locate_lora
    from train.lora.formats import read_lora
    from train.lora.lora import attach_lora
    from train.model.dit import build_model
    from train.model.load import load_dit, read_dit_config
    from train.precision import resolve_precision

    # Read first: a wrong file is told before twenty gigabytes are loaded.
    lora = None if config.lora is None else read_lora(locate_lora(Path(config.lora))[0])
    device = choose_device(config.precision.device)
    precision = resolve_precision(config.precision.compute, device_info(device))
    checkpoint = config.model.checkpoint
    dims = config.model.dims or read_dit_config(str(checkpoint))
    seed = config.model.random_seed if checkpoint is None else None
    model = build_model(dims, precision.dtype, device, seed=seed)
    if checkpoint is not None:
        load_dit(model, checkpoint)
    if lora is not None:
        attach_lora(model, lora, config.lora_scale)
    return model.eval()
