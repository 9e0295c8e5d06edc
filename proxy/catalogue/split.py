"""Splitting a mapping in two on its shard. No session ends.

The shard comes first: in one transaction the lower half keeps the row, the upper half gets a new
one, and the sessions of its keys are registered for it. Then the catalogue, in one transaction.

Invariant: both halves have a higher epoch than the whole, so that a proxy that knows the whole
mapping is refused as stale and looks again; until the catalogue has the halves it parks the client.
"""

from dataclasses import replace
from typing import ClassVar, Final, Self
from uuid import UUID, uuid4

from proxy.catalogue.bounds import in_words
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import lock_out
from proxy.catalogue.mapping_operations import END, LOCAL, MappingOperation
from proxy.catalogue.mapping_rows import mapping_from_json, mappings_around, shard_of_mapping
from proxy.catalogue.model import CatalogueMap, Connection, Mapping, Shard
from proxy.catalogue.operation import Json, Step, Tools
from proxy.routing.map_builder import lowest_key
from proxy.routing.shard_map import Kind

# Done again by the same operation, it changes nothing.
_SHRINK_LOCAL: Final = (
    "update shardmap_local.mapping set hi = $4, op_id = $5,"
    " epoch = case when op_id = $5 and hi = $4 then epoch else greatest(epoch, $6) + 1 end"
    " where mapping_id = $1 and lo = $2"
    " and (hi is not distinct from $3 or (hi = $4 and op_id = $5)) returning epoch"
)
_INSERT_LOCAL: Final = (
    "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch, op_id)"
    " select $2, map_id, $3, $4, status, epoch, op_id from shardmap_local.mapping"
    " where mapping_id = $1 on conflict (mapping_id) do nothing"
)
_HAS_SESSIONS: Final = "select exists (select from shardmap_local.session where mapping_id = $1)"
_TAG: Final = (
    "update shardmap_local.session set mapping_id = $2 where mapping_id = $1 and key >= $3"
)
_TAG_ALL: Final = "update shardmap_local.session set mapping_id = $2 where mapping_id = $1"
_DELETE_LOCAL: Final = "delete from shardmap_local.mapping where mapping_id = $1 returning epoch"
_WIDEN_LOCAL: Final = (
    "update shardmap_local.mapping set hi = $2, epoch = greatest(epoch, $3) + 1"
    " where mapping_id = $1 returning epoch"
)
_SHRINK: Final = (
    "update shardmap.mapping set hi = $2, epoch = $3, op_id = null where mapping_id = $1"
)
_INSERT: Final = (
    "insert into shardmap.mapping (mapping_id, map_id, shard_id, lo, hi, status, sessions,"
    " drain_until, epoch, lock_owner, lock_label, locked_until)"
    " select $2, map_id, shard_id, $3, $4, status, sessions, drain_until, epoch, lock_owner,"
    " lock_label, locked_until from shardmap.mapping where mapping_id = $1"
)


class Split(MappingOperation):
    """Split the mapping that covers a key, which becomes the first of the upper half.

    `after` is the lower half, which keeps id and lock; `upper` has the same lock.
    """

    kind: ClassVar[str] = "split"
    steps: ClassVar[tuple[Step, ...]] = (LOCAL, END)

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        key: bytes,
        *,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
        upper_id: UUID | None = None,
    ) -> None:
        """`key` is a bound: of a hash map a hash."""
        super().__init__(catalogue_map, key, None, expect=expect, token=token, op_id=op_id)
        self._key = key
        self._upper_id = upper_id or uuid4()

    @property
    def bounds(self) -> str:
        """The bounds of the whole in words."""
        return self._in_words(self.before)

    @property
    def upper(self) -> Mapping:
        """The upper half, as the operation leaves it."""
        hi = self.before.hi
        return replace(self.after, mapping_id=self._upper_id, lo=self._key, hi=hi)

    def body(self) -> Json:
        """Return what the row has."""
        return {**super().body(), "key": self._key.hex(), "upper_id": str(self._upper_id)}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        key, upper_id = bytes.fromhex(body["key"]), UUID(body["upper_id"])
        operation = cls(catalogue_map, key, op_id=op_id, upper_id=upper_id).load(body)
        operation.before = mapping_from_json(body["mapping"])
        operation.after = mapping_from_json(body["after"] if "after" in body else body["mapping"])
        return operation

    async def find(self, catalogue: Connection) -> None:
        """Find the mapping that covers the key. Raises CatalogueError: why it is not split."""
        if self.map.spec.kind is Kind.LIST:
            text = f"the mappings of the list map {self.map.name} are single keys"
            raise CatalogueError(Reason.NO_SPLIT_OF_A_LIST, text)
        below, at = await mappings_around(catalogue, self.map, self._key)
        bound = at or (below if below is not None and below.hi == self._key else None)
        if bound is not None:
            raise self._not_inside("is a bound of", bound)
        if below is None or not below.covers(self._key):
            raise no_mapping(self.map, self._key)
        if self._key <= lowest_key(self.map.spec):
            raise self._not_inside("is the lowest key of", below)
        self.before = below
        self.check()
        self.shards = (await shard_of_mapping(catalogue, below),)

    def _not_inside(self, what: str, mapping: Mapping) -> CatalogueError:
        spec = self.map.spec
        text = f"{spec.show_bound(self._key)} {what} {in_words(spec, mapping.lo, mapping.hi)}"
        return CatalogueError(Reason.NOT_INSIDE, text, "Both halves must have keys.")

    def check(self) -> None:
        """Want the lower half as `after`."""
        self.after = replace(self.before, hi=self._key, epoch=self.before.epoch + 1, op_id=None)

    def plan(self) -> list[str]:
        """Return what will be done."""
        halves = f"{self._in_words(self.after)} and {self._in_words(self.upper)}"
        name = self.shards[0].name
        return [
            f"Split the mapping {self.bounds} on shard {name} into {halves}.",
            "Split the mapping in the catalogue, which all proxies hear of. No session ends.",
        ]

    def _in_words(self, mapping: Mapping) -> str:
        return in_words(self.map.spec, mapping.lo, mapping.hi)

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Split the shard's row after the admits in flight, and register the sessions anew."""
        before = self.before
        values = (before.lo, before.hi, self._key, self.op_id, before.epoch)
        row = await lock_out(connection, shard, tools, _SHRINK_LOCAL, before.mapping_id, *values)
        if row is None:
            raise not_as_here(shard, self.bounds)
        halves = before.mapping_id, self._upper_id
        await connection.execute(_INSERT_LOCAL, *halves, self._key, before.hi)
        if await connection.fetchval(_HAS_SESSIONS, before.mapping_id):  # no more can register
            await lock_out(connection, shard, tools, _TAG, *halves, self._key)
        self.check()
        self.after = replace(self.after, epoch=row["epoch"])

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Split the row; proxies hear of both halves."""
        lower = self.before.mapping_id
        await catalogue.execute(_SHRINK, lower, self._key, self.after.epoch)
        await catalogue.execute(_INSERT, lower, self._upper_id, self._key, self.before.hi)

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the upper half is there."""
        query = "select 1 from shardmap.mapping where mapping_id = $1"
        return await catalogue.fetchval(query, self._upper_id) is not None

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Make the halves one again if it was split, with an epoch above all used."""
        lower = self.before.mapping_id
        used = await connection.fetchval(_DELETE_LOCAL, self._upper_id)
        if used is not None:
            epoch = await connection.fetchval(_WIDEN_LOCAL, lower, self.before.hi, used)
            await connection.execute(_TAG_ALL, self._upper_id, lower)
            self.after = replace(self.before, epoch=epoch)
            return
        local = await self.read_local(connection)
        if local is not None and local["op_id"] == self.op_id:  # by an earlier try
            self.after = replace(self.before, epoch=local["epoch"])

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the mark; the epoch is the shard's."""
        await self.write_catalogue(catalogue, self.after, done=True)


def no_mapping(catalogue_map: CatalogueMap, key: bytes) -> CatalogueError:
    """Return the refusal of a key that no mapping has."""
    text = f"no mapping of the map {catalogue_map.name} has {catalogue_map.spec.show_bound(key)}"
    return CatalogueError(Reason.MAPPING_NOT_FOUND, text, "`shards show` prints the mappings.")


def not_as_here(shard: Shard, bounds: str) -> CatalogueError:
    """Return the failure of a shard that does not have what the catalogue says."""
    text = f"shard {shard.name} does not have the mapping {bounds} as the catalogue has it"
    return CatalogueError(Reason.STEP_FAILED, text, "`shards verify` shows what differs.")
