"""The ledger of a unit: one row a candidate, the result for it and for each of its windows. JSON lines under zstd."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import zstandard

from shards.config import Config, Number
from shards.errors import ShardDamage
from shards.format.arrays import check_frame
from shards.format.sealed_json import canonical_json

MAX_LINE_BYTES = 2**24
_FREE_LINE_BYTES, _MAX_RATIO = 2**20, 100
"""A line may be this long in any file, and this many times the file's bytes longer: a small file asks for little."""


class _Row(Config):
    """A row without what is null and was added later: it has the bytes that it had before there was such a field."""

    _later: ClassVar[frozenset[str]] = frozenset()

    @pydantic.model_serializer(mode="wrap")
    def _without_absent(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in self._later or value is not None}


class WindowRow(_Row):
    """What became of one window of a candidate."""

    key: str | None
    """The sample's key; null when the window was refused before it had one."""
    start_seconds: float
    status: Literal["accepted", "rejected"]
    reason: str | None
    detail: str | None
    measured: dict[str, float] | None = None
    """Motion, black share and kept share of its pictures; null where none were decoded, or of an older build."""
    _later: ClassVar[frozenset[str]] = frozenset({"measured"})


class LedgerRow(_Row):
    """What became of one candidate."""

    candidate: Annotated[int, pydantic.Field(ge=-1, lt=2**62)]
    """Its ordinal in the plan; -1 where it is not in it."""
    clip_id: str
    source: str
    """Name of its annotation, relative to the corpus."""
    status: Literal["accepted", "rejected"]
    stage: str | None
    """The stage that refused it: read, sieve, fetch, probe, window, bucket, decode, caption, encode."""
    reason: str | None
    """A code in kebab-case."""
    detail: str | None
    retryable: bool
    attempts: Number
    windows: tuple[WindowRow, ...]
    seconds: dict[str, Annotated[float, pydantic.Field(ge=0, le=1e9)]]
    """Seconds spent, by stage."""
    bytes: Number
    """Bytes downloaded."""
    facts: dict[str, pydantic.JsonValue] | None = None
    """What the file of a rejected candidate says, and what was decided about it; null where it was not read."""
    _later: ClassVar[frozenset[str]] = frozenset({"facts"})


def write_ledger(rows: Iterable[LedgerRow]) -> bytes:
    """The ledger as bytes."""
    lines = b"".join(canonical_json(row.model_dump(mode="json")) + b"\n" for row in rows)
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines)


def read_ledger(data: bytes, file: str = "ledger") -> Iterator[LedgerRow]:
    """The rows of a ledger, streamed. Raises ShardDamage naming `file` and the line."""
    for number, line in enumerate(read_ledger_lines(data, file), 1):
        try:
            yield LedgerRow.model_validate_json(line)
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ShardDamage(file, f"line {number}: {where}: {problem['msg']}") from None


def read_ledger_lines(data: bytes, file: str, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Lines of one zstd frame with checksum, streamed: memory is bounded by one line. Raises ShardDamage."""
    check_frame(data, file)
    max_line_bytes = min(max_line_bytes, _FREE_LINE_BYTES + _MAX_RATIO * len(data))
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
    reader = io.BufferedReader(decompressor.stream_reader(data), 2**17)
    try:
        while line := reader.readline(max_line_bytes + 1):
            if not line.endswith(b"\n"):
                raise ShardDamage(file, f"a line that does not end, or is longer than {max_line_bytes:,} bytes")
            yield line[:-1]
    except (zstandard.ZstdError, EOFError) as error:
        raise ShardDamage(file, f"zstd: {error}") from None
