"""The reasons for the end of a session, and what metrics make of each."""

from proxy.session.end_reason import ERRORS, OUTCOMES, EndReason, Outcome


def test_every_reason_has_an_outcome() -> None:
    assert OUTCOMES.keys() == set(EndReason)
    assert set(OUTCOMES.values()) == set(Outcome)


def test_only_ends_that_lost_something_are_errors() -> None:
    assert {OUTCOMES[reason] for reason in ERRORS} == {Outcome.LOST, Outcome.FAILED}
