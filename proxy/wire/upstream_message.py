"""The StartupMessage that is sent upstream for a client, as Lakebase's front end accepts it.

Not for when it is sent: see `upstream_startup`. A front end may drop every startup parameter but
five without an error, so the client's other settings move into `options` (W50). Protocol options
(`_pq_.`) concern the client's connection alone and are never sent upstream (W13).
"""

from collections.abc import Sequence
from typing import Final

from proxy.wire.options import Setting, appended, parse_switches
from proxy.wire.startup import FIRST_PACKET_BYTES_MAX, V3_0, StartupMessage
from proxy.wire.violations import ClientReason, ClientViolation

# Sent as startup parameters of their own: a front end may drop all others without an error (W50).
_FORWARDED_PARAMETERS: Final = (
    b"user",
    b"database",
    b"replication",
    b"options",
    b"application_name",
)
# What a pooled host tracks for each client; it refuses any other setting. In lower case.
_POOLED_SETTINGS: Final = (
    b"client_encoding",
    b"datestyle",
    b"timezone",
    b"standard_conforming_strings",
    b"application_name",
    b"intervalstyle",
)
_PROTOCOL_OPTION_PREFIX: Final = b"_pq_."
_INVALID_NAME: Final = "42602"
_UNDEFINED_OBJECT: Final = "42704"
_PROGRAM_LIMIT_EXCEEDED: Final = "54000"


def upstream_message(
    client: StartupMessage, user: bytes, database: bytes, defaults: Sequence[Setting] = ()
) -> StartupMessage:
    """Return the StartupMessage that is sent upstream for this client (W50).

    The client's settings are appended to its own `options`. `defaults` come before them, so that
    the client's have effect; they are left out where the packet would be too long with them.

    Raises ClientViolation for a name that no setting can have, or a packet too long (W51).
    """
    pairs = {b"user": user, b"database": database}
    extra: list[Setting] = []
    for name, value in client.parameters:
        if name.lower() == b"application_name":
            pairs[b"application_name"] = value
        elif name == b"replication":
            pairs[name] = value
        elif name not in _FORWARDED_PARAMETERS and not name.startswith(_PROTOCOL_OPTION_PREFIX):
            extra.append(_setting(name, value))
    own = appended(client.get(b"options") or b"", extra)
    message = _with_options(pairs, appended(b"", defaults), own)
    if len(message.encode()) >= FIRST_PACKET_BYTES_MAX:
        message = _with_options(pairs, b"", own)
    return _within_the_bound(message)


def pooled_message(client: StartupMessage, user: bytes, database: bytes) -> StartupMessage:
    """Return the StartupMessage for a pooled host, where settings are startup pairs.

    Raises UnpooledSetting for one that the pooler does not track, or ClientViolation for a packet
    too long (W51).
    """
    given: list[tuple[bytes, bytes]] = []
    for switch in parse_switches(client.get(b"options") or b""):
        if switch.setting is None or switch.flags:
            raise UnpooledSetting(b" ".join(word.text for word in switch.words))
        given.append((switch.setting.name, switch.setting.value))
    given += [
        (name, value)
        for name, value in client.parameters
        if name not in (b"user", b"database", b"options")
        and not name.startswith(_PROTOCOL_OPTION_PREFIX)
    ]
    pairs = {b"user": (b"user", user), b"database": (b"database", database)}
    for name, value in given:
        if name.lower() not in _POOLED_SETTINGS and name != b"replication":
            raise UnpooledSetting(name)
        pairs[name.lower()] = (name, value)
    return _within_the_bound(StartupMessage(V3_0, tuple(pairs.values())))


class UnpooledSetting(Exception):
    """A pooled host does not take this setting; `name` is as the client wrote it."""

    def __init__(self, name: bytes) -> None:
        self.name = name.decode("utf-8", "replace")
        super().__init__(self.name)


def _with_options(pairs: dict[bytes, bytes], defaults: bytes, own: bytes) -> StartupMessage:
    options = b" ".join(part for part in (defaults, own) if part)
    added = ((b"options", options),) if options else ()
    return StartupMessage(V3_0, (*pairs.items(), *added))


def _within_the_bound(message: StartupMessage) -> StartupMessage:
    if len(message.encode()) >= FIRST_PACKET_BYTES_MAX:
        raise ClientViolation(
            "startup packet too long for the upstream",
            reason=ClientReason.STARTUP_TOO_LONG,
            sqlstate=_PROGRAM_LIMIT_EXCEEDED,
        )
    return message


def _setting(name: bytes, value: bytes) -> Setting:
    # In `options`, `=` ends a name and `-` means `_`; in a startup parameter neither is special.
    # PostgreSQL has no setting with either character, so answer as PostgreSQL would: a custom
    # (dotted) name is invalid, any other is unrecognized.
    if b"=" in name or b"-" in name:
        fault, sqlstate = (
            ("invalid configuration parameter name", _INVALID_NAME)
            if b"." in name
            else ("unrecognized configuration parameter", _UNDEFINED_OBJECT)
        )
        shown = name.decode("utf-8", "replace")
        raise ClientViolation(
            f'{fault} "{shown}"', reason=ClientReason.UNKNOWN_PARAMETER, sqlstate=sqlstate
        )
    return Setting(name, value)
