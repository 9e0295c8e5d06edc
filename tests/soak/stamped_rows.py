"""Rows that say which key, epoch and shard they were written under, and the proof that all is well.

Each session is stamped by what the shard's own registry says of it, and each shard keeps a history
of its own table of mappings, by a trigger of this module. So a stamp is compared with what the
shard served at that time, and the history of one shard with that of the other: all servers have the
same clock. Not for: what sessions do (`moves`).
"""

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

import asyncpg

from proxy.routing.keys import KeyType, parse_key
from tests.soak.outcome import Outcome
from tests.support.catalogue import SHARD_NAMES, Stores

Errors: Final = (
    *(asyncpg.PostgresError, asyncpg.InterfaceError, OSError),
    asyncpg.InternalClientError,  # of the driver, when a session ends between two of its messages
)

# Definer functions: a client's role has no right on the registry, and needs none on the rows.
_SQL: Final = """
alter database "{database}" set synchronous_commit = on;
create table item (key int, client int, number int, epoch bigint, shard text, at timestamptz);
create index on item (key);
create table history (number bigserial, lo bytea, hi bytea, epoch bigint, served bool,
  at timestamptz default clock_timestamp());
create function keep_history() returns trigger language plpgsql
  set search_path = public, pg_temp as $$
begin
  if tg_op = 'DELETE' then
    insert into history (lo, hi, epoch, served) values (old.lo, old.hi, old.epoch, false);
  else
    insert into history (lo, hi, epoch, served)
    values (new.lo, new.hi, new.epoch, new.status = 'online');
  end if;
  return null;
end $$;
create trigger keep_history after insert or update or delete on shardmap_local.mapping
  for each row execute function keep_history();
create function registered_epoch() returns bigint language sql as
  'select s.epoch from shardmap_local.session s join pg_stat_get_activity(pg_backend_pid()) a
   on a.pid = s.pid and a.backend_start = s.backend_start';
create function write_item(p_key int, p_client int, p_number int) returns void
  language sql security definer as $$
  insert into item
  values (p_key, p_client, p_number, registered_epoch(), '{shard}', clock_timestamp()) $$;
create function read_items(p_key int, out items bigint, out epoch bigint, out shard text,
  out at timestamptz, out pid int) language sql security definer as $$
  select (select count(*) from public.item where key = p_key), registered_epoch(), '{shard}',
  clock_timestamp(), pg_backend_pid() $$;
"""
WRITE: Final = "select write_item($1, $2, $3)"
READ: Final = "select * from read_items($1)"

# The keys of the range as the operation gives them; all or nothing, so an interrupted copy leaves
# the target as it was, and what an earlier one left there goes first.
COPY: Final = """\
range="key >= $SHARDS_LOW and key < $SHARDS_HIGH"
exec {psql} -X -q -1 -v ON_ERROR_STOP=1 "$SHARDS_TARGET" -f - <<END
delete from public.item where $range;
\\copy public.item from program '{psql} -X -q "$SHARDS_SOURCE" -c \
"copy (select * from public.item where $range) to stdout"'
END
"""


def install(stores: Stores) -> None:
    """Add tables and functions to the shards, which are set up. The administrator owns them."""
    for name in SHARD_NAMES:
        sql = _SQL.format(database=stores.database, shard=name)
        stores.execute(name, sql, role=stores.roles.admin)


# A session that is to end is asked again and again; an operation that was killed comes first.
LIVES_SECONDS_MAX: Final = 20.0


class Stamp(NamedTuple):
    """Who read or wrote: a key, under an epoch, on a shard, at a time of the servers' clock."""

    key: int
    epoch: int | None
    shard: str
    at: float


@dataclass
class Known:
    """What the clients know: rows by key, and what they have read; what the writers changed when.

    A change of which the flag is set lets sessions live on.
    """

    acknowledged: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    attempted: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    reads: list[Stamp] = field(default_factory=list)
    changes: list[tuple[range, float, bool]] = field(default_factory=list)

    def changing(self, keys: range, *, keeps: bool = False) -> None:
        """Record that a change of a mapping begins, and whether its sessions are left alone."""
        self.changes.append((keys, time.time(), keeps))


class Kept(NamedTuple):
    """A mapping as a shard had it from a time on: served, or offline, or gone."""

    at: float
    epoch: int
    shard: str
    served: bool


class History:
    """Which shard served which keys under which epoch, since when."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._rows: list[tuple[bytes, bytes | None, Kept]] = []
        self._of_key: dict[int, list[Kept]] = {}

    async def read(self, stores: Stores) -> None:
        """Read what the shards have kept."""
        query = "select lo, hi, epoch, served, extract(epoch from at)::float8 as at from history"
        for name in SHARD_NAMES:
            async with stores.connect(name) as connection:
                for row in await connection.fetch(query):
                    one = Kept(row["at"], row["epoch"], name, row["served"])
                    self.add(row["lo"], row["hi"], one)

    def add(self, lo: bytes, hi: bytes | None, kept: Kept) -> None:
        """Add what a shard has kept of one mapping."""
        self._rows.append((lo, hi, kept))

    def of(self, key: int) -> list[Kept]:
        """Return the rows that covered a key, in the order of time."""
        if key not in self._of_key:
            canonical = parse_key(str(key), KeyType.INT4)
            self._of_key[key] = sorted(
                row
                for lo, hi, row in self._rows
                if lo <= canonical and (hi is None or canonical < hi)
            )
        return self._of_key[key]

    def wrong(self, stamp: Stamp) -> str:
        """Return what is wrong with a stamp; empty if the shard had the key then.

        It must have served it under that epoch before, and no other shard may have served it since.
        A mapping that is deleted and added has epoch 1 again, so its latest time counts.
        """
        rows = self.of(stamp.key)
        for row in reversed(rows[: bisect_right(rows, stamp.at, key=lambda row: row.at)]):
            if (row.epoch, row.shard, row.served) == (stamp.epoch, stamp.shard, True):
                return ""
            if row.served and row.shard != stamp.shard:
                return f"{stamp}: {row.shard} has served it, under {row.epoch}, since then"
        return f"{stamp}: that shard had not served it under that epoch"

    def lives_seconds(self, stamp: Stamp) -> float:
        """Return for how long its shard had not served the key, though no one let it live."""
        own = [row for row in self.of(stamp.key) if row.shard == stamp.shard]
        until = bisect_right(own, stamp.at, key=lambda row: row.at)
        stopped = None
        for row in reversed(own[:until]):
            if row.served:
                break
            stopped = row.at
        if stopped is None or self._is_kept(stamp, stopped):
            return 0.0
        return stamp.at - stopped

    def _is_kept(self, stamp: Stamp, stopped: float) -> bool:
        """Return whether the change that stopped the key left its sessions alone.

        One writer changes a key, so it is the last one that had begun.
        """
        return next(
            (
                keeps
                for keys, at, keeps in reversed(self._known.changes)
                if at <= stopped and stamp.key in keys
            ),
            False,
        )

    def order(self, keys: Iterable[int]) -> list[str]:
        """Return where an epoch was used by two shards, or a later one was lower."""
        found = []
        for key in keys:
            for before, after in pairwise([row for row in self.of(key) if row.served]):
                if before.shard != after.shard and after.epoch <= before.epoch:
                    found.append(f"key {key}: {after} follows {before}")
        return found


async def check_rows(
    stores: Stores, known: Known, owners: dict[int, str], keys: Sequence[int], outcome: Outcome
) -> None:
    """Add what is wrong: stamps, and rows that were lost, doubled or never written."""
    history = History(known)
    await history.read(stores)
    outcome.wrong += history.order(keys)
    rows: dict[str, dict[int, list[Any]]] = {name: defaultdict(list) for name in SHARD_NAMES}
    stamps = set(known.reads)
    query = "select key, client, number, epoch, shard, extract(epoch from at)::float8 as at"
    for name in SHARD_NAMES:
        async with stores.connect(name) as connection:
            for row in await connection.fetch(f"{query} from item"):
                rows[name][row["key"]].append((row["client"], row["number"]))
                stamps.add(Stamp(row["key"], row["epoch"], row["shard"], row["at"]))
    wrong: dict[int, list[str]] = defaultdict(list)
    for stamp in stamps:
        if why := history.wrong(stamp):
            wrong[stamp.key].append(why)
        what, seconds = (
            "the longest life of a session that is not served",
            history.lives_seconds(stamp),
        )
        outcome.bounded(what, seconds, LIVES_SECONDS_MAX, stamp)
    for key, stamped in wrong.items():
        kept = "; ".join(map(str, history.of(key)))
        outcome.wrong.append(f"{min(stamped)}, and {len(stamped) - 1} more; the shards: {kept}")
    for key in keys:
        outcome.wrong += lost_rows(key, rows[owners[key]][key], known)


def lost_rows(key: int, rows: list[tuple[int, int]], known: Known) -> list[str]:
    """Return which of the clients' rows of a key are not there once."""
    there = set(rows)
    found = []
    if len(there) < len(rows):
        found.append(f"key {key}: {len(rows) - len(there)} rows are there twice")
    if lost := known.acknowledged[key] - there:
        found.append(f"key {key}: {len(lost)} committed rows are lost, such as {min(lost)}")
    if strange := there - known.attempted[key]:
        found.append(f"key {key}: {len(strange)} rows that were never written")
    return found
