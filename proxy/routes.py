"""From settings to a router: aliases, the pattern of database names, the shard map.

For: building what `routing` decides by, and reading the file of a map. Not for: what mappings mean
(`routing`), or what they may look like in a file of settings (`config`).

Invariant: what cannot be used is a Problem under its key, so that it shows with all the others.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

from proxy.config import UPSTREAM, ConfigurationError, Problem, Settings, ShardMapSettings
from proxy.routing.building import map_of_csv, map_of_tables
from proxy.routing.keys import KeyType, Normalise
from proxy.routing.maps import Form, Kind, ShardMap
from proxy.routing.router import Alias, Resolution, Router
from proxy.routing.rows import MapError
from proxy.routing.sources import DatabasePattern

# Maps that are kept so that checking and using one builds it once: a million mappings take seconds.
_BUILT_MAX: Final = 2

_Stamp = tuple[int, int, int] | None


def router_of(settings: Settings) -> Router:
    """Return the router of these settings. Raises ConfigurationError for a map that is wrong."""
    problems = list(map_problems(settings))
    if problems:
        raise ConfigurationError(problems)
    routing = settings.routing
    aliases = {
        name: Alias(alias.target, alias.database or None)
        for name, alias in settings.databases.items()
    }
    return Router(
        UPSTREAM if UPSTREAM in settings.target_names() else None,
        aliases=aliases,
        shard_map=_shard_map(settings, routing.shard_map) if routing.shard_map else None,
        map_name=routing.shard_map,
        parameter=routing.parameter,
        pattern=DatabasePattern.parse(routing.database_pattern),
        require_key=routing.require_key,
        forward_key=routing.forward_key,
    )


def map_problems(settings: Settings) -> Iterator[Problem]:
    """Yield what is wrong with the mappings of the shard maps: bounds, overlaps, targets, files."""
    for name, shard_map in settings.shard_maps.items():
        key = f"shard_maps.{name}.{'mappings_file' if shard_map.mappings_file else 'mappings'}"
        try:
            _shard_map(settings, name)
        except MapError as error:
            yield from (Problem(key, problem) for problem in error.problems)
        except OSError as error:
            yield Problem(key, f"{shard_map.mappings_file}: {error.strerror or error}")
        except UnicodeDecodeError:
            yield Problem(key, f"{shard_map.mappings_file}: it is not UTF-8")


def resolution_lines(settings: Settings, found: Resolution) -> list[str]:
    """Return what `resolve` prints: the key, the mapping that has it, and where that leads."""
    target = settings.target(found.target)
    where = target.endpoint or target.instance or target.host
    rows = [
        ("canonical key", found.key),
        ("hash", found.hash),
        ("mapping", found.low if found.low == found.high else f"[{found.low}, {found.high})"),
        ("target", found.target),
        ("host", target.host or f"looked up from {where}"),
        ("database", target.database),
    ]
    return [f"{name:<14} {value}" for name, value in rows if value]


def _shard_map(settings: Settings, name: str) -> ShardMap:
    """Return a shard map. Raises MapError, OSError or UnicodeDecodeError."""
    shard_map = settings.shard_maps[name]
    stamp: _Stamp = None
    if shard_map.mappings_file:
        found = Path(shard_map.mappings_file).stat()
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
    return _built(shard_map, frozenset(settings.target_names()), stamp)


@lru_cache(maxsize=_BUILT_MAX)
def _built(shard_map: ShardMapSettings, targets: frozenset[str], stamp: _Stamp) -> ShardMap:
    form = Form(Kind(shard_map.kind), KeyType(shard_map.key_type), Normalise(shard_map.normalise))
    if stamp is None:
        return map_of_tables((entry.columns() for entry in shard_map.mappings), form, targets)
    with Path(shard_map.mappings_file).open(encoding="utf-8-sig", newline="") as lines:
        return map_of_csv(lines, form, targets)
