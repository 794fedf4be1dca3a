"""What a build will take, before it runs: bytes, samples, days on named GPUs, what bounds it, what would shorten it.

Everything is a function of the frozen plan, the config, a few of the plan's records, and, with `--probe`, of what those
clips were. Assumptions are named in the result: a forecast that hides them is worth nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from preprocess.config import PictureSize, PrepConfig, with_choices
from preprocess.forecast.hardware import (
    CONNECTION_MBIT,
    DECODE_SECONDS,
    PROBE_SECONDS,
    REQUEST_SECONDS,
    Costs,
    Hardware,
    find_costs,
)
from preprocess.plan.plan import Plan
from preprocess.rejection import Rejection
from preprocess.text.captions import compose_all
from preprocess.video.aspect import is_sd
from preprocess.video.bucket import choose_size
from preprocess.video.window import declared_lengths
from shards.console import counted
from shards.gpus import DAY_SECONDS, Gpu, VaeMode, vae_encode_tflop

# What a plan promises before it runs: candidates, units, samples per bucket, and what the upscaling limit excludes.

TOO_SMALL = "too small for every bucket"
TOO_SHORT = "too short for every length"
UNKNOWN = "size not declared"


def count_plan(plan: Plan, config: PrepConfig) -> dict[str, Any]:
    """The plan in figures, as plain JSON; buckets are estimated from the declared sizes alone."""
    buckets: Counter[str] = Counter({f"{size.width}×{size.height}": 0 for size in config.buckets.sizes})
    for generation in plan.generations:
        for size in generation.declared_sizes:
            buckets[_bucket_of(size.width, size.height, config)] += size.count
    return {
        "records": plan.num_candidates + plan.num_refused,
        "candidates": plan.num_candidates,
        "refused": plan.num_refused,
        "refused_by": dict(plan.refused_by()),
        "beyond_limit": plan.last_read.num_beyond_limit if plan.last_read else 0,
        "units": plan.num_units,
        "generations": len(plan.generations),
        "declared_hours": round(sum(each.declared_seconds for each in plan.generations) / 3600, 3),
        "candidates_by_bucket": dict(buckets),
    } | ({"windows_by_length": count_lengths(plan, config)} if len(config.window.lengths) > 1 else {})


def count_lengths(plan: Plan, config: PrepConfig) -> dict[str, int]:
    """Windows by frames, and clips too short for one, as the records declare lengths and captions; shots are not known.

    What declares no length is taken to be as long as the sieve allows at least. Each unit counts with its own lengths.
    """
    counts: Counter[str] = Counter({str(frames): 0 for frames in config.window.lengths})
    for number in range(plan.num_units):
        own = with_choices(config, plan.choices(number))
        for candidate in plan.unit(number):
            record = candidate.record
            seconds = record.declared_seconds or config.sieve.min_seconds
            frames = [1] if record.media_type == "image" else declared_lengths(seconds, record, own)
            counts.update(map(str, frames) if frames else [TOO_SHORT])
    return dict(counts)


def describe_plan(counts: dict[str, Any]) -> list[str]:
    """The figures as lines for people."""
    beyond = f" + {counts['beyond_limit']:,} beyond corpus.limit" if counts["beyond_limit"] else ""
    return [
        f"records    {counts['records'] + counts['beyond_limit']:,} read = "
        f"{counted(counts['candidates'], 'candidate')} + {counts['refused']:,} refused{beyond}",
        *(f"  {count:>9,}  {reason}" for reason, count in counts["refused_by"].items()),
        f"plan       {counted(counts['units'], 'unit')} in {counted(counts['generations'], 'generation')}, "
        f"{counts['declared_hours']:,.2f} h of video by their records",
        "buckets    by the declared sizes; the files may differ: the summary of the build has the true sizes",
        *(f"  {count:>9,}  {name}" for name, count in counts["candidates_by_bucket"].items()),
        *_length_lines(counts.get("windows_by_length", {})),
    ]


def _length_lines(counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    lines = ["lengths    windows by frames, as the records declare lengths and captions; shot changes may shorten more"]
    return lines + [f"  {count:>9,}  {name}" for name, count in counts.items()]


def _bucket_of(width: int, height: int, config: PrepConfig) -> str:
    if not width or not height:
        return UNKNOWN
    shown = width
    if is_sd(width, height):
        shown = round(height * Fraction(*map(int, config.decode.sd_display_aspect.split(":"))))
    bucket = choose_size(shown, height, config.buckets)
    return TOO_SMALL if isinstance(bucket, Rejection) else f"{bucket.width}×{bucket.height}"


PROXY_MBIT = 3.0
"""Bit rate that a clip is taken to have where none was probed."""
_TEXT_TFLOP_PER_TOKEN = 4.85 / 512
_TEXT_PARAMETERS = 5.68e9
_TEXT_DIM = 4096
_SAMPLE_EXTRAS = 16_384
"""A sample's preview, JSON and tar headers, bytes."""
_ZSTD_RATIO = {"float16": 0.919, "bfloat16": 0.777, "float32": 0.93}
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def forecast(
    plan: Plan,
    config: PrepConfig,
    counts: Mapping[str, Any],
    hardware: Hardware,
    count_tokens: Callable[[str], int],
    resolved: VaeMode | None = None,
) -> dict[str, Any]:
    """The forecast as plain JSON.

    Args:
        plan: frozen; its first unit's records are read for the captions' length.
        config: the build's.
        counts: of `count_plan`, with `probed` (of `probe_clips`) where clips were looked at.
        hardware: GPUs, network, cores.
        count_tokens: the text encoder's tokenizer.
        resolved: what `encoders.vae_precision: auto` was resolved to, if it was.
    """
    gpu, num_gpus = hardware.gpu, hardware.num_gpus
    costs = find_costs(counts, hardware)
    samples = _samples_by_size(config, counts, plan)
    num_samples = sum(samples.values())
    shares = _length_shares(config, counts)
    tflop = sum(count * _tflop(size.width, size.height, shares) for size, count in samples.items())
    tokens, of_records = _caption_tokens(plan, config, count_tokens)
    num_clips = sum(samples.values()) / _windows_a_clip(config, plan, counts) if num_samples else 0.0
    download = _download_bytes(plan, counts)
    text_mode = config.encoders.text_precision
    if text_mode == "auto":
        text_mode = "fp32" if gpu is not None and gpu.precision == "fp16" else "bf16"
    mode: VaeMode = resolved or ("fp32" if config.encoders.vae_precision == "auto" else config.encoders.vae_precision)
    encode = _encode_days(samples, shares, tflop, mode, hardware, costs)
    decoders = config.engine.num_decoders(hardware.num_cores, num_gpus, on_cpu=gpu is None)
    num_decoding = min(hardware.num_cores, decoders * num_gpus)
    connections = config.fetch.per_host * num_gpus
    # A connection's share: what a clip took when some were fetched, or what its bytes take on a usual connection.
    a_clip = costs.fetch_seconds
    if a_clip is None:
        a_clip = REQUEST_SECONDS + download * 8 / (CONNECTION_MBIT * 1e6) / max(1, plan.num_candidates)
    fetch_by = {
        "network": download * 8 / (hardware.network_mbit * 1e6),
        "connections": plan.num_candidates * a_clip / connections,
    }
    text_seconds = costs.text_seconds
    if text_seconds is not None:
        text_seconds *= 1 + len(config.captions.variants)
    elif gpu is not None:
        text_seconds = _text_seconds(gpu, text_mode, tokens, config)
    num_text_gpus = hardware.num_text_gpus or num_gpus
    days = {
        "fetch": max(fetch_by.values()) / DAY_SECONDS,
        "decode": (num_clips * costs.probe_seconds + num_samples * costs.decode_seconds) / num_decoding / DAY_SECONDS,
        "encode": encode["fp32" if mode == "fp32" else "fast"],
    }
    bound = max(days, key=lambda name: days[name])
    result = {
        "gpu": gpu.name if gpu else counts["probed"]["measured"]["encode"]["device"],
        "gpus": num_gpus,
        "cores": hardware.num_cores,
        "decoders": decoders,
        "connections": connections,
        "fetch_bound_by": max(fetch_by, key=lambda name: fetch_by[name]),
        "text_gpus": num_text_gpus,
        "samples": num_samples,
        "samples_by_bucket": {f"{size.width}×{size.height}": count for size, count in samples.items()},
        "download_bytes": round(download),
        "disk_bytes": {
            "latents": round(sum(count * _latent_bytes(size, config, shares) for size, count in samples.items())),
            "text": round(num_samples * tokens * _TEXT_DIM * 2),
        },
        "caption_tokens": round(tokens, 1),
        "vae_precision": config.encoders.vae_precision,
        "vae_mode": mode,
        "vae_tflop": round(tflop),
        "days": {name: round(value, 3) for name, value in days.items()},
        "encode_days_by_mode": {name: round(value, 3) for name, value in encode.items()},
        "text_mode": text_mode,
        "text_days": round(num_samples * (text_seconds or 0.0) / num_text_gpus / DAY_SECONDS, 3),
        "bound": bound,
        "assumed": _assumptions(counts, hardware, costs, num_decoding, connections, of_records),
    }
    return {**result, "shorter": suggestions(result, config, shares)}


def suggestions(result: Mapping[str, Any], config: PrepConfig, shares: Mapping[int, float]) -> list[str]:
    """What would make the build shorter, most first; each with its figure."""
    days, bound = result["days"], result["bound"]
    second = max(value for name, value in days.items() if name != bound)
    if bound == "fetch" and result["fetch_bound_by"] == "connections":
        per_host = result["connections"] // result["gpus"]
        return [f"fetch.per_host={4 * per_host}: {per_host} connections for each encoder do not fill the network"]
    if bound == "fetch":
        return [
            f"a faster network or a copy of the clips nearer by (fetch.mirrors): all else takes {second:.2f} days",
            "fetch.cache, where the same clips are read for several datasets",
        ]
    if bound == "decode" and result["decoders"] * result["gpus"] < result["cores"]:
        return [f"engine.decoders={result['cores'] // result['gpus']}: not all of {result['cores']} cores decode"]
    if bound == "decode":
        return [f"more cores: up to {days['decode'] / max(second, 1e-9):.1f} times as many are of use"]
    lines = []
    modes = result["encode_days_by_mode"]
    if result["vae_mode"] == "fp32" and modes.get("fast", modes["fp32"]) < modes["fp32"] * 0.9:
        lines.append(
            f"encoders.vae_precision=auto: {modes['fast']:.2f} days in 16 bits, if their latents agree with fp32's on "
            "this card"
        )
    lines.append(
        f"more GPUs, here or on other machines (engine.kind=ray): {days['encode'] / 2:.2f} days on twice as many"
    )
    if max(shares) > 17:
        share = vae_encode_tflop(1280, 704, 17) / _tflop(1280, 704, shares)
        lines.append(f"window.num_frames=17: {days['encode'] * share:.2f} days")
    largest = max(config.buckets.sizes, key=lambda size: size.width * size.height)
    if largest.width * largest.height > 832 * 480:
        share = 832 * 480 / (largest.width * largest.height)
        lines.append(f"buckets of 832×480: {days['encode'] * share:.2f} days")
    return lines


def describe_forecast(result: Mapping[str, Any]) -> list[str]:
    """The forecast as lines for people."""
    days, disk = result["days"], result["disk_bytes"]
    modes = ", ".join(f"{value:,.2f} in {name}" for name, value in result["encode_days_by_mode"].items())
    return [
        f"samples    about {result['samples']:,} of {result['vae_tflop']:,} TFLOP in the VAE",
        f"download   {_gib(result['download_bytes'])}",
        f"on disk    {_gib(disk['latents'])} of latents, {_gib(disk['text'])} of text at most "
        f"({result['caption_tokens']:,.0f} tokens a sample)",
        f"days       {max(days.values()):,.2f} on {result['gpus']} × {result['gpu']}, bound by {result['bound']}: "
        + ", ".join(f"{name} {value:,.2f}" for name, value in days.items())
        + f"; then text {result['text_days']:,.2f} in {result['text_mode']} on {result['text_gpus']}",
        f"  with     {result['decoders']} decoders and {result['connections'] // result['gpus']} connections for each "
        f"encoder, {result['cores']} cores",
        f"  encoding {modes}"
        + (
            " (`auto` measures both on the plan's clips when the build begins)"
            if result["vae_precision"] == "auto"
            else ""
        ),
        *(f"  shorter  {line}" for line in result["shorter"]),
        *(f"  assumed  {line}" for line in result["assumed"]),
    ]


def _encode_days(
    samples: Mapping[PictureSize, int],
    shares: Mapping[int, float],
    tflop: float,
    mode: VaeMode,
    hardware: Hardware,
    costs: Costs,
) -> dict[str, float]:
    """By mode, `fp32` and `fast`; a measured mode alone is measured, another keeps its ratio to it in the table."""
    gpu, found = hardware.gpu, {}
    name = "fp32" if mode == "fp32" else "fast"
    if gpu is not None:
        found = {"fp32": gpu.encode_seconds("fp32", tflop), "fast": gpu.encode_seconds("fp16", tflop)}
    if costs.encode_seconds is not None:
        frames = sum(length * share for length, share in shares.items())
        pixels = sum(count * size.width * size.height for size, count in samples.items()) * frames
        seconds = pixels / 1e6 * costs.encode_seconds
        ratio = seconds / found[name] if found.get(name) else 1.0
        found = {**{each: value * ratio for each, value in found.items()}, name: seconds}
    return {each: value / hardware.num_gpus / DAY_SECONDS for each, value in found.items()}


def _text_seconds(gpu: Gpu, mode: str, tokens: float, config: PrepConfig) -> float:
    """Of a sample on one GPU. A caption is embedded alone, so each one reads all weights at least once."""
    num_captions = 1 + len(config.captions.variants)
    rate, element_bytes = (gpu.vae_fp32_tflops, 4) if mode == "fp32" else (gpu.gemm_tflops / 2, 2)
    reading = num_captions * _TEXT_PARAMETERS * element_bytes / (gpu.bandwidth_gb * 1e9)
    return max(reading, tokens * _TEXT_TFLOP_PER_TOKEN / rate)


def _length_shares(config: PrepConfig, counts: Mapping[str, Any]) -> dict[int, float]:
    """The share of the windows that has so many frames."""
    lengths = config.window.lengths
    found = {int(name): count for name, count in counts.get("windows_by_length", {}).items() if name != TOO_SHORT}
    total = sum(found.values())
    if not total:
        return {lengths[0]: 1.0}
    return {frames: count / total for frames, count in found.items() if count}


def _tflop(width: int, height: int, shares: Mapping[int, float]) -> float:
    return sum(share * vae_encode_tflop(width, height, frames) for frames, share in shares.items())


def _windows_a_clip(config: PrepConfig, plan: Plan, counts: Mapping[str, Any]) -> float:
    if by_length := counts.get("windows_by_length"):
        return sum(count for name, count in by_length.items() if name != TOO_SHORT) / max(1, plan.num_candidates)
    seconds = sum(each.declared_seconds for each in plan.generations) / max(1, plan.num_candidates)
    room = int(seconds * config.window.fps // config.window.lengths[0])
    return max(1, min(config.window.max_windows, room))


def _samples_by_size(config: PrepConfig, counts: Mapping[str, Any], plan: Plan) -> dict[PictureSize, int]:
    """Samples a bucket; clips of undeclared size are distributed as the others are, or all in the first bucket."""
    names = {f"{size.width}×{size.height}": size for size in config.buckets.sizes}
    probed = counts.get("probed")
    clips = dict(probed["estimate_by_bucket"] if probed else counts["candidates_by_bucket"])
    clips.pop(TOO_SMALL, None)
    unknown = clips.pop(UNKNOWN, 0)
    known = sum(clips.values())
    windows = _windows_a_clip(config, plan, counts)
    if not known:
        return {next(iter(names.values())): round(unknown * windows)} if unknown else {}
    scale = (known + unknown) / known
    return {names[name]: round(round(count * scale) * windows) for name, count in clips.items() if count}


def _download_bytes(plan: Plan, counts: Mapping[str, Any]) -> float:
    probed = counts.get("probed")
    if probed:
        return float(probed["estimate_download_gib"] * 2**30)
    return sum(each.declared_seconds for each in plan.generations) * PROXY_MBIT * 1e6 / 8


def _latent_bytes(size: PictureSize, config: PrepConfig, shares: Mapping[int, float]) -> float:
    latent_frames = sum(share * ((frames - 1) // 4 + 1) for frames, share in shares.items())
    elements = 48 * latent_frames * (size.height // 16) * (size.width // 16)
    dtype = config.shards.latent_dtype
    return elements * _ELEMENT_BYTES[dtype] * _ZSTD_RATIO[dtype] + _SAMPLE_EXTRAS


def _caption_tokens(plan: Plan, config: PrepConfig, count_tokens: Callable[[str], int]) -> tuple[float, int]:
    """Mean tokens of all captions of a sample, as if its window were the complete clip: an upper bound. Of how many."""
    if not plan.num_units:
        return 0.0, 0
    totals = []
    for candidate in plan.unit(0):
        seconds = candidate.record.declared_seconds or config.sieve.max_seconds
        found = compose_all(candidate.record, 0.0, seconds, config.captions, count_tokens)
        if not isinstance(found, Rejection):
            totals.append(sum(count_tokens(caption.text) for caption in found.composed))
    return (sum(totals) / len(totals) if totals else 0.0), len(totals)


def _assumptions(
    counts: Mapping[str, Any], hardware: Hardware, costs: Costs, num_decoding: int, connections: int, num_records: int
) -> list[str]:
    gpu = hardware.gpu
    if gpu is None or costs.encode_seconds is not None:
        speeds = f"encoding {costs.encode_seconds:.3g} s a megapixel"
        speeds += "" if costs.text_seconds is None else f", text {costs.text_seconds:.3g} s a caption"
        speeds += ", measured on this machine"
    else:
        speeds = (
            f"{gpu.name}: {gpu.vae_fp32_tflops:g} TFLOP/s in fp32, {gpu.vae_fast_tflops:g} in 16 bits: estimates, not "
            "measured"
        )
    fetching = f"{CONNECTION_MBIT:g} Mbit/s each"
    if costs.fetch_seconds is not None:
        fetching = f"{costs.fetch_seconds:.3g} s a clip, measured"
    decoding = f"{costs.probe_seconds:.3g} s a clip and {costs.decode_seconds:.3g} s a window"
    if (costs.probe_seconds, costs.decode_seconds) != (PROBE_SECONDS, DECODE_SECONDS):
        decoding += ", measured"
    sizes = "probed" if counts.get("probed") else "declared (files may differ: --probe N looks)"
    rate = "" if counts.get("probed") else f" at {PROXY_MBIT:g} Mbit/s of video"
    return [
        f"sizes as {sizes}; {hardware.network_mbit:,.0f} Mbit/s of network{rate}; {connections} connections of "
        f"{fetching}; {num_decoding} of {hardware.num_cores} cores decode, {decoding}",
        f"{speeds}; captions of {counted(num_records, 'record')}",
    ]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
