"""What docs/pooling.md says is so: its commands as they are printed, and its policies.

A person's copy differs in the port alone, and so does the test's.
"""

import re
import shlex
import sys
import tomllib
from typing import Any

import psycopg
import pytest

from proxy.config import UpstreamSettings
from proxy.pool.pool_counts import RetireReason
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.packaging.manifests import ROOT
from tests.support.proxy_process import run_to_end
from tests.support.running import eventually, libpq, psql_path

pytestmark = pytest.mark.e2e

DOCUMENT = (ROOT / "docs" / "pooling.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]


async def pasted(proxy: App, command: str) -> str:
    """Return what a command prints that succeeds."""
    assert proxy.admin is not None
    words = [shlex.quote(str(psql_path())), f"{shlex.quote(sys.executable)} -m proxy"]
    for name, program in zip(("psql", "lakebase-auth-proxy"), words, strict=True):
        command = re.sub(rf"^{name}\b", program.replace("\\", r"\\"), command)
    command = command.replace("host=localhost", f"host=127.0.0.1 port={proxy.listen_port}")
    environment = {"LAKEBASE_PROXY_ADMIN__PORT": str(proxy.admin.port)}
    code, out, err = await run_to_end("sh", "-c", command, environment=environment)
    assert (code, err) == (0, ""), command
    return out.strip()


async def started(start_proxy: StartProxy) -> App:
    """Start a proxy with the document's settings, and no session but those of clients."""
    (written,) = blocks("toml")
    sections = tomllib.loads(written)
    sections["upstream"]["pool_spare_min"] = 0
    return await start_proxy(**sections, admin={"enabled": True, "port": 0})


@pytest.mark.slow
async def test_the_commands_do_what_the_document_says(start_proxy: StartProxy) -> None:
    proxy = await started(start_proxy)
    first, second, reconnect, own = commands()
    one = await pasted(proxy, first)
    assert await pasted(proxy, second) == one
    assert await pasted(proxy, own) != one
    assert await pasted(proxy, second) == one
    assert await pasted(proxy, reconnect) == ""
    assert await pasted(proxy, second) != one


async def connect(proxy: App, database: str) -> psycopg.AsyncConnection[tuple[Any, ...]]:
    where = libpq(proxy, dbname=database)
    return await psycopg.AsyncConnection.connect(**where, autocommit=True)


async def test_p27_a_policy_fails_on_a_reused_session_unless_written_with_nullif(
    start_proxy: StartProxy, scratch_database: str
) -> None:
    proxy = await started(start_proxy)
    wrong, right = blocks("sql")
    rows = "SELECT count(*), pg_backend_pid() FROM orders"
    seen = []

    async def is_idle() -> None:
        await eventually(lambda: proxy.metrics.value("pool_sessions", state="idle"), "it is kept")

    async with await connect(proxy, scratch_database) as client:
        await client.execute("CREATE TABLE orders AS SELECT 7 AS tenant")
        await client.execute("ALTER TABLE orders ENABLE ROW LEVEL SECURITY")
        await client.execute("ALTER TABLE orders FORCE ROW LEVEL SECURITY")
        await client.execute(wrong)
        seen.append(await (await client.execute(rows)).fetchone())
    await is_idle()
    async with await connect(proxy, scratch_database) as client:
        await client.execute("SET app.tenant = '7'")
        seen.append(await (await client.execute(rows)).fetchone())
    await is_idle()
    async with await connect(proxy, scratch_database) as client:
        with pytest.raises(psycopg.errors.InvalidTextRepresentation, match='type integer: ""'):
            await client.execute(rows)
        await client.execute("DROP POLICY tenant ON orders")
        await client.execute(right)
        seen.append(await (await client.execute(rows)).fetchone())
        await client.execute("SET app.tenant = '7'")
        seen.append(await (await client.execute(rows)).fetchone())
    pids = {row[1] for row in seen if row is not None}
    assert ([row and row[0] for row in seen], len(pids)) == ([0, 1, 0, 1], 1)
    await proxy.reconnect()  # the database is dropped next


def test_every_reason_for_closing_a_session_is_explained() -> None:
    section = DOCUMENT.partition("counts the sessions that were closed")[2]
    words = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(words))) == set(RetireReason)


def test_the_defaults_that_the_document_names_are_those_of_the_settings() -> None:
    settings = UpstreamSettings()
    named = re.findall(r"`upstream\.(pool_\w+)`\s+\((\d+)(?: (minutes)|: no bound)?\)", DOCUMENT)
    assert len(named) >= 5
    for key, number, unit in named:
        assert getattr(settings, key) == int(number) * (60 if unit else 1), key
