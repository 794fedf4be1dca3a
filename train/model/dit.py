"""The Wan2.2 diffusion transformer, with the official names.

    latent ─▶ patches ─▶ blocks × n (self-attention, cross-attention, feed-forward) ─▶ head ─▶ velocity

Shapes: B slots, C channels, T H W latent frames, rows, columns, L tokens, D model width, N heads, K channels a head,
S text tokens, E text width, P channels of a patch, R modulation rows a sample: one (t), or two (first frame's, then t).

Precision, as the official model under autocast: linears and attention in the compute dtype; residual stream, norms,
rotation, time embedding, modulation, gates and head in float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from train.config.model import DiTConfig
from train.device import device_info
from train.model.attention import Backend, choose_backend
from train.model.block import (
    Block,
    BlockInputs,
    BlockRunner,
    DropoutKey,
    Linear,
    norm_and_modulate,
    run_plain,
    run_recomputed,
)
from train.model.kernels import probed
from train.model.patchify import num_patch_channels, patchify, token_grid, unpatchify
from train.model.quantise import quantised_weights
from train.model.rope import rope_table
from train.model.stream import BlockStream
from train.parallel.ulysses import Ulysses, gather, pad_tokens


class Head(nn.Module):
    """From the residual stream to patches of velocity, in float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, num_patch_channels(config, config.out_channels), dtype=torch.float32)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim, dtype=torch.float32))
        self.eps = config.eps

    def forward(self, x_BLD: Tensor, time_BRD: Tensor, num_first: int) -> Tensor:
        """Norm, modulate by shift and scale, project (Wan model.py, Head)."""
        shift, scale = (self.modulation + time_BRD[:, :, None]).unbind(2)
        return self.head(norm_and_modulate(x_BLD, shift, scale, num_first, eps=self.eps, dtype=torch.float32))


class WanDiT(nn.Module):
    """Velocity of a noised latent, given its timestep, its text, and whether its first frame is the clean condition."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, param_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = dtype
        kept = param_dtype or dtype
        dim = config.dim
        # Kept as the official Conv3d's weight; its stride is its size, so it is a linear on patches.
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, config.patch, dtype=kept)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, dim, dtype=kept), nn.GELU(approximate="tanh"), Linear(dim, dim, dtype=kept)
        )
        fp32 = torch.float32
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim, dtype=fp32), nn.SiLU(), nn.Linear(dim, dim, dtype=fp32)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, dtype=fp32))
        self.blocks = nn.ModuleList(Block(config, kept) for _ in range(config.num_layers))
        self.head = Head(config)
        self.run_block: BlockRunner = run_plain
        self.ulysses: Ulysses | None = None
        """The ranks that share the tokens of a sample: all call the model, with the same inputs, and get the same."""
        self.stream: BlockStream | None = None
        """Brings blocks from the host's memory; None: all are on the device."""

    def forward(
        self,
        latent_BCTHW: Float[Tensor, "b c t h w"],
        timestep_B: Float[Tensor, " b"],
        image_first_B: Bool[Tensor, " b"],
        text_BSE: Float[Tensor, "b s e"],
        dropout_key_B: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c2 t h w"]:
        """Velocity ε − x₀, float32.

        Args:
            latent_BCTHW: normalised latents, noised; the first frame clean where image_first.
            timestep_B: 1000 σ, float32 (a 16-bit timestep trains wrong in silence, so it is refused).
            image_first_B: samples whose first latent frame is clean: its tokens take timestep 0. Best kept on the CPU:
                the host asks whether any is set.
            text_BSE: text embeddings, zero-padded to text_len (see `pad_texts`); the padding is attended.
            dropout_key_B: one key a sample; needed when LoRA dropout is on and the model is in training mode.

        Raises: ValueError, TypeError on inputs that would train wrong.
        """
        check_inputs(self.config, latent_BCTHW, timestep_B, image_first_B, text_BSE)
        grid = token_grid(self.config, latent_BCTHW.shape)
        tokens_BLP, offset = patchify(latent_BCTHW, self.config.patch), 0
        num_tokens = tokens_BLP.shape[1]
        if self.ulysses is not None:
            tokens_BLP, offset = self.ulysses.own(tokens_BLP), self.ulysses.offset(num_tokens)
        velocity_BLP = self.forward_tokens(
            tokens_BLP,
            grid,
            offset,
            timestep_B=timestep_B,
            image_first_B=image_first_B,
            text_BSE=text_BSE,
            dropout_key_B=dropout_key_B,
        )
        if self.ulysses is not None:
            velocity_BLP = gather(self.ulysses, velocity_BLP, num_tokens)
        # A view would lose FSDP2's hook to an in-place operation on it.
        return unpatchify(velocity_BLP, grid, self.config.patch).clone()

    def forward_tokens(
        self,
        tokens_BLP: Float[Tensor, "b l p"],
        grid: tuple[int, int, int],
        token_offset: int,
        *,
        timestep_B: Float[Tensor, " b"],
        image_first_B: Bool[Tensor, " b"],
        text_BSE: Float[Tensor, "b s e"],
        dropout_key_B: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b l p2"]:
        """The same on patches: a rank of a sequence passes its stretch of tokens and where it begins in the grid."""
        num_held, num_tokens = tokens_BLP.shape[1], grid[0] * grid[1] * grid[2]
        # A rank that holds none of the first frame needs one row, like a batch without image-to-video samples.
        num_first = min(max(grid[1] * grid[2] - token_offset, 0), num_held) if image_first_B.any() else 0
        time_BRD, rows_BR6D = self.embed_time(timestep_B, image_first_B, two_rows=num_first > 0)
        device, dtype = tokens_BLP.device, self.compute_dtype
        inputs = BlockInputs(
            rows_BR6D=rows_BR6D,
            text_BSD=self.text_embedding(text_BSE.to(dtype)),
            rope=_rope(self.config.head_dim, grid, token_offset, num_held, device),
            num_first=num_first,
            backend=backend_for(device, dtype, num_tokens, self.config.head_dim),
            dropout=None if dropout_key_B is None else DropoutKey(dropout_key_B.to(device), token_offset),
            ulysses=self.ulysses,
            num_tokens=num_tokens,
        )
        weight, bias = self.patch_embedding.weight.flatten(1), cast(Tensor, self.patch_embedding.bias)
        x_BLD = F.linear(tokens_BLP.to(dtype), weight.to(dtype), bias.to(dtype)).float()
        if self.stream is not None and torch.is_grad_enabled() and self.run_block in (run_plain, run_recomputed):
            raise ValueError("autograd would keep weights that are streamed: see train.recompute.runner.keep")
        for index, block in enumerate(self.blocks):
            if self.stream is not None:
                self.stream.forward(index)
            x_BLD = self.run_block(index, cast(Block, block), x_BLD, inputs)
        return self.head(x_BLD, time_BRD, num_first)

    def embed_time(self, timestep_B: Tensor, image_first_B: Tensor, *, two_rows: bool) -> tuple[Tensor, Tensor]:
        """Time embedding B × R × D and its projection B × R × 6 × D, float32.

        With two rows the first is the first frame's: t = 0 where image_first, else t.
        """
        rows_BR = timestep_B[:, None]
        if two_rows:
            first_B = torch.where(image_first_B.to(timestep_B.device, non_blocking=True), 0.0, timestep_B)
            rows_BR = torch.stack([first_B, timestep_B], dim=1)
        time_BRD = self.time_embedding(sinusoids(rows_BR, self.config.freq_dim))
        return time_BRD, self.time_projection(time_BRD).unflatten(2, (6, -1))


def _rope(
    head_dim: int, grid: tuple[int, int, int], offset: int, num_held: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rotary table of the tokens held here; what is held beyond the grid is padding."""
    num_tokens = grid[0] * grid[1] * grid[2]
    start = min(offset, num_tokens)
    cos, sin = rope_table(head_dim, grid, start, min(num_held, num_tokens - start), device)
    return pad_tokens(cos[None], num_held)[0], pad_tokens(sin[None], num_held)[0]


def set_checkpointing(model: WanDiT, mode: str) -> None:
    """Choose how blocks are run: `none` keeps activations, `full` recomputes every block in the backward pass."""
    model.run_block = {"none": run_plain, "full": run_recomputed}[mode]


def sinusoids(timestep: Float[Tensor, "*shape"], width: int) -> Float[Tensor, "*shape w"]:
    """Cosines then sines of a timestep, computed in float64, float32 out (Wan model.py, sinusoidal_embedding_1d)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float64, device=timestep.device)
    angles = timestep.double()[..., None] * 10_000.0 ** (-steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def check_inputs(
    config: DiTConfig, latent_BCTHW: Tensor, timestep_B: Tensor, image_first_B: Tensor, text_BSE: Tensor
) -> None:
    """Refuse inputs that would be computed without complaint and mean something else."""
    batch, channels, frames, rows, columns = latent_BCTHW.shape
    if timestep_B.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"timestep is {timestep_B.dtype}: 713.25 becomes 712 in bfloat16; pass float32")
    if timestep_B.shape != (batch,) or image_first_B.shape != (batch,):
        raise ValueError(
            f"{batch} samples, timestep {tuple(timestep_B.shape)}, image_first {tuple(image_first_B.shape)}"
        )
    if image_first_B.dtype != torch.bool:
        raise TypeError(f"image_first is {image_first_B.dtype}, not bool")
    if channels != config.in_channels or rows % config.patch[1] or columns % config.patch[2]:
        raise ValueError(
            f"latent {channels} × {frames} × {rows} × {columns}: expected {config.in_channels} channels and rows, "
            f"columns that divide by {config.patch[1]} and {config.patch[2]}"
        )
    if text_BSE.shape != (batch, config.text_len, config.text_dim):
        raise ValueError(
            f"text is {tuple(text_BSE.shape)}, not {(batch, config.text_len, config.text_dim)}: the model attends the "
            "zero padding, so text must be padded to text_len (train.batch.pad_texts)"
        )


@lru_cache(maxsize=64)
def backend_for(device: torch.device, dtype: torch.dtype, num_tokens: int, head_dim: int) -> Backend:
    """`choose_backend` for a real device, its kernels probed."""
    chosen = choose_backend(device_info(device), dtype, num_tokens, head_dim)
    return probed(chosen, device, dtype, num_tokens, head_dim)


def build_model(
    config: DiTConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    param_dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> WanDiT:
    """Make a model on a device.

    Args:
        dtype: what linears and attention compute in; the float32 islands stay float32.
        param_dtype: what their weights are kept in; float32 for training every weight. None takes `dtype`.
        seed: random weights from this seed; None leaves them unset, for `load_dit` (train/model/load.py).
    """
    with torch.device("meta"):
        model = WanDiT(config, dtype, param_dtype)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    if seed is not None:
        init_random(model, seed)
    return model


@torch.no_grad()
def init_random(model: WanDiT, seed: int, *, zero_head: bool = False) -> None:
    """Random weights: a function of the seed and each parameter's name, on one kind of device.

    As the official initialisation (Wan model.py, init_weights): Xavier for linears, 0.02 for the embeddings, zero
    biases, but for the head, whose published zeros let no gradient through and make every untrained model alike.

    A LoRA is left as it is; of a base that is sharded over ranks each takes its own rows of the same numbers.
    """
    from train.parallel.fsdp import local_shard

    own = {name: weight for name, weight in model.named_parameters() if not name.endswith((".lora_A", ".lora_B"))}
    quantised, device = quantised_weights(model), model.head.modulation.device
    for index, (name, parameter) in enumerate(own.items()):
        local, rows = local_shard(parameter)
        generator = torch.Generator(device).manual_seed((seed * 1_000_003 + index) % 2**63)
        # Drawn in float32 whatever the weight is kept in: torch 2.9 draws other numbers for 16 bits.
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        if name.endswith("modulation"):
            drawn.normal_(0, model.config.dim**-0.5, generator=generator)
        elif name.endswith("bias") or (name == "head.head.weight" and zero_head):
            drawn.zero_()
        elif "norm" in name:
            drawn.fill_(1)
        elif name.startswith(("text_embedding", "time_embedding")):
            drawn.normal_(0, 0.02, generator=generator)
        else:
            fan = parameter.flatten(1).shape
            bound = (6 / (fan[0] + fan[1])) ** 0.5
            drawn.uniform_(-bound, bound, generator=generator)
        if name in quantised:
            quantised[name].fill(drawn[rows])
        else:
            local.copy_(drawn[rows])
