"""Records too many for memory: rows of a scratch database that are read in the plan's order, and frames of lines.

The database is SQLite's, without locks (a network folder may have none), journal or syncs: it goes with its folder.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import orjson
import zstandard

from preprocess.corpus.corpus import map_ahead
from preprocess.plan.plan import Plan
from shards.errors import UserError

ZSTD_LEVEL = 3
_NUM_COMPRESSORS = 2
_DISK_ERRORS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -32768;
    CREATE TABLE candidates (hash INTEGER, clip BLOB, source BLOB, tag TEXT, seconds REAL, line BLOB);
    CREATE TABLE refused (hash INTEGER, clip BLOB, source BLOB, tag TEXT, seconds REAL, line BLOB);
    CREATE TABLE earlier (source BLOB PRIMARY KEY, generation INTEGER, tag TEXT, line BLOB) WITHOUT ROWID;
    CREATE TABLE fixed (line BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE INDEX candidates_in_order ON candidates (hash);
    CREATE INDEX refused_in_order ON refused (hash);
    BEGIN;
"""


class Row(NamedTuple):
    """One record of the corpus, as a worker process hands it over and both tables hold it."""

    hash: int
    """Decides the order: a uint64, less 2⁶³ because SQLite's integers have a sign."""
    clip: bytes
    """Clip id in UTF-8 (half surrogates pass), which sorts as the text does."""
    source: bytes
    """Likewise, where the record was read."""
    tag: str
    """What rows are counted by: the declared size of a candidate, `stage/reason` of a refused record."""
    seconds: float
    line: bytes
    """Of the plan or its ledger, without a newline."""


@contextmanager
def scratch_database(path: Path) -> Iterator[sqlite3.Connection]:
    """A new database with the tables `candidates` and `refused`. Raises UserError where it cannot be written."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", uri=True, isolation_level=None)) as database:
        try:
            database.executescript(_TABLES)
            yield database
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _DISK_ERRORS:
                raise
            raise UserError(
                f"{path.parent}: the plan's scratch database cannot be written: {error}",
                fix="free some space there (about the size of the corpus is needed), then run the same command",
            ) from None


def write_in_frames(lines: Iterable[bytes], lines_per_frame: int, path: Path) -> tuple[int, ...]:
    """Write lines, each with its newline, `lines_per_frame` a zstd frame; the length of each frame in bytes."""
    lines = iter(lines)
    texts = iter(lambda: b"".join(line + b"\n" for line in islice(lines, lines_per_frame)), b"")
    sizes = []
    with path.open("wb") as file, ThreadPoolExecutor(_NUM_COMPRESSORS) as pool:
        for frame in map_ahead(pool, _compress, texts, num_ahead=2 * _NUM_COMPRESSORS):
            file.write(frame)
            sizes.append(len(frame))
    return tuple(sizes)


def write_frame(lines: Iterable[bytes], path: Path) -> None:
    """Write lines, each with its newline, as one zstd frame, in bounded memory."""
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
    with path.open("wb") as file, compressor.stream_writer(file) as writer:
        for line in lines:
            writer.write(line + b"\n")


def _compress(text: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(text)


class EarlierRows:
    """Which rows of the plan's earlier ledgers still count, while a further generation is frozen.

    Rows are append-only. A record that was refused may pass later (its file was fixed, the filter has changed), or be
    refused for another reason: then the latest counts, and the new generation says how many earlier rows it supersedes.
    Some rows are known and never superseded (table `fixed`): those of candidates' sources, which were superseded when
    the candidate came, and those of sources that name several documents (an archive may hold a name twice).
    """

    def __init__(self, database: sqlite3.Connection, plan: Plan, planned_sources: Collection[bytes]) -> None:
        """Read the ledgers of `plan`. Raises ShardDamage."""
        self.superseded_by: Counter[str] = Counter()
        self._database = database
        for number in range(len(plan.generations)):
            for line in plan.ledger_lines(number):
                row = orjson.loads(line)
                source = row["source"].encode()
                earlier = self._latest(source)
                if source in planned_sources or (earlier is not None and earlier[0] == number):
                    self._fix(line)
                else:
                    values = (source, number, f"{row['stage']}/{row['reason']}", line)
                    database.execute("INSERT OR REPLACE INTO earlier VALUES (?, ?, ?, ?)", values)

    def has_source(self, source: bytes) -> bool:
        """Whether a row counts for this source."""
        return self._latest(source) is not None

    def knows(self, source: bytes, line: bytes) -> bool:
        """Whether exactly this row is there and counts."""
        if self._database.execute("SELECT 1 FROM fixed WHERE line = ?", (line,)).fetchone():
            return True
        row = self._latest(source)
        if row is None or row[2] != line:
            return False
        self._database.execute("DELETE FROM earlier WHERE source = ?", (source,))
        self._fix(line)
        return True

    def supersede(self, source: bytes) -> None:
        """The record of this source became a candidate, or got another row: its row no longer counts."""
        row = self._latest(source)
        if row is not None:
            self._database.execute("DELETE FROM earlier WHERE source = ?", (source,))
            self.superseded_by[row[1]] += 1

    def _fix(self, line: bytes) -> None:
        self._database.execute("INSERT OR IGNORE INTO fixed VALUES (?)", (line,))

    def _latest(self, source: bytes) -> tuple[int, str, bytes] | None:
        query = "SELECT generation, tag, line FROM earlier WHERE source = ?"
        row: tuple[int, str, bytes] | None = self._database.execute(query, (source,)).fetchone()
        return row
