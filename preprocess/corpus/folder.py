"""Clips with a text file beside each, nested at will: `walk.mp4`, `walk.txt`. The clip's id is its relative path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

from preprocess.corpus.archives import Document
from preprocess.corpus.columns import make_fields
from preprocess.corpus.corpus import NUM_S3_READERS, Chunk, cut_chunks, map_ahead, read_file, unread, walk_tree
from preprocess.corpus.fields import IMAGE_SUFFIXES, LOCAL, MAX_CLIP_ID_CHARACTERS, VIDEO_SUFFIXES
from preprocess.corpus.records import MAX_DOCUMENT_BYTES
from preprocess.rejection import Rejection, short
from shards.errors import MissingObject, ShardDamage, StorageFailure
from shards.storage import open_storage

MEDIA_SUFFIXES = tuple(sorted({*VIDEO_SUFFIXES, *IMAGE_SUFFIXES}))


def folder_chunks(location: str, caption_suffix: str) -> Iterator[Chunk]:
    """The clips below a folder or an `s3://bucket/prefix`, in order; a folder's captions are read by the workers."""
    if location.startswith("s3://"):
        yield from cut_chunks(None, _iter_s3(location, caption_suffix))
        return
    root = os.path.realpath(location)
    yield from cut_chunks(root, _iter_media(root, caption_suffix), partial(_read_clip, caption_suffix=caption_suffix))


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it begins with a dot: `._walk.mp4`, `.cache/`."""
    return name.startswith(".") or "/." in name or name.startswith("__MACOSX/")


def _iter_media(root: str, caption_suffix: str) -> Iterator[str | Document]:
    """Names of the clips, and a row for each caption without a clip. The names of one folder are held at a time."""
    items = walk_tree(root, (*MEDIA_SUFFIXES, caption_suffix.lower()))
    for _, group in groupby(items, key=_folder_of):
        found = [item for item in group if isinstance(item, Document) or not is_hidden(item)]
        stems = {item.rpartition(".")[0] for item in found if isinstance(item, str) and _is_media(item)}
        for item in found:
            name = item if isinstance(item, str) else item.source
            if name.endswith(_spellings(caption_suffix)) and name[: -len(caption_suffix)] in stems:
                continue  # it is read with its clip
            yield item if isinstance(item, Document) or _is_media(item) else _no_media(name, caption_suffix)


def _spellings(caption_suffix: str) -> tuple[str, str]:
    """The endings that are read: as the config has it, and in upper case."""
    return caption_suffix, caption_suffix.upper()


def _no_media(name: str, caption_suffix: str) -> Document:
    if name.endswith(_spellings(caption_suffix)):
        return unread(name, "no-media", "a caption without a clip beside it")
    return unread(name, "no-media", f"no caption: it ends neither in {' nor in '.join(_spellings(caption_suffix))}")


def _folder_of(item: str | Document) -> str:
    return (item if isinstance(item, str) else item.source).rpartition("/")[0]


def _is_media(name: str) -> bool:
    return name.lower().endswith(MEDIA_SUFFIXES)


def _read_clip(root: str, name: str, caption_suffix: str) -> Document:
    """One clip with the caption beside it; without one the record has no caption, which the filter refuses."""
    stem = name.rpartition(".")[0]
    for ending in _spellings(caption_suffix):
        path = os.path.realpath(f"{root}/{stem}{ending}")
        if Path(path).exists():
            if not path.startswith(root.rstrip("/") + "/"):
                return unread(name, "symlink", "its caption leads out of the corpus")
            read = read_file(root, os.path.relpath(path, root))
            return read._replace(source=short(name)) if read.rejection else _make_clip(name, LOCAL + name, read.data)
    return _make_clip(name, LOCAL + name, b"")


def _make_clip(name: str, url: str, caption: bytes) -> Document:
    if len(name) > MAX_CLIP_ID_CHARACTERS or not name.isprintable():
        return unread(name, "bad-file-name", f"over {MAX_CLIP_ID_CHARACTERS} characters, or not printable")
    try:
        text = caption.decode("utf-16" if caption[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return Document(name, b"", Rejection("read", "not-utf8", short(str(error))))
    words = ({"text": text},) if text else ()
    return Document(name, b"", fields=make_fields(name, name, url, object=words))


def _iter_s3(location: str, caption_suffix: str) -> Iterator[Document]:
    """The clips below a prefix; each caption is a request of its own, many at a time."""
    storage = open_storage(location)
    prefix = location.partition("?")[0].rstrip("/")  # without `?endpoint=`: fetch.s3_endpoint is for clips

    def read(item: tuple[str, str | None]) -> Document:
        name, text = item
        if not _is_media(name):
            return _no_media(name, caption_suffix)
        try:
            caption = storage.get(text, max_bytes=MAX_DOCUMENT_BYTES) if text else b""
        except MissingObject:  # it was removed since
            caption = b""
        except (ShardDamage, StorageFailure) as error:
            return unread(name, "unreadable", short(error.problem), retryable=True)
        return _make_clip(name, f"{prefix}/{name}", caption)

    names = (entry.name for entry in storage.list() if not is_hidden(entry.name))
    with ThreadPoolExecutor(NUM_S3_READERS) as pool:
        yield from map_ahead(pool, read, _with_captions(names, caption_suffix), num_ahead=4 * NUM_S3_READERS)


def _with_captions(names: Iterable[str], caption_suffix: str) -> Iterator[tuple[str, str | None]]:
    """Each clip with the name of its caption, and each caption without a clip, alone. Names are sorted, so those that
    are alike up to the first dot come together; only they are held at a time."""
    for _, group in groupby(names, key=lambda name: name.partition(".")[0]):
        found = [name for name in group if _is_media(name) or name.lower().endswith(caption_suffix.lower())]
        here, stems = set(found), {name.rpartition(".")[0] for name in found if _is_media(name)}
        for name in found:
            if _is_media(name):
                texts = (name.rpartition(".")[0] + ending for ending in _spellings(caption_suffix))
                yield name, next((text for text in texts if text in here), None)
            elif not name.endswith(_spellings(caption_suffix)) or name[: -len(caption_suffix)] not in stems:
                yield name, None
