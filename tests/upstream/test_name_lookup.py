"""Look-ups of names: who waits for whom, what is remembered, and how many threads it costs.

`getaddrinfo` is an argument, so that a name has no answer for as long as a test wants. The real
resolver is in `tests/e2e/test_silent_dns.py`.
"""

import asyncio
import errno
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.upstream import name_lookup
from proxy.upstream.address_lookup import Target
from proxy.upstream.name_lookup import (
    FAILURE_SECONDS,
    NAMES_MAX,
    STALE_SECONDS_MAX,
    Addresses,
    NameLookup,
)
from proxy.workspace.single_flight import PendingCalls
from tests.support.fake_clock import FakeClock
from tests.support.running import captured_log, eventually

FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]
DIALLED = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 5432))]
NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
NO_ANSWER = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class Resolver:
    """A `getaddrinfo` that is told what to do, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.silent: set[str] = set()
        self.released = threading.Event()

    def __call__(self, name: str, port: None, *, type: socket.SocketKind) -> list[Any]:
        assert threading.current_thread().daemon
        self.asked.append(name)
        if name in self.silent:
            self.released.wait()
        if self.failure is not None:
            raise self.failure
        return list(FOUND)


@pytest.fixture
def resolver() -> Iterator[Resolver]:
    made = Resolver()
    yield made
    made.released.set()


@asynccontextmanager
async def looking_up(
    resolver: Resolver, clock: FakeClock | None = None
) -> AsyncIterator[NameLookup]:
    pending, clock = PendingCalls(), clock or FakeClock()
    try:
        yield NameLookup(pending, getaddrinfo=resolver, clock=clock, sleep=clock.sleep)
    finally:
        await pending.close()


def target(host: str = "db.example.com", hostaddr: str = "") -> Target:
    return Target(host, hostaddr, 5432, "verify-full", "system")


async def refusal(names: NameLookup, host: str = "db.example.com") -> ProxyError:
    with pytest.raises(ProxyError) as refused:
        await names.resolve(target(host))
    return refused.value


@pytest.mark.parametrize("address", ["127.0.0.1", "2001:db8::1"])
async def test_an_address_is_no_look_up(resolver: Resolver, address: str) -> None:
    async with looking_up(resolver) as names:
        for one in (target(address), target("db.example.com", address)):
            (found,) = await names.resolve(one)
            assert found[4][:2] == (address, 5432)
    assert resolver.asked == []


async def test_a_thousand_that_wait_for_a_name_make_one_look_up(resolver: Resolver) -> None:
    resolver.silent.add("db.example.com")
    async with looking_up(resolver) as names, asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(names.resolve(target())) for _ in range(1000)]
        await eventually(lambda: resolver.asked, "the name is asked for")
        waiting[0].cancel()  # one that gives up ends the look-up for none of the others
        resolver.released.set()
        for task in waiting[1:]:
            assert await task == DIALLED
    assert resolver.asked == ["db.example.com"]


async def test_names_without_an_answer_delay_no_other_name(resolver: Resolver) -> None:
    # Four names without an answer filled the pool of the event loop, for all targets.
    dead = [f"dead-{number}.example.com" for number in range(100)]
    resolver.silent.update(dead)
    async with looking_up(resolver) as names:
        waiting = [asyncio.ensure_future(names.resolve(target(host))) for host in dead]
        await eventually(lambda: len(resolver.asked) == len(dead), "all are asked for")
        async with asyncio.timeout(5):
            assert await names.resolve(target()) == DIALLED
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_look_up_has_a_deadline_and_a_name_a_bound_of_threads(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_lookup, "LOOK_UP_SECONDS_MAX", 0.02)
    resolver.silent.add("db.example.com")
    async with looking_up(resolver) as names:
        for _ in range(2 * name_lookup.THREADS_OF_A_NAME_MAX):
            error = await refusal(names)
            assert error.kind is ErrorKind.UPSTREAM_DNS
            assert error.detail == "db.example.com: DNS did not answer within 0.02 seconds"
        assert len(resolver.asked) == name_lookup.THREADS_OF_A_NAME_MAX
        assert await names.resolve(target("other.example.com")) == DIALLED
        resolver.released.set()
        async with asyncio.timeout(5):
            while True:  # until the threads have ended
                try:
                    assert await names.resolve(target()) == DIALLED
                    break
                except ProxyError:
                    continue


async def test_a_name_that_does_not_exist_is_asked_for_once_a_second(resolver: Resolver) -> None:
    clock = FakeClock()
    resolver.failure = NO_NAME
    async with looking_up(resolver, clock) as names:
        for _ in range(3):
            error = await refusal(names)
            assert error.kind is ErrorKind.UPSTREAM_DNS
            assert error.detail == "db.example.com: Name or service not known"
        assert len(resolver.asked) == 1
        clock.move(FAILURE_SECONDS)
        resolver.failure = None
        assert await names.resolve(target()) == DIALLED


async def test_a_failure_that_may_pass_is_waited_for_and_asked_again(resolver: Resolver) -> None:
    # A dial tries three times in half a second: without the wait all three were one failure.
    clock = FakeClock()
    resolver.failure = NO_ANSWER
    async with looking_up(resolver, clock) as names:
        begun = clock()
        for _ in range(3):
            assert (await refusal(names)).kind is ErrorKind.UPSTREAM_DNS
        assert clock() - begun == pytest.approx(2 * FAILURE_SECONDS)
        assert len(resolver.asked) == 3


async def test_the_last_addresses_serve_for_some_minutes_while_dns_fails(
    resolver: Resolver,
) -> None:
    clock = FakeClock()
    with captured_log() as log:
        async with looking_up(resolver, clock) as names:
            assert await names.resolve(target()) == DIALLED
            resolver.failure = NO_ANSWER
            for _ in range(3):
                assert await names.resolve(target()) == DIALLED
            (warning,) = log.above_info()
            assert "last addresses" in warning["event"]
            clock.move(FAILURE_SECONDS)
            resolver.failure = None
            assert await names.resolve(target()) == DIALLED
            again = "DNS answers again"
            await eventually(lambda: log.events(again), "DNS is asked without being waited for")
            resolver.failure = NO_ANSWER
            clock.move(STALE_SECONDS_MAX)
            assert (await refusal(names)).kind is ErrorKind.UPSTREAM_DNS


async def test_the_last_addresses_serve_while_dns_is_silent(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_lookup, "STALE_AFTER_SECONDS", 0.02)
    async with looking_up(resolver) as names:
        assert await names.resolve(target()) == DIALLED
        resolver.silent.add("db.example.com")
        async with asyncio.timeout(5):
            assert await names.resolve(target()) == DIALLED


async def test_the_last_addresses_of_a_name_that_is_gone_are_forgotten(resolver: Resolver) -> None:
    clock = FakeClock()
    async with looking_up(resolver, clock) as names:
        assert await names.resolve(target()) == DIALLED
        resolver.failure = NO_NAME
        await refusal(names)
        clock.move(FAILURE_SECONDS)
        resolver.failure = NO_ANSWER
        await refusal(names)


@pytest.mark.parametrize(
    ("failure", "kind", "detail"),
    [
        (
            UnicodeError("label empty or too long"),
            ErrorKind.UPSTREAM_DNS,
            "db.example.com: not a valid DNS name",
        ),
        (RuntimeError("can't start new thread"), ErrorKind.OUT_OF_RESOURCES, None),
        (OSError(errno.EMFILE, "Too many open files"), ErrorKind.OUT_OF_RESOURCES, None),
    ],
    ids=["no_name", "no_thread", "no_file"],
)
async def test_what_else_a_look_up_meets(
    resolver: Resolver, failure: Exception, kind: ErrorKind, detail: str | None
) -> None:
    resolver.failure = failure
    async with looking_up(resolver) as names:
        error = await refusal(names)
    assert error.kind is kind
    assert detail in (None, error.detail)


async def test_names_that_are_remembered_are_bounded(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NAMES_MAX > 1000
    monkeypatch.setattr(name_lookup, "NAMES_MAX", 2)
    async with looking_up(resolver) as names:
        for host in ("a.example.com", "b.example.com", "a.example.com", "c.example.com"):
            found: Addresses = await names.resolve(target(host))
            assert found == DIALLED
        resolver.failure = NO_ANSWER
        assert await names.resolve(target("a.example.com")) == DIALLED
        await refusal(names, "b.example.com")
