"""The map as a proxy knows it: a table of what was read at once, and the changes since.

For: look-ups without a wait, single changes, and exchanging the table for a new one. Pure: no I/O
and no clock. Not for: asking the catalogue (`map_source`), or hearing of changes (`feed`).

Invariant: mappings never overlap. An insert removes each mapping that it overlaps, since the
catalogue cannot have both.

A change costs the same whatever the size of the map: it is kept beside the table, and replaces what
is there. Now and then a table with the changes is built (`Build`), in steps; what changes meanwhile
is applied to the new one as well before it takes the old one's place.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from collections.abc import Mapping as MappingOf
from itertools import islice
from typing import Final
from uuid import UUID

from proxy.catalogue.mapping_table import MappingTable
from proxy.catalogue.model import Located, Mapping, Shard
from proxy.catalogue.packed_rows import RowChunk
from proxy.catalogue.table_builder import TableBuilder
from proxy.routing.shard_map import MapSpec

# Changes that are kept beside the table. More make look-ups of them no slower, but each look-up
# asks both; a build of a million mappings takes a second or two of CPU time.
RECENT_MAX: Final = 5_000
# Changes during a build: beyond this it is not worth applying them again.
LOGGED_MAX: Final = 4_000
# Ids that are returned of what one insert removed. So many at once: everything may have changed.
REMOVED_MAX: Final = 10_000

_Change = Callable[["_Rows"], object]


class _Rows:
    """A table, and the mappings that came after it."""

    def __init__(self, table: MappingTable) -> None:
        self.table = table
        self.los: list[bytes] = []
        self.recent: dict[bytes, Mapping] = {}
        self.recent_los: dict[UUID, bytes] = {}
        self.dead = 0

    def __len__(self) -> int:
        return len(self.table) - self.dead + len(self.recent)

    def find_recent(self, routing_key: bytes) -> Mapping | None:
        at = bisect_right(self.los, routing_key) - 1
        found = None if at < 0 else self.recent[self.los[at]]
        return found if found is not None and found.covers(routing_key) else None

    def by_id(self, mapping_id: UUID) -> Mapping | None:
        lo = self.recent_los.get(mapping_id)
        if lo is not None:
            return self.recent[lo]
        at = self.table.position(mapping_id.bytes)
        return None if at < 0 else self.table.mapping(at)

    def insert(self, mapping: Mapping) -> list[UUID]:
        """Insert a mapping in place of itself and of what it overlaps; return what that was."""
        removed = self.remove_overlapping(mapping.lo, mapping.hi)
        if self.remove(mapping.mapping_id):
            removed.append(mapping.mapping_id)
        insort(self.los, mapping.lo)
        self.recent[mapping.lo] = mapping
        self.recent_los[mapping.mapping_id] = mapping.lo
        return removed

    def remove(self, mapping_id: UUID) -> bool:
        lo = self.recent_los.get(mapping_id)
        if lo is not None:
            self._forget(lo)
            return True
        at = self.table.position(mapping_id.bytes)
        if at < 0:
            return False
        self.dead += self.table.mark_dead(at, at + 1)
        return True

    def remove_overlapping(self, lo: bytes, hi: bytes | None) -> list[UUID]:
        """Remove each mapping with a key from `lo` to below `hi`; return their ids."""
        first = bisect_right(self.los, lo)
        if first and self.recent[self.los[first - 1]].covers(lo):
            first -= 1
        overlapping = []
        for bound in self.los[first:]:
            if hi is not None and bound >= hi:
                break
            overlapping.append(bound)
        removed = [self._forget(bound) for bound in overlapping]
        table = self.table
        at = table.find_le(lo)
        if at < 0 or ((end := table.hi(at)) is not None and end <= lo):
            at += 1
        last = len(table) if hi is None else table.find_le(hi) + 1
        if hi is not None and last and table.lo(last - 1) == hi:
            last -= 1
        live = islice(table.live(at, last), REMOVED_MAX - len(removed))
        removed += [table.mapping_id(one) for one in live]
        self.dead += table.mark_dead(at, last) if at < last else 0
        return removed

    def _forget(self, lo: bytes) -> UUID:
        mapping = self.recent.pop(lo)
        del self.los[bisect_right(self.los, lo) - 1]
        del self.recent_los[mapping.mapping_id]
        return mapping.mapping_id


class Build:
    """A table that takes the place of the cache's own. `append` all rows, run `steps`, exchange."""

    def __init__(self, map_id: UUID, spec: MapSpec) -> None:
        self.builder = TableBuilder(map_id, spec)
        self.changes: list[_Change] = []

    def append(self, chunk: RowChunk) -> None:
        """Add the next rows, in order."""
        self.builder.append(chunk)

    def steps(self) -> Iterator[None]:
        """Do the rest, in steps of some milliseconds."""
        return self.builder.finish()


class MappingCache:
    """The mappings and the shards of one map."""

    def __init__(self, map_id: UUID, spec: MapSpec) -> None:
        self.map_id = map_id
        self.spec = spec
        self._shards: dict[UUID, Shard] = {}
        self._rows = _Rows(_empty_table(map_id, spec))
        self._build: Build | None = None

    def __len__(self) -> int:
        """Return the number of mappings."""
        return len(self._rows)

    # -- looking up ------------------------------------------------------------------------------

    def find(self, routing_key: bytes) -> Located | None:
        """Return where a routing key is: its mapping and shard, None if one is not known."""
        rows = self._rows
        recent = rows.find_recent(routing_key) if rows.los else None
        if recent is not None:
            shard = self._shards.get(recent.shard_id)
            return None if shard is None else Located(recent, shard)
        return rows.table.find(routing_key)

    def by_id(self, mapping_id: UUID) -> Mapping | None:
        """Return a mapping by its id."""
        return self._rows.by_id(mapping_id)

    @property
    def shards(self) -> MappingOf[UUID, Shard]:
        """The shards by their ids."""
        return self._shards

    def set_shards(self, shards: MappingOf[UUID, Shard]) -> None:
        """Replace the shards; no mapping is touched."""
        self._shards = dict(shards)
        self._rows.table.set_shards(self._shards)

    def operations(self) -> set[UUID]:
        """Return the ids of the operations that are under way, by the rows that they hold."""
        rows = self._rows
        held = [mapping.op_id for mapping in rows.recent.values()]
        held += [shard.op_id for shard in self._shards.values()]
        return rows.table.operations() | {op_id for op_id in held if op_id is not None}

    # -- changes ---------------------------------------------------------------------------------

    def insert(self, mapping: Mapping) -> list[UUID]:
        """Insert a mapping; return the ids that it replaced: its own, and those it overlaps."""
        self._log(lambda rows: rows.insert(mapping))
        return self._rows.insert(mapping)

    def remove(self, mapping_id: UUID) -> bool:
        """Remove a mapping. Return whether it was there."""
        self._log(lambda rows: rows.remove(mapping_id))
        return self._rows.remove(mapping_id)

    def remove_at(self, routing_key: bytes) -> list[UUID]:
        """Remove the mapping of a routing key: the catalogue has none. Return its id."""
        hi = routing_key + b"\0"
        self._log(lambda rows: rows.remove_overlapping(routing_key, hi))
        return self._rows.remove_overlapping(routing_key, hi)

    def clear(self) -> None:
        """Remove everything: the map is not there any more. A build under way is void."""
        self._rows = _Rows(_empty_table(self.map_id, self.spec))
        self._build = None
        self._shards = {}

    def _log(self, change: _Change) -> None:
        """Keep a change for the table that is being built."""
        build = self._build
        if build is None:
            return
        build.changes.append(change)
        if len(build.changes) > LOGGED_MAX:
            self._build = None

    # -- a new table -----------------------------------------------------------------------------

    def wants_build(self) -> bool:
        """Return whether so much has changed that a table should be built of the cache itself."""
        rows = self._rows
        return len(rows.recent) > RECENT_MAX or rows.dead > max(RECENT_MAX, len(rows.table) // 4)

    def start_build(self) -> Build:
        """Start a table; changes from now on are applied to it as well. It voids an earlier one."""
        self._build = Build(self.map_id, self.spec)
        return self._build

    def adopt(self, build: Build) -> None:
        """Take a table that was built elsewhere, in place of all that is known."""
        self._build = build
        self.exchange(build)

    def chunks(self) -> Iterator[RowChunk]:
        """Yield all rows of this moment, in order; the cache may change meanwhile."""
        rows = self._rows
        recent = [rows.recent[lo] for lo in rows.los]
        return rows.table.chunks(bytes(rows.table.flags), recent)

    def exchange(self, build: Build) -> bool:
        """Take the table that was built. Return whether it was still wanted."""
        if build is not self._build:
            return False
        self._build = None
        rows = _Rows(build.builder.table())
        for change in build.changes:
            change(rows)
        rows.table.set_shards(self._shards)
        self._rows = rows
        return True


def _empty_table(map_id: UUID, spec: MapSpec) -> MappingTable:
    builder = TableBuilder(map_id, spec)
    for _ in builder.finish():
        pass
    return builder.table()
