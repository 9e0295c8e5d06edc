"""Static shard maps of a million mappings: time to build, memory, and time of a look-up.

No PostgreSQL and no other system: the map is pure computation. Times are CPU time of this process,
which other programs disturb less than the clock; a look-up is the best of many batches of random
keys.
"""

import gc
import random
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from proxy.routing.keys import KeyType
from proxy.routing.map_builder import map_from_csv
from proxy.routing.shard_map import Kind, MapSpec, ShardMap

MAPPINGS: Final = 1_000_000
# Tracing every allocation is slow; memory is proportional to the mappings.
_TRACED_MAPPINGS: Final = 100_000
_TARGETS: Final = tuple(f"shard_{number}" for number in range(100))
_BATCHES, _BATCH_KEYS = 20, 10_000
_SEED: Final = 20261122


@dataclass(frozen=True, slots=True)
class _Case:
    """A kind of map: the line and a key of the mapping with a number."""

    name: str
    spec: MapSpec
    row: Callable[[int, int], str]
    key: Callable[[int], str]

    def lines(self, mappings: int) -> Iterator[str]:
        """Yield the lines of the file, header first."""
        is_list = self.spec.kind is Kind.LIST
        yield "key,target" if is_list else "low,high,target"
        for number in range(mappings):
            yield f"{self.row(number, mappings)},{_TARGETS[number % len(_TARGETS)]}"


def _uuid(number: int) -> str:
    return str(uuid.UUID(int=random.Random(number).getrandbits(128)))  # noqa: S311 - no secret


def _hash_row(number: int, mappings: int) -> str:
    width = 2**32 // mappings
    high = "" if number == mappings - 1 else str((number + 1) * width)
    return f"{number * width},{high}"


_CASES: Final = (
    _Case(
        "int8 ranges, adjacent",
        MapSpec(Kind.RANGE, KeyType.INT8),
        lambda number, _: f"{number * 10},{number * 10 + 10}",
        lambda number: str(number * 10 + 3),
    ),
    _Case(
        "int8 ranges with gaps",
        MapSpec(Kind.RANGE, KeyType.INT8),
        lambda number, _: f"{number * 10},{number * 10 + 5}",
        lambda number: str(number * 10 + 3),
    ),
    _Case(
        "uuid list, unsorted",
        MapSpec(Kind.LIST, KeyType.UUID),
        lambda number, _: _uuid(number),
        _uuid,
    ),
    _Case(
        "text list, 16 bytes",
        MapSpec(Kind.LIST, KeyType.TEXT),
        lambda number, _: f"customer-{number:07}",
        lambda number: f"customer-{number:07}",
    ),
    _Case("hash of int8", MapSpec(Kind.HASH, KeyType.INT8), _hash_row, str),
)


def report() -> str:
    """Measure every kind of map and return a table."""
    lines = [f"{MAPPINGS:,} mappings{'':<14}{'build, s':>10}{'bytes each':>12}{'find, us':>10}"]
    for case in _CASES:
        rows = list(case.lines(MAPPINGS))
        started_at = time.process_time()
        built = map_from_csv(rows, case.spec, _TARGETS)
        build_seconds = time.process_time() - started_at
        del rows
        find = _find_microseconds(case, built)
        del built
        size_bytes = _bytes_each(case)
        lines.append(f"{case.name:<32}{build_seconds:>10.2f}{size_bytes:>12.0f}{find:>10.2f}")
    return "\n".join(lines)


def _find_microseconds(case: _Case, shard_map: ShardMap) -> float:
    generator = random.Random(_SEED)  # noqa: S311 - the same keys in every run
    numbers = (generator.randrange(MAPPINGS) for _ in range(_BATCHES * _BATCH_KEYS))
    keys = [shard_map.parse_key(case.key(number)) for number in numbers]
    find, best_seconds = shard_map.target, float("inf")
    for first in range(0, len(keys), _BATCH_KEYS):
        batch = keys[first : first + _BATCH_KEYS]
        started_at = time.process_time()
        for key in batch:
            find(key)
        best_seconds = min(best_seconds, time.process_time() - started_at)
    return best_seconds / _BATCH_KEYS * 1e6


def _bytes_each(case: _Case) -> float:
    rows = list(case.lines(_TRACED_MAPPINGS))
    gc.collect()
    tracemalloc.start()
    built = map_from_csv(rows, case.spec, _TARGETS)
    traced_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return traced_bytes / len(built)
