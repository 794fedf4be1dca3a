"""Configuration of sampling: which prompts, with which solver. Importing it imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shards.config import Config
from train.config.model import Positive

Side = Annotated[int, Field(gt=0, multiple_of=32)]


class SamplerConfig(Config):
    """How a latent is made from noise; the defaults are those of Wan2.2's own inference for TI2V-5B."""

    solver: Literal["unipc", "euler"] = "unipc"
    """`unipc`: UniPC of order 2, as in the official inference; `euler`: Euler."""
    steps: Positive = 50
    """Solver steps; with guidance the model is evaluated twice per step."""
    shift: Annotated[float, Field(gt=0)] = 5.0
    """σ' = shift·σ ÷ (1 + (shift − 1)·σ)."""
    guidance: Annotated[float, Field(ge=1)] = 5.0
    """v = v_null + guidance·(v_prompt − v_null); at 1 the null text is not evaluated."""
    negative: Literal["negative", "empty"] = "negative"
    """The null text of guidance: the model's negative prompt, or the empty text."""
    grid: Literal["diffusers", "official"] = "diffusers"
    """The noise levels of the steps: `diffusers`: those of the solver's scheduler in diffusers, so that WanPipeline
    gives the same video from the same seed; `official`: those of Wan2.2's own generate.py. With `unipc` they differ by
    at most 0.0043."""


class Prompt(Config):
    """One video (or picture) to sample: text, size, seed, and the first frame for image-to-video."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    """Name of the files that are written."""
    key: str | None = None
    """A sample of the dataset whose first caption is the prompt; a glob takes its first match in sorted order."""
    embeddings: str | None = None
    """A file of `wanprep embed`."""
    index: Annotated[int, Field(ge=0)] = 0
    """Number of the prompt in that file, from 0."""
    first_frame: str | None = None
    """Image-to-video: a latent of `wanprep encode-image`, or `sample` for the first latent frame of `key`."""
    width: Side | None = None
    """Pixels; null: the sample's."""
    height: Side | None = None
    """Pixels; null: the sample's."""
    num_frames: Annotated[int, Field(gt=0)] | None = None
    """Frames, 4k+1; null: the sample's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the noise, drawn on the CPU as diffusers does with a CPU generator."""

    @model_validator(mode="after")
    def _whole(self) -> Prompt:
        if (self.key is None) == (self.embeddings is None):
            raise ValueError(f"prompt {self.name}: give either key (of the dataset) or embeddings (of `wanprep embed`)")
        if self.key is None and None in (self.width, self.height, self.num_frames):
            raise ValueError(f"prompt {self.name}: width, height and num_frames are needed beside embeddings")
        if self.num_frames is not None and self.num_frames % 4 != 1:
            raise ValueError(f"prompt {self.name}: num_frames {self.num_frames} is not 4k+1")
        if self.key is not None and self.index:
            raise ValueError(f"prompt {self.name}: index {self.index} is of a file of embeddings, and key is given")
        if self.first_frame == "sample" and self.key is None:
            raise ValueError(f"prompt {self.name}: first_frame: sample needs key")
        return self


class SampleConfig(Config):
    """Sampling during training: latents under RUN/samples; `wanprep decode --watch RUN` makes videos of them."""

    every_steps: Positive = 500
    """Steps between two samplings; one is before the first step and one after the last."""
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]
    """What to sample each time."""
    sampler: SamplerConfig = SamplerConfig()
    """Solver, steps and guidance."""
    decode: str | None = None
    """The config that the shards were built with (prep.yaml): `fit` then starts `wanprep decode --watch`, a process of
    stage 1 that makes videos, a contact sheet and a side-by-side video of the samples; null: no videos are made."""
    decode_device: str = "cpu"
    """Where that process runs the VAE: `cpu`, or a GPU that the run does not use, such as `cuda:7`."""

    @model_validator(mode="after")
    def _named(self) -> SampleConfig:
        refuse_twice(self.prompts)
        return self


def refuse_twice(prompts: tuple[Prompt, ...]) -> None:
    """Raise ValueError when two prompts have one name, which would be one file."""
    names = [prompt.name for prompt in prompts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two prompts are named {name}")
