"""A streamed base gives the bits of a resident one, whatever is recomputed, and however late its blocks come."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from streamed import DIMS, LORA, LatestCopier, late_copier, late_copies, make_placed, passes, same
from torch import Tensor
from train_runs import DIMS as DIMS_OF_RUNS
from train_runs import checkpoint_bytes, finish, make_config, read_metrics

from shards.console import set_up_logging
from shards.errors import UserError
from train.config.model import LoRAConfig
from train.estimate import communication
from train.loop import fit
from train.lora.lora import inject
from train.model.dit import build_model, set_checkpointing
from train.model.stream import BlockStream, Copier, HostInput

LATE = LoRAConfig(rank=4, targets=("blocks.2.cross_attn.k", "blocks.3.ffn.2"))


def resident(lora: LoRAConfig, dtype: torch.dtype, saves: Any = "none") -> list[Tensor]:
    model = build_model(DIMS, dtype, seed=0)
    inject(model, lora, 0)
    return passes(finish(model, saves))


def streamed(make: Any, lora: LoRAConfig, dtype: torch.dtype, saves: Any = "none", **options: Any) -> list[Tensor]:
    with late_copies(make):
        return passes(finish(make_placed(DIMS, lora, dtype, streamed=True), saves, **options))


@pytest.mark.parametrize("offload_inputs", [False, True])
@pytest.mark.parametrize(
    ("dtype", "lora"),
    [(torch.float32, LORA), (torch.bfloat16, LORA.model_copy(update={"dropout": 0.3})), (torch.float16, LATE)],
)
def test_a_streamed_base_gives_the_bits_of_a_resident_one(dtype, lora, offload_inputs) -> None:
    """Forward, gradients over two micro-steps and evaluations between, under every recompute policy."""
    exact = resident(lora, dtype)
    assert all(bool(x.isfinite().all()) for x in exact)
    mixed = [(), ("attention",), ("projections", "ffn_up"), ()]
    for make, saves in ((LatestCopier, "none"), (LatestCopier, "full"), (late_copier, lambda shape: mixed)):
        assert same(streamed(make, lora, dtype, saves, offload_inputs=offload_inputs), exact)


def test_two_blocks_are_resident_and_none_is_copied_twice() -> None:
    """2 (n − 2) copies a micro-step: the backward pass begins with the blocks that are there, and so does the next."""
    copies: list[int] = []
    model = finish(make_placed(DIMS, LORA, streamed=True), "full")
    assert model.stream is not None
    buffers = {buffer.data_ptr(): index for index, buffer in enumerate(model.stream.host)}
    copier = model.stream._copier
    plain = copier.copy
    copier.copy = lambda target, source: copies.append(buffers[source.data_ptr()]) or plain(target, source)
    arguments = (torch.randn(1, 48, 1, 4, 4), torch.tensor([500.0]), torch.tensor([False]), torch.randn(1, 16, 32))
    for _ in range(2):
        model(*arguments).sum().backward()
    assert copies == [0, 1, 2, 3, 1, 0, 2, 3, 1, 0]
    copies.clear()
    with torch.no_grad():
        model(*arguments)
        model(*arguments)
    assert copies == [2, 3, 0, 1, 2, 3, 0]
    held = sum(slot.numel() for slot in model.stream.slots)
    frozen = sum(t.numel() * t.element_size() for t in model.stream._tensors[0])
    assert 2 * frozen <= held < 2 * frozen + 2 * 256 * len(model.stream._tensors[0])


def no_wait_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(self: BlockStream, index: int, following: int | None) -> None:
        if len(copied) > 1:
            self._pending = [None, None]
        copied.append(index)
        plain(self, index, following)

    plain, copied = BlockStream.enter, []
    monkeypatch.setattr(BlockStream, "enter", enter)


def no_arrival_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockStream, "backward", lambda self, index, first: None)


def no_arrival_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockStream, "forward", lambda self, index: None)


def fetched_into_the_slot_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that does not wait for what is computed from its target."""

    def enter(self: BlockStream, index: int, following: int | None) -> None:
        plain(self, index, following)
        if following is not None and following not in self._held:
            raise AssertionError
        self._copier.copy(self.slots[self._last], self.host[self._held[self._last]])

    plain = BlockStream.enter
    monkeypatch.setattr(BlockStream, "enter", enter)


def no_wait_for_an_input_on_its_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostInput, "leave", lambda self: setattr(self, "_device", None))


def no_wait_for_an_input_on_its_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: HostInput) -> Tensor:
        self.fetch()
        x, self._device = self._device, None
        assert x is not None
        return x

    monkeypatch.setattr(HostInput, "take", take)


@pytest.mark.parametrize(
    "without",
    [
        no_wait_for_a_block,
        no_arrival_backward,
        no_arrival_forward,
        fetched_into_the_slot_in_use,
        no_wait_for_an_input_on_its_way_out,
        no_wait_for_an_input_on_its_way_in,
    ],
)
def test_without_any_one_wait_it_does_not(monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    without(monkeypatch)
    with late_copies(LatestCopier):
        model = finish(make_placed(DIMS, LORA, streamed=True), "full", offload_inputs=True)
        assert not same(passes(model), resident(LORA, torch.float32))


def test_autograd_never_keeps_what_is_streamed() -> None:
    model = make_placed(DIMS, LORA, streamed=True)
    arguments = (torch.randn(1, 48, 1, 4, 4), torch.tensor([500.0]), torch.tensor([False]), torch.randn(1, 16, 32))
    with pytest.raises(ValueError, match="autograd would keep"):
        model(*arguments)
    set_checkpointing(model, "full")
    with pytest.raises(ValueError, match="autograd would keep"):
        model(*arguments)
    with torch.no_grad():
        assert bool(model(*arguments).isfinite().all())


class Queues:
    """CUDA's streams: each does its own work in order; between them chance decides, but for the events."""

    def __init__(self) -> None:
        self.work: dict[str, list[tuple[Any, int | None]]] = {"compute": [], "copies": []}
        self.current = "compute"
        self.done: set[int] = set()
        self.events = itertools.count()

    def add(self, function: Any, after: int | None = None) -> None:
        self.work[self.current].append((function, after))

    def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while any(self.work.values()):
            names = [name for name, items in self.work.items() if items]
            name = chance.choice([name for name in names if self.work[name][0][1] in (None, *self.done)])
            self.work[name].pop(0)[0]()


class FakeStream:
    """Of `torch.cuda.Stream` what the copier uses."""

    def __init__(self, queues: Queues, name: str) -> None:
        self.queues, self.name = queues, name

    def record_event(self) -> int:
        number = next(self.queues.events)
        self.queues.work[self.name].append((lambda: self.queues.done.add(number), None))
        return number

    def wait_event(self, number: int) -> None:
        self.queues.work[self.name].append((lambda: None, number))

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


class FakeBuffer:
    """Memory that a copy fills late."""

    def __init__(self, queues: Queues, value: int | None = None) -> None:
        self.queues, self.value = queues, value

    def copy_(self, source: FakeBuffer, non_blocking: bool) -> None:
        assert non_blocking
        self.queues.add(lambda: setattr(self, "value", None))
        self.queues.add(lambda: setattr(self, "value", source.value))


def simulated(monkeypatch: pytest.MonkeyPatch, seed: int) -> bool:
    """Whether every block of two micro-steps found its own weights, at its beginning and at its end."""
    queues = Queues()

    @contextmanager
    def inside(chosen: FakeStream) -> Iterator[None]:
        before, queues.current = queues.current, chosen.name
        yield
        queues.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(queues, "copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(queues, queues.current))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    blocks = BlockStream(build_model(DIMS, device="meta").blocks, torch.device("cpu"))
    blocks._copier = Copier(torch.device("cuda", 0))
    blocks.slots = [FakeBuffer(queues) for _ in range(2)]  # type: ignore[misc]
    blocks.host = [FakeBuffer(queues, index) for index in range(4)]  # type: ignore[misc]
    monkeypatch.setattr(blocks, "_point", lambda index, views: None)
    found: list[tuple[int, int | None]] = []

    def compute(index: int) -> None:
        slot = blocks.slots[blocks._last]
        for _ in range(2):
            queues.add(lambda: found.append((index, slot.value)))

    for _ in range(2):
        for index in range(4):
            blocks.forward(index)
            compute(index)
        for index in reversed(range(4)):
            blocks.backward(index, 0)
            compute(index)
    queues.run(seed)
    return len(found) == 32 and all(index == value for index, value in found)


@pytest.mark.parametrize("without", ["nothing", "wait_event", "wait_stream"])
def test_the_order_of_cuda_streams_is_held_by_both_waits(monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    """The copier's CUDA body on simulated streams: right under every order, and wrong under some without either."""
    if without != "nothing":
        monkeypatch.setattr(FakeStream, without, lambda self, other: None)
    right = [simulated(monkeypatch, seed) for seed in range(20)]
    assert all(right) if without == "nothing" else not all(right)


def test_a_card_that_is_too_small_streams_by_itself(tiny_shards, tmp_path, monkeypatch) -> None:
    """`auto` takes what fits: the layout says so, the run's plan too, and its losses are those of a resident base."""
    plain = make_config(tiny_shards, tmp_path / "plain", max_steps=3)
    fit(plain)
    monkeypatch.setattr("train.loop.available_memory", lambda device: 1 << 40)
    monkeypatch.setattr(communication, "_least_memory", lambda c, d, mesh, *rest: (1 << 41) - mesh.streamed * (1 << 41))
    set_up_logging(terminal=False)
    with late_copies():
        fit(make_config(tiny_shards, tmp_path / "auto", max_steps=3))
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "auto")
    assert checkpoint_bytes(tmp_path / "plain", 3) == checkpoint_bytes(tmp_path / "auto", 3)
    assert "blocks streamed" in (tmp_path / "auto" / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": None, "model__stream_blocks": True}, "lora is null"),
        ({"lora": None, "checkpointing": {"offload_inputs": True}}, "lora is null"),
        ({"lora": None, "model__base_dtype": "fp8"}, "lora is null"),
        ({"parallel": {"shard": "full"}, "model__stream_blocks": True}, "parallel.shard: full"),
        ({"parallel": {"shard": "hybrid"}, "model__base_dtype": "nf4"}, "parallel.shard: hybrid"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    changes = {"model": {"dims": DIMS_OF_RUNS}} | changes
    with pytest.raises(UserError, match=words):
        make_config("shards", "run", **changes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own, inside Inductor
@pytest.mark.parametrize("kind", [None, "fp8", "nf4"])
def test_compiled_blocks_are_streamed_without_a_graph_more(kind: str | None) -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    results = []
    for streams in (False, True):
        dynamo.reset()
        counters.clear()
        with late_copies():
            model = make_placed(DIMS, LORA, kind=kind, streamed=streams)
            results.append(passes(finish(model, "full", compiled=True, offload_inputs=streams)))
        assert not counters["graph_break"]
        results[-1].append(torch.tensor(counters["stats"]["unique_graphs"]))
    assert same(*results)
