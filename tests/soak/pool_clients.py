"""Clients that find their session as new, leave something in it, and leave in one of many ways.

For: the soak of a pool. Not for: what happens to the servers meanwhile (`pooling`).
"""

# ruff: noqa: E501 - what a client leaves is a row of a table, and a row is a line

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Final

from proxy.wire.messages import (
    BackendKeyData,
    BackendMessage,
    ErrorResponse,
    Frame,
    ParameterStatus,
    ReadyForQuery,
)
from proxy.wire.startup import CancelRequest
from tests.differential.frontend import (
    FLUSH,
    SYNC,
    TERMINATE,
    bind,
    copy_data,
    execute,
    parse,
    query,
)
from tests.soak.outcome import Outcome
from tests.support.client import Client, connected, startup
from tests.support.running import Listening

SLEEP: Final = query("SELECT pg_catalog.pg_sleep(5)")
# What no reset undoes is not in it. Every name is qualified: a search_path must not hide anything.
FRESH: Final = """
SELECT pg_catalog.concat_ws('|', session_user, current_user, pg_catalog.current_setting('role'),
  (SELECT pg_catalog.string_agg(pg_catalog.current_setting(name), ',') FROM pg_catalog.unnest(array[
    'work_mem', 'search_path', 'TimeZone', 'client_encoding', 'DateStyle', 'IntervalStyle',
    'statement_timeout', 'lock_timeout', 'idle_session_timeout', 'row_security',
    'default_transaction_isolation', 'default_transaction_read_only', 'client_min_messages',
    'standard_conforming_strings', 'application_name', 'enable_seqscan', 'extra_float_digits',
    'bytea_output', 'plan_cache_mode']) name),
  (SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_statements),
  (SELECT pg_catalog.count(*) FROM pg_catalog.pg_cursors),
  (SELECT pg_catalog.count(*) FROM pg_catalog.pg_listening_channels()),
  (SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks
    WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid()),
  (SELECT pg_catalog.count(*) FROM pg_catalog.pg_class
    WHERE relnamespace = pg_catalog.pg_my_temp_schema()),
  (SELECT pg_catalog.count(*) FROM pg_catalog.pg_proc
    WHERE pronamespace = pg_catalog.pg_my_temp_schema()))
"""
LASTVAL: Final = "SELECT pg_catalog.lastval()"

# What a client leaves. {n} is a number of its own.
LEFT: Final[Mapping[str, bytes]] = {
    "a temporary table": query("CREATE TEMP TABLE left_here (n int)"),
    "100 temporary tables": query("DO $$ BEGIN FOR n IN 1..100 LOOP EXECUTE 'CREATE TEMP TABLE t' || n || ' (n int)'; END LOOP; END $$"),
    "a temporary function": query("CREATE FUNCTION pg_temp.count() RETURNS bigint LANGUAGE sql AS 'SELECT 0::bigint'"),
    "a trap in the search path": query("CREATE FUNCTION pg_temp.lastval() RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'; SET search_path = pg_temp, pg_catalog"),
    "work_mem": query("SET work_mem = '5MB'"),
    "set_config": query("SELECT set_config('work_mem', '6MB', false)"),
    "search_path": query("SET search_path = nowhere"),
    "TimeZone": query("SET TimeZone = 'Asia/Tokyo'"),
    "LATIN1": query("SET client_encoding = LATIN1"),
    "SQL_ASCII": query("SET client_encoding = SQL_ASCII"),
    "DateStyle": query("SET DateStyle = 'German, DMY'"),
    "IntervalStyle": query("SET IntervalStyle = iso_8601"),
    "PREPARE": query("PREPARE p AS SELECT 1"),
    "a statement by protocol": parse("SELECT 1", name="s") + SYNC,
    "an open portal": parse("SELECT 1") + bind() + execute(rows_max=1) + SYNC,
    "an advisory lock": query("SELECT pg_advisory_lock({n})"),
    "a shared advisory lock": query("SELECT pg_advisory_lock_shared(7)"),
    "LISTEN": query("LISTEN news"),
    "LISTEN and NOTIFY": query("LISTEN news; NOTIFY news, 'unasked'"),
    "SET ROLE": query('SET ROLE "demo-engineers"'),
    "serializable": query("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"),
    "read only": query("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"),
    "read only by a setting": query("SET default_transaction_read_only = on"),
    "a cursor with hold": query("DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 10)"),
    "a sequence's value": query("CREATE TEMP SEQUENCE q; SELECT nextval('q')"),
    "statement_timeout": query("SET statement_timeout = 1"),
    "lock_timeout": query("SET lock_timeout = 1; SET idle_session_timeout = '1h'"),
    "application_name": query("SET application_name = 'left'"),
    "client_min_messages": query("SET client_min_messages = error; SET row_security = off"),
    "standard_conforming_strings": query("SET standard_conforming_strings = off"),
    "RESET ALL": query("SET work_mem = '7MB'; RESET ALL"),
    "DISCARD ALL": query("DISCARD ALL"),
    "an error": query("SELECT 1/0"),
    "nothing": query(""),
}  # fmt: skip

# The last thing that a client sends, and how many bytes of answers it reads before it leaves.
LEAVINGS: Final[Mapping[str, bytes]] = {
    "Terminate": TERMINATE,
    "Terminate and RST": TERMINATE,
    "EOF": b"",
    "RST": b"",
    "RST while busy": SLEEP,
    "Terminate in a transaction": query("BEGIN") + TERMINATE,
    "Terminate in COPY": query("CREATE TEMP TABLE c (s text)") + query("COPY c FROM STDIN") + copy_data(TERMINATE) + TERMINATE,
    "Query and Terminate in one write": query("SELECT pg_catalog.pg_sleep(0.01)") + TERMINATE,
    "Terminate without Sync": parse("SELECT 1") + FLUSH + TERMINATE,
    "a Query that is cut": query("SELECT 1")[:4],
    "a bare X": b"X",
    "a cancel": SLEEP,
}  # fmt: skip
_RESETS: Final = ("Terminate and RST", "RST", "RST while busy")
APPLICATIONS: Final = ("one", "two", "three")
ANSWER_SECONDS_MAX: Final = 60.0
# From the end of a session until the proxy must have heard of it.
DELAY_SECONDS_MAX: Final = 1.0


class Lost(Exception):
    """The session ended, or was refused, and the client had not asked for it."""


class Life:
    """What the soak knows: when what ended sessions, and which answers a fresh session gives."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.over = False
        self.ended_at: dict[int, float] = {}  # by backend
        self.all_ended_at = 0.0  # by `time.monotonic`
        self.fresh: dict[str, list[object]] = {}  # by application name
        # With the backend's pid: of 170,000 secrets of four bytes some are equal by chance.
        self.keys: set[tuple[int, bytes]] = set()


class PoolClient:
    """One client after the other, from a generator of its own."""

    def __init__(self, number: int, seed: int, proxy: Listening, life: Life) -> None:
        self._number = number
        self._dice = random.Random(f"{seed} client {number}")
        self._address = (proxy.listen_host, proxy.listen_port)
        self._life = life
        self._pid: int | None = None  # of its backend

    async def work(self) -> None:
        """Open one session after the other until it is over."""
        counts = self._life.outcome.counts
        while not self._life.over:
            choices = (APPLICATIONS, list(LEFT), list(LEAVINGS))
            name, left, leaving = (self._dice.choice(names) for names in choices)
            began, self._pid = time.monotonic(), None
            try:
                async with asyncio.timeout(ANSWER_SECONDS_MAX):
                    async with connected(Client, self._address) as client:
                        key = await self._enter(client, name)
                        counts["sessions"] += 1
                        await self._ask(client, LEFT[left].replace(b"{n}", b"%3d" % self._number))
                        counts[f"left: {left}"] += 1
                        await self._end(client, leaving, key)
                        counts[f"leaves: {leaving}"] += 1
            except (Lost, OSError, EOFError) as error:
                self._judge(error, began)
            except TimeoutError:
                self._life.outcome.wrong.append(f"no answer: {name}, {left}, {leaving}")

    async def first(self, name: str) -> None:
        """Keep what a fresh session answers."""
        async with connected(Client, self._address) as client:
            await self._enter(client, name)

    async def _enter(self, client: Client, name: str) -> BackendKeyData:
        """Log in, and compare what the session is with a fresh one."""
        packet = startup(database="databricks_postgres", application_name=name)
        welcome = await self._ask_as_new(client, packet)
        (key,) = (one for one in welcome if isinstance(one, BackendKeyData))
        self._pid = key.pid
        whole = key.pid, key.key.reveal()
        if whole in self._life.keys:
            self._life.outcome.wrong.append(f"a cancel key of {name} comes again")
        self._life.keys.add(whole)
        seen: list[object] = [one for one in welcome if isinstance(one, ParameterStatus)]
        seen += [one for one in await self._ask_as_new(client, query(FRESH)) if _is_row(one)]
        answers = await self._ask_as_new(client, query(LASTVAL))
        seen += [one.sqlstate for one in answers if isinstance(one, ErrorResponse)]
        fresh = self._life.fresh.setdefault(name, seen)
        if seen != fresh:
            self._life.outcome.wrong.append(f"{seen}, not {fresh}")
        return key

    async def _ask_as_new(self, client: Client, content: bytes) -> list[BackendMessage | Frame]:
        """Send in a session that listens to nothing, and return what comes up to ReadyForQuery."""
        messages = await self._ask(client, content)
        if any(isinstance(one, Frame) and one.type == b"A" for one in messages):
            self._life.outcome.wrong.append("a notification that was not asked for")
        return messages

    async def _ask(self, client: Client, content: bytes) -> list[BackendMessage | Frame]:
        """Send, and return what comes up to ReadyForQuery. Raises Lost at a FATAL."""
        await client.send(content)
        messages: list[BackendMessage | Frame] = []
        while not messages or not isinstance(messages[-1], ReadyForQuery):
            messages.append(await client.message())
            last = messages[-1]
            if isinstance(last, ErrorResponse) and dict(last.fields)[b"S"] == b"FATAL":
                raise Lost(f"{last.sqlstate} {last.message} {dict(last.fields).get(b'D', b'')!r}")
        return messages

    async def _end(self, client: Client, leaving: str, key: BackendKeyData) -> None:
        await client.send(LEAVINGS[leaving])
        if leaving == "a cancel":
            async with connected(Client, self._address) as other:
                await other.send(CancelRequest(key.pid, key.key).encode())
                if self._dice.random() < 0.5:
                    await other.ended()
        if leaving in _RESETS:
            client.reset()
        else:
            client.close()

    def _judge(self, error: Exception, began: float) -> None:
        """Count an end that was to be expected; any other is wrong."""
        life = self._life
        life.outcome.counts["sessions lost"] += 1
        own = life.ended_at.values() if self._pid is None else [life.ended_at.get(self._pid, 0.0)]
        if max((life.all_ended_at, *own)) < began - DELAY_SECONDS_MAX:
            life.outcome.wrong.append(f"lost without a reason: {error!r}")


def _is_row(message: BackendMessage | Frame) -> bool:
    return isinstance(message, Frame) and message.type == b"D"
