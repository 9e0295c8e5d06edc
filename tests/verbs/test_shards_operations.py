"""`shards ops`: what is pending is listed, completed or undone; and the exit code that says so."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_PENDING
from tests.support.catalogue import MAP, Stores
from tests.support.killed_verb import KilledVerbs, killed_verbs
from tests.support.operating import until
from tests.support.shards_cli import Shards

ADD = ("add", "0", "10", "--shard", "one")
TERMINAL_COLUMNS: Final = 80
UNKNOWN = "a6f6b1a2-0000-4000-8000-000000000000"


@pytest_asyncio.fixture
async def shards(stores: Stores, tmp_path: Path) -> Shards:
    found = Shards(stores, tmp_path)
    await found.set_up()
    return found


@pytest_asyncio.fixture
async def verbs() -> AsyncIterator[KilledVerbs]:
    async with killed_verbs() as started:
        yield started


async def killed(shards: Shards, verbs: KilledVerbs, *arguments: str, point: str) -> str:
    """Kill a verb at a point. Return the id of the operation that is left."""
    assert await verbs.run(point, *arguments, "--config", shards.config) == -signal.SIGKILL
    (row,) = (await shards.done("ops"))["operations"]
    return str(row["op"])


async def test_a_pending_operation_is_listed_completed_or_undone(
    shards: Shards, verbs: KilledVerbs
) -> None:
    assert await shards.done("ops") == {"operations": []}
    for word, state, mappings in (("undo", "undone", 0), ("resume", "done", 1)):
        op = await killed(shards, verbs, *ADD, point="local.commit")
        (row,) = (await shards.done("ops"))["operations"]
        assert (row["op"], row["kind"], row["state"], row["map"]) == (
            op,
            "add",
            "checked",
            "tenants",
        )
        assert "pid" in row["owner"]
        assert row["created_at"] <= row["updated_at"]
        (mapping,) = (await shards.done("show"))["mappings"]
        assert (mapping["status"], mapping["op"]) == ("offline", op)
        plan = (await shards.done("ops", word, op, "--dry-run"))["plan"]
        assert len(plan) == 1
        assert op in plan[0]
        (settled,) = (await shards.done("ops", word, op))["operations"]
        assert (settled["op"], settled["state"]) == (op, state)
        assert await shards.done("ops") == {"operations": []}
        assert len((await shards.done("show"))["mappings"]) == mappings
        assert await shards.refused("ops", word, op) == ("unknown_operation", "42704")
    assert await shards.refused("ops", "undo", UNKNOWN, "--dry-run") == (
        "unknown_operation",
        "42704",
    )


async def test_operations_of_another_map_are_left_out(shards: Shards, verbs: KilledVerbs) -> None:
    await shards.done("create", "others", "--kind", "list", "--key-type", "text")
    await killed(shards, verbs, *ADD, point="local")
    assert (await shards.done("ops", "--map", "others"))["operations"] == []
    assert len((await shards.done("ops", "--map", "tenants"))["operations"]) == 1
    assert await shards.refused("ops", "--map", "x") == ("unknown_map", "42704")


async def test_the_next_writer_says_what_it_settles_first(
    shards: Shards, verbs: KilledVerbs
) -> None:
    op = await killed(shards, verbs, *ADD, point="local")
    facts = await shards.done("add", "20", "30", "--shard", "one", "--dry-run")
    assert facts["plan"][0].startswith(f"Undo the operation {op}")
    await shards.done("add", "20", "30", "--shard", "one")
    assert [one["low"] for one in (await shards.done("show"))["mappings"]] == ["20"]


async def test_sentences_for_people(shards: Shards, verbs: KilledVerbs) -> None:
    assert (await shards("ops")).out == "no operation is pending\n"
    op = await killed(shards, verbs, *ADD, point="local")
    lines = (await shards("ops")).out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["op", op],
        ["kind", "add"],
        ["state", "checked"],
    ]
    assert max(map(len, lines)) <= TERMINAL_COLUMNS
    assert (await shards("ops", "undo", op)).out == f"the operation {op} (add) is undone\n"


async def test_what_cannot_be_ended_is_left_pending_with_its_exit_code(shards: Shards) -> None:
    """The administrator loses the right to end sessions while a mapping goes offline."""
    stores = shards.stores
    await shards.done("grant", "session", stores.roles.session)
    await shards.done(*ADD)
    async with (
        stores.connect(MAP) as catalogue,
        stores.connect("one", stores.roles.session) as session,
    ):
        row = await catalogue.fetchrow(
            "select m.*, s.host || ':' || s.port || '/' || s.dbname as location"
            " from shardmap.mapping m join shardmap.shard s using (shard_id)"
        )
        await session.fetchrow(
            "select * from shardmap_local.admit(1, $1, $2, $3, $4, 1, $5, 'test', null, null)",
            *(row["map_id"], row["shard_id"], row["location"], row["mapping_id"], row["lo"]),
        )
        right = f'pg_signal_backend from "{stores.roles.admin}"'
        stores.execute("one", f"revoke {right}")
        answered = await shards("offline", "0", "10", "--json")
        facts = answered.facts
        assert answered.code == EXIT_PENDING
        assert (facts["reason"], facts["sqlstate"]) == ("rights_missing", "42501")
        (pending,) = (await shards.done("ops"))["operations"]
        assert pending["op"] in facts["error"]
        # The next writer of the shard cannot complete it either.
        answered = await shards("add", "20", "30", "--shard", "one")
        assert answered.code == EXIT_PENDING
        assert pending["op"] in answered.err
        # Undone: it is online again, and its session lives.
        await shards.done("ops", "undo", pending["op"])
        (mapping,) = (await shards.done("show"))["mappings"]
        assert (mapping["status"], mapping["epoch"], mapping["op"]) == ("online", 3, None)
        assert await session.fetchval("select true")


@pytest.mark.slow
async def test_a_verb_that_is_interrupted_leaves_nothing_or_says_what(shards: Shards) -> None:
    stores = shards.stores
    await shards.done("grant", "session", stores.roles.session)
    await shards.done(*ADD)
    async with stores.connect("one") as locking:
        await locking.execute(
            "begin; lock table shardmap_local.mapping in share row exclusive mode"
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "shards", "offline", "0", "10"),
            *("--config", shards.config),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:

            async def has_begun() -> bool:
                return bool((await shards.done("ops"))["operations"])

            await until(has_begun, "the operation has begun")
            process.send_signal(signal.SIGTERM)
            await locking.execute("rollback")
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode in (EXIT_FAILURE, EXIT_PENDING), (out, err)
    pending = (await shards.done("ops"))["operations"]
    assert bool(pending) is (process.returncode == EXIT_PENDING)
    (mapping,) = (await shards.done("show"))["mappings"]
    assert pending or mapping["status"] == "online"
    assert (await shards("offline", "0", "10")).code == EXIT_OK
