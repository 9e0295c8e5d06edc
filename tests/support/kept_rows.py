"""The rows of a map in its catalogue and its shards: kept, written back, and compared.

For: trying several ways on from one state, and telling whether two states are alike. Not for: what
must hold of the rows (`operating`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import unified_diff
from itertools import count
from typing import Any, Final, Self

from tests.support.catalogue import MAP

Rows = list[dict[str, Any]]

CATALOGUE_TABLES: Final = ("shardmap.shard_map", "shardmap.shard", "shardmap.mapping")
OP_LOG: Final = "shardmap.op_log"
LOCAL_TABLES: Final = ("shardmap_local.identity", "shardmap_local.mapping")
_ORDER: Final = {"lo": 0, "name": 1, "map_name": 2, "created_at": 3}
SESSIONS: Final = "sessions"
GRANTED: Final = "granted"
_ALIVE: Final = (
    "select coalesce(json_agg(s order by s.epoch, s.key), '[]') from (select mapping_id, epoch,"
    " encode(key, 'hex') as key from shardmap_local.live_session where key is not null) s"
)
_GRANTED: Final = (
    "coalesce((select has_function_privilege('{}', p.oid, 'execute') from pg_proc p"
    " where p.oid = to_regproc('shardmap_local.admit')), false)"
)
_UUID: Final = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# What differs from one run to the next.
_VOLATILE: Final = frozenset({"span", "created_at", "updated_at", "owner", "drain_until"})
_NUMBERS: Final = frozenset({"epoch", "version", "mapping_id", "locked_until"})


@dataclass(frozen=True)
class KeptRows:
    """All rows by server and table, the live sessions by shard, and who may call admit there."""

    tables: Mapping[str, Mapping[str, Rows]]
    sessions: Mapping[str, Rows]
    granted: frozenset[str]

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return what `read_rows` has found, by server."""
        tables = {
            server: {table: sorted(rows[table] or [], key=_order) for table in tables_of(server)}
            for server, rows in found.items()
        }
        sessions = {server: rows[SESSIONS] for server, rows in found.items() if server != MAP}
        granted = {server for server, rows in found.items() if rows.get(GRANTED)}
        return cls(tables, sessions, frozenset(granted))

    def alike(self) -> str:
        """Return a text that is the same for states which differ in identifiers only."""
        return self._text(_VOLATILE, lambda table: True)

    def settled(self) -> str:
        """Return a text of the rows without epochs; equal for what a map means to its users."""
        return self._text(_VOLATILE | _NUMBERS, lambda table: table != OP_LOG)

    def _text(self, without: frozenset[str], shown: Callable[[str], bool]) -> str:
        found = {
            server: {
                table: [_without(row, without) for row in rows]
                for table, rows in tables.items()
                if shown(table)
            }
            for server, tables in self.tables.items()
        }
        text = json.dumps([found, sorted(self.granted)], sort_keys=True, indent=1)
        numbers: Iterator[int] = count()
        seen: dict[str, str] = {}

        def numbered(match: re.Match[str]) -> str:
            return seen.setdefault(match[0], f"#{next(numbers)}")

        return _UUID.sub(numbered, text)


def differences(found: KeptRows, expected: KeptRows) -> list[str]:
    """Return the lines in which two states differ, as they are compared once settled."""
    lines = unified_diff(expected.settled().splitlines(), found.settled().splitlines(), lineterm="")
    return list(lines)


def _without(value: Any, names: frozenset[str]) -> Any:
    """Return JSON without these keys, however deep."""
    if isinstance(value, dict):
        return {name: _without(one, names) for name, one in value.items() if name not in names}
    if isinstance(value, list):
        return [_without(one, names) for one in value]
    return value


def tables_of(server: str) -> tuple[str, ...]:
    """Return the tables of a server that operations change, parents first."""
    return (*CATALOGUE_TABLES, OP_LOG) if server == MAP else LOCAL_TABLES


async def read_rows(connection: Any, server: str, role: str) -> dict[str, Any]:
    """Return, in one query, all rows of a server's tables, and what else a shard has."""
    parts = [f"'{name}', (select json_agg(to_json(t)) from {name} t)" for name in tables_of(server)]
    if server != MAP:
        parts += [f"'{SESSIONS}', ({_ALIVE})", f"'{GRANTED}', ({_GRANTED.format(role)})"]
    text = await connection.fetchval(f"select json_build_object({', '.join(parts)})")
    found: dict[str, Any] = json.loads(text)
    return found


def _order(row: Mapping[str, Any]) -> str:
    (name,) = [name for name in sorted(_ORDER, key=_ORDER.__getitem__) if name in row][:1]
    return str(row[name])


async def write_tables(connection: Any, tables: Mapping[str, Rows]) -> None:
    """Make the rows of these tables what they were, in one transaction."""
    script = [f"delete from {table};" for table in reversed(list(tables))]
    for table, rows in tables.items():
        if rows:
            columns = ", ".join(name for name in rows[0] if name != "span")
            literal = json.dumps(rows).replace("'", "''")
            script.append(
                f"insert into {table} ({columns}) select {columns}"
                f" from json_populate_recordset(null::{table}, '{literal}');"
            )
    await connection.execute("\n".join(script))
