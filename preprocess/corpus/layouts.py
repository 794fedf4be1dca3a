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
from preprocess.corpus.archives import ARCHIVE_SUFFIXES, Document, iter_archive
from preprocess.corpus.corpus import Chunk, cut_chunks, iter_chunks, read_file, walk_tree
from preprocess.corpus.folder import MEDIA_SUFFIXES, folder_chunks, is_hidden
from preprocess.corpus.records import read_json
from preprocess.corpus.table import TABLE_SUFFIXES, iter_table
from preprocess.corpus.table_files import TableFiles, choose_files, find_pattern, is_table, local_copy, split_s3
from shards.console import LOG, counted
from shards.errors import UserError
from shards.storage import open_storage

EXAMPLES = """one of these:
    folder   clips/walk.mp4 and clips/walk.txt, which holds the caption   (corpus.location: clips)
    table    clips/metadata.csv with the lines "file_name,caption" and "walk.mp4,A man walks."
    mbc      mbc/video/batch_0001/3338987.json with source_data_info, labeling_data_info, raw_data_info"""
_MBC_KEYS = frozenset({"file_id", "source_data_info", "labeling_data_info", "raw_data_info"})
_NUM_LOOKED_AT = 2000
_NUM_PARSED = 20


class CorpusLayout(NamedTuple):
    """How a corpus is laid out."""

    kind: Literal["mbc", "folder", "table"]
    why: str
    table: TableFiles | None = None


def open_corpus(config: CorpusConfig) -> Iterator[Chunk]:
    """The documents of a corpus in chunks, in a fixed order. Raises UserError where there is none of a known layout."""
    layout = find_layout(config)
    if config.format == "auto" and layout.kind != "mbc":
        LOG.info("corpus.format: %s, because %s", layout.kind, layout.why)
    if layout.table is not None:
        return cut_chunks(None, _iter_rows(layout.table, config))
    if layout.kind == "folder":
        return folder_chunks(config.location, config.caption_suffix)
    return iter_chunks(config.location)


def _iter_rows(table: TableFiles, config: CorpusConfig) -> Iterator[Document]:
    """The rows of a table's files, one file after another."""
    for file in table.files:
        with local_copy(file) as path:
            yield from iter_table(path, config, config.root or table.root, table.name)


def find_layout(config: CorpusConfig) -> CorpusLayout:  # noqa: PLR0911 - one for each kind of location
    """The layout that `corpus.format` names, or the one that the location shows. Raises UserError."""
    location, path = config.location, Path(config.location)
    if config.format in ("mbc", "folder"):
        if config.format == "folder" and "://" not in location and not path.is_dir():
            problem = "not a folder" if path.exists() else "no such folder"
            raise UserError(f"corpus.location: {location}: {problem}", expected="a folder of clips")
        return CorpusLayout(config.format, "the config says so")
    if (table := find_pattern(location)) is not None:
        return CorpusLayout("table", counted(len(table.files), "file matches", "files match"), table)
    if "://" in location:
        return _find_remote(config)
    if path.is_dir():
        table = _find_table(path, config)
        return _table_in_it(table) if table else _find_in_folder(path, config)
    if path.exists() and not path.is_file():
        raise UserError(f"corpus.location: {location}: neither a file nor a folder", expected="a file that can be read")
    if not path.exists() or not location.lower().endswith(TABLE_SUFFIXES):
        if config.format == "table":
            raise UserError(
                f"corpus.location: {location}: {'not a table' if path.exists() else 'no such file'}",
                expected=f"a file that ends in {', '.join(TABLE_SUFFIXES)}",
            )
        return CorpusLayout("mbc", "it is an archive")  # or nothing at all, which its reader says
    if config.format == "auto" and location.lower().endswith(ARCHIVE_SUFFIXES) and _lines_are_mbc(location):
        return CorpusLayout("mbc", "its lines are annotations")
    return CorpusLayout("table", "it is one", TableFiles((location,), str(path.parent)))


def _table_in_it(table: TableFiles) -> CorpusLayout:
    few = len(table.files) == 1
    return CorpusLayout(
        "table", f"{table.name} is in it" if few else f"{len(table.files)} × {table.name} are in it", table
    )


def _find_table(folder: Path, config: CorpusConfig) -> TableFiles | None:
    """The table of a folder, or of `data/` in it: Hugging Face's metadata file, or the only table there is, in one file
    or in shards, beside no annotations."""
    for place in (folder, folder / "data"):
        names = sorted(path.name for path in place.iterdir() if path.is_file()) if place.is_dir() else []
        tables = choose_tables([name for name in names if not name.startswith(".")], str(place), config)
        is_archive = bool(tables) and tables[0].lower().endswith(ARCHIVE_SUFFIXES)
        if config.format == "auto" and is_archive and _lines_are_mbc(str(place / tables[0])):
            return None
        if tables:
            return TableFiles(tuple(str(place / name) for name in tables), str(folder))
        if config.format == "auto" and any(_is_json(name) or name.lower().endswith(MEDIA_SUFFIXES) for name in names):
            break  # another layout: what is in data/ belongs to it
    if config.format == "table":
        raise UserError(f"corpus.location: {folder}: no table in it", expected="a metadata.csv, .jsonl, .parquet …")
    return None


def choose_tables(names: list[str], where: str, config: CorpusConfig) -> list[str]:
    """The names of a folder's table; none where the other names show another layout: then several are no error."""
    if config.format == "table" or any(name.lower().startswith("metadata.") and is_table(name) for name in names):
        return choose_files(names, where)
    if any(map(_is_json, names)):
        return []
    try:
        return choose_files(names, where)
    except UserError:
        if any(name.lower().endswith(MEDIA_SUFFIXES) for name in names):
            return []
        raise


def _find_in_folder(folder: Path, config: CorpusConfig) -> CorpusLayout:
    root = os.path.realpath(folder)
    suffixes = (".json", *MEDIA_SUFFIXES, config.caption_suffix.lower())
    items = islice(walk_tree(root, suffixes), _NUM_LOOKED_AT)
    names = [name for name in items if isinstance(name, str) and not is_hidden(name)]
    documents = [name for name in names if _is_json(name)]
    clips = [name for name in names if name.lower().endswith(MEDIA_SUFFIXES)]
    texts = {name for name in names if name.lower().endswith(config.caption_suffix.lower())}
    if any(_is_mbc(read_file(root, name).data) for name in documents[:_NUM_PARSED]):
        return CorpusLayout("mbc", "its JSON files are annotations")
    captioned = sum(f"{name.rpartition('.')[0]}{config.caption_suffix}" in texts for name in clips)
    if clips and (captioned or not documents):
        beside = f"a {config.caption_suffix} file beside it"
        return CorpusLayout("folder", f"of its first {len(clips):,} clips {counted(captioned, 'has', 'have')} {beside}")
    if documents and not clips:
        return CorpusLayout("mbc", "it holds JSON files and no clips")  # all damaged, perhaps: each is a row
    problem = (
        f"{counted(len(clips), 'clip')} and {counted(len(documents), 'JSON file')}, of which none is an annotation"
    )
    raise UserError(
        f"corpus.location: {folder}: {problem if names else 'no annotation in it, no clip and no table'}",
        expected=EXAMPLES,
        fix="arrange the files like one of these, or set corpus.format to folder, table or mbc",
    )


def _find_remote(config: CorpusConfig) -> CorpusLayout:
    """A table behind a URL, or an `s3://` prefix by its first names."""
    location = config.location
    if not location.startswith("s3://"):
        if is_table(location) or (config.format == "table" and location.startswith(("http://", "https://"))):
            return CorpusLayout(
                "table", "it is one", TableFiles((location,), location.partition("?")[0].rpartition("/")[0])
            )
        raise UserError(
            f"corpus.location: {location}: not a corpus that is read over the network",
            expected=f"s3://bucket/prefix, or the URL of a table: {', '.join(TABLE_SUFFIXES)}",
        )
    address, _, endpoint = location.partition("?")
    if is_table(location):
        if config.format == "auto" and address.lower().endswith(ARCHIVE_SUFFIXES):
            with local_copy(location) as path:
                if _lines_are_mbc(str(path)):
                    raise _no_archive(location)
        return CorpusLayout("table", "it is one", TableFiles((location,), split_s3(location)[0].partition("?")[0]))
    if address.lower().endswith(ARCHIVE_SUFFIXES):
        raise _no_archive(location)
    found = sorted(entry.name for entry in islice(open_storage(location).list(), _NUM_LOOKED_AT))
    for place in ("", "data/"):
        inside = [name[len(place) :] for name in found if name.startswith(place) and "/" not in name[len(place) :]]
        tables = choose_tables(inside, f"{address.rstrip('/')}/{place}", config)
        if tables:
            ends, root = f"?{endpoint}" if endpoint else "", address.rstrip("/")
            every = [entry.name for entry in open_storage(location).list(place)]  # more than were looked at
            inside = [name[len(place) :] for name in every if "/" not in name[len(place) :]]
            files = tuple(f"{root}/{place}{name}{ends}" for name in choose_tables(inside, f"{root}/{place}", config))
            return _table_in_it(TableFiles(files, root))
    if config.format == "table":
        raise UserError(f"corpus.location: {location}: no table in it", expected="a metadata.csv, .jsonl, .parquet …")
    names = [name.lower() for name in found]
    clips = [name for name in names if name.endswith(MEDIA_SUFFIXES)]
    texts = any(name.endswith(config.caption_suffix.lower()) for name in names)
    if clips and texts and not any(map(_is_json, names)):
        return CorpusLayout("folder", f"clips and {config.caption_suffix} files are in it")
    return CorpusLayout("mbc", "it is a prefix of annotations")


def _no_archive(location: str) -> UserError:
    return UserError(
        f"corpus.location: {location}: an archive of annotations is read from this machine",
        fix="copy it here; clips stay where they are",
    )


def _lines_are_mbc(location: str) -> bool:
    return any(_is_mbc(document.data) for document in islice(iter_archive(location), _NUM_PARSED))


def _is_mbc(data: bytes) -> bool:
    value: Any = read_json(data, set())
    return isinstance(value, dict) and not _MBC_KEYS.isdisjoint(value)


def _is_json(name: str) -> bool:
    return name.lower().endswith(".json")
