"""The second pass: captions of every latent's window, embedded, into a text set; latents and videos are not touched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from preprocess.build.dataset_info import add_text_set
from preprocess.build.worker import library_versions
from preprocess.config import PrepConfig
from preprocess.corpus.records import Record
from preprocess.plan.plan import Plan
from preprocess.rejection import Rejection
from preprocess.text.captions import Captions, compose_all, with_prefix
from preprocess.text.clean import clean_text
from shards.console import LOG
from shards.errors import UserError
from shards.format.arrays import array_facts, encode_array
from shards.format.commit import LatentSummary, SampleInfo, is_committed, read_commit
from shards.format.identity import refuse_mismatch
from shards.format.names import LATENTS, NULL_UNIT, text_kind, text_member
from shards.format.sealed_json import canonical_json
from shards.storage.base import Storage
from shards.write.shard_writer import ShardWriter, write_null_embeddings

if TYPE_CHECKING:
    from preprocess.encoders.encoders import TextEncoder

# `sample_neg_prompt` of Wan2.2's shared_config.py: what the model's own sampler uses where no prompt is given.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
_REMEMBERED_BYTES = 256 << 20
_REMEMBERED_TEXTS = 256


class TextCounts(NamedTuple):
    """What a pass over a text set wrote."""

    samples: int = 0
    embeddings: int = 0
    tokens: int = 0
    cut: int = 0
    """Samples whose captions lost sentences to the token limit."""
    without_words: int = 0
    """Samples for which the template found nothing: they hold the empty caption's embedding."""


def build_texts(
    storage: Storage,
    plan: Plan,
    set_name: str,
    units: Sequence[int],
    config: PrepConfig,
    scratch: Path,
    *,
    on_unit: Callable[[int, TextCounts], None],
) -> None:
    """Embed the captions of `units` (their latents are committed) into text set `set_name`. Raises UserError."""
    from preprocess.encoders.encoders import cpu_threads, load_text_encoder, load_tokenizer

    encoder = load_text_encoder(config.encoders, load_tokenizer(config.encoders))
    identity = text_identity(config, encoder)
    add_text_set(storage, set_name, identity, encoder.note)
    if encoder.note:
        LOG.warning("text encoder: %s: the embeddings are for demonstration only", encoder.note)
    provenance = {**library_versions(), **encoder.provenance()}
    kind = text_kind(set_name)
    embed = _remember(encoder.embed)
    if not is_committed(storage, kind, NULL_UNIT):
        _write_nulls(storage, set_name, identity, config, encoder, scratch, provenance)
    with cpu_threads(1):
        for unit in units:
            records = {candidate.record.clip_id: candidate.record for candidate in plan.unit(unit)}
            with ShardWriter(storage, kind, unit, identity, scratch, provenance) as writer:
                counts = TextCounts()
                for sample in read_commit(storage, LATENTS, unit).commit.samples:
                    counts = _add(counts, _write_sample(writer, sample, records, config, encoder, embed))
                writer.seal()
            on_unit(unit, counts)


def text_identity(config: PrepConfig, encoder: TextEncoder) -> dict[str, Any]:
    """What decides a text set's numbers: encoder, tokenizer, cleaning, templates, limits, negative prompt."""
    return {"text_encoder": encoder.identity(), **_caption_identity(config)}


def check_settled_texts(identity: Mapping[str, Any], config: PrepConfig, where: str) -> None:
    """Refuse a config whose captions differ from those of the set that is there, without loading the encoder."""
    fix = "give the new captions a set of their own (`wanprep recaption SET CONFIG`), or take back the change"
    refuse_mismatch({**identity, **_caption_identity(config)}, identity, where, fix)


def _caption_identity(config: PrepConfig) -> dict[str, Any]:
    captions = config.captions
    templates = (captions.template, *captions.variants)
    return {
        "templates": [with_prefix(template, captions.prefix) for template in templates],  # no prefix changes nothing
        "max_tokens": captions.max_tokens,
        "negative_prompt": negative_prompt(config),
    }


def negative_prompt(config: PrepConfig) -> str:
    """The text of the second null embedding, cleaned."""
    chosen = config.captions.negative_prompt
    return clean_text(NEGATIVE_PROMPT if chosen is None else chosen)


def _write_nulls(
    storage: Storage,
    set_name: str,
    identity: dict[str, Any],
    config: PrepConfig,
    encoder: TextEncoder,
    scratch: Path,
    provenance: dict[str, str],
) -> None:
    negative = negative_prompt(config)
    num_tokens = encoder.tokenizer.count(negative)
    if num_tokens > config.captions.max_tokens:
        raise UserError(
            f"captions.negative_prompt: {num_tokens} tokens", expected=f"at most {config.captions.max_tokens}"
        )
    write_null_embeddings(
        storage, set_name, identity, encoder.embed(""), encoder.embed(negative),
        scratch=scratch, provenance=provenance, negative_prompt=negative,
    )  # fmt: skip


def _write_sample(
    writer: ShardWriter,
    sample: SampleInfo,
    records: dict[str, Record],
    config: PrepConfig,
    encoder: TextEncoder,
    embed: Callable[[str], np.ndarray],
) -> TextCounts:
    summary = sample.summary
    if not isinstance(summary, LatentSummary) or summary.clip not in records:
        raise UserError(
            f"unit {writer}: clip of sample {sample.key!r} is not in the plan's unit",
            fix="`wanshards verify` the dataset: its plan and its latents do not belong together",
        )
    start_seconds = summary.start_ms / 1000
    end_seconds = start_seconds + summary.frames / config.window.fps
    captions = compose_all(records[summary.clip], start_seconds, end_seconds, config.captions, encoder.tokenizer.count)
    texts = [""] if isinstance(captions, Rejection) else [caption.text for caption in captions.composed]
    arrays = [embed(text) for text in texts]
    tokens = [len(array) for array in arrays]
    members = {"json": canonical_json(_text_json(captions, texts, arrays))}
    members |= {text_member(variant): encode_array(array) for variant, array in enumerate(arrays)}
    writer.add(sample.key, members, {"variants": len(arrays), "tokens": tokens})
    is_cut = isinstance(captions, Captions) and any(
        cut.why != "repeated" for caption in captions.composed for cut in caption.cut
    )
    return TextCounts(1, len(arrays), sum(tokens), int(is_cut), int(isinstance(captions, Rejection)))


def _text_json(captions: Captions | Rejection, texts: list[str], arrays: list[np.ndarray]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "captions": texts,
        "cut": [[] for _ in texts],
        "tokens": [len(array) for array in arrays],
        "text": [array_facts(array) for array in arrays],
    }
    if isinstance(captions, Rejection):
        return {**facts, "refused": f"{captions.reason}: {captions.detail}"}
    return {
        **facts,
        "cut": [[cut.model_dump(mode="json") for cut in caption.cut] for caption in captions.composed],
        "outside": [caption.num_outside for caption in captions.composed],
        "skipped": [skipped.model_dump(mode="json") for skipped in captions.skipped],
    }


def _remember(embed: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Equal captions are embedded once, as long as they come near each other: within so many texts and bytes."""
    seen: OrderedDict[str, np.ndarray] = OrderedDict()
    num_bytes = 0

    def remembered(text: str) -> np.ndarray:
        nonlocal num_bytes
        if text in seen:
            seen.move_to_end(text)
            return seen[text]
        # A copy: torch's own lies between what its forward pass frees, and the heap grows by it with each text.
        seen[text] = array = embed(text).copy()
        num_bytes += array.nbytes
        while len(seen) > _REMEMBERED_TEXTS or (num_bytes > _REMEMBERED_BYTES and len(seen) > 1):
            num_bytes -= seen.popitem(last=False)[1].nbytes
        return array

    return remembered


def _add(left: TextCounts, right: TextCounts) -> TextCounts:
    return TextCounts(*(a + b for a, b in zip(left, right, strict=True)))
