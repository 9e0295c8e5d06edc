"""Listing 10,000 sessions while others work: `python -m bench.session_list`.

One proxy holds 10,000 idle sessions to a scripted upstream, while pgbench works through it on a
real server. Measures pgbench's p99 in three cases, interleaved: nothing is listed; `status
--sessions` lists all of them once within the run; and `--watch` lists them again and again. All
share the machine, which pgbench keeps busy. The proxy needs 20,000 open files and some more.
"""

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench import pgbench
from bench.child_processes import LOOPBACK, child
from bench.connect_time import open_session
from bench.errors import BenchError
from bench.idle_upstream import idle_upstream
from bench.launch import local_parameters, serving_line
from bench.measurements import percentile
from bench.pgbench import Load
from bench.postgres import HOST, Postgres, postgres
from bench.systems import PROXY, System
from proxy.emulator.cluster import CLIENT_ID, DATABASE
from tests.support.running import toml

_SESSIONS: Final = 10_000
_LOAD: Final = Load("simple", 8, 30.0)
_NOT_LISTED: Final = "not listed"
_ONCE: Final = "listed once"
_PROGRAM: Final = [sys.executable, "-m", "proxy"]


def _write_settings(server: Postgres, idle_port: int, folder: Path, sessions: int) -> Path:
    target = {"host": HOST, "hostaddr": LOOPBACK, "database": DATABASE, "user": CLIENT_ID}
    mappings = [
        {"low": low, "high": low + 10, "target": name} for low, name in ((0, "real"), (10, "idle"))
    ]
    (folder / "password").write_text("not-a-real-password")
    sections: dict[str, dict[str, object]] = {
        "listen": {"port": 0, "max_connections": sessions + 100},
        "admin": {"port": 0},
        "credentials": {"password_file": str(folder / "password")},
        "upstream": {"ssl_root_cert": str(server.address.ca_file)},
        "targets.real": target | {"port": server.address.port},
        "targets.idle": target | {"port": idle_port},
        "routing": {"shard_map": "tenants"},
        "shard_maps.tenants": {"kind": "range", "key_type": "int8", "mappings": mappings},
        "log": {"format": "json"},
    }
    file = folder / "proxy.toml"
    file.write_text(toml(sections))
    return file


def _with_key(port: int, key: int) -> System:
    return System(PROXY, local_parameters(port) | {"options": f"-c shard_key={key}"})


def measure(rounds: int, sessions: int) -> None:
    """Measure and print. Raises BenchError."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o711)
        server = stack.enter_context(postgres(folder))
        idle = stack.enter_context(idle_upstream(server, folder))
        file = _write_settings(server, idle.port, folder, sessions)
        proxy = stack.enter_context(
            child([*_PROGRAM, "run", "--config", file], folder / "proxy.log")
        )
        proxy.wait_until(lambda: serving_line(proxy) is not None)
        line = serving_line(proxy) or {}
        port, admin = int(line["port"]), str(line["admin_port"])
        for _ in range(sessions):
            stack.callback(open_session(_with_key(port, 10)).finish)
        status = [*_PROGRAM, "status", "--sessions", "--admin.port", admin]
        cases = {_NOT_LISTED: None, _ONCE: status, "without end": [*status, "--watch"]}
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, command in cases.items():
                with ExitStack() as case:
                    log = folder / "listing.log"
                    listing = case.enter_context(child(command, log)) if command else None
                    window = pgbench.run(_LOAD, _with_key(port, 0), server)
                    if listing is not None and name == _ONCE and listing.process.poll() != 0:
                        raise BenchError(f"not listed within the run:\n{listing.tail()}")
                found[name].append(percentile(window.latencies, 0.99) * 1e3)
                sys.stdout.write(f"{name:<12} p99 {found[name][-1]:.2f} ms")
                sys.stdout.write(f"   (load {os.getloadavg()[0]:.1f})\n")
    base = statistics.median(found[_NOT_LISTED])
    for name, values in found.items():
        median = statistics.median(values)
        sys.stdout.write(f"{name:<12} median of {rounds}: {median:.2f} ms, {median / base:.2f} x\n")


def main() -> None:
    """Run as `python -m bench.session_list`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sessions", type=int, default=_SESSIONS)
    wanted = parser.parse_args()
    measure(wanted.rounds, wanted.sessions)


if __name__ == "__main__":
    main()
