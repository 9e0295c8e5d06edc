"""What the sessions of a pool have in common: it is kept once, and not for ever."""

import gc
from typing import cast

from proxy.pool.shared_parts import SHARED_MAX, SharedParts
from proxy.transport.stream import StartupStream
from proxy.upstream.address_lookup import LoginNames, Target
from proxy.upstream.upstream_session import Prepared, UpstreamSession, Welcome
from proxy.wire.startup import V3_0, StartupMessage

TARGET = Target("db.example.com", "", 5432, "verify-full", "system")


def session(name: str) -> UpstreamSession:
    message = StartupMessage(V3_0, ((b"application_name", name.encode()),))
    prepared = Prepared(TARGET, LoginNames(b"app", b"main"), message)
    stream, welcome = cast(StartupStream, None), cast(Welcome, None)
    return UpstreamSession(stream, welcome, TARGET, prepared=prepared)


def test_p49_equal_sessions_share_their_key() -> None:
    parts = SharedParts()
    assert parts.of(session("one")).prepared is parts.of(session("one")).prepared


def test_p49_the_keys_of_sessions_that_have_ended_are_freed() -> None:
    # Each was kept for ever, by a dictionary of weak values whose keys were the same objects.
    parts = SharedParts()
    gc.collect()
    before = count_keys()
    for number in range(1000):
        parts.of(session(str(number)))
    assert count_keys() - before <= SHARED_MAX


def count_keys() -> int:
    return sum(isinstance(one, Prepared) for one in gc.get_objects())
