"""The encoder half of diffusers' `AutoencoderKLWan` with fewer passes over memory; the weights stay the library's.

    chunk ─ conv_in ─▶ [RMSNorm·SiLU ─ conv]×2 + shortcut … ─ half size ─▶ middle ─▶ RMSNorm·SiLU ─ conv_out

What the library pads, joins with the frames before and casts in passes of their own is here written once, straight
into the convolution's input: a buffer with two frames of the past in front. A norm reads its input in 16 bits, sums in
float32 and rounds once. In float32 the result is the library's to rounding; in 16 bits it has fewer roundings, so it
is other bits: it stands behind `encoders.vae_low_traffic`.

Shapes: one sample; C channels, T frames of a chunk, H, W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAST = 2
"""Frames that a causal convolution of three frames looks back."""


class LowTrafficEncoder:
    """Called as the library's encoder and `quant_conv` are: 1×C×T×H×W patches to 1×2z×t×h×w.

    Args:
        vae: `AutoencoderKLWan` in its Wan2.2 form (residual down blocks). Raises ValueError on another form.
    """

    def __init__(self, vae: Any) -> None:
        if not vae.config.is_residual:
            raise ValueError("an AutoencoderKLWan without residual down blocks: not Wan2.2's")
        self._encoder, self._quant_conv = vae.encoder, vae.quant_conv
        self._past: dict[Any, Tensor] = {}

    def __call__(self, x_1CTHW: Tensor) -> Tensor:
        """Encode one clip of 4k+1 patchified frames: the first frame, then four at a time."""
        self._past.clear()
        try:
            chunks = x_1CTHW.split([1, *[4] * (x_1CTHW.shape[2] // 4)], dim=2)
            return self._quant_conv(torch.cat([self._encode(chunk) for chunk in chunks], dim=2))
        finally:
            self._past.clear()

    def _encode(self, x: Tensor) -> Tensor:
        encoder = self._encoder
        buffer = self._buffer(encoder.conv_in, x)
        buffer[:, :, PAST:].copy_(x)
        x = self._conv(encoder.conv_in, buffer)
        for block in encoder.down_blocks:
            x = self._down_block(block, x)
        middle = encoder.mid_block
        x = self._residual(middle.resnets[0], x)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            x = self._residual(resnet, attention(x))
        return self._norm_conv(encoder.norm_out, encoder.conv_out, x)

    def _down_block(self, block: Any, x: Tensor) -> Tensor:
        shortcut = block.avg_shortcut
        skip = mean_of_patches(x, shortcut.factor_t, shortcut.factor_s, shortcut.out_channels)
        padded = None
        for place, resnet in enumerate(block.resnets):
            if block.downsampler is not None and place == len(block.resnets) - 1:
                padded = _padded_frames(x, resnet.conv2.out_channels)
                self._residual(resnet, x, padded[..., :-1, :-1].transpose(0, 1)[None])
            else:
                x = self._residual(resnet, x)
        if padded is not None:
            x = self._half_size(block.downsampler, padded)
        return x.add_(skip)

    def _residual(self, block: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
        """norm, SiLU, conv, twice, and the shortcut; into `out` where given."""
        identity = isinstance(block.conv_shortcut, torch.nn.Identity)
        h = self._norm_conv(block.norm2, block.conv2, self._norm_conv(block.norm1, block.conv1, x))
        skip = x if identity else F.conv3d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)
        return h.add_(skip) if out is None else torch.add(h, skip, out=out)

    def _norm_conv(self, norm: Any, conv: Any, x: Tensor) -> Tensor:
        buffer = self._buffer(conv, x)
        rms_silu(x, norm.gamma, norm.scale, buffer[:, :, PAST:])
        return self._conv(conv, buffer)

    def _buffer(self, conv: Any, x: Tensor) -> Tensor:
        """A convolution's input: the past's last frames (zeros before the first), then room for this chunk's."""
        batch, channels, frames, height, width = x.shape
        size = (batch, channels, PAST + frames, height, width)
        buffer = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
        past = self._past.get(conv)
        buffer[:, :, :PAST].zero_() if past is None else buffer[:, :, :PAST].copy_(past)
        return buffer

    def _conv(self, conv: Any, buffer: Tensor) -> Tensor:
        self._past[conv] = buffer[:, :, -PAST:].clone()
        return F.conv3d(buffer, conv.weight, conv.bias, padding=(0, 1, 1))

    def _half_size(self, block: Any, padded_TCHW: Tensor) -> Tensor:
        """Half the height and width; half the frames too where the block has a convolution over time."""
        conv = block.resample[1]
        x = F.conv2d(padded_TCHW, conv.weight, conv.bias, stride=2).transpose(0, 1)[None]
        if block.mode != "downsample3d":
            return x
        past = self._past.get(block)
        self._past[block] = x[:, :, -1:].clone()
        if past is None:  # the first frame is alone
            return x
        conv = block.time_conv
        return F.conv3d(torch.cat([past, x], dim=2), conv.weight, conv.bias, stride=(2, 1, 1))


def rms_silu(x: Tensor, gamma: Tensor, scale: float, out: Tensor) -> None:
    """SiLU(x / |x| · scale · gamma) over the channels, |x| in float32; one rounding a product."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min_(1e-12)
    torch.mul(x, norm.reciprocal_().mul_(scale), out=out)
    F.silu(out.mul_(gamma), inplace=True)


def mean_of_patches(x: Tensor, factor_t: int, factor_s: int, out_channels: int) -> Tensor:
    """The library's AvgDown3D: means over groups of the channels that a space-to-depth of x would have.

    For Wan2.2's sizes a group is a patch of factor_s × factor_s pixels, so no space-to-depth is written.
    """
    if x.shape[2] % factor_t:  # the first frame: zeros come before it
        x = F.pad(x, (0, 0, 0, 0, factor_t - x.shape[2] % factor_t, 0))
    batch, channels, frames, height, width = x.shape
    if channels * factor_t != out_channels:
        raise ValueError(f"{channels} × {factor_t} channels are not {out_channels}: not Wan2.2's encoder")
    if factor_s > 1:
        patches = (height // factor_s, factor_s), (width // factor_s, factor_s)
        x = x.unflatten(4, patches[1]).unflatten(3, patches[0]).mean(dim=(4, 6))
    x = x.unflatten(2, (frames // factor_t, factor_t)).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, out_channels, frames // factor_t, height // factor_s, width // factor_s)


def _padded_frames(x_1CTHW: Tensor, channels: int) -> Tensor:
    """Room for frames as T×C×(H+1)×(W+1), zeros in the last row and column."""
    frames, height, width = x_1CTHW.shape[2:]
    channels_last = _memory_format(x_1CTHW) is torch.channels_last_3d
    padded = torch.empty(
        (frames, channels, height + 1, width + 1), dtype=x_1CTHW.dtype, device=x_1CTHW.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    padded[..., -1, :].zero_()
    padded[..., -1].zero_()
    return padded


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels are next to each other, or pixels are."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last_3d if channels_last else torch.contiguous_format
