"""Fixtures that more than one test file uses, named for what they are."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def tiny_dit() -> Any:
    """A float32 DiT of the real architecture, every parameter random (biases, norms and head too)."""
    import torch

    from train.model import build_model
    from train.model_config import DiTConfig

    config = DiTConfig(
        dim=96,
        num_heads=4,
        num_layers=2,
        ffn_dim=160,
        in_channels=8,
        out_channels=8,
        text_len=12,
        text_dim=16,
        freq_dim=32,
    )
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # The official start (zero biases, unit norms) would hide a wrong key map.
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
