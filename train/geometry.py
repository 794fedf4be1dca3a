"""Sizes of samples: frames and pixels, latent cells, tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from train.config.model import DiTConfig


class Bucket(NamedTuple):
    """A sample's size; orders by its numbers."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}×{self.frames}"


SPATIAL_STRIDE = 16
"""Pixels along an edge of one latent cell (Wan2.2 VAE)."""

TEMPORAL_STRIDE = 4
"""Frames of one latent frame; the first frame is one alone."""

SAVE_GROUPS = ("attention", "projections", "ffn_up")
"""What a block can keep for its backward pass instead of computing it again, in the order of `checkpointing`."""


class Shape(NamedTuple):
    """What one forward pass of one process works on."""

    batch: int
    """Samples."""
    tokens: int
    """Video tokens of a sample."""

    @property
    def all_tokens(self) -> int:
        """Video tokens of all its samples."""
        return self.batch * self.tokens


def num_tokens(dims: DiTConfig, frames: int, height: int, width: int) -> int:
    """Video tokens of a clip given in frames and pixels.

    Raises: ValueError when the size does not divide into patches, or the frames are not 4n + 1.
    """
    _, rows, columns = dims.patch
    if (frames - 1) % TEMPORAL_STRIDE:
        raise ValueError(f"{frames} frames: the VAE takes 4n + 1, such as {(frames - 1) // 4 * 4 + 1}")
    if height % (SPATIAL_STRIDE * rows) or width % (SPATIAL_STRIDE * columns):
        raise ValueError(f"{width} × {height}: sides must be multiples of {SPATIAL_STRIDE * columns}")
    latent_frames = (frames - 1) // TEMPORAL_STRIDE + 1
    return latent_frames * (height // (SPATIAL_STRIDE * rows)) * (width // (SPATIAL_STRIDE * columns))
