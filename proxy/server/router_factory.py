"""From settings to a router: aliases, the pattern of database names, the shard map.

For: building what `routing` decides by, and reading the file of a map. Not for: what mappings mean
(`routing`), or what they may look like in a file of settings (`config`).

Invariant: what cannot be used is a Problem under its key, so that it shows with all the others.
"""

import errno
import gc
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

from proxy.config import (
    UPSTREAM,
    ConfigurationError,
    Problem,
    Settings,
    ShardMapSettings,
)
from proxy.file_stamp import Stamp, stamp_of
from proxy.routing.key_sources import DatabasePattern
from proxy.routing.map_builder import map_from_csv, map_from_tables
from proxy.routing.map_rows import MapError
from proxy.routing.router import Alias, Resolution, Router
from proxy.routing.shard_map import ShardMap

# Maps that are kept so that checking and using one builds it once: a million mappings take seconds.
_BUILT_MAX: Final = 2

# A file with a million mappings takes seconds. A disk that does not answer takes for ever.
RELOAD_SECONDS_MAX: Final = 60.0

Reread = Callable[[], Settings]
"""Reads the configuration again, from where it came from. Raises ConfigurationError."""


def router_of(settings: Settings) -> Router:
    """Return the router of these settings.

    Raises ConfigurationError for the one map that it routes by; `map_problems` looks at all.
    """
    routing = settings.routing
    aliases = {
        name: Alias(alias.target, alias.database or None)
        for name, alias in settings.databases.items()
    }
    return Router(
        UPSTREAM if UPSTREAM in settings.target_names() else None,
        aliases=aliases,
        shard_map=_checked_map(settings, routing.shard_map) if routing.shard_map else None,
        map_name=routing.shard_map,
        parameter=routing.parameter,
        pattern=DatabasePattern.parse(routing.database_pattern),
        require_key=routing.require_key,
        forward_key=routing.forward_key,
    )


def reread_with_router(reread: Reread) -> tuple[Settings, Router]:
    """Return the settings, and all that is made of them at length. Raises ConfigurationError.

    The garbage collector rests meanwhile: it would walk a growing map again and again, and no
    session goes on while it does. Who gives up waiting for it has to wake it.
    """
    gc.disable()
    try:
        settings = reread()
        return settings, router_of(settings)
    finally:
        gc.enable()


def forget_built_maps() -> None:
    """Keep no map but those that routers have: for a process that will not check any."""
    _built.cache_clear()


def map_problems(settings: Settings) -> Iterator[Problem]:
    """Yield what is wrong with the mappings of the shard maps: bounds, overlaps, targets, files."""
    # The one in use comes last, so that it is still built when the router wants it.
    for name in sorted(settings.shard_maps, key=lambda name: name == settings.routing.shard_map):
        try:
            _checked_map(settings, name)
        except ConfigurationError as error:
            yield from error.problems


def rewritten_file(settings: Settings, old: ShardMap | None, new: ShardMap | None) -> str | None:
    """Return the key of the file that gives the map in use, if its mappings are others now.

    What differs in the settings is `config.compare`'s to tell; it opens no file.
    """
    name = settings.routing.shard_map
    if old is None or new is None or not settings.shard_maps[name].mappings_file:
        return None
    return None if new.digest == old.digest else _mappings_key(settings, name)


def resolution_facts(settings: Settings, found: Resolution) -> dict[str, str]:
    """Return what `resolve` says for machines; what does not apply is empty."""
    target = settings.target(found.target)
    return {
        "canonical_key": found.key,
        "hash": found.hash,
        "low": found.low,
        "high": found.high,
        "target": found.target,
        "endpoint": target.endpoint or target.instance,
        "host": target.host,
        "database": target.database,
    }


def resolution_lines(settings: Settings, found: Resolution) -> list[str]:
    """Return what `resolve` prints: the key, the mapping that has it, and where that leads."""
    facts = resolution_facts(settings, found)
    rows = [
        ("canonical key", found.key),
        ("hash", found.hash),
        ("mapping", found.low if found.low == found.high else f"[{found.low}, {found.high})"),
        ("target", found.target),
        ("host", facts["host"] or f"looked up from {facts['endpoint']}"),
        ("database", facts["database"]),
    ]
    return [f"{name:<14} {value}" for name, value in rows if value]


def _checked_map(settings: Settings, name: str) -> ShardMap:
    """Return a shard map. Raises ConfigurationError."""
    key, file = _mappings_key(settings, name), settings.shard_maps[name].mappings_file
    try:
        return _shard_map(settings, name)
    except MapError as error:
        problems = [Problem(key, problem) for problem in error.problems]
    except OSError as error:
        problems = [Problem(key, f"{file}: {error.strerror or error}")]
    except UnicodeDecodeError:
        problems = [Problem(key, f"{file}: it is not UTF-8")]
    raise ConfigurationError(problems)


def _mappings_key(settings: Settings, name: str) -> str:
    file = settings.shard_maps[name].mappings_file
    return f"shard_maps.{name}.{'mappings_file' if file else 'mappings'}"


def _shard_map(settings: Settings, name: str) -> ShardMap:
    """Return a shard map. Raises MapError, OSError or UnicodeDecodeError."""
    shard_map = settings.shard_maps[name]
    file = shard_map.mappings_file
    stamp = stamp_of(file) if file else None
    if file and not stat.S_ISREG(Path(file).stat().st_mode):  # nobody may ever write into a pipe
        raise OSError(errno.EINVAL, "it is not a regular file")
    return _built(shard_map, frozenset(settings.target_names()), stamp)


@lru_cache(maxsize=_BUILT_MAX)
def _built(shard_map: ShardMapSettings, targets: frozenset[str], stamp: Stamp | None) -> ShardMap:
    spec = shard_map.spec
    if stamp is None:
        return map_from_tables((entry.columns() for entry in shard_map.mappings), spec, targets)
    with Path(shard_map.mappings_file).open(encoding="utf-8-sig", newline="") as lines:
        built = map_from_csv(lines, spec, targets)
    if not len(built):
        # A file that lost its rows, or is being written: it must not take every tenant's way.
        raise MapError(("it has no mapping",))
    return built
