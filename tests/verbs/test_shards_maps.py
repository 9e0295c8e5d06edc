"""`shards init`, `upgrade`, `create`, `drop`, `list`, `show`: the catalogue and its maps."""

from pathlib import Path

import pytest

from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from tests.support.catalogue import MAP, Stores, insert_mapping, insert_shard
from tests.support.shards_cli import Shards


@pytest.fixture
def shards(stores: Stores, tmp_path: Path) -> Shards:
    return Shards(stores, tmp_path)


async def test_init_installs_the_catalogue_once(shards: Shards) -> None:
    assert await shards.refused("list") == ("store_missing", "55000")
    plan = await shards.done("init", "--dry-run")
    assert plan["dry_run"] is True
    assert len(plan["plan"]) == 1
    assert await shards.refused("list") == ("store_missing", "55000")
    assert await shards.done("init") == {"created": True, "store": "1.0"}
    assert await shards.done("init") == {"created": False, "store": "1.0"}
    assert (await shards.done("init", "--dry-run"))["plan"] == []
    assert await shards.done("list") == {"maps": []}


async def test_init_refuses_a_shard_and_a_role_that_may_not_create(
    shards: Shards, stores: Stores, tmp_path: Path
) -> None:
    reader = Shards(stores, tmp_path, stores.roles.reader)
    answered = await reader("init", "--json")
    assert answered.code == EXIT_FAILURE
    facts = answered.facts
    assert (facts["reason"], facts["sqlstate"]) == ("rights_missing", "42501")
    assert facts["hint"].startswith("grant create on database")
    assert stores.roles.reader in facts["hint"]
    stores.execute(MAP, facts["hint"])
    assert (await reader.done("init"))["created"] is True
    async with stores.connect(MAP) as connection:
        await connection.execute("drop owned by session_user cascade")
    stores.execute(MAP, "drop schema shardmap cascade; create schema shardmap_local")
    assert await shards.refused("init") == ("catalogue_is_shard", "55000")


async def test_s38_another_major_version_names_the_side_to_upgrade(
    shards: Shards, stores: Stores
) -> None:
    await shards.done("init")
    stores.execute(MAP, "update shardmap.store_version set major = 2")
    for verb in (("init",), ("upgrade",), ("list",), ("show",), ("lookup", "1")):
        answered = await shards(*verb, "--json")
        assert (answered.facts["reason"], answered.facts["sqlstate"]) == ("store_version", "55000")
        assert answered.facts["hint"] == "Upgrade lakebase-auth-proxy."


async def test_s38_a_later_minor_version_is_written_to(shards: Shards, stores: Stores) -> None:
    await shards.done("init")
    stores.execute(MAP, "update shardmap.store_version set minor = 4")
    assert (await shards.done("init")) == {"created": False, "store": "1.4"}
    assert (await shards.done("upgrade")) == {"store": "1.4", "shards": []}
    await shards.done("create", "tenants", "--kind", "list", "--key-type", "text")


async def test_s23_a_maps_name_is_unique_in_any_case_and_has_few_characters(
    shards: Shards,
) -> None:
    await shards.done("init")
    options = ("--kind", "list", "--key-type", "text", "--normalise", "nfc")
    dry = await shards.done("create", "a" * 50, *options, "--dry-run")
    assert dry["plan"] == [f"create the list map {'a' * 50} of text keys"]
    created = await shards.done("create", "a" * 50, *options)
    spec = {"kind": "list", "key_type": "text", "normalise": "nfc", "version": 1}
    assert created == {"map": {"name": "a" * 50, **spec}}
    for name in ("a" * 50, "A" * 50):
        assert await shards.refused("create", name, *options) == ("exists", "42710")
        assert await shards.refused("create", name, *options, "--dry-run") == ("exists", "42710")
    assert [one["name"] for one in (await shards.done("list"))["maps"]] == ["a" * 50]


async def test_s23_a_map_with_shards_is_not_dropped(shards: Shards, stores: Stores) -> None:
    await shards.done("init")
    assert await shards.refused("drop", "tenants") == ("unknown_map", "42704")
    await shards.done("create", "tenants", "--kind", "hash", "--key-type", "uuid")
    async with stores.connect(MAP) as connection:
        map_id = await connection.fetchval("select map_id from shardmap.shard_map")
        await insert_shard(connection, map_id, "one", "one.example.com", "app")
        assert await shards.refused("drop", "tenants") == ("not_empty", "2BP01")
        assert await shards.refused("drop", "tenants", "--dry-run") == ("not_empty", "2BP01")
        await connection.execute("delete from shardmap.shard")
        await connection.execute(
            "insert into shardmap.op_log (map_id, kind, body, owner) values ($1, 'x', '{}', 'me')",
            map_id,
        )
        assert await shards.refused("drop", "tenants") == ("operation_pending", "55P03")
        await connection.execute("delete from shardmap.op_log")
    assert (await shards.done("drop", "tenants", "--dry-run"))["plan"] == ["drop the map tenants"]
    dropped = await shards.done("drop", "tenants")
    assert dropped["map"]["name"] == "tenants"
    assert await shards.refused("drop", "tenants") == ("unknown_map", "42704")


async def _fill(shards: Shards, stores: Stores) -> None:
    """Add the mappings [0,10) one, [20,30) two, [30,+inf) one to a new range map."""
    await shards.done("init")
    await shards.done("create", "tenants", "--kind", "range", "--key-type", "int4")
    async with stores.connect(MAP) as connection:
        map_id = await connection.fetchval("select map_id from shardmap.shard_map")
        ids = [
            await insert_shard(connection, map_id, name, f"{name}.example.com", "app")
            for name in ("one", "two")
        ]
        for at, lo, hi in ((0, 0, 10), (1, 20, 30), (0, 30, None)):
            bounds = [None if n is None else (n + 2**31).to_bytes(4) for n in (lo, hi)]
            assert bounds[0] is not None
            await insert_mapping(connection, map_id, ids[at], bounds[0], bounds[1])


async def test_s9_show_prints_map_shards_and_mappings_in_order(
    shards: Shards, stores: Stores
) -> None:
    await _fill(shards, stores)
    shown = await shards.done("show")
    assert shown["map"]["version"] == 6
    assert shown["shards"][1] == {
        "name": "two",
        "host": "two.example.com",
        "port": 5432,
        "database": "app",
        "endpoint": "",
        "instance": "",
        "workspace": "",
        "status": "online",
        "version": 1,
        "mappings": 1,
    }
    same = {"status": "online", "epoch": 1, "locked": False, "op": None}
    mappings = [
        {"low": "0", "high": "10", "shard": "one", **same},
        {"low": "20", "high": "30", "shard": "two", **same},
        {"low": "30", "high": "+inf", "shard": "one", **same},
    ]
    assert shown["mappings"] == mappings
    for arguments, expected in (
        (("--shard", "one"), [mappings[0], mappings[2]]),
        (("--from", "5", "--to", "21"), mappings[:2]),
        (("--from", "-5", "--to", "20"), mappings[:1]),
        (("--from=-inf", "--to", "+inf", "--limit", "2"), mappings[:2]),
        (("--from", "10", "--to", "20"), []),
        (("--limit", "0"), []),
    ):
        assert (await shards.done("show", *arguments))["mappings"] == expected
    assert (await shards.done("show", "--shard", "one"))["shards"] == shown["shards"][:1]
    assert await shards.refused("show", "--shard", "three") == ("unknown_shard", "42704")
    assert await shards.refused("show", "--map", "other") == ("unknown_map", "42704")
    assert await shards.refused("show", "--from", "5", "--to", "5") == ("invalid_bounds", "22023")
    assert await shards.refused("show", "--from", "x") == ("key_invalid", "22P02")


async def test_list_and_its_locations(shards: Shards, stores: Stores) -> None:
    await _fill(shards, stores)
    await shards.done("create", "regions", "--kind", "list", "--key-type", "text")
    (regions, tenants) = (await shards.done("list"))["maps"]
    assert (regions["name"], regions["shards"], regions["mappings"]) == ("regions", 0, 0)
    assert tenants == {
        "name": "tenants",
        "kind": "range",
        "key_type": "int4",
        "normalise": "none",
        "version": 6,
        "shards": 2,
        "mappings": 3,
    }
    assert (await shards.done("list", "--locations"))["locations"] == [
        {"host": "one.example.com", "port": 5432, "database": "app", "shards": 1},
        {"host": "two.example.com", "port": 5432, "database": "app", "shards": 1},
    ]


async def test_people_get_tables_and_sentences(shards: Shards, stores: Stores) -> None:
    await _fill(shards, stores)
    shown = (await shards("show")).out.splitlines()
    assert shown[0].split() == ["name", "tenants"]
    assert [line.split() for line in shown[-4:]] == [
        ["low", "high", "shard", "status", "epoch", "locked", "op"],
        ["0", "10", "one", "online", "1", "no"],
        ["20", "30", "two", "online", "1", "no"],
        ["30", "+inf", "one", "online", "1", "no"],
    ]
    listed = (await shards("list")).out.splitlines()
    assert listed[1].split()[:2] == ["tenants", "range"]
    assert (await shards("init")).out == "the catalogue is there, in version 1.0\n"
    dry = await shards("drop", "regions", "--dry-run")
    assert (dry.code, dry.out) == (EXIT_FAILURE, "")
    assert "reason=unknown_map" in dry.err
    dry = await shards("create", "r", "--kind", "list", "--key-type", "text", "--dry-run")
    assert dry.out.splitlines() == [
        "would do, in this order:",
        "  create the list map r of text keys",
    ]


async def test_the_process_prints_one_object_and_nothing_else(
    shards: Shards, stores: Stores
) -> None:
    answered = await shards.process("init", "--json")
    assert (answered.code, answered.facts) == (
        EXIT_OK,
        {"ok": True, "created": True, "store": "1.0"},
    )
    answered = await shards.process("show", "--json")
    assert (answered.code, answered.facts["reason"]) == (EXIT_FAILURE, "unknown_map")


async def test_a_catalogue_that_cannot_be_reached_is_named_with_its_reason(
    shards: Shards, stores: Stores
) -> None:
    await stores.lakebase.gateway.refuse_connections()
    answered = await shards("list", "--json")
    assert answered.code == EXIT_FAILURE
    assert answered.facts["reason"] == "upstream_unreachable"
    assert answered.facts["error"].startswith("the catalogue: ")


async def test_a_role_without_rights_reads_nothing_and_is_named(
    shards: Shards, stores: Stores, tmp_path: Path
) -> None:
    await shards.done("init")
    reader = Shards(stores, tmp_path, stores.roles.reader)
    answered = await reader("list", "--json")
    assert (answered.facts["reason"], answered.facts["sqlstate"]) == ("rights_missing", "42501")
    assert stores.roles.reader in answered.facts["error"]
    assert f'to "{stores.roles.reader}"' in answered.facts["hint"]
