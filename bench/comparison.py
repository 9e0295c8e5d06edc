"""The order of a run: what is started, who is measured when.

Everything that is compared is measured in the same round, one contender after the other, and each
round begins with another one: the first finds the caches as nobody else does. Start, memory, soak
and workers begin with programs started anew, since what one did before shows.
"""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import (
    connect_storm,
    memory,
    queries,
    results,
    sessions,
    soak,
    start_up,
    starting,
    workers,
)
from bench.bulk import Bulk
from bench.delay import ONE_WAY_MILLISECONDS, delayed
from bench.idle_upstream import idle_upstream
from bench.plan import BULK, CONNECT, MEMORY, PGBENCH, SOAK, START, STORM, WORKERS, Plan
from bench.postgres import Place, Postgres, postgres
from bench.readings import Readings
from bench.systems import BASE, HAPROXY, PGBOUNCER, PROXY, Contender, Start, direct
from bench.workspace import workspace

NEAR = "connect, on this machine"
FAR = f"connect, PostgreSQL {ONE_WAY_MILLISECONDS:g} ms away"
_Program = Callable[[Place, Path, str], AbstractContextManager[Contender]]
_ROUND_SUBJECTS = frozenset({PGBENCH, BULK, CONNECT, STORM})


def hold(plan: Plan, directory: Path, readings: Readings) -> None:
    """Measure everything that is planned. Raises BenchError; what was read until then stays."""
    _allow_files()
    with ExitStack() as stack:
        upstream = stack.enter_context(postgres(directory))
        url = stack.enter_context(workspace(directory))
        contest = _Contest(plan, directory, upstream, url, readings)
        if plan.subjects & _ROUND_SUBJECTS:
            contest.rounds()
        if WORKERS in plan.subjects:
            contest.workers()
        if START in plan.subjects:
            contest.start_up()
        if MEMORY in plan.subjects:
            contest.memory()
        if SOAK in plan.subjects:
            say(f"soak, {plan.soak_minutes:g} min")
            soak.measure(
                contest.starts(upstream.place)[PROXY], plan.soak_minutes, upstream, readings
            )


@dataclass(frozen=True, slots=True)
class _Contest:
    """One run, with what all its parts need."""

    plan: Plan
    directory: Path
    upstream: Postgres
    workspace_url: str
    readings: Readings

    def starts(self, place: Place, *, floor: bool = False) -> dict[str, Start]:
        """Return how each contender that is installed is started, with this place as upstream."""
        starts: dict[str, Start] = {}
        programs: list[tuple[str, _Program]] = [(PGBOUNCER, starting.pgbouncer)]
        if floor:
            programs.insert(0, (HAPROXY, starting.haproxy))
        for name, start in programs:
            if program := starting.find(name):
                starts[name] = partial(start, place, self.directory, program)
        proxy = partial(starting.proxy, place, self.directory, self.workspace_url)
        starts[PROXY] = proxy
        if self.plan.base is not None:
            starts[BASE] = partial(proxy, base=self.plan.base)
        return starts

    def rounds(self) -> None:
        """Measure what is compared, round by round."""
        plan, upstream = self.plan, self.upstream
        with ExitStack() as stack:

            def start(place: Place, *, floor: bool = False) -> list[Contender]:
                starts = self.starts(place, floor=floor).values()
                return [direct(place), *(stack.enter_context(one()) for one in starts)]

            near = start(upstream.place, floor=plan.floor)
            far = []
            if CONNECT in plan.subjects:
                far = start(stack.enter_context(delayed(upstream.place, self.directory)))
            bulk = Bulk(plan.megabytes, upstream)
            if BULK in plan.subjects:
                bulk.prepare(near[0])
            for number in range(plan.rounds):
                say(f"round {number + 1} of {plan.rounds}")
                self._round(_rotated(near, number), _rotated(far, number), bulk)
                if STORM in plan.subjects and number < plan.storm_rounds:
                    for contender in _rotated(near, number):
                        if contender.name != HAPROXY:
                            connect_storm.measure(
                                plan.storm_sessions, contender, upstream, self.readings
                            )

    def _round(self, near: list[Contender], far: list[Contender], bulk: Bulk) -> None:
        """Measure everything once; for each thing all contenders, right after each other."""
        plan, readings = self.plan, self.readings
        if PGBENCH in plan.subjects:
            for load in plan.loads:
                for contender in near:
                    queries.measure(load, contender, self.upstream, readings)
        if BULK in plan.subjects:
            for contender in near:
                bulk.measure(contender, readings)
            for contender in near:
                results.measure(contender, readings)
        if CONNECT in plan.subjects:
            sessions.measure(NEAR, plan.connects, near, readings)
            sessions.measure(FAR, plan.delayed_connects, far, readings)

    def workers(self) -> None:
        """Compare two workers with one, where there can be two."""
        if not workers.available():
            say(workers.MISSING)
            return
        say("workers")

        def start(count: int) -> Start:
            more = {"LISTEN__WORKERS": str(count)}
            place, url = self.upstream.place, self.workspace_url
            return partial(starting.proxy, place, self.directory, url, more)

        seconds = self.plan.loads[0].seconds
        workers.measure(start, self.plan.rounds, seconds, self.upstream, self.readings)

    def start_up(self) -> None:
        """Start the proxy again and again."""
        say("start")
        place, url = self.upstream.place, self.workspace_url
        run = partial(starting.proxy_process, place, self.directory, url)
        start_up.measure(run, self.plan.rounds, self.readings)

    def memory(self) -> None:
        """Fill and empty each contender."""
        bulk = Bulk(self.plan.megabytes, self.upstream)
        for name, start in self.starts(self.upstream.place).items():
            say(f"memory of {name}")
            memory.measure(start, self.plan.idle_sessions, bulk, self.readings)
        with idle_upstream(self.upstream, self.directory) as place:
            for count in self.plan.scripted_sessions:
                for name, start in self.starts(place).items():
                    say(f"memory of {name} with {count:,} sessions")
                    memory.measure_idle(start, count, self.readings)


def say(text: str) -> None:
    """Tell the person who waits what is being done."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _rotated(contenders: list[Contender], number: int) -> list[Contender]:
    """Let another one be first in each round."""
    first = number % len(contenders) if contenders else 0
    return contenders[first:] + contenders[:first]


def _allow_files() -> None:
    """Take as many open files as we may have: for thousands of sessions, here and in children."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
