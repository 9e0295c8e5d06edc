"""The machine of a check: what is a sign of life, and what is none."""

import pytest

from proxy.wire.own_answer import OWN_ANSWER_BYTES_MAX
from proxy.wire.sign_of_life import (
    CHECK_TABLE,
    Alive,
    CheckEvent,
    CheckState,
    CheckStep,
    SignOfLife,
)
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamRefused, UpstreamViolated
from proxy.wire.violations import StateMachineMisuse
from tests.support.cuts import THREE_WAYS, Cut, whole
from tests.wire.driving import READY_FOR_QUERY, message
from tests.wire.test_session_reset import (
    DISCARDED,
    ERROR,
    IN_FAILED_TRANSACTION,
    IN_TRANSACTION,
    LOGIN,
    NOTICE,
    NOTIFICATION,
    parameter,
)


def begun() -> SignOfLife:
    check = SignOfLife(LOGIN)
    check.begin()
    return check


def fed(data: bytes, cut: Cut) -> tuple[SignOfLife, list[CheckEvent]]:
    check = begun()
    return check, [event for chunk in cut(data) for event in check.receive_data(chunk)]


def test_p23_a_check_is_a_sync() -> None:
    assert SignOfLife(LOGIN).begin() == bytes.fromhex("53 00 00 00 04")


@pytest.mark.parametrize("cut", THREE_WAYS)
@pytest.mark.parametrize(
    ("before", "changed"),
    [
        (b"", ()),
        (NOTICE, ()),
        (parameter(b"TimeZone", b"Etc/UTC"), ()),
        (parameter(b"in_hot_standby", b"on"), (b"in_hot_standby",)),
    ],
)
def test_p23_ready_for_query_is_the_sign_of_life(
    cut: Cut, before: bytes, changed: tuple[bytes, ...]
) -> None:
    check, events = fed(before + READY_FOR_QUERY, cut)
    assert events == [Alive(changed)]
    assert check.state is CheckState.ALIVE
    assert check.trailing_data() == b""
    assert check.receive_eof() == []


def test_p23_bytes_after_it_are_kept() -> None:
    check, events = fed(READY_FOR_QUERY + READY_FOR_QUERY, whole)
    assert events == [Alive()]
    assert check.trailing_data() == READY_FOR_QUERY
    with pytest.raises(StateMachineMisuse):
        check.receive_data(b"x")


@pytest.mark.parametrize("cut", THREE_WAYS)
@pytest.mark.parametrize(
    "data",
    [
        IN_TRANSACTION,
        IN_FAILED_TRANSACTION,
        NOTIFICATION,
        DISCARDED,
        message(b"Z"),
        message(b"I"),
        message(b"S", b"name alone\0"),
        b"\0\0\0\0\0",
        b"N\0\0\0\3",
    ],
    ids=repr,
)
def test_p23_anything_else_is_none(cut: Cut, data: bytes) -> None:
    check, (event,) = fed(data, cut)
    assert isinstance(event, UpstreamViolated)
    assert check.state is CheckState.FAILED
    assert check.receive_data(READY_FOR_QUERY) == check.receive_eof() == []


@pytest.mark.parametrize("cut", THREE_WAYS)
def test_p23_an_error_is_none_and_says_why(cut: Cut) -> None:
    check, (event,) = fed(ERROR, cut)
    assert isinstance(event, UpstreamRefused)
    assert event.error.sqlstate == "57014"
    assert check.state is CheckState.FAILED


@pytest.mark.parametrize("begin", [b"", READY_FOR_QUERY[:5], NOTICE])
def test_p23_the_end_of_the_stream_is_none(begin: bytes) -> None:
    check = begun()
    assert check.receive_data(begin) == []
    assert check.receive_eof() == [UpstreamDisconnected()]
    assert check.receive_eof() == []


def test_p23_the_length_of_the_answer_is_bounded() -> None:
    check = begun()
    notices = NOTICE * (OWN_ANSWER_BYTES_MAX // len(NOTICE))
    assert check.receive_data(notices) == []
    (event,) = check.receive_data(NOTICE)
    assert isinstance(event, UpstreamViolated)


def test_a_message_before_the_check_is_a_violation() -> None:
    (event,) = SignOfLife(LOGIN).receive_data(READY_FOR_QUERY)
    assert isinstance(event, UpstreamViolated)


@pytest.mark.parametrize("state", CheckState)
@pytest.mark.parametrize("step", CheckStep)
def test_p23_steps_are_those_of_the_table(state: CheckState, step: CheckStep) -> None:
    check = SignOfLife(LOGIN)
    check.state = state
    following = CHECK_TABLE.get((state, step))
    if following is None:
        with pytest.raises(StateMachineMisuse):
            check._move(step)
    else:
        check._move(step)
        assert check.state is following
