"""Sizes, frames, batch and held-out share that fit what a survey found; a real model's memory is asked for."""

from __future__ import annotations

import math
from typing import NamedTuple

from preprocess.config import BucketsConfig, PictureSize
from preprocess.project.survey import Survey, median_seconds, quantile
from preprocess.rejection import Rejection
from preprocess.video.bucket import choose_size, upscale
from shards.format.keys import clip_hash

FAMILIES = ((1280, 704), (832, 480), (640, 352), (480, 288), (320, 192), (256, 160), (160, 96), (96, 64), (64, 32))
"""Long and short side, the largest first; the first two are the model's own."""
MAX_FRAMES = 49
FPS = 24
_FEW_CLIPS = 1000
_LENGTHS = (30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 36_000.0)


class Sizes(NamedTuple):
    """What the samples are."""

    buckets: tuple[PictureSize, ...]
    shares: tuple[float, ...]
    """Of the clips that were looked at."""
    max_upscale: float


class ProjectChoice(NamedTuple):
    """What the configs say."""

    num_frames: int
    min_seconds: float
    max_seconds: float
    policy: str
    max_windows: int
    num_samples: int
    """About."""
    num_gpus: int
    """Of those there are, as many as the samples can fill a batch for."""
    global_batch: int
    validation_fraction: float
    """0: too few clips to hold one out."""
    num_held_out: int


def fitting_sizes(survey: Survey) -> list[Sizes]:
    """What the pictures allow, the largest first: sizes that enlarge no more than a fifth of the clips."""
    if not survey.shapes:
        return [_sizes(survey, (832, 480))]
    found = []
    for family in FAMILIES:
        sizes = _sizes(survey, family)
        config = BucketsConfig(sizes=sizes.buckets, max_upscale=1.0)
        fits = sum(not isinstance(choose_size(shape.width, shape.height, config), Rejection) for shape in survey.shapes)
        if fits >= 0.8 * len(survey.shapes):
            found.append(sizes)
    return found or [_sizes(survey, FAMILIES[-1])]


def choose(survey: Survey, sizes: Sizes, num_gpus: int) -> ProjectChoice:
    """Everything that does not depend on memory."""
    num_frames, policy, max_windows = 1, "captions", 1
    seconds = [shape.seconds for shape in survey.shapes if shape.seconds]
    if not survey.images:
        usable = int(quantile(seconds, 0.1) * FPS) if seconds else MAX_FRAMES
        num_frames = max(5, (min(MAX_FRAMES, usable) - 1) // 4 * 4 + 1)
    per_clip = int(median_seconds(survey) * FPS) // num_frames
    if not survey.images and not survey.has_times and survey.num_clips < _FEW_CLIPS and per_clip > 1:
        policy, max_windows = "tile", min(4, per_clip)
    num_samples = survey.num_clips * max_windows
    rarest = min(share for share in sizes.shares if share) * num_samples
    # Half of a size: some clips are held out, and some will be refused when they are decoded.
    num_gpus = max(1, min(num_gpus, int(0.5 * max(sizes.shares) * num_samples)))
    batch = num_gpus
    while 2 * batch <= min(16, 0.5 * rarest):
        batch *= 2
    fraction, num_held_out = _held_out(survey)
    longest = max(seconds, default=0.0)
    is_mbc = survey.layout.kind == "mbc"
    return ProjectChoice(
        num_frames=num_frames,
        min_seconds=3.0 if is_mbc else math.floor(100 * num_frames / FPS) / 100,
        max_seconds=30.0 if is_mbc else next(length for length in _LENGTHS if length >= min(longest, _LENGTHS[-1])),
        policy=policy,
        max_windows=max_windows,
        num_samples=num_samples,
        num_gpus=num_gpus,
        global_batch=batch,
        validation_fraction=fraction,
        num_held_out=num_held_out,
    )


def _held_out(survey: Survey) -> tuple[float, int]:
    """The share to hold out, such that at least one clip is, and how many that is about."""
    if survey.num_clips < 2:
        return 0.0, 0
    fraction = 0.05 if survey.num_clips < 2000 else 0.01 if survey.num_clips < 50_000 else 0.005
    hashes = sorted(clip_hash(clip_id, "split") / 2.0**64 for clip_id in survey.clip_ids)
    if hashes[0] >= fraction:
        fraction = math.ceil(hashes[0] * 10_000 + 1) / 10_000
    share = sum(value < fraction for value in hashes) / len(hashes)
    return fraction, max(1, round(share * survey.num_clips))


def _sizes(survey: Survey, family: tuple[int, int]) -> Sizes:
    """Landscape, portrait and square of one area, those that clips have, and how much they must be enlarged."""
    long, short = family
    square = max(32, math.isqrt(long * short) // 32 * 32)
    every = [(long, short), (short, long), (square, square)]
    sizes = tuple(PictureSize(width=width, height=height) for width, height in every)
    nearest = [_nearest(shape.width / shape.height, sizes) for shape in survey.shapes]
    counts = [nearest.count(size) for size in sizes]
    kept = [(size, count) for size, count in zip(sizes, counts, strict=True) if count] or [(sizes[0], 1)]
    needed = [upscale(shape.width, shape.height, size) for shape, size in zip(survey.shapes, nearest, strict=True)]
    most = min(1.5, max(1.0, *needed)) if needed else 1.0
    total = sum(count for _, count in kept)
    return Sizes(
        tuple(size for size, _ in kept), tuple(count / total for _, count in kept), math.ceil(most * 100) / 100
    )


def _nearest(shape: float, sizes: tuple[PictureSize, ...]) -> PictureSize:
    return min(sizes, key=lambda size: abs(math.log(shape * size.height / size.width)))
