"""The words of one window: levels matched to it, joined by a template, at most so many tokens of whole sentences.

Object and scene captions are time-coded and count only where they overlap the window; semantic, application and speech
speak of the whole clip. A sentence said twice is said once. When the text is too long, whole sentences are cut from the
least visual level first: speech, application, semantic, scene, object, each from its end. What was cut is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Formatter
from typing import Literal, NamedTuple

from preprocess.config import CAPTION_LEVELS, CaptionsConfig
from preprocess.corpus.records import Caption, Record
from preprocess.rejection import Rejection
from preprocess.text.clean import clean_text, sentence_key, split_sentences
from shards.config import Config

CountTokens = Callable[[str], int]
"""Tokens of a cleaned text as the text encoder counts them, the end token included."""

MIN_OVERLAP = 0.25
"""Part of the window, or of the caption where that is shorter, that a time-coded caption must share with the window."""


class Cut(Config):
    """A sentence that is not in the text, and why."""

    level: str
    sentence: str
    why: Literal["repeated", "over-limit", "sentence-over-limit"]


class Composed(Config):
    """One caption of a sample, cleaned: it is embedded as it is."""

    text: str
    num_tokens: int
    """End token included."""
    cut: tuple[Cut, ...] = ()
    num_outside: int = 0
    """Time-coded captions left out because they speak of other stretches of the clip."""


class Skipped(Config):
    """A variant's template that gave no caption of its own for this sample."""

    template: str
    why: str


class Captions(Config):
    """All captions of a sample, the main template's first; at least one."""

    composed: tuple[Composed, ...]
    skipped: tuple[Skipped, ...] = ()


class _Sentence(NamedTuple):
    level: str
    text: str


def compose_all(
    record: Record, start_seconds: float, end_seconds: float, config: CaptionsConfig, count_tokens: CountTokens
) -> Captions | Rejection:
    """Every caption of the window: `config.template`, then `config.variants`. The main one's rejection is the sample's.

    A variant that gives nothing, or the same text as one before it, is listed in `skipped`.
    """
    composed: list[Composed] = []
    skipped: list[Skipped] = []
    for template in (config.template, *config.variants):
        result = compose(
            record,
            start_seconds,
            end_seconds,
            with_prefix(template, config.prefix),
            max_tokens=config.max_tokens,
            count_tokens=count_tokens,
        )
        if isinstance(result, Rejection):
            if not composed:
                return result
            skipped.append(Skipped(template=template, why=result.reason))
        elif any(result.text == other.text for other in composed):
            skipped.append(Skipped(template=template, why="same-text"))
        else:
            composed.append(result)
    return Captions(composed=tuple(composed), skipped=tuple(skipped))


def compose(
    record: Record,
    start_seconds: float,
    end_seconds: float,
    template: str,
    *,
    max_tokens: int,
    count_tokens: CountTokens,
) -> Composed | Rejection:
    """One caption for the window [start_seconds, end_seconds) of the clip.

    Rejected as `no-caption` where the template finds no words, and `caption-too-long` where not one whole sentence
    fits into `max_tokens`.
    """
    wanted = [level for level in CAPTION_LEVELS if level in _fields(template)]
    sentences, cut, num_outside = _gather(record, start_seconds, end_seconds, wanted)
    if not sentences:
        return Rejection("caption", "no-caption", f"no words for the window at {start_seconds:.3f} s")
    kept, over = _fit(sentences, template, max_tokens, count_tokens)
    if not kept:
        return Rejection("caption", "caption-too-long", f"no whole sentence fits into {max_tokens} tokens")
    text = _render(template, kept)
    return Composed(text=text, num_tokens=count_tokens(text), cut=tuple(cut + over), num_outside=num_outside)


def overlaps(caption: Caption, start_seconds: float, end_seconds: float) -> bool:
    """Whether a caption speaks of the window: it shares `MIN_OVERLAP` of the shorter of the two."""
    first = 0.0 if caption.start_seconds is None else caption.start_seconds
    last = float("inf") if caption.end_seconds is None else caption.end_seconds
    shared = min(last, end_seconds) - max(first, start_seconds)
    shorter = min(last - first, end_seconds - start_seconds)
    return shared >= 0 if shorter <= 0 else shared > 0 and shared >= MIN_OVERLAP * shorter


def with_prefix(template: str, prefix: str) -> str:
    """The template behind `captions.prefix`, cleaned like a caption, its braces taken as they are."""
    plain = clean_text(prefix).replace("{", "{{").replace("}", "}}")
    return f"{plain} {template}" if plain else template


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _gather(
    record: Record, start_seconds: float, end_seconds: float, wanted: Sequence[str]
) -> tuple[list[_Sentence], list[Cut], int]:
    """Sentences by falling worth, each once; what was repeated; how many captions speak of other stretches."""
    sentences: list[_Sentence] = []
    cut: list[Cut] = []
    seen: set[str] = set()
    num_outside = 0
    for level in wanted:
        captions = _captions_of(record, level)
        inside = [caption for caption in captions if overlaps(caption, start_seconds, end_seconds)]
        num_outside += len(captions) - len(inside)
        for sentence in (each for caption in inside for each in split_sentences(clean_text(caption.text))):
            key = sentence_key(sentence) or sentence
            if key in seen:
                cut.append(Cut(level=level, sentence=sentence, why="repeated"))
            else:
                seen.add(key)
                sentences.append(_Sentence(level, sentence))
    return sentences, cut, num_outside


def _captions_of(record: Record, level: str) -> tuple[Caption, ...]:
    if level == "speech":
        return (Caption(text=record.speech),) if record.speech else ()
    captions: tuple[Caption, ...] = getattr(record, level)
    return tuple(sorted(captions, key=lambda caption: caption.start_seconds or 0.0))


def _fit(
    sentences: list[_Sentence], template: str, max_tokens: int, count_tokens: CountTokens
) -> tuple[list[_Sentence], list[Cut]]:
    """The longest run of sentences, most visual first, whose text fits; the rest as cuts.

    The run is found by doubling and then halving, so that a transcript of a megabyte costs a few short counts.
    """
    cut: list[Cut] = []
    kept: list[_Sentence] = []
    rest = sentences
    while rest:
        num_more = _num_fitting(kept, rest, template, max_tokens, count_tokens)
        kept, rest = kept + rest[:num_more], rest[num_more:]
        # A sentence that fits into no caption at all must not keep those behind it out.
        if not rest or count_tokens(_render(template, [rest[0]])) <= max_tokens:
            break
        cut.append(Cut(level=rest[0].level, sentence=rest[0].text, why="sentence-over-limit"))
        rest = rest[1:]
    return kept, cut + [Cut(level=level, sentence=text, why="over-limit") for level, text in rest]


def _num_fitting(
    kept: list[_Sentence], rest: list[_Sentence], template: str, max_tokens: int, count_tokens: CountTokens
) -> int:
    """How many sentences from the front of `rest` fit behind `kept`."""

    def fits(num: int) -> bool:
        return count_tokens(_render(template, kept + rest[:num])) <= max_tokens

    low, high = 0, 1
    while high <= len(rest) and fits(high):
        low, high = high, 2 * high
    high = min(high, len(rest) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _render(template: str, sentences: list[_Sentence]) -> str:
    """The template with each level's sentences; spaces that empty levels leave are collapsed."""
    levels = {level: " ".join(text for at, text in sentences if at == level) for level in CAPTION_LEVELS}
    return " ".join(template.format(**levels).split())
