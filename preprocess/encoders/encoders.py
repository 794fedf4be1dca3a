"""The two frozen encoders: frames to normalised latents, text to embeddings. Each sample is encoded alone.

Shape legend: T frames, H height, W width, C latent channels, L tokens, D text width.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8, UInt16

from preprocess.config import EncodersConfig, PrepConfig
from preprocess.encoders import load as checkpoints
from preprocess.encoders import random_weights as random_encoders
from preprocess.encoders.vae_config import LATENT_MEAN, LATENT_STD
from shards.console import LOG
from shards.errors import UserError
from shards.format.sealed_json import canonical_digest
from shards.machine import usable_cores

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 512
CLEANING = "ftfy, unescape twice, whitespace"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class VaeEncoder:
    """diffusers' `AutoencoderKLWan` (its encoder half) on one device at one precision."""

    def __init__(
        self,
        vae: Any,
        *,
        device: torch.device,
        precision: str,
        note: str | None = None,
        channels_last: bool = False,
        compiled: bool = False,
        low_traffic: bool = False,
    ) -> None:
        import torch

        self.precision = precision
        self.note = note
        self._variant = {"compiled": True} if compiled else {"low_traffic": True} if low_traffic else {}
        self._format = torch.channels_last_3d if channels_last else torch.contiguous_format
        self._dtype = getattr(torch, _DTYPES[precision])
        self._vae = vae.to(self._dtype)
        self.weights_sha256 = digest_weights(self._vae, prefixes=("encoder.", "quant_conv."))
        self._vae.to(device)
        if channels_last:
            to_channels_last(self._vae)
        if compiled:
            # A graph for the first frame, one for the next four, one for the rest: for each picture size.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self._vae.encoder = torch.compile(self._vae.encoder, dynamic=False)
        self._encode: Callable[[torch.Tensor], torch.Tensor] = self._encode_by_library
        if low_traffic:
            from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

            from preprocess.encoders.vae_forward import LowTrafficEncoder

            encode = LowTrafficEncoder(self._vae)
            self._encode = lambda pixels: encode(patchify(pixels, self._vae.config.patch_size)).chunk(2, dim=1)[0]
        self._device = device
        self._mean_C111 = torch.tensor(LATENT_MEAN, device=device).view(-1, 1, 1, 1)
        self._inverse_std_C111 = (1.0 / torch.tensor(LATENT_STD, device=device)).view(-1, 1, 1, 1)

    def encode(self, frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "48 t h w"]:
        """Encode one clip of 4k+1 RGB frames (0…255) to its normalised latent mean, fp32, 48×(k+1)×H/16×W/16.

        (mode − mean)·(1/std) as `Wan2_2_VAE.encode`. Raises UserError when the device has too little memory.
        """
        import torch

        if len(frames_THWC) % 4 != 1:
            raise ValueError(f"{len(frames_THWC)} frames: not 4k+1, the encoder would drop the rest")
        try:
            frames_1CTHW = torch.from_numpy(frames_THWC).to(self._device).permute(3, 0, 1, 2)[None]
            pixels_1CTHW = (frames_1CTHW.float() / 127.5 - 1.0).to(self._dtype).contiguous(memory_format=self._format)
            # TF32 would round the inputs of fp32 convolutions to ten bits; autotuning would pick kernels by chance.
            flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            with torch.inference_mode(), flags:
                mean_CTHW = self._encode(pixels_1CTHW)[0].float()
                return ((mean_CTHW - self._mean_C111) * self._inverse_std_C111).cpu().numpy()
        except torch.OutOfMemoryError:
            raise UserError(
                f"the VAE ran out of memory on {self._device} at {list(frames_THWC.shape)}, {self.precision}",
                fix="smaller buckets.sizes or window.num_frames; encoders.vae_precision=auto (16 bits need half "
                "and are taken where they are right); nothing else on this device; or a larger device",
            ) from None

    def _encode_by_library(self, pixels_1CTHW: torch.Tensor) -> torch.Tensor:
        mode: torch.Tensor = self._vae.encode(pixels_1CTHW).latent_dist.mode()
        return mode

    def provenance(self) -> dict[str, str]:
        """What a shard records of the device: a difference warns."""
        layout = str(self._format).removeprefix("torch.")
        return {**device_provenance(self._device), "vae_layout": layout}

    def identity(self) -> dict[str, Any]:
        """What decides the latents' numbers on this side."""
        return {
            "model": "AutoencoderKLWan, Wan2.2 form",
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "latent": "mode, normalised",
            "statistics_sha256": canonical_digest([list(LATENT_MEAN), list(LATENT_STD)]),
            **self._variant,
        }


class Tokenizer:
    """The text encoder's own tokenizer; counting tokens needs no weights."""

    def __init__(self, tokenizer: Any, sha256: str) -> None:
        self._tokenizer = tokenizer
        self.sha256 = sha256
        _keep_no_words(tokenizer)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a cleaned text, end token included, however many they are."""
        # What transformers would warn of (a text beyond the model's length) is refused by whoever embeds it.
        return list(self._tokenizer(text, add_special_tokens=True, verbose=False).input_ids)

    def count(self, text: str) -> int:
        """Number of tokens of a cleaned text, end token included."""
        return len(self.tokens(text))

    def __len__(self) -> int:
        return len(self._tokenizer)


class TextEncoder:
    """transformers' `UMT5EncoderModel` with its tokenizer, on one device at one precision."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, *, device: torch.device, precision: str, note: str | None = None
    ) -> None:
        import torch

        self.precision = precision
        self.note = note
        self.tokenizer = tokenizer
        self._model = model.to(getattr(torch, _DTYPES[precision]))
        self.dim = int(model.config.d_model)
        self.weights_sha256 = digest_weights(self._model)
        self._model.to(device)
        self._device = device

    def embed(self, text: str) -> UInt16[np.ndarray, "L D"]:
        """Embed one cleaned text at its true length: the bits of bf16 as uint16, real tokens only.

        Raises ValueError above 512 tokens: cutting is the composer's decision, never made here.
        """
        import torch

        tokens = self.tokenizer.tokens(text)
        if len(tokens) > MAX_TOKENS:
            raise ValueError(f"text of {len(tokens)} tokens; at most {MAX_TOKENS} can be embedded")
        try:
            tokens_1L = torch.tensor([tokens], device=self._device)
            mask_1L = torch.ones_like(tokens_1L)
            with torch.inference_mode():
                hidden_1LD = self._model(input_ids=tokens_1L, attention_mask=mask_1L).last_hidden_state
        except torch.OutOfMemoryError:
            raise UserError(
                f"the text encoder ran out of memory on {self._device} at {len(tokens)} tokens, {self.precision}",
                fix="`--only text` on a machine with more memory, or encoders.device=cpu for that pass",
            ) from None
        return hidden_1LD[0].to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()

    def provenance(self) -> dict[str, str]:
        """What a shard records of the device: a difference warns."""
        return device_provenance(self._device)

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings' numbers on this side."""
        return {
            "model": "UMT5EncoderModel",
            "weights_sha256": self.weights_sha256,
            "tokenizer_sha256": self.tokenizer.sha256,
            "precision": self.precision,
            "cleaning": CLEANING,
            "dim": self.dim,
        }


def load_vae_encoder(config: EncodersConfig) -> VaeEncoder:
    """Load the VAE that the config names; small random weights without a checkpoint."""
    LOG.info("loading the VAE: %s", config.checkpoint or random_encoders.NOTE)
    device = find_device(config.device)
    precision = config.vae_precision
    if precision == "auto":  # a build has resolved it before (precision.py); a single picture is encoded safely
        precision = "fp32"
        LOG.info("encoders.vae_precision: auto takes fp32")
    quiet_libraries()
    if config.checkpoint is None:
        vae = random_encoders.build_random_vae(config.random_seed).eval().requires_grad_(False)
        note: str | None = random_encoders.NOTE
    else:
        vae, note = checkpoints.load_vae(Path(config.checkpoint)), None
    channels_last = device.type == "cuda" if config.vae_channels_last is None else config.vae_channels_last
    return VaeEncoder(
        vae, device=device, precision=precision, note=note, channels_last=channels_last, compiled=config.vae_compile,
        low_traffic=config.vae_low_traffic,
    )  # fmt: skip


def load_tokenizer(config: EncodersConfig) -> Tokenizer:
    """Load the tokenizer that the config names, without the encoder's weights."""
    LOG.info("loading the tokenizer")
    quiet_libraries()
    if config.checkpoint is None:
        model_bytes = random_encoders.train_tokenizer_model()
        return Tokenizer(random_encoders.load_tokenizer_model(model_bytes), hashlib.sha256(model_bytes).hexdigest())
    folder = Path(config.checkpoint)
    return Tokenizer(checkpoints.load_umt5_tokenizer(folder), _digest_tokenizer(folder))


def load_text_encoder(config: EncodersConfig, tokenizer: Tokenizer) -> TextEncoder:
    """Load the text encoder that the config names; small random weights without a checkpoint."""
    LOG.info("loading the text encoder: %s", config.checkpoint or random_encoders.NOTE)
    device = find_device(config.device)
    quiet_libraries()
    if config.checkpoint is None:
        model = random_encoders.build_random_text_encoder(config.random_seed, len(tokenizer))
        note: str | None = random_encoders.NOTE
    else:
        model, note = checkpoints.load_umt5(Path(config.checkpoint)), None
    model = model.eval().requires_grad_(False)
    precision = config.text_precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
        LOG.info("encoders.text_precision: auto is %s on %s", precision, device)
    return TextEncoder(model, tokenizer, device=device, precision=precision, note=note)


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16: a CPU, and a GPU from compute capability 8.0 on; older ones emulate it."""
    import torch

    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _keep_no_words(tokenizer: Any) -> None:
    """Switch off the tokenizers library's memory of up to 10,000 words, where it has the (unpublished) switch.

    It saves some 30 µs a caption, and its words lie between what the decoders' threads free: the heap then keeps 20 MB
    that it cannot give back, and grows with every new word.
    """
    resize = getattr(tokenizer.backend_tokenizer.model, "_resize_cache", None)
    if resize is not None:
        resize(0)


def digest_weights(module: Any, prefixes: tuple[str, ...] = ("",)) -> str:
    """sha256 over the names, types, shapes and bytes of a module's parameters and buffers, sorted by name.

    The same for every layout the weights came in. Streams: nothing is copied but one tensor at a time.
    """
    import torch

    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.startswith(prefixes)):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _digest_tokenizer(folder: Path) -> str:
    path = checkpoints.tokenizer_folder(folder)
    # The sentencepiece model is the same file in both layouts; the JSON beside it differs by the writer's version.
    model = path / "spiece.model"
    return hashlib.sha256((model if model.is_file() else path / "tokenizer.json").read_bytes()).hexdigest()


def find_device(name: str) -> torch.device:
    """The torch device that `encoders.device` names. Raises UserError when it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"encoders.device: {name!r}", expected="auto, cpu, cuda, cuda:1 …") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        fix = "encoders.device=cpu, or run `wantrain doctor`"
        raise UserError(f"encoders.device: {name!r}, but torch sees no GPU", fix=fix)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"encoders.device: {name}, but there are {torch.cuda.device_count()} GPUs")
    return device


def devices_of(config: PrepConfig) -> tuple[str, ...]:
    """The devices of this machine that encode: those that `engine.devices` lists, or every GPU, or the CPU."""
    if config.engine.devices:
        return config.engine.devices
    if config.encoders.device != "auto":
        return (config.encoders.device,)
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) or ("cpu",)


def to_channels_last(module: Any) -> None:
    """Lay the weights of convolutions out channels last, in two and in three dimensions, in place.

    `Module.to(memory_format=…)` takes one format and refuses the weights of the other rank.
    """
    import torch

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def device_provenance(device: torch.device) -> dict[str, str]:
    """The GPU's name, where it is one."""
    import torch

    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


@contextmanager
def cpu_threads(num_others: int, num_workers: int = 1) -> Iterator[None]:
    """Leave so many cores to others (the decoders) while an encoder runs on the CPU; no thread count changes a byte.

    With several such workers on the machine each takes an equal share.

    torch's threads wait by spinning: with as many as there are cores, on a busy machine, an encoder of small
    convolutions was measured to take ten times the CPU time.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, usable_cores() // num_workers - num_others))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quiet_libraries() -> None:
    """Keep the libraries off the network and their start-up messages off the terminal."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where bitsandbytes is installed it is imported along, and says that it has no 4-bit kernel: none is used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
