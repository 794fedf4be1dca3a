"""The tags of clips: keywords of an annotation, or further columns of a table, as the frozen plan has them.

They are in no sample: a sample's bytes hold what decides its numbers. The plan's objects are part of the dataset.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import zstandard

from shards.errors import ShardDamage
from shards.format.dataset_info import Generation, read_info
from shards.format.sealed_json import parse_json
from shards.read.outcomes import MAX_LEDGER_BYTES
from shards.storage.base import Storage

_MAX_LINE_BYTES = 2**24


def clip_tags(storage: Storage) -> dict[str, tuple[str, ...]]:
    """The tags of every planned clip that has some, by its id. Raises ShardDamage naming the plan's object."""
    tags: dict[str, tuple[str, ...]] = {}
    for generation in read_info(storage).generations:
        name = f"plan/{generation.name}.jsonl.zst"
        for line in _lines(storage.get(name, MAX_LEDGER_BYTES), generation, storage.url(name)):
            if b'"keywords"' not in line:
                continue
            record = parse_json(line, storage.url(name))
            clip, words = (record.get(field) for field in ("clip_id", "keywords")) if isinstance(record, dict) else "??"
            if not isinstance(clip, str) or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
                raise ShardDamage(storage.url(name), "a line that is no record")
            tags[clip] = tuple(words)
    return tags


def _lines(data: bytes, generation: Generation, file: str) -> Iterator[bytes]:
    """Lines of a plan's object, whose zstd frames are one a unit."""
    if hashlib.sha256(data).hexdigest() != generation.plan_sha256:
        raise ShardDamage(file, "its sha256 is not the one in dataset.json")
    stream = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data, read_across_frames=True)
    reader = io.BufferedReader(stream, 2**17)
    try:
        while line := reader.readline(_MAX_LINE_BYTES + 1):
            if not line.endswith(b"\n"):
                raise ShardDamage(file, f"a line that does not end, or is longer than {_MAX_LINE_BYTES:,} bytes")
            yield line
    except zstandard.ZstdError as error:
        raise ShardDamage(file, f"zstd: {error}") from None
