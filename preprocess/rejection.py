"""Why a clip did not become a sample: the stage, a reason code, a detail, and whether a retry can help.

Reason codes are kebab-case and stable: `wanprep retry --reason …` and people's notebooks name them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Stage = Literal["read", "sieve", "fetch", "probe", "window", "bucket", "decode", "caption", "encode"]
"""Where a record can end, in the order it passes them."""

STAGES: tuple[str, ...] = get_args(Stage)
INTERNAL_ERROR = "internal-error"
"""The work on a clip raised what it must not: a defect of this program, or of the machine."""
MAX_DETAIL_CHARACTERS = 400


class Rejection(NamedTuple):
    """Why one record or clip went no further."""

    stage: str
    """One of `STAGES`."""
    reason: str
    """Kebab-case code, such as `too-short`."""
    detail: str
    """The value that decided, for people; never a secret. See `short`."""
    retryable: bool = False
    """Whether trying again can help (a time-out), or not (a file that is not JSON)."""


class ClipRejected(Exception):
    """Ends the work on one clip; the unit's function turns it into a ledger row. A bug is never this."""

    def __init__(self, rejection: Rejection, attempts: int = 0) -> None:
        self.rejection = rejection
        self.attempts = attempts
        """Attempts at a download that was given up; 0 at another stage."""
        self.facts: dict[str, Any] | None = None
        """What was read from the file before it was rejected."""
        super().__init__(f"{rejection.stage}: {rejection.reason}: {rejection.detail}")

    def __reduce__(self) -> tuple[type[ClipRejected], tuple[Rejection, int]]:
        # The default rebuilds from the message, which is not what the constructor takes.
        return (ClipRejected, (self.rejection, self.attempts))


def short(value: object, limit: int = MAX_DETAIL_CHARACTERS) -> str:
    """A foreign value made fit for a ledger row: printable, encodable, bounded, and marked where it was cut."""
    text = value if isinstance(value, str) else repr(value)
    cut = text[: limit + 1].encode("utf-8", "backslashreplace").decode()
    clean = "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in cut)
    return clean if len(text) <= limit else clean[:limit] + "…"
