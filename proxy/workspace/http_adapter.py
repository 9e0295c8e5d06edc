"""HTTP for the SDK with bounds: a reply's bytes, its whole time, a connection's idle time.

`requests` bounds the time between two bytes only, and reads a reply of any length into memory. It
reuses a connection however long it was idle: a NAT may have forgotten it, and then the request
waits for its whole timeout.

Importing this imports `requests`, which takes some tenths of a second: only in a thread.
"""

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from http.client import HTTPResponse
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

# The largest reply in use, a page of endpoints, has some kilobytes.
REPLY_BYTES_MAX: Final = 1 << 20
# Of a head. It may have 6.5 MB for the library, and 50 MB when parsed; servers send some kilobytes.
HEAD_BYTES_MAX: Final = 128 * 1024
# Network devices forget idle connections; the shortest common time is a minute.
IDLE_SECONDS_MAX: Final = 30.0
# Connections that one request may find dead before it opens a new one.
_TRIES_MAX: Final = 10
# At most this is decompressed at once, to a thousand times as much.
_READ_BYTES: Final = 4096


class ReplyTooLong(Exception):
    """A reply has more bytes than its bound. The SDK does not try again."""


class _Exchange:
    """One request and its reply. `close` ends it from another thread."""

    def __init__(self) -> None:
        self.reused = False
        self.closed = False
        self._socket: Any = None
        self._connecting: socket.socket | None = None
        self._lock = threading.Lock()

    def connect(self, opened: socket.socket) -> None:
        """Keep a copy of the socket, which TLS takes over, so that `close` ends a handshake too."""
        with self._lock:
            self._forget_connecting()
            self._connecting = opened.dup()
        self._close_if_late()

    def begin(self, used: Any, *, reused: bool) -> None:
        self._socket, self.reused = used, reused
        with self._lock:
            self._forget_connecting()
        self._close_if_late()

    def close(self) -> None:
        self.closed = True
        plain = getattr(self._socket, "socket", self._socket)  # as in TLS to an HTTPS proxy
        with self._lock:  # the copy is not closed, and its number not given away, meanwhile
            for used in (self._connecting, plain):
                if used is not None:
                    # Not `SSLSocket.shutdown`, which is not safe while another thread reads.
                    with suppress(OSError):
                        socket.socket.shutdown(used, socket.SHUT_RDWR)

    def end(self) -> None:
        """Close the copy of a socket whose handshake has failed."""
        with self._lock:
            self._forget_connecting()

    def _forget_connecting(self) -> None:
        if self._connecting is not None:
            self._connecting.close()
            self._connecting = None

    def _close_if_late(self) -> None:
        """Close again: the time was over before there was a socket to close."""
        if self.closed:
            self.close()


_current: ContextVar[_Exchange | None] = ContextVar("http_exchange", default=None)


class _Head:
    """The lines of one reply's head, and of those with status 1xx before it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left_bytes = HEAD_BYTES_MAX

    def readline(self, size: int) -> bytes:
        """Return the next line. Raises ReplyTooLong."""
        line: bytes = self._file.readline(size)
        self._left_bytes -= len(line)
        if self._left_bytes < 0:
            raise ReplyTooLong(f"the reply's head has more than {HEAD_BYTES_MAX} bytes")
        return line

    def close(self) -> None:
        """Close the connection's file."""
        self._file.close()


class _Response(HTTPResponse):
    """A reply whose head has a bound. The library bounds the number of its lines only."""

    fp: Any

    def begin(self) -> None:
        """Read the head. Raises ReplyTooLong."""
        body = self.fp
        self.fp = _Head(body)
        try:
            super().begin()
        finally:
            if self.fp is not None:  # else it was closed
                self.fp = body


class _Connection(HTTPConnection):
    """A connection that is not reused once it was idle for too long."""

    response_class = _Response
    replied_at: float | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the connection may be used again; the pool closes it if not."""
        idle_since = self.replied_at
        if idle_since is not None and time.monotonic() - idle_since > IDLE_SECONDS_MAX:
            return False
        return super().is_connected

    def connect(self) -> None:
        """Connect; from now on it counts as new."""
        self.replied_at = None
        super().connect()

    def _new_conn(self) -> socket.socket:
        """Open the TCP connection.

        The library bounds each read of the answer to CONNECT and of the TLS handshake, not all of
        them. The method is private; there is no other place between TCP and these.
        """
        opened = super()._new_conn()
        exchange = _current.get()
        if exchange is not None:
            exchange.connect(opened)
        return opened

    def request(self, *arguments: Any, **options: Any) -> None:
        """Send a request, which can be ended from another thread from now on."""
        exchange, reused = _current.get(), self.replied_at is not None
        if exchange is not None and self.sock is not None:
            exchange.begin(self.sock, reused=reused)
        super().request(*arguments, **options)
        if exchange is not None:
            exchange.begin(self.sock, reused=reused)

    def getresponse(self) -> Any:
        """Return the reply's head."""
        response = super().getresponse()
        self.replied_at = time.monotonic()
        return response


class _SecureConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS: Final = {"http": _Pool, "https": _SecurePool}


class BoundedAdapter(HTTPAdapter):
    """Sends requests, and reads each reply to its end or to a bound."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the pools of connections."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        """Return the pools of connections through an HTTP proxy."""
        manager = super().proxy_manager_for(*arguments, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def send(
        self, request: requests.PreparedRequest, *arguments: Any, **options: Any
    ) -> requests.Response:
        """Return the reply, whose body was read. `options["timeout"]` is for all of it, in seconds.

        Raises TimeoutError, ReplyTooLong, and what `requests` raises.
        """
        seconds = options["timeout"]
        with _exchange(seconds) as exchange:
            try:
                response = self._head(exchange, request, arguments, options)
                body = _body(response)
                # `requests` keeps the replies of all redirects until the last one.
                response.raw = io.BytesIO(b"" if response.is_redirect else body)
            except OSError as error:  # the base of the library's own
                if exchange.closed:
                    raise _too_slow(seconds) from error
                raise
            if exchange.closed:  # the body may have seemed to end
                raise _too_slow(seconds)
            return response

    def _head(
        self,
        exchange: _Exchange,
        request: requests.PreparedRequest,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> requests.Response:
        """Send the request; at once again if a connection that was idle turns out to be dead."""
        streamed = {**options, "stream": True}
        for _ in range(_TRIES_MAX):
            try:
                return super().send(request, *arguments, **streamed)
            except requests.ConnectionError:
                if not exchange.reused or exchange.closed:
                    raise
                exchange.reused = False
        return super().send(request, *arguments, **streamed)


@contextmanager
def _exchange(seconds: float) -> Iterator[_Exchange]:
    exchange = _Exchange()
    timer = threading.Timer(seconds, exchange.close)
    timer.daemon = True
    token = _current.set(exchange)
    timer.start()
    try:
        yield exchange
    finally:
        timer.cancel()
        exchange.end()
        _current.reset(token)


def _body(response: requests.Response) -> bytes:
    """Read the body. Raises ReplyTooLong, and ConnectionError of `requests`."""
    body = bytearray()
    try:
        for part in response.raw.stream(_READ_BYTES, decode_content=True):
            body += part
            if len(body) > REPLY_BYTES_MAX:
                raise ReplyTooLong(f"the reply has more than {REPLY_BYTES_MAX} bytes")
    except HTTPError as error:
        raise requests.ConnectionError(f"the reply did not end: {error}") from error
    finally:
        if response.raw is not None and not response.raw.isclosed():
            response.raw.close()  # with its connection, which cannot be used again
    return bytes(body)


def _too_slow(seconds: float) -> TimeoutError:
    return TimeoutError(f"the reply did not end within {seconds:g} seconds")
