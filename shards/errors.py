"""The one error type that users see."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can fix: a value, a file, a machine that lacks something.

    The command line prints it without a traceback and exits with `exit_code`.

    Args:
        problem: what is wrong, naming the value (and the dotted key or the file it came from).
        expected: what would have been right.
        fix: what to do about it, as a command or an action.
    """

    exit_code = 2

    def __init__(self, problem: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.problem = problem
        self.expected = expected
        self.fix = fix
        super().__init__(problem)

    def __str__(self) -> str:
        lines = [self.problem]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  to fix:  {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # An exception with keyword arguments does not survive a process boundary by default.
        return (_rebuild, (type(self), self.problem, self.expected, self.fix, self.__dict__))


class TemporaryFailure(UserError):
    """The environment failed for long; the same command resumes later. Schedulers retry exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


def _rebuild(cls: type[UserError], problem: str, expected: str | None, fix: str | None, state: dict) -> UserError:
    error = cls.__new__(cls)
    UserError.__init__(error, problem, expected=expected, fix=fix)
    error.__dict__.update(state)
    return error


# The errors of a dataset that is not what it was: each names the file, the member and the byte offset.


FIX = (
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
        fix: what to do about it.
    """

    def __init__(
        self, file: str, what: str, *, member: str | None = None, offset: int | None = None, fix: str = FIX
    ) -> None:
        self.file, self.what, self.member, self.offset = file, what, member, offset
        place = f"{file}: member {member}" if member else file
        at = f" at offset {offset}" if offset is not None else ""
        super().__init__(f"{place}{at}: {what}", fix=fix)


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
            fix="update wan-broadcast-lora to a version that reads it (docs/shard-format.md lists the versions)",
        )


class StorageFailure(UserError):
    """A storage that did not answer as it must, after all retries."""
