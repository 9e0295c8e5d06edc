"""`shards verify`, `repair`, `attach`, `detach`, `relocate`: what they print and refuse."""

import re
from pathlib import Path
from typing import Any

import pytest

from proxy.exit_codes import EXIT_DIFFERENCES, EXIT_FAILURE, EXIT_OK, EXIT_PENDING
from proxy.verbs.shards import read
from proxy.verbs.syntax import UsageError
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.direct_verbs import Servers, answer_of, run_directly
from tests.support.operating import Killed, Slept, kill_at
from tests.support.shards_cli import Shards


@pytest.fixture
def shards(stores: Stores, tmp_path: Path) -> Shards:
    return Shards(stores, tmp_path)


async def verified(shards: Shards, *words: str) -> dict[str, Any]:
    """Return what verify finds, with its exit code as it is to be."""
    answered = await shards("verify", "--json", *words)
    facts = answered.facts
    assert facts.pop("ok") is True
    assert answered.code == (EXIT_DIFFERENCES if facts["differences"] else EXIT_OK)
    return facts


async def filled(shards: Shards) -> None:
    await shards.set_up()
    await shards.add("0", "10", "one")
    await shards.add("10", "20", "two")


async def set_local(shards: Shards, name: str, change: str) -> None:
    async with shards.stores.connect(name) as connection:
        await connection.execute(f"update shardmap_local.{change}")


async def test_s32_s33_verify_prints_each_difference_and_exits_with_5(shards: Shards) -> None:
    await filled(shards)
    facts = await verified(shards)
    assert facts["differences"] == []
    await set_local(shards, "one", "mapping set epoch = 3")
    facts = await verified(shards, "--shard", "one")
    (found,) = facts["differences"]
    mapping_id = found["local"]["mapping_id"]
    row = {"shard": "one", "low": "0", "high": "10", "mapping_id": mapping_id, "status": "online"}
    assert found == {
        "shard": "one",
        "low": "0",
        "high": "10",
        "where": "both",
        "differs": ["epoch"],
        "catalogue": {**row, "epoch": 1},
        "local": {**row, "epoch": 3},
    }
    assert (await verified(shards))["report"] == facts["report"]
    assert (await verified(shards, "--shard", "two"))["differences"] == []


async def test_verify_prints_a_table_for_people(shards: Shards) -> None:
    await filled(shards)
    answered = await shards("verify")
    assert (answered.code, answered.out) == (EXIT_OK, "nothing differs on 2 shards\n")
    await set_local(shards, "one", "mapping set epoch = 3")
    answered = await shards("verify")
    assert answered.code == EXIT_DIFFERENCES
    first, header, line = answered.out.splitlines()
    assert re.fullmatch("1 differences on 2 shards; report [0-9a-f]{32}", first)
    assert header.split() == ["shard", "low", "high", "where", "differs", "catalogue", "local"]
    assert line.split() == [
        "one",
        "0",
        "10",
        "both",
        "epoch",
        *["one", "online", "1", "one", "online", "3"],
    ]


async def test_s35_s36_repair_takes_a_report_and_ranges(shards: Shards) -> None:
    await filled(shards)
    await shards.add("20", "30", "one")
    await shards.add("-10", "-5", "one")
    await set_local(shards, "one", "mapping set epoch = 3")
    report = (await verified(shards))["report"]
    words = ("repair", "--shard", "one", "--from", "shard", "--report", report)
    bad = await shards.refused(*words, "--range", "20", "31")
    assert bad == ("range_not_in_report", "22023")
    ranges = ("--range", "-10", "-5", "--range", "20", "30")
    plan = (await shards.done(*words, *ranges, "--dry-run"))["plan"]
    assert "repair 2 of its differences" in plan[0]
    assert await shards.done(*words, *ranges) == {"repaired": 2}
    assert await shards.refused(*words) == ("report_stale", "22023")
    facts = await verified(shards)
    assert [(one["low"], one["high"]) for one in facts["differences"]] == [("0", "10")]
    words = ("repair", "--shard", "one", "--from", "catalogue", "--report", facts["report"])
    assert await shards.done(*words) == {"repaired": 1}
    assert (await verified(shards))["differences"] == []


async def test_a_report_of_all_shards_serves_for_each(shards: Shards) -> None:
    await filled(shards)
    for name in SHARD_NAMES:
        await set_local(shards, name, "mapping set epoch = 3")
    report = (await verified(shards))["report"]
    for name in SHARD_NAMES:
        words = ("repair", "--shard", name, "--from", "shard", "--report", report)
        assert await shards.done(*words) == {"repaired": 1}
    assert (await verified(shards))["differences"] == []


async def test_a_locked_mapping_is_repaired_with_its_token_only(shards: Shards) -> None:
    await filled(shards)
    token = (await shards.done("lock", "0", "10"))["token"]
    await set_local(shards, "one", "mapping set epoch = 3")
    report = (await verified(shards))["report"]
    words = ("repair", "--shard", "one", "--from", "shard", "--report", report)
    assert await shards.refused(*words) == ("locked", "55P03")
    assert await shards.done(*words, "--token", token) == {"repaired": 1}
    assert await shards.done("unlock", "0", "10", "--token", token) == {"unlocked": 1}


async def test_s31_detach_attach_verify_repair(shards: Shards) -> None:
    await filled(shards)
    before = await shards.done("show")
    assert await shards.refused("detach", "one") == ("not_offline", "55006")
    plan = (await shards.done("detach", "one", "--force", "--dry-run"))["plan"]
    assert len(plan) == 3
    stale = await shards.refused("detach", "one", "--force", "--expect", "9")
    assert stale == ("stale_version", "40001")
    assert await shards.done("detach", "one", "--force", "--expect", "1") == {"mappings": 1}
    assert [one["name"] for one in (await shards.done("show"))["shards"]] == ["two"]
    where = shards.where("one")
    assert (await shards.done("attach", "one", *where, "--dry-run"))["dry_run"] is True
    attached = await shards.done("attach", "one", *where)
    assert (attached["found"], attached["map"]["name"]) == (1, "tenants")
    assert (attached["shard"]["name"], attached["shard"]["status"]) == ("one", "offline")
    report = (await verified(shards))["report"]
    words = ("repair", "--shard", "one", "--from", "shard", "--report", report)
    assert await shards.done(*words) == {"repaired": 1}
    after = await shards.done("show")
    names = ("low", "high", "shard", "status")
    assert [[one[name] for name in names] for one in after["mappings"]] == [
        [one[name] for name in names] for one in before["mappings"]
    ]


@pytest.mark.parametrize(
    ("gone", "point"), [("one", "drained"), ("two", "target_ready.done"), ("two", "opened")]
)
async def test_what_is_pending_on_a_shard_that_is_gone_does_not_keep_it_from_being_detached(
    shards: Shards, gone: str, point: str
) -> None:
    """Neither completing nor undoing could reach it, so the shard could never be detached."""
    await filled(shards)
    servers = Servers.of(shards.stores, shards.config)
    with pytest.raises(Killed):
        await run_directly(servers, ("move", "0", "10", "--to", "two"), kill_at(point))

    def fail(name: str) -> None:
        if name == gone:
            raise ConnectionRefusedError("the shard is gone")

    detach = ("detach", gone, "--force")
    answer = await answer_of(run_directly(servers, detach, fail=fail, sleep=Slept()))
    assert answer.code == EXIT_OK, answer
    assert "is given up" in answer.err
    assert await shards.done("ops") == {"operations": []}
    (left,) = (await shards.done("show"))["shards"]
    if (report := (await verified(shards))["report"]) and left["mappings"]:
        words = ("repair", "--shard", left["name"], "--from", "catalogue", "--report", report)
        await shards.done(*words)
    assert (await verified(shards))["differences"] == []
    for low, high in (("0", "10"), ("10", "20")):
        if not await has_mapping(shards, low):
            await shards.add(low, high, left["name"])
    assert (await verified(shards))["differences"] == []


async def test_a_dry_run_or_a_stale_detach_gives_nothing_up(shards: Shards) -> None:
    """What it could not settle, as an operation of a later version, it gave up."""
    await filled(shards)
    servers = Servers.of(shards.stores, shards.config)
    with pytest.raises(Killed):
        await run_directly(servers, ("move", "0", "10", "--to", "two"), kill_at("drained"))
    shards.stores.execute(MAP, "update shardmap.op_log set kind = 'later'")

    def fail(name: str) -> None:
        if name == "one":
            raise ConnectionRefusedError("the shard is gone")

    detach = ("detach", "one", "--force", "--dry-run")
    stale = ("detach", "one", "--force", "--expect", "9")
    answer = await answer_of(run_directly(servers, detach, fail=fail, sleep=Slept()))
    assert answer.code == EXIT_PENDING, answer
    answer = await answer_of(run_directly(servers, stale, fail=fail, sleep=Slept()))
    assert answer.facts["reason"] == "stale_version", answer
    assert [one["kind"] for one in (await shards.done("ops"))["operations"]] == ["later"]
    settle = "delete from shardmap.op_log; update shardmap.shard set op_id = null"
    shards.stores.execute(MAP, settle)
    answer = await answer_of(run_directly(servers, detach, fail=fail, sleep=Slept()))
    assert answer.code == EXIT_OK, "it was refused, as the shard did not answer"


async def has_mapping(shards: Shards, low: str) -> bool:
    return low in [one["low"] for one in (await shards.done("show"))["mappings"]]


async def lose_catalogue(shards: Shards) -> None:
    async with shards.stores.connect(MAP) as connection:
        await connection.execute("drop schema shardmap cascade")
    await shards.done("init")


async def test_the_lost_catalogue_is_made_again(shards: Shards) -> None:
    await filled(shards)
    await shards.done("grant", "session", shards.stores.roles.session)
    before = await shards.done("show")
    await lose_catalogue(shards)
    assert await shards.refused("verify") == ("unknown_map", "42704")
    dry = await shards.done("attach", "one", *shards.where("one"), "--dry-run")
    assert "Create the map tenants" in dry["plan"][0]
    assert (await shards.done("list"))["maps"] == []
    for name in SHARD_NAMES:
        assert (await shards.done("attach", name, *shards.where(name)))["found"] == 1
    plan = (await shards.done("repair", "--all", "--from", "shard", "--dry-run"))["plan"]
    assert len(plan) == 3
    assert await shards.done("repair", "--all", "--from", "shard") == {"repaired": 2}
    after = await shards.done("show")
    assert after["mappings"] == before["mappings"]
    assert after["map"]["version"] > before["map"]["version"]
    assert (await verified(shards))["differences"] == []
    async with shards.stores.connect(MAP) as connection:
        roles = await connection.fetchval("select session_roles from shardmap.shard_map")
    assert roles == [shards.stores.roles.session]


async def test_an_attach_that_is_refused_leaves_no_map(shards: Shards) -> None:
    await filled(shards)
    await lose_catalogue(shards)
    await set_local(shards, "one", "identity set store_major = 2")
    assert await shards.refused("attach", "one", *shards.where("one")) == ("store_version", "55000")
    await set_local(shards, "one", "identity set store_major = 1, kind = 'other'")
    refused = await shards.refused("attach", "one", *shards.where("one"))
    assert refused == ("shard_not_valid", "55000")
    assert (await shards.done("list"))["maps"] == []
    await shards.done("create", "tenants", "--kind", "range", "--key-type", "int4")
    await set_local(shards, "one", "identity set kind = 'range'")
    assert await shards.refused("attach", "one", *shards.where("one")) == ("exists", "42710")


async def test_s40_r6_a_branch_is_attached_as_a_shard_of_its_own(
    shards: Shards, stores: Stores
) -> None:
    await filled(shards)
    await shards.done("detach", "two", "--force")
    async with stores.connect("one") as one, stores.connect("two") as two:
        (identity,) = await one.fetch("select * from shardmap_local.identity")
        (mapping,) = await one.fetch("select * from shardmap_local.mapping")
        await two.execute("delete from shardmap_local.identity")
        for table, row in (("identity", identity), ("mapping", mapping)):
            values = ", ".join(f"${number + 1}" for number in range(len(row)))
            await two.execute(f"insert into shardmap_local.{table} values ({values})", *row)
    where = shards.where("two")
    refused = await shards("attach", "branch", *where, "--json")
    assert (refused.code, refused.facts["reason"]) == (EXIT_FAILURE, "identity_exists")
    assert refused.facts["sqlstate"] == "42710"
    assert "shards relocate one" in refused.facts["hint"]
    assert "shards attach branch --new-identity" in refused.facts["hint"]
    attached = await shards.done("attach", "branch", *where, "--new-identity")
    assert (attached["found"], attached["shard"]["status"]) == (1, "online")
    (found,) = (await verified(shards))["differences"]
    assert (found["shard"], found["where"], found["local"]["status"]) == (
        "branch",
        "both",
        "offline",
    )
    assert found["catalogue"]["shard"] == "one"


async def test_s37_relocate_after_a_rename(shards: Shards, stores: Stores) -> None:
    await filled(shards)
    renamed = "renamed." + stores.host("one").partition(".")[2]
    async with stores.connect(MAP) as connection:
        await connection.execute("update shardmap.shard set host = $1 where name = 'one'", renamed)
    await set_local(
        shards,
        "one",
        f"identity set location = replace(location, '{stores.host('one')}', '{renamed}')",
    )
    plan = (await shards.done("relocate", "one", *shards.where("one"), "--dry-run"))["plan"]
    assert len(plan) == 4
    words = ("relocate", "one", *shards.where("one"), "--expect")
    assert await shards.refused(*words, "9") == ("stale_version", "40001")
    facts = await shards.done(*words, "1")
    assert facts["differences"] == []
    assert (facts["shard"]["host"], facts["shard"]["mappings"]) == (stores.host("one"), 1)
    assert (await verified(shards))["differences"] == []
    assert await shards.refused("relocate", "one", *shards.where("two")) == (
        "wrong_shard",
        "55000",
    )


async def test_verify_of_what_is_not_the_shard_says_what_to_do(shards: Shards) -> None:
    await filled(shards)
    await set_local(shards, "one", "identity set location = 'elsewhere:5432/app'")
    answered = await shards("verify", "--json")
    assert (answered.code, answered.facts["reason"]) == (EXIT_FAILURE, "wrong_shard")
    assert "relocate" in answered.facts["hint"]


async def test_s38_a_store_of_another_version(shards: Shards) -> None:
    await filled(shards)
    await set_local(shards, "one", "identity set store_major = 2")
    for words in (("verify",), ("repair", "--all", "--from", "shard")):
        assert await shards.refused(*words) == ("store_version", "55000")
    async with shards.stores.connect(MAP) as connection:
        await connection.execute("update shardmap.store_version set major = 2")
    refused = [
        await shards.refused("verify"),
        await shards.refused("detach", "one", "--force"),
        await shards.refused("attach", "another", *shards.where("one")),
    ]
    assert set(refused) == {("store_version", "55000")}


@pytest.mark.parametrize(
    "words",
    [
        "repair",
        "repair --shard one --from shard",
        "repair --shard one --report 1 --from nowhere",
        "repair --all --from catalogue",
        "repair --all --from shard --shard one",
        "repair --all --from shard --range 1 2",
        "repair --shard one --from shard --report 1 --range 1",
        "repair --shard one --from shard --report 1 --token none",
        "detach",
        "detach one two",
        "detach one --expect 0",
        "relocate one --host a --expect x",
        "attach one",
        "attach one --host a --new-identity --force",
        "attach one --host a --endpoint e --instance i",
        "relocate one",
        "verify one",
    ],
)
def test_what_cannot_be_meant_is_judged_before_anything_is_asked(words: str) -> None:
    with pytest.raises(UsageError):
        read([*words.split(), "--map", "tenants"])


@pytest.mark.slow
async def test_the_verbs_as_processes(shards: Shards) -> None:
    await filled(shards)
    await set_local(shards, "one", "mapping set epoch = 3")
    answered = await shards.process("verify", "--json")
    assert answered.code == EXIT_DIFFERENCES
    words = ("repair", "--shard", "one", "--from", "shard", "--report", answered.facts["report"])
    answered = await shards.process(*words)
    assert (answered.code, answered.out) == (EXIT_OK, "repaired 1 differences\n")
    answered = await shards.process("detach", "one", "--force")
    assert answered.out == "detached the shard one with its 1 mappings; it is offline\n"
    answered = await shards.process("attach", "one", *shards.where("one"))
    assert "its 1 mappings wait for a repair" in answered.out
    answered = await shards.process("repair", "--all", "--from", "shard", "--json")
    assert answered.facts == {"ok": True, "repaired": 1}
