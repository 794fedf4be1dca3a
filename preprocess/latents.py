"""The first pass: units of candidates to sealed shards of latents, decoders ahead, one encoder, resumable by unit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from preprocess.build import Prepared, Preparer, encode_clip, latent_identity
from preprocess.config import PrepConfig
from preprocess.engine import in_order
from preprocess.fetch import Fetcher
from preprocess.ffmpeg import ffmpeg_version, runs_that_end
from preprocess.info import grow_info
from preprocess.plan import Candidate, Plan
from shards.canonical import canonical_json
from shards.commit import committed_units
from shards.console import LOG
from shards.dataset_info import DatasetInfo
from shards.identity import refuse_mismatch
from shards.layout import LATENTS
from shards.ledger import LedgerRow
from shards.storage import Storage
from shards.writer import ShardWriter

if TYPE_CHECKING:
    from preprocess.encoders import VaeEncoder

OnRow = Callable[[LedgerRow], None]
OnUnit = Callable[[int], None]


class Pending(NamedTuple):
    """What a pass has to do."""

    units: tuple[int, ...]
    num_candidates: int


def pending_units(storage: Storage, plan: Plan, kind: str) -> Pending:
    """Units of the plan that `kind` has no commit for, in order."""
    there = committed_units(storage, kind)
    units = tuple(unit for unit in range(plan.num_units) if unit not in there)
    return Pending(units, sum(len(plan.unit(unit)) for unit in units))


def build_latents(
    storage: Storage,
    plan: Plan,
    units: Sequence[int],
    config: PrepConfig,
    scratch: Path,
    *,
    on_row: OnRow,
    on_unit: OnUnit,
) -> None:
    """Encode `units` of the plan into `storage`. Raises UserError; a bad clip is a ledger row.

    Left by an exception (Ctrl-C among them) it drops the open unit; what is committed stays.
    """
    from preprocess.encoders import cpu_threads, load_tokenizer, load_vae_encoder

    tokenizer = load_tokenizer(config.encoders)
    vae = load_vae_encoder(config.encoders)
    identity = latent_identity(config, vae)
    grow_info(storage, plan, identity=identity, config=config, note=vae.note)
    if vae.note:
        LOG.warning("encoders: %s: the latents are for demonstration only", vae.note)
    provenance = library_versions()
    stop = threading.Event()
    with (
        runs_that_end() as end_runs,
        Fetcher(config.fetch, config.corpus, scratch, stop, config.engine.decoders) as fetcher,
    ):
        preparer = Preparer(config, fetcher, tokenizer.count)
        results = in_order(
            _candidates(plan, units),
            preparer.prepare,
            num_workers=config.engine.decoders,
            max_bytes=config.engine.max_queue_mib << 20,
            stop=stop,
            on_stop=end_runs,
        )
        with closing(results), cpu_threads(config.engine.decoders):
            for unit in units:
                with ShardWriter(storage, LATENTS, unit, identity, scratch, provenance) as writer:
                    num_candidates = len(plan.unit(unit))
                    rows = list(_encode_unit(results, num_candidates, vae, writer, config, on_row))
                    writer.seal(rows)
                on_unit(unit)


def check_settled_identity(info: DatasetInfo, config: PrepConfig, where: str) -> None:
    """Refuse a config that would give other numbers than the finished latents, without loading the encoders.

    The weights' digest is taken from the dataset: with nothing left to encode, no other weights can get in.
    """
    from preprocess.decode import transform_identity

    ours: dict[str, Any] = {
        **info.identity,
        "transform": transform_identity(config),
        "latent_dtype": config.shards.latent_dtype,
    }
    # A round trip through JSON, as what is stored went through one.
    refuse_mismatch(_plain(ours), info.identity, where)


def library_versions() -> dict[str, str]:
    """Versions that are recorded with each shard; a difference warns and refuses nothing."""
    import platform

    import diffusers
    import numpy
    import torch
    import transformers

    versions = {
        "ffmpeg": ffmpeg_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return versions


def _candidates(plan: Plan, units: Sequence[int]) -> Iterator[Candidate]:
    for unit in units:
        yield from plan.unit(unit)


def _encode_unit(
    results: Iterator[Prepared],
    num_candidates: int,
    vae: VaeEncoder,
    writer: ShardWriter,
    config: PrepConfig,
    on_row: OnRow,
) -> Iterator[LedgerRow]:
    for _ in range(num_candidates):
        row = encode_clip(next(results), vae, writer, config)
        on_row(row)
        yield row


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    import json

    plain: dict[str, Any] = json.loads(canonical_json(value))
    return plain
