"""One finding of the doctor."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One row of the table."""

    subject: str
    status: Literal["ok", "note", "problem"]
    """A note is not an error: what it speaks of is not needed, or cannot be known here."""
    found: str
    fix: str = ""
