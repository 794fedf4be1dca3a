"""Annotations in any state: a value, a defect or a rejection, never an exception."""

import json

import pytest
from annotations import annotation, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess.corpus import records
from preprocess.corpus.records import MAX_DOCUMENT_BYTES, Record, parse_record, read_fields
from preprocess.rejection import STAGES, Rejection

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["00:00:01;02", "00:01:00;00", "1920, 1080", "video", "29.97", "00:00:21.37", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def paths(value, prefix=()):
    """Every place in a JSON value."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


PATHS = list(paths(annotation()))


def replaced(value, path, new):
    """A copy of `value` with `new` at `path`."""
    copy = json.loads(json.dumps(value))
    if not path:
        return new
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return copy


def parsed(value) -> Record:
    record = parse_record(encode(value), "video/batch_0001/3338987.json")
    assert isinstance(record, Record), record
    return record


def test_a_good_annotation():
    record = parsed(annotation())
    assert record.clip_id == "3338987"
    assert record.source == "video/batch_0001/3338987.json"
    assert (record.media_type, record.declared_width, record.declared_height) == ("video", 1920, 1080)
    assert (record.declared_fps, record.declared_seconds) == (29.97, 21.37)
    assert record.keywords == ("시장", "과일")
    assert record.category == "생활/문화"
    assert record.object[0].start_seconds == pytest.approx(423 * 1001 / 30000)
    assert record.semantic[0].start_seconds is None
    assert record.speech == "어서 오세요."
    assert record.defects == ()


def check_any(data: bytes) -> None:
    """Whatever the bytes: a record that survives its own JSON, or a rejection fit for a ledger."""
    found = parse_record(data, "a.json")
    if isinstance(found, Rejection):
        assert found.stage in STAGES
        found.detail.encode()
        assert len(found.detail) < 2000
    else:
        assert Record.model_validate_json(found.model_dump_json()) == found
        assert 0 < len(found.clip_id) <= 500


@given(st.sampled_from(PATHS), JSON_VALUES)
@settings(max_examples=400)
def test_any_value_in_any_field(path, new):
    check_any(json.dumps(replaced(annotation(), path, new)).encode())


@given(st.binary(max_size=200))
def test_any_bytes(data):
    check_any(data)


@given(st.integers(0, 1800), st.binary(min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_overwritten_bytes(place, new):
    data = encode(annotation())
    check_any(data[:place] + new + data[place + len(new) :])


@given(st.integers(0, 1800))
def test_any_cut(length):
    check_any(encode(annotation())[:length])


@given(JSON_VALUES)
def test_the_fast_parser_reads_what_the_plain_one_reads(value):
    document = annotation()
    document["source_data_info"]["clip_id"] = "x"
    document["extra"] = value
    data = json.dumps(document).encode()
    fast = read_fields(data, "a.json")
    spaced = read_fields(b"\xef\xbb\xbf" + data, "a.json")  # a BOM is what the fast parser refuses
    assert fast == spaced


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not-json"),
        (b"{", "not-json"),
        (b"[1, 2]", "not-object"),
        (b"null", "not-object"),
        (b'{"file_id": "\xff\xfe"}', "not-utf8"),
        (b"[" * 100_000 + b"]" * 100_000, "too-nested"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too-nested"),
        (b'{"file_id": ' + b"1" * 5000 + b"}", "not-json"),
        (b" " * (MAX_DOCUMENT_BYTES + 1), "too-large"),
        (json.dumps({"file_id": "x" * 501}).encode(), "bad-clip-id"),
        (b"\x89PNG\r\n\x1a\n", "not-utf8"),
    ],
)
def test_what_cannot_be_read(data, reason):
    found = parse_record(data, "a.json")
    assert isinstance(found, Rejection)
    assert (found.stage, found.reason, found.retryable) == ("read", reason, False)


def test_no_clip_id():
    data = b'{"raw_data_info": {}}'
    assert parse_record(data, "corpus.jsonl:7").reason == "no-clip-id"
    record = parse_record(data, "video/b/3338987.json")
    assert record.clip_id == "3338987"
    assert "id-from-file-name" in record.defects


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_damage(encoding):
    data = json.dumps(annotation(), ensure_ascii=False).encode(encoding)
    assert parse_record(data, "a.json") == parse_record(encode(annotation()), "a.json")


def test_line_breaks_within_texts_are_borne():
    data = encode(annotation()).replace("과일을 판다.".encode(), "과일을\n판다.".encode())
    assert parse_record(data, "a.json").object[0].text.endswith("과일을\n판다.")


def test_half_a_surrogate_is_fixed_and_said():
    found = parse_record(json.dumps(annotation("clip\ud800")).encode(), "a.json")
    assert found.clip_id == "clip\ufffd"
    assert found.defects == ("bad-unicode",)


MEDIA = "raw_data_info__source_media_info"
DETAILS = f"{MEDIA}__details"
GENERATED = "source_data_info__ai_generated_info"
CAPTIONS = "labeling_data_info__caption_info"


@pytest.mark.parametrize(
    ("direct", "detailed", "size", "defects"),
    [
        ("1280, 720", None, (1280, 720), ()),
        (None, "720 x 512", (720, 512), ()),
        ("1920x1080", "720×480", (1920, 1080), ("resolution-conflict",)),
        ("?", "720*486", (720, 486), ("bad-resolution",)),
        ([640, 640], "", (640, 640), ()),
        ({"width": 640, "height": 480}, "", (640, 480), ()),
        ("0, 0", "100000, 5", (None, None), ("bad-resolution",)),
        ("", None, (None, None), ()),
    ],
)
def test_two_places_for_the_resolution(direct, detailed, size, defects):
    record = parsed(annotation(**{f"{MEDIA}__resolution": direct, f"{DETAILS}__resolution": detailed}))
    assert (record.declared_width, record.declared_height) == size
    assert record.defects == defects


@pytest.mark.parametrize(
    ("length", "seconds", "defects"),
    [
        ("00:00:21.37", 21.37, ()),
        (21, 21.0, ()),
        ("00:00:10;00", 10.01, ()),
        ("", None, ()),
        (None, None, ()),
        ("long", None, ("bad-length",)),
        (0, None, ("bad-length",)),
        (-3, None, ("bad-length",)),
        (1e308, None, ("bad-length",)),
        (True, None, ("bad-length",)),
    ],
)
def test_declared_length(length, seconds, defects):
    record = parsed(annotation(**{f"{DETAILS}__length": length, f"{CAPTIONS}__object_level": []}))
    assert record.declared_seconds == (pytest.approx(seconds) if seconds else None)
    assert record.defects == defects


@pytest.mark.parametrize(
    ("rate", "fps", "defects"),
    [("30000/1001", 30000 / 1001, ()), ("29.97 fps", 29.97, ()), (25, 25.0, ()), ("1/0", None, ("bad-frame-rate",))],
)
def test_declared_frame_rate(rate, fps, defects):
    record = parsed(annotation(**{f"{DETAILS}__frame_rate": rate}))
    assert record.declared_fps == (pytest.approx(fps) if fps else None)
    assert record.defects == defects


def object_level(*captions):
    return annotation(**{f"{CAPTIONS}__object_level": list(captions)})


def test_a_caption_of_unreadable_time_is_left_out():
    """It may speak of another scene, and nobody would notice."""
    unreadable = {"text": "가.", "tc_in": "soon", "tc_out": ""}
    record = parsed(object_level(unreadable, {"text": "나.", "tc_in": "", "tc_out": ""}))
    assert [caption.text for caption in record.object] == ["나."]
    assert record.defects == ("bad-timecode",)


@pytest.mark.parametrize(
    ("caption", "num_left", "defect"),
    [
        ({"text": "가.", "tc_in": "00:00:09;00", "tc_out": "00:00:03;00"}, 0, "reversed-timecode"),
        ({"text": "가.", "tc_in": "00:00:09;55", "tc_out": ""}, 0, "bad-timecode"),
        ({"text": "가.", "tc_in": 7, "tc_out": ""}, 0, "bad-timecode"),
        ({"text": "가.", "tc_in": "00:01:00;00", "tc_out": "00:02:00;02"}, 1, "skipped-timecode"),
        ({"text": "가.", "tc_in": "10:00:00;00", "tc_out": "10:00:05;00"}, 1, "timecode-beyond-clip"),
        ({"text": ["가."]}, 0, "wrong-type-captions"),
        ("가.", 1, "wrong-type-captions"),
    ],
)
def test_mangled_captions(caption, num_left, defect):
    record = parsed(object_level(caption))
    assert len(record.object) == num_left
    assert defect in record.defects


def test_the_same_scene_throughout_is_a_defect():
    spans = [{"tc_in": f"00:00:0{n};00", "tc_out": f"00:00:0{n + 1};00"} for n in range(3)]
    scenes = [{"description": "같은 장면이다.", **span} for span in spans]
    assert parsed(annotation(**{f"{GENERATED}__scene_description_auto": scenes})).defects == ("same-scene-throughout",)


@pytest.mark.parametrize(
    ("media", "url", "found", "defects"),
    [
        ("VIDEO", "https://a/b", "video", ()),
        (None, "https://a/b.mp4?x=1", "video", ("missing-media-type",)),
        (None, "https://a/b.JPG", "image", ("missing-media-type",)),
        ("film", "", None, ("unknown-media-type",)),
        (7, None, None, ("missing-media-type", "wrong-type-media_type")),
    ],
)
def test_media_type(media, url, found, defects):
    record = parsed(annotation(**{f"{MEDIA}__media_type": media, "source_data_info__clip_proxy_url": url}))
    assert record.media_type == found
    assert record.defects == defects


def test_ids_that_differ():
    record = parsed(annotation(file_id="other"))
    assert (record.clip_id, record.defects) == ("3338987", ("id-conflict",))


def test_a_url_of_control_characters_is_none():
    record = parsed(annotation(source_data_info__clip_proxy_url="https://a/\r\nHost: b"))
    assert (record.url, record.defects) == (None, ("bad-url",))


@pytest.mark.parametrize(
    "url",
    ["https://user:hush@a.example/b.mp4", "https://user@a/b", "http://:hush@a/b?x=1", "s3://k:hush@b/c", "u:hush@a/b"],
)
def test_a_url_with_a_user_name_is_none(url):
    record = parsed(annotation(source_data_info__clip_proxy_url=url))
    assert (record.url, record.defects) == (None, ("bad-url",))
    assert "hush" not in record.model_dump_json()


@pytest.mark.parametrize(
    "url", ["https://a.example/u@b/c.mp4", "https://a/b?mail=u@c", "https://a#u@b", "s3://a/u:p@b"]
)
def test_an_at_sign_behind_the_host_is_no_user_name(url):
    record = parsed(annotation(source_data_info__clip_proxy_url=url))
    assert (record.url, record.defects) == (url, ())


def test_plain_fields_are_the_record():
    fields = records.read_fields(encode(annotation()), "a.json")
    assert Record.model_validate(fields) == parse_record(encode(annotation()), "a.json")
