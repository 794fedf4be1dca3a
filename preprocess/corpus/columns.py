"""What the columns of a table mean, and the record that a row becomes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from preprocess.config import CAPTION_LEVELS
from preprocess.corpus.archives import Document
from preprocess.corpus.fields import (
    IMAGE_SUFFIXES,
    LOCAL,
    MAX_CLIP_ID_CHARACTERS,
    MAX_URL_CHARACTERS,
    VIDEO_SUFFIXES,
    length_of,
    read_fps,
    read_resolution,
    read_seconds,
    read_url,
)
from preprocess.corpus.timecode import MAX_SECONDS
from preprocess.rejection import ClipRejected, Rejection, short

GUESSES: dict[str, tuple[str, ...]] = {
    "path": (
        "file_name", "filename", "file", "file_path", "path", "video_path", "clip_path", "video_file", "video", "clip",
        "url", "video_url", "clip_url", "contenturl", "media", "image_path", "image_file", "image", "image_url",
    ),
    "id": ("id", "clip_id", "video_id", "videoid", "key", "uid"),
    "object": ("caption", "captions", "prompt", "text", "description", "sentence", "object", "object_caption"),
    "scene": ("scene", "scene_caption"),
    "semantic": ("semantic", "semantic_caption"),
    "application": ("application", "application_caption"),
    "speech": ("speech", "transcript", "stt"),
    "start": ("start", "start_seconds", "start_time", "begin"),
    "end": ("end", "end_seconds", "end_time"),
    "seconds": ("seconds", "duration", "duration_seconds", "length"),
    "fps": ("fps", "frame_rate", "framerate"),
    "width": ("width",),
    "height": ("height",),
    "category": ("category", "label", "class"),
    "media_type": ("media_type",),
}  # fmt: skip
"""Names that a column is known by, in lower case with `_` for space and hyphen; the first of a list that is there."""
MAX_TAGS = 32
MAX_TAG_CHARACTERS = 200
_NO_TEXT = frozenset({"nan", "none", "null", "n/a", "<na>"})
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Columns(NamedTuple):
    """Which column holds what; None where there is none."""

    by_field: Mapping[str, str]
    tags: tuple[str, ...]
    """The other columns."""

    @property
    def path(self) -> str | None:
        """The column that says where the clip is."""
        return self.by_field.get("path")

    def describe(self) -> str:
        """In one line: `file_name is path, caption is object; tags: mood`."""
        known = ", ".join(f"{name} is {field}" for field, name in self.by_field.items())
        return short(known + (f"; tags: {', '.join(self.tags)}" if self.tags else ""), 300)


def make_fields(clip_id: str, source: str, url: str, **found: Any) -> dict[str, Any]:
    """A record's fields, as `records.read_fields` gives them: `found` over those that are absent."""
    suffix = PurePosixPath(url.split("?", 1)[0]).suffix.lower()
    media_type = "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None
    return {
        "clip_id": clip_id, "source": source, "media_type": media_type, "url": url,
        "declared_width": None, "declared_height": None, "declared_fps": None, "declared_seconds": None,
        "category": None, "keywords": (), "object": (), "scene": (), "semantic": (), "application": (),
        "speech": None, "defects": (), **found,
    }  # fmt: skip


def find_columns(names: tuple[str, ...], given: Mapping[str, str]) -> Columns:
    """Columns by the names in `given` (`corpus.columns`), the others by `GUESSES`."""
    by_field = {"object" if field == "caption" else field: name for field, name in given.items()}
    plain = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(names)}
    for field, guesses in GUESSES.items():
        taken = set(by_field.values())
        name = next((plain[guess] for guess in guesses if guess in plain and plain[guess] not in taken), None)
        if field not in by_field and name is not None:
            by_field[field] = name
    taken = set(by_field.values())
    return Columns(by_field, tuple(name for name in names if name and name not in taken))


def row_document(cells: Mapping[str, Any], columns: Columns, table: str, where: str, root: str) -> Document:
    """The record of one row, or the row's rejection. Its source is the table's name and the id, which does not change
    as rows move."""
    try:
        fields = _read_row(cells, columns, table, root)
    except ClipRejected as rejected:
        return Document(short(where), b"", rejected.rejection)
    return Document(fields["source"], b"", fields=fields)


def _read_row(cells: Mapping[str, Any], columns: Columns, table: str, root: str) -> dict[str, Any]:
    defects: set[str] = set()
    row = {field: cells.get(name) for field, name in columns.by_field.items()}
    place = row.get("path")
    path = _text(place.get("path") if isinstance(place, dict) else place)  # Hugging Face's {"path": …, "bytes": …}
    if path is None:
        raise _refused("no-media-path", f"column {columns.path!r} is empty" if columns.path else "no column says where")
    url, name = locate(path, root, defects)
    start, end = _mark(row.get("start")), _mark(row.get("end"))
    if start is not None and end is not None and end <= start:
        raise _refused("reversed-timecode", f"start {start:g} s, end {end:g} s")
    clip_id = _text(row.get("id"))
    if clip_id is None:
        clip_id = name + ("" if start is None and end is None else f"@{start or 0:g}-{end or 0:g}")
    if len(clip_id) > MAX_CLIP_ID_CHARACTERS or not clip_id.isprintable():
        raise _refused("bad-clip-id", f"{len(clip_id)} characters: {short(clip_id, 60)}")
    span = {} if start is None and end is None else {"start_seconds": start, "end_seconds": end}
    levels = {level: _captions(row.get(level), span, level, defects) for level in CAPTION_LEVELS}
    speech = " ".join(caption["text"] for caption in levels.pop("speech"))
    size = (_text(row.get("width")), _text(row.get("height")))
    width, height = read_resolution("x".join(str(side) for side in size) if all(size) else None, None, defects)
    found: dict[str, Any] = {
        **levels,
        "speech": speech or None,
        "category": _text(row.get("category")),
        "keywords": _tags(cells, columns),
        "declared_width": width,
        "declared_height": height,
        "declared_fps": read_fps(_figure(row.get("fps")), defects),
        "declared_seconds": read_seconds(_figure(row.get("seconds")), defects),
    }
    media_type = (_text(row.get("media_type")) or "").lower()
    if media_type in ("video", "image"):
        found["media_type"] = media_type
    return make_fields(clip_id, f"{table}#{clip_id}", url, **found, defects=tuple(sorted(defects)))


def locate(path: str, root: str, defects: set[str]) -> tuple[str, str]:
    """A clip's URL and its name: a URL is both; a path is `file:` or the URL `root` with its relative path, the name.

    Raises ClipRejected for a path out of `root`: a table of somebody else must not open files that its reader never
    meant.
    """
    if _SCHEME.match(path) and not path.lower().startswith("file://"):
        url = read_url(path, defects)
        if url is None:
            raise _refused("bad-url", "it carries a user name, or is no URL")
        return url, url
    if path.lower().startswith("file:"):
        path = unquote(urlsplit(path).path)
    if len(path) > MAX_URL_CHARACTERS or not path.isprintable():
        raise _refused("bad-file-name", short(path, 60))
    is_remote = _SCHEME.match(root) is not None
    roots = () if is_remote else (os.path.normpath(Path(root).absolute()), os.path.realpath(root))
    # Only the text is looked at here: where a link leads is seen when the clip is opened.
    ways = [os.path.relpath(path, base) for base in roots] if Path(path).is_absolute() else [os.path.normpath(path)]
    relative = next((way for way in ways if way.split("/")[0] not in ("..", ".")), None)
    if relative is None:
        raise _refused("outside-corpus", f"{short(path, 200)} is not below {short(root, 100)}")
    return f"{root.rstrip('/')}/{relative}" if is_remote else LOCAL + relative, relative


def _refused(reason: str, detail: str) -> ClipRejected:
    return ClipRejected(Rejection("read", reason, detail))


def _text(value: Any) -> str | None:
    """A cell as text; None where it is empty: NaN is what other programs write for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # an id of a column that once had a hole
    text = value.strip() if isinstance(value, str) else str(value) if isinstance(value, int) else None
    if text and any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        text = text.encode("utf-8", "replace").decode()
    return text or None


def _captions(value: Any, span: dict[str, Any], level: str, defects: set[str]) -> tuple[dict[str, Any], ...]:
    """The captions of a cell, which holds one or, in JSON and parquet, a list."""
    texts = []
    for each in value if isinstance(value, list | tuple) else [value]:
        text = _text(each)
        if text is not None and text.lower() in _NO_TEXT:
            defects.add(f"no-text-{level}")
        elif text is not None:
            texts.append(text)
        elif isinstance(each, dict | list | tuple | bytes):
            defects.add("wrong-type-captions")
    return tuple({"text": text} | span for text in texts)


def _mark(value: Any) -> float | None:
    """One end of a stretch in seconds; None where the cell is empty."""
    text = _text(value)
    if text is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    seconds = float(value) if is_number else length_of(text[:64])
    if seconds is None or not 0 <= seconds < MAX_SECONDS:
        raise _refused("bad-timecode", f"{short(text, 60)} is not a time")
    return seconds


def _figure(value: Any) -> Any:
    return None if _text(value) is None else value


def _tags(cells: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    """The other columns of a row as `name=value`."""
    tags = ((name, _text(cells.get(name))) for name in columns.tags[:MAX_TAGS])
    return tuple(short(f"{name}={value}", MAX_TAG_CHARACTERS) for name, value in tags if value is not None)
