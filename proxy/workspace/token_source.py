"""The tokens of one identity: a fresh one for each login, whatever the API does.

Every login uses a token minted at most `token_max_age_seconds` ago (the rule is in `freshness`).
Connections that arrive together share one mint; while connections keep coming the next token is
minted ahead of need, so none of them waits; while none come, nothing is minted. When minting fails,
the newest token that is still valid serves.

Times are the wall clock's (a monotonic one stops while a laptop sleeps) and come in as a function.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

from proxy.config import CredentialsSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.wire.secret import Secret
from proxy.workspace.client import Credential
from proxy.workspace.freshness import Freshness, Need, is_valid, judge
from proxy.workspace.minting import Minting, MintPerConnection, MintShared
from proxy.workspace.single_flight import Backoff, is_transient

# A token that is valid but older than it should be is used once a call is under way so long.
HANG_SECONDS_MAX: Final = 5.0

# A call that ends with its own deadline knows why; who waits for it gives it so long to say so.
DEADLINE_GRACE_SECONDS: Final = 0.2

# A new token is tried once for one that an upstream refused; if it is refused as well, it is not
# the token. Nor does a role that does not exist cost a mint with each client that names it.
REJECTION_SECONDS_MIN: Final = 30.0


def may_be_shown(credential: Credential, now: float, freshness: Freshness) -> bool:
    """Whether a credential that was got for one dial may still be shown in it.

    One that was minted for its connection alone is that connection's own until it expires.
    """
    if freshness.max_age_seconds == 0:
        return is_valid(credential, now, freshness)
    return judge(credential, now, freshness) is not Need.MINT


class LocalTokenSource:
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
        self._timeout_seconds = settings.mint_timeout_seconds
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self._newest: Credential | None = None
        self._started = self._newest_number = 0  # mints, and which of them the newest is from
        self._rejected_at = -math.inf
        self._backoff = Backoff(clock, jitter)
        self._minting: Minting = (
            MintShared(self._mint_and_keep)
            if settings.token_max_age_seconds > 0
            else MintPerConnection(self._mint_and_keep, self._backoff)
        )

    async def close(self) -> None:
        """End the mints that are under way."""
        await self._minting.close()

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
            case Need.USE_AND_REFRESH if newest is not None:
                if not self._backoff.remaining_seconds:
                    self._minting.refresh()
                return newest
        return await self._mint_or_valid()

    def is_fresh(self, credential: Credential) -> bool:
        """Whether a credential that was got some time ago may still be shown."""
        return may_be_shown(credential, self._clock(), self._freshness)

    def reject(self, credential: Credential) -> bool:
        """Tell that an upstream refused a credential: whether the next one will be another.

        It is forgotten, unless it is what another was replaced with a moment ago.
        """
        if self._newest is not credential:
            return True
        now = self._clock()
        if 0 <= now - self._rejected_at < REJECTION_SECONDS_MIN:
            return False
        self._newest, self._rejected_at = None, now
        return True

    async def _mint_or_valid(self) -> Credential:
        """Return a credential minted now; while the API fails, the newest that is still valid."""
        ends_at = self._clock() + self._timeout_seconds
        while True:  # ends with the caller's patience, and with every failure that is for good
            valid, quiet_seconds, failure = (
                self._valid(),
                self._backoff.remaining_seconds,
                self._backoff.failure,
            )
            if valid is not None and quiet_seconds:
                return valid
            if failure is not None and quiet_seconds:
                if not is_transient(failure) or self._clock() + quiet_seconds > ends_at:
                    raise failure.with_traceback(None)  # nothing new is to be heard so soon
                await self._sleep(quiet_seconds)  # with all who came before
                continue
            # With a valid token at hand, an API that hangs is not waited for to the end.
            hang_seconds = None if valid is None else HANG_SECONDS_MAX
            try:
                async with asyncio.timeout(ends_at - self._clock() + DEADLINE_GRACE_SECONDS):
                    return await self._minting.token(hang_seconds)
            except TimeoutError:
                if valid is not None:
                    return valid  # so many wait before it
                raise self._no_answer() from None
            except ProxyError as error:
                if (
                    not self._backoff.remaining_seconds
                ):  # it hangs, or has a bug of ours: nobody was told
                    self._backoff.start(error)

    def _no_answer(self) -> ProxyError:
        if self._backoff.failure is not None:
            return self._backoff.failure.with_traceback(None)
        detail = f"no answer within {self._timeout_seconds:g} seconds"
        return ProxyError(ErrorKind.API_UNREACHABLE, detail)

    async def _mint_and_keep(self) -> Credential:
        """Call the API once, and remember how it went. Raises ProxyError."""
        self._started += 1
        number = self._started
        try:
            credential = await self._mint()
            if not is_valid(credential, self._clock(), self._freshness):
                raise ProxyError(ErrorKind.CREDENTIAL_INVALID, "it expires within the margin")
        except ProxyError as error:
            self._metrics.token_mint_failed(error.reason)
            self._backoff.start(error)
            raise
        self._metrics.token_minted()
        self._backoff.reset()
        if number > self._newest_number:  # else it is late, and a newer one has come
            self._newest, self._newest_number = credential, number
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

    def reject(self, credential: Credential) -> bool:
        """Return that the next one may be another: the next login reads the file again."""
        return True


class CredentialSource(Protocol):
    """What the dialer needs of the two above."""

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError."""

    def is_fresh(self, credential: Credential) -> bool:
        """Whether a credential that was got some time ago may still be shown."""

    def reject(self, credential: Credential) -> bool:
        """Tell that an upstream refused a credential: whether the next one will be another."""


class TokenSource(CredentialSource, Protocol):
    """The tokens of an account, whoever mints them."""

    @property
    def newest(self) -> Credential | None:
        """The newest token that is known here, valid or not."""
