"""A plan for people and for programs. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from shards.gpus import GIB
from train.estimate.memory import BASES, Memory

if TYPE_CHECKING:
    from train.estimate.plan import Estimate, Setting


def as_json(plan: Estimate) -> dict[str, Any]:
    """The plan as JSON values."""

    def setting(value: Setting | None) -> dict[str, Any] | None:
        if value is None:
            return None
        memory = value.memory and value.memory._asdict() | {"total": value.memory.total}
        exchange = value.exchange._asdict() | {"share": value.exchange_share}
        parts = ("gemm", "attention", "attention_backward", "traffic")
        times = dict(zip(parts, value.work_seconds, strict=True))
        own = {"memory": memory, "mesh": value.mesh._asdict(), "exchange": exchange}
        own["transfer"] = value.transfer._asdict()
        return value._asdict() | own | {"work_seconds": times, "seconds": value.seconds}

    values = plan._asdict()
    values["gpu"] = plan.gpu._asdict()
    values["sizes"] = [{"size": str(size.bucket), "share": size.share} for size in plan.sizes]
    values["settings"] = [setting(value) for value in plan.settings]
    values["layouts"] = [setting(value) for value in plan.layouts]
    values["bases"] = [setting(value) for value in plan.bases]
    for name in ("chosen", "fastest", "fastest_exact", "fastest_base"):
        values[name] = setting(getattr(plan, name))
    return values


def describe_estimate(plan: Estimate, origin: str = "as given") -> list[str]:
    """The plan for people, a line an entry."""
    gpu = plan.gpu
    sizes = ", ".join(f"{size.bucket} ({size.share:.0%})" for size in plan.sizes)
    lines = [
        f"{plan.num_gpus} × {gpu.name}: {gpu.peak_tflops:g} TFLOP/s {gpu.precision} peak and {gpu.memory_gib:g} GiB "
        f"each; {plan.chosen.seconds_at_peak / sum(plan.chosen.work_seconds):.0%} of the peak expected (an estimate)",
        f"sizes, {origin}: {sizes}",
        "",
        f"{'checkpointing':<24}{'memory':>9}  {'fits':<4}{'TFLOP/step':>11}{'at 100 %':>10}{'s/step':>9}{'days':>8}",
    ]
    for setting in plan.settings:
        memory = "not known" if setting.memory is None else f"{setting.memory.total / GIB:.1f} GiB"
        fits = {True: "yes", False: "no", None: "?"}[setting.fits]
        mark = " ◀" if setting is plan.chosen else ""
        lines.append(
            f"{setting.name:<24}{memory:>9}  {fits:<4}{setting.step_flops / 1e12:>11,.0f}"
            f"{setting.seconds_at_peak:>8.2f} s{setting.seconds:>9.2f}{setting.days(plan.num_steps):>8.2f}{mark}"
        )
    fastest = f"; the fastest that fits: {plan.fastest.name}" if plan.fastest is not None else ""
    lines += [
        f"◀ configured{fastest}",
        "",
        *describe_layouts(plan),
        *describe_bases(plan),
        *describe_memory(plan.chosen.name, plan.chosen.saves, plan.chosen.memory),
        "",
    ]
    low, high = plan.train_days_range
    gemm, attention, backward, traffic = plan.chosen.work_seconds
    lines += [
        f"a step of {plan.chosen.name}: GEMMs {gemm:.2f} s, attention {attention:.2f} forward and {backward:.2f} "
        f"backward, memory traffic {traffic:.2f}, exchanged {plan.chosen.exchange.seconds:.2f}",
        f"training: {plan.train_days:.2f} days likely ({low:.2f} optimistic, {high:.2f} pessimistic), of which the "
        f"held-out loss takes {plan.held_out_share:.1%}",
        f"stage 1 before it: {plan.encode_days:.2f} days to encode {plan.encode_samples:,} samples on the same GPUs in "
        f"{plan.encode_mode}, {plan.encode_days_fast:.2f} in 16 bits (an estimate; `wanprep plan` knows more)",
        *(f"  shorter  {line}" for line in plan.shorter),
    ]
    return lines + [f"note: {note}" for note in plan.notes]


def describe_layouts(plan: Estimate) -> list[str]:
    """What else the same GPUs could do, and what is exchanged; nothing for one GPU."""
    if plan.num_gpus == 1:
        return []
    words = ("layout, same checkpointing", "memory", "fits", "s/step", "exchanged", "of the step")
    lines = ["{:<28}{:>9}  {:<4}{:>9}{:>11}{:>13}".format(*words)]
    for setting in (plan.chosen, *plan.layouts):
        memory = "not known" if setting.memory is None else f"{setting.memory.total / GIB:.1f} GiB"
        fits = {True: "yes", False: "no", None: "?"}[setting.fits]
        moved = f"{setting.exchange.total_bytes / 1e9:,.2f} GB"
        mark = " ◀" if setting is plan.chosen else ""
        lines.append(
            f"{setting.mesh!s:<28}{memory:>9}  {fits:<4}{setting.seconds:>9.2f}{moved:>11}"
            f"{setting.exchange_share:>13.1%}{mark}"
        )
    bandwidth = f"{plan.gpu.link_gb_per_second:g} GB/s within a machine"
    if plan.chosen.mesh.num_nodes > 1:
        bandwidth += f", {plan.gpu.network_gb_per_second:g} between them"
    return [*lines, f"exchanged a GPU and step, at {bandwidth} (assumed), nothing overlapped", ""]


def describe_bases(plan: Estimate) -> list[str]:
    """How else the base could be kept, and what is recommended; nothing where every weight trains."""
    if not plan.bases:
        return []
    words = ("the base, as much kept as fits", "memory", "fits", "of the host", "moved", "hidden", "s/step")
    lines = ["{:<36}{:>10}  {:<5}{:>12}{:>10}{:>8}{:>9}".format(*words)]
    for base in plan.bases:
        moved, memory = base.transfer, cast(Memory, base.memory)
        hidden = f"{1 - moved.exposed_seconds / moved.seconds:.0%}" if moved.seconds else "-"
        mark = " ◀ recommended" if base is plan.fastest_exact else " ◀ fastest" if base is plan.fastest_base else ""
        lines.append(
            f"{base.name:<36}{memory.total / GIB:>6.1f} GiB  {'yes' if base.fits else 'no':<5}"
            f"{base.host_bytes / GIB:>8.1f} GiB{moved.num_bytes / 1e9:>7,.0f} GB{hidden:>8}{base.seconds:>9.2f}{mark}"
        )
    for best in dict.fromkeys((plan.fastest_exact, plan.fastest_base)):
        if best is not None:
            store = BASES[best.name]
            keys = [f"model.base_dtype={store.dtype}"] if store.dtype != "auto" else []
            keys += [f"model.stream_blocks={str(store.streamed).lower()}"] if store.streamed or not keys else []
            keys += ["checkpointing.offload_inputs=true"] if store.offload_inputs else []
            exact = "the same numbers" if best is plan.fastest_exact else "rounded weights, chosen by name only"
            lines.append(f"  {' '.join(keys)}: {best.seconds:.2f} s a step, {exact}")
    return [*lines, f"moved a step, at {plan.gpu.host_gb:g} GB/s between GPU and host (assumed)", ""]


def describe_memory(name: str, saves: str, memory: Memory | None) -> list[str]:
    """Memory of a setting, part by part."""
    if memory is None:
        return []
    lines = [f"memory of {name}: {saves}"]
    for part, size in memory._asdict().items():
        guess = " (an estimate)" if part == "workspace" else ""
        lines.append(f"  {part:<10}{size / GIB:>8.2f} GiB{guess}")
    return lines
