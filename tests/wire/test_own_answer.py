"""Reading the answers to the proxy's own requests: what is dropped, what a login reported."""

import pytest

from proxy.wire.messages import Frame
from proxy.wire.own_answer import OWN_ANSWER_BYTES_MAX, OwnAnswer, reported_parameters
from proxy.wire.upstream_startup import UpstreamRefused
from proxy.wire.violations import UpstreamViolation
from tests.wire.driving import BACKEND_KEY_DATA, READY_FOR_QUERY, message

NOTICE = message(b"N", b"SNOTICE\0VNOTICE\0C00000\0Mhello\0\0")
TIME_ZONE = message(b"S", b"TimeZone\0Etc/UTC\0")
APPLICATION = message(b"S", b"application_name\0\0")


def test_the_parameters_that_a_login_reported_are_found_among_its_other_messages() -> None:
    later = message(b"S", b"TimeZone\0CET\0")
    welcome = TIME_ZONE + NOTICE + APPLICATION + BACKEND_KEY_DATA + later + READY_FOR_QUERY
    assert reported_parameters(welcome) == {b"TimeZone": b"CET", b"application_name": b""}
    assert reported_parameters(b"") == {}


def test_notices_are_dropped_and_parameters_compared() -> None:
    answer = OwnAnswer({b"TimeZone": b"CET"})
    assert answer.next() is None
    answer.feed(NOTICE + TIME_ZONE + APPLICATION + READY_FOR_QUERY + b"Z")
    assert answer.next() == Frame(b"Z", b"I")
    assert answer.changed == (b"TimeZone", b"application_name")
    assert answer.next() is None
    assert answer.trailing_data() == b"Z"


def test_an_error_is_returned_as_it_is() -> None:
    error = message(b"E", b"SFATAL\0VFATAL\0C57P01\0Mgoodbye\0\0")
    answer = OwnAnswer({})
    answer.feed(error)
    refused = answer.next()
    assert isinstance(refused, UpstreamRefused)
    assert (refused.error.sqlstate, refused.raw) == ("57P01", error)


def test_headers_count_for_the_bound() -> None:
    answer = OwnAnswer({})
    answer.feed(message(b"A") * (OWN_ANSWER_BYTES_MAX // 5 + 1))
    with pytest.raises(UpstreamViolation, match="more than"):
        list(iter(answer.next, None))
