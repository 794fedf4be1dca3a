"""Arrays as bytes: exact both ways for any bits and shape, and no bytes that do more than fail."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shards.errors import ShardDamage
from shards.format.arrays import (
    DTYPES,
    array_facts,
    decode_array,
    encode_array,
    frame_checksum,
    inspect_array,
    largest_magnitude,
    npy_header,
)

SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=7)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """Any bits of any stored type: NaN payloads, subnormals and infinities among them."""
    name = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(SHAPES)
    bits = draw(hnp.arrays(np.dtype(f"<u{DTYPES[name].itemsize}"), shape))
    return name, bits.view(DTYPES[name]) if bits.ndim else bits.reshape(1).view(DTYPES[name]).reshape(())


@given(arrays())
def test_the_largest_magnitude_of_any_bits(case: tuple[str, np.ndarray]) -> None:
    name, array = case
    bits = array.astype(np.uint32) << 16 if name == "bfloat16" else None
    values = np.abs((array if bits is None else bits.view(np.float32)).astype(np.float64))
    largest = values.max(initial=0.0)
    assert largest_magnitude(array) == (largest if np.isfinite(largest) else np.inf)


@given(arrays())
def test_any_bits_come_back(case: tuple[str, np.ndarray]) -> None:
    name, array = case
    data = encode_array(array)
    assert inspect_array(data)[:2] == (array.shape, name)
    back = decode_array(data, shape=array.shape, dtype=name)
    assert (back.dtype, back.shape, back.tobytes()) == (DTYPES[name], array.shape, array.tobytes())
    assert back.flags.writeable


@given(arrays())
def test_any_reader_of_npy_under_zstd_gets_the_array(case: tuple[str, np.ndarray]) -> None:
    _, array = case
    plain = zstandard.ZstdDecompressor().decompress(encode_array(array))
    back = np.load(io.BytesIO(plain), allow_pickle=False)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_a_view_is_stored_as_its_values() -> None:
    array = np.arange(24, dtype=np.float16).reshape(4, 6).T[::2]
    assert np.array_equal(decode_array(encode_array(array), shape=array.shape, dtype="float16"), array)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8, np.complex64, object])
def test_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="dtype"):
        encode_array(np.zeros(3, dtype))


@given(st.data())
@settings(max_examples=300)
def test_a_changed_byte_is_found(data: st.DataObject) -> None:
    array = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float16)
    good = encode_array(array)
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        back = decode_array(bytes(bad), shape=array.shape, dtype="float16")
    except ShardDamage:
        return
    # zstd ignores two reserved or unused bits of its header: then the array is the right one.
    assert back.tobytes() == array.tobytes()


@given(st.integers(0, 200), st.binary(max_size=20))
def test_a_cut_or_lengthened_frame_is_found(cut: int, more: bytes) -> None:
    good = encode_array(np.arange(100, dtype=np.float32))
    bad = good[: max(0, len(good) - cut)] + more
    if bad == good:
        return
    with pytest.raises(ShardDamage):
        decode_array(bad, shape=(100,), dtype="float32")


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=500)
def test_any_bytes_fail_typed_and_small(data: bytes, with_magic: bool) -> None:
    data = b"\x28\xb5\x2f\xfd" + data if with_magic else data
    tracemalloc.start()
    try:
        with pytest.raises(ShardDamage):
            decode_array(data, shape=(2**20,), dtype="float32")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_header_that_asks_for_memory_gets_none() -> None:
    """A frame that announces 1 EiB, and one that would unfold to 200 MB, where 400 bytes are expected."""
    huge = b"\x28\xb5\x2f\xfd\xe4" + (2**60).to_bytes(8, "little") + b"\x01\x00\x00" + bytes(4)
    bomb = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(200_000_000))
    tracemalloc.start()
    try:
        for data in (huge, bomb):
            with pytest.raises(ShardDamage, match="announces"):
                decode_array(data, shape=(100,), dtype="float32")
            if data is huge:
                with pytest.raises(ShardDamage, match="announces"):
                    inspect_array(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_frame_without_checksum_or_size_is_refused() -> None:
    content = npy_header((4,), "float32") + bytes(16)
    for options in ({"write_checksum": False}, {"write_checksum": True, "write_content_size": False}):
        data = zstandard.ZstdCompressor(level=1, **options).compress(content)
        with pytest.raises(ShardDamage):
            decode_array(data, shape=(4,), dtype="float32")


def test_a_wrong_shape_of_the_right_size_is_found() -> None:
    data = encode_array(np.zeros((4, 6), np.float32))
    with pytest.raises(ShardDamage, match="header"):
        decode_array(data, shape=(6, 4), dtype="float32")


def test_facts_and_checksum_follow_the_content() -> None:
    one, other = np.zeros((2, 3), np.float16), np.ones((2, 3), np.float16)
    assert array_facts(one)["shape"] == [2, 3]
    assert array_facts(one) != array_facts(other)
    assert frame_checksum(encode_array(one)) != frame_checksum(encode_array(other))
    assert inspect_array(encode_array(one))[2] == f"{frame_checksum(encode_array(one)):08x}"
