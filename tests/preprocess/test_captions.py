"""Captions of a window: which words, in which order, how many, and what was cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.config import CaptionsConfig
from preprocess.corpus.records import Caption, Record
from preprocess.rejection import Rejection
from preprocess.text.captions import compose, compose_all, overlaps
from preprocess.text.clean import clean_text, sentence_key, split_sentences
from shards.config import validate_config
from shards.errors import UserError

ALL = CaptionsConfig().template


def count_words(text):
    """A stand-in for the tokenizer: words, and the end token."""
    return len(text.split()) + 1


def record(**levels):
    return Record(clip_id="a", source="a.json", media_type="video", **levels)


def timed(text, start, end):
    return Caption(text=text, start_seconds=start, end_seconds=end)


MARKET = record(
    object=(timed("상인이 과일을 판다.", 14.0, 21.0), timed("아이가 뛴다.", 2.0, 5.0)),
    scene=(timed("골목을 사람들이 걷는다. 하늘이 파랗다.", 0.0, 12.0), timed("배가 떠난다.", 12.0, 21.0)),
    semantic=(Caption(text="활기찬 아침이다. 하늘이 파랗다!"),),
    application=(Caption(text="홍보에 쓸 수 있다."),),
    speech="어서 오세요.",
)


def composed(of=MARKET, start=3.0, end=5.04, template=ALL, max_tokens=512):
    return compose(of, start, end, template, max_tokens=max_tokens, count_tokens=count_words)


def test_levels_in_order_and_of_this_window_only():
    caption = composed()
    assert caption.text == (
        "아이가 뛴다. 골목을 사람들이 걷는다. 하늘이 파랗다. 활기찬 아침이다. 홍보에 쓸 수 있다. 어서 오세요."
    )
    assert caption.num_outside == 2
    assert caption.num_tokens == count_words(caption.text)
    assert [(cut.level, cut.sentence, cut.why) for cut in caption.cut] == [("semantic", "하늘이 파랗다!", "repeated")]


def test_a_caption_of_seconds_14_to_21_is_not_of_second_3():
    assert "과일" not in composed().text
    assert "과일" in composed(start=15.0, end=17.04).text
    assert "뛴다" not in composed(start=15.0, end=17.04).text


@pytest.mark.parametrize(
    ("span", "window", "expected"),
    [
        ((None, None), (3.0, 5.0), True),
        ((0.0, 2.0), (3.0, 5.0), False),
        ((0.0, 3.0), (3.0, 5.0), False),
        ((0.0, 3.4), (3.0, 5.0), False),
        ((0.0, 3.5), (3.0, 5.0), True),
        ((4.5, None), (3.0, 5.0), True),
        ((None, 3.2), (3.0, 5.0), False),
        ((3.1, 3.3), (3.0, 5.0), True),
        ((4.0, 4.0), (3.0, 5.0), True),
        ((9.0, 9.0), (3.0, 5.0), False),
        ((0.0, 9.0), (3.0, 5.0), True),
        ((None, None), (0.0, 0.0), True),
    ],
)
def test_overlap(span, window, expected):
    assert overlaps(timed("x", *span), *window) is expected


@pytest.mark.parametrize(
    ("max_tokens", "levels"),
    [
        (16, {"object", "scene", "semantic", "application", "speech"}),
        (15, {"object", "scene", "semantic", "application"}),
        (14, {"object", "scene", "semantic", "application"}),
        (13, {"object", "scene", "semantic"}),
        (10, {"object", "scene", "semantic"}),
        (9, {"object", "scene"}),
        (6, {"object", "scene"}),
        (5, {"object"}),
    ],
)
def test_the_least_visual_words_are_cut_first(max_tokens, levels):
    caption = composed(max_tokens=max_tokens)
    assert caption.num_tokens <= max_tokens
    markers = {"object": "뛴다", "scene": "걷는다", "semantic": "활기찬", "application": "홍보", "speech": "어서"}
    assert {level for level, word in markers.items() if word in caption.text} == levels
    over = [cut for cut in caption.cut if cut.why == "over-limit"]
    assert bool(over) == (levels != set(markers))
    # Nothing is lost: what is not in the text is listed.
    whole = split_sentences(composed().text)
    assert all(sentence in caption.text or sentence in [cut.sentence for cut in over] for sentence in whole)


def test_the_templates_order_is_not_the_order_of_worth():
    caption = composed(template="{speech} {semantic} {object}", max_tokens=6)
    assert caption.text == "활기찬 아침이다. 아이가 뛴다."


def test_a_sentence_that_never_fits_does_not_keep_the_others_out():
    of = record(object=(Caption(text="말 " * 30 + "끝. 짧다."),), semantic=(Caption(text="아침이다."),))
    caption = composed(of, max_tokens=8)
    assert caption.text == "짧다. 아침이다."
    assert [cut.why for cut in caption.cut] == ["sentence-over-limit"]
    only = record(object=(Caption(text="말 " * 30 + "끝."),))
    assert composed(only, max_tokens=8) == Rejection(
        "caption", "caption-too-long", "no whole sentence fits into 8 tokens"
    )


def test_no_words_is_a_rejection():
    assert composed(template="{object}", start=9.0, end=11.0).reason == "no-caption"
    assert composed(record()).reason == "no-caption"


def test_a_transcript_of_a_megabyte_costs_few_counts():
    counted = []

    def count(text):
        counted.append(len(text))
        return count_words(text)

    of = record(object=(Caption(text="시장이다."),), speech="".join(f"말이 {n}번 있다. " for n in range(100_000)))
    caption = compose(of, 0.0, 2.0, ALL, max_tokens=512, count_tokens=count)
    assert 500 < caption.num_tokens <= 512
    assert sum(counted) < 200_000
    assert len(caption.cut) > 99_000


def test_words_that_look_like_a_template_are_words():
    caption = composed(
        record(object=(Caption(text="{speech} {0.__class__} %s를 판다."),), speech="비밀."), template="{object}"
    )
    assert caption.text == "{speech} {0.__class__} %s를 판다."


def test_variants():
    config = CaptionsConfig(variants=("{semantic}", "{object} {object}", "{semantic} {application}", "{semantic}"))
    found = compose_all(record(semantic=(Caption(text="아침이다."),)), 0.0, 2.0, config, count_words)
    assert [each.text for each in found.composed] == ["아침이다."]
    assert [each.why for each in found.skipped] == ["same-text", "no-caption", "same-text", "same-text"]
    found = compose_all(MARKET, 3.0, 5.04, config, count_words)
    assert [each.text for each in found.composed[1:]] == [
        "활기찬 아침이다. 하늘이 파랗다!",
        "아이가 뛴다. 아이가 뛴다.",
        "활기찬 아침이다. 하늘이 파랗다! 홍보에 쓸 수 있다.",
    ]
    assert isinstance(compose_all(record(), 0.0, 2.0, config, count_words), Rejection)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{objekt}", "did you mean {object}"),
        ("words", "names no level"),
        ("{object", "not a template"),
        ("{object:>9}", "no level"),
        ("{}", "no level"),
        ("{object.__class__}", "no level"),
    ],
)
def test_templates_are_checked_with_the_config(template, said):
    with pytest.raises(UserError, match=said.replace("{", r"\{")):
        validate_config(CaptionsConfig, {"template": template}, origin="test")
    with pytest.raises(UserError, match="variants"):
        validate_config(CaptionsConfig, {"variants": [template]}, origin="test")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("하늘이 파랗다. 바다가 넓다.", ["하늘이 파랗다.", "바다가 넓다."]),
        ("3.5 km를 걷는다. 끝!", ["3.5 km를 걷는다.", "끝!"]),
        ("1. 시장이다. 2. 골목이다.", ["1. 시장이다.", "2. 골목이다."]),
        ("U.S. 군함이 있다. A. 김이 온다.", ["U.S. 군함이 있다.", "A. 김이 온다."]),
        ("뭐라고?! “그렇다.” 그가 말했다…", ["뭐라고?!", "“그렇다.”", "그가 말했다…"]),
        ("第一句。第二句！", ["第一句。", "第二句！"]),
        ("첫 줄\n둘째 줄\r\n\n셋째", ["첫 줄", "둘째 줄", "셋째"]),
        ("마침표가 없는 글", ["마침표가 없는 글"]),
        ("  ", []),
        ("...", ["..."]),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text("가나 .!?。…\n\"'1aA", max_size=80))
def test_sentences_lose_no_word(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() and sentence for sentence in sentences)


def test_the_same_sentence_whatever_its_marks():
    assert sentence_key("하늘이  파랗다.") == sentence_key("하늘이 파랗다!") != sentence_key("바다가 넓다.")


REFERENCE_CASES = [
    "시장，골목（서울）을 걷는다。",
    "&amp;amp;lt;b&gt; 하늘",
    "<i> &amp;amp;lt; 하늘",  # ftfy leaves entities beside a tag alone: html.unescape must be called twice
    "<i> &amp;lt; 하늘",
    "schÃ¶n caf\u00e9",
    "  줄\n바꿈\t과   빈칸 ",
    "“따옴표” ﬁne ＡＢＣ",
    "&amp;nbsp;한글",
    "e\u0301 ｱｲｳ ½",
    "",
]


@pytest.mark.parametrize("text", REFERENCE_CASES)
def test_cleaning_is_the_models(text):
    """Against diffusers' `prompt_clean`, itself the reference tokenizer's cleaning, with ftfy installed."""
    pipeline = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    assert clean_text(text) == pipeline.prompt_clean(text)


def test_the_full_width_comma_is_folded():
    """What the cleaning does not do without ftfy, in silence."""
    assert clean_text("色调艳丽，过曝") == "色调艳丽,过曝"


def test_korean_stays_korean():
    assert clean_text("상인이 시장에서 과일을 판다.") == "상인이 시장에서 과일을 판다."


def test_without_ftfy_there_is_no_caption(monkeypatch):
    import sys

    from preprocess.text import clean as text

    monkeypatch.setitem(sys.modules, "ftfy", None)
    text._ftfy.cache_clear()
    try:
        with pytest.raises(UserError, match="ftfy is not installed"):
            clean_text("가")
    finally:
        text._ftfy.cache_clear()
