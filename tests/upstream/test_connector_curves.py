"""The connector offers an upstream the curve that it asked for before, and recovers if it changes.

The server counts ClientHellos: one if it accepts the key share, two if it asks for another group.
PostgreSQL up to 17 accepts prime256v1 only.
"""

import asyncio
import ssl

import pytest
import trustme

from proxy.errors import ErrorKind
from tests.support.dialing import HONEST, HOST, Dialing, dialing_script
from tests.support.peer_server import ScriptedServer, tls_opening
from tests.support.script import Send


class Server:
    """A scripted server whose certificate and curve can change."""

    def __init__(self, authority: trustme.CA) -> None:
        self.hellos = 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.set_ecdh_curve("prime256v1")
        self.context.sni_callback = self._count
        self.use_certificate_of(authority)
        self.steps = (*tls_opening(self.context), Send(HONEST))

    def use_certificate_of(self, authority: trustme.CA) -> None:
        """Use a certificate of this authority from the next connection on."""
        authority.issue_cert(HOST).configure_cert(self.context)

    async def hellos_of_a_dial(self, made: Dialing) -> int:
        """Open and close a session; return how many ClientHellos it took."""
        before = self.hellos
        (await made.dial()).stream.transport.abort()
        return self.hellos - before

    def _count(self, tls: object, name: str | None, context: ssl.SSLContext) -> None:
        self.hellos += 1


@pytest.fixture
def postgres(authority: trustme.CA) -> Server:
    return Server(authority)


@pytest.mark.parametrize("sslmode", ["verify-full", "require"])
async def test_a_curve_that_was_asked_for_is_offered_first_from_then_on(
    ca_file: str, postgres: Server, sslmode: str
) -> None:
    async with dialing_script(ca_file, *postgres.steps, sslmode=sslmode) as (made, _):
        assert [await postgres.hellos_of_a_dial(made) for _ in range(3)] == [2, 1, 1]


async def test_simultaneous_connections_record_the_curve(ca_file: str, postgres: Server) -> None:
    async with dialing_script(ca_file, *postgres.steps) as (made, _):
        for session in await asyncio.gather(*(made.dial() for _ in range(5))):
            session.stream.transport.abort()
        assert await postgres.hellos_of_a_dial(made) == 1


async def test_an_upstream_that_refuses_its_former_curve_is_reached_in_the_same_dial(
    ca_file: str, postgres: Server
) -> None:
    async with dialing_script(ca_file, *postgres.steps) as (made, server):
        await postgres.hellos_of_a_dial(made)
        postgres.context.set_ecdh_curve("X25519")
        accepted = server.accepted
        assert await _connections(made, server, accepted) == 2  # refused, then OpenSSL's default
        assert await _connections(made, server, accepted + 2) == 1
        postgres.context.set_ecdh_curve("secp384r1")
        assert [await postgres.hellos_of_a_dial(made) for _ in range(2)] == [2, 1]


async def _connections(made: Dialing, server: ScriptedServer, accepted: int) -> int:
    (await made.dial()).stream.transport.abort()
    return server.accepted - accepted


async def test_no_curve_is_recorded_for_a_server_with_an_invalid_certificate(
    ca_file: str, postgres: Server, authority: trustme.CA
) -> None:
    postgres.use_certificate_of(trustme.CA())
    async with dialing_script(ca_file, *postgres.steps) as (made, _):
        for _ in range(2):
            assert (await made.refusal()).kind is ErrorKind.UPSTREAM_CERTIFICATE
        assert postgres.hellos == 4
        postgres.use_certificate_of(authority)
        assert [await postgres.hellos_of_a_dial(made) for _ in range(2)] == [2, 1]
