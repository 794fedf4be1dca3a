"""Who does which unit: handed out one at a time to whoever asks, and again when a worker is lost with it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence

from shards.errors import UserError

MAX_LOSSES = 3


class WorkQueue:
    """Units that wait, are out with a worker, or are done. Not for several threads at once.

    Any hashable name may identify a worker. What has a commit is done: this queue may be lost with its process.
    """

    def __init__(self, units: Iterable[int]) -> None:
        """`units`: a sequence, or an iterator that is asked for a unit when a worker is."""
        self._waiting = deque(units if isinstance(units, Sequence) else ())
        self._more = iter(() if isinstance(units, Sequence) else units)
        self._out: defaultdict[object, list[int]] = defaultdict(list)
        self._losses: Counter[int] = Counter()

    def next(self, worker: object) -> int | None:
        """The unit that `worker` should begin; None: there is none for it now."""
        unit = self._waiting.popleft() if self._waiting else next(self._more, None)
        if unit is None:
            return None
        self._out[worker].append(unit)
        return unit

    def add(self, units: Iterable[int]) -> None:
        """Further units, for whoever asks next."""
        self._waiting.extend(units)

    def done(self, worker: object, unit: int) -> None:
        """`worker` has committed `unit`."""
        self._out[worker].remove(unit)

    def lost(self, worker: object) -> list[int]:
        """`worker` is lost: the units that it had come first again; which they are.

        Raises UserError for a unit whose worker was lost three times: it may well be the unit that kills it.
        """
        units = self._out.pop(worker, [])
        for unit in units[:1]:  # the one it worked on; those that were decoded ahead are not the cause
            self._losses[unit] += 1
            if self._losses[unit] >= MAX_LOSSES:
                raise UserError(
                    f"unit {unit}: {MAX_LOSSES} workers were lost while they worked on it",
                    fix="see whether memory ran out there (dmesg); a smaller engine.max_queue_mib or fewer "
                    "engine.decoders take less",
                )
        self._waiting.extendleft(reversed(units))
        return units

    @property
    def num_waiting(self) -> int:
        """Units that nobody has."""
        return len(self._waiting)

    @property
    def num_out(self) -> int:
        """Units that somebody has."""
        return sum(len(units) for units in self._out.values())
