"""Many proxies and one workspace API in virtual time, with the project's own token policy.

Each proxy's real `LocalTokenSource` runs on an event loop whose clock jumps to the next timer. The
API grants at most `limit` mints a second (a token bucket that holds one second's worth), and
answers 429 above it. In an outage every call fails. A call takes 100 ms either way. Clients arrive
at each proxy as a Poisson process; those that a held token serves without a call are not simulated
one by one, because nothing depends on them.

    python -m tests.simulation.fleet --proxies 2000 --limit 10 --until 1800

A tenth of the proxies with a tenth of the limit behave as the whole fleet does: 20,000 with a limit
of 100 give the same ratios, and take ten times as long.
"""

import argparse
import asyncio
import random
import selectors
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from proxy.config import CredentialsSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import configure_logging
from proxy.observe.metrics import Metrics
from proxy.server.metric_labels import build_metrics
from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.freshness import REFRESH_AT
from proxy.workspace.single_flight import PendingCalls
from proxy.workspace.token_source import LocalTokenSource

EPOCH = 1_800_000_000.0
CALL_SECONDS = 0.1
LIFETIME_SECONDS = 3600.0

T = TypeVar("T")


@dataclass(frozen=True)
class Scenario:
    """A fleet, the API's limit, and an outage."""

    proxies: int
    limit: float
    """Mints a second that the API grants."""
    until: float
    connections_per_second: float = 1.0
    """New connections a second, of each proxy."""
    start_seconds: float = 60.0
    """The time within which all proxies start, each with a connection at once."""
    outage: tuple[float, float] = (0.0, 0.0)
    """From when until when every call fails."""
    late_proxies: int = 0
    """How many of the proxies start only when the outage does, so without a token."""
    max_age_seconds: float = 60.0
    seed: int = 1


@dataclass
class Outcome:
    """What happened, by seconds since the start."""

    calls: Counter[int] = field(default_factory=Counter)
    granted: Counter[int] = field(default_factory=Counter)
    renewals: Counter[int] = field(default_factory=Counter)
    """Calls of proxies that held a valid token."""
    lost: list[float] = field(default_factory=list)
    """When the connections that were refused arrived."""
    served: int = 0
    accepted_ages: list[float] = field(default_factory=list)
    """At the end, of each proxy."""

    def lost_after(self, seconds: float) -> int:
        """Return how many of the connections that arrived from then on were refused."""
        return sum(at >= seconds for at in self.lost)


def mean(counts: Counter[int], begin: float, end: float) -> float:
    """Return the mean count a second from `begin` until `end`."""
    return sum(counts[second] for second in range(int(begin), int(end))) / (end - begin)


def peak(counts: Counter[int], begin: float, end: float, window: int = 10) -> float:
    """Return the highest mean of so many seconds in a row."""
    starts = range(int(begin), max(int(end) - window, int(begin)) + 1)
    return max(mean(counts, start, start + window) for start in starts)


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: what would be waited is added to the loop's time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Return the virtual time, which begins at 0."""
        return self._jumping.now


class _Api:
    def __init__(self, scenario: Scenario, outcome: Outcome) -> None:
        self._scenario = scenario
        self._outcome = outcome
        self._bucket = scenario.limit
        self._filled_at = 0.0

    async def mint(self, renewal: bool) -> Credential:
        now = asyncio.get_running_loop().time()
        self._outcome.calls[int(now)] += 1
        self._outcome.renewals[int(now)] += renewal
        failure = self._failure(now)
        await asyncio.sleep(CALL_SECONDS)
        if failure is not None:
            raise ProxyError(failure)
        self._outcome.granted[int(now)] += 1
        requested_at = EPOCH + now
        secret = Secret(b"not-a-real-token")
        return Credential(secret, requested_at, requested_at + LIFETIME_SECONDS)

    def _failure(self, now: float) -> ErrorKind | None:
        begin, end = self._scenario.outage
        if begin <= now < end:
            return ErrorKind.API_UNREACHABLE
        limit = self._scenario.limit
        self._bucket = min(limit, self._bucket + (now - self._filled_at) * limit)
        self._filled_at = now
        if self._bucket < 1:
            return ErrorKind.API_THROTTLED
        self._bucket -= 1
        return None


class _Proxy:
    def __init__(
        self, api: _Api, scenario: Scenario, metrics: Metrics, rng: random.Random, start_at: float
    ) -> None:
        self._api = api
        self._scenario = scenario
        self._random = rng
        self._start_at = start_at
        self._loop = asyncio.get_running_loop()
        self.source = LocalTokenSource(
            self._mint,
            CredentialsSettings(token_max_age_seconds=scenario.max_age_seconds),
            metrics,
            PendingCalls(),
            clock=self._clock,
            jitter=rng.random,
        )

    def _clock(self) -> float:
        return EPOCH + self._loop.time()

    @property
    def _valid_seconds(self) -> float:
        """The time for which the newest token is valid, 0 if it is not."""
        newest, margin = self.source.newest, CredentialsSettings().expiry_margin_seconds
        return 0.0 if newest is None else max(0.0, newest.expires_at - margin - self._clock())

    @property
    def _quiet_seconds(self) -> float:
        """The time for which each client gets the newest token at once, without a call."""
        newest, valid_seconds = self.source.newest, self._valid_seconds
        if newest is None or not valid_seconds:
            return 0.0
        lifetime_seconds = newest.expires_at - newest.requested_at
        usable_seconds = min(self.source.accepted_age_seconds, lifetime_seconds)
        refresh_at = newest.requested_at + usable_seconds * REFRESH_AT
        backoff_seconds = self.source._renewal_backoff.remaining_seconds
        return min(valid_seconds, max(refresh_at - self._clock(), backoff_seconds))

    async def _mint(self) -> Credential:
        return await self._api.mint(self._valid_seconds > 0)

    async def run(self, outcome: Outcome) -> None:
        """Open connections until the scenario ends."""
        rate, until = self._scenario.connections_per_second, self._scenario.until
        await asyncio.sleep(self._start_at)
        waiting: set[asyncio.Task[None]] = set()
        while self._loop.time() < until:
            if self._valid_seconds:
                await self._connect(outcome)  # waits for one call at most
                await asyncio.sleep(2 * CALL_SECONDS)  # what it has started has ended
                quiet_seconds = min(self._quiet_seconds, until - self._loop.time())
                outcome.served += max(0, int(quiet_seconds * rate))
                await asyncio.sleep(quiet_seconds + self._random.expovariate(rate))
            else:
                task = asyncio.create_task(self._connect(outcome))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
                await asyncio.sleep(self._random.expovariate(rate))
        if waiting:
            await asyncio.wait(waiting)
        outcome.accepted_ages.append(self.source.accepted_age_seconds)

    async def _connect(self, outcome: Outcome) -> None:
        arrived_at = self._loop.time()
        try:
            await self.source.fresh()
        except ProxyError:
            outcome.lost.append(arrived_at)
        else:
            outcome.served += 1


async def _fleet(scenario: Scenario) -> Outcome:
    rng, outcome = random.Random(scenario.seed), Outcome()
    api, metrics = _Api(scenario, outcome), build_metrics()
    starts = [
        (scenario.outage[0] if number < scenario.late_proxies else 0.0)
        + rng.random() * scenario.start_seconds
        for number in range(scenario.proxies)
    ]
    proxies = [_Proxy(api, scenario, metrics, rng, start_at) for start_at in starts]
    await asyncio.gather(*(one.run(outcome) for one in proxies))
    return outcome


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario to its end."""
    return _run(_fleet(scenario))


def _run(main: Awaitable[T]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def _report(scenario: Scenario, outcome: Outcome) -> str:
    limit, until = scenario.limit, scenario.until
    first_tokens_at = max(scenario.start_seconds, scenario.proxies / limit)
    ages = sorted(outcome.accepted_ages)
    served, lost = outcome.served, len(outcome.lost)
    last, late = max(outcome.lost, default=0), outcome.lost_after(first_tokens_at)
    calls = mean(outcome.calls, 0, until), mean(outcome.calls, first_tokens_at, until)
    granted = mean(outcome.granted, 0, until)
    lines = [
        f"the limit allows a first token for each proxy after {first_tokens_at:.0f} s",
        f"{served} connections served, {lost} refused, the last at {last:.0f} s; {late} after that",
        f"calls: {calls[0] / limit:.2f} x the limit, {calls[1] / limit:.2f} x after that",
        f"granted: {granted / limit:.2f} x the limit",
        f"accepted age at the end: median {ages[len(ages) // 2]:.0f} s, most {ages[-1]:.0f} s",
    ]
    begin, end = scenario.outage
    if end:
        per_proxy = mean(outcome.renewals, begin, end) * 60 / scenario.proxies
        after = min(end + 600, until)
        peaks = [peak(outcome.calls, end, after, window) / limit for window in (1, 10)]
        lines.append(f"outage: {per_proxy:.2f} calls a minute for each proxy with a valid token")
        mean_after = mean(outcome.calls, end, after) / limit
        lines.append(
            f"in the {after - end:.0f} s after it: {mean_after:.2f} x the limit, at most "
            f"{peaks[1]:.2f} x in ten seconds and {peaks[0]:.2f} x in one"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the scenario that the arguments describe, and print what happened."""
    parser = argparse.ArgumentParser(description="Simulate many proxies and one workspace API.")
    parser.add_argument("--proxies", type=int, default=2000)
    parser.add_argument("--limit", type=float, default=10, help="mints a second")
    parser.add_argument("--until", type=float, default=1800, help="seconds")
    parser.add_argument("--rate", type=float, default=1.0, help="connections a second and proxy")
    parser.add_argument("--start", type=float, default=60, help="seconds within which all start")
    parser.add_argument("--outage", type=float, nargs=2, default=(0, 0), metavar=("FROM", "TO"))
    parser.add_argument("--late", type=int, default=0, help="proxies that start in the outage")
    parser.add_argument("--age", type=float, default=60, help="token_max_age_seconds")
    parser.add_argument("--seed", type=int, default=1)
    options: Any = parser.parse_args(arguments)
    configure_logging(format="console", level="error")
    scenario = Scenario(
        options.proxies, options.limit, options.until, options.rate, options.start,
        tuple(options.outage), options.late, options.age, options.seed,
    )  # fmt: skip
    begun = time.monotonic()
    report = _report(scenario, simulate(scenario))
    sys.stdout.write(f"{report}\n({time.monotonic() - begun:.0f} s)\n")


if __name__ == "__main__":
    main()
