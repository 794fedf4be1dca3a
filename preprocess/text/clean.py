"""The model's own text cleaning, and sentences of Korean and other scripts."""

from __future__ import annotations

import functools
import html
import re
from types import ModuleType

from shards.errors import UserError

_SPACE = re.compile(r"\s+")
_LINE = re.compile(r"[\r\n]+")
_CLOSERS = "\"'”’」』)]》〉"
_SENTENCE_END = re.compile(rf"(?:[.!?…]+[{re.escape(_CLOSERS)}]*(?=\s)|[。！？]+[{re.escape(_CLOSERS)}]*)")
_NOT_AN_END = re.compile(r"(?:^|[\s(\"'])(?:[A-Za-z]|[0-9]{1,3}|Mr|Mrs|Ms|Dr|St|No|vs|etc|[A-Za-z](?:\.[A-Za-z])+)\.$")
_NOT_A_WORD = re.compile(r"[\W_]+")


def clean_text(text: str) -> str:
    """Clean as Wan2.2 cleans a prompt (`wan/modules/tokenizers.py`, clean="whitespace").

    ftfy.fix_text, html.unescape twice, whitespace collapsed. ftfy changes tokens (it folds the full-width comma), so
    without it training and inference would read different words: a missing ftfy is a UserError, never a fallback.
    """
    fixed = _ftfy().fix_text(text)
    return _SPACE.sub(" ", html.unescape(html.unescape(fixed)).strip()).strip()


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, in order, stripped, none empty; joined by spaces they give its words back.

    A sentence ends at `.`, `!`, `?`, `…` before a space, at the full-width marks anywhere, and at a line's end; not
    after an initial, a number in a list (`1. 시장`) or a common abbreviation. Korean endings without a mark (`…한다 …`)
    are not taken for ends: `다` also ends words in the middle of a sentence.
    """
    return [sentence for line in _LINE.split(text) for sentence in _split_line(line)]


def sentence_key(text: str) -> str:
    """What makes two sentences the same: letters and digits, without case, marks or spaces."""
    return _NOT_A_WORD.sub("", text.casefold())


def _split_line(line: str) -> list[str]:
    sentences = []
    start = 0
    for match in _SENTENCE_END.finditer(line):
        # An abbreviation is looked for in a bounded tail, so that a long line costs no square of its length.
        if _NOT_AN_END.search(line[max(start, match.end() - 24) : match.end()]):
            continue
        sentences.append(line[start : match.end()])
        start = match.end()
    sentences.append(line[start:])
    return [stripped for sentence in sentences if (stripped := sentence.strip())]


@functools.cache
def _ftfy() -> ModuleType:
    try:
        import ftfy
    except ImportError:
        raise UserError(
            "ftfy is not installed",
            expected="the text cleaning that the model was trained with",
            fix="pip install ftfy",
        ) from None
    module: ModuleType = ftfy
    return module
