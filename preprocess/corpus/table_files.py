"""The files of a table: one, or the shards of one, on this machine, on S3 or behind HTTP(S).

A remote file is copied to this machine before it is read, one at a time: the copy is complete or an error, and the
readers of tables need to seek.
"""

from __future__ import annotations

import fnmatch
import glob
import http.client
import re
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError

from preprocess.config import fixed_part
from preprocess.corpus.table import TABLE_SUFFIXES
from preprocess.corpus.url import redact, spell_url
from shards.console import LOG
from shards.errors import UserError
from shards.storage import open_storage
from shards.storage.patience import Attempts

_METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
_SHARD = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.[^/]+", re.DOTALL)
MAX_TABLE_BYTES = 2**36
"""Of one remote file, which is copied."""
_PART_BYTES = 2**23
_TIMEOUT_SECONDS = 60.0
_AGAIN = (408, 429, 500, 502, 503, 504)


class TableFiles(NamedTuple):
    """A table that may consist of several files."""

    files: tuple[str, ...]
    """Paths or URLs, in order."""
    root: str
    """Where the relative paths of its rows start: a folder or a URL prefix."""

    @property
    def name(self) -> str:
        """Its file's name, or what the names of its shards have in common: it stays as rows move between them."""
        names = [_plain(file).rpartition("/")[2] for file in self.files]
        return names[0] if len(names) == 1 else pattern_of(names[0])


def pattern_of(name: str) -> str:
    """A name without its numbers: `train-*-of-*.parquet`."""
    return re.sub(r"\d+", "*", name)


def is_table(name: str) -> bool:
    """Whether a path or a URL ends as a table does."""
    return _plain(name).lower().endswith(TABLE_SUFFIXES)


def choose_files(names: list[str], where: str) -> list[str]:
    """Of the sorted names of a folder the table's: Hugging Face's metadata file, one table, or the shards of one.

    Raises UserError where there are several tables, and where one of numbered shards is missing.
    """
    tables = [name for name in names if name.lower() in _METADATA] or [name for name in names if is_table(name)]
    patterns = sorted({pattern_of(name) for name in tables})
    if len(patterns) > 1:
        raise UserError(
            f"corpus.location: {where}: {len(tables)} tables: {', '.join(patterns[:5])}",
            fix=f"name the one to take: corpus.location: {where.rstrip('/')}/{patterns[0]}",
        )
    check_shards(tables, where)
    return tables


def check_shards(names: list[str], where: str) -> None:
    """Raise UserError where shards that count themselves (`-00002-of-00005`) are not all there."""
    shards = sorted((match[1], int(match[3]), int(match[2])) for name in names if (match := _SHARD.match(_plain(name))))
    for (table, total), found in groupby(shards, lambda shard: shard[:2]):
        numbers = {number for _, _, number in found}
        missing = next((number for number in range(total) if number not in numbers), None)
        if missing is not None:
            raise UserError(
                f"corpus.location: {where}: {len(numbers)} of {total} shards of {table}; number {missing} is missing",
                expected="every shard: half a corpus would freeze half a plan",
            )


def find_pattern(location: str) -> TableFiles | None:
    """The files of a location with wildcards, here or on S3; None where it has none. Raises UserError."""
    if location.startswith("s3://"):
        address, endpoint = _plain(location), location.partition("?")[2]
        if "*" not in address:
            return None
        root = address.partition("*")[0].rpartition("/")[0]
        entries = open_storage(_with(root, endpoint)).list()
        wanted = address[len(root) + 1 :]
        names = [entry.name for entry in entries if fnmatch.fnmatchcase(entry.name, wanted)]
        files = [_with(f"{root}/{name}", endpoint) for name in names]
    elif "://" in location or Path(location).exists() or not glob.has_magic(location):
        return None
    else:
        root = str(fixed_part(Path(location)))
        files = sorted(glob.glob(location, recursive=True))  # noqa: PTH207 - relative or absolute
    if not files or not all(map(is_table, files)):
        odd = next((file for file in files if not is_table(file)), None)
        problem = f"{odd} is no table" if odd else "no file matches"
        raise UserError(
            f"corpus.location: {location}: {problem}", expected=f"files that end in {', '.join(TABLE_SUFFIXES)}"
        )
    check_shards(files, location)
    return TableFiles(tuple(files), root)


@contextmanager
def local_copy(file: str) -> Iterator[Path]:
    """The file itself where it is on this machine, else a copy that is removed afterwards. Raises UserError."""
    if "://" not in file:
        yield Path(file)
        return
    with tempfile.TemporaryDirectory(prefix="wanprep-table-") as folder:
        path = Path(folder, _plain(file).rpartition("/")[2] or "table")
        shown = redact(file) if file.startswith("http") else _plain(file)
        LOG.info("copying %s", shown)
        with path.open("wb") as out:
            (_copy_s3 if file.startswith("s3://") else _copy_http)(file, out)
        try:
            yield path
        except UserError as error:
            if str(path) not in error.problem:
                raise
            problem = error.problem.replace(str(path), shown)  # the copy is gone when this is read
            raise UserError(problem, expected=error.expected, fix=error.fix) from None


def split_s3(file: str) -> tuple[str, str]:
    """An object's address as the root of a storage and a name in it."""
    root, _, name = _plain(file).rpartition("/")
    return _with(root, file.partition("?")[2]), name


def _copy_s3(file: str, out: IO[bytes]) -> None:
    root, name = split_s3(file)
    storage, offset = open_storage(root), 0
    size = storage.size(name)
    _check_size(size, _plain(file))
    while offset < size and (part := storage.get_range(name, offset, min(_PART_BYTES, size - offset))):
        offset += out.write(part)
    if offset != size or storage.size(name) != size:
        raise UserError(f"corpus.location: {_plain(file)}: it changed while it was copied", fix="run the command again")


def _copy_http(file: str, out: IO[bytes]) -> None:
    try:
        url = spell_url(file).text
    except ValueError as error:
        raise UserError(f"corpus.location: {redact(file)}: {error}") from None
    with Attempts(f"get {redact(file)}") as attempts:
        while True:
            out.seek(0)
            out.truncate()
            try:
                for part in _parts_of(url):
                    out.write(part)
                    _check_size(out.tell(), redact(file))
                return
            except HTTPError as error:
                error.close()
                if error.code not in _AGAIN:
                    raise UserError(
                        f"corpus.location: {redact(file)}: the server answers {error.code} {error.reason}",
                        fix="check the address, and its signature if it has one",
                    ) from None
                attempts.failed(f"{error.code} {error.reason}")
            except _Broken as error:
                attempts.failed(error)


def _check_size(num_bytes: int, shown: str) -> None:
    if num_bytes > MAX_TABLE_BYTES:
        raise UserError(f"corpus.location: {shown}: over {MAX_TABLE_BYTES >> 30} GiB", fix="cut the table into shards")


class _Broken(Exception):
    """A connection that failed, or a body that is not complete."""


def _parts_of(url: str) -> Iterator[bytes]:
    opener = urllib.request.build_opener(_OverHttp)
    try:
        with opener.open(url, timeout=_TIMEOUT_SECONDS) as answer:  # nosec - spelled and checked above
            declared, got = answer.headers.get("Content-Length"), 0
            while part := answer.read(2**20):
                got += len(part)
                yield part
    except HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from None
    if declared is not None and got != int(declared):
        raise _Broken(f"{got:,} of {declared} bytes came")


class _OverHttp(urllib.request.HTTPRedirectHandler):
    """Redirects lead to HTTP(S) alone, and from HTTPS to HTTPS alone."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        """See urllib, which would follow to FTP too."""
        if not url.startswith("https://") and not (url.startswith("http://") and request.type == "http"):
            raise HTTPError(request.full_url, code, f"a redirect to {redact(url)}", headers, file)
        return super().redirect_request(request, file, code, message, headers, url)


def _plain(location: str) -> str:
    """A location without its query."""
    return location.partition("?")[0] if "://" in location else location


def _with(address: str, query: str) -> str:
    return f"{address}?{query}" if query else address
