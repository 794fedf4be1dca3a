"""One annotation file made into a `Record`, whatever its state: a value for what can be read, a defect for what cannot.

The layout is the MBC corpus's (`file_id`, `source_data_info`, `labeling_data_info`, `raw_data_info`). Any field may be
missing, empty or of another type. Nothing in a record is trusted: sizes, counts and texts are bounded, paths in it are
never opened. What is wrong but bearable is a name in `Record.defects`, which `wanprep scan` counts.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import orjson

from preprocess.corpus.fields import (
    kind_of,
    read_captions,
    read_clip_id,
    read_fps,
    read_keywords,
    read_media_type,
    read_resolution,
    read_seconds,
    read_section,
    read_text,
    read_url,
)
from preprocess.rejection import Rejection, short
from shards.config import Config

MAX_DOCUMENT_BYTES = 4 * 2**20
"""Largest annotation file; the corpus's are about 3 KB, its longest caption has 10,766 characters."""

_DECODER = json.JSONDecoder(strict=False)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Caption(Config):
    """A text and the stretch of the clip that it speaks of."""

    text: str
    start_seconds: float | None = None
    """None: from the clip's start."""
    end_seconds: float | None = None
    """None: to the clip's end."""


class Record(Config):
    """What one annotation file says of one media item. Declared figures are claims: the probe decides."""

    clip_id: str
    source: str
    """Name of the JSON in its corpus, with `/`: a relative path, a member, or `file.jsonl:LINE`."""
    media_type: Literal["video", "image"] | None = None
    url: str | None = None
    declared_width: int | None = None
    declared_height: int | None = None
    declared_fps: float | None = None
    declared_seconds: float | None = None
    category: str | None = None
    keywords: tuple[str, ...] = ()
    object: tuple[Caption, ...] = ()
    scene: tuple[Caption, ...] = ()
    semantic: tuple[Caption, ...] = ()
    application: tuple[Caption, ...] = ()
    speech: str | None = None
    defects: tuple[str, ...] = ()
    """Kinds of damage that the record survived, sorted, each once."""


def parse_record(data: bytes, source: str) -> Record | Rejection:
    """Read one annotation file. Never raises: what cannot be read is a Rejection of stage `read`."""
    fields = read_fields(data, source)
    return fields if isinstance(fields, Rejection) else Record.model_validate(fields)


def read_fields(data: bytes, source: str) -> dict[str, Any] | Rejection:
    """The fields of `parse_record` as plain values: `Record.model_validate` of them is the record.

    For the passes over a whole corpus, where building 455,648 models would take longer than reading them.
    """
    defects: set[str] = set()
    root = read_json(data, defects)
    if isinstance(root, Rejection):
        return root
    about = read_about(root, source, defects)
    return about if isinstance(about, Rejection) else about | read_words(root, about, defects)


def too_large(num_bytes: int) -> Rejection:
    """The rejection of a document past `MAX_DOCUMENT_BYTES`."""
    return Rejection("read", "too-large", f"{num_bytes:,} bytes; an annotation has at most {MAX_DOCUMENT_BYTES:,}")


def read_json(data: bytes, defects: set[str]) -> dict[str, Any] | Rejection:
    """The JSON object of one annotation file."""
    if len(data) > MAX_DOCUMENT_BYTES:
        return too_large(len(data))
    try:
        root = orjson.loads(data)
    except ValueError:
        # The slower parser bears more (a BOM, UTF-16, line breaks in texts), and says what is wrong.
        root = _read_odd_json(data, defects)
        if isinstance(root, Rejection):
            return root
    return root if isinstance(root, dict) else Rejection("read", "not-object", f"the top level is {kind_of(root)}")


def _read_odd_json(data: bytes, defects: set[str]) -> Any:
    try:
        text = data.decode("utf-8-sig" if data[:3] == b"\xef\xbb\xbf" else json.detect_encoding(data))
    except UnicodeDecodeError as error:
        return Rejection("read", "not-utf8", short(str(error)))
    try:
        root = _DECODER.decode(text)
        return _replace_surrogates(root, defects) if _SURROGATE_ESCAPE.search(text) else root
    except RecursionError:
        return Rejection("read", "too-nested", "nested deeper than any annotation")
    except ValueError as error:  # JSONDecodeError, and an integer of more digits than Python converts
        return Rejection("read", "not-json", short(str(error)))


def _replace_surrogates(root: Any, defects: set[str]) -> Any:
    """Half of a surrogate pair has no UTF-8 form: it becomes U+FFFD, and a defect."""
    text, num_replaced = _SURROGATE.subn("\ufffd", json.dumps(root, ensure_ascii=False))
    if num_replaced:
        defects.add("bad-unicode")
    return _DECODER.decode(text)


def read_about(root: dict[str, Any], source: str, defects: set[str]) -> dict[str, Any] | Rejection:
    """What the media item is: everything of a record but its words."""
    about = read_section(root, "source_data_info", defects)
    media = read_section(read_section(root, "raw_data_info", defects), "source_media_info", defects)
    details = read_section(media, "details", defects)
    clip_id = read_clip_id(about.get("clip_id"), root.get("file_id"), source, defects)
    if isinstance(clip_id, Rejection):
        return clip_id
    url = read_url(about.get("clip_proxy_url"), defects)
    width, height = read_resolution(media.get("resolution"), details.get("resolution"), defects)
    return {
        "clip_id": clip_id,
        "source": source,
        "media_type": read_media_type(media.get("media_type"), url, defects),
        "url": url,
        "declared_width": width,
        "declared_height": height,
        "declared_fps": read_fps(details.get("frame_rate"), defects),
        "declared_seconds": read_seconds(details.get("length"), defects),
    }


def read_words(root: dict[str, Any], about: dict[str, Any], defects: set[str]) -> dict[str, Any]:
    """The words of a record, and, last, all its defects."""
    generated = read_section(read_section(root, "source_data_info", set()), "ai_generated_info", defects)
    levels = read_section(read_section(root, "labeling_data_info", defects), "caption_info", defects)
    fps, seconds = about["declared_fps"], about["declared_seconds"]
    scene = read_captions(generated.get("scene_description_auto"), "description", fps, seconds, defects)
    if len(scene) > 1 and len({caption["text"] for caption in scene}) == 1:
        defects.add("same-scene-throughout")
    words = {
        "category": read_text(generated.get("mid_category"), "mid_category", defects),
        "keywords": read_keywords(generated.get("keyword"), defects),
        "object": read_captions(levels.get("object_level"), "text", fps, seconds, defects),
        "scene": scene,
        "semantic": read_captions(levels.get("semantic_level"), "text", fps, seconds, defects),
        "application": read_captions(levels.get("application_level"), "text", fps, seconds, defects),
        "speech": read_text(generated.get("stt_script"), "stt_script", defects),
    }
    words["defects"] = tuple(sorted(defects))
    return words
