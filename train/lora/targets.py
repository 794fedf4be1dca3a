"""Which linears a LoRA adapts, and which weights train without one, by name.

Importing it imports no torch, so that a plan can use it too.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Sequence

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


def match_weights(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Weights of a model that the patterns of `train` select, in order: as `match_targets` with the names of weights,
    and `blocks.20-29` for ten blocks.

    Raises: UserError naming each pattern that selects nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names for one in _numbers_of(pattern) if _is_selected(name, one)}
        if not matched:
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            near = difflib.get_close_matches(pattern, sorted(parts), n=1, cutoff=0.5)
            raise UserError(
                f"train: {pattern!r} matches no weight of the model" + (f"; did you mean {near[0]!r}?" if near else ""),
                expected="a part of a name, such as head or self_attn, or blocks.20-29, or blocks.*.ffn.*",
            )
        chosen |= matched
    return [name for name in names if name in chosen]


def _numbers_of(pattern: str) -> list[str]:
    """`blocks.2-4.ffn` as `blocks.2.ffn`, `blocks.3.ffn`, `blocks.4.ffn`; any other pattern as it is."""
    found = re.search(r"(?<=\.)(\d+)-(\d+)(?=\.|$)", pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [f"{pattern[: found.start()]}{number}{pattern[found.end() :]}" for number in numbers]


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
