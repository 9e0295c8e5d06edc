"""Servers that connect to a database do the same directly and through the proxy.

Backups, replication, a foreign server, and a balancer that asks whether the database is there.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from proxy.emulator.cluster import CLIENT_ID, Cluster, ClusterError, quoted
from proxy.verbs.role_sql import grant_on_schema, grant_on_tables
from tests.clients.record import record_tool
from tests.clients.registry import HERE, Client, Language
from tests.clients.running_client import started
from tests.clients.stage import OTHER_KEY, Stage
from tests.clients.tool_ways import Environment, Ways, execute, run, until, version_of
from tests.support.languages import JDBC
from tests.support.proxy_process import run_to_end
from tests.support.running import eventually
from tests.support.tools import lack, need

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest.fixture(scope="module")
def replication(place: Stage) -> None:
    """Allow the role to replicate, which Lakebase does on request."""
    place.server.execute(f"ALTER ROLE {quoted(CLIENT_ID)} REPLICATION")


def conninfo(way: Environment) -> str:
    """Return libpq's parameters of a way."""
    return "host={PGHOST} port={PGPORT} dbname={PGDATABASE} user={PGUSER}".format(**way)


@pytest.mark.usefixtures("replication")
async def test_pg_basebackup_makes_backups_that_verify(ways: Ways, tmp_path: Path) -> None:
    for name, way in (("direct", ways.direct), ("proxied", ways.proxied)):
        # The log is streamed over a second connection with a slot of its own.
        options = ("-D", str(tmp_path / name), "-c", "fast", "-X", "stream", "--no-sync", "-w")
        await run(way, ways.program("pg_basebackup"), *options)
        out = await run(way, ways.program("pg_verifybackup"), str(tmp_path / name))
        assert "successfully verified" in out
    record_tool("pg_basebackup", await version_of(ways.program("pg_basebackup")))


@pytest.mark.usefixtures("replication")
async def test_pg_recvlogical_receives_the_same(ways: Ways, tmp_path: Path) -> None:
    program = ways.program("pg_recvlogical")
    name = ways.direct["PGDATABASE"]
    slots = {f"slot_{number}": way for number, way in enumerate(ways.both)}
    await ways.psql(ways.direct, "CREATE TABLE t (n int, s text)")
    await ways.psql(ways.direct, "CREATE PUBLICATION changes FOR TABLE t")
    for slot, way in slots.items():
        await run(way, program, "-d", name, "-S", slot, "--create-slot", "-P", "pgoutput")
    # Its end must be flushed to be sent.
    insert = "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 1000) n"
    await ways.psql(ways.direct, f"SET synchronous_commit = on; {insert}")
    end = await ways.psql(ways.direct, "SELECT pg_current_wal_flush_lsn()")
    options = ("-o", "proto_version=1", "-o", "publication_names=changes", "--no-loop")
    received = []
    for slot, way in slots.items():
        start = ("-d", name, "-S", slot, "--start", "-E", end.strip(), *options)
        file = tmp_path / slot
        await run(way, program, *start, "-f", str(file))
        received.append(file.read_bytes())
        await run(way, program, "-d", name, "-S", slot, "--drop-slot")
    assert received[0] == received[1]
    assert b"row 1000" in received[0]
    record_tool("pg_recvlogical", await version_of(program))


@pytest.mark.usefixtures("replication")
async def test_a_stream_of_debezium_outlives_three_token_lifetimes(ways: Ways) -> None:
    need("Debezium's stream", "java")
    lack("Debezium's stream", [] if JDBC.exists() else ["pgjdbc is missing"])
    program = HERE / "java" / "Replication.java"
    stream = Client("Debezium's stream", run=("java", "-cp", str(JDBC), str(program)))
    java = Language("Java", program.parent, (stream,), ())
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(started(stream, java, way)) for way in ways.both]

        async def ask(command: str) -> list[list[str]]:
            return await asyncio.gather(*(one.ask(command) for one in both))

        versions = await ask("version")
        # Begin, the table's columns (sent once), insert, commit, and so on.
        assert await ask("change") == [["BRICBUCBDC"]] * 2
        await ways.place.outlive_tokens()
        assert await ask("change") == [["BICBUCBDC"]] * 2
        assert [await one.end() for one in both] == [0, 0]
    record_tool(stream.name, versions[0][0])


@pytest.mark.usefixtures("replication")
async def test_a_subscription_follows_what_is_changed(ways: Ways) -> None:
    for number, way in enumerate(ways.both):
        await _subscribe(ways, way, f"subscription_{number}")
    slots = "SELECT count(*) FROM pg_replication_slots"
    assert await execute(ways.place.server, slots) == "0"
    record_tool("CREATE SUBSCRIPTION", await version_of(ways.program("postgres")))


async def _subscribe(ways: Ways, way: Environment, name: str) -> None:
    """Subscribe to a table from a plain PostgreSQL, and follow a change of it."""
    plain = ways.place.lakebase["two"].cluster
    subscriber = partial(execute, plain, database=name)
    table, sums = "CREATE TABLE t (n int PRIMARY KEY)", "SELECT count(*), sum(n) FROM t"
    fill = "INSERT INTO t SELECT generate_series(1, 1000); CREATE PUBLICATION p FOR TABLE t"
    await ways.psql(way, f"{table}; {fill}")
    await execute(plain, f"CREATE DATABASE {name}")
    await subscriber(table)
    there = f"CONNECTION '{conninfo(way)}' PUBLICATION p WITH (slot_name = {name})"
    await subscriber(f"CREATE SUBSCRIPTION {name} {there}")

    async def follows() -> bool:
        return await subscriber(sums) == (await ways.psql(way, sums)).strip()

    await until(follows, "its first copy is complete")
    await ways.psql(way, "UPDATE t SET n = n + 5000 WHERE n > 500; DELETE FROM t WHERE n < 9")
    await until(follows, "it follows")
    assert await subscriber(sums) == f"992|{sum(range(9, 501)) + sum(range(5501, 6001))}"
    await subscriber(f"DROP SUBSCRIPTION {name}")
    await execute(plain, f"DROP DATABASE {name}")


def contrib() -> Path | None:
    """Return the distribution's newest PostgreSQL that has postgres_fdw; the wheel's has none."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*"), key=lambda path: float(path.name))
    there = [one for one in versions if (one / "lib" / "postgres_fdw.so").exists()]
    return there[-1] if there else None


@pytest.fixture(scope="module")
def local_server() -> Iterator[Cluster]:
    """Return a plain PostgreSQL with postgres_fdw."""
    installation = contrib()
    lack("postgres_fdw", [] if installation else ["PostgreSQL with postgres_fdw is missing"])
    with Cluster("local", installation=installation) as started:
        started.execute("CREATE EXTENSION postgres_fdw; CREATE ROLE clerk LOGIN")
        yield started


async def test_postgres_fdw_reads_and_writes(ways: Ways, local_server: Cluster) -> None:
    local = partial(execute, local_server)
    for number, way in enumerate(ways.both):
        await ways.psql(way, "CREATE TABLE t (n int PRIMARY KEY, s text)")
        server, schema = f"server_{number}", f"schema_{number}"
        options = "host '{PGHOST}', port '{PGPORT}', dbname '{PGDATABASE}'".format(**way)
        await local(f"CREATE SERVER {server} FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({options})")
        for role in ("postgres", "clerk"):
            user = f"OPTIONS (user '{CLIENT_ID}')"
            await local(f"CREATE USER MAPPING FOR {role} SERVER {server} {user}")
        foreign = f"IMPORT FOREIGN SCHEMA public FROM SERVER {server} INTO {schema}"
        await local(f"CREATE SCHEMA {schema}; {foreign}; GRANT ALL ON SCHEMA {schema} TO clerk")
        await local(f"GRANT ALL ON {schema}.t TO clerk")
        # An ordinary role must use a password, and a server that asks for none is refused: the
        # superuser may say of a mapping that it needs none.
        with pytest.raises(ClusterError, match="password is required"):
            await local(f"TABLE {schema}.t", user="clerk")
        password = "OPTIONS (ADD password_required 'false')"
        await local(f"ALTER USER MAPPING FOR clerk SERVER {server} {password}")
        insert = f"INSERT INTO {schema}.t SELECT n, 'row ' || n FROM generate_series(1, 500) n"
        undone = f"BEGIN; DELETE FROM {schema}.t; ROLLBACK"
        change = (
            f"UPDATE {schema}.t SET s = 'changed' WHERE n = 7; DELETE FROM {schema}.t WHERE n = 8"
        )
        sums = f"SELECT count(*), sum(n), min(s) FROM {schema}.t"
        script = f"{insert}; {undone}; {change}; {sums}"
        assert await local(script, user="clerk") == "499|125242|changed"
        there = "SELECT count(*), sum(n), min(s) FROM t"
        assert (await ways.psql(way, there)).strip() == "499|125242|changed"
    await _key_of_a_foreign_server(local_server, ways.proxied)
    record_tool("postgres_fdw", await version_of(local_server.binaries / "postgres"))


async def _key_of_a_foreign_server(local_server: Cluster, way: Environment) -> None:
    """A shard key is an option of the server."""
    where = "host '{PGHOST}', port '{PGPORT}', dbname 'app'".format(**way)
    key = f"options '-c shard_key={OTHER_KEY}'"
    await execute(
        local_server,
        f"CREATE SERVER keyed FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({where}, {key});"
        "CREATE USER MAPPING FOR postgres SERVER keyed OPTIONS (user 'application');"
        "CREATE FOREIGN TABLE shard (name text) SERVER keyed OPTIONS (table_name 'shard_identity')",
    )
    assert await execute(local_server, "TABLE shard") == "two"


async def test_a_new_role_may_read_nothing_of_schema_public_until_that_is_granted(
    ways: Ways,
) -> None:
    # Since PostgreSQL 15 it may not create tables there either.
    shown = []
    for way in ways.both:
        as_owner = partial(execute, ways.place.server, database=way["PGDATABASE"])
        await as_owner("CREATE TABLE public.orders AS SELECT 1 AS n")
        await as_owner(f"ALTER DATABASE {way['PGDATABASE']} OWNER TO postgres")
        psql = ways.program("psql")
        steps = ("-XAt", "-c", "TABLE orders", "-c", "CREATE TABLE own (n int)")
        shown.append(await run_to_end(psql, *steps, environment=way))
        await as_owner(grant_on_schema(CLIENT_ID) + grant_on_tables(CLIENT_ID))
        assert await run(way, psql, *steps) == "1\nCREATE TABLE\n"
    assert shown[0] == shown[1]
    assert "permission denied for table orders" in shown[0][2]
    assert "permission denied for schema public" in shown[0][2]


HAPROXY: Final = """
global
    stats socket {directory}/admin
defaults
    mode tcp
    timeout connect 5s
    timeout check 30s
    timeout client 30s
    timeout server 30s
frontend clients
    bind unix@{directory}/.s.PGSQL.{port}
    default_backend proxies
backend proxies
    {option}
    server proxy {host}:{port} check {check} inter 100
"""


@asynccontextmanager
async def haproxy(
    directory: Path, option: str, way: Environment, check: str = ""
) -> AsyncIterator[Path]:
    """Run HAProxy for the block; yield the directory of its sockets."""
    file = directory / "haproxy.cfg"
    where = {"host": way["PGHOST"], "port": way["PGPORT"]}
    file.write_text(HAPROXY.format(directory=directory, option=option, check=check, **where))
    process = await asyncio.create_subprocess_exec("haproxy", "-db", "-f", str(file))
    try:
        yield directory
    finally:
        process.terminate()
        await process.wait()


def up(directory: Path) -> bool:
    """Return whether HAProxy has checked the server, and found it up."""
    try:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(directory / "admin"))
            admin.sendall(b"show stat proxies 4 -1\n")
            lines = admin.makefile().read().removeprefix("# ").splitlines()
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    return row["status"] == "UP" and row["check_status"].startswith("L7OK")


# HAProxy may end in the middle of a check.
@pytest.mark.parametrize("completed", [("client_closed", "client_lost")], indirect=True)
async def test_haproxy_asks_readiness_since_its_own_check_opens_sessions(
    ways: Ways, tmp_path: Path
) -> None:
    need("HAProxy's checks", "haproxy")
    endpoint, gateway = ways.place.lakebase["one"].endpoint, ways.place.lakebase.gateway
    admin = int(ways.place.proxy.events("serving")[0]["admin_port"])
    endpoint.suspend()
    logins = gateway.logins.total()
    http = "option httpchk GET /readiness"
    async with haproxy(tmp_path, http, ways.proxied, check=f"port {admin}") as directory:
        await eventually(partial(up, directory), "the server is up")
        assert gateway.logins.total() == logins
        assert endpoint.state == "IDLE"
        through = {**ways.proxied, "PGHOST": str(directory)}
        assert await ways.psql(through, "SELECT 6 * 7") == "42\n"
    endpoint.suspend()
    logins = gateway.logins.total()
    check = f"option pgsql-check user {CLIENT_ID}"
    async with haproxy(tmp_path, check, ways.proxied) as directory:
        await eventually(partial(up, directory), "the server is up")
        await eventually(lambda: gateway.logins.total() > logins + 3, "each check logs in")
        assert endpoint.state == "ACTIVE"
    _, out, _ = await run_to_end("haproxy", "-v")
    record_tool("HAProxy", out.split()[2].partition("-")[0])
