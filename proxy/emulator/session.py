"""One session of the gateway after its login: the relay to Postgres, its limits, and its end.

Bytes are relayed without parsing, but for the lengths of Postgres' messages: what the gateway sends
by itself must stand between two of them.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from struct import Struct
from typing import Any, Final

from proxy.emulator.backend import Backend
from proxy.emulator.endpoints import Endpoint, SessionEnd
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.gateway_state import GatewayState, Record
from proxy.emulator.streams import Stream
from proxy.wire.messages import ParameterStatus

# What a pool sends between two of its clients: the first statement of it.
_RESET: Final = b"DISCARD ALL\0"
_STANDBY: Final = ParameterStatus(b"in_hot_standby", b"on").encode()
_HEADER: Final = Struct("!cI")
_ENDS: Final[Mapping[SessionEnd, Injection]] = {
    SessionEnd.CLOSE: Injection.CLOSE,
    SessionEnd.END_OF_FILE: Injection.FIN,
    SessionEnd.RESET: Injection.RESET,
    SessionEnd.SILENCE: Injection.HANG,
}


class Session:
    """One session between login and end; `run` it once."""

    def __init__(
        self,
        gateway: GatewayState,
        stream: Stream,
        record: Record,
        endpoint: Endpoint,
        backend: Backend,
    ) -> None:
        self._gateway = gateway
        self._stream = stream
        self._record = record
        self._endpoint = endpoint
        self._backend = backend
        self._end_requested: asyncio.Future[SessionEnd] = asyncio.get_running_loop().create_future()
        self._last_activity = 0.0
        self._until_standby = MessageEnds()

    def register(self) -> None:
        """Count the session from ReadyForQuery on."""
        self._record_activity()
        self._record.ready = True
        user = (self._record.parameter(b"user") or b"").decode(errors="replace")
        self._gateway.logins[user] += 1
        self._endpoint.sessions.add(self)
        self._gateway.changed()

    def unregister(self) -> None:
        """Forget the session and its cancel key."""
        self._endpoint.sessions.discard(self)
        issued = self._record.issued_key
        if issued is not None:
            self._gateway.keys.pop((issued.pid, issued.key.reveal()), None)
        self._gateway.changed()

    def end(self, how: SessionEnd) -> None:
        """Start to end the session. Postgres itself sends 57P01, in order with other messages."""
        if how is SessionEnd.ADMIN_SHUTDOWN and self._record.real_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._record.real_pid, signal.SIGTERM)
        elif not self._end_requested.done():
            self._end_requested.set_result(how)

    def demote(self) -> None:
        """Report from the next ReadyForQuery on that the session's server is a standby."""
        self._until_standby.wanted = True

    async def say(self, content: bytes) -> None:
        """Send bytes that are not Postgres'."""
        await self._stream.write(content)

    async def run(self, inject_fault: Callable[[Stage], Awaitable[None]]) -> Injection:
        """Relay until one side ends or the session is ended.

        Return how to end the client's connection. The one to Postgres is closed first.
        """
        parts = (
            asyncio.ensure_future(self._to_backend(inject_fault)),
            asyncio.ensure_future(self._to_client()),
            asyncio.ensure_future(self._limits()),
        )
        ends: set[asyncio.Future[Any]] = {*parts, self._end_requested}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)
        for part in parts:
            if not part.cancelled():
                part.result()  # raises the fault that was injected
        return (
            _ENDS[self._end_requested.result()] if self._end_requested.done() else Injection.CLOSE
        )

    async def _to_backend(self, inject_fault: Callable[[Stage], Awaitable[None]]) -> None:
        while received := await self._stream.read():
            self._record_activity()
            if _RESET in received:
                await inject_fault(Stage.RESET)
            await self._backend.write(received)
        if self._endpoint.keeps_backend:
            await asyncio.Event().wait()  # until Postgres ends, or has something to send

    async def _to_client(self) -> None:
        while received := await self._backend.read():
            self._record_activity()
            at = self._until_standby.before_ready(received)
            if at is not None:
                received = received[:at] + _STANDBY + received[at:]
            await self._stream.write(received)

    async def _limits(self) -> None:
        """End the session when it reaches a limit, or suspend the idle compute.

        This loop is unbounded: it ends with the session. A limit that is set after the start of the
        session may not apply to it.
        """
        endpoint, started = self._endpoint, time.monotonic()
        while True:
            now = time.monotonic()
            due = [
                (since + limit - now, what)
                for since, limit, what in (
                    (started, endpoint.lifetime_seconds_max, self._end_at_lifetime_limit),
                    (self._last_activity, endpoint.idle_seconds_max, self._end_at_idle_limit),
                    (endpoint.last_activity, endpoint.suspend_after_seconds, endpoint.suspend),
                )
                if limit is not None
            ]
            if not due:
                await asyncio.Event().wait()
            seconds, what = min(due, key=lambda one: one[0])
            if seconds > 0:
                await asyncio.sleep(seconds)
            else:
                what()
                await asyncio.Event().wait()  # until Postgres' last message and its end

    def _end_at_lifetime_limit(self) -> None:
        self.end(SessionEnd.ADMIN_SHUTDOWN)

    def _end_at_idle_limit(self) -> None:
        self.end(self._endpoint.idle_end)

    def _record_activity(self) -> None:
        self._last_activity = self._endpoint.last_activity = time.monotonic()


class MessageEnds:
    """Finds where a message of the gateway's own may stand in what Postgres sends."""

    def __init__(self) -> None:
        self.wanted = False
        self._header = b""  # of a message whose header is not complete
        self._missing = 0  # bytes of the message that is being received

    def before_ready(self, received: bytes) -> int | None:
        """Return the offset of the first whole ReadyForQuery in these bytes, once it is wanted."""
        position, found = 0, None
        while position < len(received):
            step = min(self._missing, len(received) - position)
            position, self._missing = position + step, self._missing - step
            if position == len(received):
                break
            start = position
            taken = received[position : position + _HEADER.size - len(self._header)]
            whole = not self._header
            self._header += taken
            position += len(taken)
            if len(self._header) < _HEADER.size:
                break
            kind, length = _HEADER.unpack(self._header)
            self._header, self._missing = b"", length - 4
            if self.wanted and whole and kind == b"Z":
                self.wanted, found = False, start
        return found
