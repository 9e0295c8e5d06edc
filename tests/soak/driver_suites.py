"""Drivers' own test suites, through a proxy without a pool and through one with it.

Each suite runs twice without and twice with a pool, on a new server each time, so that the second
time its connections meet sessions that were used before. A suite expects a server of its own, and
fails here in places; what counts is a test that passes without a pool and does not with it. The
sources are those of the drivers that are installed: `pip download`, or the distribution's package.
For: `make suites`. Not for: the tests that run in CI (`tests/e2e`, `tests/differential`).
"""

import argparse
import asyncio
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import uvloop

from proxy.emulator.cluster import CLIENT_ID, SUPERUSER
from proxy.emulator.lakebase import Lakebase
from tests.support.languages import GO_ENVIRONMENT, GO_IS_THERE
from tests.support.pooling import SESSION_MODE
from tests.support.proxy_process import run_to_end, started_process
from tests.support.running import Listening, proxy_values, toml

SECONDS_MAX: Final = 1200.0  # for one run of one suite
RUNS: Final = 2
MODES: Final[Mapping[str, Mapping[str, object]]] = {"off": {}, "session": SESSION_MODE}
_PYTEST: Final = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-rA",
    "--tb=no",
    "--continue-on-collection-errors",
)
_PASSED: Final = re.compile(r"^(?:PASSED |\s*--- PASS: )(.+?)(?: \(\d.*\))?$", re.MULTILINE)
_FAILED: Final = re.compile(r"^(?:FAILED |ERROR |\s*--- FAIL: )(\S+)", re.MULTILINE)
# They make and drop a database, and that fails while a kept session is in it: docs/pooling.md.
_DROP_DATABASES: Final = ("test_introspection.py", "test_type_cache_invalidation_in_pool")
# SQLAlchemy's suite begins with IF NOT EXISTS; the servers of the tests' wheel have no extensions.
_EXTENSIONS: Final = (
    "INSERT INTO pg_extension VALUES (16001, 'citext', 10, 2200, false, '1.0'),"
    " (16002, 'hstore', 10, 2200, false, '1.0')"
)
_SQLALCHEMY: Final = {
    "conftest.py": "from sqlalchemy.testing.plugin.pytestplugin import *\n",
    "test_suite.py": "from sqlalchemy.testing.suite import *\n",
    "setup.cfg": "[sqla_testing]\n"
    "requirement_cls = sqlalchemy.testing.requirements:SuiteRequirements\n"
    "profile_file = profiles.txt\n",
}


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite: how its sources are placed into a directory, and the command that runs them."""

    place: Callable[[Path], Awaitable[None]]
    command: Callable[[Path, Mapping[str, str]], tuple[str, ...]]
    database: str = "postgres"


async def _from_pip(name: str, folder: str, directory: Path) -> None:
    """Place the tests that a driver's source distribution has."""
    options = ("--quiet", "--no-deps", "--no-binary", name, "--dest", str(directory))
    pip = (sys.executable, "-m", "pip", "download", *options, f"{name}=={version(name)}")
    code, _, err = await run_to_end(*pip, seconds_max=SECONDS_MAX)
    assert code == 0, err
    await asyncio.to_thread(_extract, folder, directory)


def _extract(folder: str, directory: Path) -> None:
    """Extract one folder of the archive in a directory."""
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        for member in sources.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name.startswith(f"{folder}/"):
                sources.extract(member, directory, filter="data")


async def _sqlalchemy(directory: Path) -> None:
    for name, text in _SQLALCHEMY.items():
        (directory / name).write_text(text)


async def _installed(directory: Path) -> None:
    code, _, _ = await run_to_end(*GO_IS_THERE)
    assert code == 0, "Go or lib/pq is missing"


def _asyncpg_command(directory: Path, where: Mapping[str, str]) -> tuple[str, ...]:
    # The one that is left out compares its sources with a style.
    left_out = f"--ignore={directory}/tests/test__sourcecode.py"
    return (*_PYTEST, "--rootdir", str(directory), "-p", "no:asyncio", left_out, str(directory))


def _pg8000_command(directory: Path, where: Mapping[str, str]) -> tuple[str, ...]:
    folders = [f"{directory}/test/{name}" for name in ("native", "dbapi")]
    left_out = [f"--ignore={folder}/auth" for folder in folders]
    return (*_PYTEST, "--rootdir", str(directory), *left_out, *folders)


def _sqlalchemy_command(directory: Path, where: Mapping[str, str]) -> tuple[str, ...]:
    address = f"{where['PGUSER']}@{where['PGHOST']}:{where['PGPORT']}/{where['PGDATABASE']}"
    options = ("--dburi", f"postgresql+psycopg://{address}", "-c", str(directory / "setup.cfg"))
    return (*_PYTEST, *options, "--rootdir", str(directory), str(directory))


def _go_command(directory: Path, where: Mapping[str, str]) -> tuple[str, ...]:
    # lib/pq panics where the first is set.
    return ("env", "-u", "PGSERVICEFILE", "go", "test", "-v", "-count=1", "github.com/lib/pq")


SUITES: Final[Mapping[str, Suite]] = {
    "asyncpg": Suite(partial(_from_pip, "asyncpg", "tests"), _asyncpg_command),
    "pg8000": Suite(partial(_from_pip, "pg8000", "test"), _pg8000_command),
    "SQLAlchemy with psycopg": Suite(_sqlalchemy, _sqlalchemy_command),
    "lib/pq": Suite(_installed, _go_command, "pqgotest"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a suite gave."""

    passed: frozenset[str]
    failed: frozenset[str]
    seconds: float

    def __str__(self) -> str:
        return f"{len(self.passed)} passed, {len(self.failed)} failed in {self.seconds:.0f} s"


async def run(suite: Suite, directory: Path, proxy: Listening) -> Run:
    """Run a suite once."""
    where = {"PGHOST": proxy.listen_host, "PGPORT": str(proxy.listen_port), "PGSSLMODE": "disable"}
    where |= {"PGUSER": SUPERUSER, "PGDATABASE": suite.database, "PGPASSWORD": "none"}
    command = suite.command(directory, where)
    began = time.monotonic()
    _, out, err = await run_to_end(
        *command, environment={**where, **GO_ENVIRONMENT}, seconds_max=SECONDS_MAX
    )
    passed, failed = frozenset(_PASSED.findall(out)), frozenset(_FAILED.findall(out))
    assert passed, out + err
    return Run(passed - failed, failed, time.monotonic() - began)


async def runs(name: str, directory: Path, mode: str) -> tuple[Run, ...]:
    """Run a suite twice, on a new server; print a line for each."""
    async with Lakebase(("one",)) as lakebase:
        shard = lakebase.shards[0]
        shard.endpoint.members[SUPERUSER] = {CLIENT_ID}
        shard.endpoint.passes_real_key = True
        for sql in ("CREATE DATABASE pqgotest", "CREATE SCHEMA test_schema", _EXTENSIONS):
            shard.cluster.execute(sql, database="postgres")
        file = directory / "proxy.toml"
        keys = {"user": SUPERUSER, **MODES[mode]}
        file.write_text(toml(proxy_values(lakebase, {"upstream": keys})))
        done = []
        async with started_process("run", "--config", str(file)) as proxy:
            await proxy.serving()
            for number in range(1, RUNS + 1):
                done.append(one := await run(SUITES[name], directory, proxy))
                sys.stdout.write(f"{name}, {mode}, run {number}: {one}\n")
                sys.stdout.flush()
        return tuple(done)


async def compare(name: str) -> bool:
    """Print what a suite gave; return whether all passes with a pool that passes without one."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        await SUITES[name].place(directory)
        off, pooled = [await runs(name, directory, mode) for mode in MODES]
    lost: set[str] = set()
    for one, other in zip(off, pooled, strict=True):
        lost |= one.passed - other.passed
    expected = {test for test in lost if any(name in test for name in _DROP_DATABASES)}
    sys.stdout.write(f"{name}: {len(lost)} lost, {len(expected)} of them drop a database\n")
    sys.stdout.writelines(f"  LOST: {test}\n" for test in sorted(lost - expected))
    return lost == expected


async def compare_all(names: list[str]) -> bool:
    """Compare one suite after the other."""
    return all([await compare(name) for name in names])


def main() -> int:
    """Run as `python -m tests.soak.driver_suites`; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    options = parser.parse_args()
    return 0 if uvloop.run(compare_all(options.suites)) else 1


if __name__ == "__main__":
    sys.exit(main())
