"""The admission of one session: what its shard is asked, and what the verdict means.

For: the one query on the session's own connection, after the login and before the client's welcome,
and its verdict. Not for: what the proxy then does with the client (`admitting_opener`), or whether
the shard is the right one (`map_source`).

The shard decides: it knows which keys it has, and registers the session so that what takes the
keys away finds it. Nothing of the exchange reaches the client: the welcome is that of the login.
Values are hex digits in the query, so that no setting of the client changes how they are read.

Invariant: a connection is left open only for a verdict, and only `ok` lets the client have it.
"""

import secrets
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto, unique
from hashlib import sha256
from typing import Final
from uuid import UUID

from proxy.catalogue.model import STORE_MAJOR, Located
from proxy.errors import ErrorKind, ProxyError
from proxy.transport.stream import StartupStream
from proxy.upstream.diagnosis import diagnose_event
from proxy.wire.messages import IDLE, ErrorResponse
from proxy.wire.secret import Secret
from proxy.wire.simple_query import QueryAnswered, QueryEvent, SimpleQuery

TICKET_BYTES: Final = 16


@unique
class Verdict(StrEnum):
    """What became of an admission, as the metrics show it."""

    # The words of the shard's function.
    OK = "ok"
    STALE = "stale"
    MAPPING_MISSING = "mapping_missing"
    MAP_MISSING = "map_missing"
    OFFLINE = "offline"
    WRONG_SHARD = "wrong_shard"
    SHARD_BEHIND = "shard_behind"
    STORE_VERSION = "store_version"
    UNREGISTERED = "unregistered"
    # Errors in place of a verdict.
    FENCED = "fenced"  # a change of the mapping held its lock for too long
    SHARD_NOT_VALID = "shard_not_valid"
    VALIDATE_DENIED = "validate_denied"


class Consequence(Enum):
    """What the proxy does with a verdict."""

    SERVE = auto()
    LOOK_AGAIN = auto()  # past the cache, and dial once more
    WAIT = auto()  # look again, then park the client
    REFUSE = auto()


CONSEQUENCES: Final = {
    Verdict.OK: Consequence.SERVE,
    Verdict.STALE: Consequence.LOOK_AGAIN,
    Verdict.MAPPING_MISSING: Consequence.LOOK_AGAIN,
    Verdict.MAP_MISSING: Consequence.LOOK_AGAIN,
    Verdict.OFFLINE: Consequence.WAIT,
    Verdict.FENCED: Consequence.WAIT,
    Verdict.WRONG_SHARD: Consequence.REFUSE,
    Verdict.SHARD_BEHIND: Consequence.REFUSE,
    Verdict.STORE_VERSION: Consequence.REFUSE,
    Verdict.UNREGISTERED: Consequence.REFUSE,
    Verdict.SHARD_NOT_VALID: Consequence.REFUSE,
    Verdict.VALIDATE_DENIED: Consequence.REFUSE,
}

# What a client is told where the verdict is the last word.
_KINDS: Final = {
    Verdict.STALE: ErrorKind.MAPPING_STALE,
    Verdict.MAPPING_MISSING: ErrorKind.MAPPING_STALE,
    Verdict.MAP_MISSING: ErrorKind.MAPPING_STALE,
    Verdict.OFFLINE: ErrorKind.MAPPING_OFFLINE,
    Verdict.FENCED: ErrorKind.MAPPING_OFFLINE,
    Verdict.WRONG_SHARD: ErrorKind.WRONG_SHARD,
    Verdict.SHARD_BEHIND: ErrorKind.SHARD_BEHIND,
    Verdict.STORE_VERSION: ErrorKind.STORE_VERSION,
    Verdict.UNREGISTERED: ErrorKind.UNREGISTERED,
    Verdict.SHARD_NOT_VALID: ErrorKind.SHARD_NOT_VALID,
    Verdict.VALIDATE_DENIED: ErrorKind.VALIDATE_DENIED,
}

_SPOKEN: Final = frozenset(Verdict) - {
    Verdict.FENCED,
    Verdict.SHARD_NOT_VALID,
    Verdict.VALIDATE_DENIED,
}

# Errors that are verdicts.
_LOCK_NOT_AVAILABLE: Final = "55P03"
_VERDICTS: Final = {
    _LOCK_NOT_AVAILABLE: Verdict.FENCED,
    "3F000": Verdict.SHARD_NOT_VALID,  # no such schema
    "42883": Verdict.SHARD_NOT_VALID,  # no such function
    "42P01": Verdict.SHARD_NOT_VALID,  # no such table
    "25006": Verdict.SHARD_NOT_VALID,  # a read-only endpoint, which registers nothing
    "42501": Verdict.VALIDATE_DENIED,
}
# Worth another try: serialization failure, deadlock, statement timeout, shutdown, lost connection.
_TRANSIENT: Final = ("40001", "40P01", "57014", "57P01", "57P02", "57P03", "08")

# Explicit, as the client's defaults may be read-only or serializable. Not synchronous: the row of
# the registry dies with the server anyway.
_QUERY: Final = (
    "begin isolation level read committed read write; "
    "set local synchronous_commit = off; "
    "select verdict, current_epoch, pid from shardmap_local.admit({}); "
    "commit"
)


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What a shard is asked for one session. `proxy` is this process's name in the registry.

    A connection that serves one client after the other is registered anew for each: `secret` is
    that of its registration so far, None for a new connection.
    """

    located: Located
    routing_key: bytes = field(repr=False)
    proxy: str
    secret: Secret | None = None

    def sql(self, next_secret: Secret) -> bytes:
        """Return the query. The shard keeps the hash of `next_secret`, which replaces `secret`."""
        mapping, shard = self.located.mapping, self.located.shard
        arguments = (
            f"{STORE_MAJOR}::pg_catalog.int4",
            _uuid(mapping.map_id),
            _uuid(shard.shard_id),
            _text(shard.location),
            _uuid(mapping.mapping_id),
            f"{mapping.epoch}::pg_catalog.int8",
            _bytea(self.routing_key),
            _text(self.proxy),
            "null" if self.secret is None else _bytea(self.secret.reveal()),
            _bytea(sha256(next_secret.reveal()).digest()),
        )
        return _QUERY.format(", ".join(arguments)).encode("ascii")


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer of a shard.

    `epoch` is the shard's own, if it has the mapping; `pid` that of the backend, 0 after an error.
    `secret` registers the same backend for its next client; `detail` is for people.
    """

    verdict: Verdict
    secret: Secret
    epoch: int | None = None
    pid: int = 0
    detail: str = ""

    @property
    def consequence(self) -> Consequence:
        """The next step of the proxy."""
        return CONSEQUENCES[self.verdict]

    def refusal(self, shard: str) -> ProxyError:
        """Return the error for the client of a session that was not admitted."""
        detail = f"verdict={self.verdict} {self.detail}".rstrip()
        return ProxyError(_KINDS[self.verdict], f"{shard}: {detail}")


async def admit(stream: StartupStream, request: AdmissionRequest) -> Admission:
    """Ask the shard to admit a session that has logged in. The caller bounds the time.

    Raises ProxyError if there is no verdict; the connection is closed then.
    """
    secret = Secret(secrets.token_bytes(TICKET_BYTES))
    try:
        answer = await _ask(stream, request.sql(secret))
        if answer.error is not None:
            return _verdict_of(answer.error, secret)
        return _parse(answer, secret)
    except BaseException:
        stream.transport.close()
        raise


async def _ask(stream: StartupStream, sql: bytes) -> QueryAnswered:
    """Return the answer to a query. Raises ProxyError."""
    query = SimpleQuery()
    stream.write(query.ask(sql))
    # What came after the login's ReadyForQuery is of no statement: notices, or reloaded parameters.
    events: list[QueryEvent] = []
    while not events:
        events = await _next_events(stream, query)
    (event,) = events
    if not isinstance(event, QueryAnswered):
        raise diagnose_event(event)
    # The client hears of a parameter that changed since its session was kept.
    stream.unread(event.parameters + query.trailing_data())
    return event


async def _next_events(stream: StartupStream, query: SimpleQuery) -> list[QueryEvent]:
    data = await stream.receive()
    return query.receive_data(data) if data else query.receive_eof()


def _verdict_of(error: ErrorResponse, secret: Secret) -> Admission:
    """Return the verdict that an error is. Raises ProxyError for one that is none."""
    verdict = _VERDICTS.get(error.sqlstate)
    if verdict is not None:
        return Admission(verdict, secret, detail=f"{error.sqlstate}: {error.message}")
    if error.sqlstate.startswith(_TRANSIENT):
        detail = f"at the admission to the shard: {error.message}"
        raise ProxyError(ErrorKind.UPSTREAM_LOST, detail)
    raise ProxyError(ErrorKind.STARTUP_REFUSED, error.message, original=error)


def _parse(answer: QueryAnswered, secret: Secret) -> Admission:
    """Return the admission in the one row of an answer. Raises ProxyError."""
    try:
        ((word, epoch, pid),) = answer.rows
        verdict = Verdict((word or b"").decode("ascii"))
        if verdict not in _SPOKEN or answer.transaction_status != IDLE:
            raise ValueError(f"no verdict of a shard: {verdict}")
        found = None if epoch is None else int(epoch)
        return Admission(verdict, secret, found, int(pid or b""))
    except ValueError as error:
        detail = "the answer to the admission is none"
        raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, detail) from error


def _uuid(value: UUID) -> str:
    return f"'{value}'::pg_catalog.uuid"


def _bytea(value: bytes) -> str:
    return f"pg_catalog.decode('{value.hex()}','hex')"


def _text(value: str) -> str:
    return f"pg_catalog.convert_from({_bytea(value.encode())},'UTF8')"
