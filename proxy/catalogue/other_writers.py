"""What may still write for keys whose sessions have ended: prepared transactions, other logins.

For: waiting until the transactions that were prepared before are gone, and counting the sessions
that came beside the proxy. Not for: sessions that a shard has admitted (`fence`).

Which keys a prepared transaction has changed cannot be known. All of the database are waited for.
"""

from collections.abc import Sequence
from typing import Final

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import SESSIONS_SECONDS_MAX, growing_pauses
from proxy.catalogue.model import Connection, Shard
from proxy.catalogue.operation import Json, Tools

_POLL_SECONDS: Final = 0.2
_SHOWN_MAX: Final = 5
# A session that is younger may be waiting for its admission.
_STARTING_SECONDS: Final = 5

_PREPARED: Final = (
    "select transaction::text || ' ' || gid as id, gid from pg_catalog.pg_prepared_xacts"
    " where database = pg_catalog.current_database() order by prepared"
)
_UNREGISTERED: Final = """
select count(*) from pg_catalog.pg_stat_activity a
where a.datname = pg_catalog.current_database() and a.usename = any($1::text[])
and a.backend_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)
and not exists (select from shardmap_local.session s
  where s.pid = a.pid and s.backend_start = a.backend_start)"""


async def wait_for_prepared(shard: Shard, tools: Tools, progress: Json) -> None:
    """Wait until all transactions that are prepared now have been committed or rolled back.

    `progress` gets their number. Raises CatalogueError (PREPARED_TRANSACTIONS) after
    SESSIONS_SECONDS_MAX, which names them.
    """
    async with tools.databases.shard(shard) as connection:
        deadline = tools.monotonic() + SESSIONS_SECONDS_MAX
        pauses = growing_pauses(_POLL_SECONDS)
        waited_for = left = await _prepared(connection)
        while left:
            progress["prepared_transactions"] = len(left)
            if tools.monotonic() >= deadline:
                raise _still_prepared(shard, list(left.values()))
            await tools.sleep(next(pauses))
            now = await _prepared(connection)
            left = {id_: gid for id_, gid in waited_for.items() if id_ in now}
    progress.pop("prepared_transactions", None)


async def _prepared(connection: Connection) -> dict[str, str]:
    """Return the names of the prepared transactions, by what is theirs alone."""
    return {row["id"]: row["gid"] for row in await connection.fetch(_PREPARED)}


def _still_prepared(shard: Shard, gids: list[str]) -> CatalogueError:
    names = ", ".join(f"'{gid}'" for gid in gids[:_SHOWN_MAX])
    more = ", ..." if len(gids) > _SHOWN_MAX else ""
    text = f"shard {shard.name}: {len(gids)} transactions are still prepared ({names}{more})"
    hint = "COMMIT PREPARED or ROLLBACK PREPARED ends one; then resume the operation."
    return CatalogueError(Reason.PREPARED_TRANSACTIONS, text, hint)


async def count_unregistered(connection: Connection, roles: Sequence[str]) -> int:
    """Return how many sessions of these logins came to the database beside the proxy."""
    count: int = await connection.fetchval(_UNREGISTERED, list(roles), _STARTING_SECONDS)
    return count
