"""Random walks: no order of inputs, legal or not, breaks a machine's promises."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy.wire.client_startup import (
    CLIENT_TABLE,
    EARLY_BYTES_MAX,
    ClientEvent,
    ClientStartup,
    ClientState,
    Disconnected,
    Violated,
)
from proxy.wire.messages import ErrorResponse
from proxy.wire.secret import Secret
from proxy.wire.startup import FIRST_PACKET_BYTES_MAX, V3_0, V3_2, ProtocolVersion, StartupMessage
from proxy.wire.upstream_startup import (
    HELD_BYTES_MAX,
    HELD_MESSAGE_BYTES_MAX,
    PasswordRequested,
    UpstreamDisconnected,
    UpstreamEvent,
    UpstreamReady,
    UpstreamRefused,
    UpstreamStartup,
    UpstreamState,
    UpstreamViolated,
)
from proxy.wire.violations import StateMachineMisuse
from tests.property.test_splits import CLIENT_PIECES, UPSTREAM_PIECES
from tests.wire.driving import AUTHENTICATION_OK, READY_FOR_QUERY, message

TOKEN = Secret(b"not-a-real-secret")
REFUSAL = ErrorResponse.fatal("53300", "too many clients already", "reason=too_many_clients")
NOISE = st.binary(max_size=20)

# One read may hold several packets, so it may move a machine several times.
REACHABLE = {(state, following) for (state, _), following in CLIENT_TABLE.items()}
for _ in CLIENT_TABLE:
    REACHABLE |= {(a, d) for a, b in REACHABLE for c, d in REACHABLE if b is c}


class ClientWalk(RuleBasedStateMachine):
    """A client that sends anything, and an owner that calls anything."""

    @initialize(tls_offered=st.booleans())
    def start(self, tls_offered: bool) -> None:
        self.machine = ClientStartup(tls_offered=tls_offered)
        self.events: list[ClientEvent] = []
        self.states = [self.machine.state]

    def arrive(self, data: bytes) -> None:
        if self.machine.state is ClientState.READY:
            with pytest.raises(StateMachineMisuse):
                self.machine.receive_data(data)
            return
        self.record(self.machine.receive_data(data))

    def record(self, events: list[ClientEvent]) -> None:
        self.events += events
        self.states.append(self.machine.state)

    def call(self, verb: Callable[[], object]) -> None:
        before = self.machine.state
        try:
            verb()
        except StateMachineMisuse:
            assert self.machine.state is before
        self.states.append(self.machine.state)

    @rule(data=st.sampled_from(CLIENT_PIECES))
    def receive_a_packet(self, data: bytes) -> None:
        self.arrive(data)

    @rule(data=st.sampled_from(CLIENT_PIECES), at=st.integers(0, 20))
    def receive_part_of_a_packet(self, data: bytes, at: int) -> None:
        self.arrive(data[:at])

    @rule(data=NOISE)
    def receive_noise(self, data: bytes) -> None:
        self.arrive(data)

    @rule(size=st.sampled_from([EARLY_BYTES_MAX // 2, EARLY_BYTES_MAX + 1]))
    def receive_much(self, size: int) -> None:
        self.arrive(bytes(size))

    @rule()
    def receive_eof(self) -> None:
        self.record(self.machine.receive_eof())

    @rule()
    def start_tls(self) -> None:
        self.call(self.machine.tls_started)

    @rule()
    def accept(self) -> None:
        self.call(lambda: self.machine.accept(READY_FOR_QUERY))

    @rule()
    def refuse(self) -> None:
        self.call(lambda: self.machine.refuse(REFUSAL))

    @invariant()
    def failed_and_cancel_are_sinks(self) -> None:
        for sink in (ClientState.FAILED, ClientState.CANCEL):
            if sink in self.states:
                assert set(self.states[self.states.index(sink) :]) == {sink}

    @invariant()
    def every_move_is_one_or_several_of_the_table(self) -> None:
        for state, following in pairwise(self.states):
            assert state is following or (state, following) in REACHABLE

    @invariant()
    def a_violation_or_the_end_is_the_last_event(self) -> None:
        assert not any(isinstance(event, Violated | Disconnected) for event in self.events[:-1])

    @invariant()
    def what_is_held_is_bounded(self) -> None:
        held = len(self.machine._buffer)
        match self.machine.state:
            case ClientState.AWAIT_STARTUP:
                assert held < FIRST_PACKET_BYTES_MAX
            case ClientState.AWAIT_TLS | ClientState.CANCEL:
                assert held == 0
            case ClientState.AWAIT_BACKEND | ClientState.READY | ClientState.FAILED:
                assert held <= EARLY_BYTES_MAX


class UpstreamWalk(RuleBasedStateMachine):
    """An upstream that sends anything, and an owner that calls anything."""

    @initialize(inside_tls=st.booleans())
    def start(self, inside_tls: bool) -> None:
        self.machine = UpstreamStartup()
        self.events: list[UpstreamEvent] = []
        self.states = [self.machine.state]
        self.passwords_given = 0
        if inside_tls:
            self.arrive(b"S")
            self.call(self.machine.tls_started)

    def arrive(self, data: bytes) -> None:
        if self.machine.state is UpstreamState.READY and data:
            with pytest.raises(StateMachineMisuse):
                self.machine.receive_data(data)
            return
        self.record(self.machine.receive_data(data))

    def record(self, events: list[UpstreamEvent]) -> None:
        self.events += events
        self.states.append(self.machine.state)

    def call(self, verb: Callable[[], object]) -> bool:
        before = self.machine.state
        try:
            verb()
        except StateMachineMisuse:
            assert self.machine.state is before
            return False
        self.states.append(self.machine.state)
        return True

    @rule(data=st.sampled_from([*UPSTREAM_PIECES, b"S", b"N", b"E"]))
    def receive_a_message(self, data: bytes) -> None:
        self.arrive(data)

    @rule(data=st.lists(st.sampled_from(UPSTREAM_PIECES), max_size=5).map(b"".join))
    def receive_several_messages(self, data: bytes) -> None:
        self.arrive(data)

    @rule(data=st.sampled_from(UPSTREAM_PIECES), at=st.integers(0, 20))
    def receive_part_of_a_message(self, data: bytes, at: int) -> None:
        self.arrive(data[:at])

    @rule(data=NOISE)
    def receive_noise(self, data: bytes) -> None:
        self.arrive(data)

    @rule(size=st.sampled_from([HELD_MESSAGE_BYTES_MAX, HELD_MESSAGE_BYTES_MAX + 1]))
    def receive_much(self, size: int) -> None:
        self.arrive(message(b"A", bytes(size)) + message(b"N", b"M" + b"x" * 60_000 + b"\0\0"))

    @rule()
    def log_in(self) -> None:
        self.arrive(AUTHENTICATION_OK)

    @rule()
    def receive_eof(self) -> None:
        self.record(self.machine.receive_eof())

    @rule()
    def start_tls(self) -> None:
        self.call(self.machine.tls_started)

    @rule(version=st.sampled_from([V3_0, V3_2]))
    def send_startup(self, version: ProtocolVersion) -> None:
        self.call(lambda: self.machine.startup(StartupMessage(version, ())))

    @rule()
    def give_password(self) -> None:
        self.passwords_given += self.call(lambda: self.machine.password(TOKEN))

    @rule()
    def answer_sasl(self) -> None:
        self.call(lambda: self.machine.sasl_initial_response(b"SCRAM-SHA-256", b"n,,"))
        self.call(lambda: self.machine.sasl_response(b"c=biws"))

    @rule()
    def welcome(self) -> None:
        ready = self.machine.state is UpstreamState.READY
        assert self.call(lambda: self.machine.welcome(self.machine.key)) is ready

    @invariant()
    def failed_and_ready_are_sinks(self) -> None:
        for sink in (UpstreamState.FAILED, UpstreamState.READY):
            if sink in self.states:
                assert set(self.states[self.states.index(sink) :]) == {sink}

    @invariant()
    def an_end_is_the_last_event(self) -> None:
        ends = UpstreamViolated | UpstreamRefused | UpstreamDisconnected | UpstreamReady
        assert not any(isinstance(event, ends) for event in self.events[:-1])

    @invariant()
    def a_password_is_given_once_and_only_when_asked_for_inside_tls(self) -> None:
        asked = sum(isinstance(event, PasswordRequested) for event in self.events)
        assert self.passwords_given <= asked <= 1
        assert not asked or UpstreamState.AWAIT_AUTHENTICATION in self.states

    @invariant()
    def what_is_held_is_bounded(self) -> None:
        assert sum(map(len, self.machine._before_key)) <= HELD_BYTES_MAX
        assert sum(map(len, self.machine._held)) <= HELD_BYTES_MAX
        if self.machine.state in (UpstreamState.AWAIT_AUTHENTICATION, UpstreamState.AWAIT_READY):
            assert len(self.machine._reader._buffer) < HELD_MESSAGE_BYTES_MAX + 5


TestClientWalk = ClientWalk.TestCase
TestUpstreamWalk = UpstreamWalk.TestCase
