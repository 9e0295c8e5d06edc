"""Frontend messages as scripts write them, and the exchanges that are made of them.

The proxy builds none of these, so they are spelled here and not in `proxy/wire`. Nothing is
checked: a script may well say what no driver would.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import pack
from typing import Final

from proxy.emulator.cluster import CLIENT_ID, DATABASE
from proxy.wire.messages import Frame
from proxy.wire.startup import V3_0, ProtocolVersion, StartupMessage
from tests.support.scripted_client import Step

Text = str | bytes
Pairs = Sequence[tuple[Text, Text]]

SYNC: Final = Frame(b"S", b"").encode()
FLUSH: Final = Frame(b"H", b"").encode()
COPY_DONE: Final = Frame(b"c", b"").encode()
TERMINATE: Final = Frame(b"X", b"").encode()

# A write for each byte: more would take seconds.
SMALL_BYTES_MAX: Final = 4000

IDENTITY: Final[Pairs] = (("user", CLIENT_ID), ("database", DATABASE))


@dataclass(frozen=True, slots=True)
class Exchange:
    """One scripted exchange. `name` says what is special about it."""

    name: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def encoded(text: Text) -> bytes:
    """Return text as UTF-8, bytes as they are."""
    return text.encode() if isinstance(text, str) else text


def message(kind: bytes, payload: bytes = b"") -> bytes:
    """Return a message of any type."""
    return Frame(kind, payload).encode()


def _string(text: Text) -> bytes:
    return encoded(text) + b"\0"


def _counted(codes: Iterable[int], code: str) -> bytes:
    codes = tuple(codes)
    return pack(f"!h{len(codes)}{code}", len(codes), *codes)


def _values(values: Iterable[Text | None]) -> bytes:
    values = tuple(values)
    parts = [pack("!h", len(values))]
    for value in values:
        content = b"" if value is None else encoded(value)
        parts.append(pack("!i", -1 if value is None else len(content)) + content)
    return b"".join(parts)


def startup(
    *more: tuple[Text, Text], version: ProtocolVersion = V3_0, identity: Pairs = IDENTITY
) -> bytes:
    """Return a StartupMessage."""
    pairs = tuple((encoded(name), encoded(value)) for name, value in (*identity, *more))
    return StartupMessage(version, pairs).encode()


def query(sql: Text) -> bytes:
    """Return a Query."""
    return message(b"Q", _string(sql))


def parse(sql: Text, name: str = "", types: Iterable[int] = ()) -> bytes:
    """Return a Parse; `types` are the parameters' type OIDs."""
    return message(b"P", _string(name) + _string(sql) + _counted(types, "i"))


def bind(
    values: Iterable[Text | None] = (),
    statement: str = "",
    portal: str = "",
    formats: Iterable[int] = (),
    results: Iterable[int] = (),
) -> bytes:
    """Return a Bind; formats are 0 for text and 1 for binary."""
    names = _string(portal) + _string(statement)
    return message(b"B", names + _counted(formats, "h") + _values(values) + _counted(results, "h"))


def describe(kind: bytes, name: str = "") -> bytes:
    """Return a Describe of a statement (S) or a portal (P)."""
    return message(b"D", kind + _string(name))


def execute(portal: str = "", rows_max: int = 0) -> bytes:
    """Return an Execute; 0 is all rows."""
    return message(b"E", _string(portal) + pack("!i", rows_max))


def close(kind: bytes, name: str = "") -> bytes:
    """Return a Close of a statement (S) or a portal (P)."""
    return message(b"C", kind + _string(name))


def extended(sql: Text, *values: Text | None, results: Iterable[int] = ()) -> bytes:
    """Return what a driver sends for one statement, without the Sync."""
    return parse(sql) + bind(values, results=results) + describe(b"P") + execute()


def copy_data(content: Text) -> bytes:
    """Return a CopyData."""
    return message(b"d", encoded(content))


def copy_fail(reason: str) -> bytes:
    """Return a CopyFail."""
    return message(b"f", _string(reason))


def function_call(
    function: int, *values: Text | None, formats: Iterable[int] = (), result: int = 0
) -> bytes:
    """Return a FunctionCall of the function with this OID."""
    body = pack("!i", function) + _counted(formats, "h") + _values(values)
    return message(b"F", body + pack("!h", result))


def say(*content: bytes, wait: bytes = b"Z", on: int = 0) -> Step:
    """Return a step that sends these messages in one piece and waits for these answers."""
    return Step(b"".join(content), wait, on=on)


def ask(*statements: Text, on: int = 0) -> tuple[Step, ...]:
    """Return a step for each statement, as a Query."""
    return tuple(say(query(sql), on=on) for sql in statements)


def until_end(*content: bytes) -> Step:
    """Return a step that sends and waits for the server to close."""
    return Step(b"".join(content), ends=True)


OPENING: Final = say(startup())
LEAVING: Final = until_end(TERMINATE)


def small(exchanges: Sequence[Exchange], every: int) -> list[Exchange]:
    """Return every so-manieth exchange that is short enough to be sent in very small pieces."""
    short = (
        one for one in exchanges if sum(len(step.content) for step in one.steps) <= SMALL_BYTES_MAX
    )
    return list(short)[::every]


def session(name: str, *steps: Step | tuple[Step, ...]) -> Exchange:
    """Return an exchange in a session: login first, Terminate last."""
    flat = [one for step in steps for one in (step if isinstance(step, tuple) else (step,))]
    return Exchange(name, (OPENING, *flat, LEAVING))


def fatal(name: str, *steps: Step) -> Exchange:
    """Return an exchange in a session that the server ends."""
    return Exchange(name, (OPENING, *steps))
