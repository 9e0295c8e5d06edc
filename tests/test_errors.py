"""The closed list of refusals, and the ErrorResponse for each."""

import re

import pytest

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.wire.framing import MessageReader
from proxy.wire.messages import ErrorResponse, decode_backend

KINDS = pytest.mark.parametrize("kind", list(ErrorKind), ids=lambda kind: kind.value.reason)
SEVERAL_SQLSTATES = {
    # PostgreSQL's three for an invalid value.
    "key_invalid": ["22003", "22023", "22P02"],
    # A limit that was reached by count, and a call that failed, which may succeed soon.
    "out_of_resources": ["53000", "57P03"],
}
ORIGINAL = ErrorResponse(
    (
        (b"S", "FATAL (übersetzt)".encode()),
        (b"V", b"FATAL"),
        (b"C", b"28P01"),
        (b"M", b'password authentication failed for user "app"'),
        (b"F", b"auth.c"),
        (b"L", b"326"),
        (b"R", b"auth_failed"),
        (b"?", b"a field of the future"),
    )
)


@KINDS
def test_every_kind_has_a_word_an_sqlstate_and_a_sentence(kind: ErrorKind) -> None:
    row = kind.value
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", row.reason)
    assert re.fullmatch(r"[0-9A-Z]{5}", row.sqlstate)
    assert len(row.message) > 10
    assert not row.message.endswith(".")  # as PostgreSQL writes primary messages
    assert row.hint == "" or row.hint.endswith((".", "?", ";"))
    assert isinstance(row.disposition, Disposition)


def test_kinds_that_share_a_word_share_its_sqlstate_and_differ_in_their_advice() -> None:
    for kind in ErrorKind:
        alike = [other for other in ErrorKind if other.value.reason == kind.value.reason]
        if kind.value.reason in SEVERAL_SQLSTATES:
            sqlstates = sorted(one.value.sqlstate for one in alike)
            assert sqlstates == SEVERAL_SQLSTATES[kind.value.reason]
            continue
        assert {other.value.sqlstate for other in alike} == {kind.value.sqlstate}
        helps = {(other.value.disposition, other.value.hint) for other in alike}
        assert len(helps) == len(alike)


def test_no_kind_is_an_alias_of_another() -> None:
    assert len(ErrorKind) == len(ErrorKind.__members__)


@KINDS
def test_w48_every_error_has_s_v_c_m_and_a_detail_that_begins_with_the_word(
    kind: ErrorKind,
) -> None:
    row = kind.value
    answer = ProxyError(kind, "what the other side said", user="app").response()
    fields = dict(answer.fields)
    assert [name for name, _ in answer.fields[:4]] == [b"S", b"V", b"C", b"M"]
    assert fields[b"S"] == fields[b"V"] == b"FATAL"
    assert fields[b"C"] == row.sqlstate.encode()
    assert fields[b"M"] == row.message.encode()
    assert fields[b"D"] == f"reason={row.reason} what the other side said".encode()
    assert fields.get(b"H", b"") == row.hint.format(user="app", identity="GROUP").encode()
    assert b"{user}" not in answer.encode()
    assert b"{identity}" not in answer.encode()


@KINDS
def test_an_error_can_be_encoded_and_decoded(kind: ErrorKind) -> None:
    answer = ProxyError(kind).response()
    reader = MessageReader(65536)
    reader.feed(answer.encode())
    frame = reader.next()
    assert frame is not None
    assert decode_backend(frame) == answer
    assert reader.trailing_data() == b""


def test_without_an_original_text_the_detail_is_the_word_alone() -> None:
    error = ProxyError(ErrorKind.UPSTREAM_LOST)
    assert error.response().text(b"D") == "reason=upstream_lost"
    assert error.reason == "upstream_lost"
    assert str(error) == f"upstream_lost: {ErrorKind.UPSTREAM_LOST.value.message}"


@KINDS
def test_w29_an_error_from_postgres_keeps_its_fields_in_order_and_gains_word_and_hint(
    kind: ErrorKind,
) -> None:
    error = ProxyError(kind, ORIGINAL.message, user="app", original=ORIGINAL)
    answer = error.response()
    word = b"reason=" + kind.value.reason.encode()
    hint = kind.value.hint.format(user="app", identity="GROUP").encode()
    ours = ((b"D", word), (b"H", hint)) if hint else ((b"D", word),)
    assert answer.fields == (*ORIGINAL.fields, *ours)


def test_postgres_own_detail_and_hint_are_kept() -> None:
    theirs = ((b"D", b"What Postgres knows."), (b"H", b"Postgres knows better."))
    original = ErrorResponse((*ORIGINAL.fields, *theirs))
    error = ProxyError(ErrorKind.PASSWORD_REJECTED, user="app", original=original)
    assert error.response() == original


@pytest.mark.parametrize(
    ("user", "shown"),
    [
        ("app", "('app', "),
        ("o'hara", "('o''hara', "),
        ("'); DROP TABLE t; --", "('''); DROP TABLE t; --', "),
        ("''", "('''''', "),
        ("{0}{user}{kind}%s", "('{0}{user}{kind}%s', "),
        ("back\\", "('back\\', "),  # no escape while standard_conforming_strings is on
    ],
)
def test_a_quote_in_a_role_name_cannot_leave_the_literal_in_the_hint(user: str, shown: str) -> None:
    for kind in (ErrorKind.TOKEN_REJECTED, ErrorKind.PASSWORD_REJECTED, ErrorKind.ROLE_MISSING):
        hint = ProxyError(kind, user=user).response().text(b"H")
        assert f"databricks_create_role{shown}'GROUP');" in hint


@pytest.mark.parametrize(
    ("user", "identity"),
    [
        ("5ca1ab1e-0000-4000-8000-00000000beef", "SERVICE_PRINCIPAL"),
        ("5CA1AB1E-0000-4000-8000-00000000BEEF", "SERVICE_PRINCIPAL"),
        ("5ca1ab1e-0000-4000-8000-00000000bee", "GROUP"),
        ("ada@example.com", "USER"),
        ("data team", "GROUP"),
    ],
)
def test_the_statement_in_the_hint_has_the_kind_of_identity_of_the_role(
    user: str, identity: str
) -> None:
    hint = ProxyError(ErrorKind.ROLE_MISSING, user=user).response().text(b"H")
    assert f"databricks_create_role('{user}', '{identity}');" in hint


def test_a_nul_in_the_original_text_cannot_end_the_field() -> None:
    answer = ProxyError(ErrorKind.UPSTREAM_ERROR, "one\0Mtwo").response()
    assert answer.encode().count(b"\0M") == 1
    assert answer.text(b"D") == "reason=upstream_error one Mtwo"


def test_a_role_that_is_not_utf_8_can_be_shown() -> None:
    user = b"\xff\xfe".decode("utf-8", "replace")
    assert ProxyError(ErrorKind.ROLE_MISSING, user=user).response().encode()
