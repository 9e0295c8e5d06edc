"""Frontend messages as scripts write them, and the exchanges that are made of them.

The proxy builds none of these, so they are spelled here and not in `proxy/wire`. Nothing is
checked: a script may well say what no driver would.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from struct import pack
from typing import Final

import pytest

from proxy.emulator.cluster import CLIENT_ID, DATABASE
from proxy.wire.messages import Frame
from proxy.wire.startup import V3_0, ProtocolVersion, StartupMessage
from tests.support.cuts import Cut, at_random, byte_by_byte, whole
from tests.support.script import ReadToEnd, ReadUntil, Send, Step

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
class On:
    """Steps on another connection than the exchange's first."""

    connection: int
    steps: tuple[Step, ...]


Steps = Step | On | tuple["Steps", ...]


@dataclass(frozen=True, init=False)
class Exchange:
    """One scripted exchange. `name` says what is special about it."""

    name: str
    steps: tuple[Step | On, ...]

    def __init__(self, name: str, *steps: Steps) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "steps", tuple(_flat(steps)))

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def sent_bytes(self) -> int:
        """The bytes that are sent on the first connection."""
        return sum(len(step.content) for step in self.steps if isinstance(step, Send))


def _flat(steps: Steps) -> Iterator[Step | On]:
    if isinstance(steps, tuple):
        for step in steps:
            yield from _flat(step)
    else:
        yield steps


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


def say(*content: bytes, wait: bytes = b"Z", on: int = 0) -> Steps:
    """Return steps that send these messages in one piece and wait for these answers."""
    steps = (Send(b"".join(content)), ReadUntil(wait))
    return On(on, steps) if on else steps


def ask(*statements: Text, on: int = 0) -> Steps:
    """Return steps for each statement, as a Query."""
    return tuple(say(query(sql), on=on) for sql in statements)


def until_end(*content: bytes) -> tuple[Step, ...]:
    """Return steps that send and wait for the server to close."""
    return (Send(b"".join(content)), ReadToEnd())


OPENING: Final = (Send(startup()), ReadUntil(b"Z"))
LEAVING: Final = until_end(TERMINATE)


def session(name: str, *steps: Steps) -> Exchange:
    """Return an exchange in a session: login first, Terminate last."""
    return Exchange(name, OPENING, steps, LEAVING)


def fatal(name: str, *steps: Steps) -> Exchange:
    """Return an exchange in a session that the server ends."""
    return Exchange(name, OPENING, steps)


def small(exchanges: Sequence[Exchange], every: int) -> list[Exchange]:
    """Return every so-manieth exchange that is short enough to be sent in very small pieces."""
    return [one for one in exchanges if one.sent_bytes <= SMALL_BYTES_MAX][::every]


def in_three_ways(
    *exchanges: Exchange, bytes_every: int = 4, random_every: int = 3
) -> pytest.MarkDecorator:
    """Run a test with each exchange whole, and with some of the short ones in small pieces."""
    cases: list[tuple[Exchange, Cut]] = [(one, whole) for one in exchanges]
    cases += [(one, byte_by_byte) for one in small(exchanges, bytes_every)]
    cases += [(one, at_random) for one in small(exchanges, random_every)]
    ids = [f"{exchange}-{cut.__name__}" for exchange, cut in cases]
    return pytest.mark.parametrize(("exchange", "cut"), cases, ids=ids)
