"""The dataset as the trainer reads it: random access to latents and to the embeddings of one text set.

Opening reads dataset.json, the listing and the commits (or the index), and checks versions, sizes and identities.
Reading a sample is one `pread` or one ranged GET of an array with its tar header. Checked before use: every byte of
the tar header, the frame's checksum against its content and against the commit, the array's header.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from shards.errors import ShardDamage, UserError
from shards.format.arrays import (
    MAX_ARRAY_BYTES,
    MAX_LATENT_MAGNITUDE,
    decode_array,
    frame_checksum,
    implausible_latent,
    largest_magnitude,
)
from shards.format.dataset_info import DatasetInfo, text_command
from shards.format.names import JSON_MEMBER, LATENT_MEMBER, text_member
from shards.format.sealed_json import parse_json
from shards.format.tar import BLOCK, tar_header
from shards.read.open import Opened, open_roots
from shards.read.table import NUMBERS, Shard, Table
from shards.read.tags import clip_tags
from shards.storage.base import Storage

_ATTEMPTS = 2
_MAX_MEMBER_BYTES = 2 * MAX_ARRAY_BYTES
_NULL_KEYS = ("empty", "negative")
_FIX_VALUES = (
    "`wanshards verify --deep ROOT` lists all such arrays; delete their units' commits and build these again with "
    "`wanprep build-shards`"
)
Value = TypeVar("Value")


class Sample(NamedTuple):
    """What the commits say of a sample; its tar is not opened."""

    key: str
    clip_id: str
    start_ms: int
    frames: int
    height: int
    width: int
    media: str
    """'video' or 'image'."""
    category: str | None
    num_variants: int
    """Caption variants in the open text set; 0 when none is open."""


def open_dataset(
    roots: str | Path | Sequence[str | Path],
    text_set: str | None = "default",
    *,
    revision: str | None = None,
    pin: dict[str, Any] | None = None,
    cache: Path | None = None,
    cache_gib: float = 50.0,
) -> Dataset:
    """Open one dataset over one or several roots of one identity.

    Args:
        roots: a folder or `s3://bucket/prefix`, or several.
        text_set: whose embeddings to read; None: latents alone.
        revision: refuse the dataset unless this is its revision.
        pin: of `Dataset.pin()`: open exactly these commits, though others were added since.
        cache: folder of a bounded cache for shards of S3 roots; None: every read is a ranged GET.
        cache_gib: bound of the cache in GiB.

    Raises UserError (also as ShardDamage, IdentityMismatch, FutureFormat): what is wrong and how to fix it.
    """
    paths = [roots] if isinstance(roots, str | Path) else list(roots)
    return Dataset(open_roots(paths, text_set, revision, pin, cache, cache_gib))


class Dataset:
    """An open dataset. It can be pickled and forked; files are opened lazily, in the process that reads."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._by_key: dict[str, int] | None = None
        self._tags: dict[str, tuple[str, ...]] | None = None
        self._buffers = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"opened": self._opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["opened"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._opened.latents.keys)

    @property
    def info(self) -> DatasetInfo:
        """dataset.json of the first root."""
        return self._opened.info

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the latents."""
        return self._opened.info.identity

    @property
    def identity_digest(self) -> str:
        """sha256 of the identity of the latents."""
        return self._opened.info.identity_digest

    @property
    def text_identity_digest(self) -> str | None:
        """sha256 of the identity of the open text set."""
        return self._opened.text_identity_digest

    @property
    def revision(self) -> str:
        """Digest of the commits this dataset consists of: latents, and the open text set with its null embeddings."""
        return self._opened.revision

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples, made one at a time from columns; their order is that of roots, units and tars."""
        return SampleView(self._opened.latents, self._opened.num_variants)

    def pin(self) -> dict[str, Any]:
        """A plain value that opens this very revision again after others were added: `open_dataset(…, pin=…)`."""
        return self._opened.pin()

    def ordinal(self, key: str) -> int:
        """The index of a key in `samples`. Raises UserError on an unknown key."""
        if self._by_key is None:
            self._by_key = {name: place for place, name in enumerate(self._opened.latents.keys)}
        try:
            return self._by_key[key]
        except KeyError:
            raise UserError(f"no sample {key!r} in {self._opened.where()}", fix="`wanshards ls ROOT --keys`") from None

    def tags(self) -> dict[str, tuple[str, ...]]:
        """The tags of clips by their ids, from the frozen plans, which are read once. Raises ShardDamage."""
        if self._tags is None:
            self._tags = {clip: tags for each in self._opened.storages for clip, tags in clip_tags(each).items()}
        return self._tags

    def latent(self, key: str | int, *, plausible: bool = True) -> np.ndarray:
        """The latent of a sample: C×T×H×W in its stored type (bfloat16 as uint16 bits, see `latent_dtype`).

        Raises ShardDamage, also of a latent that holds infinities, NaN, or values that no encoder gives, unless not
        `plausible`: only to look at it.
        """
        row, table = self._ordinal(key), self._opened.latents
        array = self._array(table, row, 0, LATENT_MEMBER)
        if plausible and not (largest := largest_magnitude(array)) <= MAX_LATENT_MAGNITUDE:
            shard = table.shards[int(table.shard[row])]
            what = implausible_latent(largest)
            member, offset = f"{table.keys[row]}.{LATENT_MEMBER}", int(table.arrays[0, table.start[row]])
            raise ShardDamage(self.storage(shard).url(shard.tar), what, member=member, offset=offset, fix=_FIX_VALUES)
        return array

    def latent_channels(self) -> dict[int, str]:
        """The numbers of channels of the dataset's latents, each with a sample that has it. Nothing is read."""
        table = self._opened.latents
        channels = np.array([spec.shape[0] if spec.shape else 0 for spec in table.specs], np.int64)
        found, first = np.unique(channels[table.arrays[3, table.start[:-1]]], return_index=True)
        return {int(number): table.keys[row] for number, row in zip(found, first, strict=True)}

    def missing_units(self) -> str | None:
        """What is planned and not there, for people; None where all planned units of latents are open."""
        planned = sum(self._opened.num_planned)
        there = len(self._opened.latents.shards)
        return None if there >= planned else f"{there:,} of {planned:,} planned units are there"

    def latent_dtype(self, key: str | int) -> str:
        """'float16', 'bfloat16' or 'float32'."""
        return self._spec(self._opened.latents, self._ordinal(key), 0).dtype

    def latent_shape(self, key: str | int) -> tuple[int, ...]:
        """C, T, H, W of a sample's latent, without reading it."""
        return self._spec(self._opened.latents, self._ordinal(key), 0).shape

    def text(self, key: str | int, variant: int = 0) -> np.ndarray:
        """The embedding of a caption variant: tokens × dim, bfloat16's bits as uint16, real tokens only."""
        table, row = self._text_row(key)
        num_variants = int(table.start[row + 1] - table.start[row])
        if not 0 <= variant < num_variants:
            raise UserError(f"caption variant {variant} of {table.keys[row]}", expected=f"0 to {num_variants - 1}")
        return self._array(table, row, variant, text_member(variant))

    def meta(self, key: str | int) -> dict[str, Any]:
        """The sample's JSON among the latents."""
        return self._json(self._opened.latents, self._ordinal(key))

    def text_meta(self, key: str | int) -> dict[str, Any]:
        """The sample's JSON in the open text set: captions, what was cut, token counts."""
        return self._json(*self._text_row(key))

    def null_text(self, which: str) -> np.ndarray:
        """The text set's embedding of the 'empty' caption or of the 'negative' prompt: tokens × dim uint16."""
        if which not in _NULL_KEYS:
            raise UserError(f"null embedding {which!r}", expected=" or ".join(_NULL_KEYS))
        table = self._opened.null
        if table is None or which not in table.keys:
            raise UserError(
                f"text set {self._opened.text_set!r} has no null embedding {which!r} in {self._opened.where()}",
                fix=f"{text_command(self._opened.text_set or 'default')} writes them",
            )
        return self._array(table, table.keys.index(which), 0, text_member(0))

    def shard(self, key: str | int) -> Shard:
        """The shard that holds a sample's latent."""
        table = self._opened.latents
        return table.shards[int(table.shard[self._ordinal(key)])]

    def storage(self, shard: Shard) -> Storage:
        """The storage of a shard's root."""
        return self._opened.storages[shard.root]

    def _ordinal(self, key: str | int) -> int:
        if isinstance(key, str):
            return self.ordinal(key)
        if not 0 <= key < len(self):
            raise UserError(f"sample {key} of a dataset of {len(self)}", expected=f"0 to {len(self) - 1}")
        return key

    def _text_row(self, key: str | int) -> tuple[Table, int]:
        if self._opened.text is None:
            raise UserError("this dataset was opened without a text set", fix="open_dataset(roots, text_set=NAME)")
        return self._opened.text, int(self._opened.text_rows[self._ordinal(key)])

    def _spec(self, table: Table, row: int, place: int) -> Any:
        return table.specs[table.arrays[3, table.start[row] + place]]

    def _array(self, table: Table, row: int, place: int, suffix: str) -> np.ndarray:
        offset, size, check, spec = (int(value) for value in table.arrays[:, table.start[row] + place])
        dtype, shape = table.specs[spec].dtype, table.specs[spec].shape

        def decode(payload: memoryview) -> np.ndarray:
            if frame_checksum(payload) != check:
                raise ShardDamage("array", "its checksum is not the one in the commit: another payload, or cut")
            return decode_array(payload, shape=shape, dtype=dtype)

        return self._member(table, row, suffix, offset, size, decode)

    def _json(self, table: Table, row: int) -> dict[str, Any]:
        offset, size, check = (int(value) for value in table.json[:, row])

        def decode(payload: memoryview) -> dict[str, Any]:
            digest = hashlib.sha256(payload).digest()[:8]
            if int.from_bytes(digest, "big") != check % 2**64:
                raise ShardDamage("json", "its digest is not the one in the commit")
            value = parse_json(bytes(payload), "json")
            if not isinstance(value, dict):
                raise ShardDamage("json", f"its top level is {type(value).__name__}, not an object")
            return value

        return self._member(table, row, JSON_MEMBER, offset, size, decode)

    def _member(
        self, table: Table, row: int, suffix: str, offset: int, size: int, decode: Callable[[memoryview], Value]
    ) -> Value:
        """Read one member and decode it; one that is damaged is read a second time before it is an error."""
        shard = table.shards[int(table.shard[row])]
        name = f"{table.keys[row]}.{suffix}"
        if size > _MAX_MEMBER_BYTES:
            what = f"{size:,} bytes are more than a member of the format has"
            raise ShardDamage(shard.tar, what, member=name, offset=offset)
        header = tar_header(name, size)
        storage = self._opened.storages[shard.root]
        for attempt in range(_ATTEMPTS):
            try:
                buffer = self._buffer(BLOCK + size)
                got = storage.read_into(shard.tar, offset - BLOCK, buffer)
                if got < len(buffer):
                    raise ShardDamage("tar", f"truncated: {got} of {len(buffer)} bytes")
                if buffer[:BLOCK] != header:
                    raise ShardDamage("tar", "the bytes before it are not its tar header")
                return decode(buffer[BLOCK:])
            except ShardDamage as damage:
                if attempt == _ATTEMPTS - 1:
                    raise ShardDamage(storage.url(shard.tar), damage.what, member=name, offset=offset) from None
                self._opened.forget(shard)
        raise AssertionError("unreachable")

    def _buffer(self, size: int) -> memoryview:
        # One buffer a thread: allocating and faulting in four megabytes again costs a fifth of a sample.
        have = getattr(self._buffers, "value", None)
        if have is None or len(have) < size:
            have = self._buffers.value = bytearray(size)
        return memoryview(have)[:size]


class SampleView(Sequence[Sample]):
    """All samples as a sequence over columns."""

    def __init__(self, table: Table, num_variants: np.ndarray) -> None:
        self._table, self._num_variants = table, num_variants

    def __len__(self) -> int:
        return len(self._table.keys)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        row = self._table.summary
        return Sample(
            self._table.keys[place],
            row["clip"][place],
            int(row["start_ms"][place]),
            int(row["frames"][place]),
            int(row["height"][place]),
            int(row["width"][place]),
            "image" if row["is_image"][place] else "video",
            row["category"][place],
            int(self._num_variants[place]),
        )

    def __iter__(self) -> Iterator[Sample]:
        """By columns, a piece at a time: of a million samples `self[place]` takes four times as long."""
        table, row = self._table, self._table.summary
        for start in range(0, len(self), 4096):
            part = slice(start, start + 4096)
            numbers = [row[field][part].tolist() for field in NUMBERS]
            media = ["image" if is_image else "video" for is_image in row["is_image"][part].tolist()]
            variants = self._num_variants[part].tolist()
            yield from map(
                Sample, table.keys[part], row["clip"][part], *numbers, media, row["category"][part], variants
            )
