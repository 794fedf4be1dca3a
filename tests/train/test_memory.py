"""The planner's judge: our own model at real dimensions, on fake tensors with the flash operator."""

from __future__ import annotations

import json
from collections.abc import Collection

import bitsandbytes  # noqa: F401 - not for the first time among fake tensors
import pytest
import torch
import torch.distributed as dist
from fake_ranks import fake_group
from shards_data import write_dataset
from train_runs import make_config
from train_traces import InlineCopier, LiveBytes, Traffic, counted_flops, fake_model, fake_tensors, trace_step

from shards.errors import UserError
from shards.gpus import GPUS
from train.config.model import TI2V_5B, DiTConfig, LoRAConfig
from train.config.train import CheckpointingConfig, DataConfig, ModelConfig, TrainConfig
from train.device import available_memory, explained_out_of_memory
from train.estimate.flops import TRAFFIC, TRAFFIC_FORWARD, TRAFFIC_REPEATED, forward_flops, step_flops
from train.estimate.memory import AS_COMPUTED, BASES, BaseStore, Memory, step_memory
from train.estimate.saves import GIB, make_chooser, total_kept
from train.geometry import SAVE_GROUPS, Shape
from train.loop import fit
from train.model import stream
from train.model.dit import set_checkpointing
from train.model.quantise import quantised_weights
from train.parallel.ulysses import Ulysses
from train.recompute.runner import keep
from train.run import trainee

FEW = TI2V_5B.model_copy(update={"num_layers": 3})
"""Real blocks, three of them: each further one adds the same; the long tests take all thirty."""
LATENT_FRAMES = {17: 5, 49: 13, 121: 31}
EVERY_LINEAR = LoRAConfig(targets=("self_attn", "cross_attn", "ffn"))
LORAS = {
    "attention": LoRAConfig(),
    "every": EVERY_LINEAR,
}
POLICIES: dict[str, tuple[Collection[str], ...]] = {
    "none": (SAVE_GROUPS,) * 3,
    "attention + projections": (("attention", "projections"),) * 3,
    "attention": (("attention",),) * 3,
    "full": ((),) * 3,
    "mixed": ((), ("attention",), SAVE_GROUPS),
}


def measure(
    dims: DiTConfig,
    lora: LoRAConfig,
    saves: tuple[Collection[str], ...],
    size: tuple[int, int, int, int],
    *,
    image_first: bool = False,
    ulysses: Ulysses | None = None,
    store: BaseStore = AS_COMPUTED,
) -> int:
    """Peak bytes of a micro-step, beyond base, LoRA, gradients and optimizer; what is the host's left out."""
    with fake_tensors(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "make_copier", InlineCopier)
        model = fake_model(dims, lora, store=store)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.grad = torch.empty_like(weight)
        keep(model, lambda shape: saves, offload_inputs=store.offload_inputs)
        model.ulysses = ulysses
        with LiveBytes() as live:
            patch.setattr(stream, "host_like", lambda x: live.outside(torch.empty(x.shape, dtype=x.dtype)))
            trace_step(model, size, image_first=image_first)
    return live.peak


def predict(memory: Memory) -> int:
    """The same of the planner: the LoRA's copy in the compute dtype is made in the step."""
    return memory.saved + memory.transient + memory.inputs + memory.lora // 3


@pytest.mark.parametrize(
    ("frames", "policy", "targets"),
    [
        *((frames, policy, "attention") for frames in LATENT_FRAMES for policy in POLICIES),
        *((49, policy, "every") for policy in ("none", "full", "mixed")),
    ],
)
def test_peak_memory_is_the_planners(frames: int, policy: str, targets: str) -> None:
    size = (1, LATENT_FRAMES[frames], 44, 80)
    shape = Shape(1, LATENT_FRAMES[frames] * 22 * 40)
    measured = measure(FEW, LORAS[targets], POLICIES[policy], size)
    assert measured / predict(step_memory(FEW, shape, LORAS[targets], POLICIES[policy])) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("policy", ["none", "full", "mixed"])
def test_so_it_is_for_a_batch_and_image_to_video(policy: str) -> None:
    measured = measure(FEW, LoRAConfig(), POLICIES[policy], (2, 5, 30, 52), image_first=True)
    predicted = predict(step_memory(FEW, Shape(2, 5 * 15 * 26), LoRAConfig(), POLICIES[policy]))
    assert measured / predicted == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("ranks", "frames"), [(2, 49), (8, 121)])
def test_so_it_is_for_a_rank_of_several_that_share_a_sample(ranks: int, frames: int, policy: str) -> None:
    """By the tokens that it holds, and what other ranks sent; latents and velocities are whole on every rank."""
    tokens = LATENT_FRAMES[frames] * 22 * 40
    with fake_group(ranks):
        ulysses = Ulysses(dist.group.WORLD.group_name, ranks, 0)
        measured = measure(FEW, LoRAConfig(), POLICIES[policy], (1, LATENT_FRAMES[frames], 44, 80), ulysses=ulysses)
    shape = Shape(1, ulysses.num_held(tokens))
    predicted = predict(step_memory(FEW, shape, LoRAConfig(), POLICIES[policy], ulysses=ranks))
    assert measured / predicted == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("policy", "gigabytes"), [("none", 12.0), ("attention", 14.2), ("full", 15.5)])
def test_a_block_moves_little_between_its_gemms(policy: str, gigabytes: float) -> None:
    """In 16 bits at 1280×704×49; all thirty come to 359 GB a micro-step where everything is kept."""
    saves = POLICIES[policy][0]

    def traffic(num_layers: int) -> int:
        with fake_tensors():
            model = fake_model(FEW.model_copy(update={"num_layers": num_layers}), LoRAConfig())
            keep(model, lambda shape: (saves,) * num_layers)
            with Traffic() as counted:
                trace_step(model, (1, 13, 44, 80))
        return counted.between()

    two = traffic(2)
    block = traffic(3) - two
    assert block < gigabytes * 1e9
    assert policy != "none" or two + 28 * block < 380e9
    # The planner's figures are these.
    repeated = sum(TRAFFIC_REPEATED[group] for group in SAVE_GROUPS if group not in saves)
    moved = (TRAFFIC + repeated) * 11_440 * FEW.dim
    assert moved / block == pytest.approx(1, abs=0.02)


def test_so_does_a_block_without_gradients() -> None:
    def traffic(num_layers: int) -> int:
        with fake_tensors(), torch.no_grad():
            model = fake_model(FEW.model_copy(update={"num_layers": num_layers}), LoRAConfig())
            keep(model, "full")
            flags = torch.empty(1, dtype=torch.bool)
            flags.any = lambda: False  # type: ignore[method-assign]  # a fake tensor has no value to ask for
            text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
            with Traffic() as counted:
                model(torch.empty(1, 48, 13, 44, 80), torch.empty(1), flags, text)
        return counted.between()

    assert TRAFFIC_FORWARD * 11_440 * FEW.dim / (traffic(3) - traffic(2)) == pytest.approx(1, abs=0.02)


STORES = {name: store for name, store in BASES.items() if store != AS_COMPUTED}


@pytest.mark.parametrize(
    ("store", "policy", "targets"),
    [
        *((store, "full", "attention") for store in STORES),
        *(("fp8", policy, "every") for policy in ("none", "mixed")),
        *(("16 bit, streamed, inputs offloaded", policy, "every") for policy in ("attention", "mixed")),
    ],
)
def test_so_it_is_however_the_base_is_kept(store: str, policy: str, targets: str) -> None:
    kept, shape = STORES[store], Shape(1, 5_070)
    measured = measure(FEW, LORAS[targets], POLICIES[policy], (1, 13, 30, 52), store=kept)
    predicted = predict(step_memory(FEW, shape, LORAS[targets], POLICIES[policy], store=kept))
    assert measured / predicted == pytest.approx(1, abs=0.01)


def test_the_base_itself_takes_what_was_planned() -> None:
    for store in BASES.values():
        with fake_tensors():
            model = fake_model(FEW, LoRAConfig(), store=store)
            held = {w.untyped_storage() for n, w in model.named_parameters() if ".lora_" not in n and not w.is_meta}
            held |= {t.untyped_storage() for q in quantised_weights(model).values() for t in (q.codes, q.scales)}
            if model.stream is not None:
                held = {s for s in held if s not in {buffer.untyped_storage() for buffer in model.stream.host}}
                held |= {slot.untyped_storage() for slot in model.stream.slots}
            planned = step_memory(FEW, Shape(1, 5_070), LoRAConfig(), ((),) * 3, store=store).base
            assert sum(storage.nbytes() for storage in held) / planned == pytest.approx(1, abs=1e-4), store


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most_gib"),
    [("fp8", 8.8), ("nf4", 6.7), ("16 bit, streamed", 4.7), ("16 bit, streamed, inputs offloaded", 3.0)],
)
def test_thirty_blocks_of_49_frames_at_832x480_fit_small_cards(name: str, most_gib: float) -> None:
    """Rank 16, 8-bit AdamW, every block recomputed: traced, beside what the formula says."""
    shape, lora, saves, store = Shape(1, 5_070), LoRAConfig(rank=16), ((),) * 30, BASES[name]
    memory = step_memory(TI2V_5B, shape, lora, saves, store=store, optimizer_bytes=2.1)
    traced = measure(TI2V_5B, lora, saves, (1, 13, 30, 52), store=store) - predict(memory) + memory.total
    assert traced / memory.total == pytest.approx(1, abs=0.03)
    assert traced <= most_gib * GIB


@pytest.mark.parametrize(
    ("frames", "policy", "targets"),
    [
        *((frames, policy, "attention") for frames in LATENT_FRAMES for policy in POLICIES),
        *((49, policy, "every") for policy in ("none", "full", "mixed")),
    ],
)
def test_flops_are_the_formulas(frames: int, policy: str, targets: str) -> None:
    shape = Shape(1, LATENT_FRAMES[frames] * 22 * 40)
    with fake_tensors():
        model = fake_model(FEW, LORAS[targets])
        keep(model, lambda shape: POLICIES[policy])
        with counted_flops() as counter:
            trace_step(model, (1, LATENT_FRAMES[frames], 44, 80))
    formula = step_flops(FEW, shape, LORAS[targets], POLICIES[policy])
    assert counter.get_total_flops() / formula == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "tflop"), [(17, (47.4, 106.5, 153.9)), (49, (151.9, 379.8, 531.7))])
def test_table_1_by_counting(frames: int, tflop: tuple[float, float, float]) -> None:
    """The plain twin, thirty blocks, LoRA on all ten linears: forward, step, step with every block run twice."""
    size = (1, LATENT_FRAMES[frames], 44, 80)
    counted = []
    for mode in ("none", "full"):
        with fake_tensors():
            model = fake_model(TI2V_5B, EVERY_LINEAR)
            set_checkpointing(model, mode)
            with counted_flops() as counter:
                trace_step(model, size)
        counted.append(counter.get_total_flops() / 1e12)
    assert counted == pytest.approx(tflop[1:], rel=0.005)
    forward = forward_flops(TI2V_5B, Shape(1, size[1] * 22 * 40), EVERY_LINEAR) / 1e12
    assert forward == pytest.approx(tflop[0], rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["v100-32gb", "rtx4090", "a100-40gb"])
def test_auto_lands_where_the_planner_said(gpu: str) -> None:
    """Thirty blocks of 49 frames: the mix that was chosen for a card takes what it was chosen by."""
    limit, shape, lora = int(GPUS[gpu].memory_gib * GIB), Shape(1, 11_440), LoRAConfig()
    config = TrainConfig(output="run", max_steps=1, model=ModelConfig(dims=TI2V_5B), data=DataConfig(root="shards"))
    saves = make_chooser(config, TI2V_5B, device_bytes=limit)(shape)
    assert len(set(saves)) == 2
    memory = step_memory(TI2V_5B, shape, lora, saves)
    measured = measure(TI2V_5B, lora, saves, (1, 13, 44, 80)) - predict(memory) + memory.total
    assert measured / memory.total == pytest.approx(1, abs=0.005)
    assert measured <= limit


@pytest.mark.slow
def test_selective_keeps_what_its_budget_says() -> None:
    shape, budget = Shape(1, 11_440), CheckpointingConfig(policy="selective", budget_gib=12.0)
    config = TrainConfig(
        output="run",
        max_steps=1,
        model=ModelConfig(dims=TI2V_5B),
        data=DataConfig(root="shards"),
        checkpointing=budget,
    )
    saves = make_chooser(config, TI2V_5B, device_bytes=None)(shape)
    saved = total_kept(TI2V_5B, shape, LoRAConfig(), saves)
    full = total_kept(TI2V_5B, shape, LoRAConfig(), ((),) * 30)
    size = (1, 13, 44, 80)
    growth = measure(TI2V_5B, LoRAConfig(), saves, size) - measure(TI2V_5B, LoRAConfig(), ((),) * 30, size)
    assert saved <= 12 * GIB < saved + 0.3 * GIB
    assert growth / (saved - full) == pytest.approx(1, abs=0.08)  # the last block's working set is its own


class OneGpu:
    """A GPU of 24 GiB as `torch.cuda` reports it; another process holds `others`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_gib: float, own_gib: float = 0.0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB), 24 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(own_gib * GIB))


@pytest.mark.parametrize(
    ("free", "own", "available"), [(23.4, 0, 24), (13.0, 0, 13.75), (2.0, 11.0, 13.75), (24, 0, 24)]
)
def test_auto_plans_with_what_is_free_and_not_with_the_cards_total(monkeypatch, free, own, available) -> None:
    """What another process holds is not there; what this one holds already is, and so is its context."""
    OneGpu(monkeypatch, free, own)
    assert available_memory(torch.device("cuda:0")) == available * GIB
    assert available_memory(torch.device("cpu")) is None


def test_the_least_of_all_ranks_decides_and_is_recorded(tmp_path, monkeypatch) -> None:
    """`fit` resolves it once, hands it to every part of the run, and writes it into the events."""
    root = tmp_path / "shards"
    write_dataset(root)
    monkeypatch.setattr("train.loop.available_memory", lambda device: 20 * GIB)
    monkeypatch.setattr("train.loop.smallest", lambda world, own: own - 8 * GIB)  # another rank has less
    given = []
    real = trainee.choose_policy
    monkeypatch.setattr(trainee, "choose_policy", lambda *arguments: given.append(arguments[2]) or real(*arguments))
    config = make_config(root, tmp_path / "run", max_steps=1)
    fit(config)
    assert given == [12 * GIB]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert next(event for event in events if event["event"] == "device")["available_gib"] == 12.0


def test_out_of_memory_says_by_how_much_and_what_to_set(monkeypatch) -> None:
    OneGpu(monkeypatch, 0.4, 14.0)
    settings = {"checkpointing.policy": "none", "data.micro_batch": 2}
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 24.00 GiB"
    with pytest.raises(UserError) as caught, explained_out_of_memory(torch.device("cuda:0"), settings):
        raise torch.OutOfMemoryError(text)
    message = str(caught.value)
    for words in (
        "2.50 GiB more were needed",
        "0.40 GiB of 24.00 were free",
        "this process holds 14.00",
        "they hold 8.85 GiB",
        "checkpointing.policy=auto (it is none)",
        "data.micro_batch=1 (it is 2)",
    ):
        assert words in message, message
    settings = {"checkpointing.policy": "auto", "data.micro_batch": 1}
    with pytest.raises(UserError, match="policy=full"), explained_out_of_memory(torch.device("cuda:0"), settings):
        raise torch.OutOfMemoryError("something else")


def test_a_run_that_runs_out_of_memory_ends_with_that_error(tmp_path, monkeypatch) -> None:
    write_dataset(tmp_path / "shards")

    def backward(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")

    monkeypatch.setattr("train.loop.backward", backward)
    with pytest.raises(UserError, match=r"512\.00 MiB more were needed"):
        fit(make_config(tmp_path / "shards", tmp_path / "run", max_steps=1))
