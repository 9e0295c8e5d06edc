"""Tokens of one identity: a fresh one for each login, whatever the API does.

Every login uses a token minted at most `token_max_age_seconds` ago (the rule is in `freshness`).
Connections that arrive together share one mint. While connections keep coming, the next token is
minted ahead of need, so that none of them waits; while none come, nothing is minted. When minting
fails, the newest token that is still valid is used.

For: when to mint, and what a failed mint means for callers. Not for: which resource a token is
minted for (`minter`), or the call (`client`). Times are the wall clock's, because a monotonic clock
stops while a laptop sleeps; the clock is an argument.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol

from proxy.blocking import THREADS_MAX
from proxy.config import CredentialsSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.workspace.credential import Credential
from proxy.workspace.freshness import (
    THROTTLED_DELAY,
    AcceptedAge,
    Freshness,
    Need,
    is_fresh,
    is_valid,
    judge,
    renewal_delay,
)
from proxy.workspace.outage import ApiCall, Outage
from proxy.workspace.single_flight import (
    BACKOFF_SECONDS_MIN,
    Backoff,
    PendingCalls,
    SingleFlight,
    is_transient,
)

# A token that is valid but too old is used once a mint has taken this long.
HANG_SECONDS_MAX: Final = 5.0

# A call that reaches its own deadline says why. Its callers wait this much longer for that reason.
DEADLINE_GRACE_SECONDS: Final = 0.2

# A token that an upstream refused is replaced once; if the new one is refused too, the token is not
# the cause. A role that does not exist must not cost a mint for each client that names it.
REJECTION_SECONDS_MIN: Final = 30.0

# The assumed lifetime of a token before the workspace has issued one.
LIFETIME_SECONDS: Final = 3600.0

# How long an outage is probed after the last client that was refused.
PROBING_SECONDS: Final = 60.0

_log = get_logger(__name__)

Mint = Callable[[], Awaitable[Credential]]


class TokenSource(Protocol):
    """The tokens of one account, minted in this process or in the supervisor."""

    @property
    def newest(self) -> Credential | None:
        """The newest token known in this process, valid or not."""

    @property
    def accepted_age_seconds(self) -> float:
        """The age up to which a token is used now: as set, or longer after a 429."""

    async def fresh(self) -> Credential:
        """Return a token to log in with now. Raises ProxyError."""

    def is_fresh(self, credential: Credential) -> bool:
        """Return whether a dial may still use a token that it got some time ago."""

    def reject(self, credential: Credential) -> bool:
        """Invalidate a refused token. Return whether a retry would use a different one."""


class LocalTokenSource:
    """The tokens of one identity in one workspace; every endpoint there accepts them."""

    def __init__(
        self,
        mint: Mint,
        settings: CredentialsSettings,
        metrics: Metrics,
        pending: PendingCalls,
        *,
        outage: Outage | None = None,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`pending` is the owner's, who closes it. `jitter` returns a number from 0 to 1."""
        self._mint = mint
        self._age = AcceptedAge(
            Freshness(settings.token_max_age_seconds, settings.expiry_margin_seconds)
        )
        self._pending = pending
        self._outage = outage or Outage("workspace", clock)
        self._probing: asyncio.Task[None] | None = None
        self._probe_until = 0.0
        self._timeout_seconds = settings.mint_timeout_seconds
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self._newest: Credential | None = None
        self._started = self._newest_number = 0  # mints, and which of them the newest is from
        self._rejected_at = -math.inf
        self._first_backoff = Backoff(clock, jitter)  # while there is no valid token
        self._renewal_backoff = Backoff(clock, jitter)  # while there is one
        self._minting: Minting = (
            MintShared(self._mint_and_keep, pending)
            if settings.token_max_age_seconds > 0
            else MintPerConnection(self._mint_and_keep, pending, lambda: self._backoff)
        )

    @property
    def newest(self) -> Credential | None:
        """The newest token, valid or not."""
        return self._newest

    @property
    def accepted_age_seconds(self) -> float:
        """The age up to which a token is used now."""
        return self._age.seconds

    async def fresh(self) -> Credential:
        """Return a token to log in with now. Raises ProxyError when there is none."""
        newest = self._newest
        match judge(newest, self._clock(), self._age.freshness):
            case Need.USE if newest is not None:
                return newest
            case Need.USE_AND_REFRESH if newest is not None:
                if not self._backoff.remaining_seconds:
                    self._minting.refresh()
                return newest
        return await self._mint_or_fall_back()

    def is_fresh(self, credential: Credential) -> bool:
        """Return whether a dial may still use a token that it got some time ago."""
        return is_fresh(credential, self._clock(), self._age.freshness)

    def reject(self, credential: Credential) -> bool:
        """Invalidate a refused token. Return whether a retry would use a different one.

        A token that replaced a refused one a moment ago is kept: the cause is not the token.
        """
        if self._newest is not credential:
            return True
        now = self._clock()
        if 0 <= now - self._rejected_at < REJECTION_SECONDS_MIN:
            return False
        self._newest, self._rejected_at = None, now
        return True

    async def _mint_or_fall_back(self) -> Credential:
        """Return a token minted now; while the API fails, the newest that is still valid."""
        refusal = self._outage.refusal()
        if refusal is not None and self._valid() is None:
            if self._first_backoff.failure is None:  # no call was made since the last token ran out
                with suppress(ProxyError):
                    return await self._first_after_renewals()
            self._keep_probing()
            raise refusal
        ends_at = self._clock() + self._timeout_seconds
        while True:  # ends at `ends_at`, or with a permanent failure
            valid = self._valid()
            if self._backoff.remaining_seconds:
                if valid is not None:
                    return valid
                await self._sleep_through_backoff(ends_at)
                continue
            # With a valid token at hand, a call that hangs is not waited for until its deadline.
            hang_seconds = None if valid is None else HANG_SECONDS_MAX
            try:
                async with asyncio.timeout(ends_at - self._clock() + DEADLINE_GRACE_SECONDS):
                    return await self._minting.token(hang_seconds)
            except TimeoutError:  # too many callers are queued
                if valid is not None:
                    return valid
                raise self._no_answer() from None
            except ProxyError as error:
                if not self._backoff.remaining_seconds:  # the call hangs, or has a bug of ours
                    self._start_backoff(error)

    async def _first_after_renewals(self) -> Credential:
        """Mint where only renewals have failed so far, a minute apart: the outage may be over.

        Raises ProxyError, at the latest after the time for which a hanging call is waited for.
        """
        try:
            return await self._minting.token(HANG_SECONDS_MAX)
        except ProxyError as error:
            if not self._backoff.remaining_seconds:  # the call hangs
                self._start_backoff(error)
            raise

    def _keep_probing(self) -> None:
        """Make one call after another in the background until the outage is over."""
        self._probe_until = self._clock() + PROBING_SECONDS
        if self._probing is None or self._probing.done():
            self._probing = self._pending.start(self._probe())

    async def _probe(self) -> None:
        while self._outage.since is not None and self._clock() < self._probe_until:
            await self._sleep(max(self._backoff.remaining_seconds, BACKOFF_SECONDS_MIN))
            with suppress(ProxyError):  # it is recorded
                await self._minting.probe()

    async def _sleep_through_backoff(self, ends_at: float) -> None:
        """Wait with the earlier callers. Raises the failure if the wait would be useless."""
        failure, seconds = self._backoff.failure, self._backoff.remaining_seconds
        is_useless = self._clock() + seconds > ends_at
        if failure is not None and (is_useless or not is_transient(failure)):
            raise failure.with_traceback(None)
        await self._sleep(seconds)

    def _no_answer(self) -> ProxyError:
        if self._backoff.failure is not None:
            return self._backoff.failure.with_traceback(None)
        detail = f"no answer within {self._timeout_seconds:g} seconds"
        return ProxyError(ErrorKind.API_UNREACHABLE, detail)

    async def _mint_and_keep(self) -> Credential:
        """Call the API once; keep the token, or start the back-off. Raises ProxyError."""
        self._started += 1
        number = self._started
        try:
            credential = await self._mint()
            if not is_valid(credential, self._clock(), self._age.freshness):
                raise ProxyError(
                    ErrorKind.CREDENTIAL_INVALID,
                    "the token expires within credentials.expiry_margin_seconds",
                )
        except ProxyError as error:
            self._metrics.token_mint_failed(error.reason)
            self._record_failure(error)
            self._outage.record_failure(ApiCall.MINT, error, self._backoff.remaining_seconds)
            raise
        self._metrics.token_minted()
        self._record_success()
        self._outage.record_success(ApiCall.MINT)
        if number > self._newest_number:  # else a later mint was faster
            self._newest, self._newest_number = credential, number
        return credential

    @property
    def _backoff(self) -> Backoff:
        """The back-off in force: a renewal's is far longer, and ends with its token."""
        return self._first_backoff if self._valid() is None else self._renewal_backoff

    def _start_backoff(self, failure: ProxyError) -> None:
        valid, throttled = self._valid(), failure.kind is ErrorKind.API_THROTTLED
        if valid is not None:
            margin_seconds = self._age.freshness.expiry_margin_seconds
            seconds = valid.expires_at - margin_seconds - self._clock()
            self._renewal_backoff.start(failure, renewal_delay(seconds, throttled=throttled))
        elif throttled:
            self._first_backoff.start(failure, THROTTLED_DELAY)
        else:
            self._first_backoff.start(failure)

    def _record_failure(self, failure: ProxyError) -> None:
        ran_together = self._backoff.remaining_seconds > 0
        self._start_backoff(failure)
        if failure.kind is not ErrorKind.API_THROTTLED or ran_together:
            return
        was_lengthened, newest = self._age.lengthened, self._newest
        lifetime = LIFETIME_SECONDS if newest is None else newest.expires_at - newest.requested_at
        self._age.lengthen(self._clock(), lifetime)
        if self._age.lengthened and not was_lengthened:
            _log.warning(
                "the workspace API limits tokens; older ones are used",
                accepted_age_seconds=self._age.seconds,
                hint=failure.kind.value.hint,
            )

    def _record_success(self) -> None:
        self._first_backoff.reset()
        self._renewal_backoff.reset()
        was_lengthened = self._age.lengthened
        self._age.shorten()
        if was_lengthened and not self._age.lengthened:
            _log.info("the workspace API no longer limits tokens")

    def _valid(self) -> Credential | None:
        return self._newest if is_valid(self._newest, self._clock(), self._age.freshness) else None


# -- how many mints are under way ----------------------------------------------------------------


class Minting(Protocol):
    """Calls a mint for callers that wait. A mint that its caller has given up goes on."""

    async def token(self, hang_seconds: float | None) -> Credential:
        """Return a token that is minted while the caller waits. Raises ProxyError.

        Raises API_UNREACHABLE when a mint takes longer than `hang_seconds`, if that is not None.
        The time that the caller waits for a free thread does not count.
        """

    async def probe(self) -> None:
        """Mint, or wait for the mint that is under way. Raises ProxyError."""

    def refresh(self) -> None:
        """Start a mint that no caller waits for, unless one is under way."""


class MintShared:
    """One token for all callers that wait."""

    def __init__(self, mint: Mint, pending: PendingCalls) -> None:
        self._call = SingleFlight(mint, pending)

    async def token(self, hang_seconds: float | None) -> Credential:
        """Return the token of the mint that is under way. Raises ProxyError."""
        return await _result_within(hang_seconds, self._call)

    async def probe(self) -> None:
        """Mint, or wait for the mint that is under way. Raises ProxyError."""
        await self._call.result()

    def refresh(self) -> None:
        """Start a mint, unless one is under way."""
        self._call.start()


class MintPerConnection:
    """A token for each caller, `THREADS_MAX` mints at a time.

    After a failure one mint for all callers probes whether the API works again.
    """

    def __init__(self, mint: Mint, pending: PendingCalls, backoff: Callable[[], Backoff]) -> None:
        """`backoff` returns the back-off in force, which `mint` starts or resets."""
        self._mint = mint
        self._pending = pending
        self._backoff = backoff
        self._probe = SingleFlight(mint, pending)
        # More mints than threads would wait there, and not learn that the first ones failed.
        self._threads = asyncio.Semaphore(THREADS_MAX)

    async def token(self, hang_seconds: float | None) -> Credential:
        """Return a token minted for this caller alone. Raises ProxyError."""
        while True:  # ends with a failure, or after the probe has succeeded
            async with self._threads:
                backoff = self._backoff()
                failure = backoff.failure
                if failure is None:
                    own_call = SingleFlight(self._mint, self._pending)
                    return await _result_within(hang_seconds, own_call)
                if backoff.remaining_seconds:
                    raise failure.with_traceback(None)  # an earlier caller's mint failed
            await _result_within(hang_seconds, self._probe)

    async def probe(self) -> None:
        """Mint once for all who probe. Raises ProxyError."""
        await self._probe.result()

    def refresh(self) -> None:
        """Do nothing: no caller could use the token."""


async def _result_within(hang_seconds: float | None, call: SingleFlight[Credential]) -> Credential:
    try:
        async with asyncio.timeout(hang_seconds):
            return await call.result()
    except TimeoutError:
        detail = f"no answer within {hang_seconds:g} seconds"
        raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from None
