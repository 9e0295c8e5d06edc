"""Attaching a database that has a local map: it becomes a shard of the catalogue's map.

For: a shard whose row the catalogue has lost or given up, and a branch that is to be a shard. What
it has are no mappings of the catalogue yet: they wait for a repair. Not for: `repair`.

A shard that was detached, and one with keys that the catalogue gives to others meanwhile, is
offline until it is repaired; its own version is negative until then. So no session starts on keys
that another shard may have. A shard that the catalogue has only lost goes on serving.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.differences import KeysDiffer
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import LOCK_OUT_ALL, Registered, end_sessions, lock_out
from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.mapping_status import SESSIONS
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Status
from proxy.catalogue.operation import Json, Step, Tools, shard_from_json
from proxy.catalogue.schema import migrate_shard
from proxy.catalogue.shard_operations import HAS_LOCAL_SCHEMA, AddShard, check_no_catalogue
from proxy.catalogue.shard_store import check_rights, session_statements
from proxy.catalogue.store import read_shards
from proxy.catalogue.transactions import transaction
from proxy.catalogue.verify import Itself, Verification, read_itself
from proxy.routing.keys import KeyType, Normalise
from proxy.routing.shard_map import Kind, MapSpec

_SET_IDENTITY: Final = (
    "update shardmap_local.identity set shard_id = $2, location = $3, status = $4, version = $5"
    " where map_id = $1"
)
_ALL_OFFLINE: Final = (
    "update shardmap_local.mapping set status = 'offline', op_id = $2"
    " where map_id = $1 and status = 'online'"
)
_ONLINE_AGAIN: Final = (
    "update shardmap_local.mapping set status = 'online', op_id = null"
    " where map_id = $1 and op_id = $2"
)
_ADD_ROLES: Final = """
update shardmap.shard_map set session_roles = array(
  select distinct r from unnest(session_roles || $2::text[]) as t (r) order by r)
where map_id = $1"""
_IDENTITIES: Final = (
    "select map_id, map_name, kind, key_type, normalise from shardmap_local.identity"
    " order by map_name"
)
_COUNT: Final = "select pg_catalog.count(*) from shardmap_local.mapping where map_id = $1"
# The logins that may call admit, but for the owner.
_ADMITTED: Final = """
select r.rolname::text from pg_catalog.pg_proc p, pg_catalog.aclexplode(p.proacl) a
join pg_catalog.pg_roles r on r.oid = a.grantee
where p.oid = pg_catalog.to_regproc('shardmap_local.admit') and a.privilege_type = 'EXECUTE'
and a.grantee <> p.proowner order by 1"""
_ONLINE: Final = str(Status.ONLINE)
_OFFLINE: Final = str(Status.OFFLINE)


@dataclass(frozen=True, slots=True)
class Found:
    """What a database that is attached has of the map."""

    itself: Itself
    mappings: int
    roles: tuple[str, ...]
    """The logins that may be admitted."""


async def read_found(
    connection: Connection, shard: Shard, name: str, known: CatalogueMap | None
) -> tuple[CatalogueMap, Found]:
    """Return the map that a database has, and what of it. `known` is that of the catalogue.

    Raises CatalogueError: CATALOGUE_IS_SHARD, SHARD_NOT_VALID, STORE_VERSION, EXISTS.
    """
    where = f"shard {shard.name}"
    await check_no_catalogue(connection, shard)
    rows = []
    if await connection.fetchval(HAS_LOCAL_SCHEMA):
        rows = await connection.fetch(_IDENTITIES)
    ids = {row["map_id"]: row for row in rows}
    names = {row["map_name"]: row for row in rows}
    row = names.get(name) if known is None else ids.get(known.map_id)
    if row is None and name in names:
        text = f"the map {name} of the catalogue is another one than that of {shard.location}"
        raise CatalogueError(Reason.EXISTS, text, f"An empty one: shards drop {name}.")
    if row is None:
        others = ", ".join(sorted(names)) or "none"
        text = f"{where}: {shard.location} has no local map {name}; its maps: {others}"
        hint = "--map names another one; `shards add-shard` makes a new shard."
        raise CatalogueError(Reason.SHARD_NOT_VALID, text, hint)
    try:
        words = (Kind(row["kind"]), KeyType(row["key_type"]), Normalise(row["normalise"]))
    except ValueError as error:
        text = f"{where}: {shard.location} has a map that cannot be right: {error}"
        raise CatalogueError(Reason.SHARD_NOT_VALID, text) from None
    itself = await read_itself(connection, row["map_id"], where)
    assert itself is not None  # its row was read
    count = await connection.fetchval(_COUNT, row["map_id"])
    roles = tuple(one["rolname"] for one in await connection.fetch(_ADMITTED))
    return CatalogueMap(row["map_id"], name, MapSpec(*words), 1), Found(itself, count, roles)


class Attach(AddShard):
    """Make a database with a local map a shard. Its own rows of the map stay as they are."""

    kind: ClassVar[str] = "attach"
    steps: ClassVar[tuple[Step, ...]] = (LOCAL, SESSIONS, END)

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        shard: Shard,
        found: Found,
        *,
        new_identity: bool = False,
        moved: bool = False,
        op_id: UUID | None = None,
    ) -> None:
        """`shard` is the row to add, with the id that the database has or is to have.

        `moved` says that the shard itself is at another location than it was.
        """
        super().__init__(catalogue_map, shard, op_id)
        self.found = found
        self._new_identity = new_identity
        self._has_moved = moved
        # Known after the local step: whether the shard waits for a repair, and its version.
        self._waits = False
        self._status = _ONLINE
        self._version = shard.version

    def body(self) -> Json:
        """Return what the row has."""
        itself = self.found.itself
        return {
            **super().body(),
            "itself": [str(itself.shard_id), itself.location, itself.status, itself.version],
            "mappings": self.found.mappings,
            "roles": list(self.found.roles),
            "new_identity": self._new_identity,
        }

    def results(self) -> Json:
        """Return how the shard is left."""
        return {"waits": self._waits, "status": self._status, "version": self._version}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        shard_id, *others = body["itself"]
        found = Found(Itself(UUID(shard_id), *others), body["mappings"], tuple(body["roles"]))
        return cls(
            catalogue_map,
            shard_from_json(body["rows"][0]),
            found,
            new_identity=body["new_identity"],
            op_id=op_id,
        ).load(body)

    def load(self, body: Json) -> Self:
        """Read what `results` wrote."""
        self._waits = body.get("waits", self._waits)
        self._status = body.get("status", self._status)
        self._version = body.get("version", self._version)
        return super().load(body)

    async def begin(self, catalogue: Connection) -> None:
        """Add the row as offline. Raises CatalogueError: EXISTS, IDENTITY_EXISTS."""
        for one in await read_shards(catalogue, self.map.map_id):
            if one.shard_id == self.shard.shard_id and one.location != self.shard.location:
                text = (
                    f"{self.shard.location} is the shard {one.name}, registered at {one.location}"
                )
                name = self.shard.name
                hint = (
                    f"Has the shard moved there? shards relocate {one.name}. Is it a branch or a"
                    f" copy of it? shards attach {name} --new-identity makes it a shard of its own."
                )
                raise CatalogueError(Reason.IDENTITY_EXISTS, text, hint)
        self.check_location()
        await super().begin(catalogue)

    def check_location(self) -> None:
        """Check that the database is where it says. Raises CatalogueError: IDENTITY_EXISTS.

        A branch says where its shard is. With a catalogue that was lost nothing else tells them
        apart.
        """
        was, shard = self.found.itself.location, self.shard
        if was == shard.location or self._new_identity or self._has_moved:
            return
        text = f"{shard.location} says that it is {was}"
        hint = (
            f"Is it a branch or a copy? shards attach {shard.name} --new-identity makes it a shard"
            f" of its own. Has the shard itself moved there? shards attach {shard.name} --force"
        )
        raise CatalogueError(Reason.IDENTITY_EXISTS, text, hint)

    def plan(self) -> list[str]:
        """Return what will be done."""
        shard, found = self.shard, self.found
        sentences = [f"Reserve the shard {shard.name} in the catalogue, as offline."]
        if self._new_identity:
            sentences.append(f"Give {shard.location} a new identity; its mappings go offline.")
        return [
            *sentences,
            f"Write its location, {shard.location}, into it.",
            f"Add the shard to the catalogue. Its {found.mappings} mappings wait for a repair.",
        ]

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check that the database is as it was found, or as this operation leaves it."""
        await check_no_catalogue(connection, shard)
        itself = await read_itself(connection, self.map.map_id, f"shard {shard.name}")
        known = (self.found.itself.shard_id, shard.shard_id)
        if itself is None or itself.shard_id not in known:
            text = f"{shard.location} is not the shard any more that it was a moment ago"
            raise CatalogueError(Reason.WRONG_SHARD, text, "Try again.")
        await check_rights(connection, self.found.roles, f"shard {shard.name}")

    async def prepare_shard(self, connection: Connection, shard: Shard) -> None:
        """Migrate the shard's schema."""
        await migrate_shard(connection, f"shard {shard.name}")

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Write the location; the shard goes offline if others may have its keys."""
        was = self.found.itself
        await lock_out(connection, shard, tools, LOCK_OUT_ALL)
        others = not self._new_identity and await self._others_have_keys(connection, tools)
        self._waits = not self._new_identity and (others or (was.waits and self.found.mappings > 0))
        version = max(abs(was.version), shard.version) + 1
        self._version = -version if self._waits else version
        if self._new_identity:
            await connection.execute(_ALL_OFFLINE, self.map.map_id, self.op_id)
        self._status = _OFFLINE if self._waits else (_ONLINE if was.waits else was.status)
        values = (shard.shard_id, shard.location, self._status, self._version)
        await connection.execute(_SET_IDENTITY, self.map.map_id, *values)
        for role in self.map.session_roles:
            for statement in session_statements(role):
                await connection.execute(statement)

    async def _others_have_keys(self, connection: Connection, tools: Tools) -> bool:
        """Return whether the catalogue gives keys to others that this database has."""
        async with (
            tools.databases.catalogue() as catalogue,
            transaction(catalogue, read_only=True),
        ):
            verified = Verification(catalogue, connection, self.map, self.shard, self.found.itself)
            async for one in verified.differences():
                if isinstance(one, KeysDiffer) and one.catalogue is not None:
                    return True
        return False

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """End the sessions of a shard that waits for a repair."""
        if self._waits:
            await end_sessions(shard, Registered.of_map(self.map.map_id), tools, self.progress)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Set the row's status, and keep the logins. A hidden map stays so until it is repaired."""
        await catalogue.execute(
            "update shardmap.shard set status = $2, version = $3, op_id = null where shard_id = $1",
            *(self.shard.shard_id, self._status, abs(self._version)),
        )
        await catalogue.execute(_ADD_ROLES, self.map.map_id, list(self.found.roles))

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is there, and not marked."""
        query = "select op_id is null from shardmap.shard where shard_id = $1"
        return bool(await catalogue.fetchval(query, self.shard.shard_id))

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Write what the database said of itself, and take its mappings online again."""
        was = self.found.itself
        await connection.execute(LOCK_OUT_ALL)
        values = (was.shard_id, was.location, was.status, was.version)
        await connection.execute(_SET_IDENTITY, self.map.map_id, *values)
        if self._new_identity:
            await connection.execute(_ONLINE_AGAIN, self.map.map_id, self.op_id)
