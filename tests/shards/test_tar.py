"""The tar: bytes that repeat, that other readers agree on, and of which no other form is read."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ShardDamage
from shards.format.tar import BLOCK, Member, TarWriter, parse_header, scan_tar, tar_header

MEMBERS = st.dictionaries(
    st.text(alphabet="abcxyz019_@~-./", min_size=1, max_size=100), st.binary(max_size=1500), max_size=8
)


def write(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    writer = TarWriter(out)
    for name, data in members.items():
        writer.add(name, data)
    writer.finish()
    return out.getvalue()


def scan(data: bytes) -> list[Member]:
    return list(scan_tar(lambda offset, length: data[offset : offset + length], "x.tar", len(data)))


@given(MEMBERS)
def test_python_and_the_strict_reader_see_what_was_written(members: dict[str, bytes]) -> None:
    data = write(members)
    found = {member.name: data[member.offset : member.offset + member.size] for member in scan(data)}
    assert found == members
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        infos = archive.getmembers()
        assert {info.name: archive.extractfile(info).read() for info in infos} == {  # type: ignore[union-attr]
            name.rstrip("/") if name.strip("/") else name: content for name, content in members.items()
        } or any(name.endswith("/") for name in members)
        assert all((info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644) for info in infos)


@given(st.text(alphabet="ab.@-/", min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_headers_are_pythons_ustar_headers(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    block = info.tobuf(tarfile.USTAR_FORMAT)
    ours = tar_header(name, size)
    # Python writes an empty device as zeros or as nothing, by its version: our form is fixed.
    assert ours[:148] == block[:148] and ours[156:329] == block[156:329]
    assert parse_header(ours, "x.tar", 0) == (name, size)


@pytest.mark.parametrize(("name", "size"), [("", 1), ("a" * 101, 1), ("a", 8**11), ("a", -1)])
def test_what_ustar_cannot_hold_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="tar member"):
        tar_header(name, size)


TAR = write({"a.json": b"{}", "a.latent.npy.zst": bytes(range(256)) * 5, "b": b""})


def test_every_cut_is_found() -> None:
    for length in range(len(TAR)):
        with pytest.raises(ShardDamage):
            scan(TAR[:length])


def test_every_bit_of_headers_padding_and_end_is_checked() -> None:
    payloads = {place for member in scan(TAR) for place in range(member.offset, member.offset + member.size)}
    for place in set(range(len(TAR))) - payloads:
        for bit in range(8):
            bad = bytearray(TAR)
            bad[place] ^= 1 << bit
            with pytest.raises(ShardDamage) as damage:
                scan(bytes(bad))
            assert damage.value.offset is not None and damage.value.offset <= place


@given(st.binary(max_size=3 * BLOCK))
@settings(max_examples=200)
def test_any_bytes_after_the_end_are_found(more: bytes) -> None:
    if more:
        with pytest.raises(ShardDamage):
            scan(TAR + more)


@given(st.binary(max_size=4 * BLOCK))
@settings(max_examples=300)
def test_any_bytes_give_a_typed_error(data: bytes) -> None:
    try:
        scan(data)
    except ShardDamage:
        return
    assert data == bytes(2 * BLOCK)
