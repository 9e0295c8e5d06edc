"""The commands of docs/shard-maps.md and docs/moving-tenants.md, as they are written.

Each command is a process of its own, as people run it. Only what is of the emulator is replaced:
endpoints, its port, roles.
"""

import faulthandler
import json
import re
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest

from proxy.catalogue.operation_kinds import KINDS
from proxy.exit_codes import EXIT_OK
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.proxy_process import run_to_end
from tests.support.running import psql_path
from tests.support.shards_cli import Shards

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "shard-maps.md"
MOVING: Final = DOCUMENT.with_name("moving-tenants.md")
_COMMAND: Final = re.compile(r"^\$ lakebase-auth-proxy (shards .*)$", re.MULTILINE)


def chapter_of(title: str, document: Path) -> str:
    return document.read_text().partition(f"## {title}\n")[2].partition("\n##")[0]


def commands(title: str, document: Path = DOCUMENT) -> list[list[str]]:
    """Return the commands of a chapter of the document, in words."""
    chapter = chapter_of(title, document)
    return [shlex.split(found) for found in _COMMAND.findall(chapter)]


def csv_of_the_document() -> str:
    (csv,) = re.findall(r"```csv\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return str(csv)


Run = Callable[[list[str]], Awaitable[str]]
"""Runs a command of a document, which must succeed. Returns what it prints."""


def replaced(stores: Stores, folder: Path, words: list[str]) -> list[str]:
    """Return a command with what the emulator has in place of the document's names."""
    names = {
        "projects/shop/branches/main/endpoints/eu": stores.endpoint("one"),
        "projects/shop/branches/main/endpoints/us": stores.endpoint("two"),
        "map_reader": stores.roles.reader,
        "app_login": stores.roles.session,
        "tenants.csv": str(folder / "tenants.csv"),
        "./copy-tenant.sh": f"sh {folder / 'copy-tenant.sh'}",
    }
    arguments = [names.get(word, word) for word in words]
    if "add-shard" in words or "attach" in words:
        arguments += ["--port", str(stores.lakebase.port)]
    return arguments


def as_processes(stores: Stores, folder: Path) -> Run:
    """Run each command as people do."""
    stores.file(folder).rename(folder / "shards.toml")
    variable = {"LAKEBASE_PROXY_CONFIG": str(folder / "shards.toml")}

    async def run(words: list[str]) -> str:
        arguments = replaced(stores, folder, words)
        code, out, err = await run_to_end(
            sys.executable, "-m", "proxy", *arguments, environment=variable
        )
        assert code == EXIT_OK, f"{words}: {err}"
        return out

    return run


def within(stores: Stores, folder: Path) -> Run:
    """Run each command in this process, which is faster."""
    shards = Shards(stores, folder)

    async def run(words: list[str]) -> str:
        answered = await shards(*replaced(stores, folder, words)[1:])
        assert answered.code == EXIT_OK, f"{words}: {answered}"
        return answered.out

    return run


async def run_all(run: Run, title: str, document: Path = DOCUMENT) -> list[str]:
    """Run the commands of a chapter, one after the other. Return what they print."""
    found = commands(title, document)
    assert found
    return [await run(words) for words in found]


async def to_a_catalogue(run: Run, folder: Path) -> list[str]:
    (folder / "tenants.csv").write_text(csv_of_the_document())
    title = "From a CSV map to a catalogue in ten commands"
    assert len(commands(title)) == 9  # and the one that names the file
    return await run_all(run, title)


@pytest.mark.slow
async def test_the_ten_commands_of_the_document_lead_to_a_catalogue(
    stores: Stores, tmp_path: Path
) -> None:
    faulthandler.cancel_dump_traceback_later()  # each of the processes has a bound of its own
    run = as_processes(stores, tmp_path)
    printed = await to_a_catalogue(run, tmp_path)
    assert re.search(r"^1000 +2000 +us +online", printed[-4], re.MULTILINE)
    assert re.search(r"^shard +us$", printed[-1], re.MULTILINE)
    assert "as the shard has it:" in printed[-1]
    title = "Taking keys out of service"
    offline, sessions, online = await run_all(run, title)
    assert "offline" in offline
    assert sessions.splitlines()[0].split()[0] == "shard"
    assert "online" in online


@pytest.mark.slow
async def test_the_commands_of_the_document_move_a_tenant_with_its_rows(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(psql_path().parent), prepend=":")
    run = within(stores, tmp_path)
    await to_a_catalogue(run, tmp_path)
    script, _ = re.findall(r"```sh\n(.*?)```", MOVING.read_text(), re.DOTALL)
    (tmp_path / "copy-tenant.sh").write_text(script)
    table = "create table orders (customer int, number int)"
    for name in SHARD_NAMES:
        stores.execute(name, table, role=stores.roles.admin)
    stores.execute(
        "one",
        "insert into orders select c, n from generate_series(199, 201) c, generate_series(1, 5) n",
    )
    stores.execute("two", "insert into orders values (200, 99)")  # an interrupted copy's
    _, _, moved, looked_up, verified = await run_all(run, "Move a tenant", MOVING)
    assert re.search(r"^200 +201 +us +online|\[200, 201\)", moved, re.MULTILINE)
    assert re.search(r"^shard +us$", looked_up, re.MULTILINE)
    assert verified
    count = "select string_agg(number::text, ' ' order by number) from orders where customer = {}"
    assert stores.execute("two", count.format(200)) == "1 2 3 4 5"
    assert stores.execute("one", count.format(199)) == "1 2 3 4 5"
    assert stores.execute("two", count.format(199)) == ""
    out_of_service = await run_all(run, "Take a shard out of service", MOVING)
    assert len(out_of_service) == 2
    assert len(await run_all(run, "What a pending operation means", MOVING)) == 2


@pytest.mark.slow
async def test_the_commands_of_the_document_make_a_catalogue_anew(
    stores: Stores, tmp_path: Path
) -> None:
    run = within(stores, tmp_path)
    await to_a_catalogue(run, tmp_path)
    title = "After the catalogue was lost"
    before = await run(["shards", "show", "--json"])
    stores.execute(MAP, "drop schema shardmap cascade")
    await run_all(run, title, MOVING)
    after = await run(["shards", "show", "--json"])
    assert [shown(row) for row in json.loads(after)["mappings"]] == [
        shown(row) for row in json.loads(before)["mappings"]
    ]
    await run_all(run, "After a restore", MOVING)


def shown(mapping: dict[str, object]) -> list[object]:
    return [mapping[name] for name in ("low", "high", "shard", "status")]


def test_each_alert_of_a_map_has_a_runbook_and_each_kind_a_row() -> None:
    text = MOVING.read_text()
    rules = (DOCUMENT.parents[1] / "deploy" / "prometheus" / "alerts.yaml").read_text()
    for alert in re.findall(r"alert: (LakebaseProxy(?:Feed|Shard|Operation)\w+)", rules):
        assert f"### {alert}\n" in text
    states = chapter_of("What a pending operation means", MOVING)
    for kind in KINDS.values():
        assert f"`{kind.kind}`" in states or kind.kind == "move"
        for step in kind.steps[:-1]:
            assert f"`{step.name}`" in states, (kind.kind, step.name)
