"""Counting what torch does: FLOPs, operators, live bytes. Works on fake tensors, so at real dimensions too."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from train.config.model import DiTConfig, LoRAConfig
from train.estimate.memory import AS_COMPUTED, BaseStore
from train.lora.lora import inject
from train.model.dit import WanDiT
from train.model.rope import rope_table
from train.model.stream import Copier, place_base
from train.objective import add_noise, slot_losses

aten = torch.ops.aten


def _scores(q: Sequence[int], k: Sequence[int]) -> int:
    batch, heads, length, channels = q
    return 2 * batch * heads * length * k[2] * channels


def _forward(q: Sequence[int], k: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _scores(q, k)


def _backward(grad: Any, q: Sequence[int], k: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 5 * _scores(q, k)


def _addmm(out: Any, a: Sequence[int], b: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# torch's counter knows neither the CPU's flash attention nor GEMMs that add in place.
UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    aten.addmm_: _addmm,
}


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without numbers: sizes as large as you like."""
    rope_table.cache_clear()  # what is cached outside must not come in, nor the other way round
    try:
        with FakeTensorMode():
            yield
    finally:
        rope_table.cache_clear()


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """FLOPs of GEMMs and attention, all of them."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        yield counter


class CountedOperators(TorchDispatchMode):
    """Operators that compute something: no views, no bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func not in (aten.detach.default, aten.empty.memory_format, aten.empty_like.default):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Bytes of storages made while it is on and still alive; and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        self._resize: Any = None

    def __enter__(self) -> LiveBytes:
        # FSDP2 frees and allocates the storage of gathered weights, which no operator shows.
        plain = self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            before, out = storage.nbytes(), plain(storage, size)
            self._seen[storage] = None
            if storage not in self._sizes:
                self._watch(storage, 0)
            self._sizes[storage][0] += size - before
            self.live += size - before
            self.peak = max(self.peak, self.live)
            return out

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs or {})):
            if isinstance(tensor, Tensor):
                self._seen[tensor.untyped_storage()] = None
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def outside(self, tensor: Tensor) -> Tensor:
        """Do not count a tensor that has just been made: another device's."""
        self.live -= tensor.untyped_storage().nbytes()
        weakref.finalize(tensor.untyped_storage(), self._forget, [-tensor.untyped_storage().nbytes()])
        return tensor

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        self._watch(storage, storage.nbytes())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        self._sizes[storage] = [size]
        weakref.finalize(storage, self._forget, self._sizes[storage])

    def _forget(self, size: list[int]) -> None:
        self.live -= size[0]


GEMMS = {
    "mm", "addmm", "addmm_", "bmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}  # fmt: skip
"""Operators whose traffic is not what limits them: GEMMs, convolutions and attention."""


class Traffic(LiveBytes):
    """Bytes that operators read or write, by name and dtypes; and the peak of what is alive.

    Each operand of an operator counts once, one that is written in place too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace != "aten" or name.startswith(("empty", "new_empty", "detach")):
            return out
        operands = [each for each in tree_iter((args, kwargs or {}, out)) if isinstance(each, Tensor)]
        dtypes = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in operands}))
        apart = {each.untyped_storage()._cdata: _own_bytes(each) for each in operands}
        self.bytes[name, dtypes] += sum(apart.values())
        return out

    def between(self) -> int:
        """Bytes outside GEMMs, convolutions and attention."""
        return sum(count for (name, _), count in self.bytes.items() if name not in GEMMS)


def _own_bytes(tensor: Tensor) -> int:
    """What an operator moves of a tensor: an expanded dimension once."""
    elements = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(elements) * tensor.element_size()


def vae_traffic(num_frames: int, size: tuple[int, int], *, low_traffic: bool) -> Traffic:
    """An fp16 encode of one clip at the published VAE's widths, on fake tensors, channels last as on a GPU."""
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    from preprocess.encoders.encoders import to_channels_last
    from preprocess.encoders.vae_config import vae_arguments
    from preprocess.encoders.vae_forward import LowTrafficEncoder

    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.float16)
        try:
            vae: Any = AutoencoderKLWan(**vae_arguments(base_dim=160)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        to_channels_last(vae)
        clip = torch.empty(1, 3, num_frames, *size, dtype=torch.float16)
        clip = clip.contiguous(memory_format=torch.channels_last_3d)
        encoder = LowTrafficEncoder(vae)
        with Traffic() as traffic:
            encoder(patchify(clip, vae.config.patch_size)) if low_traffic else vae.encode(clip)
    return traffic


class InlineCopier(Copier):
    """Copies at once: fake tensors live in one thread."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source)

    def wait(self, done: Any) -> None:
        pass


def fake_model(
    dims: DiTConfig,
    lora: LoRAConfig | None,
    dtype: torch.dtype = torch.bfloat16,
    store: BaseStore = AS_COMPUTED,
) -> WanDiT:
    """A model of fake tensors. Make and use it under one `fake_tensors`."""
    with torch.device("cpu" if store == AS_COMPUTED else "meta"):
        model = WanDiT(dims, dtype, torch.float32 if lora is None else None)
        if lora is not None:
            inject(model, lora, 0)
    if store != AS_COMPUTED:
        kind = store.dtype if store.dtype in ("fp8", "nf4") else None
        model.stream = place_base(model, torch.device("cpu"), kind, streamed=store.streamed)
    return model.train()


def trace_step(model: WanDiT, shape: tuple[int, int, int, int], *, image_first: bool = False) -> None:
    """One micro-step on fake tensors: noise, velocity, loss, gradients.

    Args:
        shape: samples, latent frames, rows, columns.
    """
    batch, dims = shape[0], model.config

    flags = torch.empty(batch, dtype=torch.bool)
    flags.any = lambda: image_first  # type: ignore[method-assign]  # a fake tensor has no value to ask for
    latent, noise = (torch.empty(batch, dims.in_channels, *shape[1:]) for _ in range(2))
    text = torch.empty(batch, dims.text_len, dims.text_dim, dtype=torch.bfloat16)
    noised, target = add_noise(latent, noise, torch.empty(batch, dtype=torch.float64), flags)
    timestep = torch.empty(batch)
    velocity = model(noised, timestep, flags, text)
    del noised
    slot_losses(velocity, target, flags).sum().backward()
