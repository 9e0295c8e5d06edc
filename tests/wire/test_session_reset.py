"""The machine of a reset: the one answer that passes, all else fails, each entry of its table."""

from collections.abc import Iterable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.own_answer import OWN_ANSWER_BYTES_MAX
from proxy.wire.session_reset import (
    RESET_TABLE,
    ResetDone,
    ResetEvent,
    ResetState,
    ResetStep,
    SessionReset,
    may_have_login_triggers,
)
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamRefused, UpstreamViolated
from proxy.wire.violations import StateMachineMisuse
from tests.support.cuts import THREE_WAYS, Cut, at_offsets
from tests.wire.driving import READY_FOR_QUERY, message

LOGIN = {b"TimeZone": b"Etc/UTC", b"server_version": b"18.4", b"in_hot_standby": b"off"}
QUERIES = message(b"Q", b"DISCARD ALL\0") + message(b"Q", b"RESET ROLE\0")
DISCARDED = message(b"C", b"DISCARD ALL\0")
ROLE_RESET = message(b"C", b"RESET\0")
COLUMNS = message(b"T", b"\0\1count\0" + b"\0" * 18)
COUNTED = message(b"C", b"SELECT 1\0")
NOTICE = message(b"N", b"SNOTICE\0VNOTICE\0C00000\0Mhello\0\0")
NOTIFICATION = message(b"A", b"\0\0\0\1channel\0payload\0")
FIELDS = (b"SERROR", b"VERROR", b"C57014", b"Mcanceling statement due to statement timeout")
ERROR = message(b"E", b"".join(field + b"\0" for field in FIELDS) + b"\0")
IN_TRANSACTION = message(b"Z", b"T")
IN_FAILED_TRANSACTION = message(b"Z", b"E")


def row(value: bytes) -> bytes:
    return message(b"D", pack("!hi", 1, len(value)) + value)


def parameter(name: bytes, value: bytes) -> bytes:
    return message(b"S", name + b"\0" + value + b"\0")


USUAL = [DISCARDED, READY_FOR_QUERY, ROLE_RESET, READY_FOR_QUERY]
COUNTING = [*USUAL, COLUMNS, row(b"0"), COUNTED, READY_FOR_QUERY]
ASYNCHRONOUS = [NOTICE, NOTIFICATION, parameter(b"TimeZone", b"Etc/UTC")]


def begun(*, counts_triggers: bool = False) -> SessionReset:
    reset = SessionReset(LOGIN, counts_triggers=counts_triggers)
    reset.begin()
    return reset


def fed(reset: SessionReset, chunks: Iterable[bytes]) -> list[ResetEvent]:
    return [event for chunk in chunks for event in reset.receive_data(chunk)]


def failed(data: bytes, *, counts_triggers: bool = False) -> str:
    """Return why these bytes, whole or byte by byte, are no reset."""
    said = set()
    for cut in THREE_WAYS:
        reset = begun(counts_triggers=counts_triggers)
        (event,) = fed(reset, cut(data))
        assert reset.state is ResetState.FAILED
        assert reset.receive_data(READY_FOR_QUERY) == []
        assert reset.receive_eof() == []
        said.add(str(event.violation if isinstance(event, UpstreamViolated) else event))
    (text,) = said
    return text


# What is asked


def test_p20_a_reset_is_two_queries_in_one_write() -> None:
    assert SessionReset(LOGIN).begin() == QUERIES


def test_p21_the_first_reset_also_counts_login_triggers_by_qualified_names() -> None:
    asked = SessionReset(LOGIN, counts_triggers=True).begin()
    assert asked.startswith(QUERIES + b"Q")
    sql = asked[len(QUERIES) + 5 : -1].decode()
    assert asked == QUERIES + message(b"Q", sql.encode() + b"\0")
    for word in ("count(*)", "pg_event_trigger", "OPERATOR(=)", "OPERATOR(<>)"):
        qualified = word.replace("OPERATOR(", "OPERATOR(pg_catalog.")
        qualified = qualified if qualified != word else f"pg_catalog.{word}"
        assert qualified in sql
        assert word not in sql.replace(qualified, "")


@pytest.mark.parametrize(
    ("version", "counts"),
    [
        (b"17.0", True),
        (b"18.4 (Debian 18.4-1.pgdg12+1)", True),
        (b"16.9", False),
        (b"9.6.24", False),
        (b"15.18 (Ubuntu 15.18-0)", False),
        (b"19devel", True),
        (b"", True),
        ("²".encode(), True),
    ],
)
def test_p21_servers_of_version_17_and_unknown_ones_may_have_login_triggers(
    version: bytes, counts: bool
) -> None:
    assert may_have_login_triggers({b"server_version": version}) is counts


def test_p21_a_server_that_reports_no_version_may_have_login_triggers() -> None:
    assert may_have_login_triggers({})


# The answer that passes


@pytest.mark.parametrize("cut", THREE_WAYS)
@pytest.mark.parametrize("counts", [False, True])
def test_p20_the_expected_answer_is_a_reset(cut: Cut, counts: bool) -> None:
    reset = begun(counts_triggers=counts)
    answer = b"".join(COUNTING if counts else USUAL)
    assert fed(reset, cut(answer)) == [ResetDone()]
    assert reset.state is ResetState.RESET
    assert reset.trailing_data() == b""
    assert reset.receive_eof() == []


@pytest.mark.parametrize("cut", THREE_WAYS)
def test_p20_asynchronous_messages_may_come_between_any_two(cut: Cut) -> None:
    reset = begun(counts_triggers=True)
    answer = b"".join(b"".join(ASYNCHRONOUS) + one for one in COUNTING)
    assert fed(reset, cut(answer)) == [ResetDone()]


@pytest.mark.parametrize("cut", THREE_WAYS)
def test_p21_the_number_of_login_triggers_is_reported(cut: Cut) -> None:
    answer = b"".join([*USUAL, COLUMNS, row(b"12"), COUNTED, READY_FOR_QUERY])
    assert fed(begun(counts_triggers=True), cut(answer)) == [ResetDone((), 12)]


@pytest.mark.parametrize("cut", THREE_WAYS)
@pytest.mark.parametrize(
    ("reported", "changed"),
    [
        ([(b"TimeZone", b"Etc/UTC")], ()),
        ([(b"TimeZone", b"CET"), (b"TimeZone", b"Etc/UTC")], ()),
        ([(b"TimeZone", b"Etc/UTC"), (b"TimeZone", b"CET")], (b"TimeZone",)),
        ([(b"in_hot_standby", b"on")], (b"in_hot_standby",)),
        ([(b"timezone", b"Etc/UTC")], (b"timezone",)),
        ([(b"of_an_extension", b"")], (b"of_an_extension",)),
        ([(b"x", b"1"), (b"TimeZone", b"")], (b"x", b"TimeZone")),
    ],
)
def test_p22_parameters_are_compared_with_those_of_the_login(
    cut: Cut, reported: list[tuple[bytes, bytes]], changed: tuple[bytes, ...]
) -> None:
    between = b"".join(parameter(name, value) for name, value in reported)
    answer = DISCARDED + between + READY_FOR_QUERY + ROLE_RESET + READY_FOR_QUERY
    assert fed(begun(), cut(answer)) == [ResetDone(changed)]


def test_p20_bytes_after_the_answer_are_kept() -> None:
    for cut in (b"", DISCARDED[:3]):
        reset = begun()
        rest = b"".join(USUAL)[len(cut) :] + NOTICE[:7]
        assert fed(reset, [cut, rest]) == [ResetDone()]
        assert reset.trailing_data() == NOTICE[:7]
        with pytest.raises(StateMachineMisuse):
            reset.receive_data(b"x")


@given(
    st.lists(st.sampled_from([*COUNTING, *ASYNCHRONOUS, ERROR, IN_TRANSACTION]), max_size=12),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
)
def test_p20_any_split_of_any_answer_gives_the_same(
    messages: list[bytes], offsets: list[int], counts: bool
) -> None:
    stream = b"".join(messages)
    found = []
    for chunks in ([stream], at_offsets(stream, offsets)):
        reset = begun(counts_triggers=counts)
        events, rest = [], b""
        for chunk in chunks:
            if reset.state is ResetState.RESET:
                rest += chunk
            else:
                events += reset.receive_data(chunk)
        trailing = reset.trailing_data() + rest if reset.state is ResetState.RESET else b""
        found.append((list(map(repr, events)), reset.state, trailing))
    assert found[0] == found[1]


@given(
    st.lists(st.sampled_from([*COUNTING, *ASYNCHRONOUS, ERROR, IN_TRANSACTION]), max_size=12),
    st.booleans(),
)
def test_p20_only_the_expected_messages_in_their_order_are_a_reset(
    messages: list[bytes], counts: bool
) -> None:
    answers = [one for one in messages if one not in ASYNCHRONOUS]
    expected = COUNTING if counts else USUAL
    events = begun(counts_triggers=counts).receive_data(b"".join(messages))
    is_reset = answers[: len(expected)] == expected
    assert any(isinstance(event, ResetDone) for event in events) is is_reset


@given(
    st.lists(st.sampled_from(COUNTING) | st.binary(max_size=9), max_size=9).map(b"".join),
    st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), max_size=3),
    st.booleans(),
)
def test_p20_any_bytes_are_a_reset_a_failure_or_not_the_whole_answer(
    stream: bytes, changes: list[tuple[int, int]], counts: bool
) -> None:
    changed = bytearray(stream)
    for place, byte in changes:
        if place < len(changed):
            changed[place] = byte
    reset = begun(counts_triggers=counts)
    events = reset.receive_data(bytes(changed))
    ended = {ResetState.RESET: ResetDone, ResetState.FAILED: UpstreamViolated | UpstreamRefused}
    expected = ended.get(reset.state)
    assert len(events) == (expected is not None)
    assert all(isinstance(event, expected) for event in events if expected is not None)
    if reset.state is ResetState.RESET:
        kept = bytes(changed[: len(changed) - len(reset.trailing_data())])
        assert kept.endswith(READY_FOR_QUERY)
        assert kept.count(DISCARDED) >= 1
        assert kept.count(ROLE_RESET) >= 1


# Everything else fails


@pytest.mark.parametrize(
    "data",
    [
        DISCARDED + IN_TRANSACTION,
        DISCARDED + IN_FAILED_TRANSACTION,
        DISCARDED + READY_FOR_QUERY + ROLE_RESET + IN_TRANSACTION,
        READY_FOR_QUERY,
        DISCARDED + ROLE_RESET,
        DISCARDED + DISCARDED,
        ROLE_RESET,
        DISCARDED + READY_FOR_QUERY + DISCARDED,
        message(b"C", b"DISCARD ALL"),
        message(b"C", b"DISCARD\0"),
        message(b"C", b"discard all\0"),
        message(b"C", b"DISCARD ALL\0\0"),
        DISCARDED + READY_FOR_QUERY + message(b"C", b"SET\0"),
        message(b"I"),
        message(b"G", b"\0\0\0"),
        message(b"R", b"\0\0\0\0"),
        message(b"K", b"\0\0\4\xd2\1\2\3\4"),
        row(b"0"),
        COLUMNS,
        DISCARDED + message(b"Z", b"X"),
        DISCARDED + message(b"Z"),
        message(b"S", b"name alone\0"),
        message(b"N", b"Sno terminator"),
        b"C\0\0\0\3",
        b"\0\0\0\0\0",
        b"HTTP/1.1 400 Bad Request\r\n",
    ],
    ids=repr,
)
def test_p20_anything_else_is_a_violation(data: bytes) -> None:
    assert failed(data)


@pytest.mark.parametrize(
    "data",
    [
        row(b""),
        row(b"-1"),
        row(b"x"),
        row("²".encode()),
        message(b"D", pack("!hi", 1, -1)),
        message(b"D", pack("!h", 0)),
        message(b"D", pack("!hicic", 2, 1, b"0", 1, b"0")),
        message(b"D", pack("!hi", 1, 9) + b"0"),
        row(b"0") + row(b"0"),
        row(b"0") + message(b"C", b"SELECT 2\0"),
        COUNTED,
    ],
    ids=repr,
)
def test_p21_anything_but_one_number_is_a_violation(data: bytes) -> None:
    assert failed(b"".join(USUAL) + COLUMNS + data, counts_triggers=True)


def test_p21_rows_that_were_not_asked_for_are_no_part_of_the_answer() -> None:
    reset = begun()
    assert reset.receive_data(b"".join(COUNTING)) == [ResetDone()]
    assert reset.trailing_data() == b"".join(COUNTING[len(USUAL) :])


@pytest.mark.parametrize("place", range(len(COUNTING)))
def test_p20_an_error_in_any_place_ends_the_reset(place: int) -> None:
    said = failed(b"".join(COUNTING[:place]) + ERROR, counts_triggers=True)
    assert "UpstreamRefused" in said
    assert "57014" in said


def test_p20_an_error_is_returned_byte_for_byte() -> None:
    (event,) = begun().receive_data(ERROR)
    assert isinstance(event, UpstreamRefused)
    assert event.raw == ERROR


@pytest.mark.parametrize("place", range(len(COUNTING)))
def test_p20_the_end_of_the_stream_in_any_place_is_a_disconnect(place: int) -> None:
    for cut_bytes in (0, 3):
        reset = begun(counts_triggers=True)
        begin = b"".join(COUNTING[:place]) + COUNTING[place][:cut_bytes]
        assert reset.receive_data(begin) == []
        assert reset.receive_eof() == [UpstreamDisconnected()]
        assert reset.receive_eof() == []


def test_a_message_before_the_queries_is_a_violation() -> None:
    (event,) = SessionReset(LOGIN).receive_data(NOTICE)
    assert isinstance(event, UpstreamViolated)
    assert SessionReset(LOGIN).receive_eof() == [UpstreamDisconnected()]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_p20_the_length_of_the_answer_is_bounded(extra: int) -> None:
    one = parameter(b"TimeZone", b"x" * 1000)
    count, left = divmod(OWN_ANSWER_BYTES_MAX + extra, len(one))
    stream = one * count + parameter(b"x", b"y" * (left - len(parameter(b"x", b""))))
    if extra > 0:
        assert "more than" in failed(stream)
    else:
        assert begun().receive_data(stream) == []


def test_p20_a_message_that_says_it_is_too_long_is_not_waited_for() -> None:
    assert "length" in failed(b"N" + pack("!I", OWN_ANSWER_BYTES_MAX + 5))


@pytest.mark.parametrize("state", ResetState)
@pytest.mark.parametrize("step", ResetStep)
def test_p20_steps_are_those_of_the_table(state: ResetState, step: ResetStep) -> None:
    reset = SessionReset(LOGIN)
    reset.state = state
    following = RESET_TABLE.get((state, step))
    if following is None:
        with pytest.raises(StateMachineMisuse):
            reset._move(step)
    else:
        reset._move(step)
        assert reset.state is following


# What the client was sent before


@pytest.mark.parametrize(
    ("reported", "answered", "changed"),
    [
        (parameter(b"in_hot_standby", b"on"), b"", (b"in_hot_standby",)),
        (parameter(b"TimeZone", b"CET"), parameter(b"TimeZone", b"Etc/UTC"), ()),
        (parameter(b"TimeZone", b"CET"), b"", (b"TimeZone",)),
        (parameter(b"TimeZone", b"CET") + parameter(b"TimeZone", b"Etc/UTC"), b"", ()),
        (message(b"S", b"name alone\0"), b"", (b"",)),
    ],
)
def test_p22_what_the_client_was_sent_counts_until_the_reset_says_otherwise(
    reported: bytes, answered: bytes, changed: tuple[bytes, ...]
) -> None:
    for cut in THREE_WAYS:
        reset = SessionReset(LOGIN, reported=reported)
        reset.begin()
        answer = DISCARDED + answered + b"".join(USUAL[1:])
        assert fed(reset, cut(answer)) == [ResetDone(changed)]
