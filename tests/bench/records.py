"""A record for tests: every goal has values, which the test chooses."""

from collections.abc import Iterator

from bench import pool
from bench.measurements import Quantity
from bench.record import Record
from bench.systems import DIRECT, PGBOUNCER, POOLED, PROXY

MACHINE = {"processor": "a <processor>", "cores": "2", "memory": "4 GiB", "system": "Linux"}
LOADS = [f"{one}, {count}" for one in ("simple", "prepared") for count in ("1 client", "8 clients")]


def record(
    *, speed: float = 2.0, cost: float = 0.5, latency: float = 110.0, own: float = 1.0
) -> Record:
    """Return a record in which PgBouncer and direct have speed 1 and cost 1.

    A latency is 100 for direct and 120 for PgBouncer. `own` is the value of what is not compared.
    """
    made = Record(2, dict(MACHINE))
    for quantity, values in _values(speed, cost, latency, own):
        for system, value in values.items():
            for _ in range(made.rounds):
                made.measurements.add(system, quantity, value)
    return made


def _values(
    speed: float, cost: float, latency: float, own: float
) -> Iterator[tuple[Quantity, dict[str, float]]]:
    for load in LOADS:
        case = f"pgbench {load}"
        yield Quantity(case, "throughput", "TPS"), {DIRECT: 1, PGBOUNCER: 1, PROXY: speed}
        latencies = {DIRECT: 100.0, PGBOUNCER: 120.0, PROXY: latency}
        yield Quantity(case, "latency p50", "us"), latencies
        yield Quantity(case, "CPU", "us/transaction"), {PGBOUNCER: 1, PROXY: cost}
    for direction in ("out", "in"):
        case = f"COPY {direction}, 64 MB"
        yield Quantity(case, "speed", "MB/s"), {DIRECT: 1, PGBOUNCER: 1, PROXY: speed}
        yield Quantity(case, "CPU", "s/GB"), {PGBOUNCER: 1, PROXY: cost}
    for where in ("on this machine", "PostgreSQL 1 ms away"):
        quantity = Quantity(f"connect, {where}", "p50", "ms")
        yield quantity, {DIRECT: 1, PGBOUNCER: 0.1, PROXY: cost}
    for name in ("per session of 1,000", "per session of 5,000", "growth by a bulk transfer"):
        yield Quantity("resident memory", name, ""), {PROXY: own}
    for load in ("simple, 8 clients", "prepared, 8 clients"):
        yield Quantity(f"workers, {load}", "CPU, 1 worker", ""), {PROXY: 1.0}
        yield Quantity(f"workers, {load}", "CPU, 2 workers", ""), {PROXY: own}
    yield Quantity("workers", "sessions of the least even worker", ""), {PROXY: own}
    yield from _pool_values(speed, cost, own)


def _pool_values(
    speed: float, cost: float, own: float
) -> Iterator[tuple[Quantity, dict[str, float]]]:
    """Return values of a pool; PgBouncer, direct and no pool have ten times the cost."""
    others = (DIRECT, PGBOUNCER, PROXY)
    for case, name in (
        *((pool.CONNECT_LOCAL, "p50"), (pool.CONNECT_LOCAL, "CPU")),
        (pool.CONNECT_DELAYED, "p50"),
        *((pool.CATALOGUE_QUERY, f"{what}, p50") for what in pool.DRIVER_QUERIES),
    ):
        yield (
            Quantity(case, name, ""),
            {**dict.fromkeys(others, 1.0), POOLED: cost / 10 if cost < 1 else cost},
        )
    yield (
        Quantity(pool.RECONNECTS, "throughput", "TPS"),
        {**dict.fromkeys(others, 1.0), POOLED: speed * 10 if speed > 1 else speed},
    )
    for one in ("simple", "prepared"):
        for name, value in (("CPU", cost), ("throughput", speed)):
            yield Quantity(f"{pool.RELAY}, {one}, 8 clients", name, ""), {PROXY: 1.0, POOLED: value}
    for case, name in (
        (pool.LOGINS, "backends for 10,000 sessions"),
        (pool.MEMORY, "per idle session of 500"),
    ):
        yield Quantity(case, name, ""), {POOLED: own}
