"""The one error type that users see."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a value, a file, a machine that lacks something.

    The command line prints it without a traceback and exits with 2.

    Args:
        problem: what is wrong, naming the value (and the dotted key or the file it came from).
        expected: what would have been right.
        mend: what to do about it, as a command or an action.
    """

    def __init__(self, problem: str, *, expected: str | None = None, mend: str | None = None) -> None:
        self.problem = problem
        self.expected = expected
        self.mend = mend
        super().__init__(problem)

    def __str__(self) -> str:
        lines = [self.problem]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.mend:
            lines.append(f"  to mend:  {self.mend}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # An exception with keyword arguments does not survive a process boundary by default.
        return (_rebuild, (type(self), self.problem, self.expected, self.mend, self.__dict__))


def _rebuild(cls: type[UserError], problem: str, expected: str | None, mend: str | None, state: dict) -> UserError:
    error = cls.__new__(cls)
    UserError.__init__(error, problem, expected=expected, mend=mend)
    error.__dict__.update(state)
    return error
