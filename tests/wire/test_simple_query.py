"""The machine of one query of the proxy's own: its answers, its bounds, each entry of its table."""

from collections.abc import Iterable
from struct import pack

import pytest

from proxy.wire.messages import ErrorResponse
from proxy.wire.simple_query import (
    ANSWER_BYTES_MAX,
    ANSWER_MESSAGE_BYTES_MAX,
    QUERY_TABLE,
    QueryAnswered,
    QueryEvent,
    QueryState,
    QueryStep,
    SimpleQuery,
)
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamViolated
from proxy.wire.violations import StateMachineMisuse
from tests.support.cuts import THREE_WAYS, Cut
from tests.wire.driving import READY_FOR_QUERY, message

SQL = b"select 1, null"
DESCRIPTION = message(b"T", b"\0\0")
COMPLETE = message(b"C", b"SELECT 1\0")
BEGUN = message(b"C", b"BEGIN\0")
PARAMETER = message(b"S", b"TimeZone\0Etc/UTC\0")
NOTICE = message(b"N", b"SNOTICE\0VNOTICE\0C00000\0Mhello\0\0")
NOTIFICATION = message(b"A", b"\0\0\0\1channel\0payload\0")
EMPTY = message(b"I")
FIELDS = ((b"S", b"ERROR"), (b"V", b"ERROR"), (b"C", b"42501"), (b"M", b"permission denied"))
ERROR = message(b"E", b"".join(kind + text + b"\0" for kind, text in FIELDS) + b"\0")
IN_FAILED_TRANSACTION = message(b"Z", b"E")


def row(*values: bytes | None) -> bytes:
    parts = (
        pack("!i", -1) if value is None else pack("!i", len(value)) + value for value in values
    )
    return message(b"D", pack("!h", len(values)) + b"".join(parts))


def asked() -> SimpleQuery:
    query = SimpleQuery()
    query.ask(SQL)
    return query


def fed(query: SimpleQuery, chunks: Iterable[bytes]) -> list[QueryEvent]:
    return [event for chunk in chunks for event in query.receive_data(chunk)]


def violation(data: bytes) -> str:
    query = asked()
    (event,) = query.receive_data(data)
    assert isinstance(event, UpstreamViolated)
    assert query.state is QueryState.FAILED
    assert query.receive_data(READY_FOR_QUERY) == []
    assert query.receive_eof() == []
    return str(event.violation)


def test_query_is_one_message_with_a_terminator() -> None:
    assert SimpleQuery().ask(SQL) == message(b"Q", SQL + b"\0")


def test_nul_in_a_query_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        SimpleQuery().ask(b"select 1\0; drop table t")


@pytest.mark.parametrize("cut", THREE_WAYS)
def test_rows_of_all_statements_are_returned_together(cut: Cut) -> None:
    answer = BEGUN + NOTICE + DESCRIPTION + row(b"ok", None, b"") + NOTIFICATION + COMPLETE
    answer += PARAMETER + EMPTY + DESCRIPTION + row() + COMPLETE + READY_FOR_QUERY
    (event,) = fed(asked(), cut(answer))
    assert event == QueryAnswered(((b"ok", None, b""), ()), None, b"I", PARAMETER)


def test_bytes_after_the_answer_are_kept() -> None:
    query = asked()
    assert query.receive_data(READY_FOR_QUERY + PARAMETER[:7])
    assert query.state is QueryState.ANSWERED
    assert query.trailing_data() == PARAMETER[:7]
    assert query.receive_eof() == []
    with pytest.raises(StateMachineMisuse):
        query.receive_data(b"S")


@pytest.mark.parametrize("cut", THREE_WAYS)
def test_error_takes_the_place_of_rows(cut: Cut) -> None:
    answer = BEGUN + row(b"ok") + ERROR + ERROR + IN_FAILED_TRANSACTION
    (event,) = fed(asked(), cut(answer))
    assert event == QueryAnswered((), ErrorResponse(FIELDS), b"E")


def test_end_of_the_stream_after_an_error_is_its_answer() -> None:
    query = asked()
    assert query.receive_data(ERROR) == []
    assert query.receive_eof() == [QueryAnswered((), ErrorResponse(FIELDS), b"")]


@pytest.mark.parametrize("begin", [b"", BEGUN, ERROR[:9]])
def test_end_of_the_stream_within_an_answer_is_a_disconnect(begin: bytes) -> None:
    query = asked()
    assert query.receive_data(begin) == []
    assert query.receive_eof() == [UpstreamDisconnected()]
    assert query.receive_eof() == []


def test_end_of_the_stream_before_the_query_is_a_disconnect() -> None:
    assert SimpleQuery().receive_eof() == [UpstreamDisconnected()]


def test_message_before_the_query_is_a_violation() -> None:
    (event,) = SimpleQuery().receive_data(READY_FOR_QUERY)
    assert isinstance(event, UpstreamViolated)


@pytest.mark.parametrize(
    "data",
    [
        message(b"G", b"\0\0\0"),
        message(b"H", b"\0\0\0"),
        message(b"R", b"\0\0\0\0"),
        message(b"K", b"\0\0\4\xd2\1\2\3\4"),
        message(b"D"),
        message(b"D", b"\0"),
        message(b"D", b"\xff\xff"),
        message(b"D", pack("!h", 1)),
        message(b"D", pack("!hi", 1, -2)),
        message(b"D", pack("!hi", 1, 4) + b"abc"),
        message(b"D", pack("!hi", 1, 3) + b"abcd"),
        message(b"D", pack("!h", 0) + b"a"),
        message(b"E", b"Sno terminator"),
        message(b"Z", b"X"),
        message(b"Z"),
        b"D\0\0\0\3",
    ],
    ids=repr,
)
def test_malformed_or_foreign_message_is_a_violation(data: bytes) -> None:
    assert violation(data)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_length_of_a_message_is_bounded(extra: int) -> None:
    notice = message(b"N", b"\0" * (ANSWER_MESSAGE_BYTES_MAX + extra))
    if extra > 0:
        assert "length" in violation(notice)
    else:
        assert asked().receive_data(notice) == []


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_length_of_an_answer_is_bounded(extra: int) -> None:
    whole, left = divmod(ANSWER_BYTES_MAX + extra, ANSWER_MESSAGE_BYTES_MAX)
    notices = [message(b"N", b"\0" * ANSWER_MESSAGE_BYTES_MAX)] * whole
    answer = b"".join(notices) + message(b"N", b"\0" * left)
    if extra > 0:
        assert "more than" in violation(answer)
    else:
        assert asked().receive_data(answer) == []


def test_values_of_rows_are_not_shown() -> None:
    assert "secret" not in repr(QueryAnswered(((b"secret",),), None, b"I"))


@pytest.mark.parametrize("state", QueryState)
@pytest.mark.parametrize("step", QueryStep)
def test_steps_are_those_of_the_table(state: QueryState, step: QueryStep) -> None:
    query = SimpleQuery()
    query.state = state
    following = QUERY_TABLE.get((state, step))
    if following is None:
        with pytest.raises(StateMachineMisuse):
            query._move(step)
    else:
        query._move(step)
        assert query.state is following
