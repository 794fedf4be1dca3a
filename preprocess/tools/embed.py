"""Prompts and first frames for `wantrain sample`, encoded as shards are: same encoders, cleaning and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocess.config import BucketsConfig, PictureSize, PrepConfig
from preprocess.encoders.encoders import MAX_TOKENS
from preprocess.rejection import ClipRejected, Rejection
from shards.errors import UserError
from shards.files.tensor_files import Prompts, write_latent, write_prompts

if TYPE_CHECKING:
    from preprocess.encoders.encoders import TextEncoder


def embed_prompts(texts: Sequence[str], config: PrepConfig, out: Path) -> Prompts:
    """Embed prompts, the empty text and the negative prompt into one file.

    Raises UserError for a prompt without words, and for one of more tokens than the model takes: nothing is cut.
    """
    from preprocess.build.text_pass import negative_prompt
    from preprocess.encoders.encoders import load_text_encoder, load_tokenizer
    from preprocess.text.clean import clean_text

    tokenizer = load_tokenizer(config.encoders)
    cleaned = [clean_text(text) for text in texts]
    for place, text in enumerate(cleaned):
        count = tokenizer.count(text)
        if not text:
            raise UserError(f"prompt {place}: {texts[place]!r} has no words", expected="some text")
        if count > MAX_TOKENS:
            raise UserError(
                f"prompt {place}: {len(text):,} characters are {count:,} tokens; it begins {text[:60]!r}",
                expected=f"at most {MAX_TOKENS} tokens: the model does not see the rest",
                fix="a shorter prompt",
            )
    encoder = load_text_encoder(config.encoders, tokenizer)
    nulls = (encoder.embed(""), encoder.embed(negative_prompt(config)))
    prompts = Prompts(tuple(cleaned), _embed_all(encoder, cleaned), *nulls, encoder.weights_sha256)
    write_prompts(out, prompts)
    return prompts


def _embed_all(encoder: TextEncoder, texts: Sequence[str]) -> tuple[np.ndarray, ...]:
    return tuple(encoder.embed(text) for text in texts)


def encode_image(image: Path, size: PictureSize, config: PrepConfig, out: Path) -> None:
    """Encode an image as a training sample's frame is: probed, cropped, resized over `size`, cut at the centre.

    Raises UserError for a file that is no picture, or one that would be enlarged or cut beyond reason.
    """
    from preprocess.corpus.records import Record
    from preprocess.encoders.encoders import load_vae_encoder
    from preprocess.video.bucket import choose_bucket
    from preprocess.video.decode import decode_window
    from preprocess.video.probe import probe_clip
    from preprocess.video.window import Window

    config = config.model_copy(
        update={
            "sieve": config.sieve.model_copy(update={"images": True}),
            "buckets": BucketsConfig(sizes=(size,), max_upscale=config.buckets.max_upscale),
        }
    )
    record = Record(clip_id=image.name, source=image.name, media_type="image")
    try:
        facts = probe_clip(image, record, config)
        _refuse_odd_shape(image, facts.display_width, facts.display_height, size)
        bucket = choose_bucket(facts, config.buckets)
        if isinstance(bucket, Rejection):
            raise ClipRejected(bucket)
        frames_THWC = decode_window(image, facts, Window(0.0, 1, "image"), bucket, config)
    except ClipRejected as rejected:
        reason = rejected.rejection
        raise UserError(
            f"{image}: {reason.reason} ({reason.stage}): {reason.detail}",
            expected=f"a picture that fills {size.width}×{size.height}",
            fix="a larger picture, a smaller --width and --height, or -o buckets.max_upscale=1.5",
        ) from None
    vae = load_vae_encoder(config.encoders)
    facts_out = {"vae": vae.weights_sha256, "fps": "24", "name": image.stem}
    write_latent(out, vae.encode(frames_THWC), facts_out)


def _refuse_odd_shape(image: Path, width: float, height: float, size: PictureSize) -> None:
    """Raise UserError when less than a quarter of the picture would be left after the cut at the centre."""
    kept = (width / height) / (size.width / size.height)
    kept = min(kept, 1 / kept)
    if kept < 0.25:
        raise UserError(
            f"{image}: {width:.0f}×{height:.0f} pixels: {size.width}×{size.height} would show {100 * kept:.1f} % of it",
            expected="a picture of about the shape of --width and --height",
            fix="crop it to the part you mean",
        )
