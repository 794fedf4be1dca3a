"""Damaged annotations and media by the thousand: every one ends as a record, samples or a row, none as an exception.

NUM_FUZZED_RECORDS and NUM_FUZZED_MEDIA set how many, FUZZ_SEED which; a failure prints seed and number. 10,000 media:
`NUM_FUZZED_MEDIA=10000 pytest -s -m slow tests/preprocess/test_fuzzed_files.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from annotations import annotation, encode
from clips import SMALL, a_record, number_picture, only_bucket, prep_config, write_clip

from preprocess.corpus.records import Record, parse_record
from preprocess.rejection import STAGES, ClipRejected, Rejection
from preprocess.video.decode import decode_window
from preprocess.video.probe import probe_clip
from preprocess.video.window import choose_windows

SEED = int(os.environ.get("FUZZ_SEED", "19"))
NUM_RECORDS = int(os.environ.get("NUM_FUZZED_RECORDS", "10000"))
NUM_MEDIA = int(os.environ.get("NUM_FUZZED_MEDIA", "300"))
ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    "",
    "not a list",
    [],
    {},
    [[]],
    {"text": {}},
    "00:99:00;00",
    "\ud800",
    "가" * 3000,
    [None],
]


def mutated_value(value: object, rng: random.Random, depth: int = 0) -> object:
    """A copy of a JSON value with a few odd values in it."""
    if rng.random() < 0.06 and depth:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {key: mutated_value(inner, rng, depth + 1) for key, inner in value.items() if rng.random() > 0.03}
    if isinstance(value, list):
        return [mutated_value(inner, rng, depth + 1) for inner in value] * rng.choice([1, 1, 1, 2])
    return value


def test_every_fuzzed_annotation_is_a_record_or_a_rejection() -> None:
    base = annotation()
    for number in range(NUM_RECORDS):
        rng = random.Random(f"{SEED} {number}")
        data = bytearray(json.dumps(mutated_value(base, rng)).encode() if number % 2 else encode(base))
        for _ in range(0 if number % 2 else rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(len(data))] if number % 10 == 0 else data
        found = parse_record(bytes(data), "a.json")
        assert isinstance(found, Record) or (isinstance(found, Rejection) and found.stage in STAGES), (SEED, number)
        if isinstance(found, Record):
            for level in (found.object, found.scene, found.semantic, found.application):
                assert all(caption.text and isinstance(caption.text, str) for caption in level), (SEED, number)


def mutated_boxes(data: bytes, rng: random.Random) -> bytes:
    """One box, at any depth, removed, doubled, put elsewhere, put in another's place, or of another size or name."""
    found = [place.start() - 4 for place in re.finditer(rb"[a-z][a-z0-9]{3}", data) if place.start() >= 4]
    boxes = [(at, size) for at in found if 8 <= (size := int.from_bytes(data[at : at + 4])) <= len(data) - at]
    (at, size), (other, other_size) = rng.choice(boxes), rng.choice(boxes)
    box, rest = data[at : at + size], data[at + size :]
    odd = rng.choice([0, 1, 7, 8, size + 1, 2 * size, 2**31, 2**32 - 1])
    return rng.choice([
        data[:at] + rest,
        data[:at] + box + box + rest,
        data[:other] + box + data[other:],
        data[:at] + data[other : other + other_size] + rest,
        data[:at] + odd.to_bytes(4) + data[at + 4 :],
        data[:at] + box[:4] + rng.choice([b"free", b"moov", b"trak", b"uuid", b"stbl"]) + data[at + 8 :],
    ])  # fmt: skip


def mutated_media(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Flipped bytes, a cut, a stretch left out or doubled, a piece of another file in the middle, or odd boxes."""
    kind = rng.choice(["flip", "flip", "cut", "drop", "double", "splice", "header", "box"])
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    if kind == "cut":
        return data[:b]
    if kind == "drop":
        return data[:a] + data[b:]
    if kind == "double":
        return data[:b] + data[a:]
    if kind == "splice":
        other = rng.choice(others)
        return data[:a] + other[: rng.randrange(len(other))] + data[a:]
    if kind == "box" and data[4:8] == b"ftyp":  # MP4 and MOV
        return mutated_boxes(data, rng)
    changed, reach = bytearray(data), 400 if kind == "header" else len(data)
    for _ in range(rng.randrange(1, 40)):
        changed[rng.randrange(min(reach, len(changed)))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_mutated_medium_is_samples_or_a_row(tmp_path: Path) -> None:
    print(f"FUZZ_SEED={SEED} NUM_FUZZED_MEDIA={NUM_MEDIA}")
    frames = np.stack([number_picture(n) for n in range(80)])
    kinds = {
        "mp4": SMALL, "mkv": SMALL, "ts": SMALL, "avi": ("-c:v", "mpeg4", "-q:v", "4"), "mov": ("-c:v", "mjpeg"),
        "mpg": ("-c:v", "mpeg2video", "-q:v", "4"), "webm": ("-c:v", "libvpx", "-b:v", "300k"), "gif": ("-c:v", "gif"),
    }  # fmt: skip
    same = ("-fflags", "+bitexact")  # else a Matroska file has a random identifier, and a seed says little
    files = {
        suffix: write_clip(tmp_path / f"sound.{suffix}", frames, 25, *kinds[suffix], *same).read_bytes()
        for suffix in kinds
    }
    for policy in ("strict", "tolerant"):
        decode = {"policy": policy, "timeout_seconds": 30.0}
        config = prep_config(((160, 96),), window={"num_frames": 17}, decode=decode)
        for number in range(0 if policy == "strict" else 1, NUM_MEDIA, 2):
            rng = random.Random(f"{SEED} {number}")
            suffix = rng.choice(sorted(files))
            path = tmp_path / f"mutated.{suffix}"
            path.write_bytes(mutated_media(files[suffix], list(files.values()), rng))
            begun = time.monotonic()
            try:
                facts = probe_clip(path, a_record(), config)
                for window in choose_windows(facts, a_record(), config):
                    assert window.start_seconds >= 0
                    decode_window(path, facts, window, only_bucket(config), config)
            except ClipRejected as refused:
                assert refused.rejection.stage in STAGES
                assert refused.rejection.reason != "inspector-failed", (SEED, number, refused.rejection)
            except Exception as error:
                raise AssertionError(f"FUZZ_SEED={SEED}, number {number}, {suffix}") from error
            assert time.monotonic() - begun < 150, (SEED, number)
            if number % 500 < 2:
                print(f"{policy}: {number} of {NUM_MEDIA}", flush=True)
