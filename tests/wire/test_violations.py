"""Who broke the protocol is told by the class, and the classes do not overlap."""

import pytest

from proxy.wire import violations
from proxy.wire.violations import (
    Answer,
    ClientReason,
    ClientViolation,
    StateMachineMisuse,
    UnsupportedAuthentication,
    UpstreamViolation,
    Violation,
)


def test_a_client_violation_is_a_protocol_violation_with_an_answer_unless_said_otherwise() -> None:
    violation = ClientViolation("it went wrong", reason=ClientReason.STARTUP_LAYOUT)
    assert (violation.message, str(violation)) == ("it went wrong", "it went wrong")
    assert violation.reason == "startup_layout"
    assert violation.sqlstate == "08P01"
    assert violation.answer is Answer.ERROR_RESPONSE


def test_a_client_violation_keeps_its_own_sqlstate_and_answer() -> None:
    violation = ClientViolation(
        "m", reason=ClientReason.REPLICATION_VALUE, sqlstate="22023", answer=Answer.NOTHING
    )
    assert (violation.sqlstate, violation.answer) == ("22023", Answer.NOTHING)


@pytest.mark.parametrize("kind", [UpstreamViolation, UnsupportedAuthentication])
def test_an_upstream_violation_is_its_text(kind: type[Violation]) -> None:
    violation = kind("MD5Password")
    assert (violation.message, str(violation)) == ("MD5Password", "MD5Password")


def test_no_violation_is_taken_for_another() -> None:
    kinds = (ClientViolation, UpstreamViolation, UnsupportedAuthentication)
    for kind in kinds:
        assert issubclass(kind, Violation)
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)


def test_misuse_is_our_bug_and_no_violation() -> None:
    assert issubclass(StateMachineMisuse, AssertionError)
    assert not issubclass(StateMachineMisuse, Violation)


def test_a_violation_is_answered_in_one_of_three_ways() -> None:
    assert {answer.name for answer in Answer} == {"ERROR_RESPONSE", "OLD_ERROR", "NOTHING"}


def test_the_sqlstates_are_the_documented_ones() -> None:
    assert violations.PROTOCOL_VIOLATION == "08P01"
    assert violations.FEATURE_NOT_SUPPORTED == "0A000"
    assert violations.INVALID_AUTHORIZATION == "28000"
    assert violations.INVALID_PARAMETER_VALUE == "22023"


def test_the_reason_words_are_the_stable_ones() -> None:
    # Metrics and people's alerts use them: one that changes here changes there.
    assert {str(reason) for reason in ClientReason} == {
        "direct_tls",
        "early_data_too_long",
        "early_plaintext",
        "http_request",
        "invalid_cancel_request",
        "replication_value",
        "startup_layout",
        "startup_length",
        "startup_too_long",
        "unknown_parameter",
        "unsupported_protocol",
        "user_missing",
    }
