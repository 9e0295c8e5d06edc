"""A session upstream that is ready for a client, and who has to be told when that client leaves.

For: what a dialer, a pool and the catalogue's admission return to the session. Not for: opening it
(`dialer`), or keeping it for the next client (`proxy/pool`).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID

from proxy.transport.stream import StartupStream
from proxy.upstream.address_lookup import LoginNames, Target
from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret
from proxy.wire.startup import StartupMessage

_REFUSED: Final = "check_failed"


@dataclass(frozen=True, slots=True)
class AdmittedBy:
    """The mapping of a shard map by which a shard has admitted a session.

    `target` is the shard as log and metrics show it. `routing_key` is what bounds are compared
    with; `epoch` was the mapping's.
    """

    target: str
    map_id: UUID
    mapping_id: UUID
    shard_id: UUID
    routing_key: bytes = field(repr=False)
    epoch: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a login sends, and where. Sessions of equal ones are equal after their login."""

    target: Target
    names: LoginNames
    message: StartupMessage = field(repr=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the hash once: a pool asks for it a dozen times for each client."""
        object.__setattr__(self, "_hash", hash((self.target, self.message)))

    def __hash__(self) -> int:
        """Return the same for equal ones."""
        return self._hash


class Welcome(Protocol):
    """What the client of a session is sent. `UpstreamStartup` is one, once it is READY."""

    @property
    def key(self) -> BackendKeyData | None:
        """The upstream's own key, None if it sent none (W26)."""

    def welcome(self, key: BackendKeyData | None) -> bytes:
        """Return the messages after AuthenticationOk up to ReadyForQuery, with this key."""

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after ReadyForQuery."""


class Lease(Protocol):
    """What a client has of a session that belongs to a pool.

    One of `release` and `put_back` is called, once, when the client has left.
    """

    @property
    def reused(self) -> bool:
        """Whether the session was not dialled for this client."""

    @property
    def returns(self) -> bool:
        """Whether the session may go to another client after this one."""

    def release(self, retired_for: str = "", reported: bytes = b"") -> None:
        """Return the session to its pool, which has its transport from now on.

        `retired_for` is why no other client may get it: a word of `pool.pool_counts.RetireReason`.
        Without one the session is idle at its protocol's level, and nothing was cancelled.
        `reported` are the ParameterStatus messages that the client was sent.
        """

    def put_back(self, stream: StartupStream, early: bytes) -> None:
        """Return a session on which nothing was sent for the client.

        `stream` is that of its `UpstreamSession`, and `early` what came after its welcome.
        """


@dataclass(frozen=True, slots=True)
class UpstreamSession:
    """A session that is ready: its connection, and its welcome.

    The target's `hostaddr` is the address that the session is connected to.
    """

    stream: StartupStream
    startup: Welcome
    target: Target
    admitted_by: AdmittedBy | None = None
    """None for a target that admits every session."""
    lease: Lease | None = None
    """None for a session that ends with its client."""
    prepared: Prepared | None = None
    """What its login sent; None where nothing pools it."""
    ticket: Secret | None = None
    """What the next admission of the same session is shown; None if none has admitted it."""

    def close(self) -> None:
        """End a session that no client may have, such as one that was not admitted."""
        if self.lease is None:
            self.stream.transport.close()
        else:
            self.lease.release(_REFUSED)

    def put_back(self) -> None:
        """End the session, or give it back to its pool: its client left before its welcome."""
        if self.lease is None:
            self.stream.transport.close()
        else:
            self.lease.put_back(self.stream, self.startup.trailing_data())


Admit = Callable[[StartupStream, Secret | None], Awaitable[Secret | None]]
"""Asks an upstream that has logged in whether it admits the session for a client.

It is given the ticket of the client before, None for a new session, and returns the one for the
next client. Raises ProxyError.
"""
