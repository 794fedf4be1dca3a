"""Which linears a LoRA adapts, by name. Importing it imports no torch, so that a plan can use it too."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection

from shards.errors import UserError

_GROUPS = ("self_attn", "cross_attn", "ffn")
BLOCK_LINEARS = (*(f"{kind}.{letter}" for kind in _GROUPS[:2] for letter in "qkvo"), "ffn.0", "ffn.2")
# Names of diffusers' WanTransformer3DModel, which its users write into `target_modules`.
_THEIRS = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def match_targets(names: list[str], targets: tuple[str, ...]) -> set[str]:
    """Module names that the targets select: by dotted parts (`self_attn`, `q`, `ffn.0`; also as diffusers calls them:
    `attn1`, `to_q`, `net.0.proj`) or by a pattern of the complete name.

    Raises: UserError naming each target that selects nothing, with the nearest that would.
    """
    chosen: set[str] = set()
    for target in targets:
        matched = {name for name in names if _is_selected(name, target)}
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


def describe_targets(names: Collection[str], chosen: Collection[str]) -> list[str]:
    """`lora.targets` that select `chosen` of the linears `names`: groups where possible, linears, full names."""
    left, found = set(chosen), []
    for target in (*_GROUPS, *BLOCK_LINEARS, *sorted(chosen)):
        matched = {name for name in names if _is_selected(name, target)}
        if matched and matched <= left:
            found.append(target)
            left -= matched
    return found


def _is_selected(name: str, target: str) -> bool:
    if fnmatch.fnmatchcase(name, target):
        return True
    theirs = ".".join(_THEIRS.get(part, part) for part in name.split("."))
    theirs = theirs.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
    return any(f".{target}." in f".{one}." for one in (name, theirs))
