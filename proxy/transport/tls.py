"""TLS over a plain transport: a transport to the protocol above, a protocol to the one below.

Why not the event loop's own TLS: it drops what it has decrypted but not delivered when the peer's
FIN arrives while reading is paused (so a slow client would lose the upstream's last words, W34),
and it cannot send close_notify and go on reading.

Here every decrypted byte is delivered at once, and pausing stops the plain transport below: what
is not delivered is not read, so order and end are those of the wire.
"""

import asyncio
import ssl
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Final, cast

from proxy import native
from proxy.file_stamp import Stamp, stamp_of
from proxy.transport.key_exchange import asked_curve

if TYPE_CHECKING:  # not there where it was not built
    from proxy.native.tls import ClientContext, TLSConnection

# The most plaintext that a record holds (RFC 8446): a read of so much always takes a whole one.
_RECORD_BYTES_MAX: Final = 16 * 1024
_READ_BYTES_MIN: Final = 256  # part of a record may be inside OpenSSL already, and not counted
# OpenSSL's memory buffers never shrink, so a session would keep the size of its largest read for
# life. What is larger than this goes through them in parts.
_PART_BYTES_MAX: Final = 32 * 1024
# What TLS itself may have waiting to be sent, beside the data of the protocol above.
_UNREAD_BYTES_MAX: Final = 1024 * 1024
_CONTEXTS_MAX: Final = 64  # of sslmode, authorities and curve; the least used is made anew


# What a client that begins with TLS must offer (PostgreSQL 17): else any TLS client could be led to
# this port (the ALPACA attack).
ALPN_PROTOCOL: Final = "postgresql"


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """Return the context for clients. Raises OSError (ssl.SSLError too) for unusable files."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([ALPN_PROTOCOL])
    return context


def client_context(
    sslmode: str, ssl_root_cert: str, curve: str | None = None, *, accelerated: bool = False
) -> "ssl.SSLContext | ClientContext":
    """Return the context for an upstream: `verify-full` checks chain and name.

    With a curve, that one alone is offered for the key exchange (Python cannot give two).
    `accelerated` asks for the compiled relay's, which is made after Python's where that was built.
    It is kept for all who ask alike (reading the system's certificates takes tens of milliseconds)
    until the file changes: an authority that was replaced counts from the next connection on.
    Raises OSError (ssl.SSLError too) for an unusable file.
    """
    make = _compiled_context if accelerated and native.AVAILABLE else _client_context
    if ssl_root_cert == "system":
        return make(sslmode, curve, None, None)
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
    """One TLS connection. Make it, then await `handshake`; the app protocol is the upper one.

    `asked_curve` is what a server asked for during the handshake, beside what was offered first.
    """

    __slots__ = (
        "_app",
        "_decrypt",
        "_encrypt",
        "_encrypted",
        "_feed",
        "_hand_up",
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
        """Raises ValueError for a name that no certificate can have."""
        super().__init__()
        self.lower = lower
        self.asked_curve: str | None = None
        self.compiled: TLSConnection | None = None
        """The TLS itself, if it is the compiled one."""
        if isinstance(context, ssl.SSLContext):
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side, server_hostname
            )
        else:
            self.compiled = compiled = native.tls.TLSConnection(context, server_hostname)
            # The same by its methods: what is below serves both.
            self._incoming = cast(ssl.MemoryBIO, native.tls.Incoming(compiled))
            self._outgoing = cast(ssl.MemoryBIO, native.tls.Outgoing(compiled))
            self._tls = cast(ssl.SSLObject, compiled)
        # What each read and write needs, looked up once.
        self._feed = self._incoming.write
        self._decrypt = self._tls.read
        self._encrypt = self._tls.write
        self._encrypted = self._outgoing.read
        self._send = lower.write
        self._receiving = False  # from the handshake's end to that of the peer's stream
        self._handshake: asyncio.Future[None] | None = None  # while somebody waits for it
        self._peer_ended = False
        self._write_ended = False
        self.set_protocol(app)

    # -- the transport that the protocol above sees ----------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Deliver to this protocol from here on."""
        self._app = cast(asyncio.Protocol, protocol)
        self._hand_up = self._app.data_received
        # Flow control is the plain transport's: its buffer is the only one.
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol above."""
        return self._app

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Return `ssl_object`, or what the plain transport says."""
        return self._tls if name == "ssl_object" else self.lower.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. After `write_eof` or the connection's loss, do nothing."""
        if self._write_ended:
            return
        if len(data) <= _RECORD_BYTES_MAX:
            # Names of their own: Python 3.11 is slow to call what an attribute holds.
            encrypt, encrypted, send = self._encrypt, self._encrypted, self._send
            encrypt(data)
            send(encrypted())
            return
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest[:_PART_BYTES_MAX]) :]
            self.lower.write(self._outgoing.read())

    def can_write_eof(self) -> bool:
        """TLS 1.3 closes each direction alone; so does this, whatever the version."""
        return True

    def write_eof(self) -> None:
        """Send close_notify, then FIN. What the peer still sends is still delivered."""
        if self._write_ended or self.lower.is_closing():
            return
        self._write_ended = True
        with suppress(ssl.SSLError):  # it only says that the peer's own has not come yet
            self._tls.unwrap()
        self._flush()
        if self._peer_ended:
            self.lower.close()  # both directions have ended: nothing is left to wait for
        else:
            self.lower.write_eof()

    def get_write_buffer_size(self) -> int:
        """Return the bytes not yet given to the kernel."""
        return self.lower.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set when the protocol above is told to pause and to resume writing."""
        self.lower.set_write_buffer_limits(high, low)

    def pause_reading(self) -> None:
        """Stop reading below: nothing is delivered after the present read."""
        self.lower.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self.lower.resume_reading()

    def is_closing(self) -> bool:
        """Whether the plain transport is."""
        return self.lower.is_closing()

    def close(self) -> None:
        """Send what is written, close_notify and FIN, and close."""
        self.write_eof()
        self.lower.close()

    def abort(self) -> None:
        """Close at once."""
        self.lower.abort()

    # -- the handshake ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compute a client's first message, which `handshake` then sends: it takes a key pair.

        For the time in which the peer's leave to begin is awaited. Nothing is sent.
        """
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()

    async def handshake(self, first: bytes = b"") -> None:
        """Run the handshake; `first` are bytes of it that were read already.

        Raises ssl.SSLError, or ConnectionError when the peer ends. Its bound is the caller's.
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
                # Data in the same read as the handshake's end: after the waiter has run.
                asyncio.get_running_loop().call_soon(self._deliver, [])

    # -- the protocol that the plain transport sees ----------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take ciphertext."""
        size = len(data)
        if size > _RECORD_BYTES_MAX or not self._receiving:
            self._receive(data)
            return
        # Nearly every answer to a query is one record that comes in one read. A record is longer
        # than what it holds, so that a piece as long as the read is not the whole of it.
        feed, decrypt, hand_up = self._feed, self._decrypt, self._hand_up
        feed(data)
        try:
            piece = decrypt(size)
        except ssl.SSLError as error:
            self._deliver([], error)
            return
        if not piece or len(piece) == size or self._incoming.pending or self._outgoing.pending:
            self._deliver([piece])
        else:
            hand_up(piece)

    def eof_received(self) -> bool:
        """Take the peer's FIN. Without a close_notify before it, the stream may be cut: still EOF.

        Postgres has lengths in its messages, so whoever reads them sees a cut.
        """
        self._fail_handshake(ConnectionResetError("the peer ended during the TLS handshake"))
        self._end_reading()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the plain transport."""
        self._write_ended = True
        self._fail_handshake(exc or ConnectionResetError("lost during the TLS handshake"))
        self._app.connection_lost(exc)

    def take_back(self, error: ssl.SSLError | None) -> None:
        """Go on with the connection after somebody else has read it, by way of `compiled`.

        `error` is what reading ended with, if that was TLS's own end or a failure of it.
        """
        self._deliver([], error)

    # -- inside ----------------------------------------------------------------------------------

    def _receive(self, data: bytes) -> None:
        """Take ciphertext that belongs to the handshake, or is more than a record."""
        if not self._receiving:
            if self._handshake is not None and not self._handshake.done():
                self.asked_curve = self.asked_curve or asked_curve(data)
                self._incoming.write(data)
                self._advance_handshake()
            return  # behind a close_notify: nobody would ever take it out of OpenSSL again
        view = memoryview(data)
        for start in range(0, len(data), _PART_BYTES_MAX):
            self._incoming.write(view[start : start + _PART_BYTES_MAX])
            self._deliver([])
            if self._peer_ended:
                return

    def _deliver(self, pieces: list[bytes], stop: ssl.SSLError | None = None) -> None:
        """Decrypt all whole records behind these pieces, and hand them up.

        `stop` is what kept one from being read; an empty piece is the end.
        """
        tls, incoming = self._tls, self._incoming
        ended = pieces == [b""]
        try:
            if stop is not None:
                raise stop
            # Asking first is cheaper than the exception that says there is nothing.
            # Room for what there can be, no more: a small answer shall not cost a large buffer.
            while not ended and (waiting := incoming.pending + tls.pending()):
                pieces.append(tls.read(min(waiting + _READ_BYTES_MIN, _RECORD_BYTES_MAX)))
                ended = not pieces[-1]
        except ssl.SSLWantReadError:
            pass  # the rest of a record is on its way
        except ssl.SSLZeroReturnError:
            ended = True  # close_notify, as OpenSSL says it when ours is out already
        except ssl.SSLError:
            self.lower.abort()  # a forged or broken record: nothing behind it can be believed
        if self._outgoing.pending:  # an answer to a key update
            self._flush()
            if self.lower.get_write_buffer_size() > _UNREAD_BYTES_MAX:
                self.lower.abort()  # a flood of them from a peer that reads no answer
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
