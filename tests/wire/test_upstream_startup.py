"""The upstream's machine against the document's cases, and against every entry of its own table."""

import itertools
from collections.abc import Callable
from typing import Final

import pytest

from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, V3_2, ProtocolVersion, StartupMessage
from proxy.wire.upstream_startup import (
    HELD_BYTES_MAX,
    HELD_MESSAGE_BYTES_MAX,
    UPSTREAM_TABLE,
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
    UpstreamStep,
    UpstreamViolated,
)
from proxy.wire.violations import (
    StateMachineMisuse,
    UnsupportedAuthentication,
    UpstreamViolation,
)
from tests.support.cuts import byte_by_byte, three_ways
from tests.wire.driving import (
    AUTHENTICATION_OK,
    BACKEND_KEY_DATA,
    CLEARTEXT_PASSWORD,
    READY_FOR_QUERY,
    STARTUP,
    feed_upstream,
    message,
    shown,
)

TOKEN = Secret(b"not-a-real-secret")
MESSAGE = StartupMessage(V3_0, ((b"user", b"app"), (b"database", b"main")))
SASL = message(b"R", b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
SASL_CONTINUE = message(b"R", b"\0\0\0\x0br=abc,s=ZGVm,i=4096")
SASL_FINAL = message(b"R", b"\0\0\0\x0cv=abc")
MD5 = message(b"R", b"\0\0\0\x05salt")
PARAMETER = message(b"S", b"TimeZone\0Etc/UTC\0")
NOTICE = message(b"N", b"SNOTICE\0VNOTICE\0C00000\0Mhello\0\0")
REFUSAL = message(b"E", b"SFATAL\0VFATAL\0C3D000\0Mno such database\0Rx\0?y\0\0")
NOTIFICATION = message(b"A", b"\0\0\0\1channel\0payload\0")
V_30 = bytes.fromhex("76 00 00 00 0c 00 03 00 00 00 00 00 00")
V_32 = bytes.fromhex("76 00 00 00 0c 00 03 00 02 00 00 00 00")


def inside_tls() -> UpstreamStartup:
    """Return a machine that has sent its StartupMessage inside TLS."""
    machine = UpstreamStartup()
    machine.request_tls()
    assert machine.receive_data(b"S") == [TLSAccepted()]
    machine.tls_started()
    machine.startup(MESSAGE)
    return machine


def logged_in() -> UpstreamStartup:
    machine = inside_tls()
    assert machine.receive_data(AUTHENTICATION_OK) == []
    return machine


def one_violation(stream: bytes, start: Callable[[], UpstreamStartup] = inside_tls) -> str:
    """Feed the stream all three ways; return the violation that it always ends with, in words."""
    found: set[str] = set()
    for chunks in three_ways(stream):
        machine = start()
        events = feed_upstream(machine, chunks)
        assert machine.state is UpstreamState.FAILED
        assert isinstance(events[-1], UpstreamViolated)
        found.add(shown(events)[-1])
    assert len(found) == 1
    return found.pop()


# -- W52: the start of TLS -----------------------------------------------------------------------


def test_w52_ssl_request_goes_out_alone() -> None:
    assert UpstreamStartup().request_tls() == bytes.fromhex("00 00 00 08 04 d2 16 2f")


def test_w52_s_starts_tls() -> None:
    machine = UpstreamStartup()
    assert machine.receive_data(b"\x53") == [TLSAccepted()]
    assert machine.state is UpstreamState.AWAIT_TLS
    machine.tls_started()
    assert machine.startup(MESSAGE) == STARTUP


def test_w52_bytes_after_s_are_an_injection() -> None:
    for following in (b"\0", b"S", READY_FOR_QUERY, AUTHENTICATION_OK + READY_FOR_QUERY):
        for chunks in ([b"S" + following], [b"S", following], byte_by_byte(b"S" + following)):
            machine = UpstreamStartup()
            events = feed_upstream(machine, chunks)
            assert isinstance(events[-1], UpstreamViolated)
            assert "after the answer to SSLRequest" in str(events[-1].violation)
            assert machine.state is UpstreamState.FAILED
            with pytest.raises(StateMachineMisuse):
                machine.tls_started()


@pytest.mark.parametrize("following", [b"", b"N", READY_FOR_QUERY])
def test_w52_n_is_the_end_and_never_plaintext(following: bytes) -> None:
    machine = UpstreamStartup()
    assert machine.receive_data(b"\x4e" + following) == [TLSRefused()]
    assert machine.state is UpstreamState.FAILED
    for verb in (lambda: machine.startup(MESSAGE), machine.tls_started):
        with pytest.raises(StateMachineMisuse):
            verb()


@pytest.mark.parametrize("reply", [b"\x45", REFUSAL])
def test_w52_an_error_in_plaintext_is_not_believed(reply: bytes) -> None:
    assert one_violation(reply, UpstreamStartup) == (
        "UpstreamViolated UpstreamViolation an error in plaintext instead of TLS"
    )


@pytest.mark.parametrize("reply", [b"\0", b"G", b"s", b"\x15", b"HTTP/1.1 400", b"\xff"])
def test_w52_any_other_answer_is_a_violation(reply: bytes) -> None:
    assert "neither S nor N" in one_violation(reply, UpstreamStartup)


def test_w52_no_credential_leaves_before_tls() -> None:
    for machine in (UpstreamStartup(), in_state(UpstreamState.AWAIT_TLS)):
        for verb in ("startup", "password", "sasl_initial_response", "sasl_response"):
            with pytest.raises(StateMachineMisuse):
                VERBS[verb](machine)


@pytest.mark.parametrize("version", [V3_2, ProtocolVersion(3, 1), ProtocolVersion(2, 0)])
def test_the_upstream_is_asked_for_exactly_3_0(version: ProtocolVersion) -> None:
    with pytest.raises(StateMachineMisuse, match=r"exactly 3\.0"):
        inside_tls().startup(StartupMessage(version, ()))


# -- W24 to W27: what the client gets ------------------------------------------------------------

LOGIN = AUTHENTICATION_OK + PARAMETER + BACKEND_KEY_DATA + NOTICE + READY_FOR_QUERY
KEY = BackendKeyData(1234, Secret(b"\1\2\3\4"))


def test_w24_ready_is_told_only_at_the_first_ready_for_query() -> None:
    for chunks in three_ways(LOGIN):
        machine = inside_tls()
        assert feed_upstream(machine, chunks) == [UpstreamReady()]
        assert machine.state is UpstreamState.READY
        assert machine.welcome(KEY) == PARAMETER + BACKEND_KEY_DATA + NOTICE + READY_FOR_QUERY


def test_w24_an_error_after_authentication_ok_is_still_a_refusal() -> None:
    for chunks in three_ways(AUTHENTICATION_OK + PARAMETER + REFUSAL):
        machine = inside_tls()
        [event] = feed_upstream(machine, chunks)
        assert isinstance(event, UpstreamRefused)
        assert event.error.sqlstate == "3D000"


def test_w25_everything_up_to_ready_passes_verbatim_and_in_order() -> None:
    unknown = message(b"\xfe", bytes(range(256)))
    held = [NOTICE, PARAMETER, NOTIFICATION, PARAMETER, unknown, message(b"Q", b""), NOTICE]
    for at in range(len(held) + 1):
        stream = AUTHENTICATION_OK + b"".join(held[:at]) + BACKEND_KEY_DATA
        stream += b"".join(held[at:]) + READY_FOR_QUERY
        for chunks in three_ways(stream):
            machine = inside_tls()
            assert feed_upstream(machine, chunks) == [UpstreamReady()]
            # Without the AuthenticationOk, which the client's machine writes.
            assert machine.welcome(machine.key) == stream[len(AUTHENTICATION_OK) :]


def test_w25_notices_before_authentication_are_kept_in_front() -> None:
    machine = inside_tls()
    machine.receive_data(NOTICE + AUTHENTICATION_OK + PARAMETER + READY_FOR_QUERY)
    assert machine.welcome(None) == NOTICE + PARAMETER + READY_FOR_QUERY


def test_w26_an_upstream_without_a_key_gives_none() -> None:
    for key in (None, KEY):  # and none is put in its place
        machine = inside_tls()
        machine.receive_data(AUTHENTICATION_OK + PARAMETER + READY_FOR_QUERY)
        assert machine.key is None
        assert machine.welcome(key) == PARAMETER + READY_FOR_QUERY


def test_w26_a_key_that_must_not_be_passed_on_can_be_left_out() -> None:
    machine = inside_tls()
    machine.receive_data(LOGIN)
    assert machine.welcome(None) == PARAMETER + NOTICE + READY_FOR_QUERY


@pytest.mark.parametrize(("pid", "key"), [(-1, b"\xff" * 4), (0, b"\0" * 4), (7, bytes(256))])
def test_w26_w27_pid_and_key_are_opaque(pid: int, key: bytes) -> None:
    wire = message(b"K", pid.to_bytes(4, "big", signed=True) + key)
    machine = logged_in()
    machine.receive_data(wire + READY_FOR_QUERY)
    assert machine.key == BackendKeyData(pid, Secret(key))
    assert machine.welcome(machine.key) == wire + READY_FOR_QUERY


@pytest.mark.parametrize("size", [4, 32])
def test_w14_w27_an_own_key_stands_where_the_upstreams_stood(size: int) -> None:
    machine = inside_tls()
    machine.receive_data(LOGIN)
    own = message(b"K", b"\0\0\0\x07" + bytes(size))
    assert machine.welcome(BackendKeyData(7, Secret(bytes(size)))) == (
        PARAMETER + own + NOTICE + READY_FOR_QUERY
    )
    assert machine.key == KEY


def test_w27_a_second_key_is_a_violation() -> None:
    assert "second BackendKeyData" in one_violation(
        AUTHENTICATION_OK + BACKEND_KEY_DATA + BACKEND_KEY_DATA
    )


@pytest.mark.parametrize("size", [0, 3, 257])
def test_w26_a_key_of_an_impossible_length_is_a_violation(size: int) -> None:
    wire = message(b"K", bytes(4 + size))
    assert f"a cancel key of {size} bytes" in one_violation(AUTHENTICATION_OK + wire)


def test_what_comes_after_ready_for_query_is_given_out_once() -> None:
    machine = inside_tls()
    machine.receive_data(LOGIN + NOTIFICATION + b"N\0")
    assert machine.trailing_data() == NOTIFICATION + b"N\0"
    assert machine.trailing_data() == b""
    assert machine.welcome(KEY).endswith(READY_FOR_QUERY)


def test_what_arrives_at_a_machine_that_is_ready_is_not_its_business() -> None:
    # It used to pile up in the machine without a bound, where no relay would look for it.
    machine = inside_tls()
    machine.receive_data(LOGIN)
    with pytest.raises(StateMachineMisuse, match="relayed"):
        machine.receive_data(b"x")
    assert machine.trailing_data() == b""


# -- W28: authentication -------------------------------------------------------------------------


def test_w28_authentication_ok_may_come_at_once() -> None:
    machine = inside_tls()
    assert machine.receive_data(AUTHENTICATION_OK) == []
    assert machine.state is UpstreamState.AWAIT_READY


def test_w28_a_cleartext_password_is_answered() -> None:
    for chunks in three_ways(CLEARTEXT_PASSWORD):
        machine = inside_tls()
        assert feed_upstream(machine, chunks) == [PasswordRequested()]
        assert machine.password(TOKEN) == b"p\0\0\0\x16not-a-real-secret\0"
        assert machine.receive_data(LOGIN) == [UpstreamReady()]


def test_w28_scram_is_carried() -> None:
    machine = inside_tls()
    assert machine.receive_data(SASL) == [SASLRequested((b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"))]
    assert machine.sasl_initial_response(b"SCRAM-SHA-256", b"n,,n=,r=a") == (
        b"p\0\0\0\x1fSCRAM-SHA-256\0" + b"\0\0\0\x09" + b"n,,n=,r=a"
    )
    assert machine.receive_data(SASL_CONTINUE) == [SASLContinued(b"r=abc,s=ZGVm,i=4096")]
    assert machine.sasl_response(b"c=biws") == b"p\0\0\0\x0ac=biws"
    assert machine.receive_data(SASL_FINAL) == [SASLFinished(b"v=abc")]
    assert machine.receive_data(LOGIN) == [UpstreamReady()]


UNSUPPORTED = [
    (MD5, "MD5Password"),
    (message(b"R", b"\0\0\0\2"), "KerberosV5"),
    (message(b"R", b"\0\0\0\6"), "SCMCredential"),
    (message(b"R", b"\0\0\0\7"), "GSS"),
    (message(b"R", b"\0\0\0\x08data"), "GSSContinue"),
    (message(b"R", b"\0\0\0\x09"), "SSPI"),
    (message(b"R", b"\0\0\0\x0d"), "number 13"),
    (message(b"R", b"\xff\xff\xff\xff"), "number -1"),
    (CLEARTEXT_PASSWORD + CLEARTEXT_PASSWORD, "AuthenticationCleartextPassword out of order"),
    (CLEARTEXT_PASSWORD + SASL, "AuthenticationSASL out of order"),
    (CLEARTEXT_PASSWORD + MD5, "MD5Password"),
    (SASL + CLEARTEXT_PASSWORD, "AuthenticationCleartextPassword out of order"),
    (SASL + SASL, "AuthenticationSASL out of order"),
    (SASL + SASL_FINAL, "AuthenticationSASLFinal out of order"),
    (SASL + AUTHENTICATION_OK, "AuthenticationOk out of order"),
    (SASL + SASL_CONTINUE + SASL_CONTINUE, "AuthenticationSASLContinue out of order"),
    # An upstream that does not prove itself is not let in.
    (SASL + SASL_CONTINUE + AUTHENTICATION_OK, "AuthenticationOk out of order"),
    (SASL + SASL_CONTINUE + CLEARTEXT_PASSWORD, "AuthenticationCleartextPassword out of order"),
    (SASL + SASL_CONTINUE + SASL_FINAL + SASL, "AuthenticationSASL out of order"),
    (SASL_CONTINUE, "AuthenticationSASLContinue out of order"),
    (SASL_FINAL, "AuthenticationSASLFinal out of order"),
]


@pytest.mark.parametrize(("stream", "method"), UNSUPPORTED)
def test_w28_any_other_authentication_is_unsupported_and_named(stream: bytes, method: str) -> None:
    assert one_violation(stream) == f"UpstreamViolated UnsupportedAuthentication {method}"


def test_w28_a_password_is_given_once_and_only_when_asked_for() -> None:
    machine = inside_tls()
    with pytest.raises(StateMachineMisuse, match="no PasswordRequested"):
        machine.password(TOKEN)
    machine.receive_data(CLEARTEXT_PASSWORD)
    machine.password(TOKEN)
    with pytest.raises(StateMachineMisuse, match="no PasswordRequested"):
        machine.password(TOKEN)


def test_w28_a_token_never_answers_sasl() -> None:
    machine = inside_tls()
    machine.receive_data(SASL)
    with pytest.raises(StateMachineMisuse, match="no PasswordRequested"):
        machine.password(TOKEN)
    with pytest.raises(StateMachineMisuse, match="no SASLContinued"):
        machine.sasl_response(b"")
    machine.sasl_initial_response(b"SCRAM-SHA-256", b"")
    with pytest.raises(StateMachineMisuse, match="no SASLRequested"):
        machine.sasl_initial_response(b"SCRAM-SHA-256", b"")


@pytest.mark.parametrize(
    "following", [REFUSAL, AUTHENTICATION_OK, LOGIN, MD5, b"R\xff\xff\xff\xff"]
)
def test_w28_a_question_is_answered_whatever_came_with_it(following: bytes) -> None:
    # An upstream that shuts down while it waits for the password sends its FATAL after the
    # question. Read together, the question comes out of a machine that has moved on already, and
    # answering it used to be StateMachineMisuse: the peer could make the proxy raise.
    machine = inside_tls()
    events = machine.receive_data(CLEARTEXT_PASSWORD + following)
    assert events[0] == PasswordRequested()
    assert machine.password(TOKEN) == b"p\0\0\0\x16not-a-real-secret\0"


def test_w28_sasl_questions_that_came_together_are_answered_in_order() -> None:
    machine = inside_tls()
    events = machine.receive_data(SASL + SASL_CONTINUE + SASL_FINAL + REFUSAL)
    assert [type(event) for event in events] == [
        SASLRequested,
        SASLContinued,
        SASLFinished,
        UpstreamRefused,
    ]
    machine.sasl_initial_response(b"SCRAM-SHA-256", b"")
    machine.sasl_response(b"")


# -- W29, W30 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [inside_tls, logged_in])
def test_w29_an_error_keeps_every_byte(start: Callable[[], UpstreamStartup]) -> None:
    for chunks in three_ways(REFUSAL):
        machine = start()
        [event] = feed_upstream(machine, chunks)
        assert isinstance(event, UpstreamRefused)
        assert event.raw == REFUSAL
        assert event.error.message == "no such database"
        assert event.error.encode() == REFUSAL
        assert machine.state is UpstreamState.FAILED


def test_w29_a_gateway_error_is_read_without_v() -> None:
    wire = message(b"E", b"SERROR\0CXX000\0MCouldn't connect to compute node\0\0")
    [event] = inside_tls().receive_data(wire)
    assert isinstance(event, UpstreamRefused)
    assert event.raw == wire
    assert (event.error.severity, event.error.sqlstate) == ("ERROR", "XX000")


def test_w29_what_comes_after_an_error_means_nothing() -> None:
    machine = inside_tls()
    [event] = machine.receive_data(REFUSAL + LOGIN)
    assert isinstance(event, UpstreamRefused)
    assert machine.receive_data(LOGIN) == []
    assert machine.receive_eof() == []


def test_w30_a_notice_may_come_before_authentication() -> None:
    for chunks in three_ways(NOTICE + CLEARTEXT_PASSWORD + NOTICE + LOGIN):
        machine = inside_tls()
        assert feed_upstream(machine, chunks) == [PasswordRequested(), UpstreamReady()]
        assert machine.welcome(KEY) == NOTICE * 2 + LOGIN[len(AUTHENTICATION_OK) :]


@pytest.mark.parametrize("at", range(3))
def test_w30_a_negotiation_that_names_3_0_is_ignored(at: int) -> None:
    stream = [AUTHENTICATION_OK, BACKEND_KEY_DATA, READY_FOR_QUERY]
    stream.insert(at, V_30)
    for chunks in three_ways(b"".join(stream)):
        machine = inside_tls()
        assert feed_upstream(machine, chunks) == [UpstreamReady()]
        assert machine.welcome(KEY) == BACKEND_KEY_DATA + READY_FOR_QUERY


@pytest.mark.parametrize(
    "wire", [V_32, message(b"v", bytes(8)), message(b"v", b"\0\3\0\1\0\0\0\1_pq_.a\0")]
)
def test_w30_any_other_negotiation_is_a_violation(wire: bytes) -> None:
    assert "a protocol version that was not requested" in one_violation(wire)
    assert "a protocol version that was not requested" in one_violation(wire, logged_in)


NO_PLACE = [
    (PARAMETER, inside_tls, "not allowed before AuthenticationOk"),
    (BACKEND_KEY_DATA, inside_tls, "not allowed before AuthenticationOk"),
    (READY_FOR_QUERY, inside_tls, "not allowed before AuthenticationOk"),
    (NOTIFICATION, inside_tls, "not allowed before AuthenticationOk"),
    (AUTHENTICATION_OK, logged_in, "an authentication request after AuthenticationOk"),
    (CLEARTEXT_PASSWORD, logged_in, "an authentication request after AuthenticationOk"),
    (MD5, logged_in, "an authentication request after AuthenticationOk"),
]


@pytest.mark.parametrize(("stream", "start", "text"), NO_PLACE)
def test_w30_a_message_out_of_place_is_a_violation(
    stream: bytes, start: Callable[[], UpstreamStartup], text: str
) -> None:
    assert text in one_violation(stream, start)


# -- W53: hostile or broken ----------------------------------------------------------------------


@pytest.mark.parametrize("start", [inside_tls, logged_in])
@pytest.mark.parametrize("length", [0, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_w53_an_impossible_length_is_a_violation(
    length: int, start: Callable[[], UpstreamStartup]
) -> None:
    text = one_violation(b"E" + length.to_bytes(4, "big"), start)
    assert f"a message length of {length}, outside 4 to 65540" in text


def test_w53_the_bounds_are_the_documented_ones() -> None:
    assert (HELD_MESSAGE_BYTES_MAX, HELD_BYTES_MAX) == (65536, 262144)


@pytest.mark.parametrize(("size", "fails"), [(65535, False), (65536, False), (65537, True)])
def test_w53_one_held_message_is_bounded(size: int, fails: bool) -> None:
    machine = logged_in()
    events = machine.receive_data(message(b"A", bytes(size)))
    assert (machine.state is UpstreamState.FAILED) is fails
    assert len(events) == fails


@pytest.mark.parametrize(("size", "fails"), [(65515, False), (65516, False), (65517, True)])
def test_w53_all_held_messages_are_bounded(size: int, fails: bool) -> None:
    # Three messages of 65541 bytes and one of `size` + 5: at 65516 exactly 262144.
    machine = logged_in()
    for _ in range(3):
        assert machine.receive_data(message(b"A", bytes(65536))) == []
    events = machine.receive_data(message(b"A", bytes(size)))
    assert (machine.state is UpstreamState.FAILED) is fails
    assert [type(event) for event in events] == [UpstreamViolated] * fails


def test_w53_notices_before_authentication_count_too() -> None:
    machine = inside_tls()
    notice = message(b"N", b"M" + b"x" * 60_000 + b"\0\0")
    assert feed_upstream(machine, [notice] * 4) == []
    [event] = machine.receive_data(notice)
    assert isinstance(event, UpstreamViolated)
    assert "more than 262144 bytes before ReadyForQuery" in str(event.violation)


BROKEN = [
    message(b"E", b"SFATAL\0"),
    message(b"E", b""),
    message(b"N", b"\0\0"),
    message(b"R", b""),
    message(b"R", b"\0\0\0\0\0"),
    message(b"v", b"\0\3\0\0\0\0\0\1"),
]


@pytest.mark.parametrize("wire", BROKEN)
@pytest.mark.parametrize("start", [inside_tls, logged_in])
def test_w53_a_broken_message_is_a_violation(
    wire: bytes, start: Callable[[], UpstreamStartup]
) -> None:
    assert "malformed message of type" in one_violation(wire, start)


def test_w53_an_error_without_a_code_is_still_an_error() -> None:
    # CVE-2026-6666: PgBouncer crashed on one.
    for wire in (message(b"E", b"SFATAL\0\0"), message(b"E", b"\0"), message(b"E", b"?x\0\0")):
        [event] = inside_tls().receive_data(wire)
        assert isinstance(event, UpstreamRefused)
        assert (event.error.sqlstate, event.raw) == ("", wire)


def test_w53_the_stream_may_end_at_every_offset() -> None:
    for at in range(len(LOGIN)):
        machine = inside_tls()
        assert machine.receive_data(LOGIN[:at]) == []
        assert machine.receive_eof() == [UpstreamDisconnected()]
        assert machine.state is UpstreamState.FAILED
        assert machine.receive_data(LOGIN[at:]) == []
        assert machine.receive_eof() == []


# -- the table -----------------------------------------------------------------------------------


def in_state(state: UpstreamState) -> UpstreamStartup:
    """Bring a machine into a state by the shortest legal way."""
    machine = UpstreamStartup()
    match state:
        case UpstreamState.AWAIT_SSL_REPLY:
            pass
        case UpstreamState.AWAIT_TLS:
            machine.receive_data(b"S")
        case UpstreamState.AWAIT_AUTHENTICATION:
            machine = inside_tls()
        case UpstreamState.AWAIT_READY:
            machine = logged_in()
        case UpstreamState.READY:
            machine = logged_in()
            machine.receive_data(READY_FOR_QUERY)
        case UpstreamState.FAILED:
            machine.receive_eof()
    assert machine.state is state
    return machine


@pytest.mark.parametrize(("state", "step"), list(itertools.product(UpstreamState, UpstreamStep)))
def test_every_pair_of_state_and_step_moves_or_is_misuse(
    state: UpstreamState, step: UpstreamStep
) -> None:
    machine = in_state(state)
    following = UPSTREAM_TABLE.get((state, step))
    if following is None:
        with pytest.raises(StateMachineMisuse, match=f"{step.name} in {state.name}"):
            machine._move(step)
        assert machine.state is state
    else:
        machine._move(step)
        assert machine.state is following


def test_ready_and_failed_are_sinks_of_the_table() -> None:
    moving = {state for state, _ in UPSTREAM_TABLE}
    assert set(UpstreamState) - moving == {UpstreamState.READY, UpstreamState.FAILED}
    for state in moving:
        assert UPSTREAM_TABLE[state, UpstreamStep.FAIL] is UpstreamState.FAILED


Drive = Callable[[UpstreamStartup], list[UpstreamEvent]]


def sending(data: bytes) -> Drive:
    return lambda machine: machine.receive_data(data)


def calling(verb: Callable[[UpstreamStartup], object]) -> Drive:
    def call(machine: UpstreamStartup) -> list[UpstreamEvent]:
        verb(machine)
        return []

    return call


ARRIVING: Final[dict[str, bytes]] = {
    "one S": b"S",
    "one N": b"N",
    "one E": b"E",
    "garbage": b"\xff\xff\xff\xff\xff",
    "AuthenticationOk": AUTHENTICATION_OK,
    "CleartextPassword": CLEARTEXT_PASSWORD,
    "SASL": SASL,
    "SASLContinue": SASL_CONTINUE,
    "SASLFinal": SASL_FINAL,
    "MD5Password": MD5,
    "ParameterStatus": PARAMETER,
    "BackendKeyData": BACKEND_KEY_DATA,
    "ReadyForQuery": READY_FOR_QUERY,
    "ErrorResponse": REFUSAL,
    "NoticeResponse": NOTICE,
    "v 3.0": V_30,
    "v 3.2": V_32,
    "unknown": NOTIFICATION,
}
VERBS: Final[dict[str, Drive]] = {
    "request_tls": calling(lambda machine: machine.request_tls()),
    "tls_started": calling(lambda machine: machine.tls_started()),
    "startup": calling(lambda machine: machine.startup(MESSAGE)),
    "password": calling(lambda machine: machine.password(TOKEN)),
    "sasl_initial_response": calling(lambda machine: machine.sasl_initial_response(b"m", b"")),
    "sasl_response": calling(lambda machine: machine.sasl_response(b"")),
    "welcome": calling(lambda machine: machine.welcome(None)),
}
INPUTS: Final[dict[str, Drive]] = {
    **{name: sending(data) for name, data in ARRIVING.items()},
    **VERBS,
    "nothing": sending(b""),
    "end of stream": lambda machine: machine.receive_eof(),
    "trailing_data": calling(lambda machine: machine.trailing_data()),
}

# (state, input) -> (state, event). What is not here changes nothing and gives no event, except that
# an arrival which a waiting state has no entry for is a violation.
EFFECTS: Final[dict[tuple[str, str], tuple[str, type[UpstreamEvent] | None]]] = {
    ("AWAIT_SSL_REPLY", "one S"): ("AWAIT_TLS", TLSAccepted),
    ("AWAIT_SSL_REPLY", "one N"): ("FAILED", TLSRefused),
    ("AWAIT_SSL_REPLY", "NoticeResponse"): ("FAILED", TLSRefused),  # it begins with N
    ("AWAIT_SSL_REPLY", "request_tls"): ("AWAIT_SSL_REPLY", None),
    ("AWAIT_TLS", "tls_started"): ("AWAIT_AUTHENTICATION", None),
    ("AWAIT_AUTHENTICATION", "one S"): ("AWAIT_AUTHENTICATION", None),
    ("AWAIT_AUTHENTICATION", "one N"): ("AWAIT_AUTHENTICATION", None),
    ("AWAIT_AUTHENTICATION", "one E"): ("AWAIT_AUTHENTICATION", None),
    ("AWAIT_AUTHENTICATION", "AuthenticationOk"): ("AWAIT_READY", None),
    ("AWAIT_AUTHENTICATION", "CleartextPassword"): ("AWAIT_AUTHENTICATION", PasswordRequested),
    ("AWAIT_AUTHENTICATION", "SASL"): ("AWAIT_AUTHENTICATION", SASLRequested),
    ("AWAIT_AUTHENTICATION", "ErrorResponse"): ("FAILED", UpstreamRefused),
    ("AWAIT_AUTHENTICATION", "NoticeResponse"): ("AWAIT_AUTHENTICATION", None),
    ("AWAIT_AUTHENTICATION", "v 3.0"): ("AWAIT_AUTHENTICATION", None),
    ("AWAIT_AUTHENTICATION", "startup"): ("AWAIT_AUTHENTICATION", None),
    ("AWAIT_READY", "one S"): ("AWAIT_READY", None),
    ("AWAIT_READY", "one N"): ("AWAIT_READY", None),
    ("AWAIT_READY", "one E"): ("AWAIT_READY", None),
    ("AWAIT_READY", "ParameterStatus"): ("AWAIT_READY", None),
    ("AWAIT_READY", "BackendKeyData"): ("AWAIT_READY", None),
    ("AWAIT_READY", "NoticeResponse"): ("AWAIT_READY", None),
    ("AWAIT_READY", "unknown"): ("AWAIT_READY", None),
    ("AWAIT_READY", "v 3.0"): ("AWAIT_READY", None),
    ("AWAIT_READY", "ErrorResponse"): ("FAILED", UpstreamRefused),
    ("AWAIT_READY", "ReadyForQuery"): ("READY", UpstreamReady),
    ("READY", "welcome"): ("READY", None),
}
WAITING = ("AWAIT_SSL_REPLY", "AWAIT_TLS", "AWAIT_AUTHENTICATION", "AWAIT_READY")


def effect(state: str, name: str) -> tuple[str, type[UpstreamEvent] | None] | None:
    """Return the state and event that the input leads to, None where it is misuse."""
    if (state, name) in EFFECTS:
        return EFFECTS[state, name]
    if name in VERBS or (state == "READY" and name in ARRIVING):
        return None
    if state in WAITING and name in ARRIVING:
        return ("FAILED", UpstreamViolated)
    if state in WAITING and name == "end of stream":
        return ("FAILED", UpstreamDisconnected)
    return (state, None)


@pytest.mark.parametrize(("state", "name"), list(itertools.product(UpstreamState, INPUTS)))
def test_every_state_takes_every_kind_of_input(state: UpstreamState, name: str) -> None:
    machine = in_state(state)
    expected = effect(state.name, name)
    if expected is None:
        with pytest.raises(StateMachineMisuse):
            INPUTS[name](machine)
        assert machine.state is state
        return
    following, kind = expected
    events = INPUTS[name](machine)
    assert machine.state.name == following
    assert [type(event) for event in events] == ([kind] if kind else [])


def test_who_broke_it_is_told_by_the_violation() -> None:
    for stream, kind in ((MD5, UnsupportedAuthentication), (PARAMETER, UpstreamViolation)):
        [event] = inside_tls().receive_data(stream)
        assert isinstance(event, UpstreamViolated)
        assert type(event.violation) is kind
