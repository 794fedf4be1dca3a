"""Read the frozen encoders from a Wan2.2-TI2V-5B folder, in the official layout or in the Diffusers one.

    official     Wan2.2_VAE.pth   models_t5_umt5-xxl-enc-bf16.pth   google/umt5-xxl/
    Diffusers    vae/             text_encoder/                     tokenizer/

Both give the same modules with the same weights; sizes are read from the tensors, so small models load too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preprocess.encoders.vae_config import LATENT_MEAN, LATENT_STD, Z_DIM, vae_arguments
from preprocess.encoders.weight_files import Weight, damaged, fill_module, read_pickle, read_safetensors
from preprocess.encoders.weight_names import rename_text, rename_vae
from shards.errors import UserError
from shards.files.safetensors_index import CheckpointLayout, read_object

OFFICIAL_VAE = "Wan2.2_VAE.pth"
OFFICIAL_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_TOKENIZER = "google/umt5-xxl"
VAE_NAME = "the VAE of Wan2.2-TI2V-5B"
TEXT_NAME = "the UMT5 encoder of Wan"


def detect_layout(folder: Path) -> CheckpointLayout:
    """Which layout a checkpoint folder has. Raises UserError naming what each would hold, or which other Wan it is."""
    if not folder.is_dir():
        raise UserError(
            f"encoders.checkpoint: {str(folder)!r}: no such folder",
            expected="a folder of Wan2.2-TI2V-5B, official or Diffusers layout, or null for small random weights",
        )
    other = name_other_model(folder)
    if other is not None:
        raise UserError(
            f"encoders.checkpoint: {str(folder)!r} is {other}",
            expected="Wan2.2-TI2V-5B: its VAE has other latents, so shards made with this one would not fit",
            fix="`wanprep fetch-model FOLDER` fetches the right one",
        )
    if (folder / "vae").is_dir() and (folder / "text_encoder").is_dir():
        return "diffusers"
    if (folder / OFFICIAL_VAE).is_file() and (folder / OFFICIAL_TEXT).is_file():
        return "official"
    raise UserError(
        f"encoders.checkpoint: {str(folder)!r} holds no encoders",
        expected=f"{OFFICIAL_VAE}, {OFFICIAL_TEXT} and {OFFICIAL_TOKENIZER}/ (official layout), "
        "or vae/, text_encoder/ and tokenizer/ (Diffusers layout)",
        fix="`wanprep fetch-model FOLDER`",
    )


def name_other_model(folder: Path) -> str | None:
    """The name of another Wan model that a folder holds; None for TI2V-5B and for what is unknown."""
    if (folder / "high_noise_model").is_dir() or (folder / "transformer_2").is_dir():
        return "Wan2.2-A14B (two experts)"
    if (folder / "Wan2.1_VAE.pth").is_file():
        return "Wan2.1, or Wan2.2-A14B, which shares its VAE"
    config = folder / "vae" / "config.json"
    if config.is_file() and read_object(config).get("z_dim", 16) == 16:
        return "Wan2.1, or Wan2.2-A14B, which shares its VAE"
    return None


def load_vae(folder: Path, *, decoder: bool = False) -> Any:
    """Load the VAE into diffusers' `AutoencoderKLWan`, fp32, on the CPU, in eval mode.

    Args:
        decoder: keep the decoder too; without it its tensors are accounted for and never read.

    Raises UserError when files are missing or damaged, or hold another VAE than Wan2.2's.
    """
    is_official = detect_layout(folder) == "official"
    vae = _official_vae(folder / OFFICIAL_VAE) if is_official else _diffusers_vae(folder / "vae")
    if not decoder:
        vae.decoder = vae.post_quant_conv = None
    return vae.float().eval().requires_grad_(False)


def load_umt5(folder: Path) -> Any:
    """Load UMT5 into transformers' `UMT5EncoderModel` as stored (bf16 as published), on the CPU, in eval mode.

    Raises UserError when files are missing or damaged, hold another encoder, or one whose two names for the token
    embedding hold different tensors.
    """
    import torch
    from transformers import UMT5EncoderModel

    if detect_layout(folder) == "official":
        place = folder / OFFICIAL_TEXT
        weights = read_pickle(place, rename_text)
    else:
        place = folder / "text_encoder"
        weights = read_safetensors(place, "model")
    embedding = _one_embedding(weights, place)
    with torch.device("meta"):
        model = UMT5EncoderModel(_text_config(weights, place))
    fill_module(model, {**weights, "encoder.embed_tokens.weight": embedding}, place, TEXT_NAME)
    model.tie_weights()
    # Some releases of transformers left this one zero for Wan's checkpoints: every text would embed alike.
    if model.encoder.embed_tokens.weight.data_ptr() != model.shared.weight.data_ptr():
        raise UserError(
            f"{place}: transformers did not tie the token embeddings", fix="install transformers 5.23 or later"
        )
    return model.eval().requires_grad_(False)


def tokenizer_folder(folder: Path) -> Path:
    """Folder of the tokenizer's files within a checkpoint. Raises UserError when it is not there."""
    path = folder / ("tokenizer" if detect_layout(folder) == "diffusers" else OFFICIAL_TOKENIZER)
    if not (path / "spiece.model").is_file() and not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path}: no tokenizer",
            expected="spiece.model or tokenizer.json of google/umt5-xxl",
            fix="`wanprep fetch-model FOLDER`",
        )
    return path


def load_umt5_tokenizer(folder: Path) -> Any:
    """Load the checkpoint's own tokenizer through transformers."""
    from transformers import AutoTokenizer

    path = tokenizer_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None


def _official_vae(path: Path) -> Any:
    weights = read_pickle(path, rename_vae)
    first = weights.get("encoder.conv_in.weight")
    if first is None or first.tensor.ndim != 5:
        raise UserError(f"{path}: holds no encoder.conv1.weight", expected=VAE_NAME)
    if first.tensor.shape[1] == 3:
        raise UserError(f"{path}: the VAE of Wan2.1 (also Wan2.2-A14B's)", expected=f"{VAE_NAME}: 48 latent channels")
    return _fill_vae(vae_arguments(base_dim=int(first.tensor.shape[0])), weights, path)


def _diffusers_vae(folder: Path) -> Any:
    weights = read_safetensors(folder, "diffusion_pytorch_model")
    config = read_object(folder / "config.json")
    base_dim = config.get("base_dim")
    if not isinstance(base_dim, int) or base_dim < 1:
        raise UserError(f"{folder}/config.json: base_dim {base_dim!r}", expected=VAE_NAME)
    arguments = vae_arguments(base_dim)
    found = {name: config.get(name) for name in arguments if name != "decoder_base_dim"}
    if found != {name: value for name, value in arguments.items() if name != "decoder_base_dim"}:
        odd = next(name for name, value in found.items() if value != arguments[name])
        raise UserError(
            f"{folder}/config.json: {odd} is {str(found[odd])[:60]}, not {str(arguments[odd])[:60]}",
            expected=f"{VAE_NAME}: {Z_DIM} channels with {len(LATENT_MEAN)} means and {len(LATENT_STD)} deviations",
        )
    arguments["decoder_base_dim"] = config.get("decoder_base_dim") or base_dim
    return _fill_vae(arguments, weights, folder)


def _fill_vae(arguments: dict[str, Any], weights: dict[str, Weight], origin: Path) -> Any:
    import torch
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**arguments)
    fill_module(vae, weights, origin, VAE_NAME)
    return vae


def _one_embedding(weights: dict[str, Weight], place: Path) -> Weight:
    """The token embedding. Raises UserError when a file has two that differ (trained apart, or one left empty)."""
    import torch

    both = [weights[name] for name in ("shared.weight", "encoder.embed_tokens.weight") if name in weights]
    if not both:
        raise UserError(f"{place}: holds no token embedding", expected=TEXT_NAME)
    if len(both) == 2 and not torch.equal(both[0].tensor, both[1].tensor):
        raise UserError(
            f"{place}: untied embeddings: {both[0].name} and {both[1].name} differ",
            expected=f"{TEXT_NAME}: one token embedding under both names",
            fix="fetch it again with `wanprep fetch-model`; a tool that saved it wrote one of them empty",
        )
    weights["shared.weight"] = both[0]
    return both[0]


def _text_config(weights: dict[str, Weight], place: Path) -> Any:
    """UMT5's sizes, from the shapes of its tensors."""
    from transformers import UMT5Config

    block = "encoder.block.0.layer"
    try:
        vocab_size, dim = weights["shared.weight"].tensor.shape
        num_buckets, num_heads = weights[f"{block}.0.SelfAttention.relative_attention_bias.weight"].tensor.shape
        inner_dim = weights[f"{block}.0.SelfAttention.q.weight"].tensor.shape[0]
        ffn_dim = weights[f"{block}.1.DenseReluDense.wi_0.weight"].tensor.shape[0]
    except KeyError as error:
        raise UserError(f"{place}: holds no {error.args[0]}", expected=TEXT_NAME) from None
    blocks = {int(name.split(".")[2]) for name in weights if name.startswith("encoder.block.")}
    return UMT5Config(
        vocab_size=vocab_size, d_model=dim, d_kv=inner_dim // num_heads, d_ff=ffn_dim, num_layers=max(blocks) + 1,
        num_heads=num_heads, relative_attention_num_buckets=num_buckets, relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
