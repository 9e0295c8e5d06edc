"""The same key by both ways reaches the same shard through a pool, from five ordinary drivers.

A program gets the proxy's port, and for each of two keys the URL that `resolve --url` prints. It
opens a session for each key by each of the two ways that every driver has, and by the URL, and
prints the shard that the session finds itself on. `tests/clients` has more drivers, without a pool.
"""

import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.cli import main
from proxy.emulator.lakebase import Lakebase
from proxy.exit_codes import EXIT_OK
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.packaging.manifests import ROOT
from tests.support.languages import (
    GO_ENVIRONMENT,
    GO_IS_THERE,
    GO_RUN,
    JDBC,
    SETTINGS_IN_ANY_ORDER,
    Language,
    need_driver,
    place,
)
from tests.support.pooling import SESSION_MODE, states, taken
from tests.support.proxy_process import run_to_end
from tests.support.running import eventually, proxy_values, toml
from tests.support.sharding import sharded

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# options, database name, URL; then the same for the other key.
EXPECTED = ["one", "one", "one", "two", "two", "two"]

PSYCOPG = """
import sys
import psycopg

where = f"host=127.0.0.1 port={sys.argv[1]} user=application "
for key, url in zip(("7", "1500"), sys.argv[2:]):
    options, name = f"dbname=app options='-c shard_key={key}'", f"dbname=app@{key}"
    for text in (where + options, where + name, url):
        with psycopg.connect(text) as connection:
            print(connection.execute("SELECT name FROM shard_identity").fetchone()[0])
"""

ASYNCPG = """
import asyncio
import sys
import asyncpg

async def main():
    where = {"host": "127.0.0.1", "port": int(sys.argv[1]), "user": "application"}
    for key, url in zip(("7", "1500"), sys.argv[2:]):
        for arguments in (
            {**where, "database": "app", "server_settings": {"shard_key": key}},
            {**where, "database": f"app@{key}"},
            {"dsn": url},
        ):
            connection = await asyncpg.connect(**arguments)
            print(await connection.fetchval("SELECT name FROM shard_identity"))
            await connection.close()

asyncio.run(main())
"""

NODE = """
const { Client } = require("pg");

(async () => {
  const where = { host: "127.0.0.1", port: Number(process.argv[2]), user: "application" };
  for (const [index, key] of ["7", "1500"].entries()) {
    for (const more of [
      { ...where, database: "app", options: `-c shard_key=${key}` },
      { ...where, database: `app@${key}` },
      { connectionString: process.argv[3 + index] },
    ]) {
      const client = new Client(more);
      await client.connect();
      console.log((await client.query("SELECT name FROM shard_identity")).rows[0].name);
      await client.end();
    }
  }
})();
"""

JAVA = """
import java.sql.DriverManager;

class Main {
    public static void main(String[] arguments) throws Exception {
        var where = "jdbc:postgresql://127.0.0.1:" + arguments[0];
        var user = "user=application&sslmode=disable";
        for (var index = 1; index < arguments.length; index++) {
            var key = new String[] {"7", "1500"}[index - 1];
            // JDBC has no user before the host.
            var printed = "jdbc:" + arguments[index].replace("app@", "") + "&user=application";
            for (var url : new String[] {
                where + "/app?options=-c%20shard_key=" + key + "&" + user,
                where + "/app%40" + key + "?" + user,
                printed
            }) {
                try (var connection = DriverManager.getConnection(url);
                        var rows = connection.createStatement()
                                .executeQuery("SELECT name FROM shard_identity")) {
                    rows.next();
                    System.out.println(rows.getString(1));
                }
            }
        }
    }
}
"""

GO = """
package main

import (
	"database/sql"
	"fmt"
	"os"

	_ "github.com/lib/pq"
)

func main() {
	where := "host=127.0.0.1 user=application sslmode=disable port=" + os.Args[1]
	for index, key := range []string{"7", "1500"} {
		for _, text := range []string{
			where + " dbname=app options='-c shard_key=" + key + "'",
			where + " dbname=app@" + key,
			os.Args[2+index],
		} {
			db, err := sql.Open("postgres", text)
			if err != nil {
				panic(err)
			}
			var name string
			if err := db.QueryRow("SELECT name FROM shard_identity").Scan(&name); err != nil {
				panic(err)
			}
			fmt.Println(name)
			db.Close()
		}
	}
}
"""


# Two tenants on two shards, the first one again, and one without a mapping.
ASK_POOLS = """
(async () => {
  for (const tenant of [7, 1500, 7]) {
    const { rows } = await poolOf(tenant).query("SELECT name FROM shard_identity");
    console.log(rows[0].name);
  }
  await poolOf(-7).query("SELECT 1").catch((error) => console.log(error.code));
  for (const pool of pools.values()) await pool.end();
})();
"""
DOCUMENT = (ROOT / "docs" / "languages.md").read_text()


def url_of(key: str, proxy: App, lakebase: Lakebase, directory: Path) -> str:
    """Return the URL that `resolve --url` prints where this proxy serves."""
    file = directory / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, sharded(lakebase))))
    where = ("--listen.host", proxy.listen_host, "--listen.port", str(proxy.listen_port))
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["resolve", "--url", key, "--config", str(file), *where]) == EXIT_OK
    return printed.getvalue().strip()


LANGUAGES = {
    "psycopg": Language(PSYCOPG, "main.py", (sys.executable,)),
    "asyncpg": Language(ASYNCPG, "main.py", (sys.executable,)),
    "node": Language(NODE, "main.js", ("node",), ("node", "-e", "require('pg')")),
    "java": Language(JAVA, "Main.java", ("java", "-cp", str(JDBC)), ("test", "-f", str(JDBC))),
    "go": Language(GO, "main.go", GO_RUN, GO_IS_THERE, GO_ENVIRONMENT),
}


async def test_s15_the_pools_of_the_document_reach_their_shards(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path
) -> None:
    chapter = DOCUMENT.partition("### A pool for each key\n")[2]
    (code,) = re.findall(r"```js\n(.*?)```", chapter, re.DOTALL)
    language = replace(LANGUAGES["node"], program=code + ASK_POOLS)
    await need_driver("the pool for each key in Node", language)
    proxy = await start_proxy(**sharded(lakebase))
    language = replace(language, program=language.program.replace("5432", str(proxy.listen_port)))
    code_of_end, out, err = await run_to_end(*place(language, tmp_path))
    assert code_of_end == 0, err
    assert out.split() == ["one", "two", "one", "3D000"]


@pytest.mark.parametrize("name", list(LANGUAGES))
async def test_s15_the_same_key_by_both_ways_reaches_the_same_shard(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path, name: str
) -> None:
    language = LANGUAGES[name]
    await need_driver(f"shard keys from {name}", language)
    proxy = await start_proxy(**sharded(lakebase), upstream=SESSION_MODE)
    urls = [url_of(key, proxy, lakebase, tmp_path) for key in ("7", "1500")]
    command = place(language, tmp_path, str(proxy.listen_port), *urls)
    for _ in range(2):  # the second one in the sessions of the first
        code, out, err = await run_to_end(*command, environment=language.environment)
        assert code == 0, err
        assert out.split() == EXPECTED
        await eventually(lambda: proxy.metrics.value("connections") == 0, "all have left")
        await eventually(lambda: set(states(proxy)) <= {"idle"}, "their sessions are kept")
    hosts = {lakebase[shard].endpoint.host for shard in EXPECTED}
    assert {record.sni for record in lakebase.gateway.sessions} == hosts
    if name != SETTINGS_IN_ANY_ORDER:
        assert taken(proxy)["reused"] >= len(hosts)
