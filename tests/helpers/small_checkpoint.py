"""A small checkpoint with random weights in the official layout: VAE, text encoder, tokenizer and DiT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from preprocess.encoders.load import OFFICIAL_TEXT, OFFICIAL_VAE
from preprocess.encoders.random_weights import (
    build_random_text_encoder,
    build_random_vae,
    load_tokenizer_model,
    train_tokenizer_model,
)
from train.config.model import DiTConfig
from train.model.dit import build_model

# [official name, diffusers name, published shape] of Wan2.2_VAE.pth: names and shapes as `WanVAE_` of vae2_2.py has
# them; with this map, latents, pixels and embeddings agreed with the official modules to 1e-6 when it was written down.
VAE_TABLE = json.loads((Path(__file__).parents[1] / "data" / "wan22_vae_names.json").read_text())
TEXT_TABLE = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
    **{
        f"blocks.{n}.{official}.weight": f"encoder.block.{n}.layer.{theirs}.weight"
        for n in range(24)
        for official, theirs in {
            "norm1": "0.layer_norm",
            "attn.q": "0.SelfAttention.q",
            "attn.k": "0.SelfAttention.k",
            "attn.v": "0.SelfAttention.v",
            "attn.o": "0.SelfAttention.o",
            "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
            "norm2": "1.layer_norm",
            "ffn.gate.0": "1.DenseReluDense.wi_0",
            "ffn.fc1": "1.DenseReluDense.wi_1",
            "ffn.fc2": "1.DenseReluDense.wo",
        }.items()
    },
}
"""Name in models_t5_umt5-xxl-enc-bf16.pth → name in transformers."""
DIMS = DiTConfig(dim=64, num_heads=2, num_layers=2, ffn_dim=128, text_dim=64, text_len=160, freq_dim=32)


def write_checkpoint(folder: Path) -> Path:
    """What `wanprep fetch-model` brings, in small."""
    tokenizer = load_tokenizer_model(train_tokenizer_model())
    tokenizer.save_pretrained(folder / "google/umt5-xxl")
    vae, text = build_random_vae(0).state_dict(), build_random_text_encoder(0, len(tokenizer)).state_dict()
    torch.save({official: vae[theirs].clone() for official, theirs, _ in VAE_TABLE}, folder / OFFICIAL_VAE)
    texts = {official: text[theirs].clone() for official, theirs in TEXT_TABLE.items() if theirs in text}
    torch.save(texts, folder / OFFICIAL_TEXT)
    save_file(build_model(DIMS, seed=0).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "WanModel", "dim": DIMS.dim, "eps": DIMS.eps, "ffn_dim": DIMS.ffn_dim,
        "freq_dim": DIMS.freq_dim, "in_dim": DIMS.in_channels, "model_type": "ti2v", "num_heads": DIMS.num_heads,
        "num_layers": DIMS.num_layers, "out_dim": DIMS.out_channels, "text_len": DIMS.text_len,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
