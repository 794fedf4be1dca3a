"""Which linears a LoRA adapts, by name. Importing it imports no torch, so that a plan can use it too."""

from __future__ import annotations

import difflib
import fnmatch

from shards.errors import UserError


def match_targets(names: list[str], targets: tuple[str, ...]) -> set[str]:
    """Module names that the targets select: by a dotted part (`self_attn`, `q`) or a pattern of the complete name.

    Raises: UserError naming each target that selects nothing, with the nearest that would.
    """
    chosen: set[str] = set()
    for target in targets:
        matched = {name for name in names if fnmatch.fnmatchcase(name, target) or target in name.split(".")}
        if not matched:
            parts = {part for name in names for part in name.split(".")[2:] if not part.isdigit()}
            near = difflib.get_close_matches(target, sorted(parts) + names, n=1, cutoff=0.5)
            raise UserError(
                f"lora.targets: {target!r} matches no linear of the blocks"
                + (f"; did you mean {near[0]!r}?" if near else ""),
                expected=f"one of {', '.join(sorted(parts))}, or a pattern such as blocks.*.self_attn.q",
            )
        chosen |= matched
    return chosen
