"""Adding a shard to a map, and removing it.

A shard that is added gets its schema, its identity and the grants of the map's session roles first.
In the catalogue it shows as offline until then. The schema stays when a shard is removed: other
maps may use it, and it holds nothing of this one.
"""

from dataclasses import replace
from typing import ClassVar, Final, Self
from uuid import UUID, uuid4

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Status
from proxy.catalogue.operation import Json, Operation, Step, Tools, shard_from_json
from proxy.catalogue.schema import migrate_shard
from proxy.catalogue.shard_store import check_rights, session_statements
from proxy.catalogue.store import count_mappings, read_shard, read_shards

_ADD_IDENTITY: Final = (
    "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
    " hash_version, shard_id, location, status, version)"
    " values ($1, $2, $3, $4, $5, 1, $6, $7, $8, $9) on conflict (map_id) do nothing"
)
_DELETE_IDENTITY: Final = "delete from shardmap_local.identity where map_id = $1 and shard_id = $2"
_DELETE_ADDED: Final = (
    f"{_DELETE_IDENTITY} and not exists (select from shardmap_local.mapping where map_id = $1)"
)
_IS_CATALOGUE: Final = "select pg_catalog.to_regnamespace('shardmap') is not null"
HAS_LOCAL_SCHEMA: Final = "select pg_catalog.to_regclass('shardmap_local.identity') is not null"


async def with_session_roles(catalogue: Connection, catalogue_map: CatalogueMap) -> CatalogueMap:
    """Return a map with the logins that it has now; its row is locked."""
    query = "select session_roles from shardmap.shard_map where map_id = $1"
    roles = await catalogue.fetchval(query, catalogue_map.map_id)
    return replace(catalogue_map, session_roles=tuple(roles))


async def check_no_catalogue(connection: Connection, shard: Shard) -> None:
    """Check that a database may be a shard. Raises CatalogueError: CATALOGUE_IS_SHARD."""
    if await connection.fetchval(_IS_CATALOGUE):
        text = f"shard {shard.name}: {shard.location} is a catalogue"
        hint = "Another database of the same server may be a shard."
        raise CatalogueError(Reason.CATALOGUE_IS_SHARD, text, hint)


async def add_identity(connection: Connection, catalogue_map: CatalogueMap, shard: Shard) -> None:
    """Write into a database which shard of which map it is; once."""
    spec = catalogue_map.spec
    await connection.execute(
        _ADD_IDENTITY,
        catalogue_map.map_id,
        catalogue_map.name,
        str(spec.kind),
        str(spec.key_type),
        str(spec.normalise),
        shard.shard_id,
        shard.location,
        str(shard.status),
        shard.version,
    )


class _ShardOperation(Operation):
    """What both share: the shard's row, in the catalogue and in the shard."""

    steps: ClassVar[tuple[Step, ...]] = (LOCAL, END)

    @property
    def shard(self) -> Shard:
        """The shard's row: as it will be, or as it was."""
        return self.shards[0]

    async def lock_shard(self, connection: Connection) -> None:
        """Lock what operations change, if it is there."""
        if await connection.fetchval(HAS_LOCAL_SCHEMA):
            await super().lock_shard(connection)

    async def delete_identity(self, connection: Connection, shard: Shard) -> None:
        """Delete the shard's identity from its database, with its mappings."""
        if await connection.fetchval(HAS_LOCAL_SCHEMA):
            await connection.execute(_DELETE_IDENTITY, self.map.map_id, shard.shard_id)

    async def delete_row(self, catalogue: Connection) -> None:
        """Delete the row of the catalogue."""
        await catalogue.execute(
            "delete from shardmap.shard where shard_id = $1", self.shard.shard_id
        )


class AddShard(_ShardOperation):
    """Provision a database, and register it as a shard."""

    kind: ClassVar[str] = "add_shard"

    def __init__(
        self, catalogue_map: CatalogueMap, shard: Shard, op_id: UUID | None = None
    ) -> None:
        """`shard` is the row to add; its `shard_id` is new (`new_shard`)."""
        super().__init__(catalogue_map, op_id)
        self.shards = (shard,)

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        return cls(catalogue_map, shard_from_json(body["rows"][0]), op_id).load(body)

    async def find(self, catalogue: Connection) -> None:
        """Find pending operations on a shard of this name or location."""
        same = await self._same(catalogue)
        self.blocking = frozenset(one.op_id for one in same if one.op_id)

    async def begin(self, catalogue: Connection) -> None:
        """Add the row as offline. Raises CatalogueError: EXISTS."""
        for one in await self._same(catalogue):
            text = f"the map {self.map.name} has the shard {one.name} at {one.location}"
            raise CatalogueError(Reason.EXISTS, text)
        self.map = await with_session_roles(catalogue, self.map)
        shard = self.shard
        await catalogue.execute(
            "insert into shardmap.shard (shard_id, map_id, name, host, port, dbname, endpoint,"
            " instance, workspace, status, version, op_id)"
            " values ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'offline', $10, $11)",
            *(shard.shard_id, shard.map_id, shard.name, shard.host, shard.port, shard.database),
            *(shard.endpoint, shard.instance, shard.workspace, shard.version, self.op_id),
        )

    async def _same(self, catalogue: Connection) -> list[Shard]:
        shard = self.shard
        return [
            one
            for one in await read_shards(catalogue, self.map.map_id)
            if one.name == shard.name or one.location == shard.location
        ]

    def plan(self) -> list[str]:
        """Return what will be done."""
        shard, roles = self.shard, len(self.map.session_roles)
        register = f"Let it know that it is shard {shard.name} of the map {self.map.name}"
        return [
            f"Reserve the shard {shard.name} in the catalogue, as offline.",
            f"Install the schema shardmap_local at {shard.location}, unless it is there.",
            f"{register}, and grant admit to {roles} session roles.",
            "Take the shard online in the catalogue.",
        ]

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check that the database may become this shard, and the rights of the administrator."""
        where = f"shard {shard.name}"
        await check_no_catalogue(connection, shard)
        if await connection.fetchval(HAS_LOCAL_SCHEMA):
            query = "select shard_id, location from shardmap_local.identity where map_id = $1"
            row = await connection.fetchrow(query, self.map.map_id)
            if row is not None and row["shard_id"] != shard.shard_id:
                text = f"{where}: {shard.location} is the shard of this map at {row['location']}"
                hint = "Is it a branch or a copy, or the same database by another name?"
                raise CatalogueError(Reason.EXISTS, text, hint)
        await check_rights(connection, self.map.session_roles, where)

    async def prepare_shard(self, connection: Connection, shard: Shard) -> None:
        """Install the shard's schema. It is left where it is if the operation is undone."""
        await self.check_shard(connection, shard)
        await migrate_shard(connection, f"shard {shard.name}")

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Add the identity, and grant admit to the map's session roles."""
        await add_identity(connection, self.map, shard)
        for role in self.map.session_roles:
            for statement in session_statements(role):
                await connection.execute(statement)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Set the row's final status."""
        await catalogue.execute(
            "update shardmap.shard set status = $2, op_id = null where shard_id = $1",
            *(self.shard.shard_id, str(self.shard.status)),
        )

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is there and online."""
        query = "select status from shardmap.shard where shard_id = $1"
        return bool(await catalogue.fetchval(query, self.shard.shard_id) == self.shard.status)

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Delete the identity. A shard with mappings was in use: the catalogue was restored."""
        if await connection.fetchval(HAS_LOCAL_SCHEMA):
            await connection.execute(_DELETE_ADDED, self.map.map_id, shard.shard_id)

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Delete the row."""
        await self.delete_row(catalogue)


class RemoveShard(_ShardOperation):
    """Remove a shard that has no mappings."""

    kind: ClassVar[str] = "remove_shard"

    def __init__(self, catalogue_map: CatalogueMap, name: str, op_id: UUID | None = None) -> None:
        super().__init__(catalogue_map, op_id)
        self._name = name

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        return cls(catalogue_map, body["rows"][0]["name"], op_id).load(body)

    async def find(self, catalogue: Connection) -> None:
        """Find the shard."""
        self.shards = (await read_shard(catalogue, self.map, self._name),)

    async def begin(self, catalogue: Connection) -> None:
        """Check that the shard has no mappings, and take its row offline."""
        counts = await count_mappings(catalogue, self.map.map_id)
        if count := counts.get(self.shard.shard_id, 0):
            text = f"the shard {self._name} has {count} mappings"
            raise CatalogueError(Reason.NOT_EMPTY, text, "Delete them, or move them, first.")
        await catalogue.execute(
            "update shardmap.shard set op_id = $2 where shard_id = $1",
            *(self.shard.shard_id, self.op_id),
        )

    def plan(self) -> list[str]:
        """Return what will be done."""
        return [
            f"Delete what shard {self._name} knows of the map {self.map.name}.",
            "Delete the shard from the catalogue.",
        ]

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check that the database is the shard without mappings, or has forgotten it already."""
        query = "select 1 from shardmap_local.identity where map_id = $1"
        if await connection.fetchval(query, self.map.map_id) is None:
            return
        await super().check_shard(connection, shard)
        query = "select pg_catalog.count(*) from shardmap_local.mapping where map_id = $1"
        if count := await connection.fetchval(query, self.map.map_id):
            text = f"shard {shard.name} has {count} mappings that the catalogue has not"
            hint = f"shards verify --shard {shard.name}, then `shards repair`."
            raise CatalogueError(Reason.NOT_EMPTY, text, hint)

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Delete the identity, and with it the local rows of this map."""
        await self.delete_identity(connection, shard)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Delete the row."""
        await self.delete_row(catalogue)

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is gone."""
        query = "select 1 from shardmap.shard where shard_id = $1"
        return await catalogue.fetchval(query, self.shard.shard_id) is None

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Add the identity again, if it was deleted."""
        await add_identity(connection, self.map, shard)

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the mark."""
        await catalogue.execute(
            "update shardmap.shard set op_id = null where shard_id = $1", self.shard.shard_id
        )


def new_shard(
    catalogue_map: CatalogueMap,
    name: str,
    host: str,
    port: int,
    database: str,
    *,
    endpoint: str = "",
    instance: str = "",
    workspace: str = "",
) -> Shard:
    """Return the row of a shard to add."""
    shard = Shard(uuid4(), catalogue_map.map_id, name, host.lower(), port, database)
    return replace(
        shard, endpoint=endpoint, instance=instance, workspace=workspace, status=Status.ONLINE
    )
