"""The StartupMessage that is sent upstream for a client, as Lakebase's front end accepts it.

Not for when it is sent: see `upstream_startup`. A front end may drop every startup parameter but
five without an error, so the client's other settings move into `options` (W50). Protocol options
(`_pq_.`) concern the client's connection alone and are never sent upstream (W13).
"""

from collections.abc import Sequence
from typing import Final

from proxy.wire.options import Setting, appended
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
    for first in (appended(b"", defaults), b""):
        if options := b" ".join(part for part in (first, own) if part):
            pairs[b"options"] = options
        message = StartupMessage(V3_0, tuple(pairs.items()))
        if len(message.encode()) < FIRST_PACKET_BYTES_MAX:
            return message
    raise ClientViolation(
        "startup packet too long for the upstream",
        reason=ClientReason.STARTUP_TOO_LONG,
        sqlstate=_PROGRAM_LIMIT_EXCEEDED,
    )


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
