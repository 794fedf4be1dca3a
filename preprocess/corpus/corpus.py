"""The annotation corpus as a stream of documents: a folder tree, an S3 prefix, or one file that holds many.

Every document is yielded, an unreadable one with its rejection, so that all are counted. Documents come in a fixed
order, in bounded memory. Nothing outside the corpus is opened: a symbolic link is followed only to a file within the
tree, and a member's name is never used as a path.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

from preprocess.corpus.archives import ARCHIVE_SUFFIXES, Document, iter_archive
from preprocess.corpus.records import MAX_DOCUMENT_BYTES, too_large
from preprocess.rejection import Rejection, short
from shards.errors import MissingObject, ShardDamage, StorageFailure, UserError
from shards.storage import open_storage
from shards.storage.base import Storage

CHUNK_DOCUMENTS = 512
"""Documents handed to a worker at a time."""
SERIAL_CHUNKS = 8
"""Chunks done in this process before workers are started: for a small corpus starting them takes longer."""
MAX_WORKERS = 8
NUM_S3_READERS = 32

_READ_BYTES = 65_536
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

T = TypeVar("T")
Item = TypeVar("Item")


class Chunk(NamedTuple):
    """Some documents of the corpus, in the form that is sent to a worker process."""

    root: str | None
    """Folder that the names of `items` are in; None where the items are documents already."""
    items: tuple[str | Document, ...]
    read: Callable[[str, str], Document] | None = None
    """Makes a document of `root` and a name; None: `read_file`."""


def iter_documents(location: str) -> Iterator[Document]:
    """Every document of the corpus at `location`, in a fixed order. Raises UserError where there is no corpus."""
    for chunk in iter_chunks(location):
        yield from read_chunk(chunk)


def iter_chunks(location: str) -> Iterator[Chunk]:
    """The corpus cut into chunks, in order; files of a folder are named, not yet read. Raises UserError."""
    root: str | None = None
    items: Iterator[str | Document]
    if location.startswith("s3://") and not location.lower().endswith(ARCHIVE_SUFFIXES):
        items = _iter_s3(open_storage(location))
    elif location.lower().endswith(ARCHIVE_SUFFIXES) and not Path(location).is_dir():
        items = iter_archive(location)
    elif Path(location).is_dir():
        root = os.path.realpath(location)
        items = walk_tree(root)
    else:
        problem = "neither a folder nor an archive" if Path(location).exists() else "no such folder or file"
        raise UserError(
            f"corpus.location: {location}: {problem}",
            expected="a folder, s3://bucket/prefix, a table (.csv, .tsv, .parquet), or an archive "
            f"({', '.join(ARCHIVE_SUFFIXES)})",
        )
    yield from cut_chunks(root, items)


def cut_chunks(
    root: str | None, items: Iterator[str | Document], read: Callable[[str, str], Document] | None = None
) -> Iterator[Chunk]:
    """Items cut into chunks, in order."""
    while items_of_chunk := tuple(islice(items, CHUNK_DOCUMENTS)):
        yield Chunk(root, items_of_chunk, read)


def read_chunk(chunk: Chunk) -> Iterator[Document]:
    """The documents of a chunk."""
    read = chunk.read or read_file
    for item in chunk.items:
        yield item if isinstance(item, Document) else read(chunk.root or "", item)


def map_chunks(chunks: Iterator[Chunk], work: Callable[[Chunk], T], num_workers: int | None = None) -> Iterator[T]:
    """`work` over the chunks of a corpus, results in the corpus's order, in several processes where it is long.

    `work` must be picklable. `num_workers`: processes; None: one a core, at most `MAX_WORKERS`.
    """
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if num_workers is None else num_workers
    yield from map(work, islice(chunks, SERIAL_CHUNKS))
    first = next(chunks, None)
    if first is None:
        return
    yield work(first)
    if workers == 1:
        yield from map(work, chunks)
        return
    # Not fork: the caller may run threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from map_ahead(pool, work, chunks, num_ahead=3 * workers)
        except BrokenProcessPool:
            raise UserError(
                "a process that reads the corpus was killed", fix="check dmesg for lack of memory, then run it again"
            ) from None


def map_ahead(pool: Executor, work: Callable[[Item], T], items: Iterator[Item], num_ahead: int) -> Iterator[T]:
    """Results in the order of `items`, with at most `num_ahead` items in progress."""
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def walk_tree(root: str, suffixes: tuple[str, ...] = (".json",)) -> Iterator[str | Document]:
    """Names (relative, with `/`) of the files below `root` that end in one of `suffixes`, folder by folder in name
    order; rows for those that cannot be read."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(f"{root}/{folder}") as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield unread(folder or ".", "unreadable", error.strerror or str(error), retryable=True)
            continue
        inner = []
        for entry in entries:
            source = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                yield from _linked(root, source, suffixes)
            elif entry.is_dir(follow_symlinks=False):
                inner.append(source)
            elif entry.name.lower().endswith(suffixes):
                yield source if entry.is_file(follow_symlinks=False) else unread(source, "unreadable", "not a file")
        folders += reversed(inner)


def _linked(root: str, source: str, suffixes: tuple[str, ...]) -> Iterator[str | Document]:
    """A symbolic link: its file where that lies within the tree; a row where a document or folder is left alone."""
    target = os.path.realpath(f"{root}/{source}")
    if Path(target).is_dir():
        yield unread(source, "symlink", "a linked folder is not followed; name it as a corpus of its own")
    elif source.lower().endswith(suffixes):
        inside = target.startswith(root.rstrip("/") + "/") and Path(target).is_file()
        if not inside:
            yield unread(source, "symlink", "leads out of the corpus, or nowhere")
            return
        if not source.lower().endswith(".json"):
            yield source
            return
        read = read_file(root, os.path.relpath(target, root))
        yield Document(source, read.data, read.rejection)


def read_file(root: str, source: str) -> Document:
    """One file of the tree, read up to the limit and not past it."""
    if not source.isascii() and not _is_encodable(source):
        return unread(source, "bad-file-name", "the name is not UTF-8")
    try:
        handle = os.open(f"{root}/{source}", _OPEN_FLAGS)
        try:
            data = os.read(handle, _READ_BYTES)
            # Most files end within the first read.
            while len(data) >= _READ_BYTES and len(data) <= MAX_DOCUMENT_BYTES and (more := os.read(handle, 2**20)):
                data += more
            if len(data) > MAX_DOCUMENT_BYTES:
                return Document(source, b"", too_large(os.fstat(handle).st_size))
        finally:
            os.close(handle)
    except OSError as error:
        return unread(source, "unreadable", error.strerror or str(error), retryable=True)
    return Document(source, data)


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def unread(source: str, reason: str, detail: str, *, retryable: bool = False) -> Document:
    return Document(short(source), b"", Rejection("read", reason, detail, retryable))


def _iter_s3(storage: Storage) -> Iterator[Document]:
    """The JSON objects below a prefix, read by many requests at a time."""

    def read(item: tuple[str, int]) -> Document:
        name, size = item
        if size > MAX_DOCUMENT_BYTES:
            return Document(name, b"", too_large(size))
        try:
            return Document(name, storage.get(name, max_bytes=MAX_DOCUMENT_BYTES))
        except (MissingObject, ShardDamage, StorageFailure) as error:
            return unread(name, "unreadable", short(error.problem), retryable=True)

    names = ((entry.name, entry.size) for entry in storage.list() if entry.name.lower().endswith(".json"))
    with ThreadPoolExecutor(NUM_S3_READERS) as pool:
        yield from map_ahead(pool, read, names, num_ahead=4 * NUM_S3_READERS)
