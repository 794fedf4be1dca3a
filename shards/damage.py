"""The errors of a dataset that is not what it was: each names the file, the member and the byte offset."""

from __future__ import annotations

from shards.errors import UserError

MEND = (
    "copy the file again from where it is whole, or delete the unit's commit and build it again with "
    "`wanprep build-shards`; `wanshards verify` lists all damage"
)


class ShardDamage(UserError):
    """Bytes that are not what was written.

    Args:
        file: the object's name under the root, or its whole address.
        what: what is wrong with it.
        member: name of the tar member, if the damage lies in one.
        offset: byte offset in the file at which it was seen.
        mend: what to do about it.
    """

    def __init__(
        self, file: str, what: str, *, member: str | None = None, offset: int | None = None, mend: str = MEND
    ) -> None:
        self.file, self.what, self.member, self.offset = file, what, member, offset
        place = f"{file}: member {member}" if member else file
        at = f" at offset {offset}" if offset is not None else ""
        super().__init__(f"{place}{at}: {what}", mend=mend)


class MissingObject(ShardDamage):
    """A file or an S3 object that is not there."""

    def __init__(self, file: str, what: str = "missing: no such file or object") -> None:
        super().__init__(file, what)


class FutureFormat(UserError):
    """A format version that this reader does not know."""

    def __init__(self, file: str, found: object, known: int) -> None:
        super().__init__(
            f"{file}: format version {found!r} is not one this reader knows",
            expected=f"format version {known}",
            mend="update wan-broadcast-lora to a version that reads it (docs/shard-format.md lists the versions)",
        )


class StorageFailure(UserError):
    """A storage that did not answer as it must, after all retries."""
