"""USTAR written so that bytes are reproducible, and read so strictly that only such tars are accepted.

Every member is a regular file of mode 644, owner 0, time 0, no names of users, a name of at most 100 bytes, no
prefix. A header is therefore a function of name and size, which the strict reader makes again and compares. A shard
ends with two blocks of zeros, and nothing follows them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from shards.errors import ShardDamage

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_NAME_BYTES = 100
MAX_MEMBER_BYTES = 8**11 - 1
MAX_MEMBERS = 2**20
ReadAt = Callable[[int, int], bytes]
"""Reads (offset, length) of a file; fewer bytes only at its end."""


class Member(NamedTuple):
    """A member of a tar: its name, the offset of its payload (its header is the block before), its payload's size."""

    name: str
    offset: int
    size: int


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte header of a member. Raises ValueError on a name or size that USTAR cannot hold."""
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= MAX_NAME_BYTES or not 0 <= size <= MAX_MEMBER_BYTES:
        raise ValueError(f"tar member {name!r} of {size} bytes: the name or the size does not fit USTAR")
    block = b"".join(
        (
            encoded.ljust(100, b"\0"),
            b"%07o\x00%07o\x00%07o\x00" % (0o644, 0, 0),
            b"%011o\x00" % size,
            b"%011o\x00" % 0,
            b"        ",  # the checksum counts as spaces
            b"0".ljust(101, b"\0"),
            (b"ustar\x00" + b"00").ljust(72, b"\0"),
            b"%07o\x00%07o\x00" % (0, 0),
        )
    ).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def parse_header(block: bytes, file: str, offset: int) -> tuple[str, int]:
    """Name and size of a member from its header. Raises ShardDamage on any byte that `tar_header` would not write."""
    name_bytes = block[:100].rstrip(b"\0")
    try:
        name, size = name_bytes.decode("ascii"), int(block[124:135], 8)
        if len(block) == BLOCK and block == tar_header(name, size):
            return name, size
    except ValueError:
        pass
    shown = name_bytes[:100].decode("ascii", "backslashreplace")
    raise ShardDamage(file, "not a member's header as the format writes it", member=shown or None, offset=offset)


def padding(size: int) -> int:
    """Zero bytes that follow a payload of `size` bytes."""
    return -size % BLOCK


def scan_tar(read_at: ReadAt, file: str, size: int) -> Iterator[Member]:
    """Walk all members of a tar of `size` bytes by its headers, checking headers, padding and end.

    Raises ShardDamage, with the offset, at the first byte that is not as the format writes it.
    """
    offset = 0
    for _ in range(MAX_MEMBERS):
        block = read_at(offset, BLOCK)
        if len(block) < BLOCK:
            raise ShardDamage(file, f"truncated: it ends at byte {size} without an end of archive", offset=offset)
        if not any(block):
            _check_end(read_at, file, offset, size)
            return
        name, length = parse_header(block, file, offset)
        member = Member(name, offset + BLOCK, length)
        offset = member.offset + length + padding(length)
        if offset > size:
            what = f"truncated: the member ends at byte {offset}, the file at {size}"
            raise ShardDamage(file, what, member=name, offset=size)
        if any(read_at(member.offset + length, padding(length))):
            what = "the padding after its payload is not zero"
            raise ShardDamage(file, what, member=name, offset=member.offset + length)
        yield member
    raise ShardDamage(file, f"more than {MAX_MEMBERS:,} members", offset=offset)


def _check_end(read_at: ReadAt, file: str, offset: int, size: int) -> None:
    if size != offset + len(END):
        raise ShardDamage(file, f"its archive ends at byte {offset + len(END)}, the file at {size}", offset=offset)
    if read_at(offset, len(END)) != END:
        raise ShardDamage(file, "the end of archive is not zero", offset=offset)


class TarWriter:
    """Appends members to a binary file; records every member's place and digest, and the digest of the file."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._digest = hashlib.sha256()
        self.size = 0
        self.members: list[tuple[Member, str]] = []
        """Each member with the sha256, in hex, of its payload."""

    def add(self, name: str, data: bytes) -> Member:
        """Append one member and return its place."""
        member = Member(name, self.size + BLOCK, len(data))
        self._write(tar_header(name, len(data)))
        self._write(data)
        self._write(bytes(padding(len(data))))
        self.members.append((member, hashlib.sha256(data).hexdigest()))
        return member

    def finish(self) -> str:
        """Write the end of archive; return the sha256, in hex, of the file."""
        self._write(END)
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._digest.update(data)
        self.size += len(data)
