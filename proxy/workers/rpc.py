"""Calls and their answers between two processes, over one socket of a pair.

For: asking, being asked, and knowing when the other one has gone. Not for: what is asked for.

Invariants: at most `CALLS_MAX` calls of one side are under way, the rest wait; a call that is given
up ends its work on the other side. A peer that takes nothing is cut. When the other end has gone,
every call that waits raises RpcConnectionLost.
"""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.workers.rpc_frames import (
    MESSAGE_BYTES_MAX,
    Frames,
    Message,
    MessageTooLong,
    encode,
    error_as_dict,
    error_from_dict,
)

# Each client that is being served waits for one answer at most; with more clients than this the
# rest wait for their turn, within their own time. A call takes about a kilobyte on both sides.
CALLS_MAX: Final = 10_000
# What a peer has not taken: one message of the largest, and calls behind it.
UNSENT_BYTES_MAX: Final = 2 * MESSAGE_BYTES_MAX

_NO_ANSWER: Final = 0  # the number of a call that wants none

_log = get_logger(__name__)

Methods = Mapping[str, Callable[..., Awaitable[object]]]


class RpcConnectionLost(Exception):
    """The process at the other end has gone."""


class RpcConnection(asyncio.Protocol):
    """One end. `methods` are coroutine functions by the names that the other end calls them."""

    def __init__(self, methods: Methods) -> None:
        self.lost = asyncio.Event()
        self._methods = methods
        self._frames = Frames()
        self._numbers = itertools.count(_NO_ANSWER + 1)
        self._slots = asyncio.Semaphore(CALLS_MAX)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._transport: asyncio.Transport

    @classmethod
    async def open(cls, sock: socket.socket, methods: Methods) -> "RpcConnection":
        """Return the end of a channel that this socket is; it is closed with it."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(lambda: cls(methods), sock=sock)
        return connection

    def close(self) -> None:
        """End the channel; the other end sees that this process has done with it."""
        self._transport.abort()

    async def call(self, name: str, **arguments: object) -> Any:
        """Return what the other end answers. Raises ProxyError and RpcConnectionLost."""
        async with self._slots:
            if self.lost.is_set():
                raise RpcConnectionLost
            number = next(self._numbers)
            self._waiting[number] = asyncio.get_running_loop().create_future()
            try:
                self._send({"call": number, "name": name, "arguments": arguments})
                return await self._waiting[number]
            except asyncio.CancelledError:
                self._send({"forget": number})
                raise
            finally:
                del self._waiting[number]

    def notify(self, name: str, **arguments: object) -> None:
        """Say something that needs no answer."""
        self._send({"call": _NO_ANSWER, "name": name, "arguments": arguments})

    # -- the protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connected transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Act on what the other end sends."""
        try:
            for message in self._frames.feed(data):
                self._take(message)
        except MessageTooLong:
            _log.error("a process of the proxy sends nonsense")
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Have whoever waits know that the other process has gone."""
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
            _log.error("a process of the proxy takes no messages")
            self._transport.abort()

    def _take(self, message: Message) -> None:
        if "call" in message:
            self._begin(message["call"], message["name"], message["arguments"])
        elif "forget" in message:
            if task := self._answering.get(message["forget"]):
                task.cancel()
        elif future := self._waiting.get(message["answer"]):
            if future.done():
                return
            if "error" in message:
                future.set_exception(error_from_dict(message["error"]))
            else:
                future.set_result(message["result"])

    def _begin(self, number: int, name: str, arguments: Mapping[str, Any]) -> None:
        answer = self._answer(number, self._methods[name](**arguments))
        task = asyncio.get_running_loop().create_task(answer)
        key = number or -id(task)
        self._answering[key] = task
        task.add_done_callback(lambda _: self._answering.pop(key))

    async def _answer(self, number: int, work: Awaitable[object]) -> None:
        answer: Message = {"answer": number}
        try:
            answer["result"] = await work
        except ProxyError as error:
            answer["error"] = error_as_dict(error)
        except Exception as error:
            # A bug of ours must cost who asked, not the process.
            _log.exception("a call of another process failed")
            answer["error"] = error_as_dict(ProxyError(ErrorKind.INTERNAL, type(error).__name__))
        if number != _NO_ANSWER:
            self._send(answer)
