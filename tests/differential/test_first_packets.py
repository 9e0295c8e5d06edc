"""A connection's first packets, direct and through the proxy: versions, lengths, requests.

The reference is a PostgreSQL that speaks protocol 3.2, as the proxy does to its clients; so not even
the versions in its answers may differ."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

import pytest
import pytest_asyncio

from proxy.emulator.cluster import Cluster, running
from proxy.wire.secret import Secret
from proxy.wire.startup import CancelRequest, GSSENCRequest, ProtocolVersion, SSLRequest
from tests.differential.comparison import difference
from tests.differential.conftest import DirectAndProxied, in_front_of
from tests.differential.exchange_client import Transcript
from tests.differential.frontend import (
    LEAVING,
    OPENING,
    Exchange,
    Steps,
    Text,
    ask,
    encoded,
    in_three_ways,
    say,
    startup,
    until_end,
)
from tests.support.cuts import Cut
from tests.support.script import ReadBytes, Send

pytestmark = pytest.mark.asyncio(loop_scope="module")

_SSL: Final = SSLRequest().encode()
_GSSENC: Final = GSSENCRequest().encode()
_PAD: Final = b"_pq_.pad"  # never sent on, so that a packet may be long without another cause


def _version(major: int, minor: int, *pairs: tuple[Text, Text]) -> Exchange:
    """Return a session that asks for this version, or what becomes of it."""
    names = " ".join(encoded(name).decode() for name, _ in pairs)
    content = startup(*pairs, version=ProtocolVersion(major, minor))
    return Exchange(
        f"version {major}.{minor} {names}".strip(), (say(content), ask("SELECT 1"), LEAVING)
    )


def _length(length: int, sent: bytes = b"\0\3\0\0user\0x\0\0") -> Exchange:
    """Return a packet that claims a length; a shorter one follows it, so as to end a wait."""
    return Exchange(f"length {length}", (until_end(length.to_bytes(4, "big"), sent),))


def padded(length: int) -> bytes:
    """Return a good StartupMessage of exactly so many bytes."""
    missing = length - len(startup((_PAD, "")))
    return startup((_PAD, b"x" * missing))


def _bare(name: str, *content: bytes, answers: int) -> Exchange:
    """Return requests for encryption and what follows, sent one after the other's answer."""
    *asked, last = content
    steps = tuple(_encryption(one) for one in asked[:answers])
    rest = tuple(say(one) for one in (*asked[answers:], last))
    return Exchange(name, steps, rest, ask("SELECT 1"), LEAVING)


def _encryption(request: bytes) -> Steps:
    """Return the steps that ask for encryption; one byte answers."""
    return (Send(request), ReadBytes(1))


def _cancel(key: bytes, pid: int = 0x7FFFFFFF) -> bytes:
    return CancelRequest(pid, Secret(key)).encode()


# Never spoken by anything, but a PostgreSQL that knows 3.2 takes it for one of its own (W11).
NEVER_SPOKEN: Final = (
    _version(3, 1),
    _version(3, 1, ("_pq_.foo", "")),
)

VERSIONS: Final = (
    _version(3, 0),
    _version(3, 0, ("_pq_.foo", "")),
    _version(3, 0, ("_pq_.foo", "1"), ("_pq_.bar", "2")),
    _version(3, 0, ("_pq_.foo", "1"), ("_pq_.foo", "2")),
    _version(3, 0, ("_pq_.", "x")),
    _version(3, 0, ("_PQ_.foo", "x")),
    _version(3, 0, ("_pq_", "x")),
    _version(3, 2),
    _version(3, 2, ("_pq_.foo", "")),
    _version(3, 2, ("TimeZone", "Asia/Tokyo")),
    _version(3, 3),
    _version(3, 3, ("_pq_.foo", "x"), ("_pq_.bar", "")),
    _version(3, 9999),
    _version(3, 9999, ("_pq_.test_protocol_negotiation", "")),
    _version(3, 65535),
    _version(3, 9999, ("no_such", "x")),
    _version(2, 0),
    _version(2, 1),
    _version(1, 0),
    _version(0, 0),
    _version(4, 0),
    _version(4, 2, ("_pq_.foo", "")),
    _version(1234, 0),
    _version(1234, 5681),
    _version(1234, 65535),
    _version(65535, 65535),
    Exchange("version 3.9999 without a user", (until_end(startup(version=ProtocolVersion(3, 9999), identity=())),)),
    Exchange("version 3.9999 with a bad layout", (until_end(b"\0\0\0\x0d\0\3\x27\x0fuser\0"),)),
    Exchange("version 3.9999 with bad replication", (until_end(startup(("replication", "maybe"), version=ProtocolVersion(3, 9999))),)),
    Exchange("version 2.0 without a body", (until_end(b"\0\0\0\x08\0\2\0\0"),)),
    Exchange("version 4.0 without a body", (until_end(b"\0\0\0\x08\0\4\0\0"),)),
)  # fmt: skip

LENGTHS: Final = (
    *(_length(n) for n in (0, 1, 4, 5, 7, 10_005, 20_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
    _length(8, b"\0\3\0\0"),
    _length(9, b"\0\3\0\0\0"),
    Exchange("length 9999", (say(padded(9999)), ask("SELECT 1"), LEAVING)),
    Exchange("length 10000", (say(padded(10_000)), ask("SELECT 1"), LEAVING)),
    Exchange("an HTTP request", (until_end(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),)),
    Exchange("a ClientHello", (until_end(b"\x16\3\1\2\0\1\0\1\xfc\3\3" + bytes(200)),)),
    Exchange("a SOCKS greeting", (until_end(b"\5\1\0" + bytes(20)),)),
    Exchange("an SSH banner", (until_end(b"SSH-2.0-client\r\n"),)),
    Exchange("four NULs", (until_end(bytes(4)),)),
)  # fmt: skip

REQUESTS: Final = (
    _bare("SSLRequest", _SSL, startup(), answers=1),
    _bare("GSSENCRequest", _GSSENC, startup(), answers=1),
    _bare("SSLRequest, GSSENCRequest", _SSL, _GSSENC, startup(), answers=2),
    _bare("GSSENCRequest, SSLRequest", _GSSENC, _SSL, startup(), answers=2),
    _bare("SSLRequest twice", _SSL, _SSL, answers=1),
    _bare("GSSENCRequest twice", _GSSENC, _GSSENC, answers=1),
    _bare("SSLRequest, GSSENCRequest, SSLRequest", _SSL, _GSSENC, _SSL, answers=2),
    _bare("GSSENCRequest, SSLRequest, GSSENCRequest", _GSSENC, _SSL, _GSSENC, answers=2),
    _bare("SSLRequest and a wrong version", _SSL, startup(version=ProtocolVersion(4, 0)), answers=1),
    _bare("SSLRequest and 3.9999", _SSL, startup(version=ProtocolVersion(3, 9999)), answers=1),
    _bare("SSLRequest and no user", _SSL, startup(identity=()), answers=1),
    Exchange("SSLRequest and a bad length", (_encryption(_SSL), until_end(b"\0\0\0\7aaa"))),
    Exchange("SSLRequest and a cancel", (_encryption(_SSL), until_end(_cancel(b"none")))),
    Exchange("GSSENCRequest and a cancel", (_encryption(_GSSENC), until_end(_cancel(b"none")))),
    Exchange("a cancel with an unknown key", (until_end(_cancel(b"none")),)),
    Exchange("a cancel with an unknown long key", (until_end(_cancel(b"n" * 32)),)),
    Exchange("a cancel with the longest key", (until_end(_cancel(b"n" * 256)),)),
    Exchange("a cancel with a key too long", (until_end(_cancel(b"n" * 257)),)),
    Exchange("a cancel with a key too short", (until_end(_cancel(b"nop")),)),
    Exchange("a cancel without a key", (until_end(_cancel(b"")),)),
    Exchange("a cancel with a NUL after it", (until_end(_cancel(b"none"), b"\0"),)),
    Exchange("a cancel for pid 0", (until_end(_cancel(b"none", 0)),)),
    Exchange("a cancel for a negative pid", (until_end(_cancel(b"none", -1)),)),
)  # fmt: skip

EXCHANGES: Final = (*VERSIONS, *LENGTHS, *REQUESTS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def newest(no_own_account: None) -> AsyncIterator[DirectAndProxied]:
    """Return the newest PostgreSQL that there is, without and with a proxy."""
    cluster = Cluster("newest", version=18)
    async with running([cluster]), in_front_of({cluster.shard: cluster}) as both:
        yield both


@in_three_ways(*EXCHANGES)
async def test_first_packets_are_answered_as_by_postgres(
    exchange: Exchange, cut: Cut, newest: DirectAndProxied
) -> None:
    await newest.compare(exchange, cut)


@pytest.mark.parametrize("length", [10_001, 10_004])
async def test_w4_lengths_a_little_over_are_taken_by_postgres_alone(
    length: int, newest: DirectAndProxied
) -> None:
    exchange = Exchange("a little over", (say(padded(length)), LEAVING))
    (direct,), (proxied,) = await newest.direct(exchange), await newest.proxied(exchange)
    assert direct.frames[-1].type == b"Z"
    assert proxied == Transcript(ended=True)


async def test_w3_what_comes_with_a_refused_request_is_taken_by_the_proxy_alone(
    newest: DirectAndProxied,
) -> None:
    sent = _encryption(_SSL + startup())
    asked = Exchange("asked", (sent, say(wait=b"Z"), LEAVING))
    (direct,), (proxied,) = await newest.direct(asked), await newest.proxied(asked)
    assert direct.bare == proxied.bare == b"N"
    assert [frame.type for frame in direct.frames] == [b"E"]
    assert b"received unencrypted data after SSL request" in direct.frames[0].payload
    not_asked = await newest.proxied(Exchange("not asked", (OPENING, LEAVING)))
    assert difference(not_asked, (replace(proxied, bare=b""),)) == ""


@pytest.mark.parametrize("exchange", NEVER_SPOKEN, ids=str)
async def test_w11_version_3_1_is_answered_as_by_a_postgres_of_3_0(
    exchange: Exchange, both: DirectAndProxied
) -> None:
    await both.compare(exchange)


async def test_w10_major_0_gets_the_old_error_from_postgres_alone(newest: DirectAndProxied) -> None:
    # PostgreSQL uses the old form for every version below 3.0 but 0.0; W10 names majors 1 and 2.
    exchange = Exchange("0.3", (until_end(startup(version=ProtocolVersion(0, 3))),))
    (direct,), (proxied,) = await newest.direct(exchange), await newest.proxied(exchange)
    text = b"unsupported frontend protocol 0.3: server supports 3.0 to 3.2"
    assert direct.rest == b"EFATAL:  " + text + b"\n\0"
    assert b"M" + text + b"\0" in proxied.frames[0].payload
