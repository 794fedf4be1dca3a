"""The sieve's rules, one by one, at their edges."""

import re

import pytest
from annotations import annotation, encode, sieve
from hypothesis import given
from hypothesis import strategies as st

from preprocess.config import SieveConfig
from preprocess.corpus.records import Caption, Record, parse_record
from preprocess.plan.filter import repeated_character, repeated_word


def record(**changes):
    values = {"clip_id": "a", "source": "a.json", "media_type": "video", "declared_seconds": 10.0}
    return Record(**{**values, "semantic": (Caption(text="시장 풍경이다."),), **changes})


def reason(of, **config):
    refusal = sieve(of, SieveConfig(**config))
    if refusal is None:
        return None
    assert refusal.stage == "sieve"
    assert not refusal.retryable
    return refusal.reason


def words(count, word="하하하하"):
    return (Caption(text=" ".join([word] * count)),)


@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        ({}, {}, None),
        ({"declared_seconds": 3.0}, {}, None),
        ({"declared_seconds": 2.99}, {}, "too-short"),
        ({"declared_seconds": 30.0}, {}, None),
        ({"declared_seconds": 30.01}, {}, "too-long"),
        ({"declared_seconds": None}, {}, None),
        ({"media_type": "image"}, {}, "image"),
        ({"media_type": "image", "declared_seconds": None}, {"images": True}, None),
        ({"media_type": "image", "declared_seconds": 0.1}, {"images": True}, None),
        ({"media_type": None}, {"images": True}, "unknown-media-type"),
        ({"semantic": ()}, {}, "no-caption"),
        ({"semantic": (), "speech": "말만 있다."}, {}, "no-caption"),
        ({"semantic": (), "scene": (Caption(text="장면."),)}, {}, None),
        ({}, {"min_caption_characters": 8}, None),
        ({}, {"min_caption_characters": 9}, "caption-too-short"),
        ({"semantic": (Caption(text="가나다라 " * 300),)}, {"max_word_repeats": None}, None),
        ({"semantic": (Caption(text="가나다라 " * 300 + "."),)}, {"max_word_repeats": None}, "caption-too-long"),
        ({"semantic": words(9)}, {}, None),
        ({"semantic": words(10)}, {}, "word-repeated"),
        ({"semantic": words(10)}, {"max_word_repeats": None}, None),
        ({"semantic": words(9), "object": words(9)}, {}, None),
        ({"semantic": (Caption(text="와" + "!" * 14),)}, {}, None),
        ({"semantic": (Caption(text="와" + "!" * 15),)}, {}, "character-repeated"),
        ({"semantic": (Caption(text="와" + "!" * 15),)}, {"max_character_repeats": None}, None),
        ({"semantic": (Caption(text="ㅋ" * 9),), "object": (Caption(text="ㅋ" * 9),)}, {}, None),
    ],
)
def test_rules(changes, config, expected):
    assert reason(record(**changes), **config) == expected


def test_the_first_rule_gives_the_reason():
    assert reason(record(media_type="image", declared_seconds=1.0, semantic=())) == "image"
    assert reason(record(declared_seconds=1.0, semantic=())) == "too-short"


def test_a_good_annotation_passes():
    assert sieve(parse_record(encode(annotation()), "a.json"), SieveConfig()) is None


@given(st.text("ab \n", max_size=60), st.integers(1, 20))
def test_runs_are_found_as_a_plain_search_finds_them(text, most):
    plain = re.search(rf"(\S)\1{{{most},}}", text)
    assert repeated_character(text, most) == (plain[0] if plain else None)


@given(st.text("ab ", max_size=60), st.integers(1, 10))
def test_words_are_found_as_a_plain_count_finds_them(text, most):
    most_often = max((text.split().count(word) for word in text.split()), default=0)
    found = repeated_word(text, most)
    assert (found is not None) == (most_often > most)
    assert found is None or text.split().count(found) == most_often
