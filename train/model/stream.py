"""Frozen blocks in the host's memory, brought to the device ahead of their turn; two are resident at a time.

    compute   | block 0      | block 1      | block 2      |  …  and in the backward pass the other way
    copier    | 1 → slot B   | 2 → slot A   | 3 → slot B   |

A copy begins when everything issued before it is computed, so that nothing reads its target any more or is still
writing its source; what is computed after a wait sees the copy complete. Bytes are copied, so a streamed base gives
the numbers of a resident one to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.model.block import Linear
from train.model.quantise import Kind, Quantised, empty_quantised

ALIGNMENT = 256
"""Bytes: where a tensor may begin in a block's buffer."""


class Copier:
    """Copies between host and device beside the computation: by a CUDA stream and events, on a CPU by a thread."""

    def __init__(self, device: torch.device, delay: Callable[[], None] = lambda: None) -> None:
        """`delay` is called by the CPU's thread ahead of each copy: tests and benchmarks sleep in it."""
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "copier") if self._stream is None else None
        self._delay = delay

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Begin a copy once all that was issued so far is computed; the source must live until it was waited for."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                return self._stream.record_event()
        # Until it is done the target holds what no GPU would warn of: NaN, in every floating-point type.
        target.view(torch.uint8).fill_(255)
        return cast(ThreadPoolExecutor, self._thread).submit(_copy_late, target, weakref.ref(source), self._delay)

    def wait(self, done: Any) -> None:
        """Let what is issued from here on see that copy complete."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        else:
            finished: Future[None] = done
            finished.result()


def _copy_late(target: Tensor, reference: weakref.ref[Tensor], delay: Callable[[], None]) -> None:
    delay()
    source = reference()  # as on a GPU a source that was given up early is another tensor's memory by now
    if source is not None:
        with torch.no_grad():
            target.copy_(source)


make_copier: Callable[[torch.device], Copier] = Copier


class BlockStream:
    """The blocks' frozen tensors: where they are kept, and which two blocks are on the device."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Allocate the frozen tensors of blocks that were built on `meta`; their numbers are unset afterwards."""
        self._copier = make_copier(device)
        layout = _layout(list(_frozen(blocks[0])))
        size = layout[-1][1] if layout else 0
        self.host = [_host_bytes(size, device) for _ in blocks]
        """One buffer a block, pinned where the device is a GPU."""
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        """The two that are resident."""
        self._tensors: list[list[Tensor]] = []
        for block, buffer in zip(blocks, self.host, strict=True):
            places = list(_frozen(block))
            if _layout(places) != layout:
                raise ValueError("blocks of one model must be alike to be streamed")
            self._tensors.append(
                [put(view) for (_, put), view in zip(places, _views(buffer, layout, places), strict=True)]
            )
        like = list(_frozen(blocks[0]))
        self.host_views = [_views(buffer, layout, like) for buffer in self.host]
        self._slot_views = [_views(buffer, layout, like) for buffer in self.slots]
        self._held: list[int | None] = [None, None]
        self._pending: list[Any] = [None, None]
        self._last = 1

    def forward(self, index: int) -> None:
        """Ahead of a block's forward pass. The backward pass begins with the two last blocks, which stay."""
        following = index + 1 if index + 1 < len(self.host) else None if torch.is_grad_enabled() else 0
        self.enter(index, following)

    def backward(self, index: int, first: int) -> None:
        """Ahead of a block's backward pass, which ends at block `first`; the next forward pass begins with block 0."""
        self.enter(index, index - 1 if index > first else 0)

    def enter(self, index: int, following: int | None) -> None:
        """Let what is issued from here on find a block's tensors on the device, and fetch another block's meanwhile."""
        if index not in self._held:
            self._fetch(index, 1 - self._last)
        slot = self._last = self._held.index(index)
        if self._pending[slot] is not None:
            self._copier.wait(self._pending[slot])
            self._pending[slot] = None
        self._point(index, self._slot_views[slot])
        if following is not None and following not in self._held:
            self._fetch(following, 1 - slot)

    def _fetch(self, index: int, slot: int) -> None:
        before = self._held[slot]
        if before is not None:
            self._point(before, self.host_views[before])
        self._held[slot] = index
        self._pending[slot] = self._copier.copy(self.slots[slot], self.host[index])

    def _point(self, index: int, views: Sequence[Tensor]) -> None:
        for tensor, view in zip(self._tensors[index], views, strict=True):
            tensor.data = view


class HostInput:
    """A block's input, in the host's memory between its forward and its backward pass."""

    def __init__(self, copier: Copier, x: Tensor, before: HostInput | None) -> None:
        """Begin to copy it away; `before` is the input of the block whose backward pass follows this one's."""
        self._copier, self._before = copier, before
        self._host = host_like(x)
        self._device: Tensor | None = x
        self._pending = copier.copy(self._host, x)

    def leave(self) -> None:
        """After the block's forward pass: its memory on the device may be used by what is issued from here on."""
        self._copier.wait(self._pending)
        self._device = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._device is None:
            self._device = torch.empty_like(self._host, device=self._copier.device)
            self._pending = self._copier.copy(self._device, self._host)

    def take(self) -> Tensor:
        """The input, for what is issued from here on; the one that is needed next is fetched meanwhile."""
        self.fetch()
        x, self._device = cast(Tensor, self._device), None
        self._copier.wait(self._pending)
        if self._before is not None:
            self._before.fetch()
        return x


def host_like(x: Tensor) -> Tensor:
    """Host memory for a tensor; pinned for one of a GPU, from torch's cache, so that no step allocates any."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")


def place_base(model: nn.Module, device: torch.device, kind: Kind | None, *, streamed: bool) -> BlockStream | None:
    """Allocate a model that was built on `meta`, its LoRA injected; see `load_dit`, `init_random`, `lora.reset`.

    Args:
        kind: how the weights of the blocks' linears are kept; None: as they were built.
        streamed: keep the blocks in the host's memory.
    """
    blocks = list(model.get_submodule("blocks").children())
    if kind is not None:
        for module in (module for block in blocks for module in block.modules() if isinstance(module, Linear)):
            module.quantised = empty_quantised(kind, (module.out_features, module.in_features))
    stream = BlockStream(blocks, device) if streamed else None
    for block in blocks if stream is None else ():
        for tensor, put in _frozen(block):
            put(torch.empty_like(tensor, device=device))
    described = {id(m.weight) for m in model.modules() if isinstance(m, Linear) and m.quantised is not None}
    for owner in model.modules():
        for name, weight in owner.named_parameters(recurse=False):
            if weight.is_meta and id(weight) not in described:
                place = nn.Parameter(torch.empty_like(weight, device=device), requires_grad=weight.requires_grad)
                owner.register_parameter(name, place)
    return stream


_Place = tuple[Tensor, Callable[[Tensor], Tensor]]


def _frozen(block: nn.Module) -> Sequence[_Place]:
    """A block's frozen tensors, and how each is replaced: all parameters but the LoRA's; where a linear is quantised
    its codes and scales in place of its weight, which stays on `meta` and tells shape and name."""
    places: list[_Place] = []
    for module in block.modules():
        linear = module if isinstance(module, Linear) and module.quantised is not None else None
        for name, weight in module.named_parameters(recurse=False):
            if name not in ("lora_A", "lora_B") and not (linear is not None and name == "weight"):
                places.append((weight, partial(_put_parameter, module, name)))
        if linear is not None and linear.quantised is not None:
            places.append((linear.quantised.codes, partial(_put_codes, linear)))
            places.append((linear.quantised.scales, partial(_put_scales, linear)))
    return places


def _put_parameter(module: nn.Module, name: str, values: Tensor) -> Tensor:
    parameter = nn.Parameter(values, requires_grad=False)
    module.register_parameter(name, parameter)
    return parameter


def _put_codes(linear: Linear, values: Tensor) -> Tensor:
    linear.quantised = cast(Quantised, linear.quantised)._replace(codes=values)
    return values


def _put_scales(linear: Linear, values: Tensor) -> Tensor:
    linear.quantised = cast(Quantised, linear.quantised)._replace(scales=values)
    return values


def _layout(places: Sequence[_Place]) -> list[tuple[int, int]]:
    """Where each tensor begins in a block's buffer, and where the next may."""
    layout, begin = [], 0
    for tensor, _ in places:
        end = begin + -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        layout.append((begin, end))
        begin = end
    return layout


def _views(buffer: Tensor, layout: Sequence[tuple[int, int]], like: Sequence[_Place]) -> list[Tensor]:
    return [
        buffer[begin : begin + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for (begin, _), (tensor, _) in zip(layout, like, strict=True)
    ]


def _host_bytes(size: int, device: torch.device) -> Tensor:
    """Host memory; for a GPU pinned, since only then a copy runs beside the computation.

    Registered, not allocated as pinned: torch rounds pinned memory up to a power of two, which is 512 MiB for the 312
    of a block.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if device.type != "cuda":
        return buffer
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    if int(runtime.cudaHostRegister(address, size, 0)):
        raise UserError(
            f"model.stream_blocks: {size / 2**20:.0f} MiB of the host's memory for a block could not be pinned",
            expected="memory for all blocks, and `ulimit -l` unlimited where containers set one",
            fix="fewer processes on this machine, or model.base_dtype=fp8, which takes half",
        )
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    return buffer
