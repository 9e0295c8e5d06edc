"""How fresh a token is, and when the next one is minted: one number, `token_max_age_seconds`.

Every login uses a token minted at most that long ago. Connections that arrive together share one
mint; while connections keep coming the next token is minted ahead of need, so none of them waits;
while none come, nothing is minted. When minting fails, the newest token that is still valid serves.

Times are the wall clock's (a monotonic one stops while a laptop sleeps) and come in as a function.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final, Protocol

from proxy.config import CredentialsSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.upstream.shared import Quiet, Shared, is_transient
from proxy.upstream.threads import THREADS_MAX
from proxy.upstream.workspace import Credential
from proxy.wire.secret import Secret

# At this part of its permitted age a token that is asked for is renewed behind the asker's back.
RENEW_AT: Final = 0.5

# A token that is valid but older than it should be is used after this long without a newer one.
HANG_SECONDS_MAX: Final = 5.0

# A call that ends with its own deadline knows why; who waits for it gives it so long to say so.
LAST_WORD_SECONDS: Final = 0.2


class Need(Enum):
    """What an asker's moment calls for."""

    USE = auto()
    USE_AND_RENEW = auto()
    MINT = auto()


@dataclass(frozen=True, slots=True)
class Freshness:
    """The rule's two numbers, in seconds."""

    max_age_seconds: float
    expiry_margin_seconds: float


def is_valid(credential: Credential | None, now: float, freshness: Freshness) -> bool:
    """Whether the credential may be shown at all: far enough from its expiry, whatever its age."""
    return credential is not None and now < credential.expires_at - freshness.expiry_margin_seconds


def judge(credential: Credential | None, now: float, freshness: Freshness) -> Need:
    """Return what to do for one who asks now. Pure: the whole policy is here."""
    if credential is None or not is_valid(credential, now, freshness):
        return Need.MINT
    age = now - credential.requested_at
    if not 0 <= age <= freshness.max_age_seconds or freshness.max_age_seconds == 0:
        return Need.MINT  # also when the clock was set back: the age is then unknown
    return Need.USE_AND_RENEW if age > freshness.max_age_seconds * RENEW_AT else Need.USE


class Credentials:
    """The tokens of one identity in one workspace; any endpoint there takes them."""

    def __init__(
        self,
        mint: Callable[[], Awaitable[Credential]],
        settings: CredentialsSettings,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`jitter` returns a number from 0 to 1."""
        self._mint = mint
        self._freshness = Freshness(settings.token_max_age_seconds, settings.expiry_margin_seconds)
        self._patience_seconds = settings.mint_timeout_seconds
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self._newest: Credential | None = None
        self._renewal = Shared(self._renew)
        # More calls than threads would wait there, and not hear that the first ones failed.
        self._places = asyncio.Semaphore(THREADS_MAX)
        self._quiet = Quiet(clock, jitter)

    async def close(self) -> None:
        """End the mint that is under way."""
        await self._renewal.close()

    @property
    def newest(self) -> Credential | None:
        """The newest token, valid or not, for those who show its age."""
        return self._newest

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError when there is none."""
        newest = self._newest
        match judge(newest, self._clock(), self._freshness):
            case Need.USE if newest is not None:
                return newest
            case Need.USE_AND_RENEW if newest is not None:
                if not self._quiet.seconds:
                    self._renewal.start()
                return newest
        return await self._minted()

    def is_fresh(self, credential: Credential) -> bool:
        """Whether a credential that was got some time ago may still be shown.

        One that was minted for its connection alone is that connection's own until it expires.
        """
        if self._freshness.max_age_seconds == 0:
            return is_valid(credential, self._clock(), self._freshness)
        return judge(credential, self._clock(), self._freshness) is not Need.MINT

    def reject(self, credential: Credential) -> None:
        """Forget a credential that an upstream refused, so that the next one asked for is new."""
        if self._newest is credential:
            self._newest = None

    async def _minted(self) -> Credential:
        """Return a credential minted now; while the API fails, the newest that is still valid."""
        ends_at = self._clock() + self._patience_seconds
        while True:  # ends with the caller's patience, and with every failure that is for good
            valid, quiet_seconds, failure = self._valid(), self._quiet.seconds, self._quiet.failure
            if valid is not None and quiet_seconds:
                return valid
            if failure is not None and quiet_seconds:
                if not is_transient(failure) or self._clock() + quiet_seconds > ends_at:
                    raise failure.with_traceback(None)  # nothing new is to be heard so soon
                await self._sleep(quiet_seconds)  # with all who came before
                continue
            # The call may have begun before this caller came, and another may follow it. With a
            # valid token at hand, an API that hangs is not waited for to the end.
            left_seconds = ends_at - self._clock()
            wait_seconds = left_seconds + LAST_WORD_SECONDS if valid is None else HANG_SECONDS_MAX
            try:
                async with asyncio.timeout(wait_seconds):
                    return await self._mint_now()
            except TimeoutError:
                if valid is None:
                    raise self._no_answer() from None
                self._quiet.begin()
            except ProxyError as error:
                if self._quiet.failure is None:  # not the API's: a bug of ours in the call
                    self._quiet.begin(error)

    def _no_answer(self) -> ProxyError:
        if self._quiet.failure is not None:
            return self._quiet.failure.with_traceback(None)
        detail = f"no answer within {self._patience_seconds:g} seconds"
        return ProxyError(ErrorKind.API_UNREACHABLE, detail)

    async def _mint_now(self) -> Credential:
        if self._freshness.max_age_seconds > 0:
            return await self._renewal.result()  # with everybody else who waits
        async with self._places:
            failure = self._quiet.failure
            if failure is None:
                return await self._renew()  # its own, for this connection alone
            if self._quiet.seconds:
                raise failure.with_traceback(None)  # it failed for those before
        await self._renewal.result()  # one of all is enough to find out that an outage ends
        return await self._mint_now()

    async def _renew(self) -> Credential:
        """Call the API once, and remember how it went. Raises ProxyError."""
        try:
            credential = await self._mint()
            if not is_valid(credential, self._clock(), self._freshness):
                raise ProxyError(ErrorKind.CREDENTIAL_INVALID, "it expires within the margin")
        except ProxyError as error:
            self._metrics.token_mint_failed(error.reason)
            self._quiet.begin(error)
            raise
        self._metrics.token_minted()
        self._quiet.end()
        self._newest = credential
        return credential

    def _valid(self) -> Credential | None:
        return self._newest if is_valid(self._newest, self._clock(), self._freshness) else None


class PasswordFile:
    """A native role's password, in place of tokens. The file is read at each login."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    async def fresh(self) -> Credential:
        """Return the password. Raises ProxyError when the file cannot be read or is empty."""
        try:
            text = self._path.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            detail = f"credentials.password_file: {error.strerror}"
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, detail) from error
        if not text or b"\0" in text:
            detail = "credentials.password_file is empty or has a NUL byte"
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, detail)
        return Credential(Secret(text), time.time(), math.inf, is_password=True)

    def is_fresh(self, credential: Credential) -> bool:
        """Say yes: the file was read for this dial."""
        return True

    def reject(self, credential: Credential) -> None:
        """Do nothing: the next login reads the file again."""


class CredentialSource(Protocol):
    """What the dialer needs of the two above."""

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError."""

    def is_fresh(self, credential: Credential) -> bool:
        """Whether a credential that was got some time ago may still be shown."""

    def reject(self, credential: Credential) -> None:
        """Forget a credential that an upstream refused."""
