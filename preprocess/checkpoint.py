"""Read the frozen encoders from a Wan2.2-TI2V-5B folder, in the official layout or in the Diffusers one.

    official     Wan2.2_VAE.pth   models_t5_umt5-xxl-enc-bf16.pth   google/umt5-xxl/
    Diffusers    vae/             text_encoder/                     tokenizer/

Both give the same modules with the same weights; sizes are read from the tensors, so small stand-ins load too.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from preprocess.vae_config import LATENT_MEAN, LATENT_STD, Z_DIM, vae_arguments
from shards.errors import UserError

if TYPE_CHECKING:
    import torch

OFFICIAL_VAE = "Wan2.2_VAE.pth"
OFFICIAL_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_TOKENIZER = "google/umt5-xxl"

Layout = Literal["official", "diffusers"]

# Official name -> diffusers name, for the encoder half of the VAE (the decoder is never used here).
_VAE_NAMES = (
    (r"conv1\.(.+)", r"quant_conv.\1"),
    (r"encoder\.conv1\.(.+)", r"encoder.conv_in.\1"),
    (r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.(residual\..+|shortcut\..+)",
     r"encoder.down_blocks.\1.resnets.\2.\3"),
    (r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample\..+|time_conv\..+)",
     r"encoder.down_blocks.\1.downsampler.\2"),
    (r"encoder\.middle\.0\.(.+)", r"encoder.mid_block.resnets.0.\1"),
    (r"encoder\.middle\.1\.(.+)", r"encoder.mid_block.attentions.0.\1"),
    (r"encoder\.middle\.2\.(.+)", r"encoder.mid_block.resnets.1.\1"),
    (r"encoder\.head\.0\.gamma", r"encoder.norm_out.gamma"),
    (r"encoder\.head\.2\.(.+)", r"encoder.conv_out.\1"),
)  # fmt: skip
_VAE_PARTS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_TEXT_NAMES = (
    (r"token_embedding\.weight", r"shared.weight"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
     r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)  # fmt: skip


def detect_layout(folder: Path) -> Layout:
    """Which layout a checkpoint folder has. Raises UserError naming what each would hold."""
    if not folder.is_dir():
        raise UserError(
            f"encoders.checkpoint: {str(folder)!r}: no such folder",
            expected="a folder of Wan2.2-TI2V-5B, official or Diffusers layout, or null for small random weights",
        )
    if (folder / "vae").is_dir() and (folder / "text_encoder").is_dir():
        return "diffusers"
    if (folder / OFFICIAL_VAE).is_file() and (folder / OFFICIAL_TEXT).is_file():
        return "official"
    raise UserError(
        f"encoders.checkpoint: {str(folder)!r} holds no encoders",
        expected=f"{OFFICIAL_VAE}, {OFFICIAL_TEXT} and {OFFICIAL_TOKENIZER}/ (official layout), "
        "or vae/, text_encoder/ and tokenizer/ (Diffusers layout)",
    )


def load_vae(folder: Path) -> Any:
    """Load the VAE's encoder half into diffusers' `AutoencoderKLWan`, fp32, on the CPU, in eval mode.

    Raises UserError when files are missing or damaged, or hold another VAE than Wan2.2's.
    """
    is_official = detect_layout(folder) == "official"
    vae = _official_vae(folder / OFFICIAL_VAE) if is_official else _diffusers_vae(folder / "vae")
    vae.decoder = vae.post_quant_conv = None
    return vae.float().eval().requires_grad_(False)


def load_text_encoder(folder: Path) -> Any:
    """Load UMT5 into transformers' `UMT5EncoderModel` as stored (bf16 as published), on the CPU, in eval mode."""
    if detect_layout(folder) == "official":
        model = _official_text_encoder(folder / OFFICIAL_TEXT)
    else:
        from transformers import UMT5EncoderModel

        try:
            model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype="auto")
        except (OSError, ValueError, RuntimeError) as error:
            raise _damaged(folder / "text_encoder", error) from None
    return model.eval().requires_grad_(False)


def tokenizer_folder(folder: Path) -> Path:
    """Folder of the tokenizer's files within a checkpoint. Raises UserError when it is not there."""
    path = folder / ("tokenizer" if detect_layout(folder) == "diffusers" else OFFICIAL_TOKENIZER)
    if not (path / "spiece.model").is_file() and not (path / "tokenizer.json").is_file():
        raise UserError(f"{path}: no tokenizer", expected="spiece.model or tokenizer.json of google/umt5-xxl")
    return path


def load_tokenizer(folder: Path) -> Any:
    """Load the checkpoint's own tokenizer through transformers."""
    from transformers import AutoTokenizer

    path = tokenizer_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def rename_vae_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Encoder weights under diffusers' names from a state dict under the official ones; the decoder's are left out."""
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "conv1."))}
    return {_rename_vae(name): tensor for name, tensor in wanted.items()}


def rename_text_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """UMT5 weights under transformers' names from a state dict under the official ones."""
    return {_rename(name, _TEXT_NAMES): tensor for name, tensor in state.items()}


def _rename_vae(name: str) -> str:
    renamed = _rename(name, _VAE_NAMES)
    for official, ours in _VAE_PARTS.items():
        renamed = renamed.replace(f".{official}.", f".{ours}.")
    return renamed


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise UserError(f"encoder checkpoint: unknown tensor {name!r}", expected="the weights of Wan2.2-TI2V-5B")


def _diffusers_vae(folder: Path) -> Any:
    from diffusers import AutoencoderKLWan

    try:
        vae: Any = AutoencoderKLWan.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _damaged(folder, error) from None
    config = vae.config
    published = (Z_DIM, list(LATENT_MEAN), list(LATENT_STD), True, 2)
    found = (config.z_dim, list(config.latents_mean), list(config.latents_std), config.is_residual, config.patch_size)
    if found != published:
        raise UserError(
            f"{folder}: not the VAE of Wan2.2 (z_dim {config.z_dim}, is_residual {config.is_residual})",
            expected="z_dim 48, residual, patch size 2, the 48 published means and deviations",
        )
    return vae


def _official_vae(path: Path) -> Any:
    import torch
    from diffusers import AutoencoderKLWan

    state = rename_vae_weights(_read_pickle(path))
    first = state.get("encoder.conv_in.weight")
    if first is None or first.shape[1] != 12:
        raise UserError(f"{path}: not the VAE of Wan2.2", expected="encoder.conv1 with 12 input channels")
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**vae_arguments(base_dim=first.shape[0]))
    vae.decoder = vae.post_quant_conv = None
    _assign(vae, state, path)
    return vae


def _official_text_encoder(path: Path) -> Any:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    state = rename_text_weights(_read_pickle(path))
    try:
        vocab_size, dim = state["shared.weight"].shape
        num_buckets, num_heads = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
        inner_dim = state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
        ffn_dim = state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{path}: not the UMT5 encoder of Wan2.2: {error} is missing") from None
    num_layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.block."))
    config = UMT5Config(
        vocab_size=vocab_size, d_model=dim, d_kv=inner_dim // num_heads, d_ff=ffn_dim, num_layers=num_layers,
        num_heads=num_heads, relative_attention_num_buckets=num_buckets, relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    _assign(model, {**state, "encoder.embed_tokens.weight": state["shared.weight"]}, path)
    model.tie_weights()
    return model


def _assign(module: Any, state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise _damaged(path, error) from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        # weights_only refuses anything but tensors: a checkpoint from elsewhere cannot run code here.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    return UserError(
        f"{path}: cannot be loaded: {text[:400]}",
        expected="the files of Wan2.2-TI2V-5B as published",
        mend="compare sizes and checksums with the publisher's, download again what differs",
    )
