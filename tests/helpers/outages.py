"""A server of a folder that can be taken down and brought back: what a CDN does for a night."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from preprocess.demo import server as demo_server


class OutageServer(demo_server.FolderServer):
    """`down`: how it fails now; `num_served`: files that were sent; after `down_after` of them it goes `down_as`."""

    down: Literal["", "reset", "503", "page"] = ""
    down_after: int | None = None
    down_as: Literal["reset", "503", "page"] = "503"
    num_served = num_refused = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.RequestHandlerClass = _Handler  # type: ignore[assignment]
        self.went_down = threading.Event()
        self.lock = threading.Lock()


class _Handler(demo_server._Handler):
    server: Any

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            if server.down_after is not None and server.num_served >= server.down_after:
                server.down, server.down_after = server.down_as, None
                server.went_down.set()
            is_down = server.down
            server.num_served += not is_down
            server.num_refused += bool(is_down)
        if is_down == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif is_down == "503":
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
        elif is_down == "page":
            page = b"We are down for maintenance"
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
        else:
            super().do_GET()


@contextmanager
def outage_server(folder: Path) -> Iterator[OutageServer]:
    """The server, in a thread, for the length of the block."""
    with OutageServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
