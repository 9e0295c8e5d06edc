"""TLS over real sockets, from either side: what is delivered, in which order, and how it ends."""

import asyncio
import gc
import os
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.transport.graceful_close import close_gracefully
from proxy.transport.stream import StartupStream
from proxy.transport.tls import TLSTransport, client_context
from tests.support.compiled import need_compiled
from tests.support.cuts import THREE_WAYS, Cut, byte_by_byte
from tests.support.peer import WAIT_SECONDS_MAX, Peer
from tests.transport.peers import (
    HOST,
    Contexts,
    Notes,
    contexts,
    linked,
    resident_bytes,
    secured,
    start,
)

MIB = 1024 * 1024
BOTH_SIDES = pytest.mark.parametrize("server_side", [False, True], ids=["client", "server"])


@pytest.fixture(scope="module", params=["python", "compiled"])
def tls(request: pytest.FixtureRequest) -> Contexts:
    compiled = request.param == "compiled"
    if compiled:
        need_compiled("TLS through OpenSSL itself")
    return contexts(compiled=compiled)


def test_a_file_that_becomes_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    # It was checked at the start only: a dial then opened the pipe, and the whole proxy stood
    # still.
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    client_context("verify-full", str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="it is not a regular file"):
        client_context("verify-full", str(path))


# -- the handshake -------------------------------------------------------------------------------


@BOTH_SIDES
@pytest.mark.parametrize("cut", THREE_WAYS)
async def test_both_sides_shake_hands_however_the_bytes_are_cut(
    tls: Contexts, server_side: bool, cut: Cut
) -> None:
    async with linked() as (stream, peer), asyncio.TaskGroup() as group:
        context = tls.of(server_side=not server_side)
        shaken = group.create_task(peer.handshake(context, server_side=not server_side, cut=cut))
        tls_object = await start(stream, tls, server_side=server_side)
        await shaken
        assert tls_object.version() == "TLSv1.3"
        stream.write(b"from us")
        assert await peer.receive_exactly(7) == b"from us"
        await peer.send(b"from the peer")
        assert await stream.receive() == b"from the peer"


async def test_prepared_tls_sends_nothing_until_it_is_switched_to(tls: Contexts) -> None:
    async with linked() as (stream, peer), asyncio.TaskGroup() as group:
        prepared = stream.prepare_tls(tls.ours(server_side=False), HOST)
        stream.write(b"plain")
        assert await peer.receive_exactly(5) == b"plain"  # and not the hello before it
        shaken = group.create_task(peer.handshake(tls.server, server_side=True))
        tls_object = await stream.switch_to(prepared)
        await shaken
        assert tls_object.version() == "TLSv1.3"
        stream.write(b"from us")
        assert await peer.receive_exactly(7) == b"from us"


def test_a_context_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    first = client_context("verify-full", str(path))
    assert client_context("verify-full", str(path)) is first
    assert client_context("verify-ca", str(path)) is not first
    replacement = tmp_path / "new.pem"
    trustme.CA().cert_pem.write_to_path(str(replacement))
    replacement.replace(path)
    second = client_context("verify-full", str(path))
    assert second is not first
    assert isinstance(first, ssl.SSLContext)
    assert isinstance(second, ssl.SSLContext)
    assert second.get_ca_certs() != first.get_ca_certs()
    assert client_context("verify-full", "system") is client_context("verify-full", "system")


@BOTH_SIDES
async def test_data_in_the_write_that_ends_the_handshake_is_delivered_after_it(
    tls: Contexts, server_side: bool
) -> None:
    async with linked() as (stream, peer), asyncio.TaskGroup() as group:
        context = tls.of(server_side=not server_side)
        group.create_task(
            peer.handshake(context, server_side=not server_side, tail=b"early" * 10_000)
        )
        await start(stream, tls, server_side=server_side)
        received = b""
        while len(received) < 50_000:
            received += await stream.receive()
        assert received == b"early" * 10_000


async def test_data_in_the_write_that_ends_the_handshake_reaches_who_takes_over_at_once(
    tls: Contexts,
) -> None:
    async with linked() as (stream, peer), asyncio.TaskGroup() as group:
        group.create_task(peer.handshake(tls.client, server_side=False, tail=b"early"))
        await start(stream, tls, server_side=True)
        notes = Notes()
        assert stream.hand_over(notes) == b""
        await notes.until_received(5)
        assert notes.received == b"early"


async def test_a_hello_that_was_read_already_begins_the_handshake(tls: Contexts) -> None:
    async with linked() as (stream, peer), asyncio.TaskGroup() as group:
        shaken = group.create_task(peer.handshake(tls.client, server_side=False))
        hello = await stream.receive()
        assert hello[:1] == b"\x16"
        await start(stream, tls, server_side=True, first=hello)
        await shaken
        await peer.send(b"after")
        assert await stream.receive() == b"after"


async def test_a_certificate_that_does_not_verify_fails_and_the_peer_is_told(tls: Contexts) -> None:
    other = contexts()
    async with linked() as (stream, peer), asyncio.TaskGroup() as group:

        async def refused() -> None:
            with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
                await peer.handshake(other.server, server_side=True)

        told = group.create_task(refused())
        with pytest.raises(ssl.SSLCertVerificationError):
            await start(stream, tls, server_side=False)
        stream.transport.close()
        await told


async def test_a_peer_that_does_not_speak_tls_fails_the_handshake(tls: Contexts) -> None:
    async with linked() as (stream, peer):
        peer.sock.sendall(b"Q\0\0\0\x0dselect 1\0")
        with pytest.raises(ssl.SSLError):
            await start(stream, tls, server_side=True)
        await peer.send(b"and more of it")  # is ignored


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_a_peer_that_ends_during_the_handshake_fails_it(tls: Contexts, reset: bool) -> None:
    async with linked() as (stream, peer), asyncio.TaskGroup() as group:
        starting = group.create_task(_failing_start(stream, tls))
        await peer.receive()
        peer.reset() if reset else peer.end()
        assert isinstance(await starting, ConnectionError)


async def test_a_peer_that_ended_before_the_handshake_fails_it_at_once(tls: Contexts) -> None:
    # S and FIN in one read: only the stream is told of the end, and only once.
    async with linked() as (stream, peer):
        peer.sock.sendall(b"S")
        peer.end()
        await stream.gone
        assert await stream.receive() == b"S"
        assert isinstance(await _failing_start(stream, tls), ConnectionError)


async def _failing_start(stream: StartupStream, tls: Contexts) -> Exception:
    with pytest.raises(OSError) as failed:  # noqa: PT011 - which one is the caller's question
        await start(stream, tls, server_side=False)
    return failed.value


@pytest.mark.parametrize("how", ["cancelled", "reset", "garbage"])
async def test_a_handshake_that_fails_leaves_no_exception_unretrieved(
    tls: Contexts, how: str
) -> None:
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    async with linked() as (stream, peer):
        starting = asyncio.create_task(start(stream, tls, server_side=False))
        await peer.receive()
        match how:
            case "cancelled":
                starting.cancel()
                await peer.send_raw(b"\x15\x03\x03\x00\x02\x02\x28")  # an alert, too late
            case "reset":
                peer.reset()
            case "garbage":
                await peer.send_raw(b"garbage" * 100)
        await asyncio.wait([starting])
        assert starting.cancelled() or starting.exception() is not None
        await asyncio.sleep(0)
        stream.transport.close()
        await stream.gone
        del starting
    gc.collect()
    await asyncio.sleep(0)
    assert unhandled == []


async def test_session_tickets_are_taken_and_deliver_nothing(tls: Contexts) -> None:
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (stream, peer):
        assert notes.received == b""
        await peer.send(b"first")
        await notes.until_received(5)
        if tls.compiled is None:  # the other one does not show what it has
            session = stream.transport.get_extra_info("ssl_object").session
            assert session is not None
            assert session.has_ticket


async def test_key_updates_go_unnoticed(tls: Contexts, tmp_path: Path) -> None:
    # Only OpenSSL's own client can be told to ask for one: a line "K" makes it do so.
    loop = asyncio.get_running_loop()
    trusted = tmp_path / "ca.pem"
    tls.authority.cert_pem.write_to_path(str(trusted))
    arrived: asyncio.Future[StartupStream] = loop.create_future()

    class Accepted(StartupStream):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            arrived.set_result(self)

    server = await loop.create_server(Accepted, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    command = f"openssl s_client -connect 127.0.0.1:{port} -servername {HOST} -CAfile {trusted}"
    client = await asyncio.create_subprocess_exec(
        *command.split(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            stream = await arrived
            await start(stream, tls, server_side=True, first=await stream.receive())
            for round_ in range(3):
                client.stdin.write(b"K\n")
                await client.stdin.drain()
                await _until_read(client.stdout, b"KEYUPDATE")
                client.stdin.write(b"ping %d\n" % round_)
                assert await stream.receive() == b"ping %d\n" % round_
                stream.write(b"pong %d\n" % round_)
                await _until_read(client.stdout, b"pong %d" % round_)
    finally:
        client.stdin.close()
        client.kill()
        await client.wait()
        server.close()
        stream.transport.abort()


async def _until_read(stream: asyncio.StreamReader, text: bytes) -> None:
    while text not in (line := await stream.readline()):
        assert line, f"ended before {text!r}"


# -- delivery ------------------------------------------------------------------------------------


@BOTH_SIDES
@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 1_000_000])
async def test_writes_of_any_size_arrive_whole(tls: Contexts, server_side: bool, size: int) -> None:
    async with secured(tls, server_side=server_side) as (stream, peer):
        stream.transport.write(b"x" * size)
        stream.transport.write(bytearray(b"y"))
        stream.transport.write(memoryview(b"z"))
        assert await peer.receive_exactly(size + 2) == b"x" * size + b"yz"


async def test_records_cut_at_every_byte_are_put_together(tls: Contexts) -> None:
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (_, peer):
        records = peer.encrypted(b"one") + peer.encrypted(b"") + peer.encrypted(b"two")
        await peer.send_raw(records, byte_by_byte)
        await notes.until_received(6)
        assert notes.received == b"onetwo"


async def test_a_pause_stops_delivery_and_the_peer_and_loses_nothing(tls: Contexts) -> None:
    notes = Notes()
    content = bytes(range(256)) * (32 * MIB // 256)
    async with secured(tls, server_side=False, protocol=notes) as (stream, peer):
        stream.transport.pause_reading()
        before = resident_bytes()
        # The peer makes its records as it goes, or they would be what takes the memory.
        sending = asyncio.create_task(_send_in_pieces(peer, content))
        await _until_stuck(peer)
        assert notes.received == b""
        assert resident_bytes() - before < 16 * MIB
        assert not sending.done()
        stream.transport.resume_reading()
        await notes.until_received(len(content))
        await sending
        assert notes.received == content


async def _send_in_pieces(peer: Peer, content: bytes) -> None:
    for start_ in range(0, len(content), 65536):
        await peer.send(content[start_ : start_ + 65536])


async def _until_stuck(peer: Peer) -> None:
    """Wait until nothing more was taken of what the peer sends for many turns of the loop."""
    turns = 0
    last = 0
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while turns < 200:
            turns = turns + 1 if peer.sent_bytes == last > 0 else 0
            last = peer.sent_bytes
            await asyncio.sleep(0)


async def test_a_peer_that_does_not_read_pauses_the_writer_and_then_resumes_it(
    tls: Contexts,
) -> None:
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (stream, peer):
        stream.transport.set_write_buffer_limits(high=65536)
        written = 0
        while "pause" not in notes.told:
            stream.transport.write(b"x" * 65536)
            written += 65536
            await asyncio.sleep(0)
        assert stream.transport.get_write_buffer_size() > 65536
        assert await peer.receive_exactly(written) == b"x" * written
        await notes.until_told("resume")


class _Bulk(asyncio.Protocol):
    """Writes so many bytes as fast as it may, and counts what it receives."""

    def __init__(self, transport: asyncio.Transport, size: int) -> None:
        self.received = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.peak = 0
        self._transport = transport
        self._left = self._expected = size
        self._may_write = True
        self._piece = b"x" * 65536

    def go(self) -> None:
        while self._may_write and self._left:
            self._transport.write(self._piece)
            self._left -= len(self._piece)

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self.go()

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.peak = max(self.peak, resident_bytes())
        if self.received >= self._expected and not self.done.done():
            self.done.set_result(None)


@pytest.mark.slow
async def test_w32_100_megabytes_pass_both_ways_at_once_and_memory_stays_flat(
    tls: Contexts,
) -> None:
    size = 1600 * 65536  # 100 MiB
    loop = asyncio.get_running_loop()
    accepted: asyncio.Queue[StartupStream] = asyncio.Queue()

    class Accepted(StartupStream):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            accepted.put_nowait(self)

    server = await loop.create_server(Accepted, "127.0.0.1", 0)
    _, near = await loop.create_connection(StartupStream, *server.sockets[0].getsockname())
    far = await accepted.get()
    server.close()
    async with asyncio.TaskGroup() as group:
        group.create_task(start(near, tls, server_side=False))
        group.create_task(start(far, tls, server_side=True))
    ends = [_Bulk(stream.transport, size) for stream in (near, far)]
    for stream, end in zip((near, far), ends, strict=True):
        stream.hand_over(end)
    before = resident_bytes()
    async with asyncio.timeout(60):
        for end in ends:
            end.go()
        await asyncio.gather(*(end.done for end in ends))
    assert [end.received for end in ends] == [size, size]
    assert max(end.peak for end in ends) - before < 16 * MIB
    near.transport.abort()
    far.transport.abort()
    await asyncio.sleep(0)


# -- ends ----------------------------------------------------------------------------------------


@BOTH_SIDES
async def test_w34_an_end_is_close_notify_and_then_fin(tls: Contexts, server_side: bool) -> None:
    async with secured(tls, server_side=server_side) as (stream, peer):
        stream.transport.write(b"last words")
        stream.transport.write_eof()
        stream.transport.write(b"too late")
        assert await peer.receive_rest() == b"last words"
        assert peer.close_notify
        assert await peer.receive_raw() == b""  # and FIN after it


async def test_closing_says_close_notify_too(tls: Contexts) -> None:
    async with secured(tls, server_side=False) as (stream, peer):
        stream.transport.write(b"x" * MIB)
        stream.transport.close()
        assert stream.transport.is_closing()
        assert await peer.receive_rest() == b"x" * MIB
        assert peer.close_notify


@BOTH_SIDES
async def test_what_the_peer_sends_after_our_end_is_delivered_and_so_is_its_end(
    tls: Contexts, server_side: bool
) -> None:
    # With both close_notify on the way OpenSSL reports the peer's as an error of its own kind.
    notes = Notes()
    async with secured(tls, server_side=server_side, protocol=notes) as (stream, peer):
        stream.transport.write_eof()
        assert await peer.receive_rest() == b""
        await peer.send(b"late" * 10_000)
        peer.send_close_notify()
        await notes.until_told("eof")
        assert notes.received == b"late" * 10_000
        assert notes.told[:2] == ["data", "eof"]


async def test_an_end_is_told_once_whether_close_notify_or_fin_or_both_say_it(
    tls: Contexts,
) -> None:
    for close_notify in (True, False):
        notes = Notes()
        async with secured(tls, server_side=False, protocol=notes) as (stream, peer):
            await peer.send(b"x")
            if close_notify:
                peer.send_close_notify()
            peer.end()
            await notes.until_told("eof")
            stream.transport.resume_reading()
            stream.transport.write(b"we may still answer")
            assert await peer.receive_exactly(19) == b"we may still answer"
            assert notes.told == ["data", "eof"]


async def test_a_protocol_that_does_not_keep_the_connection_open_ends_it(tls: Contexts) -> None:
    notes = Notes(keep_open=False)
    async with secured(tls, server_side=False, protocol=notes) as (_, peer):
        peer.send_close_notify()
        peer.end()
        await notes.until_told("lost")
        assert await peer.receive_rest() == b""
        assert peer.close_notify


@pytest.mark.parametrize("close_notify", [True, False])
async def test_closing_does_not_wait_for_a_peer_that_has_ended_already(
    tls: Contexts, close_notify: bool
) -> None:
    # The relay closes both sides when the upstream has ended; it waited out the whole linger.
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (stream, peer):
        if close_notify:
            peer.send_close_notify()
        peer.end()
        await notes.until_told("eof")
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await close_gracefully(stream.transport, linger_seconds=60)
        assert await peer.receive_rest() == b""
        assert peer.close_notify


async def test_w34_a_slow_reader_gets_every_byte_that_came_before_the_peers_fin(
    tls: Contexts,
) -> None:
    # The event loop's own TLS drops what it has decrypted and not delivered when FIN comes.
    content = bytes(range(256)) * (4 * MIB // 256)
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (stream, peer):
        stream.transport.pause_reading()

        async def send_and_end() -> None:
            await _send_in_pieces(peer, content)
            peer.send_close_notify()
            peer.end()

        sending = asyncio.create_task(send_and_end())
        while "eof" not in notes.told:  # reads once, rests, reads once
            stream.transport.resume_reading()
            await notes.until_more()
            stream.transport.pause_reading()
            await asyncio.sleep(0)
        await sending
        assert notes.received == content
        assert notes.told == ["data", "eof"]


async def test_a_broken_record_ends_the_connection_and_nothing_after_it_is_believed(
    tls: Contexts,
) -> None:
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (_, peer):
        good = peer.encrypted(b"good")
        broken = bytearray(peer.encrypted(b"broken"))
        broken[-1] ^= 1
        await peer.send_raw(good + broken + peer.encrypted(b"after"))
        await notes.until_told("lost")
        assert notes.received == b"good"


async def test_a_write_between_a_broken_record_and_the_loss_does_nothing(tls: Contexts) -> None:
    # OpenSSL refused it, and the error was raised in the protocol of the other side, which the
    # event loop closed as lost.
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (stream, _):
        upper = stream.transport
        assert isinstance(upper, TLSTransport)
        upper.data_received(b"Q\0\0\0\x0dselect 1\0" * 10)
        assert upper.is_closing()
        upper.write(b"x")
        upper.write(b"x" * 100_000)
        await notes.until_told("lost")


async def test_plaintext_in_the_middle_of_tls_ends_the_connection(tls: Contexts) -> None:
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (_, peer):
        await peer.send_raw(b"Q\0\0\0\x0dselect 1\0" * 10)
        await notes.until_told("lost")
        assert notes.received == b""


async def test_a_reset_is_the_loss_of_the_connection(tls: Contexts) -> None:
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (stream, peer):
        peer.reset()
        await notes.until_told("lost")
        stream.transport.write(b"into the void")
        stream.transport.write_eof()
        stream.transport.close()
        stream.transport.abort()
        assert stream.transport.is_closing()


async def test_it_answers_for_the_plain_transport_below(tls: Contexts) -> None:
    notes = Notes()
    async with secured(tls, server_side=False, protocol=notes) as (stream, _):
        assert stream.transport.get_extra_info("peername")[0] == "127.0.0.1"
        assert stream.transport.get_extra_info("nothing", 7) == 7
        assert stream.transport.get_protocol() is notes
        assert stream.transport.can_write_eof()
        assert stream.transport.get_write_buffer_size() == 0
