"""Repairing one shard: the catalogue as the shard is, or the shard as the catalogue is.

For: `repair --shard`, which serves once for what `verify` has reported. Not for: all shards at
once (`rebuild`), or which rows are replaced (`repair_plan`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.bounds import parse_bounds
from proxy.catalogue.differences import (
    TOP,
    Difference,
    Digest,
    ForeignRows,
    KeysDiffer,
    Row,
    ShardDiffers,
    bounds_of,
    of_keys,
    of_same_rows,
    shown,
)
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.locks import check_locks
from proxy.catalogue.mapping_rows import serves_others
from proxy.catalogue.model import CatalogueMap, Connection, Mapping, Shard, Status
from proxy.catalogue.operation import Databases, Json, Tools, Unchanged, check_identity
from proxy.catalogue.planned_operation import PlannedOperation
from proxy.catalogue.repair_plan import (
    Choice,
    Extents,
    OwnStatus,
    RowChanges,
    from_catalogue,
    from_shard,
)
from proxy.catalogue.schema import migrate_shard
from proxy.catalogue.shard_operations import add_identity, with_session_roles
from proxy.catalogue.shard_store import check_rights, session_statements
from proxy.catalogue.store import is_empty, read_shard, read_shards, shards_by_id
from proxy.catalogue.transactions import transaction
from proxy.catalogue.verify import (
    CATALOGUE_ROW,
    LOCAL_ROW,
    Itself,
    Verification,
    local_stream,
    verification,
)
from proxy.errors import ProxyError

_IN_CATALOGUE: Final = f"{CATALOGUE_ROW} where map_id = $1 and mapping_id = any($3::uuid[])"
_IN_SHARD: Final = f"{LOCAL_ROW} where map_id = $1 and mapping_id = any($4::uuid[])"
_ONLINE: Final = str(Status.ONLINE)
REPORT_SEPARATOR: Final = "-"


@unique
class Source(StrEnum):
    """The side that is right."""

    CATALOGUE = "catalogue"
    SHARD = "shard"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a repair was asked for: the report, and which of its ranges; without any, all."""

    source: Source
    report: str
    ranges: tuple[tuple[str, str], ...] = ()
    token: UUID | None = None

    def choose(
        self, owner: CatalogueMap, shard: Shard, found: Sequence[Difference]
    ) -> list[Difference]:
        """Return the differences to repair. Raises CatalogueError.

        REPORT_STALE if the report is of others, RANGE_NOT_IN_REPORT. A map of which the shard says
        that it serves it elsewhere may be one of another catalogue, which reaches the shard by
        another name: it is to be asked for by its range.
        """
        digest = Digest(owner.map_id, shard.shard_id)
        for one in found:
            digest.add(one)
        if digest.text() not in self.report.split(REPORT_SEPARATOR):
            text = f"shard {shard.name} is not as it was reported"
            raise CatalogueError(Reason.REPORT_STALE, text, "`shards verify` makes a new report.")
        if not self.ranges:
            return [one for one in found if not is_of_others(one)]
        chosen: list[Difference] = []
        for texts in self.ranges:
            same = [one for one in found if _is_range(owner, one, texts)]
            if not same:
                text = f"the report has no range {' '.join(texts)}"
                raise CatalogueError(Reason.RANGE_NOT_IN_REPORT, text)
            chosen += [one for one in same if one not in chosen]
        return chosen


def is_of_others(found: Difference) -> bool:
    """Return whether a difference is a map that another catalogue may have."""
    return isinstance(found, ForeignRows) and found.location != ""


def _is_range(owner: CatalogueMap, found: Difference, texts: tuple[str, str]) -> bool:
    if bounds_of(owner.spec, found) == texts:
        return True
    if not isinstance(found, KeysDiffer):
        return False
    try:
        lo, hi = parse_bounds(texts[:1] if texts[0] == texts[1] else texts, owner.spec)
    except (CatalogueError, ProxyError):
        return False
    return (found.lo, found.hi) == (lo, TOP if hi is None else hi)


async def read_differences(
    databases: Databases, owner: CatalogueMap, shard: Shard
) -> list[Difference]:
    """Return what differs now. Raises CatalogueError."""
    async with verification(databases, owner, shard) as verified:
        return [one async for one in verified.differences()]


def other_owners(found: Sequence[Difference], shard: Shard) -> set[UUID]:
    """Return the other shards that the catalogue gives keys which this one has."""
    rows = [one.catalogue for one in found if isinstance(one, KeysDiffer)]
    return {row.shard_id for row in rows if row is not None} - {shard.shard_id}


class Repair(PlannedOperation):
    """Make the catalogue as a shard is, or the shard as the catalogue is, where they differ."""

    kind: ClassVar[str] = "repair"

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        name: str,
        asked: Asked,
        found: Sequence[Difference] = (),
        op_id: UUID | None = None,
    ) -> None:
        """`found` is what differs, as it was read before the operation begins."""
        super().__init__(catalogue_map, op_id)
        self._name = name
        self._asked = asked
        self._found = found
        self._provisions = False

    def body(self) -> Json:
        """Return what the row has."""
        asked = self._asked
        return {
            **super().body(),
            "source": str(asked.source),
            "report": asked.report,
            "ranges": [list(one) for one in asked.ranges],
            "token": None if asked.token is None else str(asked.token),
        }

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        ranges = tuple((low, high) for low, high in body["ranges"])
        token = None if body["token"] is None else UUID(body["token"])
        asked = Asked(Source(body["source"]), body["report"], ranges, token)
        return cls(catalogue_map, body["rows"][0]["name"], asked, op_id=op_id).load(body)

    @property
    def shard(self) -> Shard:
        """The shard."""
        return self.shards[0]

    @property
    def left(self) -> list[UUID]:
        """The maps that may be those of another catalogue, and were not asked for."""
        chosen = self._asked.choose(self.map, self.shard, self._found)
        left = [one for one in self._found if one not in chosen]
        return [one.map_id for one in left if isinstance(one, ForeignRows)]

    async def find(self, catalogue: Connection) -> None:
        """Find the shard, and those that lose keys to it."""
        shard = await read_shard(catalogue, self.map, self._name)
        others: set[UUID] = set()
        if self._asked.source is Source.SHARD:
            others = other_owners(self._found, shard)
        self.shards = (shard, *await shards_by_id(catalogue, sorted(others)))

    async def begin(self, catalogue: Connection) -> None:
        """Check the report against what was read before, and mark the shards."""
        chosen = self._asked.choose(self.map, self.shard, self._found)
        if not chosen:
            raise Unchanged
        if self._asked.source is Source.SHARD and await is_empty(catalogue, self.shard):
            self._check_first(chosen)  # with a mapping it is not looked at when keys are added
        self.map = await with_session_roles(catalogue, self.map)
        await super().begin(catalogue)

    def _check_first(self, chosen: Sequence[Difference]) -> None:
        """Check that all keys are chosen which a shard serves. Raises CatalogueError: OVERLAP."""
        own = [one.local for one in self._found if isinstance(one, ShardDiffers)]
        is_online = [*own, self.shard.status][0] == _ONLINE
        concerned = of_same_rows(self._found, chosen)
        for one in of_keys(self._found) if is_online else ():
            if one not in concerned and one.local is not None and one.local.status == _ONLINE:
                low, high = shown(self.map.spec, one.lo, one.hi)
                raise serves_others(self.shard, f"[{low}, {high})")

    def plan(self) -> list[str]:
        """Return what will be done."""
        chosen = self._asked.choose(self.map, self.shard, self._found)
        name, source = self.shard.name, self._asked.source
        right = "the catalogue" if source is Source.CATALOGUE else f"shard {name}"
        owners = other_owners(of_same_rows(self._found, chosen), self.shard)
        others = [f"shard {one.name}" for one in self.shards[1:] if one.shard_id in owners]
        return [
            f"Compare shard {name} again, and repair {len(chosen)} of its differences.",
            *(f"Take keys from {other}, and end their sessions." for other in others),
            f"Change shard {name}, and then the catalogue, to what {right} has.",
        ]

    # -- the plan --------------------------------------------------------------------------------

    async def make_plan(self, tools: Tools) -> RowChanges:
        """Read both sides again, and return what to replace. Raises CatalogueError."""
        tools.progress(f"comparing shard {self.shard.name}")
        databases = tools.databases
        async with verification(databases, self.map, self.shard) as verified:
            found = [one async for one in verified.differences()]
            chosen = self._asked.choose(self.map, self.shard, found)
            choice = Choice(self.shard.shard_id, of_keys(found), of_keys(chosen))
            if self._asked.source is Source.CATALOGUE:
                plan = await self._from_catalogue(verified, databases, choice)
            else:
                if verified.itself is None:
                    text = f"shard {self.shard.name} does not know the map {self.map.name}"
                    hint = "--from catalogue makes it a shard of it again."
                    raise CatalogueError(Reason.WRONG_SHARD, text, hint)
                plan = await plan_from_shard(verified, databases, choice, self.shards[1:])
            await check_locked_rows(verified.catalogue, self.map, plan, self._asked.token)
            itself = verified.itself
        plan.repaired = len(chosen)
        plan.foreign = [one.map_id for one in chosen if isinstance(one, ForeignRows)]
        left = [one for one in found if one not in chosen and not is_of_others(one)]
        self._plan_status(plan, chosen, itself, is_whole=not left)
        return plan

    async def _from_catalogue(
        self, verified: Verification, databases: Databases, choice: Choice
    ) -> RowChanges:
        ids = [row.mapping_id for row in choice.catalogue_targets()]
        same: list[Row] = []
        if verified.itself is not None:
            query = (_IN_SHARD, self.map.map_id, TOP, self.shard.shard_id, ids)
            same = [Row._make(record) for record in await verified.local.fetch(*query)]
        await self._check_gained(verified.catalogue, databases, choice)
        return from_catalogue(choice, same)

    async def _check_gained(
        self, catalogue: Connection, databases: Databases, choice: Choice
    ) -> None:
        """Check that no other shard has keys online that this one gets. Raises CatalogueError."""
        gained = Extents(
            (one.lo, one.hi)
            for one in choice.chosen
            if one.catalogue is not None
            and one.catalogue.shard_id == self.shard.shard_id
            and one.catalogue.status == _ONLINE
            and (one.local is None or one.local.status != _ONLINE)
        )
        if not gained:
            return
        for other in await read_shards(catalogue, self.map.map_id):
            if other.shard_id == self.shard.shard_id:
                continue
            for row in await _rows_of(databases, self.map, other, gained):
                if row.status == _ONLINE:
                    low, high = shown(self.map.spec, row.lo, row.hi)
                    text = f"shard {other.name} has keys of this repair online: [{low}, {high})"
                    hint = f"shards verify --shard {other.name}, and repair that one first."
                    raise CatalogueError(Reason.OVERLAP, text, hint)

    def _plan_status(
        self,
        plan: RowChanges,
        chosen: Sequence[Difference],
        itself: Itself | None,
        *,
        is_whole: bool,
    ) -> None:
        """Plan the shard's own status; one that waits for a repair goes online."""
        shard = self.shard
        before, version = (None, 0) if itself is None else (itself.status, itself.version)
        after = ""
        for one in chosen:
            if isinstance(one, ShardDiffers):
                from_shard = self._asked.source is Source.SHARD
                after = one.local or "" if from_shard else one.catalogue
        if itself is not None and itself.waits:
            after = _ONLINE if is_whole else ""
        if after:
            new_version = max(abs(version), shard.version) + 1
            plan.statuses[shard.shard_id] = OwnStatus(before, version, after, new_version)

    # -- a shard that does not know the map ------------------------------------------------------

    async def prepare_shard(self, connection: Connection, shard: Shard) -> None:
        """Install the schema, where the shard is to be one of the map again."""
        if self._is_new(shard):
            await migrate_shard(connection, f"shard {shard.name}")

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check the shard; one that does not know the map may be made one."""
        query = "select 1 from shardmap_local.identity where map_id = $1"
        if self._is_new(shard) and not await connection.fetchval(query, self.map.map_id):
            await check_rights(connection, self.map.session_roles, f"shard {shard.name}")
            return
        await super().check_shard(connection, shard)

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Make the shard one of the map, if it is none; then change its rows."""
        if self._is_new(shard):
            await add_identity(connection, self.map, shard)
            for role in self.map.session_roles:
                for statement in session_statements(role):
                    await connection.execute(statement)
        await super().do_shard(step, connection, shard, tools)

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Write the rows as they were; a shard that did not know the map forgets it."""
        if not self._is_new(shard):
            await super().undo_shard(connection, shard)
            return
        await connection.execute(
            "delete from shardmap_local.identity where map_id = $1", self.map.map_id
        )

    def _is_new(self, shard: Shard) -> bool:
        status = self.row_changes.statuses.get(shard.shard_id)
        return status is not None and status.before is None


async def plan_from_shard(
    verified: Verification, databases: Databases, choice: Choice, others: Sequence[Shard]
) -> RowChanges:
    """Return what makes the catalogue as a shard is. Raises CatalogueError."""
    owner, targets = verified.owner, choice.local_targets()
    ids = [row.mapping_id for row in targets]
    records = await verified.catalogue.fetch(_IN_CATALOGUE, owner.map_id, TOP, ids)
    extents = choice.extents(targets)
    taken = [(one.shard_id, await _rows_of(databases, owner, one, extents)) for one in others]
    return from_shard(choice, [Row._make(record) for record in records], taken)


async def _rows_of(
    databases: Databases, owner: CatalogueMap, shard: Shard, extents: Extents
) -> list[Row]:
    """Return the rows that a shard has for these keys, and those that overlap them there.

    Raises CatalogueError.
    """
    async with databases.shard(shard) as connection, transaction(connection, read_only=True):
        await check_identity(connection, owner, shard)
        stream = local_stream(connection, owner.map_id, shard.shard_id)
        rows: list[Row] = []
        reach = b""
        while (row := await stream.next()) is not None:
            if row.lo < reach or extents.within(row):
                rows.append(row)
                reach = max(reach, row.hi)
        return rows


async def check_locked_rows(
    catalogue: Connection, owner: CatalogueMap, plan: RowChanges, token: UUID | None
) -> None:
    """Check that no other operator has locked what changes. Raises CatalogueError.

    A token is not looked at if no mapping of the catalogue changes.
    """
    mappings = [
        Mapping(
            *(row.mapping_id, owner.map_id, row.shard_id, row.lo),
            None if row.hi == TOP else row.hi,
            locked=row.extra is not None,
        )
        for row in plan.catalogue.before
        if row.extra is not None or token is not None
    ]
    if mappings:
        await check_locks(catalogue, owner, mappings, token)
