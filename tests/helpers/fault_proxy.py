"""An HTTP proxy on loopback that injects faults into what passes between a client and one server.

    with proxied(port) as proxy:
        proxy.fault = lambda request: "reset" if request.method == "PUT" else None
        open_storage(f"s3://bucket/x?endpoint={proxy.url}")

A fault is a status code, or: "reset" (before the server sees the request), "lost" (the server answers, the client is
reset), "cut" (half of the body, then the end), "break" (half of the body, then a reset), "hang" (no answer until
`proxy.release` is set), "flip" (one bit of the body), "page" (status 200 with a page, as of a captive network).
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

_CODES = {
    302: "Found", 400: "ExpiredToken", 401: "AccessDenied", 403: "AccessDenied", 412: "PreconditionFailed",
    416: "InvalidRange", 429: "TooManyRequests", 500: "InternalError", 501: "NotImplemented", 503: "SlowDown",
}  # fmt: skip
_OF_ONE_HOP = {"connection", "transfer-encoding", "content-length", "expect", "server", "date"}


class Request(NamedTuple):
    """What a fault is chosen by."""

    number: int
    """From 1."""
    method: str
    path: str
    """With its query."""


Fault = Callable[[Request], str | int | None]


class FaultProxy(http.server.ThreadingHTTPServer):
    """See the module."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.fault: Fault = lambda _: None
        self.log: list[tuple[Request, str | int | None]] = []
        """All requests, each with its fault."""
        self.release = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """The endpoint to ask instead of the server's."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may leave at any time."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):
            super().handle_one_request()

    def _pass(self) -> None:
        proxy, body = self.server, self._body()
        with proxy.lock:
            request = Request(len(proxy.log) + 1, self.command, self.path)
            fault = proxy.fault(request)
            proxy.log.append((request, fault))
        if fault == "hang":
            proxy.release.wait(600)
        if fault in ("reset", "hang"):
            self._reset()
        elif fault == "page":
            self._send_page(request.number)
        elif isinstance(fault, int):
            self._refuse(fault)
        else:
            self._answer(fault, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, status: int) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{_CODES[status]}</Code><Message>injected</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_page(self, number: int) -> None:
        """By turns one that an XML parser reads and one that it does not."""
        body = (
            b"<html><body><p>Please log in</p></body></html>" if number % 2 else b"<!doctype html><p>Please log in<br>"
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, fault: str | int | None, body: bytes) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_HOP}
        upstream.request(
            self.command, self.path, body=body or (b"" if self.command in ("PUT", "POST") else None), headers=headers
        )
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "lost":
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _OF_ONE_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "flip" and data:
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        if fault in ("cut", "break"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self._reset()
            self.close_connection = True
            return
        self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextlib.contextmanager
def proxied(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy in front of `http://127.0.0.1:PORT`."""
    proxy = FaultProxy(int(endpoint.rpartition(":")[2]))
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.release.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
