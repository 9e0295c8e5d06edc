"""One gateway connection from accept to close: first packets, login, relay, end.

The first packets are read in `first_packet`, the decisions of a login are in `login`, what follows
ReadyForQuery is in `session`, the shared state in `gateway_state`. A fault can be injected at every
stage.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from struct import Struct
from typing import Any, Final, TypeVar

from proxy.emulator import login
from proxy.emulator.backend import (
    MESSAGE_BYTES_MAX,
    Backend,
    BackendGone,
    connected,
    deliver_cancel,
    role_exists,
)
from proxy.emulator.cluster import ClusterError
from proxy.emulator.endpoints import Endpoint, neon_error
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.first_packet import first_packet
from proxy.emulator.gateway_state import BackendSession, GatewayState, Record
from proxy.emulator.login import LoginRefused
from proxy.emulator.scram import MECHANISM, ScramRefused, ScramServer
from proxy.emulator.session import Session
from proxy.emulator.streams import Stream, StreamEnded
from proxy.emulator.tokens import fingerprint
from proxy.wire import messages
from proxy.wire.messages import ErrorResponse, Frame
from proxy.wire.startup import V3_0, CancelRequest, StartupMessage

SASL_FAILURES_MAX: Final = 5  # after these, a pooled host refuses logins
_FRAME: Final = Struct("!cI")

_T = TypeVar("_T")


class _FaultInjected(Exception):
    """An injected fault ends the connection, in the way that `injection` says."""

    def __init__(self, injection: Injection) -> None:
        super().__init__(injection.name)
        self.injection = injection


class Connection:
    """One accepted connection; `run` it once."""

    def __init__(self, gateway: GatewayState, stream: Stream, record: Record) -> None:
        self._gateway = gateway
        self._stream = stream
        self._record = record
        self._watched = False  # `_while_connected` reads the client's stream

    async def run(self) -> None:
        """Serve the connection until it ends, for any reason."""
        try:
            # A client may disconnect at any moment, also while it is told why it is refused.
            with contextlib.suppress(StreamEnded):
                await self._serve_and_finish()
        except asyncio.CancelledError:
            self._stream.reset()  # the gateway stops
            raise
        finally:
            await self._stream.release()
            self._record.ended_by = self._stream.ended_by
            self._record.closed = True
            self._gateway.changed()

    async def _serve_and_finish(self) -> None:
        try:
            await self._serve()
        except LoginRefused as refused:
            self._record.refusal = refused.error.message
            self._gateway.changed()
            await self._stream.write(refused.error.encode())
            # Lakebase's front end sends nothing more, and gives the client a moment to close first.
            await self._stream.linger(self._gateway.close_delay_seconds)
            await self._stream.finish(0)
        except _FaultInjected as fault:
            await self._finish(fault.injection)
        except StreamEnded:
            await self._stream.finish(0)

    async def _serve(self) -> None:
        try:
            async with asyncio.timeout(self._gateway.startup_seconds_max):
                packet = await first_packet(self._gateway, self._stream, self._inject_fault)
        except TimeoutError:
            raise LoginRefused(ErrorResponse.fatal("08006", "Insecure connection.")) from None
        self._record.secure, self._record.sni = self._stream.secure, self._stream.sni
        if isinstance(packet, CancelRequest):
            await self._cancel(packet)
            return
        self._record.parameters = packet.parameters
        login.check_version(packet)
        endpoint, host_kind = login.find_endpoint(self._gateway.endpoints, self._stream.sni)
        self._record.endpoint = endpoint
        self._gateway.changed()
        await self._inject_fault(Stage.STARTUP)
        login.check_endpoint(endpoint, host_kind, packet)
        user = (packet.get(b"user") or b"").decode(errors="replace")
        try:
            pooled = "pooled" in host_kind
            await self._authenticate(endpoint, packet, user, pooled=pooled)
            parameters = login.backend_parameters(endpoint, packet, pooled=pooled)
            with login.slot(endpoint):
                how = await self._log_in(endpoint, parameters, user)
        except (BackendGone, ClusterError):
            raise LoginRefused(endpoint.waking_error()) from None
        await self._finish(how)

    async def _cancel(self, request: CancelRequest) -> None:
        """Deliver a cancel if its key is known, then close. There is no answer either way."""
        self._record.cancel = True
        named = self._stream.sni is not None or not self._stream.secure
        session = self._gateway.keys.get((request.pid, request.key.reveal())) if named else None
        self._record.cancel_known = session is not None
        self._gateway.changed()
        await self._inject_fault(Stage.CANCEL)
        late_seconds = self._gateway.cancel_delay_seconds
        if session is not None and not late_seconds:
            await deliver_cancel(session)
        await self._stream.finish(self._gateway.close_delay_seconds)
        if session is not None and late_seconds:
            await asyncio.sleep(late_seconds)
            await deliver_cancel(session)
            self._record.cancel_late = True

    # -- login ------------------------------------------------------------------------------------

    async def _authenticate(
        self, endpoint: Endpoint, startup: StartupMessage, user: str, *, pooled: bool
    ) -> None:
        if not endpoint.admits_connect():
            raise LoginRefused(neon_error("Too many connections attempts"))
        if pooled:
            login.check_pooled(startup)
        is_native = endpoint.native_login and user in endpoint.native_passwords
        if pooled and endpoint.pooler_takes_tokens:
            await self._pooler_login(endpoint, user)
        elif pooled or is_native:
            await self._password_login(endpoint, user, pooled=pooled)
        else:
            await self._token_login(endpoint, user)
        refusal = endpoint.refusals.take(None)
        if refusal is not None:
            raise LoginRefused(refusal)

    async def _clear_password(self) -> str:
        """Ask for a token or password in clear, and return it."""
        await self._stream.write(messages.AuthenticationCleartextPassword().encode())
        frame = await self._password_frame()
        secret = frame.payload.rstrip(b"\0")
        self._record.token = fingerprint(secret)
        self._gateway.changed()
        await self._inject_fault(Stage.PASSWORD)
        return secret.decode("utf-8", "replace")

    async def _pooler_login(self, endpoint: Endpoint, user: str) -> None:
        """Log in on a pooled host that asks both kinds of roles for the secret in clear."""
        password = endpoint.native_passwords.get(user)
        if password is None:
            await self._token_login(endpoint, user)
        elif await self._clear_password() != password:
            raise LoginRefused(ErrorResponse.fatal("08P01", "SASL authentication failed"))

    async def _token_login(self, endpoint: Endpoint, user: str) -> None:
        text = await self._clear_password()
        claims = login.check_token(endpoint, self._gateway.issuer, text, user)
        self._record.identity = claims.identity
        if not login.may_use_role(endpoint, claims, user):
            if not await role_exists(endpoint.cluster.socket_path, user):
                raise LoginRefused(login.password_error(endpoint, user))
            raise LoginRefused(login.identity_error(endpoint, claims, user))

    async def _password_login(self, endpoint: Endpoint, user: str, *, pooled: bool) -> None:
        """Log in with SCRAM-SHA-256, the only method of pooled hosts and native roles."""
        if pooled and endpoint.sasl_failures >= SASL_FAILURES_MAX:
            raise LoginRefused(neon_error("Too many connections attempts"))
        await self._stream.write(messages.AuthenticationSASL((MECHANISM.encode(),)).encode())
        initial = (await self._password_frame()).payload
        await self._inject_fault(Stage.PASSWORD)
        password = endpoint.native_passwords.get(user)
        try:
            if password is None:
                raise ScramRefused("no such role")
            server = ScramServer(password)
            _, _, response = initial.partition(b"\0")
            first = server.first(response[4:].decode()).encode()  # after its length
            await self._stream.write(messages.AuthenticationSASLContinue(first).encode())
            proof = (await self._password_frame()).payload.decode()
            final = messages.AuthenticationSASLFinal(server.final(proof).encode())
            await self._stream.write(final.encode())
        except (ScramRefused, UnicodeDecodeError):
            endpoint.sasl_failures += 1
            if pooled:
                raise LoginRefused(
                    ErrorResponse.fatal("08P01", "SASL authentication failed")
                ) from None
            raise LoginRefused(login.password_error(endpoint, user)) from None

    async def _password_frame(self) -> Frame:
        kind, length = _FRAME.unpack(await self._stream.read_exactly(_FRAME.size))
        if kind != b"p" or not 4 <= length <= MESSAGE_BYTES_MAX:
            raise LoginRefused(ErrorResponse.fatal("08P01", "expected password response"))
        return Frame(kind, await self._stream.read_exactly(length - 4))

    async def _log_in(
        self, endpoint: Endpoint, parameters: tuple[tuple[bytes, bytes], ...], user: str
    ) -> Injection:
        """Wake the compute, log in to Postgres, run the session. Return how to end."""
        await self._stream.write(messages.AuthenticationOk().encode())
        await self._inject_fault(Stage.AUTHENTICATED)
        if not await self._while_connected(endpoint.wake()):
            raise LoginRefused(endpoint.waking_error())
        async with connected(endpoint.cluster.socket_path) as backend:
            await backend.write(StartupMessage(V3_0, parameters).encode())
            session = Session(self._gateway, self._stream, self._record, endpoint, backend)
            try:
                await self._while_connected(self._backend_login(endpoint, user, backend, session))
                return await session.run(self._inject_fault)
            finally:
                session.unregister()

    async def _backend_login(
        self, endpoint: Endpoint, user: str, backend: Backend, session: Session
    ) -> None:
        """Relay Postgres' messages up to ReadyForQuery, with the key and the errors replaced."""
        while True:
            frame = await backend.message()
            message = messages.decode_backend(frame)
            match message:
                case messages.AuthenticationOk():
                    pass  # the gateway has sent its own
                case ErrorResponse():
                    raise LoginRefused(login.relayed_error(endpoint, user, message))
                case messages.BackendKeyData():
                    await self._stream.write(self._issue_key(endpoint, message).encode())
                case messages.ReadyForQuery():
                    await self._inject_fault(Stage.READY)
                    session.register()
                    await self._stream.write(frame.encode())
                    return
                case _:
                    await self._stream.write(frame.encode())

    def _issue_key(
        self, endpoint: Endpoint, real: messages.BackendKeyData
    ) -> messages.BackendKeyData:
        session = BackendSession(endpoint.cluster.socket_path, real)
        issued = self._gateway.issue_key(session, real=endpoint.passes_real_key)
        self._record.real_pid, self._record.issued_key = real.pid, issued
        return issued

    # -- faults and ends --------------------------------------------------------------------------

    async def _inject_fault(self, stage: Stage) -> None:
        """Apply the fault that is injected at this stage, if any."""
        faults, endpoint = self._gateway.faults, self._record.endpoint
        injection = faults.take((stage, None))
        if injection is None and endpoint is not None:
            injection = faults.take((stage, endpoint.name))
        if isinstance(injection, bytes):
            await self._stream.write(injection)
            raise _FaultInjected(Injection.CLOSE)
        if injection is Injection.HANG:
            await self._while_connected(self._gateway.released.wait())
        elif injection is not None:
            raise _FaultInjected(injection)

    async def _while_connected(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await `work`. Raises StreamEnded as soon as the client ends the connection."""
        if self._watched:
            return await work
        self._watched = True
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._stream.wait_for_end())
        try:
            await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise StreamEnded
            return working.result()
        finally:
            for part in (working, gone):
                part.cancel()
            await asyncio.wait((working, gone))
            self._watched = False

    async def _finish(self, injection: Injection) -> None:
        match injection:
            case Injection.CLOSE:
                await self._stream.finish(self._gateway.close_delay_seconds)
            case Injection.HANG:  # as if the network were cut: nothing is sent, not even a FIN
                await self._stream.linger(None)
            case Injection.FIN:
                await self._stream.finish_bare(self._gateway.close_delay_seconds)
            case Injection.RESET:
                self._stream.reset()
