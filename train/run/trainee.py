"""What is trained: the base with a LoRA, or the full model; on which device and in which precision."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shards.console import counted
from shards.errors import UserError
from shards.files.write_file import TEMPORARY, named_errors, sync_folder
from train import checkpoint
from train.config.model import DiTConfig
from train.config.train import TrainConfig, is_quantised
from train.device import available_memory, choose_device, device_info
from train.estimate.saves import GIB, make_chooser
from train.geometry import Shape
from train.lora.formats import name_tensors, raw_pairs, save_lora
from train.lora.load import load
from train.lora.lora import inject, load_lora_state, reset
from train.lora.targets import match_weights
from train.model.dit import WanDiT, build_model, init_random
from train.model.load import base_parameters, dit_header, load_dit, read_dit_config, save_dit
from train.model.quantise import Kind
from train.model.stream import place_base
from train.parallel.fsdp import local_shard, settle, shard_base, shard_trained
from train.parallel.ranks import ALONE, Layout, Ranks
from train.parallel.rows import Rows, write_rows
from train.parallel.ulysses import Ulysses
from train.precision import DTYPES, Name, Precision, resolve_precision
from train.recompute.runner import ChooseSaves, keep

if TYPE_CHECKING:
    from shards.read.dataset import Dataset

LOG = logging.getLogger("wan.trainee")
DIGEST_WHOLE_BYTES = 64 << 20
DIGEST_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class Trainee:
    """A model ready to train."""

    config: TrainConfig
    dims: DiTConfig
    model: WanDiT
    device: torch.device
    precision: Precision
    weights: dict[str, nn.Parameter]
    """What the optimizer moves, by name."""
    adapted: tuple[str, ...]
    """Modules that carry a LoRA; empty when the full model is trained."""
    policy: ChooseSaves | str
    """What blocks keep for their backward pass: from the shape of a micro-batch, or `none` or `full`."""
    device_bytes: int | None = None
    """Memory that `auto` plans with: the least that was free on any rank's GPU; None on a CPU."""
    sharded: dict[str, nn.Parameter] = field(default_factory=dict)
    """Of `weights` those that are sharded over ranks, as FSDP2 knows them: `weights` has the rows of this rank, in the
    same memory, so that optimizers, clipping and averages see plain tensors."""

    @property
    def file_name(self) -> str:
        """Name of the file that holds the trained weights in a checkpoint."""
        return checkpoint.LORA_FILE if self.adapted else checkpoint.MODEL_FILE

    def saves(self, shape: Shape) -> Sequence[Collection[str]] | None:
        """The groups that each block keeps in a micro-batch of this shape; None where autograd decides."""
        if callable(self.policy):
            return self.policy(shape)
        return None if self.policy == "none" else ((),) * self.dims.num_layers

    @property
    def num_trained(self) -> int:
        """Numbers that train, on whatever rank."""
        return sum(weight.numel() for weight in (self.weights | self.sharded).values())

    @property
    def replicated(self) -> list[nn.Parameter]:
        """Of `weights` those that every rank holds all of."""
        return [weight for name, weight in self.weights.items() if name not in self.sharded]

    def take_gradients(self) -> None:
        """Hand the gradients that FSDP2 has summed to the rows in `weights`."""
        for name, weight in self.sharded.items():
            self.weights[name].grad = None if weight.grad is None else local_shard(weight.grad)[0]
            weight.grad = None

    def span(self, name: str) -> tuple[tuple[int, ...], slice]:
        """Shape of a complete trained weight, and which rows of it are this rank's."""
        weight = self.sharded.get(name, self.weights[name])
        return tuple(weight.shape), local_shard(weight)[1]

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights, detached, not copied."""
        return {name: weight.detach() for name, weight in self.weights.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put weights into the model. Raises UserError when names or shapes differ."""
        if self.adapted:
            load_lora_state(self.model, dict(tensors))
            return
        check_names(self.weights, tensors, "the checkpoint's weights")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """The model in inference mode, inside the `with`."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    @contextlib.contextmanager
    def holding(self, tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Use other weights inside the `with`, such as the moving average; None: its own."""
        if tensors is None:
            yield
            return
        kept = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.load(tensors)
        try:
            yield
        finally:
            self.load(kept)

    def export(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        """Write weights for use elsewhere: a LoRA that loaders know, or a model with the official names."""
        if self.config.lora is not None:
            save_lora(path, name_tensors(raw_pairs(tensors, self.config.lora)), metadata)
        else:
            with self.holding(tensors):
                save_dit(self.model, path, metadata)

    def export_rows(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], ranks: Ranks) -> None:
        """The same of a model that is sharded, written by all ranks of one copy; every rank calls it."""
        parts = {}
        for name, weight in base_parameters(self.model).items():
            local, rows = local_shard(weight)
            if ranks.is_first or (isinstance(weight, DTensor) and ranks.writes_rows and local.numel()):
                parts[name] = Rows(tensors.get(name, local), tuple(weight.shape), rows.start)
        temporary = path.with_name(TEMPORARY + path.name)
        write_rows(temporary, parts, ranks, dit_header(self.dims, metadata))
        if ranks.is_first:
            with named_errors(path):
                temporary.replace(path)
                sync_folder(path.parent)


def make_trainee(config: TrainConfig, ranks: Ranks = ALONE, device_bytes: int | None = None) -> Trainee:
    """Build or load the base, inject the LoRA, freeze the rest. Raises UserError naming what does not fit."""
    device = choose_device(config.precision.device, None if ranks.alone else ranks.layout.local_rank)
    device_bytes = device_bytes or available_memory(device)
    precision = resolve_precision(config.precision.compute, device_info(device))
    dims = resolve_dims(config)
    if config.lora is not None and config.lora.start_from is not None:
        # A wrong file is reported before twenty gigabytes are loaded: on a model without memory.
        empty = build_model(dims, precision.dtype, "meta")
        inject(empty, config.lora, config.seed)
        load(empty, config.lora.start_from)
    LOG.info("loading the base: %s", describe_base(config))
    model, adapted = _build(config, dims, precision.dtype, device, ranks)
    if config.lora is not None and config.lora.start_from is not None:
        load(model, config.lora.start_from)
    policy = choose_policy(config, dims, device_bytes, precision.dtype, ranks.layout)
    if ranks.sequence is not None:
        model.ulysses = Ulysses(ranks.sequence.group_name, ranks.layout.ulysses, ranks.layout.ulysses_rank)
    keep(model, policy, compiled=config.model.compile is True, offload_inputs=config.checkpointing.offload_inputs)
    model.train()
    suffix = ".weight" if adapted else ""
    weights = {name + suffix: weight for name, weight in model.named_parameters() if weight.requires_grad}
    sharded: dict[str, nn.Parameter] = {name: weight for name, weight in weights.items() if isinstance(weight, DTensor)}
    weights |= {name: nn.Parameter(local_shard(weight)[0].detach()) for name, weight in sharded.items()}
    return Trainee(config, dims, model, device, precision, weights, adapted, policy, device_bytes, sharded)


def _build(
    config: TrainConfig, dims: DiTConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> tuple[WanDiT, tuple[str, ...]]:
    """The model with its weights and its LoRA, and the names of what was adapted."""
    seed = config.model.random_seed if config.model.checkpoint is None else None
    kind = cast(Kind, config.model.base_dtype) if is_quantised(config) else None
    streamed = ranks.layout.streamed or config.model.stream_blocks is True
    kept = DTYPES.get(cast(Name, config.model.base_dtype), dtype)
    if config.lora is not None and (ranks.layout.base_shards > 1 or kind is not None or streamed):
        model = build_model(dims, dtype, "meta", param_dtype=kept)
        adapted = tuple(inject(model, config.lora, config.seed))
        if ranks.layout.base_shards > 1:
            shard_base(model, ranks.base_mesh(device.type), device, offload=config.parallel.offload)
        else:
            model.stream = place_base(model, device, kind, streamed=streamed)
        reset(model, config.seed)
        if seed is not None:
            init_random(model, seed)
    elif ranks.layout.base_shards > 1:
        model = build_model(dims, dtype, "meta", param_dtype=torch.float32)
        adapted = ()
        _choose_trained(model, config)
        shard_trained(model, ranks.base_mesh(device.type, trained=True), device)
        if seed is not None:
            init_random(model, seed)
    else:
        model = build_model(dims, dtype, device, param_dtype=kept if config.lora else torch.float32, seed=seed)
        adapted = ()
        _choose_trained(model, config)
    if config.model.checkpoint is not None:
        load_dit(model, config.model.checkpoint)
    if config.lora is None and ranks.layout.base_shards > 1:
        settle(model)
    if config.lora is not None and not adapted:
        adapted = tuple(inject(model, config.lora, config.seed))
    return model, adapted


def _choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Freeze what `train` leaves out."""
    if config.train is not None:
        chosen = set(match_weights([name for name, _ in model.named_parameters()], config.train))
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in chosen)


def choose_policy(
    config: TrainConfig, dims: DiTConfig, device_bytes: int | None, dtype: torch.dtype, layout: Layout | None = None
) -> ChooseSaves | str:
    """The policy for `recompute.runner.keep`: how blocks choose what to save for their backward pass."""
    if config.lora is not None:
        layout = layout or Layout()
        return make_chooser(
            config,
            dims,
            device_bytes=device_bytes,
            compute_bytes=dtype.itemsize,
            base_shards=layout.base_shards,
            ulysses=layout.ulysses,
            streamed=layout.streamed,
        )
    policy = config.checkpointing.policy
    return policy if policy in ("none", "full") else "none" if device_bytes is None else "full"


def resolve_dims(config: TrainConfig) -> DiTConfig:
    """The model's size: the config's, else the checkpoint's own."""
    if config.model.dims is not None:
        return config.model.dims
    return read_dit_config(str(config.model.checkpoint))  # the config's validator requires one of the two


def check_names(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError when names or shapes differ, naming the first few."""
    wrong = sorted(set(expected) ^ set(given))
    wrong += [name for name in expected if name in given and expected[name].shape != given[name].shape]
    if wrong:
        raise UserError(f"{what} do not fit the model: {', '.join(wrong[:5])}, {len(wrong)} in all")


def weights_digest(location: str | None) -> str | None:
    """A digest that tells checkpoints apart without reading all of 20 GB.

    Of each file: names, types and shapes of its tensors, and of the numbers 1 MiB from each of 16 places, or all
    up to 64 MiB. Neither paths nor the file's free text count.
    """
    if location is None:
        return None
    path = Path(location)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            digest.update(json.dumps(header, sort_keys=True).encode())
            begin, size = stream.tell(), file.stat().st_size - stream.tell()
            if size <= DIGEST_WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for place in range(16):
                stream.seek(begin + place * (size - DIGEST_PART_BYTES) // 15)
                digest.update(stream.read(DIGEST_PART_BYTES))
    return digest.hexdigest()


def describe_base(config: TrainConfig) -> str:
    """What the base is, for people."""
    return config.model.checkpoint or f"random weights, seed {config.model.random_seed}"


def describe_trainee(trainee: Trainee, dataset: Dataset) -> list[str]:
    """What will be trained, for people."""
    trained = trainee.num_trained
    total = sum(weight.numel() for weight in trainee.model.parameters())
    base = describe_base(trainee.config)
    what = f"LoRA of {counted(len(trainee.adapted), 'module')}" if trainee.adapted else "the full model"
    if trainee.config.train is not None:
        what = f"{counted(len(trainee.weights), 'tensor')}: {', '.join(trainee.config.train)}"
    memory = "" if trainee.device_bytes is None else f"; {trainee.device_bytes / GIB:.1f} GiB to plan with"
    base += f", linears in {trainee.config.model.base_dtype}" if is_quantised(trainee.config) else ""
    if trainee.model.stream is not None:
        size = sum(buffer.numel() for buffer in trainee.model.stream.host)
        base += f", blocks streamed from {size / GIB:.2f} GiB of the host's memory"
    lines = [
        f"base: {base}; {total:,} parameters, {trained:,} of them trained ({what})",
        f"device: {device_info(trainee.device).name}; {trainee.precision.name} ({trainee.precision.reason}){memory}",
    ]
    lines += [f"dataset note: {name}: {note}" for name, note in sorted(dataset.info.notes.items())]
    return lines
