"""Lanes beside transports: order, backpressure, descriptors, ends."""


import pytest

from tests.native.relayed import relayed
from tests.transport.peers import Contexts

MIB = 1024 * 1024
ENCRYPTED = pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])


@ENCRYPTED
async def test_what_was_queued_before_the_relay_began_goes_first(
    tls: Contexts, encrypted: bool
) -> None:
    # The welcome is written while the connection's protocol is still the startup's, which is told
    # that the client takes no more and does nothing about it. A lane that did not know sent the
    # upstream's next bytes past what was queued, as soon as the client had made room.
    welcome, answer = b"w" * MIB, b"a" * 1000
    async with relayed(tls=tls if encrypted else None, small=True, first=welcome) as setting:
        assert setting.client_transport.get_write_buffer_size() > 0
        upstream = setting.upstream.writer.transport
        received = setting.client.receive_now()
        upstream.write(setting.upstream.encrypted(answer) if encrypted else answer)
        setting.lanes.turn()
        received += await setting.client.receive_exactly(MIB + 1000 - len(received))
        assert received == welcome + answer
