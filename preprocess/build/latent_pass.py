"""The first pass: units of candidates to sealed shards of latents, by the engine that the config names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.build.dataset_info import grow_info, planned_lengths
from preprocess.build.progress import PassProgress
from preprocess.build.worker import ClipDone, Description, UnitWorker
from preprocess.config import PrepConfig
from preprocess.encoders.encoders import devices_of
from preprocess.plan.plan import Plan
from shards.console import LOG
from shards.errors import UserError
from shards.format.commit import committed_units
from shards.format.dataset_info import DatasetInfo
from shards.format.identity import refuse_mismatch
from shards.format.sealed_json import canonical_json
from shards.machine import usable_cores
from shards.storage.base import Storage


class Pending(NamedTuple):
    """What a pass has to do."""

    units: tuple[int, ...]
    num_candidates: int


def pending_units(storage: Storage, plan: Plan, kind: str, chosen: Collection[int] | None = None) -> Pending:
    """Units of the plan (those of `chosen`, if given) that `kind` has no commit for, in order."""
    there = committed_units(storage, kind)
    units = tuple(unit for unit in chosen_units(plan, chosen) if unit not in there)
    return Pending(units, sum(plan.unit_length(unit) for unit in units))


def chosen_units(plan: Plan, chosen: Collection[int] | None) -> Sequence[int]:
    """The units of the plan, or those of them in `chosen`. Raises UserError where none is."""
    if chosen is None:
        return range(plan.num_units)
    units = [unit for unit in sorted(chosen) if unit < plan.num_units]
    if not units:
        shown = f"{min(chosen)}:{max(chosen) + 1}" if chosen else "none"
        raise UserError(
            f"--unit-range {shown}: no unit of the plan is in it",
            expected=f"A:B with A < B and A < {plan.num_units}, the plan's number of units",
        )
    return units


def build_latents(
    storage: Storage,
    plan: Plan,
    units: Iterable[int],
    config: PrepConfig,
    scratch: Path,
    *,
    progress: PassProgress,
) -> None:
    """Encode `units` of the plan into `storage`. Raises UserError; a bad clip is a ledger row.

    Left by an exception (Ctrl-C among them) it drops the open units; what is committed stays.
    """
    settled: list[Description] = []

    def on_row(clip: ClipDone) -> None:
        progress.row(clip.row, clip.pool_seconds)

    def on_description(about: Description) -> None:
        _settle(storage, plan, config, about, settled)
        progress.worker()

    if config.engine.kind == "ray":
        from preprocess.build.ray_engine import run_ray

        run_ray(storage, config, units, on_description=on_description, on_row=on_row, on_unit=progress.unit)
        return
    devices = devices_of(config)
    config = settle_decoders(config, devices)
    if len(devices) > 1:
        from preprocess.build.processes import run_processes

        run_processes(
            config, devices, units, scratch, UnitWorker,
            on_description=on_description, on_row=on_row, on_unit=progress.unit,
        )  # fmt: skip
        return
    worker = UnitWorker(config, scratch, device=devices[0])
    for commit in worker.commits(units, on_row, on_description):
        progress.unit(commit.unit)


def settle_decoders(config: PrepConfig, devices: Sequence[str]) -> PrepConfig:
    """The config with `engine.decoders: auto` replaced by the share of this machine's cores, which is reported."""
    if config.engine.decoders != "auto":
        return config
    cores = usable_cores()
    number = config.engine.num_decoders(cores, len(devices), on_cpu=not devices[0].startswith("cuda"))
    each = f" for each of {len(devices)} encoders" if len(devices) > 1 else ""
    LOG.info("engine.decoders: auto is %d%s, on %d cores", number, each, cores)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"decoders": number})})


def _settle(storage: Storage, plan: Plan, config: PrepConfig, about: Description, settled: list[Description]) -> None:
    """Write the identity that the first worker gives; hold the others to it, and say where their versions differ."""
    if not settled:
        grow_info(storage, plan, identity=about.identity, config=config, note=about.note)
        if about.note:
            LOG.warning("encoders: %s: the latents are for demonstration only", about.note)
        settled.append(about)
        return
    first = settled[0]
    refuse_mismatch(about.identity, first.identity, "another worker of this build")
    for name, version in first.provenance.items():
        if about.provenance.get(name) != version:
            LOG.warning("workers differ in %s: %s and %s", name, version, about.provenance.get(name))


def check_settled_identity(info: DatasetInfo, config: PrepConfig, where: str, plan: Plan | None = None) -> None:
    """Refuse a config that would give other numbers than the finished latents, without loading the encoders.

    The weights' digest is taken from the dataset: with nothing left to encode, no other weights can get in.
    """
    from preprocess.video.decode import TRANSFORM_VERSION, transform_identity

    there = info.identity.get("transform", {})
    if there.get("version") != TRANSFORM_VERSION:
        # Only the version is named: which keys the transform's identity holds has changed with it.
        newer = {**info.identity, "transform": {**there, "version": TRANSFORM_VERSION}}
        fix = (
            "build into another output; what is there can be read, trained and recaptioned, and the release that made "
            "it can finish it"
        )
        refuse_mismatch(newer, info.identity, where, fix)
    frames = {bucket.frames for bucket in info.buckets}
    if plan and all(generation.choices for generation in plan.generations):
        frames |= planned_lengths(plan, config).keys()
    if frames and not frames.issuperset(config.window.lengths):
        wanted, there = ({"window": {"num_frames": _alone(each)}} for each in (config.window.lengths, sorted(frames)))
        refuse_mismatch(wanted, there, where)
    ours: dict[str, Any] = {
        **info.identity,
        "transform": transform_identity(config),
        "latent_dtype": config.shards.latent_dtype,
    }
    # A round trip through JSON, as what is stored went through one.
    refuse_mismatch(_plain(ours), info.identity, where)


def _alone(lengths: Sequence[int]) -> int | list[int]:
    return lengths[0] if len(lengths) == 1 else list(lengths)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    import json

    plain: dict[str, Any] = json.loads(canonical_json(value))
    return plain
