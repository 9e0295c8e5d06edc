"""A login to an upstream: from StartupMessage to ReadyForQuery on one connection.

PostgreSQL documentation, "Message Flow", "Start-up". For: sending the credential in the form that
the upstream asks for. Not for: connecting (`connector`), which credential it is, or whether a
failed login is tried again (`dialer`).
"""

import asyncio
from typing import Final

from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.address_lookup import LoginNames
from proxy.upstream.connector import Connection, next_events
from proxy.upstream.diagnosis import LoginAttempt, diagnose, diagnose_event
from proxy.upstream.phases import ConnectPhase, DialPhases
from proxy.upstream.scram import SCRAM_SHA_256, Scram
from proxy.wire.startup import StartupMessage
from proxy.wire.upstream_startup import (
    PasswordRequested,
    SASLContinued,
    SASLFinished,
    SASLRequested,
    UpstreamEvent,
    UpstreamReady,
    UpstreamRefused,
)
from proxy.workspace.credential import Credential

# A front end asks for the password without the database, which may be asleep. A database that wakes
# up is waited for after that, for as long as connect_timeout_seconds allows.
ANSWER_SECONDS_MAX: Final = 15.0


class Login:
    """One login on one connection."""

    def __init__(
        self,
        connection: Connection,
        names: LoginNames,
        credential: Credential,
        *,
        pooled: bool = False,
    ) -> None:
        """`pooled`: the host is a connection pooler's."""
        self._stream = connection.stream
        self._startup = connection.startup
        self._names = names
        self._credential = credential
        self._pooled = pooled
        self._scram: Scram | None = None

    async def run(
        self, message: StartupMessage, phases: DialPhases, answer_seconds_max: float
    ) -> None:
        """Log in; close the connection if that fails. Raises ProxyError."""
        try:
            phases.start(ConnectPhase.LOGIN)
            self._stream.write(self._startup.startup(message))
            phases.flush()
            await self._authenticate(answer_seconds_max)
            phases.finish()
        except BaseException:
            # Cancelled, timed out or refused: no session stays open upstream (W54).
            self._stream.transport.close()
            raise

    async def _authenticate(self, answer_seconds_max: float) -> None:
        events = await self._first_events(answer_seconds_max)
        while True:  # bounded by the machine, which lets a password be asked for once
            for event in events:
                if isinstance(event, UpstreamReady):
                    return
                self._stream.write(self._answer(event))
            events = await next_events(self._stream, self._startup)

    async def _first_events(self, seconds_max: float) -> list[UpstreamEvent]:
        try:
            async with asyncio.timeout(seconds_max):
                return await next_events(self._stream, self._startup)
        except TimeoutError as error:
            detail = f"no answer to the StartupMessage within {seconds_max:g} seconds"
            raise ProxyError(ErrorKind.UPSTREAM_TIMEOUT, detail) from error

    def _answer(self, event: UpstreamEvent) -> bytes:
        """Return what to send in answer to an event. Raises ProxyError for one that ends it."""
        match event:
            case PasswordRequested():
                return self._startup.password(self._credential.secret)
            case SASLRequested(mechanisms):
                if not self._credential.is_password:
                    raise self._refused_sasl()
                self._scram = Scram(mechanisms, self._credential.secret)
                first = self._scram.client_first()
                return self._startup.sasl_initial_response(SCRAM_SHA_256, first)
            case SASLContinued(data) if self._scram is not None:
                return self._startup.sasl_response(self._scram.client_final(data))
            case SASLFinished(data) if self._scram is not None:
                self._scram.verify_server(data)
                return b""
            case UpstreamRefused(error):
                raise diagnose(error, self._attempt())
            case _:
                raise diagnose_event(event)

    def _refused_sasl(self) -> ProxyError:
        """Return what it means that SASL is asked for, which takes no token."""
        if self._pooled:
            return ProxyError(ErrorKind.POOLER_NEEDS_PASSWORD, "it asks for SASL")
        return ProxyError(ErrorKind.UNSUPPORTED_AUTH, "SASL, which takes no token")

    def _attempt(self) -> LoginAttempt:
        return LoginAttempt(
            self._names.user.decode("utf-8", "replace"),
            self._names.database.decode("utf-8", "replace"),
            self._credential.secret,
            self._credential.is_password,
        )
