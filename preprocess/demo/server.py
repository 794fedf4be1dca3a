"""A folder over HTTP on the loopback interface, with ranges: it replaces the CDN in the demo."""

from __future__ import annotations

import mimetypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shards.errors import UserError

HOST = "127.0.0.1"
_CHUNK_BYTES = 1 << 18


class FolderServer(ThreadingHTTPServer):
    """Serves the files below one folder; `port` 0 takes a free one. Raises UserError when the port is taken."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder", expected="the folder that `wanprep demo-corpus` wrote")
        self.folder = folder.resolve()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            fix = "another --port, or 0 for any free one"
            raise UserError(f"port {port} on {HOST}: {error.strerror}", fix=fix) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error; anything else is a bug and is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where it answers, with a slash at the end."""
        return f"http://{HOST}:{self.server_address[1]}/"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve `folder` on a free port during the block, in a thread; yields the base URL."""
    with FolderServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderServer

    def do_GET(self) -> None:
        """Answer with the file, or the asked part of it."""
        path = self._path()
        try:
            opened = path.open("rb") if path else None
        except OSError:  # removed meanwhile, or not to be read
            opened = None
        if path is None or opened is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with opened as file:
            status = os.fstat(file.fileno())
            size, tag = status.st_size, f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
            start, end, is_part = self._range(size, tag)
            if start >= size > 0:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            self._head(path, size, tag, start, end, is_part)
            file.seek(start)
            while start < end and (chunk := file.read(min(_CHUNK_BYTES, end - start))):
                self.wfile.write(chunk)
                start += len(chunk)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the build's ledger records every clip."""

    def _head(self, path: Path, size: int, tag: str, start: int, end: int, is_part: bool) -> None:
        self.send_response(HTTPStatus.PARTIAL_CONTENT if is_part else HTTPStatus.OK)
        self.send_header("Content-Type", mimetypes.guess_type(path.name)[0] or "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", tag)
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()

    def _path(self) -> Path | None:
        """The requested file, if it is below the folder and no part of its path is hidden; None for any other path."""
        try:
            path = (self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
            inside = path.relative_to(self.server.folder)
            return path if not any(part.startswith(".") for part in inside.parts) and path.is_file() else None
        except (OSError, ValueError, RuntimeError):  # NUL, a name too long, a loop of links, not below the folder
            return None

    def _range(self, size: int, tag: str) -> tuple[int, int, bool]:
        """Start, end (exclusive) and whether a part was requested; changed content is sent completely."""
        asked = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{0,18})", self.headers.get("Range", ""))
        if asked is None or self.headers.get("If-Range", tag) != tag or (asked[2] and int(asked[2]) < int(asked[1])):
            return 0, size, False
        return int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size), True
