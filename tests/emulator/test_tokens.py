"""Tokens: long, in JWT format, valid for one purpose and one workspace until they expire."""

import pytest

from proxy.emulator.tokens import (
    TOKEN_BYTES_MIN,
    Purpose,
    TokenIssuer,
    TokenProblem,
    TokenRefused,
    fingerprint,
)


class _Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def _problem(issuer: TokenIssuer, token: str, purpose: Purpose = Purpose.DATABASE) -> TokenProblem:
    with pytest.raises(TokenRefused) as refused:
        issuer.inspect(token, purpose)
    assert token not in str(refused.value) or not token
    return refused.value.problem


def test_a_token_says_whose_it_is_and_until_when() -> None:
    clock = _Clock()
    issuer = TokenIssuer("1", clock)
    token = issuer.issue("ada@example.com", Purpose.DATABASE, 300)
    claims = issuer.inspect(token, Purpose.DATABASE)
    assert (claims.identity, claims.expires_at) == ("ada@example.com", clock.now + 300)


def test_a_token_overflows_a_buffer_of_two_kilobytes_and_looks_like_a_jwt() -> None:
    token = TokenIssuer("1", _Clock()).issue("x", Purpose.DATABASE, 300)
    assert len(token) >= TOKEN_BYTES_MIN > 2048
    assert token.startswith("eyJ")
    assert token.count(".") == 2


def test_no_two_tokens_are_the_same() -> None:
    issuer = TokenIssuer("1", _Clock())
    tokens = [issuer.issue("x", Purpose.DATABASE, 300) for _ in range(3)]
    assert len({fingerprint(token) for token in tokens}) == 3
    assert fingerprint(tokens[0].encode()) == fingerprint(tokens[0])


def test_a_token_expires_at_its_second() -> None:
    clock = _Clock()
    issuer = TokenIssuer("1", clock)
    token = issuer.issue("x", Purpose.DATABASE, 300)
    clock.now += 299
    issuer.inspect(token, Purpose.DATABASE)
    clock.now += 1
    assert _problem(issuer, token) is TokenProblem.EXPIRED


def test_another_workspace_does_not_know_the_key() -> None:
    token = TokenIssuer("2", _Clock()).issue("x", Purpose.DATABASE, 300)
    assert _problem(TokenIssuer("1", _Clock()), token) is TokenProblem.UNKNOWN_KEY


def test_a_workspace_token_is_no_database_credential() -> None:
    issuer = TokenIssuer("1", _Clock())
    token = issuer.issue("x", Purpose.WORKSPACE, 300)
    assert _problem(issuer, token) is TokenProblem.WRONG_AUDIENCE


@pytest.mark.parametrize("password", ["", "dapi-not-a-real-token", "eyJ.x.", "eyJ.eyJ", "a.b.c"])
def test_a_password_is_no_token(password: str) -> None:
    assert _problem(TokenIssuer("1", _Clock()), password) is TokenProblem.NOT_A_JWT


def test_a_changed_token_is_refused() -> None:
    issuer = TokenIssuer("1", _Clock())
    header, body, signature = issuer.issue("x", Purpose.DATABASE, 300).split(".")
    assert _problem(issuer, f"{header}.{body[:-4]}AAAA.{signature}") is TokenProblem.UNKNOWN_KEY
