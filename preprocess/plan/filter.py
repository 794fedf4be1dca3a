"""What a record must say of itself to become a candidate. Each rule is a config field and has its own reason code.

The order is fixed, so that a record that breaks several rules always ends with the same reason: media type, declared
length, captions present, their length, words repeated, characters repeated.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from preprocess.config import CAPTION_LEVELS, SieveConfig
from preprocess.rejection import Rejection, short

TEXT_LEVELS = tuple(level for level in CAPTION_LEVELS if level != "speech")
"""Levels whose texts are captions; speech is a transcript."""
_THREE = re.compile(r"(\S)\1\1")


def filter_metadata(media_type: str | None, seconds: float | None, config: SieveConfig) -> Rejection | None:
    """The rules on what the item is, which come first. An unknown length passes: the probe decides."""
    if media_type is None:
        return Rejection("sieve", "unknown-media-type", "neither media_type nor the URL's suffix says video or image")
    if media_type != "video":
        return None if config.images else Rejection("sieve", "image", "sieve.images is false")
    if seconds is not None and seconds < config.min_seconds:
        return Rejection("sieve", "too-short", f"declared {seconds:g} s < {config.min_seconds:g} s")
    if seconds is not None and seconds > config.max_seconds:
        return Rejection("sieve", "too-long", f"declared {seconds:g} s > {config.max_seconds:g} s")
    return None


def caption_texts(fields: Mapping[str, Any]) -> list[str]:
    """The texts of all caption levels of a record's plain fields (`records.read_fields`)."""
    return [caption["text"] for level in TEXT_LEVELS for caption in fields[level]]


def filter_captions(texts: list[str], config: SieveConfig) -> Rejection | None:
    """The rules on the texts of all caption levels."""
    if not texts:
        return Rejection("sieve", "no-caption", "no text at any level (speech is not a caption)")
    joined = "\n".join(texts)
    if len(joined) < config.min_caption_characters:
        return Rejection("sieve", "caption-too-short", f"{len(joined)} characters < {config.min_caption_characters}")
    if len(joined) > config.max_caption_characters:
        return Rejection("sieve", "caption-too-long", f"{len(joined)} characters > {config.max_caption_characters}")
    most = config.max_word_repeats
    # Where the words of all texts together repeat too little, no single text's do: this check is enough for most.
    if most is not None and _num_repeats(joined) >= most:
        for text in texts:
            if word := repeated_word(text, most):
                return Rejection("sieve", "word-repeated", f"{short(word, 40)} more than {most} times in one caption")
    most = config.max_character_repeats
    if most is not None and (run := repeated_character(joined, most)):
        return Rejection("sieve", "character-repeated", f"{short(run[0])} {len(run)} times in a row, more than {most}")
    return None


def repeated_word(text: str, most: int) -> str | None:
    """A word (between spaces) that occurs more than `most` times in the text, or None."""
    if _num_repeats(text) < most:
        return None
    word, count = Counter(text.split()).most_common(1)[0]
    return word if count > most else None


def _num_repeats(text: str) -> int:
    """Words of a text that occurred before in it."""
    words = text.split()
    return len(words) - len(set(words))


def repeated_character(text: str, most: int) -> str | None:
    """The first run of one visible character longer than `most`, or None."""
    # A run of most + 1 holds three neighbours of a sampling at a third of it: a cheap test before the real one.
    if most >= 2 and _THREE.search(text[:: (most + 1) // 3]) is None:
        return None
    match = _run(most).search(text)
    return match[0] if match else None


@functools.cache
def _run(most: int) -> re.Pattern[str]:
    return re.compile(rf"(\S)\1{{{most},}}")
