"""Arrays as bytes: plain `.npy` (version 1.0) in one zstd frame, level 1, with its content size and checksum.

The reader never parses an array's header: it knows shape and dtype from the commit, writes the header it expects and
compares. So nothing in a frame decides how much memory is used, and nothing in it is ever unpickled.

zstd's checksum (the low 32 bits of the content's xxh64, the frame's last four bytes) is also in the commit: it ties a
payload to its key (two frames of one shape could otherwise be exchanged) and costs nothing.
"""

from __future__ import annotations

import ast
import hashlib
import math
from typing import Any

import numpy as np
import zstandard

from shards.errors import ShardDamage

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
"""Names of the stored types; bfloat16 is stored, and comes back, as its bits in uint16."""
MAX_ARRAY_BYTES = 2**28
"""Largest array of the format: a 121-frame 1280×704 latent in float32 is a twelfth of it."""
MAX_LATENT_MAGNITUDE = 1000.0
"""Latents are normalised to a standard deviation near 1: values beyond this are not an encoder's."""
MAX_LATENT_RMS = 100.0
"""A normalised latent has a root mean square near 1."""
MAX_DIMENSIONS = 8
_LEVEL = 1
_MAGIC = b"\x93NUMPY\x01\x00"
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_CHECKSUM_BYTES = 4


def encode_array(array: np.ndarray) -> bytes:
    """Encode a C-contiguous float16, float32 or uint16 (bfloat16's bits) array.

    Raises ValueError on any other dtype, or an array beyond MAX_ARRAY_BYTES.
    """
    dtype = dtype_name(array.dtype)
    shape = tuple(array.shape)
    _check_size(shape, dtype)
    data = npy_header(shape, dtype) + np.ascontiguousarray(array, DTYPES[dtype]).tobytes()
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
    return compressor.compress(data)


def decode_array(data: bytes | memoryview, *, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Decode one array whose shape and dtype are known; memory is bounded by them, whatever the bytes say.

    Args:
        data: one complete zstd frame.
        shape: the array's shape, as the commit says.
        dtype: 'float16', 'bfloat16' (comes back as uint16) or 'float32'.

    Returns a writable array. Raises ShardDamage when the bytes are not such an array.
    """
    try:
        num_bytes = _check_size(shape, dtype)
    except (ValueError, KeyError, TypeError):
        raise ShardDamage("array", f"{dtype!r} {list(shape)} is no array of the format") from None
    header = npy_header(shape, dtype)
    num_bytes += len(header)
    _check_frame(data, num_bytes)
    content = np.empty(num_bytes, np.uint8)
    try:
        # Source and destination are complete, so zstd decompresses in one pass, directly into the array.
        done = _decompressor().stream_reader(data).readinto(content)
    except zstandard.ZstdError as error:
        raise ShardDamage("array", f"zstd: {error}") from None
    if done != num_bytes:
        raise ShardDamage("array", f"{done} bytes where {num_bytes} were announced")
    if content[: len(header)].tobytes() != header:
        raise ShardDamage("array", f"its .npy header is not that of {dtype} {list(shape)}")
    return content[len(header) :].view(DTYPES[dtype]).reshape(shape)


def inspect_array(data: bytes) -> tuple[tuple[int, ...], str, str]:
    """Shape, dtype name and frame checksum (8 hex digits) of an encoded array, decoding all of it.

    For the writer: a frame that its own reader would refuse never enters a shard. Raises ShardDamage.
    """
    size = _check_frame(data, None)
    start = _decompressor().stream_reader(data).read(min(size, 2**12))
    shape, dtype = _parse_npy_header(start)
    decode_array(data, shape=shape, dtype=dtype)
    return shape, dtype, frame_checksum(data).to_bytes(4, "big").hex()


def frame_checksum(data: bytes | memoryview) -> int:
    """The checksum a frame carries in its last four bytes, as a uint32."""
    return int.from_bytes(data[-_CHECKSUM_BYTES:], "little")


def array_facts(array: np.ndarray) -> dict[str, Any]:
    """What a sample's JSON says of an array: shape, dtype name, sha256 of its little-endian C-order bytes."""
    dtype = dtype_name(array.dtype)
    data = np.ascontiguousarray(array, DTYPES[dtype])
    return {"shape": list(array.shape), "dtype": dtype, "sha256": hashlib.sha256(data.tobytes()).hexdigest()}


def largest_magnitude(array: np.ndarray) -> float:
    """The largest absolute value of a stored array; infinity where it holds infinities or NaN.

    By the bits, which grow with the magnitude: numpy computes in float16 far more slowly. As signed integers the
    largest is that of the positive values, as unsigned ones that of the negative. No copy is made.
    """
    if not array.size:
        return 0.0
    name = dtype_name(array.dtype)
    signed, unsigned = (np.int32, np.uint32) if name == "float32" else (np.int16, np.uint16)
    bits = max(int(array.view(signed).max()), int(array.view(unsigned).max()) & np.iinfo(signed).max)
    if name == "float16":
        found = float(np.uint16(bits).view(np.float16))
    else:
        found = float(np.uint32(bits << 16 if name == "bfloat16" else bits).view(np.float32))
    return found if math.isfinite(found) else math.inf


def to_float32(stored: np.ndarray) -> np.ndarray:
    """float16, float32, or bf16 as uint16 bits, to float32."""
    if stored.dtype == DTYPES["bfloat16"]:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)


def root_mean_square(array: np.ndarray) -> float:
    """Of an array of finite values in a stored type."""
    return math.sqrt(np.mean(np.square(to_float32(array), dtype=np.float64)))


def implausible_latent(largest: float) -> str:
    """What to say of a latent beyond MAX_LATENT_MAGNITUDE."""
    if largest == math.inf:
        return "it is not finite: it holds infinities or NaN"
    return f"values up to {largest:.3g}: a normalised latent stays below {MAX_LATENT_MAGNITUDE:g}"


def dtype_name(dtype: np.dtype) -> str:
    """'float16', 'bfloat16' (for uint16) or 'float32'. Raises ValueError on any other type."""
    for name, stored in DTYPES.items():
        if dtype.kind == stored.kind and dtype.itemsize == stored.itemsize:
            return name
    raise ValueError(f"dtype {dtype} is not one that shards store: float16, float32, or bfloat16's bits as uint16")


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The `.npy` 1.0 header of an array, its length a multiple of 64; the only one a v1 shard may hold."""
    text = f"{{'descr': '{DTYPES[dtype].str}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    padding = -(len(_MAGIC) + 2 + len(text) + 1) % 64
    body = text.encode() + b" " * padding + b"\n"
    return _MAGIC + len(body).to_bytes(2, "little") + body


def _parse_npy_header(start: bytes) -> tuple[tuple[int, ...], str]:
    length = int.from_bytes(start[len(_MAGIC) : len(_MAGIC) + 2], "little")
    try:
        fields = ast.literal_eval(start[len(_MAGIC) + 2 : len(_MAGIC) + 2 + length].decode("ascii").strip())
        shape, descr = tuple(fields["shape"]), fields["descr"]
        dtype = next(name for name, stored in DTYPES.items() if stored.str == descr)
    except (ValueError, SyntaxError, KeyError, TypeError, StopIteration):
        raise ShardDamage("array", "it holds no .npy header of float16, float32 or uint16") from None
    if start[: len(_MAGIC) + 2 + length] != npy_header(shape, dtype):
        raise ShardDamage("array", "its .npy header is not written as the format says")
    return shape, dtype


def _check_size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of the array's elements. Raises ValueError beyond the format's bounds."""
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or num_bytes > MAX_ARRAY_BYTES:
        raise ValueError(f"an array of {dtype} {list(shape)} is beyond the format's {MAX_ARRAY_BYTES:,} bytes")
    return num_bytes


def _check_frame(data: bytes | memoryview, num_bytes: int | None) -> int:
    """Check that `data` is exactly one frame with checksum and content size (of `num_bytes`); return that size."""
    size = check_frame(data, "array")
    if size > MAX_ARRAY_BYTES + 2**16 or (num_bytes is not None and size != num_bytes):
        what = f"its frame announces {size} bytes, expected {num_bytes or 'an array of the format'}"
        raise ShardDamage("array", what)
    return size


def check_frame(data: bytes | memoryview, file: str) -> int:
    """Check that `data` is exactly one complete zstd frame with checksum; the content size that it announces.

    That may be zstandard.CONTENTSIZE_UNKNOWN. Raises ShardDamage naming `file`.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
        end = _frame_end(data, zstandard.frame_header_size(data))
    except zstandard.ZstdError as error:
        raise ShardDamage(file, f"zstd: {error}") from None
    if bytes(data[:4]) != _FRAME_MAGIC or not frame.has_checksum or frame.dict_id:
        raise ShardDamage(file, "not a zstd frame with checksum and without dictionary")
    if end != len(data):
        found = "does not end" if end < 0 or end > len(data) else f"ends at byte {end}"
        raise ShardDamage(file, f"truncated or overwritten: its frame {found} within its {len(data)} bytes")
    return int(frame.content_size)


def _frame_end(data: bytes | memoryview, place: int) -> int:
    """Byte after the frame's checksum, by walking its block headers (RFC 8878, 3.1.1.2)."""
    while place + 3 <= len(data):
        header = int.from_bytes(data[place : place + 3], "little")
        is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
        place += 3 + (1 if kind == 1 else size)
        if is_last:
            return place + _CHECKSUM_BYTES
    return -1


def _decompressor() -> zstandard.ZstdDecompressor:
    # Created each time (microseconds): a context must not be shared between threads.
    return zstandard.ZstdDecompressor(max_window_size=2**27)
