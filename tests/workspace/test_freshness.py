"""The freshness of tokens: the rule as a table."""

import pytest

from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.freshness import Freshness, Need, is_valid, judge

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
