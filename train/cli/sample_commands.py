"""What a LoRA learnt: `wantrain sample` makes latents of prompts, `wantrain evaluate` compares held-out losses."""

from __future__ import annotations

import contextlib
import functools
import operator
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import Field, model_validator

from shards.config import Config, load_config
from shards.console import LOG, counted, echo_lines, print_json, set_up_logging
from shards.errors import UserError
from train.config.sampling import Prompt, SamplerConfig, refuse_twice
from train.config.train import BaseModelConfig, ComputeConfig, ModelConfig

if TYPE_CHECKING:
    from train.evaluate import Evaluation
    from train.model.dit import WanDiT


class SampleDataConfig(Config):
    """The dataset that prompts with a `key` come from."""

    root: str | tuple[str, ...]
    """Folder or `s3://bucket/prefix` of shards, or a list of several."""
    text_set: str = "default"
    """Which set of captions."""


class SampleRun(Config):
    """`wantrain sample`: prompts, model, solver."""

    output: str
    """Folder of the latents, NAME.safetensors each."""
    model: BaseModelConfig
    lora: str | None = None
    """A LoRA file of any tool, a run or a checkpoint; null: the base alone."""
    lora_scale: float = 1.0
    """Strength of the LoRA, on top of its own scale."""
    data: SampleDataConfig | None = None
    """The dataset, needed by prompts with a `key`."""
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]
    """What to sample."""
    sampler: SamplerConfig = SamplerConfig()
    """Solver, steps and guidance."""
    precision: ComputeConfig = ComputeConfig()
    """Precision and device."""

    @model_validator(mode="after")
    def _named(self) -> SampleRun:
        refuse_twice(self.prompts)
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"lora_scale: {self.lora_scale:g} scales a LoRA, and lora is null")
        return self


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: -o sampler.steps=20")
@click.option(
    "--compare",
    is_flag=True,
    help="Sample without and with the LoRA (of a run: each checkpoint), from the same noise and first frames.",
)
def sample(config: Path, overrides: tuple[str, ...], compare: bool) -> None:
    """Make a latent for each prompt of CONFIG, as Wan2.2 does. `wanprep decode` makes videos of the latents.

    \b
    wantrain sample configs/demo/sample.yaml
    wantrain sample configs/demo/sample.yaml -o lora=null -o output=demo/samples-base
    wantrain sample configs/demo/sample.yaml --compare -o output=demo/compared
    """
    loaded = load_config(SampleRun, config, overrides)
    set_up_logging()
    LOG.info("loading torch")
    for path in sample_run(loaded, compare=compare):
        click.echo(str(path))
    if compare:
        watch = f"wanprep decode --watch {shlex.quote(loaded.output)} --once -c PREP.yaml"
        click.echo(f"`{watch}` makes one sheet and one video of them")


def sample_run(config: SampleRun, *, compare: bool = False) -> list[Path]:
    """Load the model, its LoRA and the prompts, and write the latents. Raises UserError before any step is taken.

    Args:
        compare: into OUTPUT/samples/{base, lora or step-N}/NAME.safetensors, which `wanprep decode --watch` compares.
    """
    from shards.read.dataset import open_dataset
    from train.checkpoint import recorded_overflows
    from train.lora.formats import read_lora
    from train.lora.lora import attach_lora, detach
    from train.model.load import read_dit_config
    from train.run.session import determinism
    from train.sampling.sample import prepare_prompts, sample_prompts

    if compare and config.lora is None:
        raise UserError(
            "--compare: lora is null", expected="lora: a LoRA file, a run or a checkpoint, to compare with the base"
        )
    dims = config.model.dims or read_dit_config(str(config.model.checkpoint))
    dataset = None
    if config.data is not None:
        roots = (config.data.root,) if isinstance(config.data.root, str) else config.data.root
        LOG.info("opening the dataset: %s", ", ".join(roots))
        dataset = open_dataset(roots, config.data.text_set)
    ready = prepare_prompts(config.prompts, config.sampler, dims, dataset)
    # Read first: a wrong file is reported before twenty gigabytes are loaded.
    files = {} if config.lora is None else _loras(Path(config.lora), compare)
    loras = {name: read_lora(file) for name, file in files.items()}
    overflows = [recorded_overflows(file) for file in files.values()]
    made, out = [], Path(config.output)
    with determinism(config.precision.deterministic):
        model = load_base(config.model, config.precision, overflows)
        if compare:
            made += sample_prompts(model, ready, config.sampler, out / "samples" / "base")
        elif not loras:
            made += sample_prompts(model, ready, config.sampler, out)
        for name, lora in loras.items():
            attach_lora(model, lora, config.lora_scale)
            made += sample_prompts(model, ready, config.sampler, out / "samples" / name if compare else out)
            detach(model)
    return made


def _loras(source: Path, compare: bool) -> dict[str, Path]:
    """LoRA files by the folder that their latents go to: of a run that is compared, one a checkpoint."""
    from train.checkpoint import find_checkpoints
    from train.lora.export import locate_lora

    checkpoints = find_checkpoints(source / "checkpoints") if compare else []
    return {folder.name: locate_lora(folder)[0] for folder in checkpoints} or {"lora": locate_lora(source)[0]}


def load_base(config: BaseModelConfig, precision: ComputeConfig, overflows: Iterable[Mapping[str, int]] = ()) -> WanDiT:
    """The base model in inference mode, on the configured device; as a run keeps it where `config` is a run's.

    Args:
        overflows: of checkpoints that will be put into it. What their runs folded into a block is folded, at most.
    """
    from train.checkpoint import recorded_overflows
    from train.device import choose_device, device_info
    from train.model.dit import build_model, init_random
    from train.model.load import load_dit, read_dit_config
    from train.model.stream import place_base
    from train.precision import DTYPES, fold_overflows, resolve_precision

    device = choose_device(precision.device)
    dtype = resolve_precision(precision.compute, device_info(device)).dtype
    dims = config.dims or read_dit_config(str(config.checkpoint))
    LOG.info("loading the base: %s", config.checkpoint or f"random weights, seed {config.random_seed}")
    seed = config.random_seed if config.checkpoint is None else None
    stored, streamed = "auto", False
    if isinstance(config, ModelConfig):
        stored, streamed = config.base_dtype, config.stream_blocks is True
    kept: Any = stored
    kind, param_dtype = kept if kept in ("fp8", "nf4") else None, DTYPES.get(kept, dtype)
    if kind is None and not streamed:
        model = build_model(dims, dtype, device, param_dtype=param_dtype, seed=seed)
    else:
        model = build_model(dims, dtype, "meta", param_dtype=param_dtype)
        model.stream = place_base(model, device, kind, streamed=streamed)
        if seed is not None:
            init_random(model, seed)
    if config.checkpoint is not None:
        load_dit(model, config.checkpoint)
        overflows = [*overflows, recorded_overflows(Path(config.checkpoint))]  # a fully trained model's own
    fold_overflows(model, functools.reduce(operator.or_, map(Counter, overflows), Counter()))  # the most of each
    return model.eval()


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("dataset", required=False)
@click.option(
    "--against", type=click.Path(path_type=Path), help="Also a second LoRA or model, with the same clips and noise."
)
@click.option("-c", "--config", type=click.Path(path_type=Path), help="Config of `wantrain fit`.  [default: the run's]")
@click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: -o eval.num_clips=64")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def evaluate(
    source: Path, dataset: str | None, against: Path | None, config: Path | None, overrides: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Print the held-out loss with and without SOURCE.

    SOURCE is a run, a LoRA file of any tool, or a model with a merged LoRA. The loss is shown by noise level, for
    text-to-video and image-to-video, with 95 % intervals over clips. The base, the precision and the choice of held-out
    clips are those of the run, or of --config. DATASET replaces the data.root there.

    \b
    wantrain evaluate demo/run
    wantrain evaluate demo/run demo/shards --against theirs.safetensors
    wantrain evaluate theirs.safetensors demo/shards -c configs/demo/train.yaml -o eval.num_clips=64 --json
    """
    set_up_logging()
    LOG.info("loading torch")
    evaluation = evaluate_models(source, dataset, against, config, overrides)
    if as_json:
        print_json(evaluation.as_dict())
    else:
        echo_lines(evaluation.lines())


def evaluate_models(
    source: Path, root: str | None, against: Path | None, config: Path | None, overrides: tuple[str, ...] = ()
) -> Evaluation:
    """The held-out loss of the base, of `source` and of `against`, on the same clips and draws."""
    from train.checkpoint import PIN_FILE, read_pin, recorded_overflows
    from train.config.train import EvalConfig, TrainConfig, dataset_roots
    from train.data.loader import select_samples
    from train.data.open import open_data
    from train.evaluate import Evaluation, Evaluator, choose_held_out
    from train.lora.export import locate_lora
    from train.lora.formats import read_lora
    from train.lora.lora import attach_lora, detach
    from train.objective import sigma_density

    # A run's folder, or that of the run that a checkpoint or its file lies in.
    around = (source, *source.resolve().parents[:3])
    run = next((at for at in around if (at / PIN_FILE).is_file() and (at / "config.yaml").is_file()), None)
    if config is None and run is None:
        raise UserError(
            f"{source}: not in the folder of a run, so the base model and the settings are not known",
            fix="add -c TRAIN.yaml, the config of `wantrain fit` that has them",
        )
    loaded = load_config(TrainConfig, config or Path(str(run)) / "config.yaml", overrides)
    pin = None if run is None or config is not None else read_pin(run)
    if root is not None and tuple(Path(one).resolve() for one in dataset_roots(loaded.data)) != (Path(root).resolve(),):
        data = loaded.data.model_copy(update={"root": root, "revision": None})
        loaded, pin = loaded.model_copy(update={"data": data}), None
    opened, settings = open_data(loaded, pin), loaded.eval or EvalConfig()
    plain = loaded.data.model_copy(update={"weights": {}})  # held-out clips have none, and another dataset's globs
    held_out = choose_held_out(opened, select_samples(opened, plain)[1], settings)
    # Read first: a wrong file is reported before twenty gigabytes are loaded.
    loras = {path: None if _model_in(path) else read_lora(locate_lora(path)[0]) for path in (source, against) if path}

    def take(model: WanDiT, name: str) -> Any:
        LOG.info("evaluating %s on %s", name, counted(len(held_out), "clip"))
        device, density = model.patch_embedding.weight.device, sigma_density(loaded.objective)
        evaluator = Evaluator(opened, held_out, settings, loaded.data, density, model.config.text_len, device)
        with contextlib.closing(evaluator):
            return evaluator.take(model)

    overflows = [recorded_overflows(path) for path in loras]
    model = load_base(loaded.model, loaded.precision, overflows)
    results = {"the base": take(model, "the base")}
    for path, lora in loras.items():
        if lora is not None:
            attach_lora(model, lora)
            results[str(path)] = take(model, str(path))
            detach(model)
    for path, lora in loras.items():
        if lora is None:
            merged = loaded.model.model_copy(update={"checkpoint": str(_model_in(path))})
            del model
            model = load_base(merged, loaded.precision, overflows)
            results[str(path)] = take(model, str(path))
    return Evaluation(", ".join(dataset_roots(loaded.data)), opened.revision, results)


def _model_in(path: Path) -> Path | None:
    """The checkpoint of a complete model that a path means; None for a LoRA."""
    from train.checkpoint import MODEL_FILE
    from train.model.load import find_tensors

    for place in (path, path / MODEL_FILE):
        try:
            if "patch_embedding.weight" in find_tensors(place):
                return place
        except UserError:  # no checkpoint here; what else it is, `locate_lora` says
            continue
    return None
