"""`shards add-shard`, `remove-shard`, `grant`, `revoke`, `lookup`, `sessions`, `upgrade`."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.model import Shard
from proxy.exit_codes import EXIT_FAILURE, EXIT_USAGE
from proxy.verbs.shards import read
from proxy.verbs.shards.output import Output
from proxy.verbs.shards.verb import Call
from proxy.verbs.syntax import UsageError
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.direct_verbs import DirectAdministration, Servers, run_directly
from tests.support.operating import Killed, Slept, kill_at, until
from tests.support.proxy_process import started_process
from tests.support.shards_cli import Shards


@pytest.fixture
def shards(stores: Stores, tmp_path: Path) -> Shards:
    return Shards(stores, tmp_path)


async def admit(connection: Any, shards: Shards, key: bytes = b"\x80\0\0\x05") -> str:
    """Admit a session as a proxy does, by the catalogue's rows. Return the verdict."""
    async with shards.stores.connect(MAP) as catalogue:
        row = await catalogue.fetchrow(
            "select m.*, s.host || ':' || s.port || '/' || s.dbname as location"
            " from shardmap.mapping m join shardmap.shard s using (shard_id)"
            " where m.lo <= $1 order by m.lo desc limit 1",
            key,
        )
    verdict: str = await connection.fetchval(
        "select verdict from shardmap_local.admit(1, $1, $2, $3, $4, $5, $6, 'proxy', '', $7)",
        row["map_id"],
        row["shard_id"],
        row["location"],
        row["mapping_id"],
        row["epoch"],
        key,
        sha256(b"secret").digest(),
    )
    return verdict


async def test_s25_add_shard_provisions_a_database_and_registers_it(
    shards: Shards, stores: Stores
) -> None:
    await shards.done("init")
    await shards.done("create", "tenants", "--kind", "range", "--key-type", "int4")
    where = shards.where("one")
    dry = await shards.done("add-shard", "one", *where, "--dry-run")
    assert dry["dry_run"] is True
    assert len(dry["plan"]) == 4
    assert (await shards.done("show"))["shards"] == []
    assert stores.execute("one", "select to_regnamespace('shardmap_local')") == ""
    added = await shards.done("add-shard", "one", *where)
    assert added["shard"] == {
        "name": "one",
        "host": stores.host("one"),
        "port": stores.lakebase.port,
        "database": stores.database,
        "endpoint": stores.endpoint("one"),
        "instance": "",
        "workspace": "",
        "status": "online",
        "version": 1,
        "mappings": 0,
    }
    assert (await shards.done("show"))["shards"] == [added["shard"]]
    location = f"{stores.host('one')}:{stores.lakebase.port}/{stores.database}"
    sql = "select map_name, location, status from shardmap_local.identity"
    assert stores.execute("one", sql) == f"tenants|{location}|online"
    # The schema of another map is there: it is used, too.
    await shards.done("create", "regions", "--kind", "list", "--key-type", "text")
    await shards.done("add-shard", "first", *where, "--map", "regions")
    assert stores.execute("one", "select count(*) from shardmap_local.identity") == "2"


async def test_s24_a_shard_or_a_location_is_added_once_and_removed_when_it_is_empty(
    shards: Shards, stores: Stores
) -> None:
    await shards.set_up()
    one, two = shards.where("one"), shards.where("two")
    assert await shards.refused("add-shard", "one", *two) == ("exists", "42710")
    assert await shards.refused("add-shard", "three", *one) == ("exists", "42710")
    port = (await shards.done("show"))["shards"][0]["port"]
    assert port == stores.lakebase.port
    await shards.add("0", "10", "one")
    assert await shards.refused("remove-shard", "one") == ("not_empty", "2BP01")
    assert await shards.refused("remove-shard", "three") == ("unknown_shard", "42704")
    dry = await shards.done("remove-shard", "two", "--dry-run")
    assert len(dry["plan"]) == 2
    assert (await shards.done("remove-shard", "two"))["shard"]["name"] == "two"
    assert [one["name"] for one in (await shards.done("show"))["shards"]] == ["one"]
    assert stores.execute("two", "select count(*) from shardmap_local.identity") == "0"
    await shards.done("add-shard", "zwei", *two)


async def test_s63_no_token_goes_to_a_host_that_is_not_allowed(
    shards: Shards, stores: Stores, tmp_path: Path
) -> None:
    await shards.set_up()
    mints, accepted = len(stores.lakebase.workspace.mints), stores.lakebase.gateway.accepted
    host = ("--host", "db.attacker.example.com")
    assert await shards.refused("add-shard", "x", *host) == ("shard_host_refused", "55000")
    workspace = (*shards.where("two"), "--workspace", "other")
    assert await shards.refused("add-shard", "x", *workspace) == ("workspace_unknown", "55000")
    # The catalogue was asked, and no other host.
    records = list(stores.lakebase.gateway.records)[accepted:]
    assert {record.sni for record in records} == {stores.host(MAP)}
    assert len(stores.lakebase.workspace.mints) <= mints + 2
    assert [one["name"] for one in (await shards.done("show"))["shards"]] == list(SHARD_NAMES)


async def test_hosts_that_keep_no_session_and_the_catalogue_itself_are_refused(
    shards: Shards, stores: Stores
) -> None:
    await shards.set_up()
    hosts = stores.lakebase["two"].endpoint.hosts
    for kind, reason in (
        ("read_write_pooled_host", "pooler_host"),
        ("read_only_host", "read_only_host"),
    ):
        assert await shards.refused("add-shard", "x", "--host", hosts[kind]) == (reason, "22023")
    assert await shards.refused("add-shard", "x", *shards.where(MAP)) == (
        "catalogue_is_shard",
        "55000",
    )


async def test_a_provisioned_instance_is_a_shard_too(shards: Shards, stores: Stores) -> None:
    await shards.done("init")
    await shards.done("create", "tenants", "--kind", "range", "--key-type", "int4")
    instance = stores.lakebase["one"].instance
    hosts = Shards(
        stores,
        Path(shards.config).parent,
        catalogue={"shard_hosts": "*.cloud.databricks.com"},
    )
    port = ("--port", stores.lakebase.port)
    added = await hosts.done("add-shard", "one", "--instance", instance.name, *port)
    assert (added["shard"]["host"], added["shard"]["instance"]) == (instance.host, instance.name)
    await hosts.add("0", "10", "one")


@pytest.mark.parametrize(
    "arguments",
    [
        ("x",),
        ("a b", "--host", "h"),
        ("x", "--endpoint", "projects/p/branches/b/endpoints/e", "--instance", "i"),
        ("x", "--endpoint", "e"),
        ("x", "--host", "http://h"),
        ("x", "--host", "h", "--port", "0"),
        ("x", "--host", "h", "--database", ""),
        ("x", "--host", "h", "--workspace", "a b"),
    ],
)
async def test_add_shard_judges_its_arguments_first(
    shards: Shards, arguments: tuple[str, ...]
) -> None:
    answered = await shards.process("add-shard", *arguments)
    assert (answered.code, answered.out) == (EXIT_USAGE, "")


# -- grant, revoke -------------------------------------------------------------------------------


async def test_s21_alter_shard_changes_what_is_no_location(shards: Shards, stores: Stores) -> None:
    await shards.set_up()
    await shards.add("0", "10", "one")
    facts = await shards.done("alter-shard", "one", "--rename", "uno", "--dry-run")
    assert (facts["dry_run"], len(facts["plan"])) == (True, 2)
    assert facts["plan"][1].startswith("Set in the catalogue: name uno.")
    facts = await shards.done("alter-shard", "one", "--rename", "uno", "--expect", 1)
    assert (facts["shard"]["name"], facts["shard"]["version"]) == ("uno", 2)
    assert facts["shard"]["mappings"] == 1
    assert (await shards.done("show", "--shard", "uno"))["shards"] == [facts["shard"]]
    stale = ("alter-shard", "uno", "--rename", "one", "--expect", 1)
    for dry in ((), ("--dry-run",)):
        assert await shards.refused(*stale, *dry) == ("stale_version", "40001")
    facts = await shards.done("alter-shard", "uno", "--endpoint", "")
    assert (facts["shard"]["endpoint"], facts["shard"]["version"]) == ("", 3)
    endpoint = stores.endpoint("one")
    answered = await shards("alter-shard", "uno", "--endpoint", endpoint)
    assert answered.out == "shard uno is as asked (version 4)\n"
    answered = await shards("alter-shard", "uno", "--endpoint", endpoint)
    assert answered.out == "shard uno is already as asked (version 4)\n"
    assert (await shards.refused("alter-shard", "uno", "--rename", "two"))[0] == "exists"
    assert (await shards.refused("alter-shard", "one", "--rename", "x"))[0] == "unknown_shard"


class WithoutEndpoint(DirectAdministration):
    """Reaches shards by their instances alone."""

    @asynccontextmanager
    async def shard(self, shard: Shard) -> AsyncIterator[Any]:
        if shard.endpoint and not shard.instance and shard.name == "one":
            raise ConnectionRefusedError("the endpoint was deleted")
        async with super().shard(shard) as connection:
            yield connection


async def test_a_relocation_takes_the_version_that_was_seen(shards: Shards) -> None:
    """What is pending goes to the new host first, which writes the row."""
    await shards.set_up()
    await shards.add("0", "10", "one")
    servers = Servers.of(shards.stores, shards.config)
    with pytest.raises(Killed):
        await run_directly(servers, ("move", "0", "10", "--to", "two"), kill_at("drained"))
    instance = shards.stores.lakebase["one"].instance.name
    version = str((await shards.done("show"))["shards"][0]["version"])
    words = ("relocate", "one", "--instance", instance, "--expect", version, "--json")
    verb, parsed, settings = read([*words, "--config", shards.config])
    administration = WithoutEndpoint(settings, servers)
    await verb.run(Call(parsed, administration, Output(as_json=True), sleep=Slept()))
    assert (await shards.done("ops"))["operations"] == []
    assert (await shards.done("show"))["shards"][0]["instance"] == instance


async def test_what_is_pending_on_a_resource_that_was_deleted_goes_to_the_new_one(
    shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was to be settled first, by the row that leads nowhere: the shard was stuck."""
    await shards.set_up()
    await shards.add("0", "10", "one")
    servers = Servers.of(shards.stores, shards.config)
    with pytest.raises(Killed):
        await run_directly(servers, ("move", "0", "10", "--to", "two"), kill_at("drained"))
    instance = shards.stores.lakebase["one"].instance.name

    async def alter(*words: str) -> None:
        words = ("alter-shard", "one", "--instance", instance, *words)
        verb, parsed, settings = read([*words, "--json", "--config", shards.config])
        administration = WithoutEndpoint(settings, servers)
        await verb.run(Call(parsed, administration, Output(as_json=True), sleep=Slept()))

    for refused in (("--rename", "two"), ("--expect", "9")):
        with pytest.raises(CatalogueError, match=r"has the shard two|is at 1, not at 9"):
            await alter(*refused)
        assert (await shards.done("show"))["shards"][0]["instance"] == ""
    await alter("--expect", str((await shards.done("show"))["shards"][0]["version"]))
    facts = json.loads(capsys.readouterr().out)
    assert (facts["shard"]["endpoint"], facts["shard"]["instance"]) == ("", instance)
    assert (await shards.done("ops"))["operations"] == []
    (mapping,) = (await shards.done("show"))["mappings"]
    assert (mapping["shard"], mapping["status"]) == ("one", "online")


@pytest.mark.parametrize(
    "values",
    [
        ("--endpoint", "projects/p/branches/b/endpoints/none"),
        ("--instance", "none"),
        ("--workspace", "elsewhere"),
    ],
    ids=" ".join,
)
async def test_alter_shard_takes_no_values_that_lead_nowhere(
    shards: Shards, values: tuple[str, str]
) -> None:
    await shards.set_up()
    before = await shards.done("show")
    await shards.refused("alter-shard", "one", *values)
    assert await shards.done("show") == before
    assert (await shards.done("ops"))["operations"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("one",),
        ("a b", "--rename", "x"),
        ("one", "--rename", "a b"),
        ("one", "--endpoint", "projects/p/branches/b/endpoints/e", "--instance", "i"),
        ("one", "--endpoint", "e"),
        ("one", "--workspace", "a b"),
        ("one", "--rename", "x", "--expect", "0"),
        ("one", "--host", "h"),
    ],
    ids=" ".join,
)
def test_alter_shard_judges_its_arguments_first(
    stores: Stores, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError):
        read(["alter-shard", *arguments, "--config", str(stores.file(tmp_path))])


async def test_grant_session_is_for_every_shard_now_and_later(
    shards: Shards, stores: Stores
) -> None:
    role = stores.roles.session
    await shards.done("init")
    await shards.done("create", "tenants", "--kind", "range", "--key-type", "int4")
    await shards.done("add-shard", "one", *shards.where("one"))
    dry = await shards.done("grant", "session", role, "--dry-run")
    assert len(dry["plan"]) == 3
    granted = await shards.done("grant", "session", role)
    assert granted["statements"] == [
        f'grant usage on schema shardmap_local to "{role}"',
        f'grant execute on function shardmap_local.admit to "{role}"',
    ]
    assert await shards.done("grant", "session", role) == granted
    await shards.done("add-shard", "two", *shards.where("two"))
    await shards.add("0", "10", "one")
    await shards.add("10", "20", "two")
    for name, key in (("one", b"\x80\0\0\x05"), ("two", b"\x80\0\0\x0f")):
        async with stores.connect(name, role) as session:
            assert await admit(session, shards, key) == "ok"
    await shards.done("revoke", "session", role)
    for name in SHARD_NAMES:
        async with stores.connect(name, role) as session:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await admit(session, shards)


async def test_grant_reader_lets_a_login_read_the_catalogue_and_nothing_else(
    shards: Shards, stores: Stores, tmp_path: Path
) -> None:
    await shards.set_up()
    role = stores.roles.reader
    reader = Shards(stores, tmp_path, role)
    sql = await shards("grant", "reader", role, "--sql")
    assert sql.out.count(";") == 2
    assert await reader.refused("list") == ("rights_missing", "42501")
    granted = await shards.done("grant", "reader", role)
    assert [f"{one};" for one in granted["statements"]] == sql.out.splitlines()
    assert len((await reader.done("show"))["shards"]) == 2
    create = ("create", "x", "--kind", "list", "--key-type", "text")
    for verb in (create, ("drop", "tenants"), ("remove-shard", "one")):
        assert (await reader.refused(*verb))[0] == "rights_missing"
    await shards.done("revoke", "reader", role)
    assert await reader.refused("list") == ("rights_missing", "42501")
    assert await shards.refused("grant", "reader", "missing") == ("rights_missing", "42501")


@pytest.mark.parametrize("right", ["pg_read_all_stats", "pg_signal_backend"])
async def test_s66_a_right_over_sessions_that_is_missing_is_named_with_its_sql(
    shards: Shards, stores: Stores, right: str
) -> None:
    await shards.set_up()
    role, admin = stores.roles.session, stores.roles.admin
    stores.execute("two", f'revoke {right} from "{admin}"')
    answered = await shards("grant", "session", role, "--json")
    assert answered.code == EXIT_FAILURE
    assert (answered.facts["reason"], answered.facts["sqlstate"]) == ("rights_missing", "42501")
    assert answered.facts["error"].startswith("shard two: ")
    grant = f'grant {right} to "{admin}"'
    assert grant in answered.facts["hint"]
    # Nothing is half done: not even in the shard that has the right.
    async with stores.connect("one", role) as session:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await session.execute("select * from shardmap_local.session")
        assert not await session.fetchval("select has_schema_privilege('shardmap_local', 'usage')")
    assert stores.execute(MAP, "select session_roles from shardmap.shard_map") == "{}"
    statements = (await shards.done("grant", "session", role, "--sql"))["statements"]
    assert grant in statements
    stores.execute("two", grant)
    await shards.done("grant", "session", role)


async def test_s66_a_shard_is_not_added_without_the_rights_over_its_sessions(
    shards: Shards, stores: Stores
) -> None:
    await shards.done("init")
    await shards.done("create", "tenants", "--kind", "range", "--key-type", "int4")
    await shards.done("grant", "session", stores.roles.session)
    admin = stores.roles.admin
    stores.execute("one", f'revoke pg_signal_backend from "{admin}"')
    for dry in ((), ("--dry-run",)):
        refused = await shards.refused("add-shard", "one", *shards.where("one"), *dry)
        assert refused == ("rights_missing", "42501")
    assert (await shards.done("show"))["shards"] == []
    stores.execute("one", f'grant pg_signal_backend to "{admin}"')
    await shards.done("add-shard", "one", *shards.where("one"))


async def test_s66_a_shard_is_not_added_where_no_schema_may_be_created(
    shards: Shards, stores: Stores
) -> None:
    await shards.done("init")
    await shards.done("create", "tenants", "--kind", "range", "--key-type", "int4")
    stores.execute("one", f'alter database "{stores.database}" owner to postgres')
    answered = await shards("add-shard", "one", *shards.where("one"), "--json")
    assert (answered.facts["reason"], answered.facts["sqlstate"]) == ("rights_missing", "42501")
    assert answered.facts["hint"].startswith("grant create on database")
    assert (await shards.done("show"))["shards"] == []
    stores.execute("one", answered.facts["hint"])
    await shards.done("add-shard", "one", *shards.where("one"))


async def test_s66_each_right_of_the_reader_taken_away_is_named(
    shards: Shards, stores: Stores, tmp_path: Path
) -> None:
    await shards.set_up()
    role = stores.roles.reader
    reader = Shards(stores, tmp_path, role)
    await shards.done("grant", "reader", role)
    tables = ("store_version", "shard_map", "shard", "mapping")
    for right in ("usage on schema shardmap", *(f"select on shardmap.{one}" for one in tables)):
        await reader.done("show")
        stores.execute(MAP, f'revoke {right} from "{role}"')
        answered = await reader("show", "--json")
        assert answered.facts["reason"] == "rights_missing", right
        assert right.rpartition(".")[2].removeprefix("usage on schema ") in answered.facts["hint"]
        stores.execute(MAP, f'grant {right} to "{role}"')


@pytest.mark.parametrize("way", ["pg_signal_backend", "membership", "its own function"])
async def test_s66_sessions_are_ended_by_each_of_the_three_ways(
    shards: Shards, stores: Stores, way: str
) -> None:
    await shards.set_up()
    role, admin = stores.roles.session, stores.roles.admin
    if way != "pg_signal_backend":
        stores.execute("one", f'revoke pg_signal_backend from "{admin}"')
    if way == "membership":
        stores.execute("one", f'grant "{role}" to "{admin}"')
    elif way == "its own function":
        statements = (await shards.done("grant", "session", role, "--sql"))["statements"]
        *_, allow, _, create, revoke, give, _, take = statements
        roles = (admin, role, role, role, admin)
        for one, statement in zip(roles, (allow, create, revoke, give, take), strict=True):
            stores.execute("one", statement, one)
    await shards.done("grant", "session", role)
    await shards.add("0", "10", "one")
    async with stores.connect("one", role) as session, stores.connect("one", role) as other:
        assert await admit(session, shards) == "ok"
        ended = await shards.done("offline", "0", "10")
        assert ended["sessions_ended"] == 1
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await session.fetchval("select 1")
        assert await other.fetchval("select 1") == 1


# -- lookup, sessions, upgrade -------------------------------------------------------------------


async def test_s22_lookup_by_the_catalogue_and_by_the_shard(shards: Shards, stores: Stores) -> None:
    await shards.set_up()
    await shards.add("-10", "10", "one")
    found = await shards.done("lookup", "-5")
    assert found == {
        "canonical_key": "7ffffffb",
        "hash": "",
        "low": "-10",
        "high": "10",
        "shard": "one",
        "host": stores.host("one"),
        "port": stores.lakebase.port,
        "database": stores.database,
        "status": "online",
        "epoch": found["epoch"],
    }
    location = f"{stores.host('one')}:{stores.lakebase.port}/{stores.database}"
    local = {"status": "online", "epoch": found["epoch"], "location": location}
    assert (await shards.done("lookup", "-5", "--from", "shard")) == {**found, "local": local}
    assert await shards.refused("lookup", "10") == ("mapping_not_found", "3D000")
    assert await shards.refused("lookup", "x") == ("key_invalid", "22P02")
    assert await shards.refused("lookup", "") == ("key_missing", "22023")
    assert await shards.refused("lookup", "99999999999") == ("key_invalid", "22003")
    text = (await shards("lookup", "-5", "--from", "shard")).out
    assert "as the shard has it:" in text
    stores.execute("one", "delete from shardmap_local.mapping")
    assert (await shards.done("lookup", "-5", "--from", "shard"))["local"] is None
    stores.execute("one", "drop schema shardmap_local cascade")
    refused = await shards.refused("lookup", "-5", "--from", "shard")
    assert refused == ("shard_not_valid", "55000")


async def test_s22_lookup_in_a_hash_map_shows_the_hash(shards: Shards) -> None:
    await shards.set_up("hash", "text")
    await shards.add("0", "0x80000000", "two")
    found = await shards.done("lookup", "tenant-1")
    assert (found["hash"], found["low"], found["high"]) == ("0a96abb3", "0x00000000", "0x80000000")


async def test_sessions_are_those_of_all_shards_of_one_or_of_a_mapping(
    shards: Shards, stores: Stores
) -> None:
    await shards.set_up()
    role = stores.roles.session
    await shards.done("grant", "session", role)
    await shards.add("0", "10", "one")
    await shards.add("10", "20", "two")
    assert (await shards.done("sessions"))["sessions"] == []
    async with stores.connect("one", role) as one, stores.connect("two", role) as two:
        assert await admit(one, shards, b"\x80\0\0\x05") == "ok"
        assert await admit(two, shards, b"\x80\0\0\x0f") == "ok"
        found = (await shards.done("sessions"))["sessions"]
        assert [(row["shard"], row["low"], row["high"]) for row in found] == [
            ("one", "0", "10"),
            ("two", "10", "20"),
        ]
        assert found[0]["pid"] == await one.fetchval("select pg_backend_pid()")
        assert found[0]["proxy"] == "proxy"
        assert set(found[0]) == {"shard", "pid", "low", "high", "epoch", "proxy", "since"}
        assert (await shards.done("sessions", "--shard", "two"))["sessions"] == found[1:]
        assert (await shards.done("sessions", "0", "10"))["sessions"] == found[:1]
        assert (await shards.done("sessions", "0", "10", "--shard", "two"))["sessions"] == []
        assert len((await shards("sessions")).out.splitlines()) == 3
    assert await shards.refused("sessions", "0", "11") == ("unknown_mapping", "42704")
    assert await shards.refused("sessions", "0") == ("invalid_bounds", "22023")
    assert await shards.refused("sessions", "--shard", "three") == ("unknown_shard", "42704")
    assert (await shards.done("sessions"))["sessions"] == []


async def test_upgrade_migrates_what_is_older_and_says_from_where_to_where(
    shards: Shards, stores: Stores
) -> None:
    await shards.set_up()
    assert await shards.done("upgrade") == {"store": "1.0", "shards": []}
    rows = [{"shard": name, "from": "1.0", "to": "1.0"} for name in SHARD_NAMES]
    assert await shards.done("upgrade", "--all") == {"store": "1.0", "shards": rows}
    assert await shards.done("upgrade", "--shard", "two") == {"store": "1.0", "shards": rows[1:]}
    assert (await shards.done("upgrade", "--all", "--dry-run"))["plan"] == []
    stores.execute("two", "update shardmap_local.identity set store_major = 2")
    refused = await shards("upgrade", "--all", "--json")
    assert refused.facts["reason"] == "store_version"
    assert refused.facts["error"].startswith("shard two has the schema of version 2.0")
    assert refused.facts["hint"] == "Upgrade lakebase-auth-proxy."


async def test_a_verb_that_is_interrupted_undoes_what_it_has_begun(
    shards: Shards, stores: Stores
) -> None:
    await shards.set_up()
    async with stores.connect("two") as blocker, blocker.transaction():
        # The grant waits here for the shard, after the catalogue has its operation.
        await blocker.execute("lock table shardmap_local.mapping in access exclusive mode")
        arguments = ("grant", "session", stores.roles.session, "--config", shards.config)
        async with started_process("shards", *arguments) as process:

            async def waits() -> bool:
                query = "select count(*) from pg_locks where not granted and relation is not null"
                return bool(await blocker.fetchval(query))

            await until(waits, "the verb waits for the shard")
            process.send(signal.SIGINT)
            await until(lambda: _is_undoing(stores), "the verb undoes")
            await blocker.execute("rollback")
            await blocker.execute("begin")
            assert await process.ended(60) == EXIT_FAILURE
            assert "interrupted" in process.err
    assert stores.execute(MAP, "select count(*) from shardmap.op_log") == "0"
    for name in SHARD_NAMES:
        async with stores.connect(name, stores.roles.session) as session:
            assert not await session.fetchval(
                "select has_schema_privilege('shardmap_local', 'usage')"
            )


async def _is_undoing(stores: Stores) -> bool:
    async with stores.connect(MAP) as connection:
        rows = await connection.fetch("select state from shardmap.op_log")
    return [row["state"] for row in rows] == ["undoing"]
