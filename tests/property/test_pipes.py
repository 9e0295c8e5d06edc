"""Both startup machines between a client and an upstream, over streams of 8 bytes.

A whole session start. Who moves when, and how far, is drawn; it must not matter: what each peer
has received in the end is a function of what the peers said, and equal to the same start over
streams without a limit. The one exception is a client that leaves while it is being served.
"""

from dataclasses import dataclass
from enum import Enum, auto

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from proxy.wire.client_startup import (
    CancelReceived,
    ClientEvent,
    ClientStartup,
    ClientState,
    DirectTLSReceived,
    Disconnected,
    EncryptionAnswered,
    StartupReceived,
    VersionNegotiated,
    Violated,
)
from proxy.wire.messages import ErrorResponse
from proxy.wire.secret import Secret
from proxy.wire.startup import StartupMessage
from proxy.wire.upstream_message import upstream_message
from proxy.wire.upstream_startup import (
    PasswordRequested,
    SASLContinued,
    SASLFinished,
    SASLRequested,
    TLSAccepted,
    TLSRefused,
    UpstreamDisconnected,
    UpstreamEvent,
    UpstreamReady,
    UpstreamRefused,
    UpstreamStartup,
    UpstreamState,
    UpstreamViolated,
)
from proxy.wire.violations import ClientViolation
from tests.support.cuts import at_offsets
from tests.support.pipes import PIPE_BYTES_MAX, Duplex, Pipe
from tests.support.script import Action, Expect, Script, Send, Step
from tests.wire.driving import (
    AUTHENTICATION_OK,
    BACKEND_KEY_DATA,
    CLEARTEXT_PASSWORD,
    READY_FOR_QUERY,
    SSL_REQUEST,
    message,
    startup,
)

NO_LIMIT = 1 << 30
TOKEN = b"not-a-real-secret"
PAIRS = [(b"user", b"app"), (b"database", b"main"), (b"application_name", b"worker 7")]
REFUSED = ErrorResponse.fatal("08006", "upstream failed", "reason=upstream_protocol")
ERROR = message(b"E", b"SFATAL\0C57P01\0Mterminating connection\0\0")
NOTICE = message(b"N", b"SNOTICE\0Mmind the \xff\0\0")
HELD = [NOTICE, message(b"S", b"TimeZone\0Etc/UTC\0"), message(b"y", b"from a later version")]
PASSWORD = message(b"p", TOKEN + b"\0")
SASL_FIRST = message(b"p", b"SCRAM-SHA-256\0" + b"\0\0\0\3n,,")
SASL_SECOND = message(b"p", b"c=biws")
# Each question of the login, and the whole of the answer that it waits for.
LOGINS: dict[str, list[tuple[bytes, bytes]]] = {
    "nothing": [],
    "password": [(CLEARTEXT_PASSWORD, PASSWORD)],
    "SASL": [
        (message(b"R", b"\0\0\0\x0aSCRAM-SHA-256\0\0"), SASL_FIRST),
        (message(b"R", b"\0\0\0\x0bchallenge"), SASL_SECOND),
    ],
}
SASL_FINAL = message(b"R", b"\0\0\0\x0cproof")


@dataclass(frozen=True)
class Scenario:
    """What the peers say when nothing goes wrong, and what each has received in the end."""

    login: str
    early_notice: bytes
    before_key: bytes
    key: bytes
    after_key: bytes
    trailing: bytes
    early: bytes  # what the client sends after its StartupMessage
    waits: bool  # the client hears the answer to its SSLRequest before it goes on
    piece_bytes: int  # how much a peer says at once, at most

    @property
    def client_steps(self) -> list[Step]:
        """The steps of the client."""
        opening = [*self._said(SSL_REQUEST), *([Expect(b"N")] if self.waits else [])]
        return [*opening, *self._said(startup(PAIRS) + self.early)]

    @property
    def upstream_steps(self) -> list[Step]:
        """The steps of the upstream."""
        steps: list[Step] = [Expect(SSL_REQUEST), Send(b"S"), Expect(startup(PAIRS))]
        said = self.early_notice
        for question, answer in LOGINS[self.login]:
            steps += [*self._said(said + question), Expect(answer)]
            said = b""
        final = SASL_FINAL if self.login == "SASL" else b""
        welcome = self.before_key + self.key + self.after_key + READY_FOR_QUERY
        return steps + self._said(said + final + AUTHENTICATION_OK + welcome + self.trailing)

    @property
    def client_receives(self) -> bytes:
        """The bytes that the client is sent."""
        held = self.early_notice + self.before_key + self.key + self.after_key
        return b"N" + AUTHENTICATION_OK + held + READY_FOR_QUERY + self.trailing

    @property
    def upstream_receives(self) -> bytes:
        """The bytes that the upstream is sent."""
        answers = b"".join(answer for _, answer in LOGINS[self.login])
        return SSL_REQUEST + startup(PAIRS) + answers + self.early

    def _said(self, content: bytes) -> list[Step]:
        offsets = range(self.piece_bytes, len(content), self.piece_bytes)
        return [Send(piece) for piece in at_offsets(content, offsets)]


MESSAGES = st.lists(st.sampled_from(HELD), max_size=2).map(b"".join)
SCENARIOS = st.builds(
    Scenario,
    login=st.sampled_from(sorted(LOGINS)),
    early_notice=st.sampled_from([b"", NOTICE]),
    before_key=MESSAGES,
    key=st.sampled_from([b"", BACKEND_KEY_DATA]),
    after_key=MESSAGES,
    trailing=st.binary(max_size=30),
    early=st.binary(max_size=30),
    waits=st.booleans(),
    piece_bytes=st.sampled_from([7, 40, 1000]),
)


class Side(Enum):
    """A peer of the proxy."""

    CLIENT = auto()
    UPSTREAM = auto()


@dataclass(frozen=True)
class Fault:
    """What a peer does instead of its script, from its step `at` on; no bytes: it ends."""

    side: Side
    at: int
    said: bytes


class PipePeer:
    """Goes through its steps at one end of a duplex pipe; keeps what it receives."""

    def __init__(self, steps: list[Step], outgoing: Pipe) -> None:
        self.script = Script(steps)
        self.outgoing = outgoing
        self.received = bytearray()
        self.saw_end = False
        self._next: Action | None = None

    @property
    def done(self) -> int:
        """The number of actions that are over."""
        return self.script.actions_taken - (self._next is not None)

    @property
    def may_speak(self) -> bool:
        """Whether there is an action to take now."""
        if self._next is None:
            self._next = self.script.next_action()
        return self._next is not None and not self.outgoing.ended

    def speak(self) -> None:
        """Take the next action."""
        assert isinstance(self._next, Send)
        self.outgoing.write(self._next.content)
        self._next = None

    def receive(self, read: bytes) -> None:
        """Take what arrives, or the end."""
        self.received += read
        self.saw_end = not read
        self.script.receive_data(read)

    def fail(self, fault: Fault) -> None:
        """Send something else, or end."""
        if fault.said:
            self.outgoing.write(fault.said)
        else:
            self.outgoing.end()


class SessionStart:
    """The two machines, their owner, and a peer on each side."""

    def __init__(self, scenario: Scenario, limit: int) -> None:
        front, back = Duplex(limit), Duplex(limit)
        self.pipes = [front.there, front.back, back.there, back.back]
        self.to_client, self.to_upstream = front.back, back.there
        self.peers = {
            Side.CLIENT: PipePeer(scenario.client_steps, front.there),
            Side.UPSTREAM: PipePeer(scenario.upstream_steps, back.back),
        }
        self.client = ClientStartup()
        self.upstream = UpstreamStartup()
        self.dialled: StartupMessage | None = None
        self.states: list[tuple[ClientState, UpstreamState]] = []
        self._told_end: set[int] = set()

    def move(self, number: int, count: int) -> bool:
        """Read up to so many bytes, or the end, from a pipe; return whether anything moved."""
        if number == 3 and self.dialled is None:
            return False  # the upstream is not connected yet
        pipe = self.pipes[number]
        read = pipe.read(count)
        if not read and (not pipe.at_end or number in self._told_end):
            return False
        if not read:
            self._told_end.add(number)
        match number:
            case 0:
                self._client_said(read)
            case 1:
                self.peers[Side.CLIENT].receive(read)
            case 2:
                self.peers[Side.UPSTREAM].receive(read)
            case _:
                self._upstream_said(read)
        self.states.append((self.client.state, self.upstream.state))
        return True

    def finish(self, count: int, fault: Fault | None = None) -> None:
        """Move and speak in a fixed order until nothing moves; `fault` comes at its step."""
        while True:
            if fault is not None and self.may_come(fault):
                self.peers[fault.side].fail(fault)
                fault = None
            speakers = [peer for peer in self.peers.values() if peer.may_speak]
            if speakers:
                speakers[0].speak()
            elif sum(self.move(number, count) for number in range(len(self.pipes))) == 0:
                return  # no pipe moved

    def may_come(self, fault: Fault) -> bool:
        """Whether it is the fault's step, and a moment at which it could happen."""
        peer = self.peers[fault.side]
        # Between its S and the StartupMessage there is TLS, which lets nothing foreign through.
        in_tls = fault.side is Side.UPSTREAM and peer.done == 1 and not peer.may_speak
        return peer.done == fault.at and not (fault.said and in_tls)

    def heard(self) -> list[tuple[bytes, bool]]:
        """Return what each peer has received, and whether it saw the end."""
        return [(bytes(peer.received), peer.saw_end) for peer in self.peers.values()]

    # -- the owner's part ------------------------------------------------------------------------

    def _client_said(self, read: bytes) -> None:
        if self.client.state is ClientState.READY:
            self._relay(read, self.to_upstream)
            return
        for event in self.client.receive_data(read) if read else self.client.receive_eof():
            self._act_on_client(event)

    def _upstream_said(self, read: bytes) -> None:
        if self.upstream.state is UpstreamState.READY:
            self._relay(read, self.to_client)
            return
        for event in self.upstream.receive_data(read) if read else self.upstream.receive_eof():
            self._act_on_upstream(event)

    @staticmethod
    def _relay(read: bytes, pipe: Pipe) -> None:
        if not read:
            pipe.end()
        elif not pipe.ended:
            pipe.write(read)

    def _act_on_client(self, event: ClientEvent) -> None:
        match event:
            case EncryptionAnswered(reply) | VersionNegotiated(reply):
                self.to_client.write(reply)
            case StartupReceived(asked):
                self._dial(asked)
            case Violated(reply=reply) | Disconnected(reply=reply):
                self._end_both(reply)
            case CancelReceived() | DirectTLSReceived():
                raise AssertionError(event)

    def _dial(self, asked: StartupMessage) -> None:
        try:
            self.dialled = upstream_message(asked, asked.get(b"user") or b"", b"main")
        except ClientViolation as violation:
            refusal = ErrorResponse.fatal(violation.sqlstate, violation.message)
            self._end_both(self.client.refuse(refusal))
            return
        self.to_upstream.write(self.upstream.request_tls())

    def _act_on_upstream(self, event: UpstreamEvent) -> None:
        match event:
            case TLSAccepted():
                self.upstream.tls_started()
                assert self.dialled is not None
                self._answer(self.upstream.startup(self.dialled))
            case PasswordRequested():
                self._answer(self.upstream.password(Secret(TOKEN)))
            case SASLRequested():
                self._answer(self.upstream.sasl_initial_response(b"SCRAM-SHA-256", b"n,,"))
            case SASLContinued():
                self._answer(self.upstream.sasl_response(b"c=biws"))
            case SASLFinished():
                pass
            case UpstreamReady():
                self._couple()
            case UpstreamRefused(error):
                self._refuse(error)
            case UpstreamViolated() | UpstreamDisconnected() | TLSRefused():
                self._refuse(REFUSED)

    def _answer(self, said: bytes) -> None:
        if not self.to_upstream.ended:
            self.to_upstream.write(said)

    def _couple(self) -> None:
        if self.client.state is not ClientState.AWAIT_BACKEND:
            return  # the client has left
        self.to_client.write(self.client.accept(self.upstream.welcome(self.upstream.key)))
        self.to_client.write(self.upstream.trailing_data())
        self.to_upstream.write(self.client.trailing_data())

    def _refuse(self, error: ErrorResponse) -> None:
        if self.client.state is ClientState.AWAIT_BACKEND:
            self._end_both(self.client.refuse(error))

    def _end_both(self, reply: bytes) -> None:
        self.to_client.write(reply)
        self.to_client.end()
        self.to_upstream.end()


# None of it begins as an answer to SSLRequest does.
GARBAGE = [b"\xff", b"\0\0\0\0", b"GET / HTTP/1.1\r\n", b"X\xff\xff\xff\xff", b"A\0\0\0\5a"]


class SessionStartWalk(RuleBasedStateMachine):
    """Any order of moves, and at most one fault."""

    # `calm`: so many moves come before a fault, else most would hit the first packet.
    @initialize(scenario=SCENARIOS, calm=st.sampled_from([0, 20, 60, 120]))
    def start(self, scenario: Scenario, calm: int) -> None:
        self.calm = calm
        self.scenario = scenario
        self.session = SessionStart(scenario, PIPE_BYTES_MAX)
        self.fault: Fault | None = None
        self.raced = False

    @rule(number=st.integers(0, 3), count=st.integers(1, PIPE_BYTES_MAX))
    def move(self, number: int, count: int) -> None:
        self.session.move(number, count)

    @rule(
        numbers=st.permutations(range(4)),
        count=st.integers(1, PIPE_BYTES_MAX),
        rounds=st.integers(1, 20),
    )
    def move_on(self, numbers: list[int], count: int, rounds: int) -> None:
        for _ in range(rounds):
            for number in numbers:
                self.session.move(number, count)

    @rule(side=st.sampled_from(Side), steps=st.integers(1, 5))
    def speak(self, side: Side, steps: int) -> None:
        for _ in range(steps):
            if self.session.peers[side].may_speak:
                self.session.peers[side].speak()

    @precondition(lambda self: self.may_fail())
    @rule(side=st.sampled_from(Side))
    def end_early(self, side: Side) -> None:
        self.fail(side, b"")

    @precondition(lambda self: self.may_fail())
    @rule()
    def upstream_fails(self) -> None:
        self.inject(Side.UPSTREAM, ERROR)

    @precondition(lambda self: self.may_fail())
    @rule(side=st.sampled_from(Side), garbage=st.sampled_from(GARBAGE))
    def send_garbage(self, side: Side, garbage: bytes) -> None:
        self.inject(side, garbage)

    def may_fail(self) -> bool:
        return self.fault is None and len(self.session.states) >= self.calm

    def inject(self, side: Side, said: bytes) -> None:
        fault = Fault(side, self.session.peers[side].done, said)
        if self.session.may_come(fault):
            self.fail(side, said)

    def fail(self, side: Side, said: bytes) -> None:
        peer = self.session.peers[side]
        self.fault = Fault(side, peer.done, said)
        steps = self.scenario.client_steps
        pieces = [step.content for step in steps if isinstance(step, Send)]
        sent = sum(len(piece) for piece in pieces[: peer.done])
        whole = len(SSL_REQUEST) + len(startup(PAIRS))
        self.raced = side is Side.CLIENT and not said and sent >= whole
        peer.fail(self.fault)

    @invariant()
    def no_pipe_holds_more_than_its_limit(self) -> None:
        assert all(pipe.held_max <= PIPE_BYTES_MAX for pipe in self.session.pipes)

    @invariant()
    def failed_is_a_sink(self) -> None:
        clients = [client for client, _ in self.session.states]
        upstreams = [upstream for _, upstream in self.session.states]
        if ClientState.FAILED in clients:
            assert set(clients[clients.index(ClientState.FAILED) :]) == {ClientState.FAILED}
        if UpstreamState.FAILED in upstreams:
            assert set(upstreams[upstreams.index(UpstreamState.FAILED) :]) == {UpstreamState.FAILED}

    @invariant()
    def a_client_hears_of_no_login_before_its_upstream_is_ready(self) -> None:
        if self.session.upstream.state is not UpstreamState.READY:
            said = bytes(self.session.peers[Side.CLIENT].received).removeprefix(b"N")
            assert said[:1] in (b"", b"E")

    def teardown(self) -> None:
        if not hasattr(self, "session"):
            return
        self.session.finish(PIPE_BYTES_MAX)
        client, upstream = self.session.peers.values()
        everything = [(self.scenario.client_receives, False)]
        everything += [(self.scenario.upstream_receives, False)]
        if self.fault is None:
            assert self.session.heard() == everything
        elif self.raced:
            # It may have been served, and then all arrived; or not, and then nothing was said.
            assert client.received in (b"N", self.scenario.client_receives)
            assert self.scenario.upstream_receives.startswith(bytes(upstream.received))
            assert upstream.saw_end
        else:
            reference = SessionStart(self.scenario, NO_LIMIT)
            reference.finish(NO_LIMIT, self.fault)
            assert self.session.heard() == reference.heard()
        self.no_pipe_holds_more_than_its_limit()
        self.failed_is_a_sink()


TestSessionStartWalk = SessionStartWalk.TestCase


def test_a_pipe_takes_up_to_its_limit_and_the_rest_waits_in_order() -> None:
    pipe = Pipe(8)
    pipe.write(b"0123456789")
    pipe.end()
    assert pipe.read(100) == b"01234567"
    assert not pipe.at_end
    assert pipe.read(1) == b"8"
    assert pipe.read(8) == b"9"
    assert (pipe.read(8), pipe.at_end, pipe.held_max) == (b"", True, 8)


def test_after_its_end_a_pipe_takes_nothing() -> None:
    pair = Duplex()
    pair.there.end()
    with pytest.raises(AssertionError, match="after the end"):
        pair.there.write(b"x")
    pair.back.write(b"the other direction goes on")
