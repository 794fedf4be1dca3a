"""Which rows of a run's state a rank of a sharded model holds: of weights, averages, and the optimizer's state."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from shards.errors import UserError
from train.optim import SCALED_NUMBERS
from train.parallel.rows import Rows
from train.run.trainee import Trainee


class StateRows(NamedTuple):
    """A tensor of the state, as a rank writes it."""

    rows: Rows
    is_own: bool
    """Whether the tensor is sharded; else every rank has all of it, and the first writes it."""


def state_rows(trainee: Trainee, name: str, tensor: Tensor) -> StateRows:
    """Where a weight, or a tensor of its optimizer's state (`NAME.…`), belongs in the complete one.

    Raises UserError for a state that is neither of its weight's shape nor a number: other rows than ours made it too.
    """
    owner = _owner(trainee, name)
    if owner not in trainee.sharded or not tensor.ndim:
        return StateRows(Rows(tensor, tuple(tensor.shape)), is_own=False)
    shape, rows = trainee.span(owner)
    if tensor.shape == trainee.weights[owner].shape:
        return StateRows(Rows(tensor, shape, rows.start), is_own=True)
    row = math.prod(shape[1:])
    if "absmax" in name and tensor.numel() * SCALED_NUMBERS == (rows.stop - rows.start) * row:
        return StateRows(Rows(tensor, (shape[0] * row // SCALED_NUMBERS,), rows.start * row // SCALED_NUMBERS), True)
    raise UserError(
        f"optim.name: state {name} is {tuple(tensor.shape)}, of a weight of {shape} that is sharded by rows",
        expected="state of the weight's shape, or numbers",
        fix="parallel.shard=none, or another optimizer",
    )


def state_span(trainee: Trainee, name: str, shape: tuple[int, ...]) -> slice | None:
    """The rows of a tensor of the state, whose complete shape is given, that this rank takes; None for one that it has
    no use for: of a weight of which it holds nothing."""
    owner = _owner(trainee, name)
    if owner not in trainee.sharded:
        return slice(None)
    whole, rows = trainee.span(owner)
    if shape == whole and (name == owner or rows.start < rows.stop):
        return rows
    if rows.start == rows.stop:
        return None
    row = math.prod(whole[1:])
    if "absmax" in name and shape == (whole[0] * row // SCALED_NUMBERS,) and row % SCALED_NUMBERS == 0:
        return slice(rows.start * row // SCALED_NUMBERS, rows.stop * row // SCALED_NUMBERS)
    if shape and name != owner:
        raise UserError(
            f"the checkpoint's {name} is {shape}, and its weight of {whole} is sharded by rows here",
            fix="resume with parallel.shard=none",
        )
    return slice(None)


def _owner(trainee: Trainee, name: str) -> str:
    while name and name not in trainee.weights:
        name = name.rpartition(".")[0]
    return name
