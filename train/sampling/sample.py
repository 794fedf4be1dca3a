"""Reference inference: from noise, text and perhaps a first frame to a latent; the trainer has no VAE.

    noise ─▶ [velocity of prompt and of null text ─▶ guidance ─▶ solver step ─▶ first frame put back] × steps ─▶ latent

Shapes: C channels, T H W latent frames and sides, S text tokens, E text width.
Source: Wan2.2's `wan/textimage2video.py` (t2v, i2v); diffusers' `WanPipeline` and `WanImageToVideoPipeline` give
the same to 1e-4 after ten steps, which a test holds.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shards.console import LOG
from shards.errors import UserError
from shards.files.tensor_files import Prompts, read_latent_file, read_prompts, write_latent
from shards.read.dataset import Dataset
from train.config.model import DiTConfig
from train.config.sampling import Prompt, SamplerConfig
from train.data.batch import pad_texts, read_latent
from train.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE
from train.model.dit import WanDiT
from train.parallel.ranks import ALONE, Layout
from train.sampling.solver import make_grid, make_solver


class Ready(NamedTuple):
    """A prompt with its tensors, checked against the model."""

    prompt: Prompt
    text_SE: Tensor
    null_SE: Tensor
    shape: tuple[int, int, int, int]
    """C, T, H, W of the latent."""
    first_CHW: Tensor | None
    """Clean first latent frame of image-to-video."""
    facts: dict[str, str]
    """Goes into the latent's header."""


@torch.no_grad()
def sample_latent(
    model: WanDiT,
    noise_CTHW: Float[Tensor, "c t h w"],
    text_SE: Float[Tensor, "s e"],
    null_SE: Float[Tensor, "s e"],
    sampler: SamplerConfig,
    first_CHW: Float[Tensor, "c h w"] | None = None,
    look_up: Callable[[], None] = lambda: None,
) -> Float[Tensor, "c t h w"]:
    """Solve the flow from noise to a latent, float32, on the model's device.

    Args:
        noise_CTHW: standard normal, float32.
        text_SE: the prompt's embedding, zero-padded to the model's text_len.
        null_SE: the null text's, likewise; not used where guidance is 1.
        first_CHW: image-to-video: the normalised latent of the image. It is the first latent frame throughout, and
            its tokens get timestep 0.
        look_up: called before each step of the solver; it may raise.
    """
    device = next(model.parameters()).device
    x_1CTHW = noise_CTHW.to(device, torch.float32)[None]
    texts_1SE = [text_SE[None].to(device)] + ([null_SE[None].to(device)] if sampler.guidance > 1 else [])
    image_first_1 = torch.tensor([first_CHW is not None])
    grid = make_grid(sampler.solver, sampler.steps, sampler.shift, sampler.grid)
    solver = make_solver(sampler.solver, grid)
    x_1CTHW = _with_first(x_1CTHW, first_CHW)
    for timestep in grid.timesteps:
        look_up()
        time_1 = torch.tensor([timestep], device=device)
        velocities = [model(x_1CTHW, time_1, image_first_1, text_1SE) for text_1SE in texts_1SE]
        velocity_1CTHW = velocities[0]
        if len(velocities) == 2:
            velocity_1CTHW = velocities[1] + sampler.guidance * (velocities[0] - velocities[1])
        x_1CTHW = _with_first(solver.step(velocity_1CTHW, x_1CTHW), first_CHW)
    return x_1CTHW[0]


def _with_first(x_1CTHW: Tensor, first_CHW: Tensor | None) -> Tensor:
    if first_CHW is None:
        return x_1CTHW
    first_1C1HW = first_CHW.to(x_1CTHW)[None, :, None]
    return torch.cat([first_1C1HW, x_1CTHW[:, :, 1:]], dim=2)


def draw_start(seed: int, shape: Sequence[int]) -> Float[Tensor, "c t h w"]:
    """Standard normal noise of a seed, from torch's CPU generator: the same on every device, and what diffusers draws
    from `torch.Generator().manual_seed(seed)`."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def sample_prompts(
    model: WanDiT,
    prompts: Sequence[Ready],
    sampler: SamplerConfig,
    folder: Path,
    look_up: Callable[[], None] = lambda: None,
    layout: Layout = ALONE.layout,
) -> list[Path]:
    """Make a latent of each prompt, `folder/NAME.safetensors`. The model is in inference mode meanwhile.

    Prompts are divided among the ranks round by round, and each writes its own; ranks that share a sample's tokens make
    one together. In the last round some have none: of a sharded base they repeat the last prompt and write nothing.
    Every rank calls `look_up` before each step of the solver and at the end; where it raises, what is written is whole.
    """
    was_training = model.training
    model.eval()
    written = []
    try:
        for place in range(layout.dp_rank, -(-len(prompts) // layout.dp_size) * layout.dp_size, layout.dp_size):
            is_own = place < len(prompts)
            if not is_own and layout.base_shards == 1:
                for _ in range(sampler.steps):
                    look_up()
                continue
            prompt, text_SE, null_SE, shape, first_CHW, facts = prompts[min(place, len(prompts) - 1)]
            began = time.perf_counter()
            noise_CTHW = draw_start(prompt.seed, shape)
            latent_CTHW = sample_latent(model, noise_CTHW, text_SE, null_SE, sampler, first_CHW, look_up)
            if is_own and layout.ulysses_rank == 0:
                path = folder / f"{prompt.name}.safetensors"
                about = {**facts, "sampler": sampler.model_dump_json(), "seed": str(prompt.seed)}
                write_latent(path, latent_CTHW.cpu().numpy(), about)
                LOG.info("sampled %s in %.1f s", path, time.perf_counter() - began)
                written.append(path)
        look_up()  # here all ranks learn of one that could not write its own
    finally:
        model.train(was_training)
    return written


def prepare_prompts(
    prompts: Sequence[Prompt], sampler: SamplerConfig, dims: DiTConfig, dataset: Dataset | None
) -> list[Ready]:
    """Read every prompt's embeddings and first frame, and check them against the model.

    Raises UserError naming the prompt for: a key or file that is not there, text of another encoder's width or longer
    than the model takes, a first frame of another size.
    """
    return [_prepare(prompt, sampler, dims, dataset) for prompt in prompts]


def _prepare(prompt: Prompt, sampler: SamplerConfig, dims: DiTConfig, dataset: Dataset | None) -> Ready:
    where = f"prompt {prompt.name}"
    facts = {"name": prompt.name, "fps": "24"}
    vae = dataset.identity.get("vae") if dataset is not None else None
    if isinstance(vae, dict) and "weights_sha256" in vae:
        facts["vae"] = str(vae["weights_sha256"])  # the model's latents are in its space
    source: Dataset | Prompts
    if prompt.key is not None:
        if dataset is None:
            raise UserError(f"{where}: key {prompt.key} needs a dataset", fix="give data.root")
        key = find_key(dataset, prompt.key, where)
        text, source = dataset.text(key), dataset
        facts |= {"prompt": str(dataset.text_meta(key)["captions"][0]), "key": key}
        sample = dataset.samples[dataset.ordinal(key)]
        size = (prompt.num_frames or sample.frames, prompt.height or sample.height, prompt.width or sample.width)
    else:
        source = read_prompts(str(prompt.embeddings))
        if prompt.index >= len(source.texts):
            raise UserError(
                f"{where}: index {prompt.index} of {prompt.embeddings}", expected=f"below {len(source.texts)}"
            )
        text = source.embeddings[prompt.index]
        facts["prompt"] = source.texts[prompt.index]
        size = (int(prompt.num_frames or 0), int(prompt.height or 0), int(prompt.width or 0))
    null = source.null_text(sampler.negative)
    shape = latent_shape(dims.in_channels, *size)
    texts_SE = [_checked_text(array, dims, where) for array in (text, null)]
    return Ready(prompt, texts_SE[0], texts_SE[1], shape, _first_frame(prompt, dataset, shape, facts), facts)


def find_key(dataset: Dataset, pattern: str, where: str) -> str:
    """The key itself, or the first in sorted order that a glob matches. Raises UserError when there is none."""
    if not any(mark in pattern for mark in "*?["):
        dataset.ordinal(pattern)
        return pattern
    matches = sorted(sample.key for sample in dataset.samples if fnmatch.fnmatchcase(sample.key, pattern))
    if not matches:
        raise UserError(f"{where}: no key matches {pattern!r}", fix="`wanshards ls ROOT --keys`")
    return matches[0]


def latent_shape(channels: int, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """C, T, H, W of a clip's latent: first frame alone, then four frames each; 16 pixels a side."""
    return channels, (num_frames - 1) // TEMPORAL_STRIDE + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def _checked_text(text: np.ndarray, dims: DiTConfig, where: str) -> Tensor:
    if text.shape[1] != dims.text_dim:
        raise UserError(
            f"{where}: embeddings of width {text.shape[1]}, the model takes {dims.text_dim}",
            fix="embed with the text encoder that the model belongs to",
        )
    if len(text) > dims.text_len:
        raise UserError(f"{where}: {len(text)} tokens, the model takes {dims.text_len}", fix="a shorter prompt")
    return pad_texts([text], dims.text_len)[0].float()


def _first_frame(
    prompt: Prompt, dataset: Dataset | None, shape: tuple[int, int, int, int], facts: dict[str, str]
) -> Tensor | None:
    if prompt.first_frame is None:
        return None
    if shape[1] == 1:
        raise UserError(f"prompt {prompt.name}: one frame, and its first frame is given", expected="at least 5 frames")
    facts["first_frame"] = prompt.first_frame
    if prompt.first_frame == "sample" and dataset is not None:
        ordinal = dataset.ordinal(facts["key"])
        values = read_latent(dataset, ordinal, dataset.samples[ordinal])
    else:
        values = read_latent_file(prompt.first_frame).values
    frame_CHW = torch.from_numpy(values[:, 0].copy())
    if tuple(frame_CHW.shape) != (shape[0], shape[2], shape[3]):
        _, height, width = frame_CHW.shape
        raise UserError(
            f"prompt {prompt.name}: its first frame is {width * SPATIAL_STRIDE}×{height * SPATIAL_STRIDE} pixels, "
            f"{frame_CHW.shape[0]} channels",
            expected=f"{shape[3] * SPATIAL_STRIDE}×{shape[2] * SPATIAL_STRIDE}, {shape[0]} channels",
            fix="`wanprep encode-image` at the prompt's size",
        )
    return frame_CHW
