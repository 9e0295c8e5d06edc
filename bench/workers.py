"""Two workers beside one: what a transaction costs if two processes share the sessions.

`listen.workers` may cost memory, but not CPU per transaction. How evenly the sessions are spread is
seen from the sockets that each process has while many sessions are open.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from bench import pgbench
from bench.connect_time import open_session
from bench.errors import BenchError
from bench.measurements import Measurements, Quantity
from bench.pgbench import Load
from bench.postgres import Postgres
from bench.process_usage import open_sockets
from bench.systems import PROXY, StartSystem, System
from proxy.config import settings_keys

KEY: Final = "listen.workers"
MISSING: Final = f"workers: skipped, this proxy has no {KEY}"
CASE: Final = "workers"
_PROTOCOLS: Final = ("simple", "prepared")
_CLIENTS: Final = 8
_SESSIONS: Final = 400


StartWorkers = Callable[[int], StartSystem]


def available() -> bool:
    """Whether this proxy can have more than one worker."""
    return any(key.dotted == KEY for key in settings_keys())


def measure(
    start: StartWorkers, rounds: int, seconds: float, upstream: Postgres, measurements: Measurements
) -> None:
    """Compare one worker with two, round by round; record the spread of two. Raises BenchError."""
    loads = [Load(protocol, _CLIENTS, seconds) for protocol in _PROTOCOLS]
    with ExitStack() as stack:
        one, two = (stack.enter_context(start(workers)()) for workers in (1, 2))
        if len(two.pids) < 2:
            raise BenchError(f"{KEY} = 2 started no worker process")
        for number in range(rounds):
            for load in loads:
                _compare(load, (one, two), upstream, measurements, reverse=number % 2 == 1)
        measurements.add(
            PROXY,
            Quantity(CASE, "sessions of the least even worker", "% off"),
            _unevenness_percent(two),
        )


def _compare(
    load: Load,
    systems: tuple[System, System],
    upstream: Postgres,
    measurements: Measurements,
    *,
    reverse: bool,
) -> None:
    order = (1, 0) if reverse else (0, 1)
    windows = {index: pgbench.run(load, systems[index], upstream) for index in order}
    for index in (0, 1):
        window, count = windows[index], f"{index + 1} worker{'s' * index}"
        assert window.cpu is not None
        cost = window.cpu.total / len(window.latencies) * 1e6
        case = f"{CASE}, {load.case}"
        measurements.add(PROXY, Quantity(case, f"throughput, {count}", "TPS"), window.throughput)
        measurements.add(PROXY, Quantity(case, f"CPU, {count}", "us/transaction"), cost)


def _unevenness_percent(system: System) -> float:
    """Return how unevenly sessions are spread, in per cent of an even share.

    A process without any session, such as the supervisor, is not counted.
    """
    before = [open_sockets(pid) for pid in system.pids]
    with ExitStack() as stack:
        for _ in range(_SESSIONS):
            stack.callback(open_session(system).finish)
        after = [open_sockets(pid) for pid in system.pids]
    grown = [more - less for more, less in zip(after, before, strict=True)]
    return unevenness([count for count in grown if count > len(system.pids)])


def unevenness(counts: list[int]) -> float:
    """Return the largest distance from the mean, in per cent of it. Raises BenchError for none."""
    if not counts:
        raise BenchError("no process has the sessions")
    even = sum(counts) / len(counts)
    return max(abs(count - even) for count in counts) / even * 100
