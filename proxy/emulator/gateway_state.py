"""The state that all connections of one gateway share: settings, cancel keys and records.

It does not know the protocol. Every change wakes the tests that wait in `until`.
"""

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from proxy.emulator.certificates import Certificate, Certificates
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.faults import FaultList, Injection, Stage
from proxy.emulator.streams import EndedBy
from proxy.emulator.tokens import TokenIssuer
from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret

# From accept to the StartupMessage, in Lakebase's front end.
STARTUP_SECONDS_MAX: Final = 15.0
# How long the front end waits after its last message for the client to close.
CLOSE_DELAY_SECONDS: Final = 1.0
# How many records of the newest connections are kept: more than a load test reads.
RECORDS_MAX: Final = 20_000
UNTIL_SECONDS_MAX: Final = 10.0


@dataclass(slots=True, eq=False)
class Record:
    """What the gateway recorded of one accepted connection."""

    secure: bool = False
    sni: str | None = None
    endpoint: Endpoint | None = None
    parameters: tuple[tuple[bytes, bytes], ...] = ()  # of the StartupMessage, as received
    token: str | None = None  # its fingerprint
    identity: str | None = None  # the token's identity
    refusal: str | None = None  # the text of the error that ended the login
    issued_key: BackendKeyData | None = None  # the key that was sent to the client
    real_pid: int | None = None  # of the Postgres backend
    cancel: bool = False  # it sent a CancelRequest
    cancel_known: bool = False  # the CancelRequest's key is that of a session
    cancel_late: bool = False  # it was delivered after `cancel_delay_seconds`
    ready: bool = False  # ReadyForQuery was sent
    closed: bool = False
    ended_by: EndedBy | None = None  # how the client ended its stream; None: the gateway ended

    def parameter(self, name: bytes) -> bytes | None:
        """Return a startup parameter's last value, or None."""
        return dict(self.parameters).get(name)


@dataclass(frozen=True, slots=True)
class BackendSession:
    """The backend of a cancel key: the Postgres socket and the key that Postgres issued."""

    socket_path: str
    key: BackendKeyData


class GatewayState:
    """The shared state of a gateway; its attributes may change at any time."""

    def __init__(
        self, endpoints: Iterable[Endpoint], certificates: Certificates, issuer: TokenIssuer
    ) -> None:
        self.endpoints = list(endpoints)
        self.certificates = certificates
        self.issuer = issuer

        self.startup_seconds_max = STARTUP_SECONDS_MAX
        self.close_delay_seconds = CLOSE_DELAY_SECONDS
        # How long after its connection was closed a CancelRequest is delivered.
        self.cancel_delay_seconds = 0.0
        self.certificate = Certificate.GOOD
        self.offers_tls = True  # False: N in answer to SSLRequest
        self.early_bytes = b""  # sent in plaintext after S
        self.faults: FaultList[tuple[Stage, str | None], Injection | bytes] = FaultList()
        self.released = asyncio.Event()

        self.accepted = 0
        self.logins: Counter[str] = Counter()  # that reached ReadyForQuery, by role
        self.records: deque[Record] = deque(maxlen=RECORDS_MAX)
        self.keys: dict[tuple[int, bytes], BackendSession] = {}
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def open_sessions(self) -> int:
        """The number of sessions that are past ReadyForQuery and not closed."""
        return sum(len(endpoint.sessions) for endpoint in self.endpoints)

    @property
    def sessions(self) -> list[Record]:
        """The records of connections that reached ReadyForQuery, oldest first."""
        return [record for record in self.records if record.ready]

    @property
    def cancels(self) -> list[Record]:
        """The records of connections that sent a CancelRequest, oldest first."""
        return [record for record in self.records if record.cancel]

    def inject(
        self,
        stage: Stage,
        injection: Injection | bytes,
        *,
        times: int | None = None,
        endpoint: Endpoint | None = None,
    ) -> None:
        """Inject a fault at a stage, into all connections or those of one endpoint.

        A connection's endpoint is known from Stage.STARTUP on.
        """
        self.faults.add((stage, endpoint.name if endpoint else None), injection, times)

    def clear_faults(self) -> None:
        """Remove all faults; connections that hang continue."""
        self.faults.clear()
        self.released.set()
        self.released = asyncio.Event()

    async def until(
        self, happened: Callable[[], bool], seconds_max: float = UNTIL_SECONDS_MAX
    ) -> None:
        """Wait until `happened` returns true; it is called after each change.

        Raises TimeoutError after `seconds_max`.
        """
        async with asyncio.timeout(seconds_max):
            while not happened():
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                await waiter

    def changed(self) -> None:
        """Wake the callers that wait in `until`."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def issue_key(self, session: BackendSession, *, real: bool) -> BackendKeyData:
        """Return the cancel key to send to the client: the session's own, or 64 random bits."""
        issued = session.key
        while not real:
            pid = int.from_bytes(secrets.token_bytes(4), "big", signed=True)
            issued = BackendKeyData(pid, Secret(secrets.token_bytes(4)))
            if (pid, issued.key.reveal()) not in self.keys:
                break
        self.keys[issued.pid, issued.key.reveal()] = session
        return issued
