"""`wanprep doctor`: what is wrong with this machine for encoding and, given a configuration, with a build on it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

from preprocess.config import PrepConfig
from shards.machine import Finding, check_disk, check_python, check_torch, guarded

PACKAGES = ("diffusers", "transformers", "tokenizers", "sentencepiece", "ftfy", "av", "ffmpeg-python", "safetensors")


def examine(config: PrepConfig | None) -> Iterator[Finding]:
    """All findings, one after the other; those that need a configuration only with one."""
    yield check_python(sys.version_info[:3])
    yield from check_torch()
    yield from guarded("ffmpeg", check_ffmpeg)
    yield check_packages()
    if config is None:
        return
    if "://" not in config.output:
        yield check_disk(Path(config.output))
    yield from guarded("corpus", lambda: check_corpus(config))
    yield from guarded("encoders", lambda: check_encoders(config))


def check_ffmpeg() -> Iterator[Finding]:
    """ffmpeg runs. Raises UserError."""
    from preprocess.video.ffmpeg import ffmpeg_version, find_ffmpeg

    yield Finding("ffmpeg", "ok", f"{ffmpeg_version()}, {find_ffmpeg()}")


def check_packages() -> Finding:
    """The libraries of stage 1 are installed."""
    versions, absent = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        fix = "pip install -e '.[prep]' -c constraints.txt"
        return Finding("packages", "problem", f"not installed: {', '.join(absent)}", fix)
    return Finding("packages", "ok", ", ".join(versions))


def check_corpus(config: PrepConfig) -> Iterator[Finding]:
    """The first document of the corpus can be read. Raises UserError."""
    from preprocess.corpus.corpus import iter_documents

    first = next(iter_documents(config.corpus.location), None)
    if first is None:
        yield Finding("corpus", "problem", f"{config.corpus.location} holds no annotations", "see corpus.location")
    else:
        yield Finding("corpus", "ok", f"{config.corpus.location}: {first.source} is the first of it")


def check_encoders(config: PrepConfig) -> Iterator[Finding]:
    """What both encoders run in here; one picture through the VAE, at the smallest size. Raises UserError."""
    import time

    import numpy as np

    from preprocess.build.vae_precision import encoder_device, fast_modes
    from preprocess.encoders.encoders import computes_bf16, devices_of, find_device, load_tokenizer, load_vae_encoder

    encoders = config.encoders.model_copy(update={"device": devices_of(config)[0]})
    device = find_device(encoders.device)
    modes, why_none = fast_modes(encoder_device(device))
    vae: str = encoders.vae_precision
    if vae == "auto":
        vae = f"auto: fp32, or {' or '.join(modes)} if it agrees with it" if modes else f"auto: fp32, {why_none}"
    text: str = encoders.text_precision
    if text == "auto":
        text = "auto: bf16" if computes_bf16(device) else "auto: fp32, since bf16 is emulated here"
    yield Finding("precision", "ok", f"VAE {vae}; text {text}; on {', '.join(devices_of(config))}")
    if encoders.vae_precision == "bf16" and not computes_bf16(device):
        yield Finding("precision", "problem", f"bf16 is emulated on {device}", "encoders.vae_precision=auto")
    tokens = load_tokenizer(encoders).count("한 사람이 걷고 있다.")
    encoder = load_vae_encoder(encoders)
    size = min(config.buckets.sizes, key=lambda each: each.width * each.height)
    start = time.perf_counter()
    latent = encoder.encode(np.zeros((1, size.height, size.width, 3), dtype=np.uint8))
    seconds = time.perf_counter() - start
    found = f"{encoder.precision} on {device}, one picture of {size.width}×{size.height} in {seconds:.2f} s"
    if not np.isfinite(latent).all():
        yield Finding(
            "VAE", "problem", f"{found}: not finite", "encoders.vae_precision=fp32, or auto, which measures it"
        )
    else:
        yield Finding("VAE", "ok", found + (f"; {encoder.note}" if encoder.note else ""))
    yield Finding("tokenizer", "ok", f"{tokens} tokens for a short sentence")
