"""HTTP requests over connections that are kept alive per host, each watched by a watchdog thread.

A socket's time-out bounds one silence, not the total: a server that sends a header letter by letter passes it for
hours, and a stop would wait as long. So a thread checks every request in progress, and shuts down the socket of one
whose deadline has passed, or all of them when the build stops.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from preprocess.corpus.url import HttpUrl
from preprocess.fetch.transfer import FetchError, Limits
from shards.console import LOG
from shards.errors import UserError

CHUNK_BYTES = 1 << 18
_MAX_DRAINED_BYTES = 1 << 16
_CHECK_SECONDS = 0.1
_NO_RETRIES = urllib3.Retry(False, redirect=False)

CheckAddress = Callable[[str, str], None]
"""(host, address): raises FetchError for an address that may not be requested."""


class Transport:
    """A pool of connections, used by many threads at once."""

    def __init__(self, connections_per_host: int, check_address: CheckAddress | None = None) -> None:
        _silence_libraries()
        self.num_connections = 0
        self._check_address = check_address
        self._watchdog = Watchdog()
        self._lock = threading.Lock()
        self._connections_per_host = connections_per_host
        self._proxies = getproxies_environment()
        self._pools = urllib3.PoolManager(num_pools=32, maxsize=connections_per_host, block=False)
        self._pools.pool_classes_by_scheme = _pool_classes(self._connected, self._watchdog.watch_socket)
        self._proxy_pools = {
            scheme: self._open_proxy(scheme, proxy)
            for scheme in ("http", "https")
            if (proxy := self._proxies.get(scheme) or self._proxies.get("all"))
        }

    def close(self) -> None:
        """Close the connections and end the watchdog."""
        for pools in (self._pools, *self._proxy_pools.values()):
            pools.clear()
        self._watchdog.close()

    @contextmanager
    def get(self, url: HttpUrl, headers: Mapping[str, Any], limits: Limits) -> Iterator[urllib3.BaseHTTPResponse]:
        """The response to GET `url`, its body unread; the caller follows redirects.

        When the block reads the body to its end, or the body is short, the connection is used again.
        Raises FetchError and TransferStopped for every error of the network, within the block too.
        """
        with self.watching(url.host, limits):
            response = self.send(url, headers, limits)
            try:
                yield response
            except FetchError:
                _leave(response)
                raise
            except BaseException:
                # The unread rest would be taken for the next response on this connection.
                response.close()
                raise
            _leave(response)

    @contextmanager
    def watching(self, host: str, limits: Limits) -> Iterator[None]:
        """Around `send` and the reading of its response: the watchdog checks it, errors become FetchError.

        The libraries' error texts contain the URL with its query: only their types are passed on.
        """
        with self._watchdog.watching(limits):
            try:
                yield
            except urllib3.exceptions.HTTPError as error:
                limits.remaining_seconds()  # raises if the watchdog or a stop caused the error
                raise _as_fetch_error(error, host, limits) from None

    def send(self, url: HttpUrl, headers: Mapping[str, Any], limits: Limits) -> urllib3.BaseHTTPResponse:
        """One request, within `watching`; errors are urllib3's own."""
        seconds = min(limits.silence_seconds, limits.remaining_seconds())
        pools, target = self._pools, url.target
        if url.scheme in self._proxy_pools and not proxy_bypass_environment(url.netloc, self._proxies):
            pools = self._proxy_pools[url.scheme]
            if url.scheme == "http":  # the proxy reads the host from the request line
                target, headers = url.text, {"Host": url.netloc, **headers}
        response = pools.connection_from_host(url.host, url.port, url.scheme).urlopen(
            "GET", target, headers=headers, timeout=urllib3.Timeout(connect=seconds, read=seconds),
            retries=_NO_RETRIES, redirect=False, assert_same_host=False, preload_content=False, decode_content=False,
        )  # fmt: skip
        try:
            limits.remaining_seconds()  # a head that the watchdog cut off looks like a short one
        except BaseException:
            response.close()
            raise
        return response

    def _open_proxy(self, scheme: str, proxy: str) -> urllib3.ProxyManager:
        """Connections through a proxy of the environment. The proxy resolves the names: no address is checked."""
        try:
            address = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
        except urllib3.exceptions.LocationParseError:  # its text may hold the password
            address = urllib3.util.Url()
        if address.scheme not in ("http", "https") or not address.host:
            kind = f"a proxy of kind {address.scheme}://" if address.scheme else "not a URL"
            problem = f"{scheme.upper()}_PROXY: {kind}"
            raise UserError(problem, expected="http://HOST:PORT", fix="set NO_PROXY for the hosts of the clips")
        auth = urllib3.util.make_headers(proxy_basic_auth=unquote(address.auth)) if address.auth else None
        pools = urllib3.ProxyManager(
            address._replace(auth=None).url, num_pools=32, maxsize=self._connections_per_host, block=False,
            proxy_headers=auth,
        )  # fmt: skip
        pools.pool_classes_by_scheme = _pool_classes(self._count_connection, self._watchdog.watch_socket)
        if self._check_address is not None:
            LOG.info(
                "fetch: %s:// goes through the proxy %s; which addresses it reaches is not checked",
                scheme,
                address.netloc,
            )
        return pools

    def _count_connection(self, host: str, address: str) -> None:
        with self._lock:
            self.num_connections += 1

    def _connected(self, host: str, address: str) -> None:
        self._count_connection(host, address)
        if self._check_address is not None:
            self._check_address(host, address)


def chunks_of(response: urllib3.BaseHTTPResponse, limits: Limits) -> Iterator[bytes]:
    """A body's chunks as they arrive. Raises FetchError where it ends early."""
    try:
        # read1 returns what has arrived: read(n) would wait for n bytes from a server that drips, past every deadline.
        while response.length_remaining != 0 and (chunk := response.read1(CHUNK_BYTES, decode_content=False)):
            yield chunk
    except urllib3.exceptions.ProtocolError as error:
        limits.remaining_seconds()  # raises if the watchdog or a stop caused it
        detail = f"{type(error).__name__} after {response.tell():,} bytes of a response"
        raise FetchError("fetch-truncated", detail, again=True) from None


class Watchdog:
    """A thread that ends requests past their deadline, and all requests on a stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[Limits, socket.socket | None]] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def watching(self, limits: Limits) -> Iterator[None]:
        """Watch the requests of the calling thread during the block."""
        own = threading.get_ident()
        with self._lock:
            self._watched[own] = (limits, None)
            if self._thread is None:
                self._thread = threading.Thread(target=self._check, name="fetch-watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                del self._watched[own]

    def watch_socket(self, sock: socket.socket) -> None:
        """Watch `sock`, on which the calling thread is waiting."""
        own = threading.get_ident()
        with self._lock:
            self._watched[own] = (self._watched[own][0], sock)

    def _check(self) -> None:
        while not self._closed.wait(_CHECK_SECONDS):
            now = time.monotonic()
            with self._lock:
                for limits, sock in self._watched.values():
                    if sock is not None and (limits.stopped() or now > limits.deadline):
                        # Not `sock.shutdown`: a TLS socket would drop its state while another thread reads.
                        with contextlib.suppress(OSError):
                            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _pool_classes(
    on_connect: Callable[[str, str], None], on_request: Callable[[socket.socket], None]
) -> dict[str, type[HTTPConnectionPool]]:
    class Watch:
        """Mixin before a connection's own class."""

        def connect(self: Any) -> None:
            super().connect()  # type: ignore[misc]
            on_connect(self.host, self.sock.getpeername()[0])

        def request(self: Any, *arguments: Any, **options: Any) -> None:
            super().request(*arguments, **options)  # type: ignore[misc]
            on_request(self.sock)

        def getresponse(self: Any) -> urllib3.HTTPResponse:
            return _close_if_refused(self, super().getresponse)  # type: ignore[misc]

    class Watched(Watch, HTTPConnection):  # type: ignore[misc]
        pass

    class WatchedTls(Watch, HTTPSConnection):  # type: ignore[misc]
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Watched

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = WatchedTls

    return {"http": Pool, "https": TlsPool}


def _close_if_refused(connection: Any, getresponse: Callable[[], urllib3.HTTPResponse]) -> urllib3.HTTPResponse:
    """The result of `getresponse`; where urllib3 refuses a head that http.client accepted, the socket is closed.

    A connection that ends with its response gives it the socket, and urllib3 drops that response when it raises.
    """
    taken: list[http.client.HTTPResponse] = []

    def take(*arguments: Any, **options: Any) -> http.client.HTTPResponse:
        taken.append(http.client.HTTPResponse(*arguments, **options))
        return taken[-1]

    connection.response_class = take
    try:
        return getresponse()
    except BaseException:
        for response in taken:
            response.close()
        raise


def _as_fetch_error(error: urllib3.exceptions.HTTPError, host: str, limits: Limits) -> FetchError:
    kind = type(error).__name__
    match error:
        case urllib3.exceptions.ProxyError():
            return FetchError("fetch-connection", f"{host}: its proxy does not answer, or refuses", again=True)
        case urllib3.exceptions.NewConnectionError():  # a subclass of ConnectTimeoutError, but not a time-out
            return FetchError("fetch-connection", f"{host}: {kind}", again=True)
        case urllib3.exceptions.ConnectTimeoutError() | urllib3.exceptions.ReadTimeoutError():
            return FetchError("fetch-timeout", f"{host}: silent for {limits.silence_seconds:g} s", again=True)
        case urllib3.exceptions.SSLError():
            return FetchError("fetch-tls", f"TLS with {host} failed", retryable=True)
        case urllib3.exceptions.InvalidHeader():
            return FetchError("fetch-bad-length", f"{host}: Content-Length is not one number", again=True)
    return FetchError("fetch-connection", f"{host}: {kind}", again=True)


def _leave(response: urllib3.BaseHTTPResponse) -> None:
    """Read a short rest, which returns the connection to the pool; close the connection otherwise."""
    left = response.length_remaining
    if left is not None and left <= _MAX_DRAINED_BYTES and response.tell() == 0:
        response.drain_conn()
    response.close()


def _silence_libraries() -> None:
    """Keep secrets out of logs: urllib3 warns with full URLs, botocore logs what it signs at debug level."""
    for name, level in (("urllib3", logging.ERROR), ("botocore", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, level))
