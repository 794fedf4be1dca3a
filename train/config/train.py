"""Configuration of stage 2, one class per section of the YAML file. Importing it imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shards.config import Config, StorageConfig, refuse_source_folder
from shards.errors import UserError
from train.config.model import DiTConfig, LoRAConfig, Positive, PositiveNumber, Share
from train.config.optim import OptimConfig
from train.config.sampling import SampleConfig

_PASSWORD = re.compile(r"://[^/?#]*@|[?&]endpoint=[^&]*(@|%40)", re.IGNORECASE)


class BaseModelConfig(Config):
    """The model to start from."""

    checkpoint: str | None = None
    """Folder or safetensors file of the DiT, official or Diffusers layout; null: random weights, for demonstrations."""
    random_seed: int = 0
    """Seed of the random weights when there is no checkpoint."""
    dims: DiTConfig | None = None
    """Size of the transformer; null: read from the checkpoint."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.checkpoint is None and self.dims is None:
            raise ValueError("neither model.checkpoint nor model.dims is given")
        return self


class ModelConfig(BaseModelConfig):
    """The frozen base."""

    base_dtype: Literal["auto", "bf16", "fp16", "fp8", "nf4"] = "auto"
    """How the frozen base is kept. `auto`: as it is computed in; `fp8` and `nf4` are the weights of the blocks' linears
    in 8 and in 4 bits, brought to the compute dtype one linear at a time: a LoRA then trains beside rounded weights."""
    stream_blocks: bool | Literal["auto"] = "auto"
    """Keep the frozen blocks in the host's memory and bring each to the GPU ahead of its turn, two at a time, which
    changes no bit. `auto`: where a step does not fit the GPU otherwise."""
    compile: bool | Literal["auto"] = False
    """torch.compile each block: a minute or two for each bucket, then faster steps. `auto`: on a GPU where the run is
    long enough; decided when it begins, and kept by a resume."""


class DataConfig(Config):
    """What is trained on, and how it is batched."""

    root: str | tuple[str, ...]
    """Folder or `s3://bucket/prefix` of the shards, or a list of several with the same identity."""
    text_set: str = "default"
    """Which set of captions."""
    revision: str | None = None
    """Revision that the dataset must have; null: the one at the start of the run, which a resume uses too."""
    cache: str | None = None
    """Folder for samples read from S3; null: none is kept."""
    include: tuple[str, ...] = ()
    """Globs over clip ids: only these clips; empty: all."""
    exclude: tuple[str, ...] = ()
    """Globs over clip ids: without these clips."""
    weights: dict[str, Annotated[float, Field(ge=0, le=1000)]] = Field(default_factory=dict)
    """How often samples are seen in an epoch, by globs over clip ids, `category:GLOB` or `tag:GLOB`: 2.5 is twice or
    three times, 0 never. Several that match multiply; what none matches is seen once. Held-out clips have no weight."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the clips, by a hash of their id, that are held out and never trained on."""
    global_batch: Positive = 16
    """Samples (slots) of one optimizer step over all processes."""
    micro_batch: Positive = 1
    """Samples per forward pass of one process; gradients of the passes of one step are added up."""
    caption_dropout: Share = 0.1
    """Share of the samples that are trained with the null caption in place of their own."""
    null_caption: Literal["empty", "negative"] = "empty"
    """The null caption: the empty text, or the negative prompt."""
    workers: Positive = 2
    """Threads that read samples and draw noise ahead of the step."""
    prefetch_steps: Positive = 2
    """Batches that are kept ready."""
    on_bad_sample: Literal["fatal", "substitute"] = "fatal"
    """If a sample cannot be read in two attempts: `fatal` stops the run, `substitute` takes another of its bucket."""
    read_timeout_seconds: PositiveNumber = 600.0
    """Longest that a step waits for its batch before the run stops. Waiting for storage does not count."""

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        # The config is written into the run's folder, and the page of `wantrain report` shows it.
        if any(_PASSWORD.search(root) for root in dataset_roots(self)):
            raise UserError(  # not a ValueError: its message would hold the value
                "data.root: its endpoint holds a user or a password",
                fix="write the endpoint without them, and give credentials as AWS_… variables or as a profile",
            )
        return self


class ObjectiveConfig(Config):
    """Flow matching."""

    sigma: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """Distribution of the noise level before the shift."""
    shift: PositiveNumber = 5.0
    """σ' = shift·σ ÷ (1 + (shift − 1)·σ)."""
    logit_mean: float = 0.0
    """Mean of `logit_normal`."""
    logit_std: PositiveNumber = 1.0
    """Standard deviation of `logit_normal`."""
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29
    """Scale of `mode`, −1 to 1.75: beyond, σ would leave 0…1."""
    sigma_min: Share = 0.0
    """No noise level below this, after the shift; the density between the two bounds keeps its shape."""
    sigma_max: Share = 1.0
    """No noise level above this, after the shift."""
    stratified: bool = False
    """Spread a step's noise levels: of N equal parts of the density each slot of a global batch of N takes another."""
    weighting: Literal["none", "bell"] = "none"
    """Weight of a sample's loss by its noise level: `none`: equal; `bell`: highest at medium noise, as in
    DiffSynth-Studio."""
    image_to_video_share: Share = 0.4
    """Share of the samples trained with a clean first frame (image-to-video); samples of one frame never are."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} is not below sigma_max {self.sigma_max:g}")
        return self


class ComputeConfig(Config):
    """Precision and device."""

    compute: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 where the chip computes it, fp16 with loss scaling on V100 and T4, fp32 on CPU."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` …"""
    deterministic: bool = False
    """Use only kernels whose results repeat to the bit; slower on a GPU."""


class PrecisionConfig(ComputeConfig):
    """Precision, device and loss scaling."""

    initial_scale: PositiveNumber = 65536.0
    """First loss scale under fp16."""
    scale_growth_updates: Positive = 1000
    """Updates without overflow after which the loss scale doubles."""
    max_skipped_in_a_row: Positive = 20
    """The run stops when so many updates in a row were skipped for overflow."""


class CheckpointingConfig(Config):
    """What is recomputed in the backward pass instead of stored. It changes no bit of loss or gradients."""

    policy: Literal["auto", "none", "full", "selective"] = "auto"
    """`auto`: store as much as fits the GPU, on a CPU everything; `none`: recompute only cheap operations (norms);
    `full`: recompute every block; `selective`: store what saves most time within `budget_gib`. Per block and bucket."""
    budget_gib: PositiveNumber | None = None
    """GiB per process for what blocks keep from forward to backward; only with `selective`."""
    offload_inputs: bool = False
    """Where a block keeps its input, keep it in the host's memory until its backward pass."""

    @model_validator(mode="after")
    def _budget(self) -> CheckpointingConfig:
        if (self.policy == "selective") != (self.budget_gib is not None):
            raise ValueError(f"policy {self.policy}, budget_gib {self.budget_gib}: selective takes one, no other does")
        return self


class ParallelConfig(Config):
    """How processes share the work."""

    shard: Literal["auto", "none", "full", "hybrid"] = "auto"
    """Sharding of the base by FSDP2: `full` over all processes, `hybrid` over the processes of a machine, `none` not
    at all; `auto`: `none` if a step fits so, else `hybrid`. With lora: null gradients and states are sharded too, and
    `auto` may be `full`."""
    offload: bool = False
    """Keep a sharded, frozen base in the memory of the host: slower, but a GPU then holds little more than one block.
    For a base that is not sharded: `model.stream_blocks`."""
    ulysses: Positive | Literal["auto"] = "auto"
    """Processes that share the tokens of one sample; must divide the attention heads. `auto`: the smallest
    number with which the batch can be shared out and a sample fits; usually 1."""
    start_timeout_seconds: PositiveNumber = 1800.0
    """Longest wait of a process for the others until all have finished the first step: weights are loaded, GPUs
    connected, blocks compiled."""
    step_timeout_seconds: PositiveNumber = 600.0
    """Longest wait after that at one place of a step; then a process names the rank that is late, and ends."""
    lost_seconds: PositiveNumber = 30.0
    """A process that reports nothing for so long counts as lost."""
    grace_seconds: PositiveNumber = 120.0
    """With `--nproc-per-node`: longest time from a signal to the end; then what is left is killed."""


class CheckpointConfig(Config):
    """What a run saves."""

    every_steps: Positive = 500
    """Steps between checkpoints; the last step and a signal write one too."""
    keep_last: Positive = 3
    """Number of newest checkpoints to keep; the best by held-out loss is kept too."""
    export: Literal["last", "best"] = "last"
    """The checkpoint that RUN/lora.safetensors is made from: the last, or the best by held-out loss."""
    licence: str | None = None
    """Licence of what is trained, for the exported file's header; it follows from the training material."""


class EvalConfig(Config):
    """The held-out loss."""

    every_steps: Positive = 500
    """Steps between evaluations; there is one before the first step and one after the last."""
    num_clips: Positive = 16
    """Number of held-out clips, one sample each, the same every time."""
    batch: Positive = 1
    """Samples of one forward pass."""
    patience: Positive | None = None
    """Evaluations without improvement after which the run stops; null: never."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    """Share by which the held-out loss must fall below the best to count as improvement."""


class LogConfig(Config):
    """What is reported of a run. `metrics.jsonl`, `events.jsonl` and TensorBoard are always written."""

    every_steps: Positive = 1
    """Steps between lines on the terminal."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well; null: none."""


class TrainConfig(Config):
    """`wantrain fit`: all of stage 2."""

    output: str
    """Folder of the run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the sample order and of all random draws."""
    max_steps: Positive
    """Steps of the run: batches to train on."""
    model: ModelConfig
    data: DataConfig
    lora: LoRAConfig | None = LoRAConfig()
    """null trains the model's own weights: all, or those of `train`."""
    train: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """With lora: null the weights that train, by patterns as of `lora.targets`: `[blocks.20-29, head]`. null: all."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig | None = EvalConfig()
    """null: no held-out loss."""
    sample: SampleConfig | None = None
    """Videos to sample during training; null: none."""
    log: LogConfig = LogConfig()
    storage: StorageConfig = StorageConfig()

    @property
    def num_strata(self) -> int:
        """Equal parts of the density of noise levels that a step's slots are spread over."""
        return self.data.global_batch if self.objective.stratified else 1

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.eval is not None and self.data.validation_fraction == 0:
            raise ValueError("eval needs held-out clips and data.validation_fraction is 0; raise it or set eval: null")
        if self.lora is None and self.checkpointing.policy == "selective":
            raise ValueError("checkpointing.policy: selective is for a LoRA beside a frozen base, and lora is null")
        kept = self.model.base_dtype != "auto" or self.model.stream_blocks is True or self.checkpointing.offload_inputs
        if self.lora is None and kept:
            raise ValueError(
                "model.base_dtype, model.stream_blocks, checkpointing.offload_inputs need a frozen base; lora is null"
            )
        if self.parallel.shard in ("full", "hybrid") and (is_quantised(self) or self.model.stream_blocks is True):
            raise ValueError(
                f"parallel.shard: {self.parallel.shard} and a base that is streamed or quantised: every process holds "
                "such a base by itself; set parallel.shard: none, or parallel.offload: true in place of stream_blocks"
            )
        if self.lora is not None and self.train is not None:
            raise ValueError("train is for lora: null; lora.targets says what a LoRA adapts")
        if self.lora is None and self.parallel.offload:
            raise ValueError("parallel.offload is for a frozen base, and lora is null")
        if self.lora is None and self.model.compile is True and self.parallel.shard in ("full", "hybrid"):
            raise ValueError("model.compile cannot follow the gathers of a sharded model that trains")
        if self.model.compile is True and self.lora is not None and self.lora.dropout:
            raise ValueError("model.compile cannot draw LoRA dropout; set lora.dropout: 0 or model.compile: false")
        if self.checkpoint.export == "best" and self.eval is None:
            raise ValueError("checkpoint.export: best needs the held-out loss, and eval is null")
        if self.optim.schedule != "constant" and self.optim.warmup_updates >= self.max_steps:
            raise ValueError(
                f"optim.warmup_updates {self.optim.warmup_updates} is not below max_steps {self.max_steps}"
            )
        return self


def is_quantised(config: TrainConfig) -> bool:
    """Whether the base is kept in fewer than 16 bits."""
    return config.model.base_dtype in ("fp8", "nf4")


def dataset_roots(config: DataConfig) -> tuple[str, ...]:
    """`data.root` as a tuple, whether it was given as one or as a list."""
    return (config.root,) if isinstance(config.root, str) else config.root


def check_folders(config: TrainConfig) -> None:
    """Raise UserError where a run would be within the source code, or a run and a dataset within each other."""
    output = Path(config.output).resolve()
    refuse_source_folder(output, "output")
    for root in dataset_roots(config.data):
        place = Path(root).resolve()
        if "://" not in root and (place.is_relative_to(output) or output.is_relative_to(place)):
            raise UserError(
                f"output {config.output} and data.root {root}: one is within the other",
                fix="give the run a folder beside the dataset",
            )


LATER_KEYS: dict[str, tuple[str, ...]] = {
    "data": ("weights",),
    "objective": ("sigma_min", "sigma_max", "stratified"),
    "optim": ("args",),
}
"""Keys that came after the first checkpoints: one at its default enters no identity, so that these are resumed."""


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides the numbers of a run, as JSON values.

    Left out is what may change between a stop and a resume: paths (weights are known by their digest), how often things
    are written, how the work is split (micro-batch, recomputation), and `max_steps` unless the schedule depends on it.
    """
    values: dict[str, Any] = config.model_dump(mode="json")
    identity = {name: values[name] for name in ("seed", "lora", "objective", "optim")}
    if config.lora is not None:
        del identity["lora"]["start_from"]  # a path; the checkpoint that a resume reads holds what became of it
    data = values["data"]
    moving = ("root", "revision", "cache", "micro_batch", "workers", "prefetch_steps", "read_timeout_seconds")
    identity["data"] = {name: value for name, value in data.items() if name not in moving}
    identity["model"] = {name: values["model"][name] for name in ("dims", "random_seed")}
    identity["precision"] = {
        name: values["precision"][name] for name in ("compute", "initial_scale", "scale_growth_updates")
    }
    for section, names in LATER_KEYS.items():
        for name in names:
            if identity[section][name] == _default(getattr(config, section), name):
                del identity[section][name]
    if config.train is not None:
        identity["train"] = values["train"]
    identity["schedule_steps"] = None if config.optim.schedule == "constant" else config.max_steps
    return identity


def _default(section: Config, name: str) -> Any:
    return type(section).model_fields[name].get_default(call_default_factory=True)


def check_split(config: TrainConfig, num_processes: int) -> None:
    """Raise UserError when no layout lets so many processes share a step's samples: before any of them is started."""
    fixed = config.parallel.ulysses
    heads = config.model.dims.num_heads if config.model.dims else None  # else the checkpoint says it, to the ranks
    fits = [n for n in range(1, num_processes + 1) if num_processes % n == 0 and (heads is None or heads % n == 0)]
    shares = fits if fixed == "auto" else [fixed]
    first: UserError | None = None
    for ulysses in shares:
        if num_processes % ulysses:
            raise UserError(
                f"parallel.ulysses: {ulysses} does not divide {num_processes} processes",
                expected="processes in groups of that many",
            )
        try:
            slots_per_rank(config.data, num_processes // ulysses)
        except UserError as error:
            first = first or error
        else:
            return
    if first is not None:
        raise first


def slots_per_rank(config: DataConfig, dp_size: int) -> int:
    """Slots of the global batch that each data-parallel process takes.

    Raises UserError, with the sizes that do, when the global batch does not divide by the processes or a process's
    share does not divide by the micro-batch.
    """
    batch = config.global_batch
    if batch % dp_size:
        fits = sorted({max(dp_size, batch // dp_size * dp_size), (batch // dp_size + 1) * dp_size})
        ranks = [size for size in range(1, batch + 1) if batch % size == 0]
        raise UserError(
            f"data.global_batch: {batch} does not divide by {dp_size} data-parallel processes",
            expected=f"a global batch of {' or '.join(map(str, fits))}, or {', '.join(map(str, ranks))} processes",
        )
    share = batch // dp_size
    if share % config.micro_batch:
        fits = [size for size in range(1, share + 1) if share % size == 0]
        raise UserError(
            f"data.micro_batch: {config.micro_batch} does not divide the {share} samples that each process takes",
            expected=f"a micro-batch of {', '.join(map(str, fits))}",
        )
    return share
