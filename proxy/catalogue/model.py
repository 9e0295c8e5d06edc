"""The rows of a catalogue, as every part of the package passes them.

For: values. Not for: reading them (`store`), or changing them (`operations`). Bounds are canonical
bytes as in `routing.keys`: an empty `lo` is -inf, a `hi` of None is +inf.
"""

import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum, unique
from typing import Any, Final
from uuid import UUID

from proxy.routing.shard_map import MapSpec
from proxy.upstream.upstreams import SessionOpener

# The version of the store that this proxy writes. It reads any store of the same major version.
STORE_MAJOR: Final = 1
STORE_MINOR: Final = 0


@unique
class Status(StrEnum):
    """Whether keys are served."""

    ONLINE = "online"
    OFFLINE = "offline"


@unique
class SessionsMode(StrEnum):
    """What happens to the live sessions of a mapping that goes offline."""

    KILL = "kill"
    DRAIN = "drain"
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class CatalogueMap:
    """A shard map."""

    map_id: UUID
    name: str
    spec: MapSpec
    version: int
    session_roles: tuple[str, ...] = ()


# As the catalogue's own check has it.
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,63}", re.ASCII)


def is_shard_name(name: str) -> bool:
    """Return whether a shard can have this name, so that it can be shown in a log."""
    return _SHARD_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Shard:
    """An upstream database that holds keys of one map.

    `endpoint` or `instance` names the resource that tokens are minted for; both are empty where a
    token for any resource of the workspace will do. `workspace` is the NAME of a [workspaces.NAME],
    empty for [workspace]. `fault` says what in its row cannot be right: no session gets there.
    """

    shard_id: UUID
    map_id: UUID
    name: str
    host: str
    port: int
    database: str
    endpoint: str = ""
    instance: str = ""
    workspace: str = ""
    status: Status = Status.ONLINE
    version: int = 1
    op_id: UUID | None = None
    fault: str = ""

    @property
    def location(self) -> str:
        """The location as the shard's own schema has it: host:port/database."""
        return f"{self.host}:{self.port}/{self.database}"


@dataclass(frozen=True, slots=True)
class Mapping:
    """The keys (of a hash map: hashes) of one shard, from `lo` to below `hi`."""

    mapping_id: UUID
    map_id: UUID
    shard_id: UUID
    lo: bytes = field(repr=False)
    hi: bytes | None = field(repr=False)
    status: Status = Status.ONLINE
    sessions: SessionsMode = SessionsMode.KILL
    drain_until: datetime | None = None
    epoch: int = 1
    locked: bool = False
    op_id: UUID | None = None

    def covers(self, routing_key: bytes) -> bool:
        """Return whether these bytes are within the bounds."""
        return self.lo <= routing_key and (self.hi is None or routing_key < self.hi)


@dataclass(slots=True, unsafe_hash=True)
class Located:
    """A mapping and the shard that has it: where the keys of the mapping are.

    Never changed; but not frozen, since making a frozen one takes twice as long, and each look-up
    makes one.
    """

    mapping: Mapping
    shard: Shard

    @property
    def is_offline(self) -> bool:
        """Whether the mapping, or its whole shard, is offline."""
        return Status.OFFLINE in (self.mapping.status, self.shard.status)


Connection = Any
"""An asyncpg connection; the library has no types."""

Connect = Callable[[SessionOpener], AbstractAsyncContextManager[Connection]]
"""Opens a connection on a session of this upstream, and closes it. Raises ProxyError."""

Sleep = Callable[[float], Awaitable[None]]
"""Waits for these seconds."""
