"""What an upstream's TLS may say, and may not: through a lane as through Python's TLS."""

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.session.end_reason import EndReason
from proxy.transport.tls import TLSTransport
from tests.native.records import (
    ALERT,
    CLOSE_NOTIFY,
    FATAL,
    HANDSHAKE,
    INTERNAL_ERROR,
    WARNING,
    Records,
    server_secret,
)
from tests.native.relayed import pythons, relayed
from tests.support.cuts import THREE_WAYS, Cut, whole
from tests.transport.peers import Contexts, resident_bytes, secured

MIB = 1024 * 1024
RECORD_BYTES_MAX = 16 * 1024
USER_CANCELED = b"\x5a"
END = b"the end"
CLOSED, LOST = EndReason.UPSTREAM_CLOSED, EndReason.UPSTREAM_LOST

Script = Callable[[Records], bytes]


@dataclass(frozen=True)
class Case:
    """What an upstream sends before its FIN, what the client gets, and why the session ends."""

    sends: Script
    received: bytes
    reason: EndReason


def several(records: Records, *contents: bytes) -> bytes:
    return b"".join(records.record(content) for content in contents)


CASES = {
    "records of all sizes": Case(
        lambda to: several(to, b"a", b"b" * RECORD_BYTES_MAX, b"c" * 100, END),
        b"a" + b"b" * RECORD_BYTES_MAX + b"c" * 100 + END,
        CLOSED,
    ),
    "some empty records": Case(
        lambda to: several(to, b"a", *[b""] * 20, b"b", *[b""] * 20, END), b"ab" + END, CLOSED
    ),
    "a flood of empty records": Case(lambda to: several(to, b"a", *[b""] * 1000, END), b"a", LOST),
    "a key update": Case(
        lambda to: to.record(b"a") + to.key_update(asks=False) + to.record(END),
        b"a" + END,
        CLOSED,
    ),
    "a key update that asks for ours": Case(
        lambda to: to.record(b"a") + to.key_update(asks=True) + to.record(END),
        b"a" + END,
        CLOSED,
    ),
    "a close_notify and data after it": Case(
        lambda to: to.record(b"a") + to.alert(WARNING, CLOSE_NOTIFY) + to.record(b"b"),
        b"a",
        CLOSED,
    ),
    "a FIN without close_notify": Case(lambda to: to.record(b"a"), b"a", CLOSED),
    "a FIN in a record": Case(lambda to: to.record(b"a") + to.record(b"b")[:-1], b"a", CLOSED),
    "a forged record": Case(
        lambda to: to.record(b"a") + to.forged(b"b") + to.record(b"c"), b"a", LOST
    ),
    "a fatal alert": Case(
        lambda to: to.record(b"a") + to.alert(FATAL, INTERNAL_ERROR) + to.record(b"b"), b"a", LOST
    ),
    "a warning": Case(
        lambda to: to.record(b"a") + to.alert(WARNING, USER_CANCELED) + to.record(END),
        b"a" + END,
        CLOSED,
    ),
    "half an alert": Case(lambda to: to.record(b"a") + to.record(b"\1", ALERT), b"a", LOST),
    "no known content": Case(lambda to: to.record(b"a") + to.record(b"b", 99), b"a", LOST),
    "no known handshake message": Case(
        lambda to: to.record(b"a") + to.record(b"\xfe\0\0\1x", HANDSHAKE), b"a", LOST
    ),
    "a record that is too large": Case(
        lambda to: to.record(b"a") + to.record(b"b" * (RECORD_BYTES_MAX + 1)), b"a", LOST
    ),
    "plaintext": Case(lambda to: to.record(b"a") + b"Z\0\0\0\5I" * 10, b"a", LOST),
}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@pytest.mark.parametrize("cut", THREE_WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_the_client_gets_what_is_whole_and_true(
    tls: Contexts, key_log: Path, case: Case, cut: Cut, compiled: bool
) -> None:
    async with relayed(laned=compiled, tls=tls if compiled else pythons(tls)) as setting:
        sent = case.sends(Records(server_secret(key_log)))
        with suppress(ConnectionError):  # the relay need not hear it out
            await setting.upstream.send_raw(sent, cut if len(sent) < RECORD_BYTES_MAX else whole)
            setting.upstream.end()
        assert await setting.client.receive_rest() == case.received
        setting.client.abort()
        assert (await setting.end()).reason is case.reason


async def test_key_updates_in_both_directions_keep_both_streams_whole(
    tls: Contexts, key_log: Path
) -> None:
    async with relayed(tls=tls) as setting:
        records = Records(server_secret(key_log))
        for number in range(50):
            there, back = b"%04d" % number * 5000, b"%04d" % number * 3000
            sent = records.record(back[:100]) + records.key_update(asks=True)
            await setting.upstream.send_raw(sent + records.record(back[100:]))
            await setting.client.send(there)
            assert await setting.upstream.receive_exactly(len(there)) == there
            assert await setting.client.receive_exactly(len(back)) == back


async def test_a_flood_of_key_updates_from_a_peer_that_reads_no_answer_ends_the_session(
    tls: Contexts, key_log: Path
) -> None:
    async with relayed(tls=tls, small=True) as setting:
        records = Records(server_secret(key_log))
        before = resident_bytes()
        with suppress(ConnectionError):
            async with asyncio.timeout(30):
                while not setting.running.done():
                    some = b"".join(records.key_update(asks=True) for _ in range(2000))
                    await setting.upstream.send_raw(some)
        setting.client.abort()
        assert (await setting.end()).reason is LOST
        assert resident_bytes() - before < 32 * MIB


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
async def test_what_follows_a_close_notify_is_not_kept(tls: Contexts, compiled: bool) -> None:
    # It was kept as ciphertext, as much of it as the peer sent.
    async with secured(tls if compiled else pythons(tls), server_side=False) as (stream, peer):
        transport = stream.transport
        assert isinstance(transport, TLSTransport)
        peer.send_close_notify()
        await stream.gone
        before = resident_bytes()
        async with asyncio.timeout(10):
            for _ in range(64):
                await peer.send_raw(bytes(MIB))
        assert resident_bytes() - before < 32 * MIB


async def test_an_error_that_another_left_with_openssl_is_not_the_streams(
    tls: Contexts, key_log: Path
) -> None:
    async with relayed(tls=tls) as setting:
        records = Records(server_secret(key_log))
        sent = records.record(b"back") + records.alert(WARNING, CLOSE_NOTIFY)
        setting.upstream.sock.sendall(sent)
        with pytest.raises(ValueError, match="unknown object"):
            ssl._ASN1Object("nonsense.bad")  # the one that leaves its error
        setting.lanes.run_ready()
        assert await setting.client.receive_rest() == b"back"
        setting.client.abort()
        assert (await setting.end()).reason is CLOSED
