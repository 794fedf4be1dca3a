"""An HTTP server that misbehaves on request: each path is a list of answers, one a request, the last repeated."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BODY = bytes(range(256)) * 4000  # 1,024,000 bytes
ETAG = '"v1"'


class OddServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answers: dict[str, list[Callable[[Any], None]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.num_connections = 0
        self.num_busy = self.most_busy = 0
        self.lock = threading.Lock()

    def get_request(self) -> Any:
        accepted = super().get_request()
        self.num_connections += 1
        return accepted

    def handle_error(self, *arguments: object) -> None:
        """A client that hangs up is what the tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OddServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        server = self.server
        with server.lock:
            seen = sum(name == path for name, _ in server.requests)
            server.requests.append((path, dict(self.headers)))
            server.num_busy += 1
            server.most_busy = max(server.most_busy, server.num_busy)
        answers = server.answers[path]
        try:
            answers[min(seen, len(answers) - 1)](self)
        finally:
            with server.lock:
                server.num_busy -= 1

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def odd_server(tls: Any = None, **answers: list[Callable[[Any], None]]) -> Iterator[OddServer]:
    """The server, in threads, for the length of the block; `tls`: an SSLContext."""
    with OddServer({f"/{name}": each for name, each in answers.items()}) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


def whole(handler: Any) -> None:
    """The body, or the part of it that is asked for, as a good server does."""
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if asked and handler.headers.get("If-Range") == ETAG:
        start = int(asked[1])
        _head(handler, 206, **{"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"}, length=len(BODY) - start)
        handler.wfile.write(BODY[start:])
    else:
        _head(handler, 200, length=len(BODY))
        handler.wfile.write(BODY)


def status(code: int, **headers: str) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        _head(handler, code, length=0, **{name.replace("_", "-"): value for name, value in headers.items()})

    return answer


def cut(after: int, length: int = len(BODY)) -> Callable[[Any], None]:
    """Promise `length` bytes, send `after`, close."""

    def answer(handler: Any) -> None:
        _head(handler, 200, length=length)
        handler.wfile.write(BODY[:after])
        handler.wfile.flush()
        handler.close_connection = True

    return answer


def stall(after: int, seconds: float) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        _head(handler, 200, length=len(BODY))
        handler.wfile.write(BODY[:after])
        handler.wfile.flush()
        time.sleep(seconds)
        handler.close_connection = True

    return answer


def drip(seconds_each: float) -> Callable[[Any], None]:
    """A byte at a time, never silent for long."""

    def answer(handler: Any) -> None:
        _head(handler, 200, length=len(BODY))
        try:
            for _ in range(400):
                handler.wfile.write(b"x")
                handler.wfile.flush()
                time.sleep(seconds_each)
        except OSError:
            handler.close_connection = True

    return answer


def reset(after: int) -> Callable[[Any], None]:
    """Send some of the body, then a TCP reset."""

    def answer(handler: Any) -> None:
        _head(handler, 200, length=len(BODY))
        handler.wfile.write(BODY[:after])
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    return answer


def silent(seconds: float) -> Callable[[Any], None]:
    """Not a byte of an answer."""

    def answer(handler: Any) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return answer


def drip_head(seconds_each: float) -> Callable[[Any], None]:
    """A head that comes letter by letter and never ends."""

    def answer(handler: Any) -> None:
        with contextlib.suppress(OSError):
            for letter in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 400:
                handler.wfile.write(bytes([letter]))
                handler.wfile.flush()
                time.sleep(seconds_each)
        handler.close_connection = True

    return answer


def body(content: bytes, code: int = 200, **headers: str) -> Callable[[Any], None]:
    """Any content with its right length."""

    def answer(handler: Any) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        _head(handler, code, length=len(content), **named)
        handler.wfile.write(content)

    return answer


def claims(length: int, content: bytes = BODY) -> Callable[[Any], None]:
    """Sends all of the content under a Content-Length that is another."""

    def answer(handler: Any) -> None:
        _head(handler, 200, length=length)
        handler.wfile.write(content)

    return answer


def until_close(after: int) -> Callable[[Any], None]:
    """Neither a length nor chunks: the end is when the connection ends."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY[:after])
        handler.close_connection = True

    return answer


def chunked(after: int = len(BODY), end: bytes = b"0\r\n\r\n", **headers: str) -> Callable[[Any], None]:
    """Chunks of the body, and how they end."""

    def answer(handler: Any) -> None:
        _chunked_head(handler, **headers)
        for start in range(0, after, 100_000):
            part = BODY[start : min(start + 100_000, after)]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        handler.wfile.write(end)
        handler.close_connection = end == b""

    return answer


def endless(handler: Any) -> None:
    """Ten gigabytes, in chunks, as fast as they are taken."""
    _chunked_head(handler)
    handler.server.num_sent = 0
    part = b"%x\r\n%b\r\n" % (1 << 20, bytes(1 << 20))
    with contextlib.suppress(OSError):
        for _ in range(10 << 10):
            handler.wfile.write(part)
            handler.server.num_sent += 1 << 20
    handler.close_connection = True


def whole_whatever_is_asked(handler: Any) -> None:
    """A server that knows no ranges."""
    _head(handler, 200, length=len(BODY))
    handler.wfile.write(BODY)


def changed_part(handler: Any) -> None:
    """Answers the range, of other content, without a look at If-Range."""
    start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"])[1])
    handler.send_response(206)
    for name, value in {
        "Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}", "Content-Length": str(len(BODY) - start),
        "ETag": '"v2"',
    }.items():  # fmt: skip
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(bytes(len(BODY) - start))


def wrong_part(handler: Any) -> None:
    """Answers a range with one that starts earlier."""
    _head(handler, 206, **{"Content-Range": f"bytes 100-{len(BODY) - 1}/{len(BODY)}"}, length=len(BODY) - 100)
    handler.wfile.write(BODY[100:])


def other_content(handler: Any) -> None:
    """The content has changed under the same URL: a range of the old is answered with all of the new."""
    body = b"\0new" * 750
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.send_header("ETag", '"v2"')
    handler.end_headers()
    handler.wfile.write(body)


def _chunked_head(handler: Any, **headers: str) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("ETag", ETAG)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def _head(handler: Any, code: int, *, length: int, **headers: str) -> None:
    handler.send_response(code)
    handler.send_header("Content-Length", str(length))
    handler.send_header("ETag", ETAG)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
