"""From a client's StartupMessage to a target, or to an error that says why there is none.

Not for dialing, and not for the definition of a target: targets are known by name only.

The database that the client requests is examined in this order:

1. No database or an empty one: the target's own database.
2. A name that equals one in `aliases`: that alias, even if the name also matches the pattern.
3. The user's name, which drivers also send for "none given" (W16): the database of that name if it
   exists, else the target's own. It contains no key, even if the user is ada@example.com.
4. A match of the pattern, if there is a shard map: its key is compared with those of parameters and
   `options`; its database part has no effect, since the map's target decides.
5. Any other name is passed on unchanged.

With a shard map, a key decides, whatever the database. Without a key, rules 1, 2, 3 and 5 apply if
`require_key` is false. Without a shard map, nothing is removed from a message.

Invariant: errors, logs and reprs contain the fingerprint of a key, never the key. A router is
immutable: it serves every session until a reload makes another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, unique
from typing import Final

from proxy.errors import ErrorKind, ProxyError
from proxy.routing.key_sources import (
    BUILT_IN_PARAMETER,
    DatabasePattern,
    Occurrence,
    take_parameters,
    with_database,
    with_forwarded_key,
)
from proxy.routing.keys import fingerprint, hash_key
from proxy.routing.shard_map import Kind, MapKeys, ShardMap
from proxy.wire.startup import StartupMessage

DEFAULT_PARAMETER: Final = "shard_key"
# The same clients come again and again with the same message, of 10 kB at most. The routes of so
# many are kept, and the oldest makes room.
ROUTES_MAX: Final = 256

DEFAULT_PATTERN: Final = DatabasePattern.parse("{database}@{shard_key}")


@unique
class LookupResult(StrEnum):
    """Whether a shard map has a mapping for a client's key."""

    HIT = "hit"
    MISS = "miss"
    NEGATIVE = "negative"  # it is known, for a moment, that the catalogue has none


@unique
class RouteResult(StrEnum):
    """What a shard map did with a client."""

    ROUTED = "routed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Alias:
    """A database name for clients: a target and one of its databases (None: the target's own)."""

    target: str
    database: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """The target of a session, and the StartupMessage for it.

    `message` no longer contains the key. Its database is the one to open; if it has none, the
    target's own is opened. `database` is what the client asked for, empty with a key, which it may
    contain. `fallback` is the message to send if the upstream has no database of
    that name, None where that is an error. `shard_map` and `key` (the key's fingerprint, for logs)
    are None unless a shard map decided.
    """

    target: str
    message: StartupMessage = field(repr=False)  # may carry the key, with `forward_key`
    shard_map: str | None = None
    key: str | None = None
    database: bytes = field(default=b"", repr=False, compare=False)  # for display
    fallback: StartupMessage | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Resolution:
    """A shard map's answer for a key, for display: the bounds are written as in a configuration.

    `hash` is the value that a hash map compares, in hex; empty for the other kinds.
    """

    key: str
    hash: str
    low: str
    high: str
    target: str


class Router:
    """Routes sessions for one configuration. Every method depends on its argument alone."""

    def __init__(
        self,
        default_target: str | None,
        *,
        aliases: Mapping[str, Alias] | None = None,
        shard_map: ShardMap | None = None,
        map_name: str = "",
        parameter: str = DEFAULT_PARAMETER,
        pattern: DatabasePattern | None = DEFAULT_PATTERN,
        require_key: bool = True,
        forward_key: bool = False,
    ) -> None:
        """`default_target` serves clients that name neither alias nor key; None: they are refused.

        `parameter` is read in addition to lakebase.shard_key. Without `pattern`, a database name
        never contains a key.
        """
        self._default_target = default_target
        self._aliases = {name.encode(): alias for name, alias in (aliases or {}).items()}
        self._map = shard_map
        self._map_name = map_name
        self._parameters = frozenset((BUILT_IN_PARAMETER, parameter.lower().encode()))
        self._pattern = pattern
        self._require_key = require_key
        self._forward_key = forward_key
        self._routes: dict[StartupMessage, Route] = {}

    @property
    def shard_map(self) -> ShardMap | None:
        """The map in which keys are looked up, if there is one."""
        return self._map

    def route(self, message: StartupMessage) -> Route:
        """Return the route of this client.

        Raises ProxyError: MAPPING_NOT_FOUND, and what `take_key` and `route_by_database` raise.
        """
        route = self._routes.get(message)
        if route is None:
            route = self._route(message)
            if not message.may_be_remembered:
                return route
            if len(self._routes) >= ROUTES_MAX:
                del self._routes[next(iter(self._routes))]
            self._routes[message] = route
        return route

    def _route(self, message: StartupMessage) -> Route:
        shard_map = self._map
        if shard_map is None:
            return self.route_by_database(message)
        key, message = self.take_key(message, shard_map)
        if not key:
            return self.route_by_database(message)
        target = shard_map.target(key)
        if target is None:
            raise self.not_found(key)
        return self.route_by_key(message, key, shard_map, target)

    def take_key(self, message: StartupMessage, keys: MapKeys) -> tuple[bytes, StartupMessage]:
        """Return a client's key in canonical bytes, and its message without it.

        The key is empty if the client gives none and `require_key` is false.
        Raises ProxyError: KEY_MISSING, KEY_CONFLICT, KEY_SYNTAX, KEY_RANGE, KEY_INVALID,
        KEY_TOO_LONG.
        """
        found, message = take_parameters(message, self._parameters)
        in_name = self._split_database(message)
        if in_name is not None:
            database, occurrence = in_name
            found.append(occurrence)
            message = with_database(message, database)
        key = _agreed_key(found, keys)
        if not key and self._require_key:
            raise ProxyError(ErrorKind.KEY_MISSING)
        return key, message

    def route_by_key(
        self, message: StartupMessage, key: bytes, keys: MapKeys, target: str
    ) -> Route:
        """Return the route to the target that has this key. The message is that of `take_key`."""
        message = with_database(message, None)
        if self._forward_key:
            message = with_forwarded_key(message, keys.show_key(key).encode())
        return Route(target, message, self._map_name, fingerprint(key))

    def route_by_database(self, message: StartupMessage) -> Route:
        """Return the route of a client without a key. Raises ProxyError: NO_TARGET."""
        asked = message.get(b"database") or b""
        alias = self._aliases.get(asked)
        if alias is not None:
            database = None if alias.database is None else alias.database.encode()
            return Route(alias.target, with_database(message, database), database=asked)
        if self._default_target is None:
            raise ProxyError(ErrorKind.NO_TARGET)
        own = with_database(message, None)
        if not asked:
            return Route(self._default_target, own)
        fallback = own if _is_named_as_user(message) else None
        return Route(self._default_target, message, database=asked, fallback=fallback)

    def not_found(self, key: bytes) -> ProxyError:
        """Return the error for a key that no mapping covers."""
        return mapping_not_found(self._map_name, key)

    def resolve(self, text: str) -> Resolution:
        """Look up a key in the shard map, without a session.

        Raises ProxyError: MAP_MISSING, and what `route` raises for a key.
        """
        shard_map = self._map
        if shard_map is None:
            raise ProxyError(ErrorKind.MAP_MISSING)
        key = shard_map.parse_key(text) if text else b""
        if not key:
            raise ProxyError(ErrorKind.KEY_MISSING)
        mapping = shard_map.find(key)
        if mapping is None:
            raise self.not_found(key)
        low, high = shard_map.spec.show_bounds(mapping)
        hashed = hash_key(key).hex() if shard_map.spec.kind is Kind.HASH else ""
        return Resolution(key.hex(), hashed, low, high, mapping.target)

    def _split_database(self, message: StartupMessage) -> tuple[bytes, Occurrence] | None:
        requested = message.get(b"database")
        if self._pattern is None or not requested or _is_named_as_user(message):
            return None
        if requested in self._aliases:
            return None
        return self._pattern.split(requested)


def _is_named_as_user(message: StartupMessage) -> bool:
    """Return whether the client requests the database that drivers send for "none" (W16)."""
    return message.get(b"database") == message.get(b"user")


def _agreed_key(found: Sequence[Occurrence], keys: MapKeys) -> bytes:
    """Return the key that all occurrences give; empty if there is none or it is empty."""
    given: dict[bytes, str] = {}
    for occurrence in found:
        key = _parse(occurrence, keys) if occurrence.text else b""
        given.setdefault(key, occurrence.source)
    if len(given) > 1:
        sources = " and ".join(dict.fromkeys(given.values()))
        raise ProxyError(ErrorKind.KEY_CONFLICT, f"{len(given)} keys in {sources}")
    return next(iter(given), b"")


def _parse(occurrence: Occurrence, keys: MapKeys) -> bytes:
    try:
        text = occurrence.text.decode()
    except UnicodeDecodeError:
        raise ProxyError(ErrorKind.KEY_INVALID, "a shard key is valid UTF-8") from None
    return keys.parse_key(text)


def mapping_not_found(map_name: str, key: bytes) -> ProxyError:
    """Return the error for a key that no mapping of this map covers."""
    detail = f"shard map {map_name}, key with fingerprint {fingerprint(key)}"
    return ProxyError(ErrorKind.MAPPING_NOT_FOUND, detail)
