"""The first day on a GPU in one script: what is right there, what it reaches, and which estimates were wrong.

    make gpu                                          on a machine with a GPU, at most eight minutes
    make gpu ARGS=--tiny                              the same stages on a CPU at small sizes, which tests the script
    python tests/benchmarks/gpu_checks.py --only kernels,step

Stages run in order of worth. Each result is printed as it comes and `gpu-results/results.json` is written again after
every line, so that a machine that is lost in the middle loses nothing. A stage that fails costs no other one; none is
begun without the time that it needs. It runs from a bare checkout without network on Python 3.12 with torch 2.11: what
is not installed is named at the start, and only the stages that need it are left out. Exits with 1 if anything is
WRONG or FAILED. docs/performance.md says where the figures go.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS' first handle, for deterministic runs
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEEDED = ("torch", "numpy", "pydantic", "yaml", "click", "zstandard", "jaxtyping", "safetensors", "rich")
GIB = 2**30
LORA_RANK = 32


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes on a CPU: a test of the script")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds in all (default: 460)")
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results.json")
    return parser.parse_args(arguments)


class Day:
    """Results so far, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.tiny, self.budget, self.out = options.tiny, options.budget, options.out
        self.began = time.perf_counter()
        self.results: list[dict[str, Any]] = []
        self.device = torch.device("cpu") if self.tiny else torch.device("cuda", 0)
        self.sizes = [(5, 32, 64)] if self.tiny else [(49, 480, 832), (49, 704, 1280)]
        self.large: dict[Any, Any] = {}
        """The 5B model, by dtype, as long as stages share it."""
        self.out.mkdir(parents=True, exist_ok=True)

    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began

    def say(self, name: str, text: str, *, status: str = "ok", **figures: Any) -> None:
        """Print a result and write all of them."""
        self.results.append({"name": name, "status": status, "text": text, **figures})
        mark = "" if status == "ok" else f"{status}: "
        print(f"[{self.seconds():6.1f}] {name}: {mark}{text}", flush=True)
        path = self.out / "results.json"
        path.with_suffix(".writing").write_text(json.dumps(self.results, indent=1, default=str), encoding="utf-8")
        path.with_suffix(".writing").replace(path)

    def sync(self) -> None:
        """Wait for the GPU."""
        import torch

        if not self.tiny:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Give back what is no longer used, and begin a new peak."""
        import torch

        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes allocated at most since `clean`; 0 on a CPU."""
        import torch

        return 0 if self.tiny else int(torch.cuda.max_memory_allocated())

    def timed(self, function: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
        """Median seconds."""
        for _ in range(warm_up):
            function()
        seconds = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            function()
            self.sync()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


Stage = Callable[[Day], None]
STAGES: dict[str, tuple[Stage, float, tuple[str, ...]]] = {}


def stage(seconds: float, *modules: str) -> Callable[[Stage], Stage]:
    """A stage, the seconds that it takes on an H100, and the modules it needs beside NEEDED."""

    def register(function: Stage) -> Stage:
        STAGES[function.__name__] = (function, seconds, modules)
        return function

    return register


def distance(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Relative error of several tensors together."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return float((difference / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5)


@stage(12)
def facts(day: Day) -> None:
    """Versions, the card, and the rates that everything else is bound by."""
    import torch

    cudnn = torch.backends.cudnn.version()
    day.say("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, Python {sys.version.split()[0]}")
    size, dtypes = (
        ((64, 96, 128), (torch.float32,)) if day.tiny else ((11440, 3072, 3072), (torch.bfloat16, torch.float16))
    )
    if not day.tiny:
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        day.say(
            "card", f"{name}, sm_{major}{minor}, {total / GIB:.2f} GiB, {free / GIB:.2f} free", card=name, total=total
        )
    source = torch.empty((1 << 20) if day.tiny else (4 << 30), dtype=torch.uint8, device=day.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / day.timed(partial(target.copy_, source)) / 1e9
    day.say("memory traffic of a copy", f"{rate:,.0f} GB/s read and written", gb_per_second=rate)
    del source, target
    for dtype in dtypes:
        for m, k, n in (size, (size[0], size[1], 14 * size[1] // 3), (size[0], size[1], LORA_RANK)):
            x, w = (torch.randn(rows, k, device=day.device, dtype=dtype) for rows in (m, n))
            rate = 2 * m * k * n / day.timed(lambda x=x, w=w: x @ w.t(), 10) / 1e12
            day.say(f"GEMM {dtype} {m}×{k}×{n}", f"{rate:.3g} TFLOP/s", tflops=rate)
    x, y, gate = (
        torch.randn(1, size[0], size[1], device=day.device, dtype=d) for d in (torch.float32, dtypes[0], torch.float32)
    )
    rate = x.numel() * (8 + y.element_size()) / day.timed(lambda: torch.addcmul(x, y, gate), 20) / 1e9
    day.say("elementwise, mixed dtypes", f"{rate:,.0f} GB/s", gb_per_second=rate)


@stage(30)
def kernels(day: Day) -> None:
    """Each attention kernel against math in float32 at lengths that 128 does not divide, what is chosen, and speeds."""
    import torch

    from train.model import kernels as ours
    from train.model.dit import backend_for

    dtypes = (torch.float32,) if day.tiny else (torch.bfloat16, torch.float16)
    candidates = ("cpu",) if day.tiny else ("cudnn", "flash", "efficient")
    cases = (
        ((96, 96), (70, 32))
        if day.tiny
        else ((128, 128), (176, 176), (206, 206), (5070, 5070), (5070, 512), (11440, 512))
    )
    for dtype in dtypes:
        for name in candidates:
            found = [_kernel_error(name, day.device, dtype, *case) for case in cases]
            errors = {
                f"{case[0]}×{case[1]}": error for case, error in zip(cases, found, strict=True) if error is not None
            }
            right = all(error <= ours.PROBE_TOLERANCE for error in errors.values())
            shown = ", ".join(f"{case} {error:.1e}" for case, error in errors.items()) or "refused by torch"
            # A kernel that is wrong is no fault of ours as long as it is not chosen.
            day.say(f"parity {name} {dtype}", shown + ("" if right else ", NOT RIGHT"), errors=errors)
        for tokens in (96,) if day.tiny else (5_070, 11_440):
            backend = backend_for(day.device, dtype, tokens, 128)
            chosen = ours.kernel_name(backend)
            error = _kernel_error(chosen, day.device, dtype, tokens if tokens < 6_000 else 5_120 + tokens % 128, 512)
            right = error is not None and error <= ours.PROBE_TOLERANCE
            day.say(
                f"chosen {dtype} {tokens} tokens",
                f"{chosen} ({backend.reason}), error {error}",
                status="ok" if right else "WRONG",
            )
            for name in candidates:
                heads, flops = 24, 4 * tokens * tokens * 3072
                q, k, v, grad = (torch.randn(1, tokens, heads, 128, device=day.device, dtype=dtype) for _ in range(4))
                if not day.tiny and not ours._usable(name, q, k, v):
                    continue
                out, residue = ours.attend_forward(name, q, k, v)
                forward = day.timed(partial(ours.attend_forward, name, q, k, v))
                backward = day.timed(partial(ours.attend_backward, name, grad, q, k, v, out, residue))
                rates = flops / forward / 1e12, 2.5 * flops / backward / 1e12
                text = f"forward {rates[0]:.3g}, backward {rates[1]:.3g} TFLOP/s"
                day.say(f"speed {name} {dtype} {tokens} tokens", text, forward=rates[0], backward=rates[1])


def _kernel_error(name: str, device: Any, dtype: Any, num_tokens: int, num_keys: int) -> float | None:
    from train.model import kernels as ours

    if name != "cpu":
        return ours._error(name, device, dtype, num_tokens, num_keys, 128)
    usable = ours._usable
    ours._usable = lambda *inputs: True
    try:
        return ours._error(name, device, dtype, num_tokens, num_keys, 128)
    finally:
        ours._usable = usable


def sizes_of(day: Day, num_layers: int | None) -> Any:
    """The published sizes, or small ones; with fewer blocks."""
    from train.config.model import TI2V_5B, DiTConfig

    dims = TI2V_5B
    if day.tiny:
        dims = DiTConfig(dim=256, num_heads=2, num_layers=3, ffn_dim=512, text_dim=64, text_len=32)
    return dims.model_copy(update={"num_layers": num_layers}) if num_layers else dims


def build(
    day: Day, dtype: Any, num_layers: int | None = None, targets: tuple[str, ...] = ("self_attn", "cross_attn")
) -> Any:
    """A model of the published width with random weights and a random LoRA, and its sizes."""
    import torch
    from train_runs import lora_parameters

    from train.config.model import LoRAConfig
    from train.lora.lora import inject
    from train.model.dit import build_model

    dims = sizes_of(day, num_layers)
    model = build_model(dims, dtype, day.device, seed=0)
    inject(model, LoRAConfig(rank=LORA_RANK, targets=targets), 0)
    with torch.no_grad():
        for index, weight in enumerate(lora_parameters(model)):
            weight.normal_(0, 0.02, generator=torch.Generator(day.device).manual_seed(index))
    return model.train(), dims


def make_data(day: Day, dims: Any, size: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Latent, noise, text."""
    import torch

    frames, height, width = size
    generator = torch.Generator(day.device).manual_seed(0)
    shape = (1, 48, (frames - 1) // 4 + 1, height // 16, width // 16)
    latent, noise = (torch.randn(shape, device=day.device, generator=generator) for _ in range(2))
    return latent, noise, 0.2 * torch.randn(1, dims.text_len, dims.text_dim, device=day.device, generator=generator)


def loss_of(model: Any, batch: tuple[Any, Any, Any], image_first: bool = False) -> Any:
    """The loss of one sample, with its graph."""
    import torch

    from train.objective import add_noise, slot_losses

    latent, noise, text = batch
    sigma, flag = torch.tensor([0.7], dtype=torch.float64), torch.tensor([image_first])
    noised, target = add_noise(latent, noise, sigma, flag)
    velocity = model(noised, (1000 * sigma).float().to(latent.device), flag, text)
    return slot_losses(velocity, target, flag).sum()


def gradients(model: Any, batch: tuple[Any, Any, Any], image_first: bool = False, scale: float = 1.0) -> list[Any]:
    """The LoRA's gradients."""
    (loss_of(model, batch, image_first) * scale).backward()
    found = [weight.grad / scale for weight in model.parameters() if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@stage(30)
def recompute(day: Day) -> None:
    """The hand-written backward pass in 16 bits against float32, and the same bits whatever is kept."""
    import torch

    from train.geometry import SAVE_GROUPS
    from train.model.block import run_plain
    from train.recompute.runner import keep

    every = ("self_attn", "cross_attn", "ffn")
    for image_first in (False, True):
        model, dims = build(day, torch.float32, 2, every)
        batch = make_data(day, dims, day.sizes[0])
        model.run_block = run_plain
        exact = gradients(model, batch, image_first)
        keep(model, "none")
        error = distance(gradients(model, batch, image_first), exact)
        status = "ok" if error < 1e-4 else "WRONG"
        day.say(
            f"recompute float32 image_first={image_first}", f"{error:.1e} from autograd", status=status, error=error
        )
        for dtype, scale in () if day.tiny else ((torch.bfloat16, 1.0), (torch.float16, 65536.0)):
            model, _ = build(day, dtype, 2, every)
            model.run_block = run_plain
            plain = distance(gradients(model, batch, image_first, scale), exact)
            first: list[Any] = []
            for name, saves in (("none", SAVE_GROUPS), ("attention", ("attention",)), ("full", ())):
                keep(model, lambda shape, saves=saves: (saves,) * 2)
                found = gradients(model, batch, image_first, scale)
                first = first or found
                same = all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
                error = distance(found, exact)
                good = error <= 1.5 * plain and (same or distance(found, first) < 0.1 * error)
                bits = "same bits" if same else f"other bits ({distance(found, first):.1e})"
                text = f"{error:.2e} from float32 (autograd {plain:.2e}), {bits} as none"
                day.say(
                    f"recompute {dtype} {name} image_first={image_first}",
                    text,
                    status="ok" if good else "WRONG",
                    error=error,
                )
        del model
        day.clean()


@stage(45, "tensorboard")
def fit(day: Day) -> None:
    """`wantrain fit` on small shards: loader, held-out loss, checkpoint, export; resumed at 5, the same bits."""
    import torch
    from safetensors.torch import load_file
    from shards_data import write_dataset
    from train_runs import DIMS, make_config

    from train.loop import fit as run

    work = Path(tempfile.mkdtemp(prefix="gpu-fit-"))
    write_dataset(work / "shards")
    dims = DIMS if day.tiny else {**DIMS, "dim": 256, "ffn_dim": 512}  # heads of 128, as the real ones
    cases = [("fp32", "adamw")] if day.tiny else [("bf16", "adamw"), ("fp16", "adamw"), ("bf16", "adamw8bit")]
    for compute, optimizer in cases:
        name = f"fit {compute} {optimizer}"
        if optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
            day.say(name, "no module bitsandbytes", status="skipped")
            continue
        settings: dict[str, Any] = {
            "model__dims": dims,
            "precision__compute": compute,
            "precision__deterministic": True,
        }
        settings |= {"precision__device": day.device.type, "eval": {"every_steps": 5, "num_clips": 2}}
        settings |= {"optim__name": optimizer} | ({"optim__min_8bit_size": 256} if optimizer == "adamw8bit" else {})
        try:
            straight, resumed = (
                make_config(work / "shards", work / f"{part}-{compute}-{optimizer}", **settings) for part in "ab"
            )
            start = time.perf_counter()
            run(straight, resume="never")
            seconds = time.perf_counter() - start
            run(resumed, resume=str(Path(straight.output) / "checkpoints" / "step-0000005"))
            same = []
            for file in ("lora.safetensors", "optimizer.safetensors"):
                one, other = (
                    load_file(Path(c.output) / "checkpoints" / "step-0000010" / file) for c in (straight, resumed)
                )
                same.append(all(torch.equal(one[key], other[key]) for key in one))
            exported = (Path(straight.output) / "lora.safetensors").exists()
            text = f"{seconds:.1f} s, resumed at 5 {'the same bits' if all(same) else 'DIFFERS'}, exported: {exported}"
            day.say(name, text, status="ok" if all(same) and exported else "WRONG")
        except Exception as error:
            day.say(name, f"{type(error).__name__}: {str(error)[:300]}", status="FAILED")
    torch.use_deterministic_algorithms(False)
    shutil.rmtree(work, ignore_errors=True)


def large_model(day: Day, dtype: Any) -> Any:
    """The 5B model, built once for the stages that share it."""
    if dtype not in day.large:
        day.large.clear()
        day.clean()
        start = time.perf_counter()
        day.large[dtype] = build(day, dtype)
        day.say(f"model {dtype}", f"built in {time.perf_counter() - start:.1f} s")
    return day.large[dtype]


def measure(
    day: Day,
    name: str,
    model: Any,
    dims: Any,
    size: tuple[int, int, int],
    saves: Any,
    steps: int = 4,
    store: Any = None,
) -> tuple[float, int]:
    """Seconds and peak bytes of a step, said beside what was planned; `saves` None: not one of ours."""
    import torch
    from train_runs import lora_parameters

    from shards.gpus import by_driver_name
    from train.config.model import LoRAConfig
    from train.estimate.flops import step_flops, step_work
    from train.estimate.memory import AS_COMPUTED, step_memory
    from train.geometry import Shape, num_tokens

    shape, lora = Shape(1, num_tokens(dims, *size)), LoRAConfig(rank=LORA_RANK)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-4, fused=True)
    batch = make_data(day, dims, size)

    def step() -> None:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    day.clean()
    seconds = day.timed(step, steps)
    peak, own = day.peak(), step_flops(dims, shape, lora)
    gpu = None if day.tiny else by_driver_name(torch.cuda.get_device_name())
    figures: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak, "tflops": own / seconds / 1e12}
    text, status = f"{seconds:.3f} s, {own / seconds / 1e12:.3g} TFLOP/s of its own work", "ok"
    if gpu is not None:
        figures["mfu"] = own / seconds / 1e12 / gpu.peak_tflops
        text += f", MFU {figures['mfu']:.1%}"
    if saves is not None and not day.tiny:
        planned = step_memory(dims, shape, lora, saves, store=store or AS_COMPUTED)
        ratio = peak / planned.allocated
        status = "ok" if 0.97 <= ratio <= 1.03 else "WRONG"
        reserved = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        text += f"; peak {peak / GIB:.2f} GiB, {ratio:.3f} × planned; {reserved / peak - 1:.1%} idle"
        text += f", {outside / GIB:.2f} outside"
        figures |= {
            "planned_bytes": planned.allocated,
            "peak_ratio": ratio,
            "reserved_bytes": reserved,
            "outside_bytes": outside,
        }
        if gpu is not None:
            expected = step_work(dims, shape, lora, saves).seconds(gpu, 2)
            text += f"; planned {sum(expected):.3f} s"
            figures["planned_seconds"] = expected._asdict()
    elif peak:
        text += f"; peak {peak / GIB:.2f} GiB"
    day.say(name, text, status=status, **figures)
    return seconds, peak


def title(size: tuple[int, int, int]) -> str:
    """Width × height × frames."""
    return f"{size[2]}×{size[1]}×{size[0]}"


@stage(90)
def step(day: Day) -> None:
    """The 5B step: seconds, MFU, peak against the plan, kernels, and what waits for the GPU."""
    import torch

    from train.geometry import SAVE_GROUPS
    from train.recompute.runner import keep

    model, dims = large_model(day, torch.float32 if day.tiny else torch.bfloat16)
    for size in reversed(day.sizes):
        for name, saves in (("none", SAVE_GROUPS), ("attention", ("attention",)), ("full", ())):
            chosen = (saves,) * dims.num_layers
            keep(model, lambda shape, chosen=chosen: chosen)
            with out_of_memory(day, f"step {title(size)} {name}"):
                measure(day, f"step {title(size)} {name}", model, dims, size, chosen)
    keep(model, "none")
    batch = make_data(day, dims, day.sizes[-1])
    gradients(model, batch)
    if day.tiny:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        gradients(model, batch)
        day.sync()
    show_kernels(day, "kernels of a micro-step", profiler)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(model, batch).backward()
    torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    day.say("synchronisations in a micro-step", f"{len(places)} {places[:8]}", status="WRONG" if places else "ok")


@contextlib.contextmanager
def out_of_memory(day: Day, name: str) -> Iterator[None]:
    """A size that does not fit is a result, not the end of the stage."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        day.say(name, "does not fit", status="skipped")
    day.clean()


def show_kernels(day: Day, name: str, profiler: Any, num_rows: int = 16) -> None:
    """The kernels that take most."""
    rows = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in rows)
    table = [
        f"{event.self_device_time_total / 1e3:8.2f} ms {event.self_device_time_total / total:6.1%} "
        f"{event.count:5d} × {event.key[:90]}"
        for event in rows[:num_rows]
    ]
    day.say(name, "\n   ".join([f"{total / 1e3:.1f} ms in {sum(event.count for event in rows)} launches", *table]))


def plain_selective(dims: Any) -> Any:
    """Run the plain block under selective checkpointing: attention and every base GEMM but ffn.2's are saved."""
    import torch
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    attentions = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }

    def policy(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        if operator in attentions:
            return CheckpointPolicy.MUST_SAVE
        # ffn.2's output and base + LoRA would be kept twice: neither is read by a backward pass.
        if operator in (aten.mm.default, aten.addmm.default) and arguments[-2].shape[1] not in (
            dims.ffn_dim,
            LORA_RANK,
        ):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def run(index: int, block: Any, x_BLD: Any, inputs: Any) -> Any:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, x_BLD, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return run


@stage(40)
def plain_block(day: Day) -> None:
    """Decision 058: does the hand-written block pay for itself against selective checkpointing over the plain one?"""
    import torch

    from train.geometry import SAVE_GROUPS
    from train.recompute.runner import keep

    model, dims = large_model(day, torch.float32 if day.tiny else torch.bfloat16)
    size = day.sizes[-1]
    batch, everything = make_data(day, dims, size), (SAVE_GROUPS,) * dims.num_layers
    keep(model, "none")
    own = gradients(model, batch)
    model.run_block = plain_selective(dims)
    with out_of_memory(day, f"plain block, selective {title(size)}"):
        error = distance(gradients(model, batch), own)
        keep(model, "none")
        ours = measure(day, f"hand-written block {title(size)}", model, dims, size, everything)
        model.run_block = plain_selective(dims)
        theirs = measure(day, f"plain block, selective {title(size)}", model, dims, size, None)
        faster, smaller = theirs[0] / ours[0], theirs[1] / max(ours[1], 1)
        verdict = "keep the hand-written block" if faster >= 1.05 or smaller >= 1.1 else "the plain block would do"
        text = f"the plain block takes {faster:.2f} × the time and {smaller:.2f} × the memory: {verdict}"
        status = "ok" if error < (1e-3 if day.tiny else 0.05) else "WRONG"
        day.say(
            "decision 058", f"{text} (gradients differ by {error:.1e})", status=status, faster=faster, smaller=smaller
        )
    keep(model, "none")


@stage(20)
def fp16(day: Day) -> None:
    """What a V100 would compute: fp16 with the memory-efficient kernel, finite, with and without folded scales."""
    import torch

    from train.model import dit
    from train.model.attention import Backend
    from train.precision import fold_outputs
    from train.recompute.runner import keep

    model, dims = large_model(day, torch.float32 if day.tiny else torch.float16)
    kernel = torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION
    found = dit.backend_for
    if not day.tiny:
        dit.backend_for = lambda *arguments: Backend((kernel,), "as on a V100")
    try:
        keep(model, "none")
        batch = make_data(day, dims, day.sizes[0])
        grads = gradients(model, batch, scale=65536.0)
        bad = sum(not bool(torch.isfinite(grad).all()) for grad in grads)
        day.say("fp16 gradients", f"{bad} of {len(grads)} not finite", status="WRONG" if bad else "ok")
        for block in model.blocks:
            fold_outputs(block, 4)
        error = distance(gradients(model, batch, scale=65536.0), grads)
        for block in model.blocks:
            fold_outputs(block, 0)
        day.say("fp16 folded by 2^-4", f"gradients differ by {error:.1e}", status="ok" if error < 0.02 else "WRONG")
        with out_of_memory(day, "fp16 step"):
            measure(day, f"fp16 step {title(day.sizes[0])}, efficient kernel", model, dims, day.sizes[0], None, 3)
    finally:
        dit.backend_for = found
        day.large.clear()
        day.clean()


def pattern(width: int, height: int, num_frames: int) -> Any:
    """A smooth random picture that moves, uint8 T×H×W×3."""
    import numpy as np
    import torch

    small = np.random.default_rng(0).random((1, 3, height // 16, width // 16), dtype=np.float32)
    still = torch.nn.functional.interpolate(torch.from_numpy(small), size=(height, width), mode="bicubic")[0]
    frames = torch.stack([still.roll(3 * number, dims=-1) for number in range(num_frames)])
    return (frames.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


@stage(60, "diffusers", "transformers")
def vae(day: Day) -> None:
    """The VAE's encoder in each mode: seconds a clip, peak, error against fp32."""
    import torch
    from diffusers import AutoencoderKLWan

    from preprocess.build.vae_precision import relative_error
    from preprocess.encoders.encoders import VaeEncoder, quiet_libraries
    from preprocess.encoders.vae_config import vae_arguments
    from shards.gpus import vae_encode_tflop

    quiet_libraries()
    frames, sizes = (5, [(64, 32)]) if day.tiny else (49, [(832, 480), (1280, 704)])
    exact: dict[Any, Any] = {}
    for mode in ("fp32",) if day.tiny else ("fp32", "fp16", "bf16"):
        with torch.random.fork_rng(devices=[]), day.device:
            torch.manual_seed(0)  # on the device: 700 M random numbers take half a minute on a CPU
            net = AutoencoderKLWan(**vae_arguments(*([8] if day.tiny else []))).eval().requires_grad_(False)
        net.decoder = torch.nn.Identity()
        encoder = VaeEncoder(net, device=day.device, precision=mode, channels_last=not day.tiny)
        for width, height in sizes:
            clip = pattern(width, height, frames)
            with out_of_memory(day, f"vae {width}×{height}×{frames} {mode}"):
                latent = encoder.encode(clip)
                seconds = day.timed(partial(encoder.encode, clip), 2, 0)
                error = relative_error(latent, exact.setdefault((width, height), latent))
                rate = vae_encode_tflop(width, height, frames) / seconds
                text = f"{seconds:.3f} s a clip, {rate:.3g} TFLOP/s, peak {day.peak() / GIB:.1f} GiB, error {error}"
                day.say(
                    f"vae {width}×{height}×{frames} {mode}",
                    text,
                    seconds=seconds,
                    tflops=rate,
                    error=error,
                    peak_bytes=day.peak(),
                )
        del encoder, net
        day.clean()


@stage(15, "bitsandbytes")
def optimizers(day: Day) -> None:
    """Milliseconds and state of AdamW in 32 and in 8 bits."""
    import torch

    from train.config.optim import OptimConfig
    from train.optim import make_optimizer

    shapes = [(16, 64), (64, 16)] * 3 if day.tiny else [(LORA_RANK, 3072), (3072, LORA_RANK)] * 240
    for name in ("adamw", "adamw8bit"):
        weights = [torch.nn.Parameter(torch.randn(shape, device=day.device)) for shape in shapes]
        optimizer = make_optimizer(weights, OptimConfig(name=name))
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        seconds = day.timed(optimizer.step, 5, 1)
        day.say(
            f"optimizer {name}",
            f"{seconds * 1e3:.2f} ms for {sum(w.numel() for w in weights) / 1e6:.1f} M",
            seconds=seconds,
        )


@stage(25, "transformers")
def text(day: Day) -> None:
    """UMT5 one caption at a time, at several lengths."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}
    if day.tiny:
        sizes = {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    with torch.device("meta"):
        net = UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes))
    net = net.to(torch.bfloat16).to_empty(device=day.device).eval().requires_grad_(False)
    for weight in net.parameters():
        weight.normal_(0, 0.02)
    for length in (16,) if day.tiny else (32, 128, 350, 512):
        tokens = torch.randint(0, 1000, (1, length), device=day.device)
        with torch.inference_mode():
            seconds = day.timed(partial(net, input_ids=tokens, attention_mask=torch.ones_like(tokens)))
        day.say(f"text encoder {length} tokens", f"{seconds * 1e3:.1f} ms a caption", seconds=seconds)
    del net
    day.clean()


@stage(50, "diffusers", "peft")
def peer(day: Day) -> None:
    """The same step in diffusers + peft: what a user has without this project."""
    import torch
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    sizes: dict[str, Any] = {"num_attention_heads": 24, "text_dim": 4096, "ffn_dim": 14_336, "num_layers": 30}
    if day.tiny:
        sizes = {"num_attention_heads": 2, "text_dim": 64, "ffn_dim": 256, "num_layers": 2}
    sizes |= {"in_channels": 48, "out_channels": 48, "attention_head_dim": 128, "qk_norm": "rms_norm_across_heads"}
    with day.device:
        net = WanTransformer3DModel(**sizes).to(torch.bfloat16).requires_grad_(False)
    net.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = [weight for weight in net.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    for size, checkpointing in ((day.sizes[0], False), (day.sizes[-1], True)):
        (net.enable_gradient_checkpointing if checkpointing else net.disable_gradient_checkpointing)()
        frames, height, width = size
        x = torch.randn(
            1, 48, (frames - 1) // 4 + 1, height // 16, width // 16, device=day.device, dtype=torch.bfloat16
        )
        prompt = torch.randn(1, 16 if day.tiny else 512, sizes["text_dim"], device=day.device, dtype=torch.bfloat16)
        timestep = torch.full((1,), 700, device=day.device)

        def run(x: Any = x, prompt: Any = prompt, timestep: Any = timestep) -> None:
            net(x, timestep, prompt, return_dict=False)[0].float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        name = f"peer {title(size)} checkpointing={checkpointing}"
        with out_of_memory(day, name):
            day.clean()
            seconds = day.timed(run, 3)
            day.say(name, f"{seconds:.3f} s, peak {day.peak() / GIB:.2f} GiB", seconds=seconds, peak_bytes=day.peak())


@stage(110)
def compiled(day: Day) -> None:
    """The 5B step with compiled blocks: the target is 50 % MFU at 1280×704×49."""
    import torch

    from train.geometry import SAVE_GROUPS
    from train.recompute.runner import keep

    if day.tiny:
        day.say("compiled", "left out of the small run: it takes a C++ compiler half a minute", status="skipped")
        return
    model, dims = large_model(day, torch.bfloat16)
    everything = (SAVE_GROUPS,) * dims.num_layers
    for size in reversed(day.sizes):
        keep(model, "none", compiled=True)
        start = time.perf_counter()
        gradients(model, make_data(day, dims, size))
        day.sync()
        day.say(f"compiled {title(size)}", f"first step {time.perf_counter() - start:.1f} s")
        measure(day, f"compiled step {title(size)} none", model, dims, size, everything)


def placed(day: Day, dtype: Any, kind: Any, *, streamed: bool, num_layers: int | None = None) -> Any:
    """`build`'s model with its base kept another way: the same random weights and LoRA."""
    import torch
    from train_runs import lora_parameters

    from train.config.model import LoRAConfig
    from train.lora.lora import inject
    from train.model.dit import build_model, init_random
    from train.model.stream import place_base

    dims = sizes_of(day, num_layers)
    model = build_model(dims, dtype, "meta")
    inject(model, LoRAConfig(rank=LORA_RANK), 0)
    model.stream = place_base(model, day.device, kind, streamed=streamed)
    init_random(model, 0)
    with torch.no_grad():
        for index, weight in enumerate(lora_parameters(model)):
            weight.normal_(0, 0.02, generator=torch.Generator(day.device).manual_seed(index))
    return model.train(), dims


@stage(60)
def streamed(day: Day) -> None:
    """Blocks from pinned memory: the bits of a resident base, the link's speed, the step beside its plan."""
    import torch

    from train.estimate.memory import BaseStore
    from train.recompute.runner import keep

    dtype = torch.float32 if day.tiny else torch.bfloat16
    resident, dims = build(day, dtype, 4)
    batch = make_data(day, dims, day.sizes[0])
    keep(resident, "full")
    exact = gradients(resident, batch)
    again = all(torch.equal(a, b) for a, b in zip(gradients(resident, batch), exact, strict=True))
    del resident
    day.clean()
    model, _ = placed(day, dtype, None, streamed=True, num_layers=4)
    for offload in (False, True):
        keep(model, "full", offload_inputs=offload)
        same = all(torch.equal(a, b) for _ in range(3) for a, b in zip(gradients(model, batch), exact, strict=True))
        text = f"{'the same bits as' if same else 'DIFFERS from'} the resident base, three times"
        text += "" if again else " (the resident one does not repeat either)"
        day.say(f"streamed, inputs offloaded {offload}", text, status="ok" if same or not again else "WRONG")
    slot, host = model.stream.slots[0], model.stream.host[0]
    rate = slot.numel() / day.timed(partial(slot.copy_, host, non_blocking=True)) / 1e9
    day.say("host to GPU, pinned", f"{rate:.1f} GB/s", gb_per_second=rate)
    del model, slot, host
    day.clean()
    if day.tiny:
        return
    model, dims = placed(day, dtype, None, streamed=True)
    for offload in (False, True):
        keep(model, "full", offload_inputs=offload)
        name = f"streamed step {title(day.sizes[0])} full, inputs offloaded {offload}"
        store = BaseStore(streamed=True, offload_inputs=offload)
        measure(day, name, model, dims, day.sizes[0], ((),) * dims.num_layers, store=store)


@stage(60, "bitsandbytes")
def quantised(day: Day) -> None:
    """FP8 and NF4: the numbers of weights that were rounded beforehand, and the step beside its plan."""
    import torch

    from train.estimate.memory import BaseStore
    from train.model.quantise import quantised_weights
    from train.recompute.runner import keep

    dtype = torch.float32 if day.tiny else torch.bfloat16
    for kind in ("fp8", "nf4"):
        model, dims = placed(day, dtype, kind, streamed=False, num_layers=2)
        batch = make_data(day, dims, day.sizes[0])
        keep(model, "full")
        found = gradients(model, batch)
        plain, _ = build(day, dtype, 2)
        with torch.no_grad():
            for name, weight in quantised_weights(model).items():
                plain.get_parameter(name).copy_(weight.to(dtype))
        keep(plain, "full")
        expected = gradients(plain, batch)
        error = distance(found, expected)
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        text = "the same bits as weights rounded beforehand" if same else f"differs by {error:.1e}"
        day.say(f"{kind} gradients", text, status="ok" if error < 1e-3 else "WRONG", error=error)
        del model, plain
        day.clean()
        if not day.tiny:
            model, dims = placed(day, dtype, kind, streamed=False)
            keep(model, "full")
            name, saves = f"{kind} step {title(day.sizes[0])} full", ((),) * dims.num_layers
            measure(day, name, model, dims, day.sizes[0], saves, store=BaseStore(kind))
            del model
            day.clean()


def run_stages(day: Day, wanted: Sequence[str]) -> None:
    """Run the stages in order, as far as the time goes."""
    for name, (function, seconds, modules) in STAGES.items():
        if wanted and name not in wanted:
            continue
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if absent:
            day.say(name, f"no module {', '.join(absent)}", status="skipped")
            continue
        if day.budget - day.seconds() < 0.6 * seconds and not day.tiny:
            day.say(name, f"not begun with {day.budget - day.seconds():.0f} s left", status="skipped")
            continue
        start = time.perf_counter()
        try:
            function(day)
        except Exception as error:  # one stage must not cost the others
            day.say(name, f"{type(error).__name__}: {str(error)[:400]}", status="FAILED")
            traceback.print_exc(limit=-4)
        day.clean()
        print(f"[{day.seconds():6.1f}] -- {name} took {time.perf_counter() - start:.1f} s", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the day; 1 if anything is wrong, 2 if it cannot begin."""
    options = parse(arguments)
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        names = " ".join(absent)
        print(f"error: not installed: {names}")
        print(
            f"fix: pip install {names}; without a network pip download -d wheels {names} on a machine that has one, and"
        )
        print(f"     pip install --no-index --find-links wheels {names} here")
        return 2
    import torch

    if not options.tiny and not torch.cuda.is_available():
        print("error: torch sees no GPU\nfix: `wantrain doctor` says why; ARGS=--tiny tests this script on a CPU")
        return 2
    wanted = [name for name in options.only.split(",") if name]
    if unknown := [name for name in wanted if name not in STAGES]:
        print(f"error: --only {', '.join(unknown)}: no such stage\nexpected: {', '.join(STAGES)}")
        return 2
    if not options.tiny:
        from train.device import use_device

        use_device(torch.device("cuda", 0))
    day = Day(options)
    run_stages(day, wanted)
    bad = [result["name"] for result in day.results if result["status"] in ("WRONG", "FAILED")]
    verdict = f"to look at: {', '.join(bad)}" if bad else "nothing is wrong"
    print(f"{len(day.results)} results in {day.seconds():.0f} s, {day.out / 'results.json'}; {verdict}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    # Not through the interpreter's end: a worker's thread may still hold CUDA or gloo there.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
