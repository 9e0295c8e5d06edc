"""Framed calls between two processes, over one socket of a pair.

For: calling, answering, and noticing that the other process has gone. Not for: what is called.

A frame is a length and a JSON object: a call, its answer, or the cancellation of a call. Both
processes are forked from one image, so frames carry no version. Secrets may be inside: the socket
pair has no name and no other holder, and nothing here is logged.

Invariants: a frame is bounded; a peer that sends a longer one, or reads nothing, is disconnected.
At most `CALLS_MAX` calls of one side are open, the rest wait. A call that is cancelled cancels its
work on the other side. When the connection is lost, every waiting call raises RpcConnectionLost.
"""

import asyncio
import itertools
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, cast

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger

# The largest are settings with their mappings inside; larger maps are better kept in a file.
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
# A client that is starting waits for one answer at most. With more clients than this the rest wait
# their turn, within their own timeouts. A call takes about a kilobyte on both sides.
CALLS_MAX: Final = 10_000
# What a peer has not read yet: one message of the largest size, and calls after it.
UNSENT_BYTES_MAX: Final = 2 * MESSAGE_BYTES_MAX

_LENGTH: Final = struct.Struct("!I")
_NO_ANSWER: Final = 0  # the id of a call that wants no answer

_log = get_logger(__name__)

Message = dict[str, Any]
Methods = Mapping[str, Callable[..., Awaitable[object]]]
"""Coroutine functions, by the names under which the other process calls them."""


class MessageTooLong(Exception):
    """A message over MESSAGE_BYTES_MAX."""


class RpcConnectionLost(Exception):
    """The process at the other end has gone."""


# -- frames --------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """Return a message as a frame. Raises MessageTooLong."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MESSAGE_BYTES_MAX:
        raise MessageTooLong(f"{len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Splits a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> Iterator[Message]:
        """Yield the messages that are complete now. Raises MessageTooLong."""
        self._buffer += received
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MESSAGE_BYTES_MAX:
                raise MessageTooLong(f"{length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield json.loads(body)


def error_as_dict(error: ProxyError) -> Message:
    """Return a ProxyError as a message. One with an upstream's own answer never gets here."""
    return {
        "kind": error.kind.name,
        "detail": error.detail,
        "retry_after_seconds": error.retry_after_seconds,
        "final": error.final,
    }


def error_from_dict(content: Message) -> ProxyError:
    """Return the ProxyError that `error_as_dict` was given."""
    return ProxyError(
        ErrorKind[content["kind"]],
        content["detail"],
        retry_after_seconds=content["retry_after_seconds"],
        final=content["final"],
    )


# -- calls ---------------------------------------------------------------------------------------


class RpcConnection(asyncio.Protocol):
    """One end of a connection. Either end calls the `methods` of the other."""

    def __init__(self, methods: Methods) -> None:
        self.lost = asyncio.Event()
        self._methods = methods
        self._reader = FrameReader()
        self._ids = itertools.count(_NO_ANSWER + 1)
        self._open_calls = asyncio.Semaphore(CALLS_MAX)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._transport: asyncio.Transport

    @classmethod
    async def open(cls, sock: socket.socket, methods: Methods) -> "RpcConnection":
        """Return a connection over this socket, which it closes when it ends."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(lambda: cls(methods), sock=sock)
        return connection

    def close(self) -> None:
        """Close the connection; the other end notices."""
        self._transport.abort()

    async def call(self, name: str, **arguments: object) -> Any:
        """Return the other end's answer. Raises RpcConnectionLost, or the ProxyError it answers."""
        async with self._open_calls:
            if self.lost.is_set():
                raise RpcConnectionLost
            call_id = next(self._ids)
            self._waiting[call_id] = asyncio.get_running_loop().create_future()
            try:
                self._send({"call": call_id, "name": name, "arguments": arguments})
                return await self._waiting[call_id]
            except asyncio.CancelledError:
                self._send({"cancel": call_id})
                raise
            finally:
                del self._waiting[call_id]

    def notify(self, name: str, **arguments: object) -> None:
        """Send a call that wants no answer."""
        self._send({"call": _NO_ANSWER, "name": name, "arguments": arguments})

    # -- asyncio's protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connected transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Act on what the other end sent."""
        try:
            for message in self._reader.feed(data):
                self._receive(message)
        except MessageTooLong:
            _log.error("a process of the proxy sent an invalid message")
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the calls that wait, and cancel what is being answered."""
        self.lost.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RpcConnectionLost())
        for task in self._answering.values():
            task.cancel()

    # -- inside ----------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(encode(message))
        if self._transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            _log.error("a process of the proxy does not read its messages")
            self._transport.abort()

    def _receive(self, message: Message) -> None:
        if "call" in message:
            self._start_answer(message["call"], message["name"], message["arguments"])
        elif "cancel" in message:
            if task := self._answering.get(message["cancel"]):
                task.cancel()
        elif future := self._waiting.get(message["answer"]):
            if future.done():
                return
            if "error" in message:
                future.set_exception(error_from_dict(message["error"]))
            else:
                future.set_result(message["result"])

    def _start_answer(self, call_id: int, name: str, arguments: Mapping[str, Any]) -> None:
        answer = self._answer(call_id, self._methods[name](**arguments))
        task = asyncio.get_running_loop().create_task(answer)
        key = call_id or -id(task)
        self._answering[key] = task
        task.add_done_callback(lambda _: self._answering.pop(key))

    async def _answer(self, call_id: int, work: Awaitable[object]) -> None:
        answer: Message = {"answer": call_id}
        try:
            answer["result"] = await work
        except ProxyError as error:
            answer["error"] = error_as_dict(error)
        except Exception as error:
            # A bug of ours must fail one call, not the process.
            _log.exception("a call from another process failed")
            answer["error"] = error_as_dict(ProxyError(ErrorKind.INTERNAL, type(error).__name__))
        if call_id != _NO_ANSWER:
            self._send(answer)
