"""The list of recent errors: bounded, counted, and made of closed words alone."""

import pytest

from proxy.errors import ErrorKind
from proxy.observe.recent_errors import QUIET_SECONDS, RECENT_ERRORS_MAX, RecentErrors


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_the_newest_comes_first() -> None:
    errors = RecentErrors(Clock())
    errors.record("token_rejected")
    errors.record("upstream_dns")
    assert [(f.reason, f.at) for f in errors.latest()] == [
        ("upstream_dns", 2),
        ("token_rejected", 1),
    ]


def test_a_repeated_error_is_counted_and_moves_to_the_front() -> None:
    errors = RecentErrors(Clock())
    for reason in ("token_rejected", "upstream_dns", "token_rejected"):
        errors.record(reason)
    assert [(f.reason, f.at, f.count) for f in errors.latest()] == [
        ("token_rejected", 3, 2),
        ("upstream_dns", 2, 1),
    ]


def test_an_error_is_going_on_since_it_first_occurred_after_a_quiet_time() -> None:
    at = iter([0.0, 100.0, 100.0 + QUIET_SECONDS - 1, 2000.0])
    errors = RecentErrors(lambda: next(at))
    since = []
    for _ in range(4):
        errors.record("upstream_dns")
        since.append(errors.latest()[0].since)
    assert since == [0.0, 0.0, 0.0, 2000.0]
    assert errors.latest()[0].count == 4


def test_another_target_or_sqlstate_is_another_error() -> None:
    errors = RecentErrors(Clock())
    errors.record("upstream_dns", target="eu")
    errors.record("upstream_dns", target="us")
    errors.record("upstream_dns", "08001", target="us")
    assert [f.count for f in errors.latest()] == [1, 1, 1]


@pytest.mark.parametrize("kinds", [RECENT_ERRORS_MAX - 1, RECENT_ERRORS_MAX, RECENT_ERRORS_MAX + 1])
def test_the_oldest_error_is_dropped(kinds: int) -> None:
    errors = RecentErrors(Clock())
    for number in range(kinds):
        errors.record("upstream_dns", target=str(number))
    kept = [f.target for f in errors.latest()]
    assert len(kept) == min(kinds, RECENT_ERRORS_MAX)
    assert kept[0] == str(kinds - 1)
    assert ("0" in kept) == (kinds <= RECENT_ERRORS_MAX)


@pytest.mark.parametrize("kind", ErrorKind, ids=lambda kind: kind.name)
def test_each_kind_has_its_message_and_hint_without_a_role(kind: ErrorKind) -> None:
    errors = RecentErrors(Clock())
    errors.record(kind.value.reason, kind.value.sqlstate)
    (error,) = errors.latest()
    # Kinds that share a word are one reason here, with the texts of the first.
    alike = [other.value for other in ErrorKind if other.value.reason == kind.value.reason]
    assert error.message in {other.message for other in alike}
    assert error.sqlstate == kind.value.sqlstate
    assert bool(error.hint) in {bool(other.hint) for other in alike}
    assert "{" not in error.hint


@pytest.mark.parametrize(
    ("said", "shown"), [("42501", "42501"), ("", "28000"), ("<b>", "28000"), ("28000x", "28000")]
)
def test_a_malformed_sqlstate_is_replaced_by_that_of_the_reason(said: str, shown: str) -> None:
    errors = RecentErrors(Clock())
    errors.record("token_rejected", said)
    assert errors.latest()[0].sqlstate == shown


def test_a_reason_without_a_row_is_shown_by_its_word() -> None:
    errors = RecentErrors(Clock())
    errors.record("never_heard_of")
    errors.record("cancel_lost", message="a cancel request was lost")
    assert [(f.message, f.sqlstate, f.hint) for f in errors.latest()] == [
        ("a cancel request was lost", "", ""),
        ("", "", ""),
    ]
