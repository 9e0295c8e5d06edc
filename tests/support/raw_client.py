"""A client that speaks to a gateway byte by byte, and sees what drivers hide.

It knows the sizes of the TLS records it received and how the server ended the stream. It checks
certificates, sends no message that it was not told to send, and waits never longer than
WAIT_SECONDS_MAX.
"""

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Final, Self

from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    BackendMessage,
    ErrorResponse,
    Frame,
    PasswordMessage,
    decode_backend,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, ProtocolVersion, SSLRequest, StartupMessage

WAIT_SECONDS_MAX: Final = 5.0
_RECORD_HEADER_BYTES: Final = 5
_APPLICATION_DATA: Final = 23  # TLS record type


class RawClient:
    """One TCP connection; plain until `start_tls`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.record_bytes: list[int] = []  # lengths of application data records, with overhead
        self.close_notify = False
        self._reader = reader
        self._writer = writer
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._records = bytearray()
        self._plain = bytearray()
        self._framing = MessageReader(1 << 30)

    @classmethod
    async def connect(cls, port: int, host: str = "127.0.0.1") -> Self:
        """Open the connection."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return cls(*await asyncio.open_connection(host, port))

    @classmethod
    async def secure(cls, port: int, ca_file: Path, server_name: str | None) -> Self:
        """Open the connection and bring TLS up, as far as the first packet inside."""
        client = await cls.connect(port)
        client.send(SSLRequest().encode())
        assert await client.receive_exactly(1) == b"S"
        await client.start_tls(ca_file, server_name)
        return client

    def send(self, content: bytes) -> None:
        """Send bytes, in one write."""
        if self._tls is None:
            self._writer.write(content)
        else:
            self._tls.write(content)
            self._writer.write(self._outgoing.read())

    async def start_tls(self, ca_file: Path, server_name: str | None) -> None:
        """Shake hands; without a server name there is no SNI and no check of the name."""
        context = ssl.create_default_context(cafile=str(ca_file))
        context.check_hostname = server_name is not None
        tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._writer.write(self._outgoing.read())
                    if not await self._feed():
                        raise EOFError("the server ended the handshake") from None
        self._writer.write(self._outgoing.read())
        self._tls = tls

    async def receive_exactly(self, count: int) -> bytes:
        """Return so many bytes. Raises EOFError when the server ends before."""
        while len(self._plain) < count:
            received = await self.receive()
            if not received:
                raise EOFError(bytes(self._plain))
            self._plain += received
        taken = bytes(self._plain[:count])
        del self._plain[:count]
        return taken

    async def receive(self) -> bytes:
        """Return what comes next, b"" at the end, TimeoutError when nothing comes."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while True:
                if self._tls is None:
                    return await self._reader.read(65536)
                try:
                    received = self._tls.read(65536)
                    self.close_notify = not received
                    return received
                except ssl.SSLWantReadError:
                    if not await self._feed():
                        return b""
                except ssl.SSLZeroReturnError:
                    self.close_notify = True
                    return b""

    async def message(self) -> BackendMessage | Frame:
        """Return the next message. Raises EOFError at the end."""
        while (frame := self._framing.next()) is None:
            received = bytes(self._plain) or await self.receive()
            self._plain.clear()
            if not received:
                raise EOFError
            self._framing.feed(received)
        return decode_backend(frame)

    async def messages_until(self, kind: type[BackendMessage]) -> list[BackendMessage | Frame]:
        """Return the messages up to and with the first of a kind. Raises EOFError."""
        messages = [await self.message()]
        while not isinstance(messages[-1], kind):
            messages.append(await self.message())
        return messages

    async def error(self) -> ErrorResponse:
        """Return the next ErrorResponse, skipping what is before it."""
        last = (await self.messages_until(ErrorResponse))[-1]
        assert isinstance(last, ErrorResponse)
        return last

    async def ended(self) -> bool:
        """Wait for the server's end and drop what is before it; True for an orderly one."""
        try:
            while await self.receive():
                pass
        except ConnectionError:
            return False
        return self.close_notify

    def start_up(self, version: ProtocolVersion = V3_0, **parameters: str) -> None:
        """Send a StartupMessage."""
        pairs = tuple((name.encode(), value.encode()) for name, value in parameters.items())
        self.send(StartupMessage(version, pairs).encode())

    async def show_token(self, token: str) -> None:
        """Answer the request for a cleartext password, which must come now."""
        assert await self.message() == AuthenticationCleartextPassword()
        self.send(PasswordMessage(Secret(token.encode())).encode())

    def query(self, sql: str) -> None:
        """Send a simple Query."""
        self.send(Frame(b"Q", sql.encode() + b"\0").encode())

    def close(self) -> None:
        """End with close_notify, if there is TLS, and FIN."""
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):  # ours is sent; the server's need not come
                self._tls.unwrap()
            self._writer.write(self._outgoing.read())
        self._writer.close()

    def abort(self) -> None:
        """Drop the connection."""
        self._writer.transport.abort()

    async def _feed(self) -> bool:
        received = await self._reader.read(65536)
        self._incoming.write(received)
        self._records += received
        while len(self._records) >= _RECORD_HEADER_BYTES:
            length = int.from_bytes(self._records[3:5], "big")
            if len(self._records) < _RECORD_HEADER_BYTES + length:
                break
            if self._records[0] == _APPLICATION_DATA:
                self.record_bytes.append(length)
            del self._records[: _RECORD_HEADER_BYTES + length]
        return bool(received)
