"""NOTIFY and LISTEN, direct and through the proxy: from the session itself and from another."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    SYNC,
    Exchange,
    ask,
    extended,
    in_three_ways,
    query,
    say,
    session,
)
from tests.support.cuts import Cut

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXCHANGES: Final = (
    session("a notification to oneself", ask("LISTEN own", "NOTIFY own")),
    session("a payload to oneself", ask("LISTEN own", "NOTIFY own, 'hello, é'")),
    session("the longest payload", ask("LISTEN own", f"NOTIFY own, '{'p' * 7999}'")),
    session("a payload too long", ask("LISTEN own", f"NOTIFY own, '{'p' * 8000}'")),
    session("an empty channel", ask("SELECT pg_notify('', 'x')")),
    session("a channel too long", ask(f"SELECT pg_notify('{'c' * 64}', 'x')")),
    session("pg_notify and many payloads", ask("LISTEN own", "SELECT pg_notify('own', n::text) FROM generate_series(1, 50) n")),
    session("the same payload twice is one", ask("LISTEN own", "BEGIN; NOTIFY own, 'a'; NOTIFY own, 'a'; NOTIFY own, 'b'; COMMIT")),
    session("a transaction notifies at its commit", ask("LISTEN own", "BEGIN", "NOTIFY own, 'a'", "SELECT 1", "COMMIT")),
    session("a rolled back notification", ask("LISTEN own", "BEGIN; NOTIFY own; ROLLBACK", "SELECT 1")),
    session("unlisten", ask("LISTEN own", "UNLISTEN own", "NOTIFY own")),
    session("unlisten everything", ask("LISTEN a; LISTEN b", "UNLISTEN *", "NOTIFY a; NOTIFY b")),
    session("listening channels", ask("LISTEN a; LISTEN \"B b\"", "SELECT * FROM pg_listening_channels() ORDER BY 1")),
    session("the own pid is the key's", ask("LISTEN own", "NOTIFY own", "SELECT pg_backend_pid() > 0")),
    session("in the extended protocol", ask("LISTEN own"), say(extended("NOTIFY own, 'a'"), SYNC, extended("SELECT 1"), SYNC, wait=b"ZZ")),
    session("in a pipeline of one transaction", ask("LISTEN own"), say(extended("NOTIFY own, 'a'"), extended("NOTIFY own, 'b'"), SYNC)),
    session("from another session, while idle", ask("LISTEN news"), say(query("NOTIFY news, 'hello'"), on=1), say(wait=b"A")),
    session("from another session, several", ask("LISTEN news"), say(query("SELECT pg_notify('news', n::text) FROM generate_series(1, 20) n"), on=1), say(wait=b"A" * 20)),
    session("from another session, in a transaction", ask("LISTEN news", "BEGIN"), ask("NOTIFY news, 'later'", on=1), ask("SELECT 1", "COMMIT")),
    session("from two other sessions in turn", ask("LISTEN news"), ask("NOTIFY news, 'one'", on=1), say(wait=b"A"), ask("NOTIFY news, 'two'", on=2), say(wait=b"A")),
    session("from another session, not listened to", ask("LISTEN news"), ask("NOTIFY other", on=1), ask("SELECT 1")),
    session("to another session and oneself", ask("LISTEN news"), ask("LISTEN news", on=1), ask("NOTIFY news, 'both'"), say(wait=b"A", on=1)),
    session("back and forth", ask("LISTEN ping"), ask("LISTEN pong", on=1), *(step for n in range(10) for step in (say(query(f"NOTIFY pong, '{n}'")), say(wait=b"A", on=1), say(query(f"NOTIFY ping, '{n}'"), on=1), say(wait=b"A")))),
    session("from another session, 7,999 bytes each", ask("LISTEN news"), ask("SELECT pg_notify('news', n || repeat('p', 7900)) FROM generate_series(1, 30) n", on=1), say(wait=b"A" * 30)),
)  # fmt: skip


@in_three_ways(*EXCHANGES)
async def test_answers_are_those_of_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
