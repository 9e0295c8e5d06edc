"""A dialer with tokens that are counted, toward the emulator's gateway or a scripted server.

For: tests of the dialer and of the connector below it. Not for: whole sessions (`running`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import (
    asynccontextmanager,
)
from typing import Any

import pytest
from aiohappyeyeballs import AddrInfoType

from proxy.config import CredentialsSettings, UpstreamSettings, WorkspaceSettings
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.lakebase import Lakebase
from proxy.errors import ProxyError
from proxy.observe.metrics import Metrics
from proxy.server.metric_labels import build_metrics
from proxy.upstream.address_lookup import AddressLookup, Target
from proxy.upstream.connector import Connector
from proxy.upstream.dialer import (
    CONNECTS_MAX,
    CredentialSource,
    Dialer,
)
from proxy.upstream.login import ANSWER_SECONDS_MAX
from proxy.upstream.name_lookup import NameLookup
from proxy.upstream.phases import ConnectPhase
from proxy.upstream.upstream_session import UpstreamSession
from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    BackendKeyData,
    Frame,
    NoticeResponse,
    ParameterStatus,
    ReadyForQuery,
    decode_backend,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, StartupMessage
from proxy.workspace.client import Workspace
from proxy.workspace.credential import Credential
from proxy.workspace.single_flight import PendingCalls
from proxy.workspace.token_source import LocalTokenSource
from tests.support.fake_clock import FakeClock
from tests.support.peer_server import ScriptedServer, scripted
from tests.support.script import Step

WAIT_SECONDS_MAX = 8.0
HOST = "db.example.com"
TOKEN = b"eyJ-not-a-real-token"
CLIENT = StartupMessage(V3_0, ((b"user", b"app"), (b"application_name", b"test")))


class Counted:
    """A source of credentials that counts; `tokens` are minted in turn, the last one for ever."""

    def __init__(self, *tokens: bytes) -> None:
        self.minted = 0
        self._tokens = tokens

    async def __call__(self) -> Credential:
        self.minted += 1
        token = self._tokens[min(self.minted, len(self._tokens)) - 1]
        now = CLOCK()
        return Credential(Secret(token), now, now + 3600)


CLOCK = FakeClock()


class Dialing:
    """A dialer and what belongs to it."""

    def __init__(
        self,
        credentials: CredentialSource,
        targets: AddressLookup,
        seconds: float,
        clock: Callable[[], float] = CLOCK,
        *,
        connects_max: int = CONNECTS_MAX,
        retry_seconds: float = 0.3,
        silence_seconds_max: float = ANSWER_SECONDS_MAX,
        calls: PendingCalls | None = None,
    ) -> None:
        self.metrics: Metrics = build_metrics()
        self._names = NameLookup(calls or PendingCalls())
        self.connector = Connector(self._resolve, tls_seconds_max=silence_seconds_max)
        self.addresses: Sequence[AddrInfoType] = ()  # what the resolver says, if not the truth
        self.resolving_seconds = 0.0  # how long it takes, by the clock
        self.dialer = Dialer(
            self.connector,
            targets,
            credentials,
            self._record_phase,
            connect_timeout_seconds=seconds,
            connect_retry_seconds=retry_seconds,
            connects_max=connects_max,
            answer_seconds_max=silence_seconds_max,
            jitter=lambda: 0.05,
            clock=clock,
        )

    def _record_phase(self, phase: ConnectPhase | None, seconds: float) -> None:
        if phase is not None:
            self.metrics.connect_phase_took(phase, seconds)

    async def _resolve(self, target: Target) -> Sequence[AddrInfoType]:
        CLOCK.move(self.resolving_seconds)
        return self.addresses or await self._names.resolve(target)

    async def dial(self, client: StartupMessage = CLIENT) -> UpstreamSession:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return await self.dialer.dial(client)

    async def refusal(self) -> ProxyError:
        with pytest.raises(ProxyError) as refused:
            await self.dial()
        return refused.value


@asynccontextmanager
async def dialing(
    mint: Callable[[], Any],
    *,
    seconds: float = 5,
    max_age: float = 60,
    connects_max: int = CONNECTS_MAX,
    retry_seconds: float = 0.3,
    silence_seconds_max: float = ANSWER_SECONDS_MAX,
    **upstream: Any,
) -> AsyncIterator[Dialing]:
    workspace = Workspace(WorkspaceSettings(), CredentialsSettings(), version="0")
    settings = CredentialsSettings(token_max_age_seconds=max_age)
    calls = PendingCalls()
    credentials = LocalTokenSource(
        mint, settings, build_metrics(), calls, clock=CLOCK, sleep=CLOCK.sleep
    )
    targets = AddressLookup(UpstreamSettings(**upstream), None, workspace, calls)
    try:
        yield Dialing(
            credentials,
            targets,
            seconds,
            calls=calls,
            connects_max=connects_max,
            retry_seconds=retry_seconds,
            silence_seconds_max=silence_seconds_max,
        )
    finally:
        await calls.close()


def toward(lakebase: Lakebase, endpoint: Endpoint) -> dict[str, Any]:
    """Return the settings that lead to an endpoint."""
    return {
        "host": endpoint.host,
        "hostaddr": lakebase.host_address,
        "port": lakebase.port,
        "user": lakebase.client_id,
        "ssl_root_cert": str(lakebase.ca_file),
    }


@asynccontextmanager
async def lakebase_dialing(
    lakebase: Lakebase, endpoint: Endpoint, *tokens: str, **options: Any
) -> AsyncIterator[Dialing]:
    mint = Counted(*(token.encode() for token in tokens or (lakebase.token(),)))
    async with dialing(mint, **{**toward(lakebase, endpoint), **options}) as made:
        yield made


async def all_closed(lakebase: Lakebase) -> None:
    await lakebase.gateway.until(lambda: all(record.closed for record in lakebase.gateway.records))
    assert lakebase.gateway.open_sessions == 0


async def messages_until(session: UpstreamSession, kind: type) -> list[object]:
    """Read from a session that is ready."""
    reader = MessageReader(1 << 20)
    reader.feed(session.startup.trailing_data())
    messages: list[object] = []
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not messages or not isinstance(messages[-1], kind):
            while (frame := reader.next()) is None:
                data = await session.stream.receive()
                assert data, f"ended after {messages}"
                reader.feed(data)
            messages.append(decode_backend(frame))
    return messages


def query(sql: str) -> bytes:
    return Frame(b"Q", sql.encode() + b"\0").encode()


async def asked(session: UpstreamSession, sql: str) -> bytes:
    """Return the one value of the one row."""
    session.stream.write(query(sql))
    messages = await messages_until(session, ReadyForQuery)
    (row,) = [m for m in messages if isinstance(m, Frame) and m.type == b"D"]
    return row.payload[6:]


OK = AuthenticationOk().encode()
ASK = AuthenticationCleartextPassword().encode()
KEY = BackendKeyData(77, Secret(b"none")).encode()
READY = ReadyForQuery(b"I").encode()
STATUS = ParameterStatus(b"server_version", b"17.0").encode()
NOTICE = NoticeResponse(((b"S", b"NOTICE"), (b"C", b"00000"), (b"M", b"hello"))).encode()
HONEST = OK + STATUS + KEY + NOTICE + READY


@asynccontextmanager
async def dialing_script(
    ca_file: str, *steps: Step, **options: Any
) -> AsyncIterator[tuple[Dialing, ScriptedServer]]:
    async with scripted(*steps) as server:
        upstream = {
            "host": HOST,
            "hostaddr": "127.0.0.1",
            "port": server.port,
            "user": "app",
            "ssl_root_cert": ca_file,
        }
        async with dialing(Counted(TOKEN), **{**upstream, **options}) as made:
            yield made, server


def fields(*pairs: bytes) -> bytes:
    return Frame(b"E", b"".join(pair + b"\0" for pair in pairs)).encode()
