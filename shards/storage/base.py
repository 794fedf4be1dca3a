"""What every storage offers: named objects under a root, complete or not there at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

MAX_OBJECT_BYTES = 2**30
"""Most bytes that `get` takes into memory unless told otherwise."""


class Entry(NamedTuple):
    """One object of a listing: its name under the root and its size in bytes."""

    name: str
    size: int


class Storage(Protocol):
    """A root that holds named objects. Implementations can be pickled, forked, and used by several threads."""

    def put(self, name: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """Write an object completely or not at all. A Path is hard-linked where possible: do not write to it later.

        With `if_absent`, False says that another object of this name was there and is kept (S3 servers that
        ignore `If-None-Match` overwrite it and say True).
        """
        ...

    def get(self, name: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
        """All bytes of an object. Raises MissingObject, or ShardDamage when it has more than `max_bytes`."""
        ...

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Bytes from `offset`; fewer than `length` only at the object's end. Raises MissingObject."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; the number of bytes read, fewer only at the object's end."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose name starts with `prefix`, sorted by name."""
        ...

    def exists(self, name: str) -> bool:
        """Whether an object is there."""
        ...

    def size(self, name: str) -> int:
        """Its size in bytes. Raises MissingObject."""
        ...

    def modified(self, name: str) -> float:
        """When it was last written, in seconds since 1970. Raises MissingObject."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...

    def url(self, name: str = "") -> str:
        """The object's address, for people."""
        ...

    def address(self) -> str:
        """What tells this root from any other: its URL, with the server where it names one."""
        ...
