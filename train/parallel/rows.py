"""One safetensors file that several ranks write and read, each its own rows.

    rank 0 writes the header and makes the file as long as it will be → all write their rows where they belong

A row of a tensor is contiguous in the file, so the file is the one that a single process writes, to the byte: whatever
reads that reads this, and any number of ranks reads it again. All ranks must see one file system that keeps what
several machines write into one file at different places (a local disk, NFS, Lustre, GPFS; no object store).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from shards.errors import TemporaryFailure, UserError
from shards.files.write_file import named_errors
from train.checkpoint import OLDER, StoredTensor, file_digest, read_header, safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

    from train.parallel.ranks import Ranks

Result = TypeVar("Result")


class Rows(NamedTuple):
    """What a rank holds of a tensor."""

    tensor: Tensor
    """Its own rows; they may be none."""
    shape: tuple[int, ...]
    """Of the complete tensor."""
    start: int = 0
    """Index of the first of its rows."""


def together(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Do each rank's part of a work; where one fails, all raise. Every rank must call it, at the same place."""
    problem, result = None, None
    try:
        result = work()
    except UserError as error:
        problem = error
    told = ranks.gather(None if problem is None else [str(problem), problem.exit_code])
    if problem is not None:
        raise problem
    for rank, message in enumerate(told):
        if message is not None:
            kind = TemporaryFailure if message[1] == TemporaryFailure.exit_code else UserError
            raise kind(f"rank {rank}: {message[0]}")
    return result  # type: ignore[return-value]


def write_rows(path: Path, parts: Mapping[str, Rows], ranks: Ranks, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file that is not there yet; every rank calls it with its rows. Nothing is there by its name until all has
    been written, but the caller gives the name: a temporary one.

    Args:
        parts: rank 0 must have a part of every tensor, other ranks may lack those that they have no rows of. Of what
            several ranks hold the first writes it, and so of copies: ranks that hold a copy pass nothing.
    Raises UserError, on all ranks, when any could not write.
    """

    def begin() -> None:
        if not ranks.is_first:
            return
        specs = {name: StoredTensor(part.tensor.dtype, part.shape) for name, part in parts.items()}
        header, size = safetensors_header(specs, metadata or {})
        with named_errors(path), path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)

    def fill() -> None:
        import torch

        with named_errors(path), path.open("r+b") as file:
            places = read_header(path)
            for name, part in parts.items():
                row = math.prod(part.shape[1:]) * part.tensor.element_size()
                file.seek(places[name] + part.start * row)
                file.write(part.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    together(ranks, begin)
    together(ranks, fill)


def digest_files(paths: Iterable[Path], ranks: Ranks) -> dict[str, str]:
    """sha256 of files by name, divided among the ranks; every rank calls it."""
    own = list(paths)[ranks.layout.rank :: ranks.layout.world_size]
    found = together(ranks, lambda: {path.name: file_digest(path) for path in own})
    return {name: digest for part in ranks.gather(found) for name, digest in part.items()}


def read_rows(path: Path, spans: Callable[[str, tuple[int, ...]], slice | None]) -> dict[str, Tensor]:
    """Read a rank's rows of a file's tensors onto the CPU.

    Args:
        spans: from a tensor's name and shape to the rows wanted; `slice(None)` for all, None where it is passed over.
    Raises UserError naming the file.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with named_errors(path), safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                stored = opened.get_slice(name)
                shape = tuple(stored.get_shape())
                rows = spans(name, shape)
                if rows is None:
                    continue
                if shape and rows.start is not None and rows.start == rows.stop:
                    tensors[name] = torch.empty(0, *shape[1:])
                else:
                    tensors[name] = stored[rows] if shape else opened.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}", fix=OLDER) from None
    return tensors
