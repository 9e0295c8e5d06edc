"""How fresh a token is, and when the next one is minted: one number, `token_max_age_seconds`.

Every login uses a token minted at most that long ago. Connections that arrive together share one
mint; while connections keep coming the next token is minted ahead of need, so none of them waits;
while none come, nothing is minted. When minting fails, the newest token that is still valid serves.

Times are the wall clock's (a monotonic one stops while a laptop sleeps) and come in as a function.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from proxy.config import CredentialsSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.upstream.workspace import Credential
from proxy.wire.secret import Secret

# At this part of its permitted age a token that is asked for is renewed behind the asker's back.
RENEW_AT: Final = 0.5


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
    """The tokens of one identity in one workspace; any endpoint there takes them.

    Use it as an async context manager: it owns the task of the mint that is under way.
    """

    def __init__(
        self,
        mint: Callable[[], Awaitable[Credential]],
        settings: CredentialsSettings,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._mint = mint
        self._freshness = Freshness(settings.token_max_age_seconds, settings.expiry_margin_seconds)
        self._metrics = metrics
        self._clock = clock
        self._newest: Credential | None = None
        self._minting: asyncio.Task[Credential | ProxyError] | None = None
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._minting is not None:
            self._minting.cancel()
        # Without the block's own error, which would come out wrapped in a group.
        await self._tasks.__aexit__(None, None, None)

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError when there is none."""
        newest = self._newest
        need = judge(newest, self._clock(), self._freshness)
        if newest is None or need is Need.MINT:
            return await self._minted()
        if need is Need.USE_AND_RENEW:
            self._start_mint()
        return newest

    def reject(self, credential: Credential) -> None:
        """Forget a credential that an upstream refused, so that the next one asked for is new."""
        if self._newest is credential:
            self._newest = None

    async def _minted(self) -> Credential:
        """Return a credential minted now; if that fails, the newest that is still valid."""
        if self._freshness.max_age_seconds == 0:
            outcome = await self._renew()
        else:
            # With everybody else who waits; shielded, so that one who gives up does not end it.
            outcome = await asyncio.shield(self._start_mint())
        if not isinstance(outcome, ProxyError):
            return outcome
        if self._newest is not None and is_valid(self._newest, self._clock(), self._freshness):
            return self._newest
        raise outcome

    def _start_mint(self) -> asyncio.Task[Credential | ProxyError]:
        if self._minting is None or self._minting.done():
            self._minting = self._tasks.create_task(self._renew(), name="mint")
        return self._minting

    async def _renew(self) -> Credential | ProxyError:
        outcome = await self._attempt()
        if not isinstance(outcome, ProxyError):
            self._newest = outcome
        return outcome

    async def _attempt(self) -> Credential | ProxyError:
        """Mint once. A failure is a value: nobody may be waiting for it."""
        try:
            credential = await self._mint()
        except ProxyError as error:
            self._metrics.token_mint_failed()
            return error
        if not is_valid(credential, self._clock(), self._freshness):
            self._metrics.token_mint_failed()
            return ProxyError(ErrorKind.CREDENTIAL_INVALID, "it expires within the margin")
        self._metrics.token_minted()
        return credential


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

    def reject(self, credential: Credential) -> None:
        """Do nothing: the next login reads the file again."""


class CredentialSource(Protocol):
    """What the dialer needs of the two above."""

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError."""

    def reject(self, credential: Credential) -> None:
        """Forget a credential that an upstream refused."""
