"""The order of a run: which programs are started, and which system is measured when.

Everything that is compared is measured in the same round, one system after the other, and each
round begins with another system, because the first one finds cold caches. Start, memory, soak and
workers begin with programs started anew, because earlier load would change their result.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench import (
    blocked_log,
    connect_storm,
    connect_time,
    large_results,
    launch,
    memory,
    pgbench,
    pool,
    soak,
    startup_time,
    workers,
)
from bench.bulk_copy import BulkCopy
from bench.child_processes import ChildProcess
from bench.delayed_upstream import ONE_WAY_MILLISECONDS, delayed_upstream
from bench.idle_upstream import idle_upstream
from bench.measurements import Measurements
from bench.options import (
    BULK,
    CONNECT,
    CONNECT_STORM,
    LOG,
    MEMORY,
    PGBENCH,
    POOL,
    SOAK,
    START,
    WORKERS,
    Options,
)
from bench.postgres import Postgres, ServerAddress, postgres
from bench.systems import BASE, HAPROXY, PGBOUNCER, POOLED, PROXY, StartSystem, System, direct
from bench.workspace import workspace

_LOCAL: Final = "connect, on this machine"
_AWAY: Final = f"{ONE_WAY_MILLISECONDS:g} ms away"
_DELAYED: Final = f"connect, PostgreSQL {_AWAY}"
_ROUND_SUBJECTS: Final = frozenset({PGBENCH, BULK, CONNECT, CONNECT_STORM})
_Launch = Callable[[ServerAddress, Path, str], AbstractContextManager[System]]


def run(options: Options, directory: Path, measurements: Measurements) -> None:
    """Measure all that the options ask for. Raises BenchError; earlier measurements are kept."""
    _raise_file_limit()
    with ExitStack() as stack:
        upstream = stack.enter_context(postgres(directory))
        url = stack.enter_context(workspace(directory))
        comparison = _Comparison(options, directory, upstream, url, measurements)
        if options.subjects & _ROUND_SUBJECTS:
            comparison.rounds()
        if POOL in options.subjects:
            comparison.pool()
        if WORKERS in options.subjects:
            comparison.workers()
        if LOG in options.subjects:
            comparison.blocked_log()
        if START in options.subjects:
            comparison.startup_time()
        if MEMORY in options.subjects:
            comparison.memory()
        if SOAK in options.subjects:
            comparison.soak()


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One run, with what all its parts need."""

    options: Options
    directory: Path
    upstream: Postgres
    workspace_url: str
    measurements: Measurements

    def rounds(self) -> None:
        """Measure the subjects that are compared, round by round."""
        options = self.options
        with ExitStack() as stack:
            local = self._start(self.upstream.address, stack, floor=options.floor)
            delayed = []
            if CONNECT in options.subjects:
                address = delayed_upstream(self.upstream.address, self.directory)
                delayed = self._start(stack.enter_context(address), stack)
            bulk = BulkCopy(options.megabytes, self.upstream)
            if BULK in options.subjects:
                bulk.prepare(local[0])
            for number in range(options.rounds):
                print_progress(f"round {number + 1} of {options.rounds}")
                self._round(_rotated(local, number), _rotated(delayed, number), bulk)
                if CONNECT_STORM in options.subjects and number < options.connect_storm_rounds:
                    self._connect_storm(_rotated(local, number))

    def pool(self) -> None:
        """Compare the proxy with a pool with the same systems, round by round."""
        options, measurements = self.options, self.measurements
        counts = options.connects, options.delayed_connects
        with ExitStack() as stack:
            local = self._start(self.upstream.address, stack, pooled=True)
            forwarder = delayed_upstream(self.upstream.address, self.directory)
            delayed = self._start(stack.enter_context(forwarder), stack, pooled=True)
            for number in range(options.rounds):
                print_progress(f"pool, round {number + 1} of {options.rounds}")
                near, away = _rotated(local, number), _rotated(delayed, number)
                pool.measure_connects(near, away, counts, _AWAY, measurements)
                pool.measure_queries(near, options.loads[0].seconds, self.upstream, measurements)
            print_progress("pool, logins")
            pool.measure_logins(local[-1], options.pool_sessions, measurements)
        print_progress("pool, memory")
        address, idle = self.upstream.address, options.pool_idle_sessions
        kept = self._pooled(address, {"UPSTREAM__POOL_IDLE_MAX": str(idle + 1)})
        pool.measure_memory(self._proxy(address), kept, idle, measurements)

    def workers(self) -> None:
        """Compare two workers with one, where this proxy can have two."""
        if not workers.available():
            print_progress(workers.MISSING)
            return
        print_progress("workers")

        def start(count: int) -> StartSystem:
            return self._proxy(self.upstream.address, {"LISTEN__WORKERS": str(count)})

        seconds, rounds = self.options.loads[0].seconds, self.options.rounds
        workers.measure(start, rounds, seconds, self.upstream, self.measurements)

    def blocked_log(self) -> None:
        """Compare a log that nothing reads with one that is read."""
        print_progress("log")

        def start(prefix: Sequence[str | Path]) -> AbstractContextManager[ChildProcess]:
            address, url = self.upstream.address, self.workspace_url
            return launch.proxy_process(address, self.directory, url, prefix=prefix)

        # A connection for each transaction needs longer than others for a number.
        seconds, rounds = 3 * self.options.loads[0].seconds, self.options.rounds
        blocked_log.measure(start, rounds, seconds, self.upstream, self.measurements)

    def startup_time(self) -> None:
        """Start the proxy several times."""
        print_progress("start")
        address, url = self.upstream.address, self.workspace_url
        start = partial(launch.proxy_process, address, self.directory, url)
        startup_time.measure(start, self.options.rounds, self.measurements)

    def memory(self) -> None:
        """Measure the memory of each system with idle sessions and after a bulk transfer."""
        bulk = BulkCopy(self.options.megabytes, self.upstream)
        for name, start in self._starts(self.upstream.address).items():
            print_progress(f"memory of {name}")
            memory.measure(start, self.options.idle_sessions, bulk, self.measurements)
        with idle_upstream(self.upstream, self.directory) as address:
            for count in self.options.scripted_sessions:
                for name, start in self._starts(address).items():
                    print_progress(f"memory of {name} with {count:,} sessions")
                    memory.measure_idle(start, count, self.measurements)

    def soak(self) -> None:
        """Run the mixed load through the proxy."""
        minutes = self.options.soak_minutes
        print_progress(f"soak, {minutes:g} min")
        start = self._proxy(self.upstream.address)
        soak.measure(start, minutes, self.upstream, self.measurements)

    def _start(
        self,
        address: ServerAddress,
        stack: ExitStack,
        *,
        floor: bool = False,
        pooled: bool = False,
    ) -> list[System]:
        """Start every system for this upstream; the stack stops them."""
        starts = [*self._starts(address, floor=floor).values()]
        if pooled:
            starts.append(self._pooled(address))
        return [direct(address), *(stack.enter_context(start()) for start in starts)]

    def _starts(self, address: ServerAddress, *, floor: bool = False) -> dict[str, StartSystem]:
        """Return how to start each installed system, with this address as its upstream."""
        starts: dict[str, StartSystem] = {}
        programs: list[tuple[str, _Launch]] = [(PGBOUNCER, launch.pgbouncer)]
        if floor:
            programs.insert(0, (HAPROXY, launch.haproxy))
        for name, start in programs:
            if program := launch.find_program(name):
                starts[name] = partial(start, address, self.directory, program)
        starts[PROXY] = self._proxy(address)
        if self.options.base is not None:
            base, url = self.options.base, self.workspace_url
            starts[BASE] = partial(launch.proxy, address, self.directory, url, base=base)
        return starts

    def _proxy(self, address: ServerAddress, more: Mapping[str, str] | None = None) -> StartSystem:
        """Return how to start the proxy, with `more` settings."""
        return partial(launch.proxy, address, self.directory, self.workspace_url, more)

    def _pooled(self, address: ServerAddress, more: Mapping[str, str] | None = None) -> StartSystem:
        """Return how to start the proxy with a pool, with `more` settings."""
        settings = {**pool.SETTINGS, **(more or {})}
        url = self.workspace_url
        return partial(launch.proxy, address, self.directory, url, settings, name=POOLED)

    def _round(self, local: list[System], delayed: list[System], bulk: BulkCopy) -> None:
        """Measure everything once; for each subject all systems, directly after each other."""
        options, measurements = self.options, self.measurements
        if PGBENCH in options.subjects:
            for load in options.loads:
                for system in local:
                    pgbench.measure(load, system, self.upstream, measurements)
        if BULK in options.subjects:
            for system in local:
                bulk.measure(system, measurements)
            for system in local:
                large_results.measure(system, measurements)
        if CONNECT in options.subjects:
            connect_time.measure(_LOCAL, options.connects, local, measurements)
            connect_time.measure(_DELAYED, options.delayed_connects, delayed, measurements)

    def _connect_storm(self, systems: list[System]) -> None:
        count = self.options.connect_storm_sessions
        for system in systems:
            if system.name != HAPROXY:
                connect_storm.measure(count, system, self.upstream, self.measurements)


def print_progress(text: str) -> None:
    """Write a line to standard error, with the time of day."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _rotated(systems: list[System], number: int) -> list[System]:
    """Return the systems with another one first in each round."""
    first = number % len(systems) if systems else 0
    return systems[first:] + systems[:first]


def _raise_file_limit() -> None:
    """Raise the limit of open files, ours and our children's, for thousands of sessions."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
