"""Polite closes by seven kinds of clients: each is a completed session, and none is lost.

A driver sends Terminate, and then closes at once or waits until the server has closed. Everything
is real: the drivers, the proxy as a process of its own, TLS, PostgreSQL; what is counted is read
from `/metrics`. For: `make closes`, and less of the same in the suite. Not for: clients that
disappear (`tests/e2e/test_ends.py`).
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from proxy.emulator.lakebase import Lakebase
from tests.support.admin_address import ask, metrics_once
from tests.support.languages import (
    GO_ENVIRONMENT,
    GO_IS_THERE,
    GO_RUN,
    JDBC,
    Language,
    lacks_driver,
    place,
)
from tests.support.proxy_process import ProxyProcess, run_to_end, started_process
from tests.support.running import proxy_values, psql_path, toml

CLOSES: Final = 1_000
PROCESSES: Final = 4  # of one client at a time
SECONDS_MAX: Final = 900.0  # for all closes of one client
COMPLETED: Final = ("completed", "client_closed")

# Each program gets a port and how many times it connects, asks something and closes.
_PSQL = """
for number in $(seq "$2"); do
  "$PSQL" -X -At -o /dev/null -c "SELECT 1" \\
    "host=127.0.0.1 port=$1 dbname=databricks_postgres user=application" || exit 1
done
"""
_PSYCOPG = """
import sys
import psycopg

where = f"host=127.0.0.1 port={sys.argv[1]} dbname=databricks_postgres user=application"
for _ in range(int(sys.argv[2])):
    connection = psycopg.connect(where)
    connection.execute("SELECT 1").fetchone()
    connection.close()
"""
_ASYNCPG = """
import asyncio
import sys
import asyncpg

async def main():
    where = {"host": "127.0.0.1", "port": int(sys.argv[1]), "user": "application"}
    for _ in range(int(sys.argv[2])):
        connection = await asyncpg.connect(**where, database="databricks_postgres")
        await connection.fetchval("SELECT 1")
        await connection.close()

asyncio.run(main())
"""
_PG8000 = """
import sys
import pg8000.native

where = {"host": "127.0.0.1", "port": int(sys.argv[1]), "database": "databricks_postgres"}
for _ in range(int(sys.argv[2])):
    connection = pg8000.native.Connection("application", **where)
    connection.run("SELECT 1")
    connection.close()
"""
_NODE = """
const { Client } = require("pg");

(async () => {
  const where = { host: "127.0.0.1", port: Number(process.argv[2]), user: "application" };
  for (let number = 0; number < Number(process.argv[3]); number++) {
    const client = new Client({ ...where, database: "databricks_postgres" });
    await client.connect();
    await client.query("SELECT 1");
    await client.end();
  }
})();
"""
_JAVA = """
import java.sql.DriverManager;

class Main {
    public static void main(String[] arguments) throws Exception {
        var url = "jdbc:postgresql://127.0.0.1:" + arguments[0]
                + "/databricks_postgres?user=application&sslmode=disable";
        for (int number = 0; number < Integer.parseInt(arguments[1]); number++) {
            try (var connection = DriverManager.getConnection(url);
                    var rows = connection.createStatement().executeQuery("SELECT 1")) {
                rows.next();
            }
        }
    }
}
"""
_GO = """
package main

import (
	"database/sql"
	"os"
	"strconv"

	_ "github.com/lib/pq"
)

func main() {
	where := "host=127.0.0.1 dbname=databricks_postgres user=application sslmode=disable port="
	count, _ := strconv.Atoi(os.Args[2])
	for number := 0; number < count; number++ {
		db, err := sql.Open("postgres", where+os.Args[1])
		if err != nil {
			panic(err)
		}
		var one int
		if err := db.QueryRow("SELECT 1").Scan(&one); err != nil {
			panic(err)
		}
		db.Close()
	}
}
"""
CLIENTS: Final[Mapping[str, Language]] = {
    "psql": Language(_PSQL, "main.sh", ("sh",), environment={"PSQL": str(psql_path())}),
    "psycopg": Language(_PSYCOPG, "main.py", (sys.executable,)),
    "asyncpg": Language(_ASYNCPG, "main.py", (sys.executable,)),
    "pg8000": Language(
        _PG8000, "main.py", (sys.executable,), (sys.executable, "-c", "import pg8000")
    ),
    "node-postgres": Language(_NODE, "main.js", ("node",), ("node", "-e", "require('pg')")),
    "pgjdbc": Language(_JAVA, "Main.java", ("java", "-cp", str(JDBC)), ("test", "-f", str(JDBC))),
    "lib/pq": Language(_GO, "main.go", GO_RUN, GO_IS_THERE, GO_ENVIRONMENT),
}

Ends = Counter[tuple[str, str]]
"""How many sessions ended, by outcome and reason."""


@dataclass(frozen=True, slots=True)
class Closes:
    """What the proxy counted for one client."""

    ends: Ends
    seconds: float

    def __str__(self) -> str:
        counted = ", ".join(f"{n:,} {' '.join(how)}" for how, n in sorted(self.ends.items()))
        return f"{counted} in {self.seconds:.0f} s"


async def close_politely(
    client: Language, proxy: ProxyProcess, directory: Path, closes: int, processes: int = PROCESSES
) -> Closes:
    """Return what the proxy counts while a client connects and closes so many times."""
    port = int(proxy.events("serving")[0]["admin_port"])
    before = _ends((await ask(port, "/metrics")).body.decode())
    began = time.monotonic()
    command = place(client, directory, str(proxy.listen_port))
    async with asyncio.TaskGroup() as running:
        for first in range(processes):
            number = len(range(first, closes, processes))
            running.create_task(_run(client, *command, str(number)))
    seconds = time.monotonic() - began
    # A session is counted when its upstream has closed too, and that may be after its client.
    after = await metrics_once(port, lambda text: "\nlakebase_proxy_connections 0.0\n" in text)
    return Closes(_ends(after) - before, seconds)


async def _run(client: Language, *command: str) -> None:
    environment = client.environment
    code, _, err = await run_to_end(*command, environment=environment, seconds_max=SECONDS_MAX)
    assert code == 0, err


def _ends(text: str) -> Ends:
    """Return the sessions that have ended."""
    return Ends(
        {
            (sample.labels["outcome"], sample.labels["reason"]): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "lakebase_proxy_sessions_ended_total"
        }
    )


async def soak(closes: int, clients: list[str]) -> bool:
    """Print a line for each client; return whether all closes of all of them were completed."""
    completed = True
    with tempfile.TemporaryDirectory() as directory:
        async with Lakebase() as lakebase:
            file = Path(directory) / "proxy.toml"
            admin = {"enabled": True, "port": 0}
            file.write_text(toml(proxy_values(lakebase, {"admin": admin})))
            async with started_process("run", "--config", str(file)) as proxy:
                await proxy.serving()
                for name in clients:
                    if missing := await lacks_driver(CLIENTS[name]):
                        sys.stdout.write(f"{name}: NOT RUN: {missing}\n")
                        continue
                    done = await close_politely(CLIENTS[name], proxy, Path(directory), closes)
                    sys.stdout.write(f"{name}: {done}\n")
                    sys.stdout.flush()
                    completed = completed and done.ends == Ends({COMPLETED: closes})
    return completed


def main() -> int:
    """Run as `python -m tests.soak.polite_closes`; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--closes", type=int, default=CLOSES)
    parser.add_argument("--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    options = parser.parse_args()
    return 0 if uvloop.run(soak(options.closes, options.clients)) else 1


if __name__ == "__main__":
    sys.exit(main())
