"""An upstream of which a test writes every byte, and which keeps every byte that it is sent.

For: what no honest server says, and what exactly the proxy says to one. It does the honest part of
a login by itself (SSLRequest, TLS, StartupMessage, the question for a token) and tells sessions
from cancel requests, which a `ScriptedServer` does not.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from proxy.emulator.certificates import Certificate
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    BackendKeyData,
    ReadyForQuery,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import SSLRequest
from tests.support.peer import Peer
from tests.support.peer_server import PeerServer, password_in, serving
from tests.support.script import (
    Close,
    ExpectMessage,
    ExpectPacket,
    Send,
    StartTLS,
    play,
)

KEY: Final = BackendKeyData(4711, Secret(b"key1"))
READY: Final = ReadyForQuery(b"I").encode()
WELCOME: Final = AuthenticationOk().encode() + KEY.encode() + READY
_CANCEL_CODE: Final = bytes.fromhex("04d2162e")


class ManualSession:
    """One login. `received` is what followed the token; a test may send on `peer`."""

    def __init__(self, peer: Peer, startup: bytes, token: bytes) -> None:
        self.peer = peer
        self.startup = startup
        self.token = token
        self.received = bytearray()
        self.ended = False

    @property
    def ended_by(self) -> EndedBy | None:
        """The kind of end that the proxy made."""
        return self.peer.ended_by


class ManualUpstream(PeerServer):
    """Made by `manual_upstream`."""

    def __init__(self, context: ssl.SSLContext, welcome: bytes, question: bytes) -> None:
        super().__init__()
        self.sessions: list[ManualSession] = []
        self.cancels: list[bytes] = []
        self.first_bytes: list[bytes] = []  # what each connection began with, before its answer
        self.server_names: list[str | None] = []  # the SNI of each TLS handshake
        self._context = context
        self._welcome = welcome
        self._question = question
        context.sni_callback = lambda _, name, __: self.server_names.append(name)

    async def session(self, number: int = 0) -> ManualSession:
        """Return a session once its login is over."""
        await self.until(lambda: len(self.sessions) > number)
        return self.sessions[number]

    async def converse(self, peer: Peer) -> None:
        """Do the honest part of a login; then keep what is sent, up to its end."""
        self.first_bytes.append(await peer.receive(None))
        assert self.first_bytes[-1] == SSLRequest().encode()
        packet = (await play(peer, Send(b"S"), StartTLS(self._context), ExpectPacket())).packets[0]
        if packet[4:8] == _CANCEL_CODE:
            self.cancels.append(packet)
            await self.tell()
            await play(peer, Close())
            return
        login = await play(peer, Send(self._question), ExpectMessage(b"p"), Send(self._welcome))
        session = ManualSession(peer, packet, password_in(login.packets[0]))
        self.sessions.append(session)
        await self.tell()
        try:
            while received := await peer.receive(None):
                session.received += received
                await self.tell()
        finally:
            session.ended = True
            await self.tell()


@asynccontextmanager
async def manual_upstream(
    lakebase: Lakebase,
    welcome: bytes = WELCOME,
    question: bytes = AuthenticationCleartextPassword().encode(),
) -> AsyncIterator[ManualUpstream]:
    """Serve with the emulator's certificate while the block runs."""
    context = lakebase.gateway.certificates.context(Certificate.GOOD)
    async with serving(ManualUpstream(context, welcome, question)) as upstream:
        yield upstream
