"""Names of the encoders' weights: official on one side, diffusers and transformers on the other; bijective.

Sources: Wan2.2's `wan/modules/vae2_2.py` and `t5.py`; diffusers' `scripts/convert_wan_to_diffusers.py`.
"""

from __future__ import annotations

import re

# Official VAE name -> diffusers name. 196 tensors.
_VAE = (
    (r"conv1\.(.+)", r"quant_conv.\1"),
    (r"conv2\.(.+)", r"post_quant_conv.\1"),
    (r"(encoder|decoder)\.conv1\.(.+)", r"\1.conv_in.\2"),
    (r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.(residual\..+|shortcut\..+)",
     r"encoder.down_blocks.\1.resnets.\2.\3"),
    (r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample\..+|time_conv\..+)",
     r"encoder.down_blocks.\1.downsampler.\2"),
    (r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.(residual\..+|shortcut\..+)",
     r"decoder.up_blocks.\1.resnets.\2.\3"),
    (r"decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample\..+|time_conv\..+)",
     r"decoder.up_blocks.\1.upsampler.\2"),
    (r"(encoder|decoder)\.middle\.0\.(.+)", r"\1.mid_block.resnets.0.\2"),
    (r"(encoder|decoder)\.middle\.1\.(.+)", r"\1.mid_block.attentions.0.\2"),
    (r"(encoder|decoder)\.middle\.2\.(.+)", r"\1.mid_block.resnets.1.\2"),
    (r"(encoder|decoder)\.head\.0\.gamma", r"\1.norm_out.gamma"),
    (r"(encoder|decoder)\.head\.2\.(.+)", r"\1.conv_out.\2"),
)  # fmt: skip
_VAE_PARTS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
# Official UMT5 name -> transformers name. 10 tensors a block, and two.
_TEXT = (
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


def rename_vae(official: str) -> str | None:
    """diffusers' name of an official VAE tensor; None when it has none."""
    renamed = _rename(official, _VAE)
    if renamed is not None:
        for part, ours in _VAE_PARTS.items():
            renamed = renamed.replace(f".{part}.", f".{ours}.")
    return renamed


def rename_text(official: str) -> str | None:
    """transformers' name of an official UMT5 tensor; None when it has none."""
    return _rename(official, _TEXT)


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None
