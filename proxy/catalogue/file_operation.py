"""Adding a file of mappings, all or none; there may be a million.

The shards get their rows first, each in one transaction; then the catalogue, in one, which is one
change for every proxy. Until then the catalogue shows none of them: a row is written once only. No
other operation of the map runs meanwhile, so that no other one can take the keys.

Not for reading the file: `routing.map_builder` does, with every problem of it.
"""

import secrets
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.mapping_operations import CHECKED, END, LOCAL
from proxy.catalogue.mapping_rows import EVERYTHING, check_not_served
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Status
from proxy.catalogue.operation import Json, Operation, Step, Tools
from proxy.catalogue.store import empty_shards, read_shards
from proxy.routing.map_builder import LineMapping, LineMappings
from proxy.routing.map_rows import Problems

_CHECK_ROWS: Final = 10_000
_ID_BYTES: Final = 16
# Above every bound, which has 129 bytes at most.
_ABOVE_ALL: Final = b"\xff" * 130
# For each row the last mapping that begins before its end: only that one can overlap, as mappings
# do not overlap each other.
_OVERLAPPING: Final = """
select t.line, s.name from unnest($2::bytea[], $3::bytea[], $4::int[]) as t (lo, hi, line)
cross join lateral (
  select m.hi, m.shard_id from shardmap.mapping m where m.map_id = $1 and m.lo < t.hi
  order by m.lo desc limit 1) m
join shardmap.shard s on s.shard_id = m.shard_id
where m.hi is null or m.hi > t.lo"""
_COUNT_LOCAL: Final = "select count(*) from shardmap_local.mapping where op_id = $1"
_ONLINE: Final = str(Status.ONLINE)


class AddFile(Operation):
    """Add the mappings of a file; only the process that read it can complete that."""

    kind: ClassVar[str] = "add_file"
    steps: ClassVar[tuple[Step, ...]] = (CHECKED, LOCAL, END)
    resumable: ClassVar[bool] = False
    whole_map: ClassVar[bool] = True

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        mappings: LineMappings | Sequence[LineMapping] = (),
        op_id: UUID | None = None,
    ) -> None:
        super().__init__(catalogue_map, op_id)
        self._mappings = mappings
        self._numbers: dict[str, array[int]] = {}  # by shard: there may be many shards
        for number, mapping in enumerate(mappings):
            self._numbers.setdefault(mapping.shard, array("I")).append(number)
        self._id_bytes = secrets.token_bytes(_ID_BYTES * len(mappings))  # a UUID object has 100
        self._empty: tuple[Shard, ...] = ()

    def __len__(self) -> int:
        """Return how many mappings are added."""
        return len(self._mappings)

    def body(self) -> Json:
        """Return what the row has: not the mappings, which may be a million."""
        return {**super().body(), "mappings": len(self)}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row. It can only be undone."""
        return cls(catalogue_map, op_id=op_id).load(body)

    async def find(self, catalogue: Connection) -> None:
        """Find the shards. Raises CatalogueError: UNKNOWN_SHARD."""
        names = self._numbers.keys()
        shards = await read_shards(catalogue, self.map.map_id)
        self.shards = tuple(shard for shard in shards if shard.name in names)
        for name in sorted(names - {shard.name for shard in self.shards}):
            text = f"the map {self.map.name} has no shard {name}"
            raise CatalogueError(Reason.UNKNOWN_SHARD, text)

    async def begin(self, catalogue: Connection) -> None:
        """Check that all keys are free. Raises CatalogueError: OVERLAP, with the lines."""
        overlaps: list[tuple[int, str]] = []
        rows = iter(self._mappings)
        while chunk := list(islice(rows, _CHECK_ROWS)):
            found = await catalogue.fetch(
                _OVERLAPPING,
                self.map.map_id,
                [row.lo for row in chunk],
                [_ABOVE_ALL if row.hi is None else row.hi for row in chunk],
                [row.line for row in chunk],
            )
            overlaps += [(row["line"], row["name"]) for row in found]
        if overlaps:
            raise CatalogueError(Reason.OVERLAP, bad_lines(_problems(overlaps)))
        self._empty = tuple(await empty_shards(catalogue, self.map.map_id))
        await self._mark_shards(catalogue, self.op_id)  # so that proxies see that it is pending

    def plan(self) -> list[str]:
        """Return what will be done."""
        names = [shard.name for shard in self.shards]
        return [
            *(f"Add {len(self._numbers[name])} mappings to shard {name}." for name in names),
            f"Add {len(self)} mappings to the catalogue, in one change.",
        ]

    def shards_of(self, step: Step) -> tuple[Shard, ...]:
        """Return the shards that a step works in: those without mappings are checked at once."""
        return self._empty[:1] if step is CHECKED else self.shards

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Check the shards without mappings."""
        await self.check_others(tools)

    async def check_others(self, tools: Tools) -> None:
        """Check that shards without mappings in the catalogue serve no keys (I1)."""
        await check_not_served(tools, self.map, self._empty, EVERYTHING)

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Copy the shard's rows."""
        wanted = len(self._numbers[shard.name])
        if await connection.fetchval(_COUNT_LOCAL, self.op_id) == wanted:
            return  # an earlier try was committed
        tools.progress(f"copying {wanted} mappings to shard {shard.name}")
        await connection.copy_records_to_table(
            "mapping",
            schema_name="shardmap_local",
            columns=("mapping_id", "map_id", "lo", "hi", "status", "epoch", "op_id"),
            records=self._local_rows(shard),
        )

    def _id(self, number: int) -> UUID:
        """Return the id of a mapping: the same in shards and catalogue, whenever it is asked."""
        at = number * _ID_BYTES
        return UUID(bytes=self._id_bytes[at : at + _ID_BYTES], version=4)

    def _local_rows(self, shard: Shard) -> Iterator[tuple[object, ...]]:
        map_id, op_id = self.map.map_id, self.op_id
        for number in self._numbers[shard.name]:
            row = self._mappings[number]
            yield self._id(number), map_id, row.lo, row.hi, _ONLINE, 1, op_id

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Copy all rows, in one change."""
        await catalogue.copy_records_to_table(
            "mapping",
            schema_name="shardmap",
            columns=("mapping_id", "map_id", "shard_id", "lo", "hi", "status"),
            records=self._rows(),
        )
        await self._mark_shards(catalogue, None)

    async def _mark_shards(self, catalogue: Connection, op_id: UUID | None) -> None:
        await catalogue.execute(
            "update shardmap.shard set op_id = $2 where shard_id = any($1::uuid[])",
            *([shard.shard_id for shard in self.shards], op_id),
        )

    def _rows(self) -> Iterator[tuple[object, ...]]:
        map_id = self.map.map_id
        shard_ids = {shard.name: shard.shard_id for shard in self.shards}
        for number, row in enumerate(self._mappings):
            yield self._id(number), map_id, shard_ids[row.shard], row.lo, row.hi, _ONLINE

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the rows are there; they are all there, or none."""
        query = "select 1 from shardmap.mapping where mapping_id = $1"
        return not len(self) or await catalogue.fetchval(query, self._id(0)) is not None

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Delete the shard's rows."""
        await connection.execute(
            "delete from shardmap_local.mapping where map_id = $1 and op_id = $2",
            *(self.map.map_id, self.op_id),
        )

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the marks; the rows come with the last step."""
        await self._mark_shards(catalogue, None)


def _problems(overlaps: list[tuple[int, str]]) -> tuple[str, ...]:
    problems = Problems()
    for line, shard in sorted(overlaps):
        problems.add(f"line {line} overlaps a mapping on shard {shard}")
    return problems.shown()


def bad_lines(problems: Sequence[str]) -> str:
    """Return an error's text: a sentence for each bad line."""
    return "\n  ".join(["nothing of the file was added:", *problems])
