"""The freshness of tokens: the rule as a table."""

import pytest

from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.freshness import AcceptedAge, Freshness, Need, is_valid, judge, renewal_delay

HOUR = 3600.0
T0 = 1_790_000_000.0
MINUTE = Freshness(max_age_seconds=60, expiry_margin_seconds=120)


def credential(requested_at: float = T0, expires_at: float = T0 + HOUR) -> Credential:
    return Credential(Secret(b"not-a-real-token"), requested_at, expires_at)


@pytest.mark.parametrize(
    ("after", "need"),
    [
        (0, Need.USE),
        (30, Need.USE),
        (30.001, Need.USE_AND_REFRESH),
        (60, Need.USE_AND_REFRESH),
        (60.001, Need.MINT),
        (HOUR, Need.MINT),
        (10 * HOUR, Need.MINT),
        (-0.001, Need.MINT),  # the clock was set back: the token's age is unknown
        (-HOUR, Need.MINT),
    ],
)
def test_the_age_alone_decides_while_the_expiry_is_far(after: float, need: Need) -> None:
    assert judge(credential(), T0 + after, MINUTE) is need


@pytest.mark.parametrize(
    ("before_expiry", "valid"),
    [(120.001, True), (120, False), (119.999, False), (0, False), (-1, False)],
)
def test_a_token_is_not_used_within_the_margin_of_its_expiry(
    before_expiry: float, valid: bool
) -> None:
    newly_minted = credential(T0, T0 + before_expiry)
    assert is_valid(newly_minted, T0, MINUTE) is valid
    assert judge(newly_minted, T0, MINUTE) is (Need.USE if valid else Need.MINT)


def test_without_a_token_one_is_minted() -> None:
    assert judge(None, T0, MINUTE) is Need.MINT
    assert not is_valid(None, T0, MINUTE)


@pytest.mark.parametrize("after", [0, 0.001, 30])
def test_an_age_of_zero_never_uses_a_token_again(after: float) -> None:
    assert judge(credential(), T0 + after, Freshness(0, 120)) is Need.MINT


@pytest.mark.parametrize(
    ("life", "max_age", "renewed_at"),
    [(900, 3300, 390), (3600, 3300, 1650), (3600, 60, 30), (900, 60, 30), (121, 60, 0.5)],
)
def test_a_token_is_renewed_at_half_of_the_time_for_which_it_may_be_used(
    life: float, max_age: float, renewed_at: float
) -> None:
    # One that lives for 15 minutes was never renewed ahead where it may be 55 minutes old: each
    # time it ran out, the next connection waited.
    held, freshness = credential(T0, T0 + life), Freshness(max_age, 120)
    assert judge(held, T0 + renewed_at, freshness) is Need.USE
    assert judge(held, T0 + renewed_at + 0.001, freshness) is Need.USE_AND_REFRESH


@pytest.mark.parametrize(
    ("max_age", "lengthened"), [(60, 450), (0, 60), (1000, 3480), (3300, 3480)]
)
def test_the_first_429_lengthens_the_accepted_age_many_times_as_far_as_tokens_are_valid(
    max_age: float, lengthened: float
) -> None:
    age = AcceptedAge(Freshness(max_age, 120))
    assert (age.seconds, age.lengthened) == (max_age, False)
    age.lengthen(T0, HOUR)
    assert (age.seconds, age.lengthened) == (lengthened, True)


def test_after_two_tokens_each_429_lengthens_the_accepted_age_by_half() -> None:
    age = AcceptedAge(MINUTE)
    age.shorten()
    age.shorten()
    age.lengthen(T0, HOUR)
    assert age.seconds == 90
    age.lengthen(T0 + 1000, HOUR)
    assert age.seconds == 135


def test_with_the_second_token_a_start_is_over() -> None:
    # A fleet of 2,000 that may mint 50 tokens a second kept ages of eight minutes for hours: an
    # outage of 55 minutes found tokens that were too old for it.
    age = AcceptedAge(MINUTE)
    age.shorten()
    age.lengthen(T0, HOUR)
    assert age.seconds == 450
    age.shorten()
    assert age.seconds == 210


def test_a_long_wait_for_the_first_token_outlasts_the_start() -> None:
    # A proxy that waited for minutes must not renew its token in seconds.
    age = AcceptedAge(MINUTE)
    for waited in (0, 4, 100):
        age.lengthen(T0 + waited, HOUR)
    assert age.seconds == 750
    age.shorten()
    age.shorten()
    assert 700 < age.seconds < 750


def test_an_accepted_age_is_bounded_by_the_validity_of_tokens() -> None:
    age = AcceptedAge(MINUTE)
    age.lengthen(T0, HOUR)
    age.lengthen(T0 + 10_000, HOUR)
    assert age.seconds == HOUR - 120
    age.lengthen(T0 - HOUR, 900)  # the clock was set back, and the tokens live for less
    assert age.seconds == 900 - 120


def test_an_age_is_shortened_more_the_longer_it_is_and_the_more_calls_succeed() -> None:
    def shortened(seconds: float, successes: int) -> float:
        age = AcceptedAge(MINUTE)
        age.shorten()
        age.shorten()
        while age.seconds < seconds:
            age.lengthen(T0, HOUR)
        for _ in range(successes - 1):
            age.shorten()
        before = age.seconds
        age.shorten()
        return 1 - age.seconds / before

    assert 0 < shortened(100, 1) < shortened(3000, 1) < 0.05
    assert shortened(100, 1) < shortened(100, 10) < 0.05


@pytest.mark.parametrize("max_age", [0, 60])
def test_successes_shorten_the_accepted_age_to_the_one_set(max_age: float) -> None:
    age = AcceptedAge(Freshness(max_age, 120))
    age.lengthen(T0, HOUR)
    for _ in range(200):
        assert age.seconds >= max_age
        age.shorten()
    assert (age.seconds, age.lengthened) == (max_age, False)


@pytest.mark.parametrize("valid_seconds", [0, 30, 61, 200, HOUR])
@pytest.mark.parametrize("failures", [0, 1, 5, 2000])
@pytest.mark.parametrize("jitter", [0.0, 1.0])
@pytest.mark.parametrize("throttled", [False, True])
def test_a_renewal_is_tried_again_after_a_minute_or_more_and_before_its_token_expires(
    valid_seconds: float, failures: int, jitter: float, throttled: bool
) -> None:
    delay = renewal_delay(valid_seconds, throttled=throttled)
    longest = 120 if throttled else 600
    assert 60 <= delay.seconds(failures, jitter, 0) <= max(60, min(longest, valid_seconds))
