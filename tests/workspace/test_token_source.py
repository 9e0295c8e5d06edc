"""A fresh token for each, whatever the API does, under a clock that tests move."""

import asyncio
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import structlog

from proxy.blocking import THREADS_MAX
from proxy.config import CredentialsSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.server.metric_labels import build_metrics
from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.freshness import RENEWAL_SECONDS_MIN, Freshness
from proxy.workspace.single_flight import (
    BACKOFF_SECONDS_MAX,
    BACKOFF_SECONDS_MIN,
    Backoff,
    PendingCalls,
)
from proxy.workspace.token_source import (
    DEADLINE_GRACE_SECONDS,
    HANG_SECONDS_MAX,
    REJECTION_SECONDS_MIN,
    LocalTokenSource,
    Minting,
    MintPerConnection,
    MintShared,
)
from tests.support.fake_clock import FakeClock

HOUR = 3600.0
TIMEOUT_SECONDS = CredentialsSettings().mint_timeout_seconds
T0 = 1_790_000_000.0
MINUTE = Freshness(max_age_seconds=60, expiry_margin_seconds=120)


# -- the mint ------------------------------------------------------------------------------------


class Mint:
    """Mints when told to go, counts, and fails when it has a failure."""

    def __init__(self, clock: FakeClock) -> None:
        self.started = 0
        self.finished = 0
        self.cancelled = 0
        self.lifetime = HOUR
        self.seconds = 0.0  # that a call takes
        self.failure: ProxyError | None = None
        self.fails_until = math.inf
        self.threads = asyncio.Semaphore(10_000)  # threads to make calls in
        self.go = asyncio.Event()
        self.go.set()
        self._clock = clock

    async def __call__(self) -> Credential:
        self.started += 1
        number, requested_at = self.started, self._clock()
        try:
            async with self.threads:
                await self.go.wait()
                await _pass(self.seconds)
                self.finished += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None and self._clock() < self.fails_until:
            raise self.failure
        secret = Secret(b"not-a-real-token-%d" % number)
        return Credential(secret, requested_at, requested_at + self.lifetime)


async def _pass(seconds: float) -> None:
    """Return after so long, and at least after a turn of the others."""
    elapsed = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, elapsed.set)
    if seconds:
        await elapsed.wait()
    else:
        await asyncio.sleep(0)


class Story:
    """A token source with a mint and a clock of the test's."""

    def __init__(
        self, max_age_seconds: float, expiry_margin_seconds: float, timeout_seconds: float
    ) -> None:
        self.clock = FakeClock(T0)
        self.mint = Mint(self.clock)
        self.metrics: Metrics = build_metrics()
        self.calls = PendingCalls()
        settings = CredentialsSettings(
            token_max_age_seconds=max_age_seconds,
            expiry_margin_seconds=expiry_margin_seconds,
            mint_timeout_seconds=timeout_seconds,
        )
        self.credentials = LocalTokenSource(
            self.mint,
            settings,
            self.metrics,
            self.calls,
            clock=self.clock,
            jitter=lambda: 1.0,
            sleep=self.sleep,
        )
        self.sleeping: asyncio.Event | None = None  # until which those that back off sleep

    async def sleep(self, seconds: float) -> None:
        if self.sleeping is None:
            await self.clock.sleep(seconds)
        else:
            await self.sleeping.wait()

    async def shown(self) -> bytes:
        return (await self.credentials.fresh()).secret.reveal()


@asynccontextmanager
async def story(
    max_age_seconds: float = 60,
    expiry_margin_seconds: float = 120,
    seconds: float = 5,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> AsyncIterator[Story]:
    told = Story(max_age_seconds, expiry_margin_seconds, timeout_seconds)
    try:
        async with asyncio.timeout(seconds):
            yield told
    finally:
        await told.calls.close()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_thousand_that_wait_share_one_mint() -> None:
    async with story() as told:
        told.mint.go.clear()
        asking = [asyncio.create_task(told.shown()) for _ in range(1000)]
        await turns()
        assert told.mint.started == 1
        told.mint.go.set()
        assert set(await asyncio.gather(*asking)) == {b"not-a-real-token-1"}
        assert told.mint.started == 1
        assert told.metrics.value("tokens_minted_total") == 1


async def test_a_token_in_its_second_half_is_used_and_refreshed_in_the_background() -> None:
    async with story() as told:
        await told.shown()
        told.clock.move(31)
        told.mint.go.clear()
        assert await told.shown() == b"not-a-real-token-1"  # at once, without waiting
        assert await told.shown() == b"not-a-real-token-1"
        await turns()
        assert told.mint.started == 2
        told.mint.go.set()
        await turns()
        assert await told.shown() == b"not-a-real-token-2"


async def test_while_connections_keep_coming_none_of_them_waits() -> None:
    async with story() as told:
        await told.shown()
        for _ in range(100):
            told.clock.move(20)
            asking = asyncio.create_task(told.shown())
            await asyncio.sleep(0)
            assert asking.done()
            await turns()
        assert 40 <= told.mint.started <= 60


async def test_nothing_is_minted_while_no_connection_comes() -> None:
    async with story() as told:
        await told.shown()
        for _ in range(10):
            told.clock.move(600)
            await turns()
        assert told.mint.started == 1


async def test_a_token_older_than_the_age_is_not_used() -> None:
    async with story() as told:
        await told.shown()
        told.clock.move(60.5)
        assert await told.shown() == b"not-a-real-token-2"


async def test_a_clock_that_is_set_back_means_a_new_token_once() -> None:
    async with story() as told:
        await told.shown()
        told.clock.move(-HOUR / 2)
        for _ in range(3):
            assert await told.shown() == b"not-a-real-token-2"


async def test_an_age_of_zero_gives_each_connection_its_own_token() -> None:
    async with story(max_age_seconds=0) as told:
        shown = await asyncio.gather(*(told.shown() for _ in range(20)))
        assert len(set(shown)) == 20
        assert told.mint.started == 20


@pytest.mark.parametrize("max_age_seconds", [60, 0])
async def test_when_minting_fails_a_token_that_is_still_valid_serves(
    max_age_seconds: float,
) -> None:
    async with story(max_age_seconds) as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
        told.clock.move(HOUR - 121)
        assert await told.shown() == b"not-a-real-token-1"
        assert told.metrics.value("token_mint_failures_total") == 1
        told.clock.move(1)  # within the margin: it may be shown no more
        with pytest.raises(ProxyError) as refused:
            await told.shown()
        assert refused.value.kind is ErrorKind.API_UNREACHABLE
        told.mint.failure = None
        with pytest.raises(ProxyError):  # the outage is not yet known to be over
            await told.shown()
        await turns()
        assert await told.shown() == b"not-a-real-token-%d" % told.mint.started


async def test_a_failed_refresh_fails_no_connection() -> None:
    async with story() as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
        told.clock.move(31)
        assert await told.shown() == b"not-a-real-token-1"
        await turns()
        assert told.mint.finished == 2
        assert await told.shown() == b"not-a-real-token-1"


async def test_a_failure_is_raised_for_all_that_wait_and_not_for_the_next() -> None:
    async with story() as told:
        told.mint.failure = ProxyError(ErrorKind.WORKSPACE_LOGIN_FAILED)
        told.mint.go.clear()
        asking = [asyncio.create_task(told.shown()) for _ in range(10)]
        await turns()
        told.mint.go.set()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ProxyError}
        assert told.mint.started == 1
        told.mint.failure = None
        told.clock.move(BACKOFF_SECONDS_MIN)
        assert await told.shown() == b"not-a-real-token-2"


async def test_a_mint_within_the_margin_of_its_own_expiry_is_a_failure() -> None:
    async with story() as told:
        told.mint.lifetime = 119
        with pytest.raises(ProxyError) as refused:
            await told.shown()
        assert refused.value.kind is ErrorKind.CREDENTIAL_INVALID
        # Again and again until the caller's timeout: after 0.5, 1, 2, 4, 8 and 8 seconds.
        assert told.metrics.value("token_mint_failures_total") == 7


async def test_w54_a_caller_that_gives_up_does_not_end_the_mint_for_the_others() -> None:
    async with story() as told:
        told.mint.go.clear()
        leaving, staying = (asyncio.create_task(told.shown()) for _ in range(2))
        await turns()
        leaving.cancel()
        await turns()
        assert leaving.cancelled()
        told.mint.go.set()
        assert await staying == b"not-a-real-token-1"
        assert (told.mint.started, told.mint.cancelled) == (1, 0)


async def test_w54_a_mint_that_no_caller_waits_for_still_fills_the_cache() -> None:
    async with story() as told:
        told.mint.go.clear()
        leaving = asyncio.create_task(told.shown())
        await turns()
        leaving.cancel()
        told.mint.go.set()
        await turns()
        assert await told.shown() == b"not-a-real-token-1"
        assert told.mint.started == 1


async def test_a_rejected_token_is_forgotten_unless_a_newer_one_has_come() -> None:
    async with story() as told:
        first = await told.credentials.fresh()
        told.credentials.reject(first)
        second = await told.credentials.fresh()
        assert second.secret.reveal() == b"not-a-real-token-2"
        told.credentials.reject(first)  # a slower dial with the old one
        assert await told.credentials.fresh() is second


async def test_a_role_that_is_refused_whatever_the_token_does_not_cost_a_mint_for_each_client() -> (
    None
):
    # The token that was minted anew stayed, was the next client's "from the cache", and so on: a
    # mint for each, and with user = "*" one client emptied the cache of all in a loop.
    async with story() as told:
        first = await told.credentials.fresh()
        for _ in range(40):
            shown = await told.credentials.fresh()
            another = told.credentials.reject(shown)
            assert another is (shown is first)
        assert told.mint.started == 2
        # Later on a token is tried anew once more: it may be the token this time.
        told.clock.move(REJECTION_SECONDS_MIN)
        shown = await told.credentials.fresh()
        assert told.credentials.reject(shown)
        assert await told.credentials.fresh() is not shown
        assert told.mint.started == 3


async def test_a_rejected_token_that_has_been_replaced_means_that_another_is_next() -> None:
    async with story() as told:
        first = await told.credentials.fresh()
        assert told.credentials.reject(first)
        second = await told.credentials.fresh()
        assert told.credentials.reject(first)  # of a dial that was slower
        assert await told.credentials.fresh() is second


async def test_a_rejection_before_the_clock_was_set_back_is_no_reason_to_keep_a_token() -> None:
    async with story() as told:
        told.credentials.reject(await told.credentials.fresh())
        told.clock.move(-HOUR)
        assert told.credentials.reject(await told.credentials.fresh())


async def test_a_rejected_token_does_not_serve_when_minting_fails() -> None:
    async with story() as told:
        told.credentials.reject(await told.credentials.fresh())
        told.mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
        with pytest.raises(ProxyError):
            await told.shown()


# -- a fleet that shares the API's limit ---------------------------------------------------------


async def test_a_renewal_backs_off_for_a_minute_while_a_first_mint_backs_off_for_less() -> None:
    # In an outage 2,000 proxies with valid tokens called 225 times a second.
    async with story() as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
        told.clock.move(61)
        await told.shown()
        assert told.mint.started == 2
        for _ in range(int(RENEWAL_SECONDS_MIN)):
            told.clock.move(1)
            assert await told.shown() == b"not-a-real-token-1"
        assert told.mint.started == 2
        told.clock.move(RENEWAL_SECONDS_MIN + 1)  # the random part is as long, and doubles
        await told.shown()
        assert told.mint.started == 3


async def test_a_renewals_back_off_ends_with_its_token() -> None:
    # Clients whose proxy has no valid token any more wait for the next call.
    async with story() as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
        for _ in range(10):
            told.clock.move(300)
            await told.shown()
        told.clock.move(HOUR - 120 - 3000 - 1)
        calls = told.mint.started
        assert await told.shown() == b"not-a-real-token-1"
        told.mint.failure = None
        told.clock.move(1)
        assert await told.shown() == b"not-a-real-token-%d" % told.mint.started
        assert calls <= told.mint.started <= calls + 2


async def test_an_outage_that_ended_before_the_token_did_refuses_no_client() -> None:
    # The last renewal had failed less than a minute before the token ran out. The next client was
    # refused with that failure, although the API worked again.
    async with story() as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
        told.clock.move(HOUR - 120 - 30)
        assert await told.shown() == b"not-a-real-token-1"
        told.mint.failure = None
        told.clock.move(31)
        assert await told.shown() == b"not-a-real-token-3"


async def test_a_retry_after_makes_a_renewals_back_off_longer() -> None:
    async with story() as told:
        await told.shown()
        asked = RENEWAL_SECONDS_MIN * 2
        told.mint.failure = ProxyError(ErrorKind.API_THROTTLED, retry_after_seconds=asked)
        told.clock.move(61)
        await told.shown()
        told.clock.move(asked)
        await told.shown()
        assert told.mint.started == 2


async def test_a_429_lengthens_the_accepted_age_and_successes_shorten_it() -> None:
    async with story() as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_THROTTLED)
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                told.clock.move(700)
                await told.shown()
        assert [line["log_level"] for line in lines] == ["warning"]
        assert lines[0]["accepted_age_seconds"] == 450
        lengthened = told.credentials.accepted_age_seconds
        assert lengthened > 1000
        told.mint.failure = None
        told.clock.move(700)
        with structlog.testing.capture_logs() as lines:
            for _ in range(200):
                await told.shown()
                await turns()
                assert told.credentials.accepted_age_seconds <= lengthened
                lengthened = told.credentials.accepted_age_seconds
                told.clock.move(lengthened / 2 + 1)
        assert told.credentials.accepted_age_seconds == 60
        assert [line["log_level"] for line in lines] == ["info"]


async def test_a_failure_other_than_a_429_does_not_lengthen_the_accepted_age() -> None:
    async with story() as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
        told.clock.move(200)
        await told.shown()
        assert told.credentials.accepted_age_seconds == 60


async def test_connections_share_tokens_while_an_age_of_zero_is_throttled() -> None:
    async with story(max_age_seconds=0) as told:
        await told.shown()
        told.mint.failure = ProxyError(ErrorKind.API_THROTTLED)
        assert await told.shown() == b"not-a-real-token-1"
        told.mint.failure = None
        for _ in range(10):
            assert await told.shown() == b"not-a-real-token-1"
        told.clock.move(400)
        shown = {await told.shown() for _ in range(10)}
        assert len(shown) == 10


# -- the API's bad days ---------------------------------------------------------------------------

DOWN = ErrorKind.API_UNREACHABLE


@pytest.mark.parametrize("max_age_seconds", [60, 0])
async def test_a_transient_failure_is_waited_for_and_fails_no_connection(
    max_age_seconds: float,
) -> None:
    async with story(max_age_seconds) as told:
        told.mint.failure = ProxyError(DOWN)
        told.mint.fails_until = T0 + 10
        assert (await told.shown()).startswith(b"not-a-real-token-")
        assert 10 <= told.clock() - T0 <= 10 + BACKOFF_SECONDS_MAX
        assert told.mint.started <= 7


@pytest.mark.parametrize("max_age_seconds", [60, 0])
async def test_an_outage_longer_than_the_timeout_is_reported_within_it(
    max_age_seconds: float,
) -> None:
    async with story(max_age_seconds) as told:
        told.mint.failure = ProxyError(DOWN)
        with pytest.raises(ProxyError) as refused:
            await told.shown()
        assert refused.value.kind is DOWN
        assert told.clock() - T0 <= TIMEOUT_SECONDS
        assert told.mint.started <= 7


async def test_a_connection_that_arrives_during_the_back_off_waits_with_the_others() -> None:
    # Each newcomer of an outage called once on arrival: a thousand clients, a thousand calls.
    async with story() as told:
        told.mint.failure = ProxyError(DOWN)
        told.sleeping = asyncio.Event()
        asking = []
        for _ in range(1000):
            asking.append(asyncio.create_task(told.shown()))
            await turns()
        assert told.mint.started == 1
        told.mint.failure = None
        told.clock.move(BACKOFF_SECONDS_MIN)
        told.sleeping.set()
        assert set(await asyncio.gather(*asking)) == {b"not-a-real-token-2"}
        assert told.mint.started == 2


@pytest.mark.parametrize("max_age_seconds", [60, 0])
async def test_a_thousand_clients_of_an_outage_make_a_handful_of_calls(
    max_age_seconds: float,
) -> None:
    # With a token for each (0) those that waited for a free thread each found out by themselves.
    async with story(max_age_seconds) as told:
        told.mint.failure = ProxyError(DOWN)
        told.mint.threads = asyncio.Semaphore(THREADS_MAX)
        asking = [asyncio.create_task(told.shown()) for _ in range(1000)]
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert {getattr(outcome, "kind", None) for outcome in outcomes} == {DOWN}
        assert told.mint.finished <= 7 + (THREADS_MAX if max_age_seconds == 0 else 0)


async def test_a_permanent_failure_is_not_asked_for_again_during_the_back_off() -> None:
    async with story() as told:
        told.mint.failure = ProxyError(ErrorKind.WORKSPACE_ACCESS_MISSING)
        for _ in range(100):
            with pytest.raises(ProxyError) as refused:
                await told.shown()
            assert refused.value.kind is ErrorKind.WORKSPACE_ACCESS_MISSING
        assert (told.mint.started, told.clock()) == (1, T0)
        # After a person has fixed it, it takes no longer than the longest back-off.
        for _ in range(10):
            told.clock.move(BACKOFF_SECONDS_MAX)
            with pytest.raises(ProxyError):
                await told.shown()
        told.mint.failure = None
        told.clock.move(BACKOFF_SECONDS_MAX)
        await told.shown()
        assert told.mint.started == 12


@pytest.mark.slow
@pytest.mark.parametrize("max_age_seconds", [60, 0])
async def test_an_api_that_hangs_delays_a_caller_with_a_valid_token_little(
    max_age_seconds: float,
) -> None:
    # After the wait for the answer came the back-off, and then the next wait for an answer.
    loop = asyncio.get_running_loop()
    async with story(max_age_seconds, seconds=4 * HANG_SECONDS_MAX) as told:
        await told.shown()
        told.clock.move(HOUR / 2)
        told.mint.go.clear()
        begun = loop.time()
        shown = await asyncio.gather(*(told.shown() for _ in range(100)))
        assert set(shown) == {b"not-a-real-token-1"}
        assert loop.time() - begun < HANG_SECONDS_MAX + 1
        # Callers during the back-off do not wait at all.
        begun = loop.time()
        assert await told.shown() == b"not-a-real-token-1"
        assert loop.time() - begun < 1
        told.mint.go.set()


@pytest.mark.slow
async def test_a_token_for_each_is_minted_for_each_however_long_they_wait_for_their_turn() -> None:
    # The time in the queue counted as a call that hangs: of 401 connections 250 shared a token, and
    # the mints under way were thrown away.
    async with story(0, seconds=6 * HANG_SECONDS_MAX) as told:
        await told.shown()
        told.mint.seconds = HANG_SECONDS_MAX / 4
        count = 6 * THREADS_MAX  # the last ones wait for longer than a call may
        shown = await asyncio.gather(*(told.shown() for _ in range(count)))
        assert len(set(shown)) == count
        assert (told.mint.started, told.mint.cancelled) == (count + 1, 0)


@pytest.mark.slow
async def test_a_mint_for_one_connection_that_hangs_is_a_failure_and_its_token_is_kept() -> None:
    async with story(0, seconds=3 * HANG_SECONDS_MAX) as told:
        await told.shown()
        told.clock.move(1)
        told.mint.go.clear()
        assert await told.shown() == b"not-a-real-token-1"
        assert told.mint.cancelled == 0
        told.mint.go.set()
        await turns()
        newest = told.credentials.newest
        assert newest is not None
        assert newest.secret.reveal() == b"not-a-real-token-2"


async def test_a_caller_that_gives_up_does_not_lose_the_mint_of_its_own() -> None:
    async with story(0) as told:
        told.mint.go.clear()
        leaving = asyncio.create_task(told.shown())
        await turns()
        leaving.cancel()
        await asyncio.wait([leaving])
        told.mint.go.set()
        await turns()
        assert told.mint.cancelled == 0
        assert told.credentials.newest is not None


async def test_a_mint_that_is_late_does_not_replace_a_newer_token() -> None:
    async with story(0) as told:
        told.mint.go.clear()
        slow = told.mint.go
        late = asyncio.create_task(told.shown())
        await turns()
        told.mint.go = asyncio.Event()
        told.mint.go.set()
        assert await told.shown() == b"not-a-real-token-2"
        slow.set()
        assert await late == b"not-a-real-token-1"
        newest = told.credentials.newest
        assert newest is not None
        assert newest.secret.reveal() == b"not-a-real-token-2"


@pytest.mark.slow
@pytest.mark.parametrize("max_age_seconds", [60, 0])
async def test_a_caller_that_joins_a_hanging_call_waits_no_longer_than_its_own_timeout(
    max_age_seconds: float,
) -> None:
    # It waited for the end of the call that it had found under way, and then for another.
    loop = asyncio.get_running_loop()
    async with story(max_age_seconds, timeout_seconds=1.0) as told:
        told.mint.go.clear()
        first = asyncio.create_task(told.shown())
        await turns()
        begun = loop.time()
        with pytest.raises(ProxyError) as refused:
            await told.shown()
        assert refused.value.kind is DOWN
        assert "no answer within 1 seconds" in refused.value.detail
        assert loop.time() - begun < 1.0 + DEADLINE_GRACE_SECONDS + 0.5
        await asyncio.wait([first])


async def test_a_clock_that_is_set_back_in_an_outage_does_not_make_the_back_off_longer() -> None:
    async with story() as told:
        told.mint.failure = ProxyError(ErrorKind.WORKSPACE_LOGIN_FAILED)
        with pytest.raises(ProxyError):
            await told.shown()
        told.mint.failure = None
        told.clock.move(-HOUR)
        for _ in range(2):
            told.clock.move(BACKOFF_SECONDS_MAX)
            with suppress(ProxyError):
                await told.shown()
        assert told.mint.started == 2


class Soak:
    """Ten hours of connections, with an API that fails a third of the time."""

    HOURS = 10
    CONNECTIONS = 10_000
    LIFE_SECONDS = 3600.0

    def __init__(self, seed: int, failing: str) -> None:
        self.random = random.Random(seed)
        self.clock = FakeClock(T0)
        self.calls = 0
        self.failing = failing
        self.usable_until = 0.0  # what the test knows of the newest token
        self.stale = 0  # connections that were given a token older than it should be

    async def mint(self) -> Credential:
        self.calls += 1
        requested_at = self.clock()
        self.clock.move(self.random.uniform(0.05, 0.4))
        if self.fails():
            raise ProxyError(self.random.choice([DOWN, ErrorKind.API_THROTTLED]))
        expires_at = requested_at + self.LIFE_SECONDS
        self.usable_until = expires_at - MINUTE.expiry_margin_seconds
        return Credential(Secret(b"not-a-real-token"), requested_at, expires_at)

    def fails(self) -> bool:
        """A third of the time: in outages of 20 minutes an hour, or at random."""
        if self.failing == "outages":
            return (self.clock() - T0) % 3600 >= 2400
        return self.random.random() < 1 / 3

    async def run(self, max_age_seconds: float) -> int:
        """Return how many of the connections failed."""
        settings = CredentialsSettings(token_max_age_seconds=max_age_seconds)
        calls = PendingCalls()
        credentials = LocalTokenSource(
            self.mint,
            settings,
            build_metrics(),
            calls,
            clock=self.clock,
            jitter=self.random.random,
            sleep=self.clock.sleep,
        )
        failed = 0
        mean_seconds = self.HOURS * 3600 / self.CONNECTIONS
        for _ in range(self.CONNECTIONS):
            self.clock.move(self.random.expovariate(1 / mean_seconds))
            usable = self.clock() < self.usable_until
            asked_at = self.clock()
            try:
                shown = await credentials.fresh()
            except ProxyError:
                assert not usable, "it failed while there was a valid token"
                failed += 1
            else:
                assert self.clock() < shown.expires_at - MINUTE.expiry_margin_seconds
                if shown.requested_at < asked_at - max_age_seconds:
                    self.stale += 1
            await turns(2)
        await calls.close()
        return failed


@pytest.mark.parametrize("failing", ["outages", "at random"])
@pytest.mark.parametrize("max_age_seconds", [60, 1800, 3300])
async def test_soak_no_connection_fails_while_a_valid_token_exists(
    max_age_seconds: float, failing: str
) -> None:
    soak = Soak(20_261_122, failing)
    failed = await soak.run(max_age_seconds)
    seconds = soak.clock() - T0
    assert 9.5 * 3600 < seconds < 10.5 * 3600
    assert failed == 0
    # One call ahead of need at half the age; and while it fails one each back-off, whose sure part
    # is half of the longest once it has doubled four times.
    successes = seconds / (max_age_seconds * 0.5)
    outage = seconds / 3 / (BACKOFF_SECONDS_MAX / 2) if failing == "outages" else successes
    assert soak.calls <= successes + outage + 5 * Soak.HOURS
    # It bites: in an outage connections are served with tokens that are older than they should be.
    assert soak.stale > 0 or failing == "at random" or max_age_seconds > 60


async def test_leaving_ends_a_mint_that_is_under_way() -> None:
    async with story() as told:
        told.mint.go.clear()
        waiting = asyncio.create_task(told.shown())
        await turns()
    assert told.mint.cancelled == 1
    await asyncio.wait([waiting])
    assert waiting.cancelled()


async def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    # A port in use ended the program with a group that nothing above was ready for.
    async def fail() -> None:
        async with story() as told:
            await told.shown()
            raise OSError("in use")

    with pytest.raises(OSError, match="in use"):
        await fail()


async def test_no_token_shows_in_a_repr() -> None:
    async with story() as told:
        got = await told.credentials.fresh()
        assert "not-a-real" not in repr(got) + str(got) + repr(vars(told.credentials))


async def test_a_bug_in_a_mint_is_raised_once_and_not_retried_for_ever() -> None:
    # It is no failure of the API's, so no back-off started: callers called again without a pause.
    calls = 0

    async def broken() -> Credential:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError

    credentials = LocalTokenSource(broken, CredentialsSettings(), build_metrics(), PendingCalls())
    with pytest.raises(ProxyError) as refused:
        async with asyncio.timeout(5):
            await credentials.fresh()
    assert refused.value.kind is ErrorKind.INTERNAL
    assert calls == 1


# -- how many mints are under way ----------------------------------------------------------------


class EventMint:
    """Starts and resets the back-off as a token source does."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.backoff = Backoff(self.clock, lambda: 1.0)
        self.calls = PendingCalls()
        self.made = self.under_way = self.peak = 0
        self.failure: ProxyError | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self) -> Credential:
        self.made += 1
        number = self.made
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            await self.go.wait()
            await asyncio.sleep(0)
        finally:
            self.under_way -= 1
        if self.failure is not None:
            self.backoff.start(self.failure)
            raise self.failure
        self.backoff.reset()
        return Credential(Secret(b"not-a-real-token-%d" % number), 0.0, 3600.0)


def both(mint: EventMint) -> list[Minting]:
    return [MintShared(mint, mint.calls), MintPerConnection(mint, mint.calls, lambda: mint.backoff)]


@pytest.mark.parametrize("own", [False, True])
async def test_callers_at_the_same_time_share_one_token_or_get_one_each(own: bool) -> None:
    mint = EventMint()
    tokens = both(mint)[own]
    got = await asyncio.gather(*(tokens.token(None) for _ in range(50)))
    assert len({credential.secret for credential in got}) == mint.made == (50 if own else 1)
    assert mint.peak == (THREADS_MAX if own else 1)


@pytest.mark.parametrize("own", [False, True])
async def test_a_call_that_hangs_is_a_failure_and_goes_on_until_the_end(own: bool) -> None:
    mint = EventMint()
    mint.go.clear()
    tokens = both(mint)[own]
    with pytest.raises(ProxyError) as refused:
        await tokens.token(0.01)
    assert refused.value.kind is ErrorKind.API_UNREACHABLE
    assert "no answer within 0.01 seconds" in refused.value.detail
    assert mint.under_way == 1
    await mint.calls.close()
    assert mint.under_way == 0


async def test_after_a_failure_one_finds_out_and_the_others_wait_for_it() -> None:
    mint = EventMint()
    tokens = MintPerConnection(mint, mint.calls, lambda: mint.backoff)
    mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
    outcomes = await asyncio.gather(
        *(tokens.token(None) for _ in range(50)), return_exceptions=True
    )
    assert outcomes == [mint.failure] * 50
    assert mint.made == THREADS_MAX
    mint.clock.move(BACKOFF_SECONDS_MIN)
    await asyncio.gather(*(tokens.token(None) for _ in range(50)), return_exceptions=True)
    assert mint.made == THREADS_MAX + 1
    mint.clock.move(2 * BACKOFF_SECONDS_MIN)
    mint.failure = None
    got = await asyncio.gather(*(tokens.token(None) for _ in range(50)))
    assert len({credential.secret for credential in got}) == 50
    await mint.calls.close()


@pytest.mark.parametrize("own", [False, True])
async def test_a_token_is_refreshed_ahead_only_where_a_later_caller_may_use_it(own: bool) -> None:
    mint = EventMint()
    tokens = both(mint)[own]
    tokens.refresh()
    tokens.refresh()
    await asyncio.sleep(0)
    assert mint.made == (0 if own else 1)
    await mint.calls.close()
