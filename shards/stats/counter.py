"""Counts under names and labels, with a few examples of each: they add up over units and have a bounded size."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MAX_LABELS = 400
"""Labels kept under one name; what comes later is counted under `OTHERS`."""
MAX_EXAMPLES = 3
OTHERS = "(other)"
_MAX_LABEL_CHARACTERS = 160


class Histograms:
    """Counters by name and label. Adding units in one order gives one result, whatever was cached."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._examples: dict[str, dict[str, list[str]]] = {}

    def add(self, name: str, label: object, example: str | None = None, times: int = 1) -> None:
        """Count `label` under `name`; remember up to three distinct examples of it."""
        counts = self._counts.setdefault(name, Counter())
        key = str(label)[:_MAX_LABEL_CHARACTERS]
        if key not in counts and len(counts) >= MAX_LABELS:
            key = OTHERS
        counts[key] += times
        if example is not None:
            known = self._examples.setdefault(name, {}).setdefault(key, [])
            if len(known) < MAX_EXAMPLES and example not in known:
                known.append(example)

    def add_number(self, name: str, value: float, edges: Sequence[float]) -> None:
        """Count a number in the bin of `edges` it falls into; below the first and above the last, in those."""
        place = min(max(bisect.bisect_right(edges, value) - 1, 0), len(edges) - 2)
        self.add(name, place)

    def counts(self, name: str) -> dict[str, int]:
        """Labels under `name`, most frequent first."""
        found = self._counts.get(name, Counter())
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The same as rows with their examples."""
        examples = self._examples.get(name, {})
        rows = [{"label": label, "count": count} for label, count in self.counts(name).items()]
        return [{**row, "examples": examples.get(str(row["label"]), [])} for row in rows]

    def histogram(self, name: str, edges: Sequence[float]) -> dict[str, Any]:
        """Counts of `add_number` as edges and counts, bins that nothing fell into included."""
        counts = self._counts.get(name, Counter())
        return {"edges": list(edges), "counts": [counts[str(place)] for place in range(len(edges) - 1)]}

    def total(self, name: str) -> int:
        """Sum over all labels under `name`."""
        return sum(self._counts.get(name, Counter()).values())

    def rows_below(self, prefix: str) -> dict[str, list[dict[str, Any]]]:
        """The rows of every name that starts with `prefix`, by what follows it."""
        names = sorted(name for name in self._counts if name.startswith(prefix))
        return {name.removeprefix(prefix): self.rows(name) for name in names}

    def merge(self, other: Histograms) -> None:
        """Add another's counts and examples to these."""
        for name, counts in other._counts.items():
            for label, count in counts.items():
                self.add(name, label, times=count)
                for example in other._examples.get(name, {}).get(label, ()):
                    self.add(name, label, example, times=0)

    def plain(self) -> dict[str, Any]:
        """As plain JSON values; `Histograms.of` undoes it."""
        return {"counts": {name: dict(counts) for name, counts in self._counts.items()}, "examples": self._examples}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Histograms:
        """From what `plain` gave. Raises KeyError, TypeError or ValueError on anything else."""
        tally = cls()
        for name, counts in value["counts"].items():
            tally._counts[name] = Counter({str(label): int(count) for label, count in counts.items()})
        for name, labels in value["examples"].items():
            tally._examples[name] = {label: [str(one) for one in examples] for label, examples in labels.items()}
        return tally
