"""Files that the two stages exchange beside the shards: embeddings of prompts, and latents.

    prompts.safetensors     text.0, text.1 … empty, negative: tokens × dim, bfloat16's bits as uint16, no padding
    NAME.safetensors        latent: C×T×H×W float32, normalised; its header says how it came to be

`wanprep embed` writes prompts, `wantrain sample` reads them and writes latents, `wanprep decode` reads those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.errors import UserError
from shards.files.write_file import named_errors, write_file
from shards.format.sealed_json import canonical_json

PROMPTS_KIND = "wan-prompts-1"
LATENT_KIND = "wan-latent-1"
HEADER_KEY = "wan"
SAMPLES_FOLDER = "samples"
"""Of a run: `samples/step-0000500/NAME.safetensors`, which `wanprep decode` makes videos of."""
MAX_BYTES = 2**31
_LATENT_FROM = "a latent written by `wantrain sample` or `wanprep encode-image`"


class Prompts(NamedTuple):
    """Prompts with their embeddings, and the two null embeddings that guidance takes."""

    texts: tuple[str, ...]
    embeddings: tuple[np.ndarray, ...]
    empty: np.ndarray
    negative: np.ndarray
    encoder: str
    """sha256 of the text encoder's weights."""

    def null_text(self, which: str) -> np.ndarray:
        """The embedding of the 'empty' text or of the 'negative' prompt, tokens × dim uint16."""
        return self.empty if which == "empty" else self.negative


class Latent(NamedTuple):
    """A normalised latent and what its header says."""

    values: np.ndarray
    """C×T×H×W float32."""
    facts: dict[str, str]


def write_prompts(path: Path, prompts: Prompts) -> None:
    """Write a prompts file, atomically."""
    tensors = {f"text.{place}": array for place, array in enumerate(prompts.embeddings)}
    tensors |= {"empty": prompts.empty, "negative": prompts.negative}
    facts = {"texts": json.dumps(list(prompts.texts), ensure_ascii=False), "encoder": prompts.encoder}
    _write(path, tensors, {"kind": PROMPTS_KIND, **facts})


def read_prompts(path: str | Path) -> Prompts:
    """Read a prompts file. Raises UserError naming the file and what is wrong with it."""
    tensors, facts = _read(Path(path), PROMPTS_KIND, "a file written by `wanprep embed`")
    try:
        texts = tuple(json.loads(facts["texts"]))
        embeddings = tuple(tensors.pop(f"text.{place}") for place in range(len(texts)))
        prompts = Prompts(texts, embeddings, tensors.pop("empty"), tensors.pop("negative"), facts["encoder"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: a prompts file without {error}", fix="write it again with `wanprep embed`") from None
    arrays = (*prompts.embeddings, prompts.empty, prompts.negative)
    if tensors or any(array.ndim != 2 or array.dtype != np.uint16 for array in arrays):
        raise UserError(f"{path}: not tokens × dim of uint16", fix="write it again with `wanprep embed`")
    return prompts


def write_latent(path: Path, values: np.ndarray, facts: Mapping[str, str]) -> None:
    """Write a C×T×H×W latent as float32, atomically; `facts` go into the header."""
    _write(path, {"latent": np.ascontiguousarray(values, dtype=np.float32)}, {"kind": LATENT_KIND, **facts})


def read_latent_file(path: str | Path) -> Latent:
    """Read a latent file. Raises UserError naming the file, for another kind of file, wrong axes, or NaN."""
    tensors, facts = _read(Path(path), LATENT_KIND, _LATENT_FROM)
    values = tensors.get("latent")
    if values is None or len(tensors) != 1 or values.ndim != 4 or values.dtype != np.float32:
        raise UserError(f"{path}: holds {sorted(tensors)}", expected="one tensor `latent`, C×T×H×W float32")
    if not np.isfinite(values).all():
        raise UserError(
            f"{path}: the latent is not finite", fix="sample again; `wantrain lora info` shows broken modules"
        )
    return Latent(values, facts)


def read_latent_facts(path: str | Path) -> dict[str, str]:
    """What a latent file's header says, without its numbers. Raises UserError naming the file."""
    return _read(Path(path), LATENT_KIND, _LATENT_FROM, False)[1]


def _write(path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    from safetensors.numpy import save

    with named_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    # One entry, because safetensors writes several in an order that changes from run to run.
    header = {HEADER_KEY: canonical_json(dict(facts)).decode()}
    write_file(path, [save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, header)])


def _read(
    path: Path, kind: str, expected: str, with_tensors: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes", expected=expected)
        with safe_open(path, framework="np") as file:
            facts = dict(json.loads((file.metadata() or {}).get(HEADER_KEY, "{}")))
            if facts.get("kind") != kind:
                raise UserError(f"{path}: its kind is {facts.get('kind')!r}", expected=expected)
            return {name: file.get_tensor(name) for name in file.keys() if with_tensors}, facts  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}", expected=expected) from None
