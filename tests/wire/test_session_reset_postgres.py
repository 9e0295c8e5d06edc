"""The machines of reset and check against PostgreSQL's own bytes, before and after version 17."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import pytest

from proxy.emulator.cluster import CLIENT_ID, DATABASE, Cluster, start_together, stop_together
from proxy.wire.framing import MessageReader
from proxy.wire.own_answer import reported_parameters
from proxy.wire.session_reset import (
    ResetDone,
    ResetEvent,
    SessionReset,
    may_have_login_triggers,
)
from proxy.wire.sign_of_life import Alive, CheckEvent, SignOfLife
from proxy.wire.upstream_startup import UpstreamRefused
from tests.support.cuts import THREE_WAYS
from tests.wire.driving import TERMINATE, message, startup

Event = TypeVar("Event")

SECONDS_MAX = 20.0
READ_BYTES = 65536
USUAL_BYTES = len(b"CxxxxDISCARD ALL\0ZxxxxICxxxxRESET\0ZxxxxI")

# What a client may leave behind, each a query of its own.
LEFT_BEHIND = [
    "SET TimeZone = 'Asia/Tokyo'",
    "SET client_encoding = 'SQL_ASCII'",
    "SET DateStyle = 'German'",
    "SET application_name = 'somebody'",
    "SET IntervalStyle = 'iso_8601'",
    "SET standard_conforming_strings = off",
    "SELECT set_config('app.tenant', '17', false)",
    "CREATE TEMP TABLE t (a int)",
    "PREPARE p AS SELECT 1",
    "LISTEN c",
    "NOTIFY c",
    "SELECT pg_advisory_lock(4711)",
    "SELECT lastval() FROM (SELECT nextval('reset_sequence')) AS s",
    "BEGIN; DECLARE d CURSOR WITH HOLD FOR SELECT 1; COMMIT",
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET default_transaction_read_only = on",
    "SET statement_timeout = '1min'",
    "SET search_path = reset_traps",
    "SET ROLE reset_role",
]
# Found before PostgreSQL's own, by a search_path that is a default of the session.
TRAPS = """
CREATE ROLE reset_role;
CREATE SCHEMA reset_traps;
CREATE SEQUENCE reset_sequence;
CREATE FUNCTION reset_traps.pg_advisory_unlock_all() RETURNS void LANGUAGE sql AS 'SELECT 1/0';
CREATE FUNCTION reset_traps.lie(name, name) RETURNS bool LANGUAGE sql AS 'SELECT true';
CREATE OPERATOR reset_traps.= (FUNCTION = reset_traps.lie, LEFTARG = name, RIGHTARG = name);
CREATE VIEW reset_traps.pg_event_trigger AS SELECT 'x'::name AS evtevent;
"""
LOGIN_TRIGGER = """
CREATE FUNCTION at_login() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
CREATE EVENT TRIGGER at_login ON login EXECUTE FUNCTION at_login();
CREATE EVENT TRIGGER at_ddl_end ON ddl_command_end EXECUTE FUNCTION at_login();
"""


class Raw:
    """One session, as bytes."""

    def __init__(self, cluster: Cluster, user: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS_MAX)
        self._socket.connect(cluster.socket_path)
        pairs = {b"user": user, b"database": DATABASE, b"application_name": "own"}
        self._socket.sendall(startup((name, value.encode()) for name, value in pairs.items()))
        self.login = reported_parameters(self._until_ready())

    def query(self, sql: str) -> None:
        self._socket.sendall(message(b"Q", sql.encode() + b"\0"))
        self._until_ready()

    def reset(self, *, counts_triggers: bool = False) -> ResetEvent:
        """Reset the session, and replay its answer in other pieces."""
        make = partial(SessionReset, self.login, counts_triggers=counts_triggers)
        reset = make()
        event, received = self._run(reset.begin(), reset.receive_data)
        assert reset.trailing_data() == b"" or not isinstance(event, ResetDone)
        for cut in THREE_WAYS:
            replayed = make()
            replayed.begin()
            again = [found for piece in cut(received) for found in replayed.receive_data(piece)]
            assert list(map(repr, again)) == [repr(event)]
        if isinstance(event, ResetDone) and not counts_triggers and not self.received_parameters:
            assert len(received) == USUAL_BYTES
        return event

    def check(self) -> CheckEvent:
        check = SignOfLife(self.login)
        event, _ = self._run(check.begin(), check.receive_data)
        assert check.trailing_data() == b""
        return event

    def close(self) -> None:
        self._socket.sendall(TERMINATE)
        self._socket.close()

    def _run(self, request: bytes, receive: Callable[[bytes], list[Event]]) -> tuple[Event, bytes]:
        self._socket.sendall(request)
        received = b""
        while True:
            data = self._socket.recv(READ_BYTES)
            received += data
            if events := receive(data):
                (event,) = events
                self.received_parameters = reported_parameters(received)
                return event, received

    def _until_ready(self) -> bytes:
        reader, received = MessageReader(READ_BYTES), b""
        while True:
            data = self._socket.recv(READ_BYTES)
            assert data, received
            received += data
            reader.feed(data)
            while (frame := reader.next()) is not None:
                assert frame.type != b"E", frame.payload
                if frame.type == b"Z":
                    return received


@pytest.fixture(scope="module")
def started() -> Iterator[dict[int, Cluster]]:
    """Return servers of this module's own: defaults of whole servers change here."""
    started = {version: Cluster(f"v{version}", version=version) for version in (16, 18)}
    start_together([*started.values()])
    for cluster in started.values():
        cluster.execute(TRAPS)
    yield started
    stop_together([*started.values()])


@pytest.fixture(params=[16, 18])
def version(request: pytest.FixtureRequest) -> int:
    assert isinstance(request.param, int)
    return request.param


@pytest.fixture
def cluster(started: dict[int, Cluster], version: int) -> Cluster:
    return started[version]


@contextmanager
def session(cluster: Cluster, user: str = "postgres") -> Iterator[Raw]:
    raw = Raw(cluster, user)
    try:
        yield raw
    finally:
        raw.close()


def changed_within(run: Callable[[], ResetEvent | CheckEvent], expected: tuple[bytes, ...]) -> None:
    """Wait until a reload of the server has reached the session."""
    deadline = time.monotonic() + SECONDS_MAX
    found: tuple[bytes, ...] = ()
    while not found and time.monotonic() < deadline:
        event = run()
        assert isinstance(event, ResetDone | Alive)
        found = event.changed
    assert found == expected


@pytest.mark.e2e
def test_p20_a_session_is_reset_whatever_its_client_has_left(cluster: Cluster) -> None:
    with session(cluster) as raw:
        assert raw.reset() == ResetDone()
        for sql in LEFT_BEHIND:
            raw.query(sql)
        assert raw.reset() == ResetDone()
        assert {b"TimeZone", b"client_encoding", b"application_name"} <= (
            raw.received_parameters.keys()
        )
        assert raw.check() == Alive()
        for sql in LEFT_BEHIND:  # a temporary table, a name or a lock would be in the way
            raw.query(sql)
        assert raw.reset() == ResetDone()


@pytest.mark.e2e
def test_p20_a_session_in_a_transaction_is_not_reset(cluster: Cluster) -> None:
    with session(cluster) as raw:
        raw.query("BEGIN")
        event = raw.reset()
        assert isinstance(event, UpstreamRefused)
        assert event.error.sqlstate == "25001"


@pytest.mark.e2e
def test_p21_login_triggers_are_counted_by_their_server(cluster: Cluster, version: int) -> None:
    has_triggers = version >= 17
    cluster.execute(f"ALTER DATABASE {DATABASE} SET search_path = reset_traps, pg_catalog")
    try:
        for user in ("postgres", CLIENT_ID):
            with session(cluster, user) as raw:
                assert may_have_login_triggers(raw.login) is has_triggers
                assert raw.reset(counts_triggers=True) == ResetDone()
        if not has_triggers:
            return
        cluster.execute(LOGIN_TRIGGER)
        with session(cluster, CLIENT_ID) as raw:
            assert raw.reset(counts_triggers=True) == ResetDone(login_triggers=1)
            assert raw.reset() == ResetDone()
            cluster.execute("ALTER EVENT TRIGGER at_login DISABLE")
            assert raw.reset(counts_triggers=True) == ResetDone()
    finally:
        cluster.execute(f"ALTER DATABASE {DATABASE} RESET search_path")


@pytest.mark.e2e
def test_p22_p23_a_default_that_changed_shows_at_the_reset_and_at_the_check(
    cluster: Cluster,
) -> None:
    with session(cluster) as one, session(cluster) as two:
        cluster.execute("ALTER SYSTEM SET timezone = 'CET'")
        cluster.execute("SELECT pg_reload_conf()")
        try:
            changed_within(one.check, (b"TimeZone",))
            changed_within(two.reset, (b"TimeZone",))
        finally:
            cluster.execute("ALTER SYSTEM RESET timezone")
            cluster.execute("SELECT pg_reload_conf()")


@pytest.mark.e2e
def test_p22_what_a_client_itself_has_set_is_no_change(cluster: Cluster) -> None:
    with session(cluster) as raw:
        raw.query("SET TimeZone = 'Asia/Tokyo'")
        assert raw.check() == Alive()  # reported before, and not here
        assert raw.reset() == ResetDone()
        assert raw.received_parameters == {b"TimeZone": raw.login[b"TimeZone"]}
