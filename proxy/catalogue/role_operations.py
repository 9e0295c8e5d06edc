"""Letting a login be admitted in every shard of a map, and no longer.

The map keeps the login, so that a shard that is added later grants it as well. No shard is added
meanwhile: the operation has the whole map. While it is under way, one shard's row has its mark.
"""

from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.operation import Json, Operation, Step, Tools
from proxy.catalogue.shard_store import check_rights, role_exists, session_statements
from proxy.catalogue.store import read_shards

_ROLES: Final = "select session_roles from shardmap.shard_map where map_id = $1"
_SET_ROLES: Final = "update shardmap.shard_map set session_roles = $2 where map_id = $1"
_MARK: Final = "update shardmap.shard set op_id = $2 where shard_id = $1"


class _RoleOperation(Operation):
    """What both share: the login, and whether the map had it before."""

    steps: ClassVar[tuple[Step, ...]] = (LOCAL, END)
    whole_map: ClassVar[bool] = True
    revokes: ClassVar[bool] = False

    def __init__(self, catalogue_map: CatalogueMap, role: str, op_id: UUID | None = None) -> None:
        super().__init__(catalogue_map, op_id)
        self.role = role
        self._was_granted = False  # known after `begin`

    def body(self) -> Json:
        """Return what the row has."""
        return {**super().body(), "role": self.role, "was_granted": self._was_granted}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        return cls(catalogue_map, body["role"], op_id).load(body)

    def load(self, body: Json) -> Self:
        """Read what `body` wrote."""
        self._was_granted = body["was_granted"]
        return super().load(body)

    async def find(self, catalogue: Connection) -> None:
        """Find all shards of the map."""
        self.shards = tuple(await read_shards(catalogue, self.map.map_id))

    async def begin(self, catalogue: Connection) -> None:
        """Record whether the map has the login, and mark a shard's row."""
        self._was_granted = self.role in await self._roles(catalogue)
        await self._mark(catalogue, self.op_id)

    def statements(self) -> list[str]:
        """Return what is done in each shard."""
        return session_statements(self.role, revoke=self.revokes)

    def plan(self) -> list[str]:
        """Return what will be done."""
        shards = [f"shard {shard.name}" for shard in self.shards]
        local = [f"In {where}: {one}." for where in shards for one in self.statements()]
        word = "no longer admitted" if self.revokes else "admitted"
        return [*local, f"Keep with the map {self.map.name} that {self.role} is {word}."]

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Grant or revoke. A login that the server does not have has nothing to lose."""
        if not self.revokes or await role_exists(connection, self.role):
            await _execute(connection, self.statements())

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Keep the login with the map, or no longer."""
        others = [one for one in await self._roles(catalogue) if one != self.role]
        kept = others if self.revokes else [*others, self.role]
        await catalogue.execute(_SET_ROLES, self.map.map_id, kept)
        await self._mark(catalogue, None)

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the map has the login, or no longer."""
        return (self.role in await self._roles(catalogue)) is not self.revokes

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Restore the rights that the login had before."""
        if self._was_granted is self.revokes and await role_exists(connection, self.role):
            await _execute(connection, session_statements(self.role, revoke=not self.revokes))

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the mark; the map changes in the last step alone."""
        await self._mark(catalogue, None)

    async def _mark(self, catalogue: Connection, op_id: UUID | None) -> None:
        """Mark the row by which proxies see that the operation is pending, or clear the mark.

        One is enough for them to count it. A change of more than 64 rows would be notified without
        their ids, and each proxy would read its whole map.
        """
        for shard in self.shards[:1]:
            await catalogue.execute(_MARK, shard.shard_id, op_id)

    async def _roles(self, catalogue: Connection) -> list[str]:
        roles: list[str] = await catalogue.fetchval(_ROLES, self.map.map_id)
        return roles


class GrantSession(_RoleOperation):
    """Let a login be admitted in every shard."""

    kind: ClassVar[str] = "grant_session"

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check the shard, and that the administrator may see and end the login's sessions."""
        await super().check_shard(connection, shard)
        await check_rights(connection, [self.role], f"shard {shard.name}")


class RevokeSession(_RoleOperation):
    """Let a login be admitted in no shard."""

    kind: ClassVar[str] = "revoke_session"
    revokes: ClassVar[bool] = True


async def _execute(connection: Connection, statements: list[str]) -> None:
    for statement in statements:
        await connection.execute(statement)
