"""What an admission adds to opening a session: `python -m bench.catalogue_opening`.

PostgreSQL with its own TLS, which asks for a password in clear, as Lakebase does; catalogue and
shard are two databases of it. A proxy that validates and one that does not open sessions in turns.
`--base CHECKOUT` adds both of another checkout. The CPU time is the proxy's own.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
import uvloop

from bench.child_processes import LOOPBACK, ChildProcess, child, run
from bench.launch import installed_in
from bench.postgres import HOST, Postgres, postgres
from bench.process_usage import cpu_time
from tests.support.running import toml

_ROUNDS: Final = 5
_OPENED_EACH_ROUND: Final = 100
_WARM_UP: Final = 20
_PAUSE_SECONDS: Final = 0.005
_OPEN_SECONDS_MAX: Final = 60.0
_VERB_SECONDS_MAX: Final = 60.0
_PASSWORD: Final = "not-a-real-password"  # noqa: S105
_ROLES: Final = ("map_admin", "map_reader", "app_session")
_ADMIN, _READER, _SESSION = _ROLES
_CATALOGUE: Final = "shardmap"
_SHARD: Final = "app"
# Checked at each login: that of a SCRAM verifier would cost as much as a session.
_LOGIN: Final = "hostssl all all 127.0.0.1/32 password\nlocal all all trust\n"
Sections = dict[str, dict[str, object]]


@dataclass(slots=True)
class Opener:
    """One proxy, and the medians of the rounds in milliseconds."""

    name: str
    port: int
    pid: int
    cpu_milliseconds: float = 0.0
    took: list[float] = field(default_factory=list)
    fastest: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)

    async def open(self) -> float:
        """Open a session and return how long that took."""
        began = time.perf_counter()
        connection = await asyncpg.connect(
            host=LOOPBACK,
            port=self.port,
            user="anyone",
            database="app@5",
            ssl=False,
            timeout=_OPEN_SECONDS_MAX,
        )
        seconds = time.perf_counter() - began
        connection.terminate()
        await asyncio.sleep(_PAUSE_SECONDS)
        return seconds * 1e3

    def end_round(self) -> None:
        """Take the round's values."""
        self.medians.append(statistics.median(self.took))
        self.fastest.append(statistics.quantiles(self.took, n=10)[0])
        self.took.clear()


def _settings(server: Postgres, folder: Path, role: str) -> Sections:
    return {
        "listen": {"port": 0},
        "admin": {"enabled": False},
        "credentials": {"password_file": str(folder / "password")},
        "upstream": {
            "user": role,
            "port": server.address.port,
            "database": _SHARD,
            "ssl_root_cert": str(server.address.ca_file),
        },
        "targets.main": {
            "host": HOST,
            "hostaddr": LOOPBACK,
            "database": _CATALOGUE,
            "user": _ADMIN if role == _ADMIN else _READER,
        },
        "catalogue": {"target": "main", "shard_hostaddr": LOOPBACK},
        "routing": {"shard_map": "tenants"},
        "shard_maps.tenants": {"catalogue": True},
        "log": {"format": "json"},
    }


def _write(folder: Path, name: str, sections: Sections) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(toml(sections))
    return path


def _fill(server: Postgres, folder: Path, program: Sequence[str | Path]) -> None:
    """Make roles and databases, and a map with one mapping."""
    for role in _ROLES:
        server.sql(
            f"set password_encryption = 'md5'; create role {role} login password '{_PASSWORD}'",
            database="postgres",
        )
    server.sql(f"grant pg_read_all_stats, pg_signal_backend to {_ADMIN}", database="postgres")
    for database in (_CATALOGUE, _SHARD):
        server.sql(f"create database {database} owner {_ADMIN}", database="postgres")
    data = Path(server.sql("show data_directory", database="postgres").strip())
    (data / "pg_hba.conf").write_text(_LOGIN)
    server.sql("select pg_reload_conf()", database="postgres")
    (folder / "password").write_text(_PASSWORD)
    file = _write(folder, "admin", _settings(server, folder, _ADMIN))
    for words in (
        ("init",),
        ("create", "tenants", "--kind", "range", "--key-type", "int8"),
        ("add-shard", "one", "--host", HOST, "--port", str(server.address.port)),
        ("grant", "reader", _READER),
        ("grant", "session", _SESSION),
        ("add", "0", "1000", "--shard", "one"),
    ):
        command = [*program, "shards", words[0], *words[1:], "--config", file]
        run(command, folder / f"{words[0]}.log", seconds_max=_VERB_SECONDS_MAX)


def _port(started: ChildProcess) -> int | None:
    for line in started.log.read_text(errors="replace").splitlines():
        if line.startswith("{") and (found := json.loads(line))["event"] == "serving":
            return int(found["port"])
    return None


def _opener(stack: ExitStack, name: str, program: Sequence[str | Path], file: Path) -> Opener:
    log = file.with_suffix(f".{name.replace(' ', '-')}.log")
    started = stack.enter_context(child([*program, "run", "--config", file], log))
    started.wait_until(lambda: _port(started) is not None)
    port = _port(started)
    assert port is not None
    return Opener(name, port, started.pid)


async def _measure(openers: Sequence[Opener], rounds: int, opened: int) -> None:
    for opener in openers:
        for _ in range(_WARM_UP):
            await opener.open()
    before = [cpu_time(opener.pid).total for opener in openers]
    for _ in range(rounds):
        for _ in range(opened):
            for opener in openers:
                opener.took.append(await opener.open())
        for opener in openers:
            opener.end_round()
    for opener, began in zip(openers, before, strict=True):
        seconds = cpu_time(opener.pid).total - began
        opener.cpu_milliseconds = seconds * 1e3 / (rounds * opened)


def _print(openers: Sequence[Opener]) -> None:
    sys.stdout.write(f"{f'opening, ms (load {os.getloadavg()[0]:.1f})':<32}")
    sys.stdout.write(f"{'p50':>10}{'fastest tenth':>16}{'CPU':>8}\n")
    for one in openers:
        median, fastest = statistics.median(one.medians), statistics.median(one.fastest)
        sys.stdout.write(f"{one.name:<32}{median:>10.2f}{fastest:>16.2f}")
        sys.stdout.write(f"{one.cpu_milliseconds:>8.2f}\n")
    for one, other in zip(openers[::2], openers[1::2], strict=True):
        ratios = [a / b for a, b in zip(one.medians, other.medians, strict=True)]
        fast = [a / b for a, b in zip(one.fastest, other.fastest, strict=True)]
        what = f"{one.name} / {other.name}"
        sys.stdout.write(f"{what:<32}{statistics.median(ratios):>10.2f}")
        sys.stdout.write(f"{statistics.median(fast):>16.2f}\n")


def measure(rounds: int, opened: int, base: Path | None) -> None:
    """Run the servers and proxies, and print the medians of the rounds."""
    own = [sys.executable, "-m", "proxy"]
    programs: dict[str, Sequence[str | Path]] = (
        {"": own} if base is None else {"": own, "base, ": [installed_in(base)]}
    )
    off: dict[str, object] = {"validate": False, "allow_unvalidated": True}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o711)
        server = stack.enter_context(postgres(folder))
        _fill(server, folder, own)
        settings = _settings(server, folder, _SESSION)
        validated = _write(folder, "validated", settings)
        settings["catalogue"] |= off
        unvalidated = _write(folder, "unvalidated", settings)
        openers = [
            _opener(stack, f"{word}{name}", program, file)
            for word, program in programs.items()
            for name, file in (("validated", validated), ("not validated", unvalidated))
        ]
        uvloop.run(_measure(openers, rounds, opened))
        _print(openers)


def main() -> None:
    """Run as `python -m bench.catalogue_opening`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--opened", type=int, default=_OPENED_EACH_ROUND)
    parser.add_argument("--base", type=Path, metavar="CHECKOUT")
    wanted = parser.parse_args()
    measure(wanted.rounds, wanted.opened, wanted.base)


if __name__ == "__main__":
    main()
