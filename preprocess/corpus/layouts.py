"""Which layout a corpus has, and its documents. docs/corpus.md shows every layout.

`auto` looks at the location alone: a table by its ending, a folder by what its first files are. What was taken and why
is logged; a folder that shows none of the layouts is refused, with an example of each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from preprocess.config import CorpusConfig
from preprocess.corpus.archives import ARCHIVE_SUFFIXES, iter_archive
from preprocess.corpus.corpus import Chunk, cut_chunks, iter_chunks, read_file, walk_tree
from preprocess.corpus.folder import MEDIA_SUFFIXES, folder_chunks, is_hidden
from preprocess.corpus.records import read_json
from preprocess.corpus.table import TABLE_SUFFIXES, iter_table
from shards.console import LOG
from shards.errors import UserError
from shards.storage import open_storage

EXAMPLES = """one of these:
    folder   clips/walk.mp4 and clips/walk.txt, which holds the caption   (corpus.location: clips)
    table    clips/metadata.csv with the lines "file_name,caption" and "walk.mp4,A man walks."
    mbc      mbc/video/batch_0001/3338987.json with source_data_info, labeling_data_info, raw_data_info"""
_METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
_MBC_KEYS = frozenset({"file_id", "source_data_info", "labeling_data_info", "raw_data_info"})
_NUM_LOOKED_AT = 2000
_NUM_PARSED = 20


class Layout(NamedTuple):
    """How a corpus is laid out."""

    kind: Literal["mbc", "folder", "table"]
    why: str
    table: Path | None = None


def open_corpus(config: CorpusConfig) -> Iterator[Chunk]:
    """The documents of a corpus in chunks, in a fixed order. Raises UserError where there is none of a known layout."""
    layout = find_layout(config)
    if config.format == "auto" and layout.kind != "mbc":
        LOG.info("corpus.format: %s, because %s", layout.kind, layout.why)
    if layout.table is not None:
        return cut_chunks(None, iter_table(layout.table, config))
    if layout.kind == "folder":
        return folder_chunks(config.location, config.caption_suffix)
    return iter_chunks(config.location)


def find_layout(config: CorpusConfig) -> Layout:
    """The layout that `corpus.format` names, or the one that the location shows. Raises UserError."""
    location, path = config.location, Path(config.location)
    if config.format in ("mbc", "folder"):
        if config.format == "folder" and "://" not in location and not path.is_dir():
            problem = "not a folder" if path.exists() else "no such folder"
            raise UserError(f"corpus.location: {location}: {problem}", expected="a folder of clips")
        return Layout(config.format, "the config says so")
    if "://" in location:
        return _find_remote(config)
    if path.is_dir():
        table = _find_table(path, config)
        return Layout("table", f"{table.name} is in it", table) if table else _find_in_folder(path, config)
    if not path.exists() or not location.lower().endswith(TABLE_SUFFIXES):
        if config.format == "table":
            raise UserError(
                f"corpus.location: {location}: {'not a table' if path.exists() else 'no such file'}",
                expected=f"a file that ends in {', '.join(TABLE_SUFFIXES)}",
            )
        return Layout("mbc", "it is an archive")  # or nothing at all, which its reader says
    if config.format == "auto" and location.lower().endswith(ARCHIVE_SUFFIXES) and _lines_are_mbc(location):
        return Layout("mbc", "its lines are annotations")
    return Layout("table", "it is one", path)


def _find_table(folder: Path, config: CorpusConfig) -> Path | None:
    """The table of a folder: Hugging Face's metadata file, or the only table there is beside no annotations."""
    names = sorted(
        name for name in (path.name for path in folder.iterdir() if path.is_file()) if not name.startswith(".")
    )
    metadata = [name for name in names if name.lower() in _METADATA]
    tables = metadata or [name for name in names if name.lower().endswith(TABLE_SUFFIXES)]
    if len(tables) == 1 and (metadata or config.format == "table" or not any(map(_is_json, names))):
        table = folder / tables[0]
        is_archive = table.name.lower().endswith(ARCHIVE_SUFFIXES)
        return None if config.format == "auto" and is_archive and _lines_are_mbc(str(table)) else table
    if len(tables) > 1 and (metadata or config.format == "table"):
        raise UserError(
            f"corpus.location: {folder}: {len(tables)} tables: {', '.join(tables[:5])}",
            fix=f"name one of them, such as corpus.location: {folder / tables[0]}",
        )
    if config.format == "table":
        raise UserError(
            f"corpus.location: {folder}: no table in it", expected=f"one file such as {', '.join(_METADATA)}"
        )
    return None


def _find_in_folder(folder: Path, config: CorpusConfig) -> Layout:
    root = os.path.realpath(folder)
    suffixes = (".json", *MEDIA_SUFFIXES, config.caption_suffix.lower())
    items = islice(walk_tree(root, suffixes), _NUM_LOOKED_AT)
    names = [name for name in items if isinstance(name, str) and not is_hidden(name)]
    documents = [name for name in names if _is_json(name)]
    clips = [name for name in names if name.lower().endswith(MEDIA_SUFFIXES)]
    texts = {name for name in names if name.lower().endswith(config.caption_suffix.lower())}
    if any(_is_mbc(read_file(root, name).data) for name in documents[:_NUM_PARSED]):
        return Layout("mbc", "its JSON files are annotations")
    captioned = sum(f"{name.rpartition('.')[0]}{config.caption_suffix}" in texts for name in clips)
    if clips and (captioned or not documents):
        beside = f"a {config.caption_suffix} file beside it"
        return Layout("folder", f"of its first {len(clips):,} clips {captioned:,} have {beside}")
    if documents and not clips:
        return Layout("mbc", "it holds JSON files and no clips")  # all damaged, perhaps: each is a row
    problem = f"{len(clips)} clips and {len(documents)} JSON files, of which none is an annotation"
    raise UserError(
        f"corpus.location: {folder}: {problem if names else 'no annotation in it, no clip and no table'}",
        expected=EXAMPLES,
        fix="arrange the files like one of these, or set corpus.format to folder, table or mbc",
    )


def _find_remote(config: CorpusConfig) -> Layout:
    """An `s3://` prefix by its first names."""
    location = config.location
    if config.format == "table" or not location.startswith("s3://"):
        raise UserError(
            f"corpus.location: {location}: tables are read only from a disk of this machine",
            fix="download the table; its clips can stay where they are",
        )
    if location.lower().endswith(ARCHIVE_SUFFIXES):
        return Layout("mbc", "it is an archive")
    names = [entry.name.lower() for entry in islice(open_storage(location).list(), _NUM_LOOKED_AT)]
    clips = [name for name in names if name.endswith(MEDIA_SUFFIXES)]
    texts = any(name.endswith(config.caption_suffix.lower()) for name in names)
    if clips and texts and not any(map(_is_json, names)):
        return Layout("folder", f"clips and {config.caption_suffix} files are in it")
    return Layout("mbc", "it is a prefix of annotations")


def _lines_are_mbc(location: str) -> bool:
    return any(_is_mbc(document.data) for document in islice(iter_archive(location), _NUM_PARSED))


def _is_mbc(data: bytes) -> bool:
    value: Any = read_json(data, set())
    return isinstance(value, dict) and not _MBC_KEYS.isdisjoint(value)


def _is_json(name: str) -> bool:
    return name.lower().endswith(".json")
