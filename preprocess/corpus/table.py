"""One table, a row a clip: CSV, TSV, JSON lines or parquet, read as a stream in bounded memory.

A row that cannot be read is a ledger row; a table that cannot be (no column with the clips, cut short, too many
columns) is a UserError, because half a table would freeze half a plan. What a row becomes: see `columns.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from preprocess.config import CorpusConfig
from preprocess.corpus.archives import Document, iter_archive
from preprocess.corpus.columns import Columns, find_columns, row_document
from preprocess.corpus.records import MAX_DOCUMENT_BYTES, read_json, too_large
from preprocess.rejection import Rejection, short
from shards.console import LOG
from shards.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".jsonl.zst", ".parquet")
MAX_COLUMNS = 1000
_BATCH_ROWS = 256
_SKIP_BYTES = 2**16


class TableRow(NamedTuple):
    """One row as it is in the table."""

    where: str
    """`clips.csv:12`, for a row that has no id."""
    cells: dict[str, Any] | Rejection


def iter_table(path: Path, config: CorpusConfig, root: str, name: str) -> Iterator[Document]:
    """A document a row of one file. Raises UserError where the file as a whole cannot be read.

    Args:
        root: where relative paths start.
        name: of the table that the file is, or is a shard of.
    """
    rows = _iter_rows(path)
    found: dict[tuple[str, ...], Columns] = {}
    for row in rows:
        if isinstance(row.cells, Rejection):
            yield Document(row.where, b"", row.cells)
            continue
        names = tuple(row.cells)
        columns = found.get(names)
        if columns is None:
            columns = find_columns(names, config.columns)
            if not found:
                _check_first(columns, names, path, config)
                LOG.info("table %s: %s", path.name, columns.describe())
            if len(found) < MAX_COLUMNS:  # the rows of JSON lines may differ in their keys
                found[names] = columns
        yield row_document(row.cells, columns, name, row.where, root)


def _check_first(columns: Columns, names: tuple[str, ...], path: Path, config: CorpusConfig) -> None:
    shown = short(", ".join(names), 300)
    if columns.path is None:
        raise UserError(
            f"{path}: no column says where the clip is; its columns: {shown}",
            expected="a column file_name, path, video or url",
            fix="name it: corpus.columns: {path: NAME}; for clips with text files beside them: corpus.format: folder",
        )
    for field, name in config.columns.items():
        if name not in names and path.suffix not in (".jsonl", ".zst"):
            raise UserError(f"corpus.columns: {field}: {path} has no column {name!r}", expected=f"one of {shown}")


def _iter_rows(path: Path) -> Iterator[TableRow]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _iter_parquet(path)
    if name.endswith((".jsonl", ".jsonl.zst")):
        return _iter_json_lines(path)
    return _iter_csv(path)


def _iter_json_lines(path: Path) -> Iterator[TableRow]:
    for document in iter_archive(str(path)):
        cells = document.rejection or read_json(document.data, set())
        if isinstance(cells, dict) and len(cells) > MAX_COLUMNS:
            cells = Rejection("read", "too-many-columns", f"{len(cells):,}; at most {MAX_COLUMNS:,}")
        yield TableRow(document.source, cells)


class _BadLine(Exception):
    def __init__(self, rejection: Rejection) -> None:
        self.rejection = rejection
        super().__init__(rejection.reason)


class _Lines:
    """Text lines of a file, each within the limit; raises _BadLine for others and can be read on after that."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            num_bytes = len(line)
            while not line.endswith(b"\n") and (line := self._file.readline(_SKIP_BYTES)):
                num_bytes += len(line)
            raise _BadLine(too_large(num_bytes))
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _BadLine(Rejection("read", "not-utf8", short(str(error)))) from None


def _iter_csv(path: Path) -> Iterator[TableRow]:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    try:
        with path.open("rb") as file:
            lines = _Lines(file)
            delimiter, names = _read_header(path, lines)
            yield from _iter_csv_rows(path.name, lines, delimiter, names)
    except OSError as error:
        raise UserError(f"corpus.location: {path}: cannot be read: {error.strerror}") from None


def _read_header(path: Path, lines: _Lines) -> tuple[str, list[str]]:
    expected = "a first line with the names of the columns, in UTF-8"
    try:
        header = next(lines, "")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
        names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
    except (_BadLine, csv.Error) as error:
        reason = error.rejection.detail if isinstance(error, _BadLine) else str(error)
        raise UserError(f"{path}: its first line cannot be read: {reason}", expected=expected) from None
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{path}: {len(names):,} columns", expected=f"at most {MAX_COLUMNS:,}")
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"{path}: {'no columns' if not names else f'columns given twice: {twice}'}", expected=expected)
    return delimiter, [name.strip() for name in names]


def _iter_csv_rows(name: str, lines: _Lines, delimiter: str, names: list[str]) -> Iterator[TableRow]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = lines.number + 1
        where = f"{name}:{first}"
        try:
            cells = next(reader, None)
        except (_BadLine, csv.Error) as error:
            if isinstance(error, _BadLine):
                yield TableRow(where, error.rejection)
            else:  # a quote that is not closed takes the lines below it
                taken = f"; lines {first:,} to {lines.number:,} are in it" if lines.number > first else ""
                yield TableRow(where, Rejection("read", "bad-row", short(f"{error}{taken}")))
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            continue
        if cells is None:
            return
        if len(cells) == len(names):
            yield TableRow(where, dict(zip(names, cells, strict=True)))
        elif cells:
            detail = f"{len(cells)} cells, and the table has {len(names)} columns"
            yield TableRow(where, Rejection("read", "bad-row", detail))


def _iter_parquet(path: Path) -> Iterator[TableRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        fix = "pip install 'wan-broadcast-lora[parquet]', or save the table as CSV"
        raise UserError(f"{path}: reading parquet needs pyarrow, which is not installed", fix=fix) from None
    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if len(names) > MAX_COLUMNS:
                raise UserError(f"{path}: {len(names):,} columns", expected=f"at most {MAX_COLUMNS:,}")
            # Pictures and clips within the table are not read: their columns are binary, alone or in a struct, of which
            # Hugging Face's has the path beside the bytes.
            files = {field.name: _path_beside(field) for field in file.schema_arrow if _is_binary(field.type)}
            wanted = [files.get(name, name) for name in names if files.get(name, name)]
            if unread := [name for name, path in files.items() if path is None]:
                LOG.info("table %s: not read: %s, which holds files themselves", path.name, ", ".join(unread))
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted, use_threads=False):
                for cells in batch.to_pylist():
                    number += 1
                    yield TableRow(f"{path.name}:{number}", cells)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"corpus.location: {path}: damaged: {short(str(error), 200)}",
            expected="a complete parquet file: a plan never changes, so it is not made from a part of the corpus",
            fix="get the file again, and compare its size and digest with the original's",
        ) from None


def _path_beside(field: Any) -> str | None:
    """`video.path` of a column of Hugging Face's, a struct of bytes and path; None for another column of bytes."""
    from pyarrow import types

    has_path = types.is_struct(field.type) and field.type.get_field_index("path") >= 0
    return f"{field.name}.path" if has_path else None


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(_is_binary(kind.field(place).type) for place in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
