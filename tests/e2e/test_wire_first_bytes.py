"""The first bytes of a connection, on a real socket, byte for byte (W1 to W23, W48, W49).

The machine below is tested in `wire/`; here it is what travels that counts: the exact reply,
whether the connection is closed or waits for more, and that nothing was dialled upstream. The proxy
has no certificate; with one it is `test_wire_listener_tls`.
"""

import asyncio
import struct

import pytest

from proxy.emulator.endpoints import Dialect
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.server.first_tokens import mint_first_tokens
from proxy.wire.startup import V3_0, ProtocolVersion, StartupMessage
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.running import LogLines, eventually

SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
GSSENC_REQUEST = bytes.fromhex("00000008 04d21630")
READY_IDLE = bytes.fromhex("5a 00000005 49")
AUTHENTICATION_OK = bytes.fromhex("52 00000008 00000000")
SERVED_3_0_TO_3_2 = "server supports 3.0 to 3.2"


def fatal(sqlstate: str, message: str, reason: str) -> bytes:
    """Return an ErrorResponse as it must look on the wire (W48)."""
    fields = f"SFATAL\0VFATAL\0C{sqlstate}\0M{message}\0Dreason={reason}\0\0".encode()
    return b"E" + struct.pack("!I", 4 + len(fields)) + fields


def packet(version: bytes, body: bytes) -> bytes:
    return struct.pack("!I", 8 + len(body)) + version + body


def negotiation(newest: str, *names: bytes) -> bytes:
    """Return NegotiateProtocolVersion with its version as hex."""
    body = (
        bytes.fromhex(newest) + struct.pack("!I", len(names)) + b"".join(n + b"\0" for n in names)
    )
    return b"v" + struct.pack("!I", 4 + len(body)) + body


async def replies(proxy: App, *portions: bytes) -> bytes:
    """Send the portions, each once the one before was taken, and return all up to the close."""
    async with plain_client(proxy) as client:
        for portion in portions:
            try:
                await client.send(portion)
            except (BrokenPipeError, ConnectionResetError):
                break  # it was closed on less
            await asyncio.sleep(0)
        return await client.receive_rest()


async def welcome(client: Client) -> bytes:
    """Return what comes up to an idle ReadyForQuery."""
    received = b""
    while not received.endswith(READY_IDLE):
        portion = await client.receive()
        assert portion, received
        received += portion
    return received


async def nothing_was_dialled(proxy: App, lakebase: Lakebase) -> None:
    await eventually(lambda: proxy.metrics.value("connections") == 0, "its connection is gone")
    assert lakebase.gateway.accepted == 0
    assert lakebase.workspace.mints == []


# -- framing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w1_who_leaves_without_a_byte_is_counted_apart_and_nothing_is_dialled(
    proxy: App, lakebase: Lakebase, log: LogLines, way: str
) -> None:
    async with plain_client(proxy) as client:
        getattr(client, way)()
        counted = {"reason": "probe"}
        await eventually(
            lambda: proxy.metrics.value("startup_failures_total", **counted) == 1, "it is counted"
        )
    await nothing_was_dialled(proxy, lakebase)
    assert {line["level"] for line in log.events("client left before its startup")} == {"debug"}
    assert log.above_info() == []


async def test_w2_one_byte_at_a_time_is_the_same_session(proxy: App) -> None:
    async with plain_client(proxy) as client:
        for number, byte in enumerate(SSL_REQUEST + startup(application_name="drip")):
            await client.send(bytes((byte,)))
            if number == len(SSL_REQUEST) - 1:
                assert await client.receive() == b"N"
            await asyncio.sleep(0)
        assert (await welcome(client)).startswith(AUTHENTICATION_OK)


async def test_w3_bytes_after_a_refused_ssl_request_are_the_next_packet(proxy: App) -> None:
    async with plain_client(proxy) as client:
        await client.send(SSL_REQUEST + GSSENC_REQUEST + startup() + query("SELECT 'after'"))
        received = await welcome(client)
        assert received.startswith(b"NN" + AUTHENTICATION_OK)
        if b"after" not in received:
            assert b"after" in await welcome(client)


@pytest.mark.parametrize(
    "length", ["00000000", "00000007", "00002711", "7fffffff", "80000000", "ffffffff"]
)
async def test_w4_a_length_out_of_bounds_is_closed_on_its_fourth_byte(
    proxy: App, lakebase: Lakebase, log: LogLines, length: str
) -> None:
    assert await replies(proxy, bytes.fromhex(length)) == b""
    (line,) = log.events("client refused")
    assert (line["level"], line["reason"], line["sqlstate"]) == ("debug", "startup_length", "08P01")
    await nothing_was_dialled(proxy, lakebase)


@pytest.mark.parametrize("length", [9_999, 10_000])
async def test_w4_the_longest_packets_are_read_and_judged(proxy: App, length: int) -> None:
    # Taken, that is: what is wrong with them is another matter.
    body = b"user\0anyone\0filler\0"
    body += b"x" * (length - 8 - len(body) - 2) + b"\0\0"
    sent = packet(b"\0\3\0\0", body)
    assert len(sent) == length
    assert b"C54000\0" in await replies(proxy, sent)


async def test_w4_the_shortest_packet_is_read_and_judged(proxy: App) -> None:
    message = "invalid startup packet layout: expected terminator as last byte"
    expected = fatal("08P01", message, "startup_layout")
    assert await replies(proxy, packet(b"\0\3\0\0", b"")) == expected


@pytest.mark.parametrize("first", [b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
async def test_w5_a_tls_hello_without_a_certificate_is_closed_on_its_first_byte(
    proxy: App, lakebase: Lakebase, first: bytes
) -> None:
    assert await replies(proxy, first) == b""
    assert proxy.metrics.value("startup_failures_total", reason="direct_tls") == 1
    await nothing_was_dialled(proxy, lakebase)


@pytest.mark.parametrize("line", [b"GET ", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST"])
async def test_w6_http_is_closed_without_a_word_and_named_in_the_log(
    proxy: App, lakebase: Lakebase, log: LogLines, line: bytes
) -> None:
    assert await replies(proxy, line) == b""
    (refused,) = log.events("client refused")
    assert (refused["reason"], refused["level"]) == ("http_request", "debug")
    await nothing_was_dialled(proxy, lakebase)


async def test_w7_ssl_request_is_answered_by_the_one_byte_n_and_the_packet_is_awaited(
    proxy: App,
) -> None:
    async with plain_client(proxy) as client:
        await client.send(SSL_REQUEST)
        assert await client.receive() == b"\x4e"
        with pytest.raises(TimeoutError):
            await client.receive(0.05)
        await client.send(startup())
        assert (await welcome(client)).startswith(AUTHENTICATION_OK)


@pytest.mark.parametrize(
    "requests",
    [(GSSENC_REQUEST,), (GSSENC_REQUEST, SSL_REQUEST), (SSL_REQUEST, GSSENC_REQUEST)],
    ids=["alone", "before SSLRequest", "after SSLRequest"],
)
async def test_w8_gssenc_request_is_answered_n_before_and_after_ssl_request(
    proxy: App, requests: tuple[bytes, ...]
) -> None:
    async with plain_client(proxy) as client:
        for request in requests:
            await client.send(request)
            assert await client.receive() == b"\x4e"
        await client.send(startup())
        assert (await welcome(client)).startswith(AUTHENTICATION_OK)


@pytest.mark.parametrize(
    ("portions", "answered", "version"),
    [
        ((bytes.fromhex("00000008 04d21631"),), b"", "1234.5681"),
        ((bytes.fromhex("00000008 04d2162d"),), b"", "1234.5677"),
        ((SSL_REQUEST, SSL_REQUEST), b"N", "1234.5679"),
        ((GSSENC_REQUEST, GSSENC_REQUEST), b"N", "1234.5680"),
        ((SSL_REQUEST, GSSENC_REQUEST, SSL_REQUEST), b"NN", "1234.5679"),
        ((GSSENC_REQUEST, SSL_REQUEST, GSSENC_REQUEST), b"NN", "1234.5680"),
    ],
)
async def test_w9_an_unknown_or_repeated_request_is_a_version_that_is_not_spoken(
    proxy: App, lakebase: Lakebase, portions: tuple[bytes, ...], answered: bytes, version: str
) -> None:
    message = f"unsupported frontend protocol {version}: {SERVED_3_0_TO_3_2}"
    expected = answered + fatal("0A000", message, "unsupported_protocol")
    assert await replies(proxy, *portions) == expected
    await nothing_was_dialled(proxy, lakebase)


@pytest.mark.parametrize(
    ("version", "shown"), [("00020000", "2.0"), ("00010000", "1.0"), ("00020003", "2.3")]
)
async def test_w10_the_old_majors_are_refused_in_the_old_form(
    proxy: App, version: str, shown: str
) -> None:
    text = f"unsupported frontend protocol {shown}: {SERVED_3_0_TO_3_2}"
    sent = packet(bytes.fromhex(version), b"anyone\0")
    assert await replies(proxy, sent) == b"EFATAL:  " + text.encode() + b"\n\0"


@pytest.mark.parametrize(("version", "shown"), [("00000000", "0.0"), ("00040000", "4.0")])
async def test_w10_other_majors_are_refused_by_an_error_response(
    proxy: App, version: str, shown: str
) -> None:
    message = f"unsupported frontend protocol {shown}: {SERVED_3_0_TO_3_2}"
    sent = packet(bytes.fromhex(version), b"user\0anyone\0\0")
    assert await replies(proxy, sent) == fatal("0A000", message, "unsupported_protocol")


# -- version negotiation ---------------------------------------------------------------------------

NEGOTIATIONS = [
    (3, 0, (), b""),
    (3, 0, (b"_pq_.foo",), negotiation("00030000", b"_pq_.foo")),
    (3, 1, (), negotiation("00030000")),
    (3, 2, (), b""),
    (3, 2, (b"_pq_.foo",), negotiation("00030002", b"_pq_.foo")),
    (3, 3, (), negotiation("00030002")),
    (3, 9999, (b"_pq_.b", b"_pq_.a"), negotiation("00030002", b"_pq_.b", b"_pq_.a")),
]


@pytest.mark.parametrize(("major", "minor", "options", "expected"), NEGOTIATIONS)
async def test_w11_the_version_is_negotiated_in_front_of_everything_else(
    proxy: App, major: int, minor: int, options: tuple[bytes, ...], expected: bytes
) -> None:
    pairs = ((b"user", b"anyone"), *((name, b"") for name in options))
    async with plain_client(proxy) as client:
        await client.send(StartupMessage(ProtocolVersion(major, minor), pairs).encode())
        assert (await welcome(client)).startswith(expected + AUTHENTICATION_OK)


async def test_w11_the_negotiation_does_not_wait_for_the_upstream(
    proxy: App, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds = 60
    async with plain_client(proxy) as client:
        await client.send(startup(ProtocolVersion(3, 1)))
        assert await client.receive() == bytes.fromhex("76 0000000c 00030000 00000000")


async def test_w12_grease_gets_its_44_bytes_and_a_session(proxy: App) -> None:
    sent = bytes.fromhex("00000037 0003270f") + b"user\0anyone\0"
    sent += b"_pq_.test_protocol_negotiation\0\0\0"
    sent = struct.pack("!I", len(sent)) + sent[4:]
    expected = bytes.fromhex("76 0000002b 00030002 00000001") + b"_pq_.test_protocol_negotiation\0"
    assert len(expected) == 44
    async with plain_client(proxy) as client:
        await client.send(sent)
        assert (await welcome(client)).startswith(expected + AUTHENTICATION_OK)


async def test_w13_protocol_options_are_listed_and_go_no_further(
    proxy: App, lakebase: Lakebase
) -> None:
    pairs = ((b"_pq_.one", b"1"), (b"user", b"anyone"), (b"_pq_.two", b"on"))
    async with plain_client(proxy) as client:
        await client.send(StartupMessage(V3_0, pairs).encode())
        received = await welcome(client)
    assert received.startswith(negotiation("00030000", b"_pq_.one", b"_pq_.two"))
    (record,) = lakebase.gateway.records
    assert not any(b"_pq_" in name + value for name, value in record.parameters)


async def test_w14_a_client_of_3_2_gets_the_upstreams_key_of_four_bytes(
    proxy: App, lakebase: Lakebase
) -> None:
    lakebase["one"].endpoint.passes_real_key = True
    async with plain_client(proxy) as client:
        await client.send(startup(ProtocolVersion(3, 2)))
        received = await welcome(client)
        shown = lakebase.gateway.sessions[-1].issued_key
        assert shown is not None
        assert received.endswith(shown.encode() + READY_IDLE)
        assert shown.encode().startswith(b"K\0\0\0\x0c")


# -- the StartupMessage's body ---------------------------------------------------------------------

BROKEN_LAYOUTS = [
    b"user\0anyone\0",  # no final NUL
    b"user\0anyone\0name\0",  # a name without a value
    b"user\0anyone\0\0behind\0",
    b"user\0anyone\0\0\0",
    b"\0user\0anyone\0\0",  # an empty name is the end
]


@pytest.mark.parametrize("body", BROKEN_LAYOUTS)
async def test_w15_a_broken_layout_is_told_in_postgresqls_words(proxy: App, body: bytes) -> None:
    message = "invalid startup packet layout: expected terminator as last byte"
    expected = fatal("08P01", message, "startup_layout")
    assert await replies(proxy, packet(b"\0\3\0\0", body)) == expected


async def test_w15_an_empty_last_value_is_legal(proxy: App) -> None:
    async with plain_client(proxy) as client:
        await client.send(packet(b"\0\3\0\0", b"user\0anyone\0application_name\0\0\0"))
        assert (await welcome(client)).startswith(AUTHENTICATION_OK)


@pytest.mark.parametrize("body", [b"\0", b"user\0\0\0", b"database\0x\0\0"])
async def test_w16_a_missing_user_is_told_in_postgresqls_words(proxy: App, body: bytes) -> None:
    message = "no PostgreSQL user name specified in startup packet"
    expected = fatal("28000", message, "user_missing")
    assert await replies(proxy, packet(b"\0\3\0\0", body)) == expected


@pytest.mark.parametrize("database", ["", "databricks_postgres"])
async def test_w16_an_empty_database_is_the_configured_one(
    proxy: App, lakebase: Lakebase, database: str
) -> None:
    async with plain_client(proxy) as client:
        await client.send(startup(database=database))
        await welcome(client)
    assert lakebase.gateway.sessions[0].parameter(b"database") == b"databricks_postgres"


async def test_w16_a_database_called_as_the_user_is_tried_once_then_the_configured_one(
    proxy: App, lakebase: Lakebase
) -> None:
    # Drivers send the user's name when no database is given, so it is not tried at each login.
    for _ in range(2):
        async with plain_client(proxy) as client:
            await client.send(startup(database="anyone"))
            await welcome(client)
    requested = [record.parameter(b"database") for record in lakebase.gateway.records]
    assert [database for database in requested if database] == [
        b"anyone",
        b"databricks_postgres",
        b"databricks_postgres",
    ]


async def test_w17_a_replication_value_that_postgresql_refuses_is_refused(proxy: App) -> None:
    message = 'invalid value for parameter "replication": "maybe"'
    expected = fatal("22023", message, "replication_value")
    assert await replies(proxy, startup(replication="maybe")) == expected


@pytest.mark.parametrize("value", ["database", "true", "ON", "1"])
async def test_w17_replication_connections_go_through(
    proxy: App, lakebase: Lakebase, value: str
) -> None:
    cluster = lakebase["one"].cluster
    role = f'"{lakebase.client_id}"'
    cluster.execute(f"ALTER ROLE {role} REPLICATION")
    try:
        async with plain_client(proxy) as client:
            await client.send(startup(replication=value, options="-c work_mem=5MB"))
            await welcome(client)
            await client.send(query("IDENTIFY_SYSTEM"))
            assert b"systemid" in await welcome(client)
    finally:
        cluster.execute(f"ALTER ROLE {role} NOREPLICATION")
    (record,) = lakebase.gateway.sessions
    assert record.parameter(b"replication") == value.encode()
    assert (record.parameter(b"options") or b"").endswith(b" -c work_mem=5MB")


async def shown(client: Client, setting: str) -> bytes:
    await client.send(query(f"SHOW {setting}"))
    answer = await welcome(client)
    row = answer[answer.index(b"D\0\0\0") :]
    (length,) = struct.unpack_from("!i", row, 7)
    return row[11 : 11 + length]


async def test_w18_startup_pairs_beat_options_whatever_their_order(
    proxy: App, lakebase: Lakebase
) -> None:
    pairs = ((b"user", b"anyone"), (b"work_mem", b"5MB"), (b"options", b"-c work_mem=6MB"))
    async with plain_client(proxy) as client:
        await client.send(StartupMessage(V3_0, pairs).encode())
        await welcome(client)
        assert await shown(client, "work_mem") == b"5MB"


async def test_w18_w19_of_a_repeated_setting_the_last_wins_whatever_its_case(proxy: App) -> None:
    pairs = ((b"user", b"x"), (b"TimeZone", b"UTC"), (b"TIMEZONE", b"Europe/Lisbon"))
    async with plain_client(proxy) as client:
        await client.send(StartupMessage(V3_0, pairs).encode())
        await welcome(client)
        assert await shown(client, "timezone") == b"Europe/Lisbon"


async def test_w20_a_bare_name_that_is_no_setting_is_the_upstreams_error(proxy: App) -> None:
    received = await replies(proxy, startup(shard_key="42"))
    assert b'unrecognized configuration parameter "shard_key"' in received
    async with plain_client(proxy) as client:  # a dotted one is a custom setting
        await client.send(startup(V3_0, **{"app.shard_key": "42"}))
        await welcome(client)
        assert await shown(client, "app.shard_key") == b"42"


VECTORS = [
    (b"  -c    datestyle=German,\\ YMD", "datestyle", b"German, YMD"),
    (b"-ctimezone=Europe/Lisbon  -cdatestyle=German,\\ YMD", "timezone", b"Europe/Lisbon"),
    (b"--timezone=Europe/Lisbon --datestyle=German,\\ YMD", "datestyle", b"German, YMD"),
    (b"-c t\\imezone=\\E\\u\\r\\o\\pe/Lisbon", "timezone", b"Europe/Lisbon"),
    (b"-c TimeZone=Etc/GMT+3", "timezone", b"Etc/GMT+3"),
    (b"-c\ttimezone=UTC\n-c\vdatestyle=ISO", "timezone", b"UTC"),
    (b"-c timezone=UTC\\", "timezone", b"UTC"),
    (b"-c a.b=c=d", "a.b", b"c=d"),
    (b"-c work-mem=5MB", "work_mem", b"5MB"),
]


@pytest.mark.parametrize(("options", "setting", "value"), VECTORS)
async def test_w21_options_mean_what_they_mean_to_postgresql(
    proxy: App, options: bytes, setting: str, value: bytes
) -> None:
    # With a startup pair, so that the words are not passed on untouched but are added to (W50).
    pairs = ((b"user", b"x"), (b"options", options), (b"statement_timeout", b"0"))
    async with plain_client(proxy) as client:
        await client.send(StartupMessage(V3_0, pairs).encode())
        await welcome(client)
        assert (await shown(client, setting)).replace(b"DMY", b"YMD") == value
        assert await shown(client, "statement_timeout") == b"0"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("-d", b"invalid command-line argument"),
        ("foo", b"invalid command-line argument"),
        ("-c timezone", b"-c timezone requires a value"),
        ("--timezone UTC", b"--timezone requires a value"),
    ],
)
async def test_w23_words_that_are_no_settings_are_the_upstreams_to_refuse(
    proxy: App, lakebase: Lakebase, options: str, text: bytes
) -> None:
    assert text in await replies(proxy, startup(options=options))
    sent = lakebase.gateway.records[0].parameter(b"options") or b""
    assert sent.endswith(f" {options}".encode())


VALUES = [
    b'"$user", "a\\b c"\t,pu\'blic',
    b'"My Schema", public',
    b"",
]


@pytest.mark.parametrize("value", VALUES)
async def test_w50_a_startup_pair_survives_a_front_end_that_drops_it(
    proxy: App, lakebase: Lakebase, value: bytes
) -> None:
    assert lakebase["one"].endpoint.dialect is Dialect.AUTOSCALING  # which drops unknown pairs
    pairs = ((b"user", b"x"), (b"search_path", value), (b"options", b"-c work_mem=5MB\\"))
    async with plain_client(proxy) as client:
        await client.send(StartupMessage(V3_0, pairs).encode())
        await welcome(client)
        assert await shown(client, "search_path") == value
        assert await shown(client, "work_mem") == b"5MB"
    names = [name for name, _ in lakebase.gateway.sessions[0].parameters]
    assert set(names) <= {b"user", b"database", b"application_name", b"replication", b"options"}


async def test_w51_a_startup_that_folding_makes_too_long_is_refused_and_not_sent(
    proxy: App, lakebase: Lakebase
) -> None:
    received = await replies(proxy, startup(search_path="a b" * 3000))
    message = "startup packet too long for the upstream"
    assert received == fatal("54000", message, "startup_too_long")
    assert not lakebase.gateway.records


async def test_w48_every_error_before_ready_is_whole_and_the_last_thing_said(
    proxy: App, lakebase: Lakebase
) -> None:
    await lakebase.gateway.refuse_connections()
    received = await replies(proxy, startup() + query("SELECT 1"))
    kind, length = struct.unpack_from("!cI", received)
    assert (kind, length + 1) == (b"E", len(received))
    assert received.startswith(b"SFATAL\0VFATAL\0C57P03\0M", 5)
    assert b"\0Dreason=upstream_unreachable" in received
    assert received.endswith(b"\0\0")


@pytest.mark.parametrize(
    "portions", [(), (b"\0\0\0",), (SSL_REQUEST,), (SSL_REQUEST, GSSENC_REQUEST, b"\0\0\0\x20")]
)
async def test_w49_a_startup_that_takes_too_long_is_closed_without_a_reply(
    start_proxy: StartProxy, lakebase: Lakebase, portions: tuple[bytes, ...]
) -> None:
    proxy = await start_proxy(listen={"startup_timeout_seconds": 0.15})
    assert (await replies(proxy, *portions)).replace(b"N", b"") == b""
    assert proxy.metrics.value("startup_failures_total", reason="startup_timeout") == 1
    await nothing_was_dialled(proxy, lakebase)


async def test_w49_a_byte_now_and_then_does_not_stretch_the_startup_timeout(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(listen={"startup_timeout_seconds": 0.3})
    loop = asyncio.get_running_loop()
    async with plain_client(proxy) as client:
        began = loop.time()
        receiving = asyncio.create_task(client.receive_rest())
        for byte in startup(application_name="x" * 1000):
            if receiving.done():
                break
            await client.send(bytes((byte,)))
            await asyncio.wait((receiving,), timeout=0.02)
        assert await receiving == b""
        assert loop.time() - began < 3


async def test_w49_waking_runs_on_the_other_clock_and_says_57p03(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    limits = {"connect_timeout_seconds": 0.5}
    proxy = await start_proxy(listen={"startup_timeout_seconds": 0.1}, upstream=limits)
    await mint_first_tokens(proxy)
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 30, 0.05
    received = await replies(proxy, startup())
    assert b"C57P03\0" in received
    assert b"Dreason=upstream_starting" in received
