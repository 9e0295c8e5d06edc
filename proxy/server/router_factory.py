"""From settings to a router: aliases, the pattern of database names, the shard map.

For: building what `routing` decides by, and reading the file of a shard map. Not for: what mappings
mean (`routing`), or how they are written in the configuration (`config`).

Invariant: what cannot be used is a Problem under its key, reported with all others.
"""

import errno
import gc
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Final

from proxy.blocking import BlockingCalls
from proxy.config import (
    UPSTREAM,
    ConfigurationError,
    Problem,
    Settings,
    ShardMapSettings,
    lost_secrets,
)
from proxy.file_stamp import Stamp, stamp_of
from proxy.routing.key_sources import DatabasePattern
from proxy.routing.map_builder import map_from_csv, map_from_tables
from proxy.routing.map_rows import MapError
from proxy.routing.router import Alias, Router
from proxy.routing.shard_map import ShardMap

# Maps that are cached, so that checking one and using it builds it once: a million mappings take
# seconds.
_CACHED_MAX: Final = 2

# A file with a million mappings takes seconds. A disk that does not answer takes forever.
RELOAD_SECONDS_MAX: Final = 60.0

Reread = Callable[[], Settings]
"""Reads the configuration again, from where it came from. Raises ConfigurationError."""


def router_of(settings: Settings) -> Router:
    """Return the router of these settings.

    Raises ConfigurationError for the shard map in use; `map_problems` checks all of them.
    """
    routing = settings.routing
    is_static = bool(routing.shard_map) and not settings.catalogue_map
    aliases = {
        name: Alias(alias.target, alias.database or None)
        for name, alias in settings.databases.items()
    }
    return Router(
        UPSTREAM if UPSTREAM in settings.target_names() else None,
        aliases=aliases,
        shard_map=_checked_map(settings, routing.shard_map) if is_static else None,
        map_name=routing.shard_map,
        parameter=routing.parameter,
        pattern=DatabasePattern.parse(routing.database_pattern),
        require_key=routing.require_key,
        forward_key=routing.forward_key,
    )


def reread_with_router(reread: Reread) -> tuple[Settings, Router]:
    """Return the settings and the router made of them. Raises ConfigurationError.

    The garbage collector is off meanwhile: it would look at the growing map again and again, and
    stop every session each time. A caller that abandons this must turn it on again.
    """
    gc.disable()
    try:
        settings = reread()
        if lost := list(lost_secrets(settings)):
            raise ConfigurationError(lost)
        return settings, router_of(settings)
    finally:
        gc.enable()


async def reread_in_thread(threads: BlockingCalls, reread: Reread) -> tuple[Settings, Router]:
    """Do `reread_with_router` in a thread. Raises ConfigurationError, and TimeoutError."""
    try:
        return await threads.run(partial(reread_with_router, reread), RELOAD_SECONDS_MAX)
    except TimeoutError:
        gc.enable()  # the thread is abandoned
        raise


def clear_map_cache() -> None:
    """Drop the cached maps that no router has, for a process that will check none."""
    _build_map.cache_clear()


def map_problems(settings: Settings) -> Iterator[Problem]:
    """Yield what is wrong with the shard maps: bounds, overlaps, targets, files."""
    # The map in use comes last, so that it is still cached when the router needs it.
    for name in sorted(settings.shard_maps, key=lambda name: name == settings.routing.shard_map):
        if settings.shard_maps[name].catalogue:
            continue  # the catalogue is asked when the proxy starts
        try:
            _checked_map(settings, name)
        except ConfigurationError as error:
            yield from error.problems


def rewritten_file(settings: Settings, old: ShardMap | None, new: ShardMap | None) -> str | None:
    """Return the key of the file of the shard map in use, if its mappings have changed.

    `config.compare` reports what differs in the settings; it opens no file.
    """
    name = settings.routing.shard_map
    if old is None or new is None or not settings.shard_maps[name].mappings_file:
        return None
    return None if new.digest == old.digest else _mappings_key(settings, name)


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
    if file and not stat.S_ISREG(Path(file).stat().st_mode):  # a pipe might block forever
        raise OSError(errno.EINVAL, "it is not a regular file")
    return _build_map(shard_map, frozenset(settings.target_names()), stamp)


@lru_cache(maxsize=_CACHED_MAX)
def _build_map(
    shard_map: ShardMapSettings, targets: frozenset[str], stamp: Stamp | None
) -> ShardMap:
    spec = shard_map.spec
    if stamp is None:
        return map_from_tables((entry.columns() for entry in shard_map.mappings), spec, targets)
    # Read as a whole: each read of a file releases the interpreter lock and takes it back so soon
    # that the event loop did not get it for 0.45 s.
    content = BytesIO(Path(shard_map.mappings_file).read_bytes())
    lines = TextIOWrapper(content, encoding="utf-8-sig", newline="")
    built = map_from_csv(lines, spec, targets)
    if not len(built):
        # A file that lost its rows, or is being written, must not unmap every tenant.
        raise MapError(("it has no mapping",))
    return built
