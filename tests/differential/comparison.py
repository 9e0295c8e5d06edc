"""What PostgreSQL and the proxy may answer differently: the table, and the comparison.

The table is section 10 of the wire protocol's cases. A row takes two lists of messages and hands
them back without the one difference that it allows, and changes nothing else; so what is left must
be equal. Differences that belong to one exchange alone (W3 and W4) are spelled at that exchange.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from struct import pack, unpack_from
from typing import Final

from proxy.wire.messages import ErrorResponse, Frame, decode_backend
from tests.differential.exchange_client import Transcript

_SHOWN_BYTES: Final = 300
_LOGIN_OK: Final = Frame(b"R", bytes(4))
# What tells a proxy's own error from one that it passes on: only PostgreSQL names its source.
_REASON: Final = b"reason="
_SOURCE_FILE: Final = b"F"
_COMPARED_FIELDS: Final = (b"S", b"V", b"C", b"M")
_TEMPORARY_SCHEMA: Final = re.compile(rb"pg_temp_\d+\b")
_DATABASE_MISSING: Final = b"3D000"

Messages = list[Frame]
Both = tuple[Messages, Messages]


@dataclass(frozen=True, slots=True)
class Allowance:
    """One allowed difference."""

    name: str
    apply: Callable[[Messages, Messages], Both]


def _key_contents(direct: Messages, proxied: Messages) -> Both:
    """BackendKeyData: there on both sides or on none, but each session has its own."""

    def masked(messages: Messages) -> Messages:
        return [Frame(b"K", b"key") if one.type == b"K" else one for one in messages]

    return masked(direct), masked(proxied)


def _early_ok(direct: Messages, proxied: Messages) -> Both:
    """AuthenticationOk before a login error: PostgreSQL sends it, the proxy waits (W24)."""
    refused = all(
        messages and messages[-1].type == b"E" and not any(one.type == b"Z" for one in messages)
        for messages in (direct, proxied)
    )
    if refused and _LOGIN_OK in direct and _LOGIN_OK not in proxied:
        return [one for one in direct if one != _LOGIN_OK], proxied
    return direct, proxied


def _own_error_fields(direct: Messages, proxied: Messages) -> Both:
    """An error that the proxy makes itself: no F, L, R, and a D and H of its own."""
    if len(direct) != len(proxied):
        return direct, proxied
    pairs = [_without_own_fields(*pair) for pair in zip(direct, proxied, strict=True)]
    return [one for one, _ in pairs], [other for _, other in pairs]


def _without_own_fields(direct: Frame, proxied: Frame) -> tuple[Frame, Frame]:
    if direct.type != b"E" or proxied.type != b"E":
        return direct, proxied
    theirs, ours = decode_backend(direct), decode_backend(proxied)
    assert isinstance(theirs, ErrorResponse)
    assert isinstance(ours, ErrorResponse)
    fields = dict(ours.fields)
    if _SOURCE_FILE in fields or not fields.get(b"D", b"").startswith(_REASON):
        return direct, proxied
    return _only_compared(theirs), _only_compared(ours)


def _only_compared(error: ErrorResponse) -> Frame:
    fields = tuple(field for field in error.fields if field[0] in _COMPARED_FIELDS)
    payload = b"".join(name + value + b"\0" for name, value in fields) + b"\0"
    return Frame(b"E", payload)


def _reason_passed_on(direct: Messages, proxied: Messages) -> Both:
    """A refusal of PostgreSQL's that has no D: the proxy puts its reason there."""
    ours = [_without_reason(one) for one in proxied]
    return (direct, ours) if direct[-1:] == ours[-1:] else (direct, proxied)


def _without_reason(frame: Frame) -> Frame:
    error = decode_backend(frame) if frame.type == b"E" else None
    if not isinstance(error, ErrorResponse):
        return frame
    fields = b"".join(
        name + value + b"\0"
        for name, value in error.fields
        if not (name == b"D" and value.startswith(_REASON))
    )
    return Frame(b"E", fields + b"\0")


def _database_hint(direct: Messages, proxied: Messages) -> Both:
    """A missing database: PostgreSQL's error as it is, and a hint at Lakebase's default one."""
    ours = [_without_reason(_without_hint(one)) for one in proxied]
    return (direct, ours) if direct[-1:] == ours[-1:] else (direct, proxied)


def _without_hint(frame: Frame) -> Frame:
    error = decode_backend(frame) if frame.type == b"E" else None
    if not isinstance(error, ErrorResponse) or (b"C", _DATABASE_MISSING) not in error.fields:
        return frame
    fields = b"".join(name + value + b"\0" for name, value in error.fields if name != b"H")
    return Frame(b"E", fields + b"\0")


# "PG version in v and in 0A000 texts" has no row: those exchanges run against a PostgreSQL that
# speaks what the proxy speaks. Nor has "N where PG answers S or G": it answers N here.
ALLOWED: Final = (
    Allowance("the contents of K", _key_contents),
    Allowance("AuthenticationOk before a login error", _early_ok),
    Allowance("fields of errors the proxy makes itself", _own_error_fields),
    # Not of section 10, but of the table of login errors in the Lakebase facts.
    Allowance("the reason in a refusal of PostgreSQL's", _reason_passed_on),
    Allowance("the hint that a missing database gets", _database_hint),
)


def difference(direct: Sequence[Transcript], proxied: Sequence[Transcript]) -> str:
    """Return what PostgreSQL and the proxy said differently beyond the table; empty if nothing."""
    if len(direct) != len(proxied):
        return f"{len(direct)} connections, {len(proxied)} through the proxy"
    theirs, ours = _known_pids(direct), _known_pids(proxied)
    found = (
        _one_difference(one, other, theirs, ours)
        for one, other in zip(direct, proxied, strict=True)
    )
    return "\n".join(text for text in found if text)


def _one_difference(
    direct: Transcript, proxied: Transcript, theirs: Mapping[int, int], ours: Mapping[int, int]
) -> str:
    if direct.bare != proxied.bare:
        return f"outside messages: {direct.bare!r}, {proxied.bare!r} through the proxy"
    if direct.ended != proxied.ended:
        return f"ended: {direct.ended}, {proxied.ended} through the proxy"
    if direct.rest != proxied.rest:
        return f"unfinished: {direct.rest!r}, {proxied.rest!r} through the proxy"
    left = [_without_numbers(frame, theirs) for frame in direct.frames]
    right = [_without_numbers(frame, ours) for frame in proxied.frames]
    for allowance in ALLOWED:
        left, right = allowance.apply(left, right)
    for index, (one, other) in enumerate(zip_longest(left, right)):
        if one != other:
            return f"message {index}: {_shown(one)}\nthrough the proxy: {_shown(other)}"
    return ""


def _known_pids(transcripts: Sequence[Transcript]) -> dict[int, int]:
    """Return the connections' numbers by the pid that each was given (W27)."""
    return {
        unpack_from("!i", frame.payload)[0]: number
        for number, transcript in enumerate(transcripts)
        for frame in transcript.frames
        if frame.type == b"K"
    }


def _without_numbers(frame: Frame, pids: Mapping[int, int]) -> Frame:
    """Return a frame without what PostgreSQL numbers its backends by.

    A NotificationResponse gets its sender's number in the script for the pid: a consequence of K,
    the pid must be one that a connection of the script was given. An error or notice about a
    temporary object names a schema that has its backend's number.
    """
    if frame.type == b"A":
        (pid,) = unpack_from("!i", frame.payload)
        return Frame(b"A", pack("!i", pids[pid]) + frame.payload[4:]) if pid in pids else frame
    if frame.type in b"EN":
        return Frame(frame.type, _TEMPORARY_SCHEMA.sub(b"pg_temp", frame.payload))
    return frame


def _shown(frame: Frame | None) -> str:
    if frame is None:
        return "nothing"
    return f"{frame.type.decode('latin1')} {frame.payload[:_SHOWN_BYTES]!r}"
