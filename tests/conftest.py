"""Fixtures that more than one test file uses, named for what they are."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: children would, this process still does
    signal.signal(signal.SIGHUP, lambda number, frame: None)

# Workers share the machine: threads of torch that wait for each other would wait for the other worker's too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shapes in the hints of public functions are checked in the tests, and only there.
SHAPE_CHECKED = [
    "model.attention",
    "model.block",
    "model.dit",
    "model.patchify",
    "model.rope",
    "lora.lora",
    "objective",
]
jaxtyping.install_import_hook([f"train.{name}" for name in SHAPE_CHECKED], "beartype.beartype")

# A busy machine is no failure: an example has no time limit of its own, a test has pytest's.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What drives a browser carries the marker `browser`."""
    for item in items:
        if "one_browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(autouse=True)
def no_handler_of_another_test() -> None:
    """A command that a test invoked leaves a handler with a closed stream, and the next log line a traceback."""
    log = logging.getLogger("wan")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture
def tiny_dit() -> Any:
    """A float32 DiT of the real architecture, every parameter random (biases, norms and head too)."""
    import torch

    from train.config.model import DiTConfig
    from train.model.dit import build_model

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


@pytest.fixture
def diffusers_twin() -> Callable[[Any], Any]:
    """A function that makes diffusers' WanTransformer3DModel with a DiT's sizes and weights."""
    import diffusers
    import torch

    from train.model.load import diffusers_key

    def twin_of(model: Any) -> Any:
        config = model.config
        with torch.device("meta"):
            twin = diffusers.WanTransformer3DModel(
                patch_size=config.patch,
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=config.in_channels,
                out_channels=config.out_channels,
                text_dim=config.text_dim,
                freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
                cross_attn_norm=True,
                eps=config.eps,
            )
        if model.head.head.weight.is_meta:
            return twin
        twin.rope = type(twin.rope)(config.head_dim, config.patch, 1024)
        state = {diffusers_key(name): weight.detach().clone() for name, weight in model.named_parameters()}
        twin.load_state_dict(state, strict=True, assign=True)
        return twin

    return twin_of


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a small sealed dataset, not to be written to: 24 random samples in 3 units.

    Latents 48×5×6×10 and 48×5×10×6 and one-frame images of the same sizes, two windows of some clips, a text set
    `default` of dim 64 with one or two caption variants a sample and the null embeddings. Copy it to change it.
    """
    from shards_data import write_dataset

    root = tmp_path_factory.mktemp("tiny_shards")
    write_dataset(root, scratch=tmp_path_factory.mktemp("scratch"))
    return root


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's corpus without the base model's clips, not to be written to: 16 records, good and bad."""
    from preprocess.demo.corpus import write_corpus

    folder = tmp_path_factory.mktemp("demo_corpus")
    write_corpus(folder, with_base=False)
    return folder


@pytest.fixture
def run_distributed() -> Callable[..., list[Any]]:
    """`run_distributed(2, function, *args)`: the function's results in that many real processes over gloo, by rank.

    The function is a test module's own, at its top level; what it takes and gives goes through pickle.
    """
    from ranks import run_ranks

    return run_ranks


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from browser import browser

    with browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def driver(one_browser: Any) -> Any:
    """The module's browser, light, with nothing said yet."""
    from browser import console, prefer, requests

    prefer(one_browser, dark=False)
    console(one_browser), requests(one_browser)
    return one_browser
