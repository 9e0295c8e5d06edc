"""A client leaves, and the relay keeps its upstream for the next one: P12 to P17.

Each case runs with protocols and with lanes, and with a plain and an encrypted upstream: the same
verdict, and the same bytes upstream.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import pytest

from proxy import native
from proxy.pool.pool_counts import RetireReason
from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.idle_end import IdleEnd
from proxy.session.relay import Relay
from proxy.wire.messages import ErrorResponse
from tests.native.relayed import Relayed, pythons, relayed
from tests.support.compiled import need_compiled
from tests.support.loops import LOOPS, NewLoop, run
from tests.support.peer import WAIT_SECONDS_MAX, Peer, tcp_pair
from tests.support.running import eventually
from tests.transport.peers import Contexts, Notes, contexts
from tests.wire.driving import TERMINATE, message

QUERY: Final = message(b"Q", b"SELECT 1\0")
SYNC: Final = message(b"S")
DATA: Final = message(b"d", b"1\n" + TERMINATE)
DONE: Final = message(b"c")
GO_AHEAD: Final = message(b"G", bytes(3))
ERROR: Final = message(b"E", b"SERROR\0\0")
NOTICE: Final = message(b"N", b"SNOTICE\0Mhello\0\0")
ROW: Final = message(b"D", b"\0\1\0\0\0\5" + TERMINATE)
READY: Final = message(b"Z", b"I")
EXTENDED: Final = (
    message(b"P", b"\0SELECT $1\0\0\0")
    + message(b"B", b"\0\0\0\0\0\1\0\0\0\5" + TERMINATE + b"\0\0")
    + message(b"E", bytes(5))
)
TIMED_OUT: Final = ErrorResponse.fatal("57P05", "idle")


@dataclass
class Setting:
    """A relay that keeps its upstream, and what its cancels were."""

    relayed: Relayed
    cancels: list[bytes] = field(default_factory=list)
    """What the upstream had been sent when each was made."""

    @property
    def client(self) -> Peer:
        return self.relayed.client

    @property
    def upstream(self) -> Peer:
        return self.relayed.upstream

    @property
    def relay(self) -> Relay:
        return self.relayed.relay

    async def ask(self, request: bytes, answer: bytes) -> None:
        """Run one exchange between both peers."""
        await self.client.send(request)
        assert await self.upstream.receive_exactly(len(request)) == request
        await self.upstream.send(answer)
        assert await self.client.receive_exactly(len(answer)) == answer

    async def fill(self) -> int:
        """Ask, and let the client read nothing, until the relay holds an answer. Return all sent.

        Everything is answered, and the upstream is not read any more.
        """
        answer, sent = message(b"D", bytes(30_000)) + READY, 0
        while self.relayed.client_transport.get_write_buffer_size() == 0:
            await self.client.send(QUERY)
            await self.upstream.receive_exactly(len(QUERY))
            await self.upstream.send(answer)
            sent += len(answer)
            counted = self.relay.from_upstream
            await eventually(lambda: counted.received_bytes == sent, "it is carried")  # noqa: B023
        return sent

    async def kept(self) -> RelayEnd:
        """Return the end; it must be kept, and its upstream as good as after its login."""
        end = await self.relayed.end()
        assert (end.kept, end.retired) == (True, None)
        assert self.relayed.client_transport.is_closing()
        assert self.cancels == []
        transport = self.relayed.upstream_transport
        assert not transport.is_closing()
        assert transport.get_write_buffer_size() == 0
        assert not self.relayed.lanes or len(self.relayed.lanes) == 0
        notes = Notes()
        transport.set_protocol(notes)
        await self.upstream.send(b"hello")
        await notes.until_received(5)
        assert notes.received == b"hello"
        transport.write(b"next")
        assert await self.upstream.receive_exactly(4) == b"next"  # and nothing before it
        return end

    async def closed(self, upstream_reads: bytes, why: RetireReason) -> RelayEnd:
        """Return the end; the upstream must be closed after it has read this."""
        assert await self.upstream.receive_rest() == upstream_reads
        self.upstream.close()
        self.client.close()
        end = await self.relayed.end()
        assert (end.kept, end.retired) == (False, why)
        assert self.relayed.upstream_transport.is_closing()
        assert self.relayed.client_transport.is_closing()
        return end

    async def closed_by_upstream(self, why: RetireReason) -> RelayEnd:
        """Return the end; the upstream ends its stream, as PostgreSQL does after a Terminate."""
        self.upstream.end_orderly()
        return await self.closed(b"", why)


@pytest.fixture(scope="module")
def tls() -> Contexts:
    made = contexts(compiled=native.AVAILABLE)
    made.server.num_tickets = 0
    return made


@asynccontextmanager
async def keeping(kind: str, tls: Contexts, *, small: bool = False) -> AsyncIterator[Setting]:
    laned, encrypted = kind.startswith("compiled"), kind.endswith("tls")
    if laned:
        need_compiled("a relay with lanes that keeps its upstream")
    cancels: list[bytes] = []

    async def cancel() -> None:
        cancels.append(b"cancelled")

    async with relayed(
        laned=laned,
        tls=(tls if laned else pythons(tls)) if encrypted else None,
        small=small,
        keeps_upstream=True,
        cancel_query=cancel,
    ) as running:
        assert len(running.lanes or ()) == (2 if laned else 0)
        yield Setting(running, cancels)


KINDS: Final = ("python", "python-tls", "compiled", "compiled-tls")


@pytest.fixture(params=KINDS)
async def setting(request: pytest.FixtureRequest, tls: Contexts) -> AsyncIterator[Setting]:
    async with keeping(request.param, tls) as made:
        yield made


@pytest.fixture(params=KINDS)
async def small(request: pytest.FixtureRequest, tls: Contexts) -> AsyncIterator[Setting]:
    """A setting in which a client that reads nothing is full soon."""
    async with keeping(request.param, tls, small=True) as made:
        yield made


# -- a clean end -----------------------------------------------------------------------------------


async def test_p13_a_terminate_does_not_go_upstream(setting: Setting) -> None:
    await setting.ask(QUERY, ROW + READY)
    await setting.client.send(TERMINATE + QUERY)
    assert await setting.client.receive() == b""
    end = await setting.kept()
    assert end.reason is EndReason.CLIENT_CLOSED
    assert end.client_bytes == len(QUERY + TERMINATE + QUERY)
    assert end.upstream_bytes == len(ROW + READY)


@pytest.mark.parametrize("cut", range(1, 5))
async def test_p13_a_terminate_in_two_pieces_does_not_go_upstream(
    setting: Setting, cut: int
) -> None:
    await setting.client.send(TERMINATE[:cut])
    await eventually(lambda: setting.relay.from_client.received_bytes == cut, "it is held back")
    if cut == 2:
        setting.relay.follow_reads(lambda: None)  # a drain has begun: lanes end within a header
    await setting.client.send(TERMINATE[cut:])
    await setting.kept()


async def test_p13_bytes_of_a_terminate_inside_messages_are_passed_on(setting: Setting) -> None:
    await setting.ask(EXTENDED + SYNC, ROW + READY)
    await setting.ask(QUERY, GO_AHEAD)
    await setting.ask(DATA + DONE, message(b"C", b"COPY 1\0") + READY)
    await setting.ask(QUERY, message(b"H", bytes(3)) + DATA + DONE + READY)
    await setting.client.send(TERMINATE)
    await setting.kept()


async def test_p13_what_stands_before_a_terminate_is_sent_with_the_first_write(
    setting: Setting,
) -> None:
    flush = message(b"H")
    await setting.client.send(flush + TERMINATE)
    await setting.relayed.end()
    assert await setting.upstream.receive_exactly(len(flush)) == flush
    await setting.kept()


@pytest.mark.parametrize("way", ["end", "close", "reset"])
async def test_p15_an_end_of_the_stream_while_nothing_is_owed_is_a_clean_end(
    setting: Setting, way: str
) -> None:
    await setting.ask(QUERY, ROW + READY)
    getattr(setting.client, way)()
    end = await setting.kept()
    lost = {EndReason.CLIENT_LOST, EndReason.CLIENT_CLOSED}
    assert end.reason in (lost if way == "reset" else {EndReason.CLIENT_CLOSED})


async def test_p15_the_idle_timeout_is_a_clean_end(setting: Setting) -> None:
    await setting.ask(QUERY, ROW + READY)
    ending = IdleEnd(setting.relay)
    ending.after_idle(0.05, TIMED_OUT)
    assert await setting.client.receive_rest() == TIMED_OUT.encode()
    setting.client.close()
    assert (await setting.kept()).reason is EndReason.IDLE_TIMEOUT
    ending.close()


async def test_a_kept_upstream_serves_the_next_client(setting: Setting) -> None:
    await setting.ask(QUERY, ROW + READY)
    await setting.client.send(TERMINATE)
    await setting.kept()
    near, far = tcp_pair()
    client = Peer(far)
    to_client, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=near)
    upstream = setting.relayed.upstream_transport
    lanes = setting.relayed.lanes if setting.relay._fast_path else None
    relay = Relay(to_client, upstream, lanes=lanes, keeps_upstream=True)
    to_client.set_protocol(relay.from_client)
    upstream.set_protocol(relay.from_upstream)
    running = asyncio.create_task(relay.run())
    again = Setting(
        Relayed(
            client, setting.upstream, to_client, upstream, relay, setting.relayed.lanes, running
        )
    )
    await again.ask(QUERY, ROW + READY)
    await client.send(TERMINATE)
    await again.kept()
    client.close()


@LOOPS
@pytest.mark.parametrize("kind", KINDS)
def test_an_upstream_is_kept_on_either_loop(new_loop: NewLoop, kind: str, tls: Contexts) -> None:
    async def story() -> None:
        async with keeping(kind, tls, small=True) as setting:
            owed = await setting.fill()  # the upstream is not read any more
            await setting.client.send(TERMINATE)
            assert len(await setting.client.receive_rest()) == owed
            await setting.kept()
            setting.relayed.upstream_transport.abort()

    run(new_loop, story)


# -- no clean end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [b"T", b"E"])
async def test_p12_a_client_that_leaves_in_a_transaction_ends_both(
    setting: Setting, status: bytes
) -> None:
    await setting.ask(QUERY, message(b"Z", status))
    await setting.client.send(TERMINATE)
    assert await setting.upstream.receive_exactly(len(TERMINATE)) == TERMINATE
    await setting.closed_by_upstream(RetireReason.BUSY)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (EXTENDED + message(b"H"), message(b"1") + message(b"2") + ROW),
        (EXTENDED + message(b"H"), ERROR),
        (QUERY, GO_AHEAD),
        (QUERY, message(b"H", bytes(3)) + DATA),
        (EXTENDED + SYNC, GO_AHEAD),
    ],
    ids=["no-sync", "error-and-no-sync", "copy-in", "copy-out", "extended-copy-in"],
)
async def test_p12_a_client_that_leaves_within_an_exchange_ends_both(
    setting: Setting, asked: bytes, answer: bytes
) -> None:
    await setting.ask(asked, answer)
    await setting.client.send(TERMINATE)
    assert await setting.upstream.receive_exactly(len(TERMINATE)) == TERMINATE
    await setting.closed_by_upstream(RetireReason.BUSY)


async def test_p14_query_and_terminate_in_one_write_run_to_their_end(setting: Setting) -> None:
    await setting.client.send(QUERY + TERMINATE)
    assert await setting.upstream.receive_exactly(len(QUERY + TERMINATE)) == QUERY + TERMINATE
    await setting.upstream.send(ROW + READY)
    assert await setting.client.receive_exactly(len(ROW + READY)) == ROW + READY
    with pytest.raises(TimeoutError):
        await setting.upstream.receive(0.1)  # no end: a server would end the statement by it
    end = await setting.closed_by_upstream(RetireReason.BUSY)
    assert end.reason is EndReason.CLIENT_CLOSED


@pytest.mark.parametrize(
    "sent", [*(QUERY[:cut] for cut in range(1, 7)), TERMINATE[:1], TERMINATE[:4]]
)
async def test_p15_an_end_within_a_message_ends_both(setting: Setting, sent: bytes) -> None:
    await setting.client.send(sent)
    await eventually(lambda: setting.relay.from_client.received_bytes == len(sent), "it is read")
    setting.client.end()
    # One that begins as a Terminate was never sent.
    await setting.closed(b"" if sent[:1] == b"X" else sent, RetireReason.BUSY)
    assert setting.cancels


@pytest.mark.parametrize("way", ["end", "reset"])
async def test_p15_p17_an_end_while_a_query_runs_cancels_it_and_ends_both(
    setting: Setting, way: str
) -> None:
    await setting.client.send(QUERY)
    assert await setting.upstream.receive_exactly(len(QUERY)) == QUERY
    getattr(setting.client, way)()
    await setting.closed(b"", RetireReason.BUSY)
    assert setting.cancels


async def test_p16_what_the_upstream_has_not_taken_ends_both(small: Setting) -> None:
    # PostgreSQL reads and drops the data of a COPY that has failed: nothing is owed for it.
    setting = small
    await setting.ask(QUERY, GO_AHEAD + ERROR + READY)
    late = DATA * 500_000 + DONE
    setting.relay.from_client.data_received(late + TERMINATE)
    await eventually(setting.relayed.client_transport.is_closing, "the client is closed")
    await setting.closed(late + TERMINATE, RetireReason.BUSY)


async def test_p16_an_upstream_that_ends_first_is_not_kept(setting: Setting) -> None:
    await setting.ask(QUERY, ROW + READY)
    setting.upstream.end_orderly()
    assert await setting.client.receive_rest() == b""
    await setting.closed(b"", RetireReason.UPSTREAM_ENDED)


async def test_an_upstream_that_ends_within_an_answer_is_what_has_ended(setting: Setting) -> None:
    await setting.client.send(QUERY)
    await setting.upstream.receive_exactly(len(QUERY))
    fatal = ErrorResponse.fatal("57P01", "ended").encode()
    await setting.upstream.send(fatal)
    assert await setting.client.receive_exactly(len(fatal)) == fatal
    await setting.client.send(TERMINATE)
    assert await setting.upstream.receive_exactly(len(TERMINATE)) == TERMINATE
    # Its Terminate came with something owed: that is all that can be known.
    end = await setting.closed_by_upstream(RetireReason.BUSY)
    assert end.reason is EndReason.UPSTREAM_CLOSED


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (EndReason.SHUTDOWN, RetireReason.DRAIN),
        (EndReason.MAPPING_MOVED, RetireReason.RECONFIGURED),
    ],
)
async def test_an_end_by_the_proxy_is_not_kept(
    setting: Setting, reason: EndReason, why: RetireReason
) -> None:
    await setting.ask(QUERY, ROW + READY)
    IdleEnd(setting.relay).when_idle(reason, TIMED_OUT)
    await setting.closed(TERMINATE, why)


async def test_a_session_that_is_dropped_is_not_kept(setting: Setting) -> None:
    await setting.ask(QUERY, ROW + READY)
    setting.relay.drop(EndReason.MAPPING_MOVED)
    await setting.closed(b"", RetireReason.RECONFIGURED)


# -- a client that reads its answers late ----------------------------------------------------------


async def test_p16_a_client_that_has_not_read_its_answers_gets_them_all(small: Setting) -> None:
    setting = small
    owed = await setting.fill()
    await setting.client.send(TERMINATE)
    await eventually(lambda: setting.relay.over, "it has ended")
    await setting.upstream.send(NOTICE)  # it may still say something of its own accord
    assert len(await setting.client.receive_rest()) == owed
    await setting.kept()


async def test_p12_an_upstream_that_stops_within_a_message_meanwhile_is_closed(
    small: Setting,
) -> None:
    setting = small
    await setting.fill()
    await setting.client.send(TERMINATE)
    await eventually(lambda: setting.relay.over, "it has ended")
    counted = setting.relay.from_upstream
    before = counted.received_bytes
    await setting.upstream.send(NOTICE[:9])
    await eventually(lambda: counted.received_bytes == before + 9, "it is read")
    await setting.client.receive_rest()
    await setting.closed(TERMINATE, RetireReason.BUSY)


@pytest.mark.parametrize("way", ["fin", "close_notify"])
async def test_p16_an_upstream_that_ends_meanwhile_is_closed(small: Setting, way: str) -> None:
    setting = small
    await setting.fill()
    await setting.client.send(TERMINATE)
    await eventually(lambda: setting.relay.over, "it has ended")
    if way == "close_notify" and setting.upstream.tls is not None:
        setting.upstream.send_close_notify()  # its connection stays open
    else:
        setting.upstream.end_orderly()
    await eventually(lambda: setting.relay.from_upstream.at_end, "its end is known")
    await setting.client.receive_rest()
    await setting.closed(TERMINATE, RetireReason.UPSTREAM_ENDED)


async def test_a_relay_that_is_cancelled_meanwhile_keeps_nothing(small: Setting) -> None:
    setting = small
    await setting.fill()
    await setting.client.send(TERMINATE)
    await eventually(lambda: setting.relay.over, "it has ended")
    setting.relayed.running.cancel()
    await asyncio.wait((setting.relayed.running,), timeout=WAIT_SECONDS_MAX)
    end = setting.relay.ended(EndReason.SHUTDOWN)
    assert (end.kept, end.retired) == (False, RetireReason.BUSY)
    assert setting.relayed.upstream_transport.is_closing()
