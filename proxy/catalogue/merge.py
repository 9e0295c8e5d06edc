"""Merging neighbouring mappings of one shard into one. No session ends.

The shard comes first: in one transaction the left mapping gets the keys of the others, whose rows
go, and their sessions are registered for it. Then the catalogue, in one transaction.

Invariant: the merged mapping has a higher epoch than all that went into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.bounds import in_words
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import lock_out
from proxy.catalogue.locks import check_locks
from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.mapping_rows import (
    check_expected,
    mapping_from_json,
    mapping_to_json,
    mappings_around,
    mappings_overlapping,
    shard_of_mapping,
)
from proxy.catalogue.model import CatalogueMap, Connection, Mapping, Shard
from proxy.catalogue.operation import Json, Operation, Step, Tools, Unchanged
from proxy.catalogue.split import no_mapping, not_as_here
from proxy.catalogue.store import Span, stream_mappings
from proxy.routing.shard_map import Kind

# Mappings of one operation: its row has all of them. More are merged in turns.
RUN_MAX: Final = 5_000

_LOCK_LOCAL: Final = (
    "select pg_catalog.count(*) from (select 1 from shardmap_local.mapping"
    " where mapping_id = any($1::uuid[]) order by lo for update) m"
)
_LOCAL: Final = (
    "select mapping_id, lo, hi, status, epoch, op_id from shardmap_local.mapping"
    " where mapping_id = any($1::uuid[]) order by lo"
)
_DELETE_LOCAL: Final = "delete from shardmap_local.mapping where mapping_id = any($1::uuid[])"
_SET_LOCAL: Final = (
    "update shardmap_local.mapping set hi = $2, epoch = $3, op_id = $4 where mapping_id = $1"
)
_INSERT_LOCAL: Final = (
    "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch, op_id)"
    " select t.mapping_id, $1, t.lo, t.hi, $5, $6, $7"
    " from unnest($2::uuid[], $3::bytea[], $4::bytea[]) as t (mapping_id, lo, hi)"
)
_TAG: Final = "update shardmap_local.session set mapping_id = $2 where mapping_id = any($1::uuid[])"
_TAG_BACK: Final = (
    "update shardmap_local.session s set mapping_id = m.mapping_id from shardmap_local.mapping m"
    " where s.mapping_id = $1 and m.mapping_id = any($2::uuid[])"
    " and s.key >= m.lo and (m.hi is null or s.key < m.hi)"
)
_MARK: Final = "update shardmap.mapping set op_id = $2 where mapping_id = any($1::uuid[])"
_CLEAR: Final = (
    "update shardmap.mapping set op_id = null, epoch = coalesce($2::bigint, epoch)"
    " where mapping_id = any($1::uuid[])"
)
_DELETE: Final = "delete from shardmap.mapping where mapping_id = any($1::uuid[])"
_WIDEN: Final = (
    "update shardmap.mapping set hi = $2, epoch = $3, drain_until = $4, op_id = null"
    " where mapping_id = $1"
)
_OWNED: Final = (
    "select mapping_id from shardmap.mapping"
    " where map_id = $1 and lock_owner = $2 and locked_until > pg_catalog.now()"
)


class Merge(Operation):
    """Merge a run of neighbours. The left one keeps id and lock; `after` is the merged mapping."""

    kind: ClassVar[str] = "merge"
    steps: ClassVar[tuple[Step, ...]] = (LOCAL, END)
    undo_locks_out: ClassVar[bool] = True

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        lo: bytes,
        hi: bytes | None,
        *,
        at: bytes | None = None,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
    ) -> None:
        """All mappings from `lo` to `hi`; or, for `at`, the two that meet there.

        `expect` is the epoch of the last one: for `at`, of the mapping that covers this key.
        """
        super().__init__(catalogue_map, op_id)
        self._lo = lo
        self._hi = hi
        self._at = at
        self._expect = expect
        self.token = token
        self.rows: tuple[Mapping, ...] = ()
        self.after: Mapping
        self._epoch_undone: int | None = None

    @classmethod
    def at(
        cls,
        catalogue_map: CatalogueMap,
        key: bytes,
        *,
        expect: int | None = None,
        token: UUID | None = None,
    ) -> Self:
        """Return the operation on what ends at a key and what begins there."""
        return cls(catalogue_map, key, key, at=key, expect=expect, token=token)

    @property
    def _ids(self) -> list[UUID]:
        return [row.mapping_id for row in self.rows]

    def body(self) -> Json:
        """Return what the row has."""
        return {**super().body(), "mappings": [mapping_to_json(row) for row in self.rows]}

    def results(self) -> Json:
        """Return the merged mapping, with the epoch that the shard gave."""
        return {"after": mapping_to_json(self.after)}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        rows = tuple(mapping_from_json(row) for row in body["mappings"])
        operation = cls(catalogue_map, rows[0].lo, rows[-1].hi, op_id=op_id).load(body)
        operation.rows = rows
        operation.after = mapping_from_json(body["after"]) if "after" in body else rows[0]
        return operation

    # -- begin -----------------------------------------------------------------------------------

    async def find(self, catalogue: Connection) -> None:
        """Find the mappings. Raises CatalogueError: NOT_ADJACENT, MAPPING_NOT_FOUND."""
        if self.map.spec.kind is Kind.LIST:
            text = f"the mappings of the list map {self.map.name} are single keys"
            raise CatalogueError(Reason.NOT_ADJACENT, text)
        if self._at is not None:
            self.rows = await self._meeting(catalogue, self._at)
        else:
            found = await mappings_overlapping(catalogue, self.map, self._lo, self._hi)
            if not found or (found[0].lo, found[-1].hi) != (self._lo, self._hi):
                text = f"no mappings are exactly {in_words(self.map.spec, self._lo, self._hi)}"
                raise CatalogueError(Reason.NOT_ADJACENT, text)
            self.rows = tuple(found)
        self.after = self.rows[0]
        self.shards = (await shard_of_mapping(catalogue, self.rows[0]),)
        self.blocking = frozenset(row.op_id for row in self.rows if row.op_id)

    async def _meeting(self, catalogue: Connection, key: bytes) -> tuple[Mapping, Mapping]:
        below, at = await mappings_around(catalogue, self.map, key)
        ends = below is not None and below.hi == key
        if below is not None and at is not None and ends:
            return below, at
        shown = self.map.spec.show_bound(key)
        if below is not None and below.covers(key):
            text = f"{shown} is inside {self._in_words(below)}, which neither ends nor begins there"
        elif at is not None:
            text = f"no mapping ends at {shown}, where {self._in_words(at)} begins"
        elif below is not None and ends:
            text = f"no mapping begins at {shown}, where {self._in_words(below)} ends"
        else:
            raise no_mapping(self.map, key)
        raise CatalogueError(Reason.NOT_ADJACENT, text)

    async def begin(self, catalogue: Connection) -> None:
        """Check that they can be merged, and mark the rows."""
        for left, right in pairwise(self.rows):
            if fault := _fault(left, right):
                text = f"{self._in_words(left)} and {self._in_words(right)} {fault}"
                raise CatalogueError(Reason.NOT_ADJACENT, text)
        await check_locks(catalogue, self.map, self.rows, self.token)
        last = self.rows[-1]
        check_expected(f"the mapping {self._in_words(last)}", self._expect, last.epoch)
        if len(self.rows) < 2:
            raise Unchanged
        self.after = self._merged(max(row.epoch for row in self.rows) + 1)
        await catalogue.execute(_MARK, self._ids, self.op_id)

    def _merged(self, epoch: int) -> Mapping:
        drains = [row.drain_until for row in self.rows if row.drain_until is not None]
        until, hi = max(drains, default=None), self.rows[-1].hi
        return replace(self.rows[0], hi=hi, drain_until=until, epoch=epoch, op_id=None)

    def _in_words(self, mapping: Mapping) -> str:
        return in_words(self.map.spec, mapping.lo, mapping.hi)

    def plan(self) -> list[str]:
        """Return what will be done."""
        name, merged = self.shards[0].name, self._in_words(self._merged(1))
        return [
            f"Merge {len(self.rows)} mappings on shard {name} into {merged}.",
            "Merge them in the catalogue, which all proxies hear of. No session ends.",
        ]

    # -- the steps -------------------------------------------------------------------------------

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Merge the shard's rows after the admits in flight, and register the sessions anew."""
        ids = self._ids
        await lock_out(connection, shard, tools, _LOCK_LOCAL, ids)
        found = await connection.fetch(_LOCAL, ids)
        if self._is_merged(found):
            self.after = self._merged(found[0]["epoch"])
            return  # an earlier try was committed
        expected = [(one.mapping_id, one.lo, one.hi, str(one.status)) for one in self.rows]
        if [(row["mapping_id"], row["lo"], row["hi"], row["status"]) for row in found] != expected:
            raise not_as_here(shard, self._in_words(self.after))
        epoch = max(*(row["epoch"] for row in found), *(row.epoch for row in self.rows)) + 1
        self.after = merged = self._merged(epoch)
        await connection.execute(_DELETE_LOCAL, ids[1:])
        await connection.execute(_SET_LOCAL, ids[0], merged.hi, epoch, self.op_id)
        await lock_out(connection, shard, tools, _TAG, ids[1:], ids[0])

    def _is_merged(self, found: Sequence[Any]) -> bool:
        """Return whether these are the shard's rows after this operation."""
        is_one = len(found) == 1 and found[0]["mapping_id"] == self.rows[0].mapping_id
        if not is_one or found[0]["op_id"] != self.op_id:
            return False
        hi: bytes | None = found[0]["hi"]
        return hi == self.rows[-1].hi

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Merge the rows; proxies hear of all of them."""
        first, *others = self._ids
        after = self.after
        await catalogue.execute(_DELETE, others)
        await catalogue.execute(_WIDEN, first, after.hi, after.epoch, after.drain_until)

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the left mapping has all keys."""
        query = "select hi, epoch from shardmap.mapping where mapping_id = $1"
        row = await catalogue.fetchrow(query, self.rows[0].mapping_id)
        return row is not None and tuple(row) == (self.after.hi, self.after.epoch)

    # -- undo ------------------------------------------------------------------------------------

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Add the rows again if they were merged, with an epoch above all used."""
        ids, rows = self._ids, self.rows
        found = await connection.fetch(_LOCAL, ids)
        if self._is_merged(found):
            self._epoch_undone = epoch = found[0]["epoch"] + 1
            await connection.execute(_SET_LOCAL, ids[0], rows[0].hi, epoch, self.op_id)
            bounds = [row.lo for row in rows[1:]], [row.hi for row in rows[1:]]
            values = str(rows[0].status), epoch, self.op_id
            await connection.execute(_INSERT_LOCAL, self.map.map_id, ids[1:], *bounds, *values)
            await connection.execute(_TAG_BACK, ids[0], ids[1:])
        elif found and found[0]["op_id"] == self.op_id:  # by an earlier try
            self._epoch_undone = found[0]["epoch"]

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the marks; the epoch is the shard's."""
        await catalogue.execute(_CLEAR, self._ids, self._epoch_undone)


def _fault(left: Mapping, right: Mapping) -> str:
    """Return why two mappings cannot be one; empty if they can."""
    if left.hi != right.lo:
        return "do not meet"
    if left.shard_id != right.shard_id:
        return "are on different shards"
    if (left.status, left.sessions) != (right.status, right.sessions):
        return "are not of one status"
    return ""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours that can be one mapping; `token` is that of a lock among them."""

    lo: bytes
    hi: bytes | None
    token: UUID | None


async def find_runs(
    catalogue: Connection,
    catalogue_map: CatalogueMap,
    *,
    shard: Shard | None = None,
    token: UUID | None = None,
) -> list[Run]:
    """Return the runs of a map, or of one shard's mappings: of RUN_MAX mappings at most each.

    Mappings that are locked with another token, or that an operation has, are in none. Call it in
    one snapshot.
    """
    if catalogue_map.spec.kind is Kind.LIST:
        return []
    rows = await catalogue.fetch(_OWNED, catalogue_map.map_id, token)
    owned = {row["mapping_id"] for row in rows}
    runs: list[Run] = []
    run: list[Mapping] = []

    def end() -> None:
        if len(run) > 1:
            has_lock = any(one.mapping_id in owned for one in run)
            runs.append(Run(run[0].lo, run[-1].hi, token if has_lock else None))
        run.clear()

    span = Span(shard_id=None if shard is None else shard.shard_id)
    async for chunk in stream_mappings(catalogue, catalogue_map.map_id, span):
        for row in chunk:
            if row.op_id is not None or (row.locked and row.mapping_id not in owned):
                end()
                continue
            if run and (_fault(run[-1], row) or len(run) == RUN_MAX):
                end()
            run.append(row)
    end()
    return runs
