"""The second pass: captions of every latent's window, embedded, into a text set; latents and videos are not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from preprocess.build.clip import internal_error, propagates
from preprocess.build.dataset_info import add_text_set, find_info
from preprocess.build.processes import run_processes
from preprocess.build.worker import Description, ErrorsInARow, library_versions
from preprocess.config import PrepConfig
from preprocess.corpus.records import Record
from preprocess.encoders.encoders import devices_of
from preprocess.plan.plan import open_plan
from preprocess.rejection import Rejection
from preprocess.text.captions import Captions, compose_all, with_prefix
from preprocess.text.clean import clean_text
from shards.console import LOG
from shards.errors import UserError
from shards.format.arrays import array_facts, encode_array
from shards.format.commit import Commit, LatentSummary, SampleInfo, is_committed, read_commit
from shards.format.identity import refuse_mismatch
from shards.format.names import LATENTS, NULL_UNIT, text_kind, text_member
from shards.format.sealed_json import canonical_json
from shards.storage import open_storage
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
_REMEMBERED_TEXTS = 64
"""Embeddings kept for equal captions that follow soon; the longest takes 4 MiB."""


class TextCounts(NamedTuple):
    """What a pass over a text set wrote."""

    samples: int = 0
    embeddings: int = 0
    tokens: int = 0
    cut: int = 0
    """Samples whose captions lost sentences to the token limit."""
    without_words: int = 0
    """Samples for which the template found nothing: they hold the empty caption's embedding."""


class UnitTexts(NamedTuple):
    """A unit that was embedded."""

    unit: int
    counts: TextCounts | None
    """None: an internal error in one of its texts; it is not committed."""


def build_texts(
    storage: Storage,
    set_name: str,
    units: Iterable[int],
    config: PrepConfig,
    scratch: Path,
    *,
    on_unit: Callable[[int, TextCounts | None], None],
    on_worker: Callable[[], None] = lambda: None,
) -> None:
    """Embed the captions of `units`, whose latents are committed, into text set `set_name`, on every GPU here.

    `on_worker` is called for each encoder that is loaded; `on_unit` with a unit's counts, or None where an internal
    error in one of its texts left it without a commit. Raises UserError.
    """
    config = _settle_precision(storage, set_name, config)
    if not is_committed(storage, text_kind(set_name), NULL_UNIT):
        units = chain([NULL_UNIT], units)  # not a list: units may be claimed as they are taken
    first: list[Description] = []

    def on_description(about: Description) -> None:
        on_worker()
        if first:
            refuse_mismatch(about.identity, first[0].identity, "another worker of this pass")
            return
        first.append(about)
        add_text_set(storage, set_name, about.identity, about.note)
        if about.note:
            LOG.warning("text encoder: %s: the embeddings are for demonstration only", about.note)

    make_worker = partial(TextWorker, set_name=set_name)
    devices = devices_of(config)
    if len(devices) > 1:
        run_processes(
            config, devices, units, scratch, make_worker,
            on_description=on_description, on_row=lambda row: on_unit(*row), on_unit=lambda unit: None,
        )  # fmt: skip
        return
    worker = make_worker(config, scratch, device=devices[0])
    for _ in worker.commits(units, lambda row: on_unit(*row), on_description):
        pass


class TextWorker:
    """The loaded text encoder of one device, and what goes with it; as `UnitWorker` is for latents."""

    def __init__(self, config: PrepConfig, scratch: Path, *, set_name: str, device: str, num_workers: int = 1) -> None:
        from preprocess.encoders.encoders import load_text_encoder, load_tokenizer

        encoders = config.encoders.model_copy(update={"device": device})
        self._config, self._scratch, self._set_name, self._num_workers = config, scratch, set_name, num_workers
        self._storage = open_storage(config.output)
        self._plan = open_plan(self._storage)
        self._encoder = encoder = load_text_encoder(encoders, load_tokenizer(encoders))
        identity = text_identity(config, encoder)
        self.description = Description(identity, encoder.note, {**library_versions(), **encoder.provenance()})
        # A copy: torch allocates its array between what the forward pass frees, and the heap would grow with each text.
        self._embed = lru_cache(_REMEMBERED_TEXTS)(lambda text: encoder.embed(text).copy())
        self._errors = ErrorsInARow()

    def commits(
        self,
        units: Iterable[int],
        on_row: Callable[[UnitTexts], None],
        on_description: Callable[[Description], None],
    ) -> Iterator[Commit | UnitTexts]:
        """Embed units as they are handed out; `on_row` is given the counts of each. Raises UserError."""
        from preprocess.encoders.encoders import cpu_threads

        on_description(self.description)
        with cpu_threads(1, self._num_workers):
            for unit in units:
                if unit == NULL_UNIT:
                    self._write_null()
                    yield UnitTexts(unit, TextCounts())
                    continue
                commit, written = self._write_unit(unit)
                on_row(written)
                yield commit or written

    def _write_null(self) -> None:
        negative = negative_prompt(self._config)
        num_tokens, most = self._encoder.tokenizer.count(negative), self._config.captions.max_tokens
        if num_tokens > most:
            raise UserError(f"captions.negative_prompt: {num_tokens} tokens", expected=f"at most {most}")
        about = self.description
        write_null_embeddings(
            self._storage, self._set_name, about.identity, self._embed(""), self._embed(negative),
            scratch=self._scratch, provenance=about.provenance, negative_prompt=negative,
        )  # fmt: skip

    def _write_unit(self, unit: int) -> tuple[Commit | None, UnitTexts]:
        """The unit's commit; None after an internal error in one of its texts, which is logged and counted."""
        about, kind = self.description, text_kind(self._set_name)
        records = {candidate.record.clip_id: candidate.record for candidate in self._plan.unit(unit)}
        with ShardWriter(self._storage, kind, unit, about.identity, self._scratch, about.provenance) as writer:
            counts = TextCounts()
            for sample in read_commit(self._storage, LATENTS, unit).commit.samples:
                record = _record_of(writer, sample, records)
                try:
                    written = _write_sample(writer, sample, record, self._config, self._encoder, self._embed)
                except Exception as error:
                    if propagates(error, self._scratch):
                        raise
                    self._errors.add(record.clip_id, internal_error("text", error, record.clip_id))
                    return None, UnitTexts(unit, None)
                self._errors.add(record.clip_id, None)
                counts = TextCounts(*map(sum, zip(counts, written, strict=True)))
            return writer.seal(), UnitTexts(unit, counts)


def _settle_precision(storage: Storage, set_name: str, config: PrepConfig) -> PrepConfig:
    """The config with `text_precision: auto` replaced by what the set was begun in, if it was."""
    info = find_info(storage)
    if config.encoders.text_precision != "auto" or info is None or set_name not in info.text_sets:
        return config
    begun_in = info.text_sets[set_name].identity["text_encoder"]["precision"]
    return config.model_copy(update={"encoders": config.encoders.model_copy(update={"text_precision": begun_in})})


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


def _record_of(writer: ShardWriter, sample: SampleInfo, records: dict[str, Record]) -> Record:
    summary = sample.summary
    if not isinstance(summary, LatentSummary) or summary.clip not in records:
        raise UserError(
            f"unit {writer}: clip of sample {sample.key!r} is not in the plan's unit",
            fix="`wanshards verify` the dataset: its plan and its latents do not belong together",
        )
    return records[summary.clip]


def _write_sample(
    writer: ShardWriter,
    sample: SampleInfo,
    record: Record,
    config: PrepConfig,
    encoder: TextEncoder,
    embed: Callable[[str], np.ndarray],
) -> TextCounts:
    summary = cast("LatentSummary", sample.summary)
    start_seconds = summary.start_ms / 1000
    end_seconds = start_seconds + summary.frames / config.window.fps
    captions = compose_all(record, start_seconds, end_seconds, config.captions, encoder.tokenizer.count)
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
