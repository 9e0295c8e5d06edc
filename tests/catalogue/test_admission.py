"""What a shard is asked for one session, and what each of its answers means."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from uuid import UUID

import pytest

from proxy.catalogue.admission import (
    CONSEQUENCES,
    TICKET_BYTES,
    Admission,
    AdmissionRequest,
    Consequence,
    Verdict,
    admit,
)
from proxy.catalogue.model import Located, Mapping, Shard
from proxy.errors import ErrorKind, ProxyError
from proxy.transport.stream import StartupStream
from proxy.wire.messages import ErrorResponse
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, StartupMessage
from proxy.wire.upstream_startup import UpstreamStartup
from tests.wire.driving import AUTHENTICATION_OK, READY_FOR_QUERY, message
from tests.wire.test_simple_query import COMPLETE, NOTICE, PARAMETER, row

MAP, SHARD, MAPPING = (UUID(int=number) for number in (1, 2, 3))
LOCATED = Located(
    Mapping(MAPPING, MAP, SHARD, b"\x80\0\0\1", None, epoch=7),
    Shard(SHARD, MAP, "eu", "db.example.com", 5432, "o'brien\\"),
)
REQUEST = AdmissionRequest(LOCATED, b"\x80\0\0\2'", "proxy-1/17")
SECRET = Secret(b"0123456789abcdef")
OK = row(b"ok", b"7", b"4711") + COMPLETE + READY_FOR_QUERY


class Peer:
    """The upstream's end of a connection, after the login."""

    def __init__(self, sock: socket.socket, stream: StartupStream) -> None:
        self._socket = sock
        self.stream = stream

    async def query(self) -> bytes:
        """Return the next Query message's text."""
        loop = asyncio.get_running_loop()
        head = await loop.sock_recv(self._socket, 5)
        assert head[:1] == b"Q"
        size = int.from_bytes(head[1:], "big") - 4
        text = await loop.sock_recv(self._socket, size)
        assert text.endswith(b"\0")
        return text[:-1]

    async def answer(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def end(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)


@asynccontextmanager
async def logged_in(trailing: bytes = b"") -> AsyncIterator[Peer]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(StartupStream, sock=ours)
    startup = UpstreamStartup()
    startup.receive_data(b"S")
    startup.tls_started()
    startup.startup(StartupMessage(V3_0, ((b"user", b"ada"),)))
    startup.receive_data(AUTHENTICATION_OK + READY_FOR_QUERY + trailing)
    stream.unread(startup.trailing_data())
    try:
        yield Peer(theirs, stream)
    finally:
        stream.transport.abort()
        theirs.close()


async def answered(data: bytes, *, ends: bool = False, trailing: bytes = b"") -> Admission:
    async with asyncio.timeout(10), logged_in(trailing) as peer:
        asking = asyncio.ensure_future(admit(peer.stream, REQUEST))
        await peer.query()
        await peer.answer(data)
        if ends:
            peer.end()
        try:
            admission = await asking
        except ProxyError:
            assert peer.stream.transport.is_closing()
            raise
        assert not peer.stream.transport.is_closing()
        return admission


async def refusal(data: bytes, *, ends: bool = False) -> ProxyError:
    with pytest.raises(ProxyError) as refused:
        await answered(data, ends=ends)
    return refused.value


def error(sqlstate: str, text: str = "told") -> bytes:
    fields = ((b"S", b"ERROR"), (b"V", b"ERROR"), (b"C", sqlstate.encode()), (b"M", text.encode()))
    return ErrorResponse(fields).encode()


def failed(sqlstate: str) -> bytes:
    return error(sqlstate) + message(b"Z", b"E")


# -- the query -----------------------------------------------------------------------------------


def test_query_is_one_transaction_that_no_default_of_the_client_changes() -> None:
    sql = REQUEST.sql(SECRET).decode("ascii")
    begin, synchronous, select, commit = sql.split("; ")
    assert begin == "begin isolation level read committed read write"
    assert synchronous == "set local synchronous_commit = off"
    assert select.startswith("select verdict, current_epoch, pid from shardmap_local.admit(1::")
    assert commit == "commit"


def test_values_are_hex_digits_in_the_query() -> None:
    sql = REQUEST.sql(SECRET).decode("ascii")
    literals = re.findall("'([^']*)'", sql)
    hexed = [MAP, SHARD, b"o'brien\\".hex()]
    assert sql.count("'") == 2 * len(literals)
    assert str(hexed[0]) in literals
    assert b"db.example.com:5432/o'brien\\".hex() in literals
    assert REQUEST.routing_key.hex() in literals
    assert all(re.fullmatch("[0-9a-f-]*|hex|UTF8", literal) for literal in literals)


def test_shard_gets_the_hash_of_the_next_secret_only() -> None:
    sql = REQUEST.sql(SECRET).decode("ascii")
    assert SECRET.reveal().hex() not in sql
    assert sha256(SECRET.reveal()).hexdigest() in sql
    assert ", null, " in sql


def test_next_take_shows_the_secret_of_the_one_before() -> None:
    sql = replace(REQUEST, secret=SECRET).sql(Secret(b"another-secret--")).decode("ascii")
    assert SECRET.reveal().hex() in sql
    assert ", null, " not in sql


# -- verdicts ------------------------------------------------------------------------------------


async def test_ok_has_the_shards_epoch_and_the_backends_pid() -> None:
    admission = await answered(OK)
    assert (admission.verdict, admission.epoch, admission.pid) == (Verdict.OK, 7, 4711)
    assert admission.consequence is Consequence.SERVE
    assert len(admission.secret) == TICKET_BYTES


async def test_each_admission_has_a_secret_of_its_own() -> None:
    assert (await answered(OK)).secret != (await answered(OK)).secret


@pytest.mark.parametrize("verdict", list(Verdict)[1:9])
async def test_words_of_the_shard_are_verdicts(verdict: Verdict) -> None:
    answer = row(verdict.encode(), None, b"4711") + COMPLETE + READY_FOR_QUERY
    admission = await answered(answer)
    assert (admission.verdict, admission.epoch) == (verdict, None)


@pytest.mark.parametrize(
    ("sqlstate", "verdict"),
    [
        ("55P03", Verdict.FENCED),
        ("3F000", Verdict.SHARD_NOT_VALID),
        ("42883", Verdict.SHARD_NOT_VALID),
        ("42P01", Verdict.SHARD_NOT_VALID),
        ("25006", Verdict.SHARD_NOT_VALID),
        ("42501", Verdict.VALIDATE_DENIED),
    ],
)
async def test_errors_that_are_verdicts(sqlstate: str, verdict: Verdict) -> None:
    admission = await answered(failed(sqlstate))
    assert (admission.verdict, admission.pid) == (verdict, 0)
    assert admission.detail == f"{sqlstate}: told"


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "57014", "57P01", "57P03", "08006"])
async def test_transient_error_is_a_lost_upstream(sqlstate: str) -> None:
    error = await refusal(failed(sqlstate))
    assert error.kind is ErrorKind.UPSTREAM_LOST
    assert error.original is None


async def test_last_words_of_an_upstream_are_its_answer() -> None:
    assert (await refusal(error("57P01"), ends=True)).kind is ErrorKind.UPSTREAM_LOST
    assert (await answered(error("55P03"), ends=True)).verdict is Verdict.FENCED


async def test_any_other_error_is_passed_on() -> None:
    error = await refusal(failed("53100"))
    assert error.kind is ErrorKind.STARTUP_REFUSED
    assert error.response().sqlstate == "53100"


async def test_lost_connection_is_a_lost_upstream() -> None:
    assert (await refusal(row(b"ok", b"7", b"1"), ends=True)).kind is ErrorKind.UPSTREAM_LOST


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        row(b"ok", b"7", b"4711") * 2,
        row(b"ok", b"7"),
        row(b"fine", b"7", b"4711"),
        row(None, b"7", b"4711"),
        row(b"fenced", b"7", b"4711"),
        row(b"ok", b"seven", b"4711"),
        row(b"ok", b"7", None),
        row(b"\xff", b"7", b"4711"),
    ],
    ids=range(9),
)
async def test_answer_that_is_no_verdict_is_a_violation(answer: bytes) -> None:
    error = await refusal(answer + READY_FOR_QUERY)
    assert error.kind is ErrorKind.UPSTREAM_PROTOCOL


async def test_verdict_within_a_transaction_is_a_violation() -> None:
    error = await refusal(row(b"ok", b"7", b"4711") + message(b"Z", b"T"))
    assert error.kind is ErrorKind.UPSTREAM_PROTOCOL


async def test_message_that_is_not_allowed_is_a_violation() -> None:
    assert (await refusal(message(b"G", b"\0\0\0"))).kind is ErrorKind.UPSTREAM_PROTOCOL


async def test_cancelled_admission_closes_the_connection() -> None:
    async with logged_in() as peer:
        asking = asyncio.ensure_future(admit(peer.stream, REQUEST))
        await peer.query()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert peer.stream.transport.is_closing()


# -- what the client gets of it ------------------------------------------------------------------


async def test_p22_parameters_that_the_exchange_reports_reach_the_client_and_nothing_else() -> None:
    # They were dropped. A server says once that a default has changed while the session was idle in
    # a pool: neither this client nor the comparison after its reset would have heard of it.
    async with asyncio.timeout(10), logged_in(NOTICE + PARAMETER[:9]) as peer:
        asking = asyncio.ensure_future(admit(peer.stream, REQUEST))
        await peer.query()
        await peer.answer(PARAMETER[9:] + NOTICE + OK)
        await asking
        assert peer.stream.hand_over(asyncio.Protocol()) == PARAMETER


async def test_what_comes_after_the_answer_is_the_clients() -> None:
    async with asyncio.timeout(10), logged_in() as peer:
        asking = asyncio.ensure_future(admit(peer.stream, REQUEST))
        await peer.query()
        await peer.answer(OK + PARAMETER[:9])
        await asking
        assert peer.stream.hand_over(asyncio.Protocol()) == PARAMETER[:9]


# -- what the proxy makes of it ------------------------------------------------------------------


def test_every_verdict_has_a_consequence() -> None:
    assert set(CONSEQUENCES) == set(Verdict)


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict is not Verdict.OK])
def test_every_other_verdict_refuses_with_its_reason(verdict: Verdict) -> None:
    refusal = Admission(verdict, SECRET, detail="told").refusal("tenants/eu")
    sqlstate = refusal.response().sqlstate
    consequence = CONSEQUENCES[verdict]
    expected = "55000" if consequence is Consequence.REFUSE else "57P03"
    assert sqlstate == expected
    assert refusal.detail == f"tenants/eu: verdict={verdict} told"
    if consequence is Consequence.REFUSE:
        assert refusal.reason == verdict.value


def test_no_repr_shows_a_key_or_a_secret() -> None:
    request = replace(REQUEST, secret=SECRET)
    shown = repr(request) + repr(Admission(Verdict.OK, SECRET))
    assert repr(request.routing_key) not in shown
    assert "0123456789abcdef" not in shown
