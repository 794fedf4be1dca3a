"""The error type for users, `UserError`, and its subclasses."""

from __future__ import annotations

import errno

EXIT_USER, EXIT_TEMPORARY = 2, 75
"""Exit codes: something to fix first; and (EX_TEMPFAIL) something that passes, for schedulers that run it again."""


class UserError(Exception):
    """Something the user can fix: a value, a file, a machine that lacks something.

    The command line prints it without a traceback and exits with `exit_code`.

    Args:
        problem: what is wrong, naming the value (and the dotted key or the file it came from).
        expected: what would have been right.
        fix: what to do about it, as a command or an action.
    """

    exit_code = EXIT_USER

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


class WorkLeftUndone(UserError):
    """Internal errors left some of the work undone; their tracebacks are in the log. Exit code 1, as of any defect."""

    exit_code = 1


def _rebuild(cls: type[UserError], problem: str, expected: str | None, fix: str | None, state: dict) -> UserError:
    error = cls.__new__(cls)
    UserError.__init__(error, problem, expected=expected, fix=fix)
    error.__dict__.update(state)
    return error


DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_PASSING = {*DISK_FULL, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN}


class SystemFailure(UserError):
    """An OSError as one line: the path and the cause. A full or absent disk is temporary (`exit_code` 75)."""

    def __init__(self, error: OSError) -> None:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in _PASSING:
            self.exit_code = EXIT_TEMPORARY
        super().__init__(f"{where}{error.strerror or error}")


# Errors of a damaged dataset: each names the file, the member and the byte offset.

FIX = (
    "copy the file again from an intact copy, or delete the unit's commit and build it again with "
    "`wanprep build-shards`; `wanshards verify` lists all damage"
)


class ShardDamage(UserError):
    """Bytes that are not what was written.

    Args:
        file: the object's name under the root, or its full address.
        what: what is wrong with it.
        member: name of the tar member, if the damage is in one.
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
    """A storage that refuses: no permission, no bucket, an endpoint or a profile that cannot be used."""


class StorageOutage(UserError):
    """A storage that did not answer for as long as it was waited for. The same command can succeed later."""

    exit_code = EXIT_TEMPORARY

    def __init__(self, what: str, reason: str, seconds: float) -> None:
        super().__init__(
            f"{what}: failed for {seconds:.0f} s: {reason}",
            fix="run the same command again when the storage answers: it continues; "
            "storage.patience_minutes sets how long it is waited for",
        )
