"""TLS over a plain transport: a transport for the protocol above, a protocol for the one below.

The event loop's own TLS is not used, for two reasons. If the peer's FIN arrives while reading is
paused, it discards data that it has decrypted but not delivered, so a slow client would lose the
upstream's last messages (W34). And it cannot send close_notify and continue to read.

Here every decrypted byte is delivered at once, and pausing stops the plain transport below. Data
that is not delivered is not read, so order and end of the stream are those of the connection.
"""

import asyncio
import errno
import ssl
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from proxy import native
from proxy.file_stamp import Stamp, stamp_of
from proxy.transport.key_exchange import asked_curve
from proxy.transport.sockets import end_stream

if TYPE_CHECKING:  # the module is missing if it was not compiled
    from proxy.native.tls import ClientContext, TLSConnection

# The largest plaintext of a record (RFC 8446): a read of this size always takes a whole record.
_RECORD_BYTES_MAX: Final = 16 * 1024
_READ_BYTES_MIN: Final = 256  # part of a record may be inside OpenSSL already, and not counted
# OpenSSL's memory buffers never shrink, so a session would keep a buffer of the size of its largest
# read for life. Larger data passes through them in parts of this size.
_PART_BYTES_MAX: Final = 32 * 1024
# The size of the write buffer above which an answer of TLS itself, to a key update, ends the
# connection.
_UNREAD_BYTES_MAX: Final = 1024 * 1024
# Cached contexts, by sslmode, authorities and curve. The least recently used is dropped.
_CONTEXTS_MAX: Final = 64


# What a client that begins with TLS must offer (PostgreSQL 17). Otherwise another protocol's TLS
# client could be redirected to this port (the ALPACA attack).
ALPN_PROTOCOL: Final = "postgresql"


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """Return the context for clients. Raises OSError or ssl.SSLError for unusable files."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([ALPN_PROTOCOL])
    return context


def client_context(
    sslmode: str, ssl_root_cert: str, curve: str | None = None, *, accelerated: bool = False
) -> "ssl.SSLContext | ClientContext":
    """Return the context for an upstream: `verify-full` checks chain and name.

    With a curve, the key exchange offers that one alone (Python cannot set two). `accelerated`
    requests the compiled relay's context, which copies Python's rules; without the compiled relay
    the result is Python's. Contexts are cached, since reading the system's certificates takes tens
    of milliseconds, until the file changes: a replaced authority is used from the next connection.
    Raises OSError or ssl.SSLError for an unusable file.
    """
    make = _compiled_context if accelerated and native.AVAILABLE else _client_context
    if ssl_root_cert == "system":
        return make(sslmode, curve, None, None)
    if Path(ssl_root_cert).is_fifo():
        raise OSError(errno.EINVAL, "it is not a regular file")  # opening it might block
    return make(sslmode, curve, ssl_root_cert, stamp_of(ssl_root_cert))


@lru_cache(maxsize=_CONTEXTS_MAX)
def _compiled_context(
    sslmode: str, curve: str | None, cafile: str | None, stamp: Stamp | None
) -> "ClientContext":
    like = _client_context(sslmode, None, cafile, stamp)
    return native.tls.ClientContext(like, cafile, curve)


@lru_cache(maxsize=_CONTEXTS_MAX)
def _client_context(
    sslmode: str, curve: str | None, cafile: str | None, _stamp: Stamp | None
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=cafile)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = sslmode == "verify-full"
    if sslmode == "require":
        context.verify_mode = ssl.CERT_NONE
    if curve is not None:
        context.set_ecdh_curve(curve)
    return context


class TLSTransport(asyncio.Transport, asyncio.Protocol):
    """One TLS connection. Create it, then await `handshake`. `app` is the protocol above.

    `asked_curve` is the curve that a server requested with a HelloRetryRequest, if it did.
    """

    __slots__ = (
        "_app",
        "_data_received",
        "_decrypt",
        "_encrypt",
        "_encrypted",
        "_feed",
        "_handshake",
        "_incoming",
        "_outgoing",
        "_peer_ended",
        "_receiving",
        "_send",
        "_tls",
        "_write_ended",
        "asked_curve",
        "compiled",
        "lower",
        "pause_writing",
        "resume_writing",
    )

    def __init__(
        self,
        lower: asyncio.Transport,
        app: asyncio.Protocol,
        context: "ssl.SSLContext | ClientContext",
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> None:
        """Raises ValueError for a server name that no certificate can have."""
        super().__init__()
        self.lower = lower
        self.asked_curve: str | None = None
        self.compiled: TLSConnection | None = None
        """The compiled TLS connection, None if `ssl` is used."""
        if isinstance(context, ssl.SSLContext):
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side, server_hostname
            )
        else:
            self.compiled = compiled = native.tls.TLSConnection(context, server_hostname)
            # They have the methods of Python's types, so the code below serves both.
            self._incoming = cast(ssl.MemoryBIO, native.tls.Incoming(compiled))
            self._outgoing = cast(ssl.MemoryBIO, native.tls.Outgoing(compiled))
            self._tls = cast(ssl.SSLObject, compiled)
        # The methods that each read and write calls, looked up once.
        self._feed = self._incoming.write
        self._decrypt = self._tls.read
        self._encrypt = self._tls.write
        self._encrypted = self._outgoing.read
        self._send = lower.write
        self._receiving = False  # true from the end of the handshake to the end of the stream
        self._handshake: asyncio.Future[None] | None = None  # while `handshake` waits
        self._peer_ended = False
        self._write_ended = False
        self.set_protocol(app)

    # -- the transport, for the protocol above ---------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Deliver to this protocol from here on."""
        self._app = cast(asyncio.Protocol, protocol)
        self._data_received = self._app.data_received
        # The plain transport does flow control: its buffer is the only one.
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol above."""
        return self._app

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Return the TLS object for `ssl_object`, otherwise the plain transport's value."""
        return self._tls if name == "ssl_object" else self.lower.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. Do nothing after `write_eof` or the loss of the connection."""
        if self._write_ended:
            return
        if len(data) <= _RECORD_BYTES_MAX:
            # Local names, because Python 3.11 is slow to call a function stored in an attribute.
            encrypt, encrypted, send = self._encrypt, self._encrypted, self._send
            encrypt(data)
            send(encrypted())
            return
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest[:_PART_BYTES_MAX]) :]
            self.lower.write(self._outgoing.read())

    def can_write_eof(self) -> bool:
        """Return true: TLS 1.3 closes each direction separately, and this class does in 1.2 too."""
        return True

    def write_eof(self) -> None:
        """Send close_notify, then FIN. Data that the peer still sends is still delivered."""
        if self._write_ended or self.lower.is_closing():
            return
        self._write_ended = True
        with suppress(ssl.SSLError):  # raised because the peer's close_notify has not come yet
            self._tls.unwrap()
        self._flush()
        if self._peer_ended:
            self.lower.close()  # both directions have ended
        else:
            end_stream(self.lower)

    def get_write_buffer_size(self) -> int:
        """Return the bytes not yet given to the kernel."""
        return self.lower.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the sizes at which `pause_writing` and `resume_writing` are called."""
        self.lower.set_write_buffer_limits(high, low)

    def pause_reading(self) -> None:
        """Pause the plain transport: nothing is delivered after the current read."""
        self.lower.pause_reading()

    def resume_reading(self) -> None:
        """Resume the plain transport."""
        self.lower.resume_reading()

    def is_closing(self) -> bool:
        """Return whether the plain transport is closing."""
        return self.lower.is_closing()

    def close(self) -> None:
        """Send the write buffer, close_notify and FIN, then close."""
        self.write_eof()
        self.lower.close()

    def abort(self) -> None:
        """Close without sending the write buffer. Until `connection_lost` writes do nothing."""
        self._write_ended = True  # after a broken record OpenSSL would refuse them
        self.lower.abort()

    # -- the handshake ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compute a client's first message, which `handshake` sends later; nothing is sent now.

        Generating the key pair takes time. Call this while waiting for the peer's answer to
        SSLRequest.
        """
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()

    async def handshake(self, first: bytes = b"") -> None:
        """Run the handshake; `first` are bytes of it that were read already.

        Raises ssl.SSLError, or ConnectionError if the peer ends. The caller bounds its time.
        """
        self._incoming.write(first)
        self.lower.set_protocol(self)
        self._handshake = asyncio.get_running_loop().create_future()
        try:
            self._advance_handshake()
            await self._handshake
        finally:
            self._handshake = None

    def _advance_handshake(self) -> None:
        assert self._handshake is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._flush()  # the alert that tells the peer why
            self._handshake.set_exception(error)
        else:
            self._flush()
            self._receiving = True
            self._handshake.set_result(None)
            if self._incoming.pending:
                # The read contained data after the handshake: deliver it once the waiter has run.
                asyncio.get_running_loop().call_soon(self._deliver, [])

    # -- the protocol, for the plain transport ---------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Process ciphertext."""
        size = len(data)
        if size > _RECORD_BYTES_MAX or not self._receiving:
            self._receive(data)
            return
        # Nearly every answer to a query is one record in one read. A record is longer than its
        # plaintext, so a piece as long as the read cannot be everything.
        feed, decrypt, data_received = self._feed, self._decrypt, self._data_received
        feed(data)
        try:
            piece = decrypt(size)
        except ssl.SSLError as error:
            self._deliver([], error)
            return
        if not piece or len(piece) == size or self._incoming.pending or self._outgoing.pending:
            self._deliver([piece])
        else:
            data_received(piece)

    def eof_received(self) -> bool:
        """Process the peer's FIN as the end of the stream, even without a close_notify before it.

        A stream without close_notify may be truncated. Postgres messages carry their length, so the
        reader of the messages detects that.
        """
        self._fail_handshake(ConnectionResetError("the peer ended during the TLS handshake"))
        self._end_reading()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Process the end of the plain transport."""
        self._write_ended = True
        self._fail_handshake(exc or ConnectionResetError("lost during the TLS handshake"))
        self._app.connection_lost(exc)

    def take_back(self, error: ssl.SSLError | None) -> None:
        """Continue to read the connection after a lane has read it through `compiled`.

        `error` is the error that ended the lane's reading: the end of TLS or a failure of it.
        """
        self._deliver([], error)

    # -- inside ----------------------------------------------------------------------------------

    def _receive(self, data: bytes) -> None:
        """Process ciphertext that belongs to the handshake, or is more than one record."""
        if not self._receiving:
            if self._handshake is not None and not self._handshake.done():
                self.asked_curve = self.asked_curve or asked_curve(data)
                self._incoming.write(data)
                self._advance_handshake()
            return  # after a close_notify: it would stay in OpenSSL's buffer unread
        view = memoryview(data)
        for start in range(0, len(data), _PART_BYTES_MAX):
            self._incoming.write(view[start : start + _PART_BYTES_MAX])
            self._deliver([])
            if self._peer_ended:
                return

    def _deliver(self, pieces: list[bytes], stop: ssl.SSLError | None = None) -> None:
        """Decrypt all whole records that follow these pieces, and deliver everything.

        `stop` is the error that decrypting a record raised; an empty piece is the end.
        """
        tls, incoming = self._tls, self._incoming
        ended = pieces == [b""]
        try:
            if stop is not None:
                raise stop
            # Checking first is cheaper than the exception for "nothing to read". The buffer is no
            # larger than what there can be, so a small answer does not cost a large buffer.
            while not ended and (waiting := incoming.pending + tls.pending()):
                pieces.append(tls.read(min(waiting + _READ_BYTES_MIN, _RECORD_BYTES_MAX)))
                ended = not pieces[-1]
        except ssl.SSLWantReadError:
            pass  # the rest of the record has not arrived yet
        except ssl.SSLZeroReturnError:
            ended = True  # close_notify, as OpenSSL reports it after ours was sent
        except ssl.SSLError:
            self.abort()  # a forged or broken record: nothing after it can be trusted
        finally:
            del stop  # its traceback refers to this frame, which would keep the protocol above
        if self._outgoing.pending:  # an answer to a key update
            self._flush()
            if self.lower.get_write_buffer_size() > _UNREAD_BYTES_MAX:
                self.abort()  # the peer sends many and does not read the answers
        if plain := pieces[0] if len(pieces) == 1 else b"".join(pieces):
            self._app.data_received(plain)
        if ended:
            self._end_reading()

    def _end_reading(self) -> None:
        if self._peer_ended:
            return
        self._peer_ended = True
        self._receiving = False
        if not self._app.eof_received():
            self.close()

    def _fail_handshake(self, error: Exception) -> None:
        if self._handshake is not None and not self._handshake.done():
            self._handshake.set_exception(error)

    def _flush(self) -> None:
        if self._outgoing.pending and not self.lower.is_closing():
            self.lower.write(self._outgoing.read())
