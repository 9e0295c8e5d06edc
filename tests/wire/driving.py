"""Feeding a startup machine, and writing down what came out so that it can be compared.

Expected bytes are spelled here with `struct` and literals alone, never with the code under test.
"""

from collections.abc import Iterable
from struct import pack

from proxy.wire.client_startup import ClientEvent, ClientStartup, Violated
from proxy.wire.messages import Frame
from proxy.wire.upstream_startup import UpstreamEvent, UpstreamStartup, UpstreamViolated

Pairs = Iterable[tuple[bytes, bytes]]

# The document's table of items.
SSL_REQUEST = bytes.fromhex("00 00 00 08 04 d2 16 2f")
GSSENC_REQUEST = bytes.fromhex("00 00 00 08 04 d2 16 30")
CANCEL_REQUEST = bytes.fromhex("00 00 00 10 04 d2 16 2e 00 00 04 d2 01 02 03 04")
AUTHENTICATION_OK = bytes.fromhex("52 00 00 00 08 00 00 00 00")
CLEARTEXT_PASSWORD = bytes.fromhex("52 00 00 00 08 00 00 00 03")
READY_FOR_QUERY = bytes.fromhex("5a 00 00 00 05 49")
TERMINATE = bytes.fromhex("58 00 00 00 04")
BACKEND_KEY_DATA = bytes.fromhex("4b 00 00 00 0c 00 00 04 d2 01 02 03 04")

# A whole StartupMessage: 3.0, user=app, database=main.
STARTUP = bytes.fromhex("00 00 00 20 00 03 00 00") + b"user\0app\0database\0main\0\0"


def message(type_byte: bytes, payload: bytes = b"") -> bytes:
    """Return a typed message."""
    return type_byte + pack("!I", len(payload) + 4) + payload


def startup(pairs: Pairs, version: tuple[int, int] = (3, 0), end: bytes = b"\0") -> bytes:
    """Return a StartupMessage; `end` takes the place of its terminator."""
    body = b"".join(name + b"\0" + value + b"\0" for name, value in pairs) + end
    return pack("!IHH", 8 + len(body), *version) + body


def fatal(sqlstate: str, text: str, reason: str) -> bytes:
    """Return the ErrorResponse that refuses a client: S, V, C, M, D in this order (W48)."""
    fields = ("SFATAL", "VFATAL", f"C{sqlstate}", f"M{text}", f"Dreason={reason}")
    return message(b"E", b"".join(field.encode() + b"\0" for field in fields) + b"\0")


def feed_client(machine: ClientStartup, chunks: Iterable[bytes]) -> list[ClientEvent]:
    """Feed all chunks and return all events."""
    return [event for chunk in chunks for event in machine.receive_data(chunk)]


def feed_upstream(machine: UpstreamStartup, chunks: Iterable[bytes]) -> list[UpstreamEvent]:
    """Feed all chunks and return all events."""
    return [event for chunk in chunks for event in machine.receive_data(chunk)]


def shown(events: Iterable[ClientEvent | UpstreamEvent]) -> list[str]:
    """Write events down by value: a violation is an exception, which compares by identity."""
    lines: list[str] = []
    for event in events:
        if isinstance(event, Violated):
            broken = event.violation
            lines.append(f"Violated {broken.reason} {broken.sqlstate} {event.reply!r}")
        elif isinstance(event, UpstreamViolated):
            lines.append(f"UpstreamViolated {type(event.violation).__name__} {event.violation}")
        else:
            lines.append(repr(event))
    return lines


def frames(stream: bytes) -> list[Frame]:
    """Cut a stream of whole messages by hand."""
    found: list[Frame] = []
    while stream:
        end = 1 + int.from_bytes(stream[1:5], "big")
        found.append(Frame(stream[:1], stream[5:end]))
        stream = stream[end:]
    return found
