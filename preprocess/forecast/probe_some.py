"""Try a few of a plan's clips before a build: what their files are, and what each stage takes on this machine."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.build.clip import Fetched, Prepared, Preparer
from preprocess.build.pools import Pools
from preprocess.build.vae_precision import find_precision
from preprocess.config import EncodersConfig, PrepConfig
from preprocess.encoders.encoders import devices_of
from preprocess.fetch.fetcher import Fetcher
from preprocess.plan.plan import Candidate, Plan
from preprocess.rejection import Rejection
from preprocess.text.captions import compose_all
from preprocess.video.ffmpeg import runs_that_end
from shards.errors import UserError
from shards.machine import usable_cores

NUM_ENCODED = 3
"""Windows that the VAE is timed with, and clips whose captions the text encoder is timed with."""


def probe_clips(
    plan: Plan, config: PrepConfig, num_clips: int, scratch: Path, count_tokens: Callable[[str], int]
) -> dict[str, Any]:
    """Fetch and decode the plan's first `num_clips` candidates, encode a few; plain JSON counts and seconds.

    The plan's order is a hash, so its first candidates are a fair sample. Nothing is kept of them but the cache that
    `fetch.cache` names. The pools are those of a build. Raises UserError.
    """
    candidates = list(islice(plan.candidates(), num_clips))
    devices = devices_of(config)
    decoders = config.engine.num_decoders(usable_cores(), len(devices), not devices[0].startswith("cuda"))
    connections = min(config.fetch.per_host, max(1, len(candidates)))
    stop = threading.Event()
    with runs_that_end() as end_runs, Fetcher(config.fetch, config.corpus, scratch, stop, connections) as fetcher:
        stages = _Stages(Preparer(config, fetcher, count_tokens, scratch))
        pools = Pools(
            stages, num_fetchers=connections, num_decoders=decoders, max_bytes=config.engine.max_queue_mib << 20,
            stop=stop, on_stop=end_runs,
        )  # fmt: skip
        with closing(pools.run(candidates)) as prepared:
            seen = list(prepared)
    measured = {
        "fetch": _fetch_figures(seen, connections),
        "decode": _decode_figures(seen, decoders),
        **_measure_encoders(plan, config, candidates, stages.windows, decoders, devices, count_tokens),
    }
    return {**_outcomes(plan, config, seen), "measured": measured}


class _Stages:
    """The stages of `pools.py` up to the frames, of which those of the first windows are kept."""

    held_bytes = 0

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer
        self.windows: list[np.ndarray] = []

    def fetch(self, candidate: Candidate) -> Fetched:
        """The clip's file."""
        return self._preparer.fetch(candidate)

    def decode(self, candidate: Candidate, fetched: Fetched, reserve: Callable[[int], None]) -> Prepared:
        """Its windows' frames."""
        return self._preparer.decode(fetched, reserve)

    def encode(self, candidate: Candidate, prepared: Prepared) -> Prepared:
        """Nothing is encoded meanwhile; the frames are let go."""
        frames = [window.frames_THWC for window in prepared.windows if window.frames_THWC is not None]
        self.windows += frames[: NUM_ENCODED - len(self.windows)]
        rejections = [window.rejection for window in prepared.windows]
        refused = prepared.rejection or (rejections[0] if rejections and not frames else None)
        windows = tuple(window._replace(frames_THWC=None, preview=None) for window in prepared.windows)
        return prepared._replace(windows=windows, rejection=refused)

    def write(self, candidate: Candidate, prepared: Prepared) -> Iterator[Prepared]:
        """What became of it."""
        yield prepared


def _outcomes(plan: Plan, config: PrepConfig, seen: Sequence[Prepared]) -> dict[str, Any]:
    sizes = [f"{size.width}×{size.height}" for size in config.buckets.sizes]
    outcomes: Counter[str] = Counter()
    for prepared in seen:
        why, bucket = prepared.rejection, prepared.bucket
        if why is not None:
            outcomes[f"{why.stage}/{why.reason}"] += 1
        elif bucket is not None:
            outcomes[f"{bucket.width}×{bucket.height}"] += 1
    num_bytes = sum(prepared.num_bytes for prepared in seen if prepared.attempts)  # without what is here already
    scale = plan.num_candidates / len(seen) if seen else 0.0
    refused = {name: count for name, count in outcomes.most_common() if name not in sizes}
    return {
        "clips": len(seen),
        "by_bucket": {size: outcomes[size] for size in sizes},
        "refused_by": refused,
        "estimate_by_bucket": {size: round(outcomes[size] * scale) for size in sizes},
        "estimate_refused": round(sum(refused.values()) * scale),
        "estimate_download_gib": round(num_bytes * scale / 2**30, 3),
    }


def _fetch_figures(seen: Sequence[Prepared], connections: int) -> dict[str, Any]:
    """Of the clips that came over the network: those beside their records or in the cache took no attempt."""
    fetched = [each for each in seen if each.attempts and "fetch" in each.seconds]
    seconds = sum(each.seconds["fetch"] for each in fetched)
    if not seconds:
        return {"not_measured": "no clip came over the network"}
    at_once = min(connections, len(fetched))
    return {
        "clips": len(fetched),
        "connections": at_once,
        "seconds_a_clip": round(seconds / len(fetched), 4),
        "bytes_per_second": round(sum(each.num_bytes for each in fetched) / seconds * at_once),
    }


def _decode_figures(seen: Sequence[Prepared], decoders: int) -> dict[str, Any]:
    probed = [each.seconds["probe"] for each in seen if "probe" in each.seconds]
    decoded = [each for each in seen if each.windows and "decode" in each.seconds]
    num_windows = sum(len(each.windows) for each in decoded)
    if not num_windows:
        return {"not_measured": "no window was decoded"}
    return {
        "clips": len(probed),
        "decoders": decoders,
        "probe_seconds_a_clip": round(sum(probed) / len(probed), 4),
        "decode_seconds_a_window": round(sum(each.seconds["decode"] for each in decoded) / num_windows, 4),
    }


def _measure_encoders(
    plan: Plan, config: PrepConfig, candidates: Sequence[Candidate], windows: Sequence[np.ndarray], decoders: int,
    devices: Sequence[str], count_tokens: Callable[[str], int],
) -> dict[str, Any]:  # fmt: skip
    """Seconds of the VAE and of the text encoder on the first device, or why they are not measured."""
    texts = [text for candidate in candidates[: 2 * NUM_ENCODED] for text in _texts(candidate, config, count_tokens)]
    why = _why_not(config, devices)
    encoders = config.encoders.model_copy(update={"device": devices[0]})
    figures = {}
    for name, work in (
        ("encode", lambda: _time_vae(plan, encoders, windows, decoders, len(devices))),
        ("text", lambda: _time_texts(encoders, texts[:NUM_ENCODED], len(devices))),
    ):
        try:
            figures[name] = {"not_measured": why} if why else work()
        except UserError as error:  # a card that another program fills, for example: the other figures are still true
            figures[name] = {"not_measured": error.problem}
    return figures


def _why_not(config: PrepConfig, devices: Sequence[str]) -> str | None:
    checkpoint = config.encoders.checkpoint
    if config.engine.kind == "ray":
        return "engine.kind is ray: other machines encode"
    if checkpoint is not None and not Path(checkpoint).exists():
        return f"encoders.checkpoint {checkpoint} is not here"
    if checkpoint is not None and not devices[0].startswith("cuda"):
        return "this machine has no GPU, and a window takes minutes on its processor"
    return None


def _time_vae(
    plan: Plan, encoders: EncodersConfig, windows: Sequence[np.ndarray], decoders: int, num_workers: int
) -> dict[str, Any]:
    from preprocess.encoders.encoders import cpu_threads, load_vae_encoder

    if not windows:
        return {"not_measured": "no window was decoded"}
    if encoders.vae_precision == "auto":
        settled = find_precision(plan.storage)
        encoders = encoders.model_copy(update={"vae_precision": settled.mode if settled else "fp32"})
    vae = load_vae_encoder(encoders)
    with cpu_threads(decoders, num_workers):
        vae.encode(windows[0])  # the first one loads kernels
        start = time.perf_counter()
        for frames_THWC in windows:
            vae.encode(frames_THWC)
        seconds = time.perf_counter() - start
    megapixels = sum(frames.shape[0] * frames.shape[1] * frames.shape[2] for frames in windows) / 1e6
    return {
        "windows": len(windows), "device": encoders.device, "precision": encoders.vae_precision,
        "seconds_a_megapixel": round(seconds / megapixels, 6),
    }  # fmt: skip


def _time_texts(encoders: EncodersConfig, texts: Sequence[str], num_workers: int) -> dict[str, Any]:
    from preprocess.encoders.encoders import cpu_threads, load_text_encoder, load_tokenizer

    if not texts:
        return {"not_measured": "no caption was found"}
    encoder = load_text_encoder(encoders, load_tokenizer(encoders))
    with cpu_threads(1, num_workers):
        encoder.embed(texts[0])
        start = time.perf_counter()
        for text in texts:
            encoder.embed(text)
        seconds = time.perf_counter() - start
    return {
        "captions": len(texts), "device": encoders.device, "seconds_a_caption": round(seconds / len(texts), 6)
    }  # fmt: skip


def _texts(candidate: Candidate, config: PrepConfig, count_tokens: Callable[[str], int]) -> list[str]:
    seconds = candidate.record.declared_seconds or config.sieve.max_seconds
    found = compose_all(candidate.record, 0.0, seconds, config.captions, count_tokens)
    return [] if isinstance(found, Rejection) else [caption.text for caption in found.composed]


def describe_probe(seen: dict[str, Any]) -> list[str]:
    """The figures of `probe_clips` as lines for people."""
    return [
        f"probed     {seen['clips']:,} clips; in brackets what that means for the complete plan, "
        f"{seen['estimate_download_gib']:,.1f} GiB to download",
        *(
            f"  {count:>9,}  {size}  (about {seen['estimate_by_bucket'][size]:,})"
            for size, count in seen["by_bucket"].items()
        ),
        *(f"  {count:>9,}  {reason}" for reason, count in seen["refused_by"].items()),
        "measured   on this machine:",
        *(f"  {name:<8} {_described(name, figures)}" for name, figures in seen["measured"].items()),
    ]


def _described(name: str, figures: dict[str, Any]) -> str:
    if "not_measured" in figures:
        return f"not measured: {figures['not_measured']}"
    if name == "fetch":
        rate = figures["bytes_per_second"] / 1e6
        return (
            f"{figures['seconds_a_clip']:.3g} s a clip on each of {figures['connections']} connections, "
            f"{rate:,.1f} MB/s in all"
        )
    if name == "decode":
        return (
            f"{figures['probe_seconds_a_clip']:.3g} s to probe a clip, {figures['decode_seconds_a_window']:.3g} s to "
            f"decode a window, on each of {figures['decoders']} decoders"
        )
    if name == "encode":
        return (
            f"{figures['seconds_a_megapixel']:.3g} s a megapixel (frames × height × width) in {figures['precision']} "
            f"on {figures['device']}"
        )
    return f"{figures['seconds_a_caption']:.3g} s a caption on {figures['device']}"


def can_forecast(seen: dict[str, Any]) -> bool:
    """Whether both encoders were timed here, so that a forecast needs no GPU's name."""
    return all("not_measured" not in seen["measured"][name] for name in ("encode", "text"))
