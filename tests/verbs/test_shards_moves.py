"""`shards move`, `reassign`, and `ops` for them: what they answer, refuse and leave."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.exit_codes import EXIT_OK, EXIT_PENDING
from proxy.verbs.shards import read
from proxy.verbs.syntax import UsageError
from tests.support.catalogue import MAP, Stores
from tests.support.killed_verb import KilledVerbs, killed_verbs
from tests.support.operating import until
from tests.support.running import psql_path
from tests.support.shards_cli import Shards

MOVING = Path(__file__).parents[2] / "docs" / "moving-tenants.md"
MOVE = ("move", "0", "10", "--to", "two")
# The wheel has pg_dump and psql of one version.
TOOLS = str(Path(psql_path()).parent)


@pytest_asyncio.fixture
async def shards(stores: Stores, tmp_path: Path) -> Shards:
    found = Shards(stores, tmp_path)
    await found.set_up()
    await found.add("0", "10", "one")
    return found


@pytest_asyncio.fixture
async def verbs() -> AsyncIterator[KilledVerbs]:
    async with killed_verbs() as started:
        yield started


def mapping(shard: str, status: str, epoch: int) -> dict[str, Any]:
    where = {"low": "0", "high": "10", "shard": shard}
    return {**where, "status": status, "epoch": epoch, "locked": False, "op": None}


async def shown(shards: Shards) -> dict[str, Any]:
    (found,) = (await shards.done("show"))["mappings"]
    return {**found}


async def test_a_move_answers_with_the_mapping_the_sessions_and_the_time(shards: Shards) -> None:
    plan = (await shards.done(*MOVE, "--dry-run"))["plan"]
    assert len(plan) == 8
    assert await shown(shards) == mapping("one", "online", 1)
    facts = await shards.done(*MOVE, "--expect", "1")
    assert facts.pop("mapping") == mapping("two", "online", 4) == await shown(shards)
    assert re.fullmatch("[0-9a-f-]{36}", facts.pop("op"))
    assert 0 < facts.pop("seconds_offline") < 30
    assert facts == {"sessions_ended": 0}
    assert await shards.refused(*MOVE, "--dry-run") == ("same_shard", "22023")
    lines = (await shards("move", "0", "10", "--to", "one", "--sessions", "drain")).out.splitlines()
    assert lines[0] == "[0, 10) is moved to shard one, online (epoch 7)"
    assert lines[1].startswith("0 sessions were ended; the mapping was offline for ")


async def test_s10_a_mapping_is_reassigned_while_it_is_offline(shards: Shards) -> None:
    words = ("reassign", "0", "10", "--to", "two")
    assert await shards.refused(*words) == ("not_offline", "55006")
    await shards.done("offline", "0", "10")
    assert len((await shards.done(*words, "--dry-run"))["plan"]) == 4
    assert await shards.done(*words, "--expect", "2") == {"mapping": mapping("two", "offline", 4)}
    assert await shards.refused(*words, "--expect", "2") == ("stale_epoch", "40001")


async def test_a_lock_is_respected(shards: Shards) -> None:
    token = (await shards.done("lock", "0", "10"))["token"]
    assert await shards.refused(*MOVE) == ("locked", "55P03")
    other = "a6f6b1a2-0000-4000-8000-000000000000"
    assert await shards.refused(*MOVE, "--token", other) == ("lock_not_owned", "55P03")
    facts = await shards.done(*MOVE, "--token", token)
    assert facts["mapping"]["locked"] is True


# -- the copy ------------------------------------------------------------------------------------


async def with_rows(shards: Shards) -> None:
    """Fill a table on the source."""
    sql = "create table orders as select g as n from generate_series(1, 1000) g"
    shards.stores.execute("one", sql, shards.stores.roles.admin)


async def test_rows_are_copied_by_pg_dump_and_psql_all_or_none(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document's command. In a pipe, a dump that failed was hidden, and half was committed."""
    _, command = re.findall(r"```sh\n(.*?)```", MOVING.read_text(), re.DOTALL)
    await with_rows(shards)
    shards.stores.execute("two", "create table orders (n int)", shards.stores.roles.admin)
    failing = tmp_path / "bin" / "pg_dump"
    failing.parent.mkdir()
    failing.write_text(f'#!/bin/sh\n{TOOLS}/pg_dump "$@"; exit 1\n')
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", TOOLS, prepend=":")
    with monkeypatch.context() as failed:
        failed.setenv("PATH", str(failing.parent), prepend=":")
        assert await shards.refused(*MOVE, "--copy", command) == ("copy_failed", "58000")
    assert (await shown(shards))["status"] == "online"
    count = "select count(*) from orders"
    assert shards.stores.execute("two", count) == "0"
    answered = await shards.process(*MOVE, "--copy", command, "--json")
    assert answered.code == EXIT_OK, answered
    assert answered.facts["mapping"]["shard"] == "two"
    assert shards.stores.execute("two", count) == "1000"


async def test_a_parallel_dump_has_several_connections(shards: Shards, tmp_path: Path) -> None:
    await with_rows(shards)
    command = (
        f'{TOOLS}/pg_dump -t orders -Fd -j 3 -f {tmp_path}/dump "$SHARDS_SOURCE"'
        f' && {TOOLS}/pg_restore -j 3 -d "$SHARDS_TARGET" {tmp_path}/dump'
    )
    await shards.done(*MOVE, "--copy", command)
    async with shards.stores.connect("two") as connection:
        assert await connection.fetchval("select count(*) from orders") == 1000


async def test_a_copy_that_fails_is_undone_and_its_last_words_are_in_the_error(
    shards: Shards,
) -> None:
    command = f'{TOOLS}/psql -qX "$SHARDS_TARGET" -c "select no_such_column"'
    answered = await shards(*MOVE, "--json", "--copy", f"{command}; echo the end >&2; exit 9")
    facts = answered.facts
    assert (facts["reason"], facts["sqlstate"]) == ("copy_failed", "58000")
    assert facts["error"].endswith("exit status 9: the end")
    assert await shards.done("ops") == {"operations": []}
    assert (await shown(shards))["shard"] == "one"
    assert (await shown(shards))["status"] == "online"
    assert await shards.refused(*MOVE, "--copy", "sleep 60", "--copy-timeout-seconds", "1") == (
        "copy_failed",
        "58000",
    )


async def test_what_a_copy_has_begun_in_a_shard_is_ended_with_it(shards: Shards) -> None:
    await with_rows(shards)
    running = "select pg_sleep(4); insert into orders values (-1)"
    psql = f"{TOOLS}/psql -qX"
    command = " ".join(f'{psql} "{where}" -c "{running}" &' for where in ["$SHARDS_SOURCE"] * 3)
    timeout = ("--copy-timeout-seconds", "2")
    assert (await shards.refused(*MOVE, "--copy", f"{command} wait", *timeout))[0] == "copy_failed"
    async with shards.stores.connect("one") as connection:
        left = (
            "select query from pg_stat_activity where query like '%orders%'"
            " and state <> 'idle' and pid <> pg_backend_pid()"
        )
        assert await connection.fetch(left) == []
        assert await connection.fetchval("select count(*) from orders where n < 0") == 0


async def test_a_copy_goes_on_when_nothing_reads_standard_error(
    shards: Shards, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    command = f"cat {tmp_path}/go; for n in 1 2 3; do echo $n >&2; sleep 1; done"
    words = [*MOVE, "--json", "--copy", command, "--config", shards.config]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "shards", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=(pipe := os.pipe())[1],
    )
    for end in pipe:
        os.close(end)
    await asyncio.to_thread((tmp_path / "go").write_text, "")
    said, _ = await process.communicate()
    assert (process.returncode, json.loads(said)["ok"]) == (EXIT_OK, True)
    assert await shown(shards) == mapping("two", "online", 4)


async def test_an_interrupted_copy_is_ended_and_the_move_undone(
    shards: Shards, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    words = [*MOVE, "--copy", f"echo $$ > {pids}; sleep 600", "--config", shards.config]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "shards", *words), stderr=asyncio.subprocess.PIPE
    )

    async def copies() -> bool:
        return pids.exists() and bool(pids.read_text())

    await until(copies, "the command runs")
    (row,) = (await shards.done("ops"))["operations"]
    assert (row["kind"], row["state"]) == ("move", "drained")
    assert row["progress"]["seconds_in_state"] >= 0
    process.send_signal(signal.SIGTERM)
    _, said = await process.communicate()
    assert b"interrupted" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)
    assert await shards.done("ops") == {"operations": []}
    assert (await shown(shards))["status"] == "online"


# -- ops -----------------------------------------------------------------------------------------


async def killed(shards: Shards, verbs: KilledVerbs, point: str, *words: str) -> str:
    assert await verbs.run(point, *words, "--config", shards.config) == -signal.SIGKILL
    return str((await shards.done("ops"))["operations"][-1]["op"])


async def test_a_move_whose_copy_has_not_run_asks_for_it(
    shards: Shards, verbs: KilledVerbs, tmp_path: Path
) -> None:
    words = (*MOVE, "--copy", "echo not-a-real-secret")
    op = await killed(shards, verbs, "copied", *words)
    async with shards.stores.connect(MAP) as catalogue:
        body = await catalogue.fetchval("select body::text from shardmap.op_log")
    assert "not-a-real-secret" not in body
    answered = await shards("ops", "resume", op)
    assert answered.code == EXIT_PENDING
    assert "--without-copy" in answered.err
    assert await shards.refused("ops", "resume", op, "--dry-run") == ("operation_pending", "55P03")
    assert len((await shards.done("ops", "resume", op, "--without-copy", "--dry-run"))["plan"]) == 1
    await shards.done("ops", "resume", op, "--copy", f"echo copied > {tmp_path}/done")
    assert (tmp_path / "done").read_text() == "copied\n"
    assert await shown(shards) == mapping("two", "online", 4)
    op = await killed(shards, verbs, "announced", "move", "0", "10", "--to", "one", "--copy", "x")
    await shards.done("ops", "resume", op, "--without-copy")
    assert await shown(shards) == mapping("one", "online", 7)


async def test_a_command_that_does_not_run_any_more_is_warned_of(
    shards: Shards, verbs: KilledVerbs, tmp_path: Path
) -> None:
    copy = ("--copy", f"echo copied >> {tmp_path}/done")
    op = await killed(shards, verbs, "target_ready", *MOVE, *copy)
    answered = await shards("ops", "resume", op, *copy)
    assert answered.code == EXIT_OK
    assert "the copy command is not run" in answered.err
    assert (tmp_path / "done").read_text() == "copied\n"
    assert await shown(shards) == mapping("two", "online", 4)


async def test_from_the_flip_on_a_move_is_only_completed(
    shards: Shards, verbs: KilledVerbs
) -> None:
    op = await killed(shards, verbs, "opened", *MOVE)
    assert await shards.refused("ops", "undo", op) == ("not_undoable", "55006")
    assert await shards.refused("ops", "undo", op, "--dry-run") == ("not_undoable", "55006")
    assert (await shards("ops", "undo", op)).code == EXIT_PENDING
    await shards.done("ops", "resume", op)
    assert await shown(shards) == mapping("two", "online", 4)


async def test_all_operations_are_resumed_and_those_that_cannot_be_are_named(
    shards: Shards, verbs: KilledVerbs
) -> None:
    assert await shards.done("ops", "resume", "--all") == {"operations": []}
    await shards.done("create", "others", "--kind", "range", "--key-type", "int4")
    for name in ("one", "two"):
        await shards.done("add-shard", name, "--map", "others", *shards.where(name))
    await shards.done("add", "0", "10", "--shard", "one", "--map", "others")
    first = await killed(shards, verbs, "opened", *MOVE)
    second = await killed(shards, verbs, "copied", *MOVE, "--copy", "x", "--map", "others")
    one_map = ("ops", "resume", "--all", "--map", "tenants")
    assert len((await shards.done(*one_map, "--dry-run"))["plan"]) == 1
    refused = (await shards("ops", "resume", "--all", "--dry-run", "--json")).facts
    assert refused["reason"] == "operation_pending"
    assert refused["error"].startswith("1 operations can be completed, 1 cannot:")
    answered = await shards("ops", "resume", "--all", "--json")
    assert answered.code == EXIT_PENDING
    facts = answered.facts
    assert (facts["reason"], second in facts["error"], first in facts["error"]) == (
        "operation_pending",
        True,
        False,
    )
    assert [one["op"] for one in (await shards.done("ops"))["operations"]] == [second]
    await shards.done("ops", "undo", second)


WRONG = [
    ("move",),
    ("move", "0", "10"),
    ("move", "0", "10", "--to", "a b"),
    (*MOVE, "--sessions", "keep"),
    (*MOVE, "--drain-seconds", "5"),
    (*MOVE, "--copy", " "),
    (*MOVE, "--copy-timeout-seconds", "5"),
    (*MOVE, "--copy", "x", "--copy-timeout-seconds", "-1"),
    (*MOVE, "--token", "x"),
    (*MOVE, "--expect", "0"),
    ("reassign", "0", "10"),
    ("reassign", "0", "10", "--to", "two", "--copy", "x"),
    ("ops", "--all"),
    ("ops", "--copy", "x"),
    ("ops", "undo", "--all"),
    ("ops", "resume", "--all", "--copy", "x"),
    ("ops", "resume", "a6f6b1a2-0000-4000-8000-000000000000", "--all"),
    ("ops", "undo", "a6f6b1a2-0000-4000-8000-000000000000", "--copy", "x"),
    ("ops", "resume", "a6f6b1a2-0000-4000-8000-000000000000", "--copy", "x", "--without-copy"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_usage_is_told_before_a_database_is_asked(
    arguments: tuple[str, ...], stores: Stores, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        read([*arguments, "--config", str(stores.file(tmp_path))])
