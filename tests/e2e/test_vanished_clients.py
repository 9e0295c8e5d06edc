"""What becomes of the work of a client that disconnects without a Terminate (W35).

The database ends the query of such a client. It does not end a COMMIT that waits for synchronous
replicas: a CancelRequest once did, and the rows were visible although no replica had them.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import pytest

from proxy.emulator.cluster import Cluster
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.server.serving import serving
from proxy.session.direction import CLIENT_POLL_SECONDS
from proxy.session.relay import CANCELS_SECONDS_MAX
from proxy.wire.messages import ErrorResponse, Frame, ReadyForQuery, Terminate
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.peer import send_until_stalled
from tests.support.running import LogLines, all_over, eventually, proxy_settings

GONE_SECONDS_MAX = 5.0
SORT = "SELECT count(*) FROM (SELECT md5(n::text) FROM generate_series(1, 20000000) n ORDER BY 1) s"
WORK = {"pg_sleep": ("SELECT pg_sleep(60), 'orphan'", "orphan"), "a sort": (SORT, "ORDER BY")}
REQUEST = {"cancel_method": "cancel_request"}
LOST = ("too_many", "failed")
STATEMENTS = 380
TERMINATE = Terminate().encode()


@pytest.fixture(params=[16, 18], ids=["PostgreSQL 16", "PostgreSQL 18"])
def cluster(request: pytest.FixtureRequest, clusters: Mapping[str, Cluster]) -> Iterator[Cluster]:
    if request.param == 16:
        yield clusters["one"]
        return
    with Cluster("one", version=request.param) as newest:
        yield newest


@asynccontextmanager
async def proxy_of(cluster: Cluster, **upstream: object) -> AsyncIterator[tuple[App, Lakebase]]:
    """Run an emulator of one shard on this cluster, and a proxy in front of it."""
    async with (
        Lakebase(("one",), clusters={"one": cluster}) as lakebase,
        serving(proxy_settings(lakebase, upstream=upstream)) as proxy,
    ):
        yield proxy, lakebase


@contextmanager
def synchronous_standby_missing(cluster: Cluster) -> Iterator[None]:
    """Make each synchronous COMMIT wait for a replica that does not exist."""
    reload = "SELECT pg_reload_conf();"
    cluster.execute("ALTER SYSTEM SET synchronous_standby_names = 'missing';" + reload)
    try:
        yield
    finally:
        cluster.execute("ALTER SYSTEM RESET synchronous_standby_names;" + reload)


def running(cluster: Cluster, text: str) -> int:
    sql = (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' "
        f"AND pid <> pg_backend_pid() AND query LIKE '%{text}%'"
    )
    return int(cluster.execute(sql))


async def begun(proxy: App, stack: AsyncExitStack, sql: str) -> Client:
    client = await stack.enter_async_context(plain_client(proxy))
    await client.start_up()
    await client.send(query(sql))
    return client


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize(("sql", "text"), WORK.values(), ids=WORK.keys())
async def test_w35_the_database_ends_the_query_of_a_vanished_client(
    cluster: Cluster, way: str, sql: str, text: str
) -> None:
    async with proxy_of(cluster) as (proxy, lakebase), AsyncExitStack() as stack:
        client = await begun(proxy, stack, sql)
        await eventually(lambda: running(cluster, text), "the query runs")
        getattr(client, way)()
        await eventually(lambda: not running(cluster, text), "the query is gone", GONE_SECONDS_MAX)
        assert lakebase.gateway.cancels == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w35_a_commit_that_waits_for_replicas_goes_on_waiting(
    cluster: Cluster, way: str
) -> None:
    # The cancel that the proxy sent ended the wait: the row was visible, and no replica had it.
    table = f"vanished_{way}"
    cluster.execute(f"CREATE TABLE {table} (n int); GRANT ALL ON {table} TO PUBLIC")
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    async with proxy_of(cluster) as (proxy, _), AsyncExitStack() as stack:
        with synchronous_standby_missing(cluster):
            sql = f"SET synchronous_commit = on; INSERT INTO {table} VALUES (1)"
            client = await begun(proxy, stack, sql)
            await eventually(lambda: cluster.execute(waiting), "the commit waits")
            pid = cluster.execute(waiting)
            getattr(client, way)()
            await eventually(lambda: proxy.metrics.value("connections") == 0, "the client is gone")
            # Nothing can be waited for where nothing must happen: twice the interval of the check.
            await asyncio.sleep(GONE_SECONDS_MAX)
            assert cluster.execute(waiting) == pid
            assert cluster.execute(f"SELECT count(*) FROM {table}") == "0"
    await eventually(lambda: not cluster.execute(waiting), "the commit is over")
    cluster.execute(f"DROP TABLE {table}")


async def test_w35_a_cancel_request_reaches_a_database_whose_front_end_keeps_the_connection(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # PostgreSQL does not see the end of such a client: its check finds a connection that is open.
    cluster = lakebase["one"].cluster
    lakebase["one"].endpoint.keeps_backend = True
    proxy = await start_proxy(upstream=REQUEST)
    async with AsyncExitStack() as stack:
        client = await begun(proxy, stack, "SELECT pg_sleep(60), 'kept'")
        await eventually(lambda: running(cluster, "kept"), "the query runs")
        client.close()
        await eventually(lambda: not running(cluster, "kept"), "it is gone", GONE_SECONDS_MAX)
    assert lakebase.gateway.records[0].parameter(b"options") is None


@pytest.mark.parametrize(
    ("upstream", "options", "expected"),
    [
        ({}, "", "2s"),
        ({}, "-c client_connection_check_interval=7s", "7s"),
        ({}, "--Client-Connection-Check-Interval=0", "0"),
        (REQUEST, "", "0"),
        ({"cancel_on_disconnect": False}, "", "0"),
    ],
)
async def test_w50_the_connection_check_is_set_unless_the_client_sets_it(
    start_proxy: StartProxy, upstream: dict[str, object], options: str, expected: str
) -> None:
    proxy = await start_proxy(upstream=upstream)
    async with plain_client(proxy) as client:
        await client.send(startup(options=options) if options else startup())
        await client.messages_until(ReadyForQuery)
        await client.query("SHOW client_connection_check_interval")
        assert expected.encode() in b"".join(
            getattr(message, "payload", b"")
            for message in await client.messages_until(ReadyForQuery)
        )


REFUSALS = {
    "PostgreSQL 13": ErrorResponse.fatal(
        "42704", 'unrecognized configuration parameter "client_connection_check_interval"'
    ),
    "another system than Linux": ErrorResponse.fatal(
        "22023",
        'invalid value for parameter "client_connection_check_interval": 2000',
        '"client_connection_check_interval" must be set to 0 on this platform.',
    ),
    "PgBouncer": ErrorResponse.fatal(
        "08P01", "unsupported startup parameter in options: client_connection_check_interval"
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
async def test_w35_an_upstream_that_knows_no_connection_check_is_served_without_it(
    proxy: App, lakebase: Lakebase, log: LogLines, refusal: ErrorResponse
) -> None:
    lakebase["one"].endpoint.refuse(refusal)
    for _ in range(2):  # it is remembered
        async with plain_client(proxy) as client:
            await client.start_up()
    first, *later = lakebase.gateway.records
    assert b"client_connection_check_interval" in (first.parameter(b"options") or b"")
    assert [record.parameter(b"options") for record in later] == [None, None]
    (line,) = [line for line in log.lines if "does not check connections" in line["event"]]
    assert line["level"] == "info"


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [True, False], ids=["lanes", "python"])
async def test_w34_statements_and_a_terminate_before_a_half_close_all_run(
    start_proxy: StartProxy, lakebase: Lakebase, scratch_database: str, accelerated: bool
) -> None:
    # The table was locked, so the upstream was not reading. Of 380 statements 2 ran; directly all
    # do, and the client that reads on gets all answers.
    proxy = await start_proxy(upstream={"accelerated": accelerated})
    cluster = lakebase["one"].cluster
    sql = "CREATE TABLE t (n int, s text); GRANT ALL ON t TO PUBLIC"
    cluster.execute(sql, database=scratch_database)
    async with plain_client(proxy) as owner, plain_client(proxy) as client:
        for each in (owner, client):
            await each.send(startup(database=scratch_database))
            await each.messages_until(ReadyForQuery)
        await owner.query("BEGIN")
        await owner.messages_until(ReadyForQuery)
        await owner.query("LOCK TABLE t")
        await owner.messages_until(ReadyForQuery)
        said = b"".join(
            query(f"INSERT INTO t VALUES ({n}, '{'x' * 20_000}')") for n in range(STATEMENTS)
        )
        await client.send(said + TERMINATE)
        client.end()
        await asyncio.sleep(2 * CLIENT_POLL_SECONDS)  # it was polled for, and taken for gone
        await owner.query("COMMIT")
        assert (await client.receive_rest()).count(ReadyForQuery(b"I").encode()) == STATEMENTS
    found = cluster.execute("SELECT count(DISTINCT n) FROM t", database=scratch_database)
    assert found == str(STATEMENTS)


@pytest.mark.slow
async def test_w34_a_long_statement_before_a_terminate_runs_to_its_end(
    proxy: App, lakebase: Lakebase, scratch_database: str
) -> None:
    # The database checks its connection while the statement runs, so the proxy keeps it open.
    cluster = lakebase["one"].cluster
    cluster.execute("CREATE TABLE t (n int); GRANT ALL ON t TO PUBLIC", database=scratch_database)
    async with plain_client(proxy) as client:
        await client.send(startup(database=scratch_database))
        await client.messages_until(ReadyForQuery)
        await client.send(query("INSERT INTO t SELECT 1 FROM pg_sleep(7)") + TERMINATE)
        client.close()
    await all_over(proxy, lakebase)
    assert cluster.execute("SELECT count(*) FROM t", database=scratch_database) == "1"


LOCK = "LOCK TABLE t"
SAME_KEY = "INSERT INTO t VALUES (7, '')"
COPY = "COPY t FROM STDIN"
BEHIND_A_LOCK = {
    "INSERT": (LOCK, "INSERT INTO t VALUES (1, '')", 0),
    "COPY": (LOCK, COPY, 0),
    "COPY data": (SAME_KEY, COPY, 2000),
}
UPLOAD_SECONDS_MAX = CLIENT_POLL_SECONDS + GONE_SECONDS_MAX


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [True, False], ids=["lanes", "python"])
@pytest.mark.parametrize("case", BEHIND_A_LOCK)
async def test_w35_an_upload_that_waits_for_a_lock_ends_with_its_client(
    start_proxy: StartProxy,
    lakebase: Lakebase,
    scratch_database: str,
    accelerated: bool,
    case: str,
) -> None:
    # A front end that could not pass the data on did not notice the close: the COPY went on.
    held, sql, lines = BEHIND_A_LOCK[case]
    proxy = await start_proxy(upstream={"accelerated": accelerated})
    cluster = lakebase["one"].cluster
    table = "CREATE TABLE t (n int PRIMARY KEY, s text); GRANT ALL ON t TO PUBLIC"
    cluster.execute(table, database=scratch_database)
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        f" AND datname = '{scratch_database}'"
    )
    async with plain_client(proxy) as owner, plain_client(proxy) as client:
        for each in (owner, client):
            await each.send(startup(database=scratch_database))
            await each.messages_until(ReadyForQuery)
        for statement in ("BEGIN", held):
            await owner.query(statement)
            await owner.messages_until(ReadyForQuery)
        data = b"".join(Frame(b"d", b"%d\t%020000d\n" % (n, 0)).encode() for n in range(lines))
        await client.query(sql)
        await send_until_stalled(client, data)
        await eventually(lambda: cluster.execute(waiting) == "1", "it waits")
        client.reset()
        await eventually(lambda: cluster.execute(waiting) == "0", "it is gone", UPLOAD_SECONDS_MAX)


PAUSED = 20
PAUSE_SECONDS = 33.0  # once a client that paused for 30 was cut


@pytest.mark.slow
async def test_w34_clients_that_pause_in_a_result_lose_nothing_when_the_upstream_ends(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    # 4 of 171 were cut, rows and last words, and the log counted them as sent.
    sql = "SELECT repeat('x', 1000), generate_series(1, 6000)"
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(PAUSED):
            client = plain_client(proxy, receive_buffer_bytes=4096)
            clients.append(await stack.enter_async_context(client))
            await clients[-1].start_up()
            await clients[-1].query(sql)
        await asyncio.sleep(1)  # until each result has filled what it passes
        lakebase["one"].endpoint.end_sessions()
        await asyncio.sleep(PAUSE_SECONDS)
        async with asyncio.TaskGroup() as group:
            rests = [group.create_task(client.receive_rest()) for client in clients]
    await all_over(proxy, lakebase)
    received = sorted(len(rest.result()) for rest in rests)
    assert received == sorted(line["upstream_bytes"] for line in log.events("session ended"))
    assert {line["reason"] for line in log.events("session ended")} == {"upstream_closed"}


CROWD = 500
# Cancels are connections, which this process opens and accepts: 500 take 12 s on a busy machine. A
# proxy with a process of its own, in front of PostgreSQL itself, took 4 s for them there.
CROWD_METHODS = [("connection_check", 10.0), ("cancel_request", CANCELS_SECONDS_MAX)]


@pytest.fixture
def large_cluster() -> Iterator[Cluster]:
    with Cluster("one", settings={"max_connections": str(CROWD + 50)}) as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.parametrize(("method", "seconds_max"), CROWD_METHODS)
async def test_w35_no_query_of_a_crowd_that_vanishes_runs_on(
    large_cluster: Cluster, method: str, seconds_max: float
) -> None:
    # Of an application that was killed with 300 busy connections, 200 queries worked on: what was
    # over 100 cancels at a time was dropped.
    async with proxy_of(large_cluster, cancel_method=method) as (proxy, _):
        async with AsyncExitStack() as stack:
            clients = [
                await begun(proxy, stack, "SELECT pg_sleep(600), 'crowd'") for _ in range(CROWD)
            ]
            await eventually(lambda: running(large_cluster, "crowd") == CROWD, "all run", 60)
            for client in clients:
                client.abort()
            began = time.monotonic()
            while running(large_cluster, "crowd"):
                assert time.monotonic() - began < seconds_max
                await asyncio.sleep(0.5)  # asking starts a process
        given_up = [proxy.metrics.value("cancel_requests_total", result=word) for word in LOST]
        assert given_up == [0, 0]
