"""An HTTP server that misbehaves on request: each path is a list of answers, one a request, the last repeated."""

from __future__ import annotations

import re
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
        seen = sum(name == path for name, _ in self.server.requests)
        self.server.requests.append((path, dict(self.headers)))
        answers = self.server.answers[path]
        answers[min(seen, len(answers) - 1)](self)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def odd_server(**answers: list[Callable[[Any], None]]) -> Iterator[OddServer]:
    with OddServer({f"/{name}": each for name, each in answers.items()}) as server:
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


def wrong_part(handler: Any) -> None:
    """Answers a range with one that starts earlier."""
    _head(handler, 206, **{"Content-Range": f"bytes 100-{len(BODY) - 1}/{len(BODY)}"}, length=len(BODY) - 100)
    handler.wfile.write(BODY[100:])


def other_content(handler: Any) -> None:
    """The content has changed under the same URL: a range of the old is answered with all of the new."""
    body = b"new" * 1000
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.send_header("ETag", '"v2"')
    handler.end_headers()
    handler.wfile.write(body)


def _head(handler: Any, code: int, *, length: int, **headers: str) -> None:
    handler.send_response(code)
    handler.send_header("Content-Length", str(length))
    handler.send_header("ETag", ETAG)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
