"""Two workers beside one: what a transaction costs when two processes share the sessions.

`listen.workers` is to be had for the price of memory, not of CPU a transaction. How even the spread
is follows from the sockets that each process holds while many sessions are open.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from bench import queries
from bench.accounting import open_sockets
from bench.errors import BenchError
from bench.postgres import Postgres
from bench.queries import Load
from bench.readings import Quantity, Readings
from bench.sessions import open_session
from bench.systems import PROXY, Contender, Start
from proxy.config import settings_keys

KEY: Final = "listen.workers"
MISSING: Final = f"workers: skipped, this proxy has no {KEY}"
CASE: Final = "workers"
_PROTOCOLS: Final = ("simple", "prepared")
_CLIENTS: Final = 8
_SESSIONS: Final = 400


StartWorkers = Callable[[int], Start]


def available() -> bool:
    """Whether this proxy can have more than one."""
    return any(key.dotted == KEY for key in settings_keys())


def measure(
    start: StartWorkers, rounds: int, seconds: float, upstream: Postgres, readings: Readings
) -> None:
    """Compare one with two in as many rounds, and keep the spread of two. Raises BenchError."""
    loads = [Load(protocol, _CLIENTS, seconds) for protocol in _PROTOCOLS]
    with ExitStack() as stack:
        one, two = (stack.enter_context(start(workers)()) for workers in (1, 2))
        if len(two.pids) < 2:
            raise BenchError(f"{KEY} = 2 made no process of its own")
        for number in range(rounds):
            for load in loads:
                _compare(load, (one, two), upstream, readings, turned=number % 2 == 1)
        readings.add(
            PROXY, Quantity(CASE, "sessions of the least even worker", "% off"), _spread(two)
        )


def _compare(
    load: Load,
    contenders: tuple[Contender, Contender],
    upstream: Postgres,
    readings: Readings,
    *,
    turned: bool,
) -> None:
    order = (1, 0) if turned else (0, 1)
    seen = {index: queries.observe(load, contenders[index], upstream) for index in order}
    costs = []
    for index in (0, 1):
        window, count = seen[index], f"{index + 1} worker{'s' * index}"
        assert window.cpu is not None
        costs.append(window.cpu.total / len(window.latencies) * 1e6)
        case = f"{CASE}, {load.case}"
        readings.add(PROXY, Quantity(case, f"throughput, {count}", "TPS"), window.throughput)
        readings.add(PROXY, Quantity(case, f"CPU, {count}", "us/transaction"), costs[index])
    ratio = Quantity(f"{CASE}, {load.case}", "CPU, 2 workers / 1", "")
    readings.add(PROXY, ratio, costs[1] / costs[0])


def _spread(contender: Contender) -> float:
    """Return how far from even the sessions are spread, in per cent of an even share.

    A process that takes no sessions at all, as a parent of workers may be, is not counted.
    """
    before = [open_sockets(pid) for pid in contender.pids]
    with ExitStack() as stack:
        for _ in range(_SESSIONS):
            stack.callback(open_session(contender).finish)
        after = [open_sockets(pid) for pid in contender.pids]
    grown = [more - less for more, less in zip(after, before, strict=True)]
    return unevenness([count for count in grown if count > len(contender.pids)])


def unevenness(counts: list[int]) -> float:
    """Return the largest distance from the mean, in per cent of it. Raises BenchError for none."""
    if not counts:
        raise BenchError("no process holds the sessions")
    even = sum(counts) / len(counts)
    return max(abs(count - even) for count in counts) / even * 100
