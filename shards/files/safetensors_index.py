"""The JSON files beside published weights: bounded, and an index that names its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from shards.errors import UserError

CheckpointLayout = Literal["official", "diffusers"]
"""The two ways in which the weights of Wan2.2 are published."""
MAX_JSON_BYTES = 10_000_000


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of at most MAX_JSON_BYTES. Raises UserError naming the file."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{file}: larger than {MAX_JSON_BYTES:,} bytes")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "not valid JSON: " if isinstance(error, ValueError) else ""
        raise UserError(
            f"{file}: cannot be loaded: {why}{error}",
            expected="the file as published",
            fix="`wanprep fetch-model` fetches it again and checks its digest",
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: the top level is {type(values).__name__}", expected="an object")
    return values


def indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files that an index beside them names, and each tensor's file name.

    A path in the index is cut to its name: nothing outside the folder is read. Raises UserError naming missing files.
    """
    indexed = read_object(index).get("weight_map")
    if not isinstance(indexed, dict):
        raise UserError(f"{index}: has no weight_map")
    files = [index.parent / Path(str(name)).name for name in sorted(set(indexed.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{index.parent}: {len(missing)} of {len(files)} files are missing ({', '.join(missing)})",
            expected=f"the files that {index.name} names",
            fix="`wanprep fetch-model` resumes the download",
        )
    return files, indexed
