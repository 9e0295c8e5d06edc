"""The comparison itself: what section 10 allows passes, and nothing beside it does."""

from struct import pack

import pytest

from proxy.wire.messages import BackendKeyData, ErrorResponse, Frame, ReadyForQuery
from proxy.wire.secret import Secret
from tests.differential.comparison import difference
from tests.differential.exchange_client import Transcript

READY = Frame(b"Z", ReadyForQuery(b"I").encode()[5:])
LOGIN_OK = Frame(b"R", bytes(4))


def key(pid: int, content: bytes = b"none") -> Frame:
    return Frame(b"K", BackendKeyData(pid, Secret(content)).encode()[5:])


def notification(pid: int) -> Frame:
    return Frame(b"A", pack("!i", pid) + b"news\0\0")


def error(sqlstate: str, text: str = "told", *more: tuple[bytes, bytes]) -> Frame:
    fields = (*ErrorResponse.fatal(sqlstate, text).fields, *more)
    return Frame(b"E", ErrorResponse(fields).encode()[5:])


def told(*frames: Frame, ended: bool = True) -> list[Transcript]:
    return [Transcript(frames=list(frames), ended=ended)]


OWN = (b"D", b"reason=of_the_proxy")
FILE = (b"F", b"postgres.c")

ALLOWED = {
    "the key's contents": ([key(1), READY], [key(2, b"n" * 32), READY]),
    "the pid that a key showed": ([key(1), notification(1)], [key(2), notification(2)]),
    "an early Ok": ([LOGIN_OK, error("3D000")], [error("3D000")]),
    "fields of an own error": ([error("0A000", "told", FILE)], [error("0A000", "told", OWN)]),
    "the reason of an error passed on": (
        [error("42704", "told", FILE)],
        [error("42704", "told", FILE, OWN)],
    ),
    "a missing database's hint": ([error("3D000")], [error("3D000", "told", (b"H", b"h"))]),
}

NOT_ALLOWED = {
    "no key": ([key(1), READY], [READY]),
    "a key in another place": ([key(1), READY], [READY, key(1)]),
    "a pid that no key showed": ([key(1), notification(1)], [key(2), notification(3)]),
    "a pid that no session has": ([key(1), notification(5)], [key(2), notification(6)]),
    "an Ok too many": ([error("3D000")], [LOGIN_OK, error("3D000")]),
    "no Ok before a session": ([LOGIN_OK, READY], [READY]),
    "another SQLSTATE": ([error("0A000")], [error("08P01", "told", OWN)]),
    "another text": ([error("0A000")], [error("0A000", "said", OWN)]),
    "fields of an error passed on": ([error("0A000", "told", FILE)], [error("0A000")]),
    "another DETAIL of an error passed on": (
        [error("42704", "told", FILE)],
        [error("42704", "told", FILE, (b"D", b"a detail"))],
    ),
    "a reason in place of a DETAIL": (
        [error("42704", "told", FILE, (b"D", b"a detail"))],
        [error("42704", "told", FILE, OWN)],
    ),
    "a hint on any other error": ([error("42704")], [error("42704", "told", (b"H", b"h"))]),
    "another status": ([READY], [Frame(b"Z", b"T")]),
    "one message less": ([READY, READY], [READY]),
    "one message more": ([READY], [READY, READY]),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_allowed_is_no_difference(case: str) -> None:
    direct, proxied = ALLOWED[case]
    assert difference(told(*direct), told(*proxied)) == ""


@pytest.mark.parametrize("case", NOT_ALLOWED)
def test_anything_else_is_a_difference(case: str) -> None:
    direct, proxied = NOT_ALLOWED[case]
    assert difference(told(*direct), told(*proxied)) != ""


def test_an_end_that_does_not_come_is_a_difference() -> None:
    assert difference(told(READY), told(READY, ended=False)) != ""


@pytest.mark.parametrize("other", [Transcript(bare=b"S"), Transcript(rest=b"Z")])
def test_bytes_outside_messages_count_too(other: Transcript) -> None:
    assert difference((Transcript(),), (other,)) != ""


def test_a_connection_that_is_missing_is_a_difference() -> None:
    assert difference((*told(), *told()), told()) != ""
