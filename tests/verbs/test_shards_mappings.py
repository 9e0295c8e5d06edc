"""`shards add`, `delete`, `offline`, `online`: what they answer and what they refuse."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from proxy.verbs.shards import read
from proxy.verbs.syntax import UsageError
from tests.support.catalogue import MAP, Stores
from tests.support.shards_cli import Shards


@pytest_asyncio.fixture
async def shards(stores: Stores, tmp_path: Path) -> Shards:
    found = Shards(stores, tmp_path)
    await found.set_up()
    await found.done("grant", "session", stores.roles.session)
    return found


def mapping(low: str, high: str, shard: str, status: str, epoch: int) -> dict[str, Any]:
    where = {"low": low, "high": high, "shard": shard}
    return {**where, "status": status, "epoch": epoch, "locked": False, "op": None}


async def state(shards: Shards) -> dict[str, Any]:
    """Return what `show` and `list` say, the map's version included."""
    return {**await shards.done("show"), **await shards.done("list"), **await shards.done("ops")}


async def refused(shards: Shards, *arguments: str | int) -> tuple[str, str]:
    """Return reason and SQLSTATE; nothing may have changed, and a dry run says the same."""
    before = await state(shards)
    found = await shards.refused(*arguments)
    assert await shards.refused(*arguments, "--dry-run") == found
    assert await state(shards) == before
    return found


async def planned(shards: Shards, *arguments: str | int) -> int:
    """Return the length of the plan; nothing may have changed."""
    before = await state(shards)
    facts = await shards.done(*arguments, "--dry-run")
    assert facts["dry_run"] is True
    assert await state(shards) == before
    return len(facts["plan"])


@asynccontextmanager
async def session(shards: Shards, name: str, key: int) -> AsyncIterator[Any]:
    """Yield a connection that its shard was asked to admit, and the verdict."""
    stores = shards.stores
    async with stores.connect(MAP) as catalogue:
        row = await catalogue.fetchrow(
            "select m.*, s.host || ':' || s.port || '/' || s.dbname as location"
            " from shardmap.mapping m join shardmap.shard s using (shard_id)"
            " where m.lo <= $1 and (m.hi is null or m.hi > $1)",
            (key + 2**31).to_bytes(4),
        )
    async with stores.connect(name, stores.roles.session) as connection:
        admitted = await connection.fetchrow(
            "select * from shardmap_local.admit(1, $1, $2, $3, $4, $5, $6, 'test', null, null)",
            *(row["map_id"], row["shard_id"], row["location"], row["mapping_id"]),
            *(row["epoch"], (key + 2**31).to_bytes(4)),
        )
        yield connection, admitted["verdict"]


async def test_s5_s7_s8_a_mapping_from_its_addition_to_its_end(shards: Shards) -> None:
    assert await planned(shards, "add", "-10", "0", "--shard", "one") == 3
    added = await shards.done("add", "-10", "0", "--shard", "one")
    assert added == {"mapping": mapping("-10", "0", "one", "online", 1)}
    assert (await shards.done("show"))["mappings"] == [added["mapping"]]
    assert await refused(shards, "add", "-5", "+inf", "--shard", "two") == ("overlap", "23P01")
    assert await refused(shards, "delete", "-10", "0") == ("not_offline", "55006")
    assert await refused(shards, "remove-shard", "one") == ("not_empty", "2BP01")
    assert await planned(shards, "offline", "-10", "0") == 3
    offline = await shards.done("offline", "-10", "0")
    assert offline == {
        "mapping": mapping("-10", "0", "one", "offline", 2),
        "sessions_ended": 0,
    }
    assert await refused(shards, "delete", "-10", "0", "--expect", 1) == ("stale_epoch", "40001")
    assert await planned(shards, "delete", "-10", "0", "--expect", 2) == 2
    deleted = await shards.done("delete", "-10", "0", "--expect", 2)
    assert deleted == {"mapping": mapping("-10", "0", "one", "offline", 2)}
    assert await refused(shards, "delete", "-10", "0") == ("unknown_mapping", "42704")
    assert (await shards.done("add", "-10", "0", "--shard", "two"))["mapping"]["shard"] == "two"


async def test_doing_again_what_is_done_succeeds_and_changes_nothing(shards: Shards) -> None:
    await shards.done("add", "0", "10", "--shard", "one", "--offline")
    assert (await shards.done("show"))["mappings"][0]["status"] == "offline"
    for verb in ("online", "offline"):
        for what in (("0", "10"), ("--shard", "one")):
            before = await shards.done(verb, *what)
            seen = await state(shards)
            assert await planned(shards, verb, *what) == 0
            assert await shards.done(verb, *what) == before
            assert await state(shards) == seen


async def test_unknown_bounds_and_shards_are_refused(shards: Shards) -> None:
    await shards.done("add", "0", "10", "--shard", "one")
    for verb in ("offline", "online", "delete"):
        assert await refused(shards, verb, "0", "9") == ("unknown_mapping", "42704")
    for verb in ("offline", "online"):
        assert await refused(shards, verb, "--shard", "x") == ("unknown_shard", "42704")
    assert await refused(shards, "add", "20", "30", "--shard", "x") == ("unknown_shard", "42704")
    assert await refused(shards, "add", "9", "8", "--shard", "one") == ("invalid_bounds", "22023")
    assert await refused(shards, "add", "9", "x", "--shard", "one") == ("key_invalid", "22P02")
    assert await refused(shards, "offline", "5") == ("invalid_bounds", "22023")
    other = ("--map", "others")
    assert await shards.refused("offline", "0", "10", *other) == ("unknown_map", "42704")


async def test_s16_s17_offline_ends_or_keeps_the_sessions(shards: Shards) -> None:
    await shards.done("add", "0", "10", "--shard", "one")
    async with session(shards, "one", 5) as (kept, verdict):
        assert verdict == "ok"
        facts = await shards.done("offline", "0", "10", "--sessions", "keep")
        assert facts["sessions_ended"] == 0
        assert await kept.fetchval("select true")
        for dry in ((), ("--dry-run",)):
            refusal = await shards.refused("delete", "0", "10", *dry)
            assert refusal == ("sessions_alive", "55006")
        facts = await shards.done("offline", "0", "10", "--sessions", "drain", "--drain-seconds", 0)
        assert (facts["sessions_ended"], facts["mapping"]["epoch"]) == (1, 3)
        async with session(shards, "one", 5) as (_, again):
            assert again == "offline"
    assert (await shards.done("online", "0", "10", "--expect", 3))["mapping"]["epoch"] == 4
    async with session(shards, "one", 5) as (_, verdict):
        assert verdict == "ok"
        assert len((await shards.done("sessions", "0", "10"))["sessions"]) == 1


async def test_s58_s21_a_shard_goes_offline_and_online(shards: Shards) -> None:
    await shards.done("add", "0", "10", "--shard", "one")
    await shards.done("add", "10", "20", "--shard", "one", "--offline")
    async with session(shards, "one", 5):
        assert await planned(shards, "offline", "--shard", "one") == 3
        facts = await shards.done("offline", "--shard", "one", "--sessions", "keep")
        assert (facts["shard"]["status"], facts["sessions_ended"]) == ("offline", 0)
        assert (facts["shard"]["mappings"], facts["shard"]["name"]) == (2, "one")
        # The same shard, offline already: what was kept can be ended.
        assert (await shards.done("offline", "--shard", "one"))["sessions_ended"] == 1
    stale = ("online", "--shard", "one", "--expect", 1)
    assert await refused(shards, *stale) == ("stale_version", "40001")
    facts = await shards.done("online", "--shard", "one", "--expect", 2)
    assert facts["shard"]["status"] == "online"
    statuses = [one["status"] for one in (await shards.done("show"))["mappings"]]
    assert statuses == ["online", "offline"]


async def test_s57_a_file_is_added_whole_or_not_at_all(shards: Shards, tmp_path: Path) -> None:
    file = tmp_path / "mappings.csv"
    file.write_text("shard,low,high\none,-inf,0\ntwo,0,10\n\none,20,+inf\n")
    assert await planned(shards, "add", "--file", str(file)) == 3
    assert await shards.done("add", "--file", str(file)) == {"added": 3}
    assert [one["low"] for one in (await shards.done("show"))["mappings"]] == ["-inf", "0", "20"]
    file.write_text("low,high,target\n10,11,two\n5,11,one\n")
    assert await refused(shards, "add", "--file", str(file)) == ("overlap", "23P01")
    file.write_text("low,high,target\n10,12,two\n15,16,one\n19,100,one\n7,8,one\n")
    answered = await shards("add", "--file", str(file), "--json")
    assert answered.facts["reason"] == "overlap"
    assert [line.strip() for line in answered.facts["error"].splitlines()[1:]] == [
        "line 4 overlaps a mapping on shard one",
        "line 5 overlaps a mapping on shard two",
    ]
    file.write_text("low,high,shard\n10,9,two\nx,11,one\n12,13,three\n14,15\n16,17,one\n")
    answered = await shards("add", "--file", str(file), "--json")
    facts = answered.facts
    assert answered.code == EXIT_FAILURE
    assert (facts["reason"], facts["sqlstate"]) == ("invalid_bounds", "22023")
    lines = [line.strip().partition(":")[0] for line in facts["error"].splitlines()[1:]]
    assert sorted(lines) == ["line 2", "line 3", "line 4", "line 5"]
    assert len((await shards.done("show"))["mappings"]) == 3


async def test_lists_and_hashes(shards: Shards, stores: Stores) -> None:
    await shards.done("create", "names", "--kind", "list", "--key-type", "text")
    await shards.done("add-shard", "one", *shards.where("one"), "--map", "names")
    tenants = ("--map", "names")
    added = await shards.done("add", "--shard", "one", *tenants, "--", "--tenant")
    assert added["mapping"] == mapping("--tenant", "--tenant", "one", "online", 1)
    assert await shards.refused("add", "a", "b", "--shard", "one", *tenants) == (
        "invalid_bounds",
        "22023",
    )
    await shards.done("offline", *tenants, "--", "--tenant")
    await shards.done("create", "hashes", "--kind", "hash", "--key-type", "uuid")
    await shards.done("add-shard", "two", *shards.where("two"), "--map", "hashes")
    added = await shards.done(
        "add", "0x00000000", "2147483648", "--shard", "two", "--map", "hashes"
    )
    assert added["mapping"]["high"] == "0x80000000"


async def test_sentences_for_people(shards: Shards) -> None:
    answered = await shards("add", "0", "10", "--shard", "one")
    assert (answered.code, answered.out) == (
        EXIT_OK,
        "[0, 10) on shard one is added, online (epoch 1)\n",
    )
    assert "already online" in (await shards("online", "0", "10")).out
    assert "0 sessions were ended" in (await shards("offline", "0", "10")).out
    assert "shard one is offline (version 2)" in (await shards("offline", "--shard", "one")).out
    answered = await shards("add", "0", "10", "--shard", "one")
    assert (answered.code, answered.out) == (EXIT_FAILURE, "")
    assert "SQLSTATE 23P01, reason=overlap" in answered.err


WRONG = [
    ("add",),
    ("add", "0", "10"),
    ("add", "0", "10", "20", "--shard", "one"),
    ("add", "0", "10", "--shard", "a b"),
    ("add", "--file", "/nonexistent/file.csv"),
    ("add", "0", "10", "--file", "/etc/hostname"),
    ("delete",),
    ("delete", "0", "10", "--expect", "0"),
    ("offline",),
    ("offline", "0", "10", "--shard", "one"),
    ("offline", "0", "10", "--sessions", "end"),
    ("offline", "0", "10", "--drain-seconds", "5"),
    ("offline", "0", "10", "--sessions", "drain", "--drain-seconds", "-1"),
    ("online",),
    ("online", "0", "10", "--sessions", "kill"),
    ("ops", "resume"),
    ("ops", "resume", "7"),
    ("ops", "finish", "a6f6b1a2-0000-4000-8000-000000000000"),
    ("ops", "--dry-run"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_usage_is_told_before_a_database_is_asked(
    arguments: tuple[str, ...], stores: Stores, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        read([*arguments, "--config", str(stores.file(tmp_path))])


async def test_wrong_usage_ends_with_its_exit_code(shards: Shards) -> None:
    assert (await shards.process("offline")).code == EXIT_USAGE
