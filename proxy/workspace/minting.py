"""Who shares a mint: all who wait for one, or nobody.

Two classes with one interface. In both, a mint that its asker has given up goes on, and its token
is kept by whoever the mint tells; a mint that fails is told to all whom it concerns.

For: how many calls are under way. Not for: what becomes of a failure (`credentials`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from proxy.blocking import THREADS_MAX
from proxy.errors import ErrorKind, ProxyError
from proxy.workspace.client import Credential
from proxy.workspace.single_flight import Quiet, Shared

Mint = Callable[[], Awaitable[Credential]]


class Tokens(Protocol):
    """Either way."""

    async def token(self, hang_seconds: float | None) -> Credential:
        """Return a token minted for this asker, and perhaps for others. Raises ProxyError.

        A call that is under way for longer than `hang_seconds` is a failure; None: it is waited
        for. The time before it is made does not count.
        """

    def renew(self) -> None:
        """Mint one that nobody waits for, unless a mint is under way."""

    async def close(self) -> None:
        """End the mints that are under way."""


class SharedToken:
    """One token for all who wait."""

    def __init__(self, mint: Mint) -> None:
        self._call = Shared(mint)

    async def token(self, hang_seconds: float | None) -> Credential:
        """As in `Tokens`."""
        return await _within(hang_seconds, self._call)

    def renew(self) -> None:
        """As in `Tokens`."""
        self._call.start()

    async def close(self) -> None:
        """As in `Tokens`."""
        await self._call.close()


class OwnToken:
    """A token for each, so many at a time. After a failure one of all finds out if it is over."""

    def __init__(self, mint: Mint, quiet: Quiet) -> None:
        """`quiet` says what the last mint failed with; whoever mints keeps it."""
        self._mint = mint
        self._quiet = quiet
        self._scout = Shared(mint)
        self._under_way: set[Shared[Credential]] = set()
        # More calls than threads would wait there, and not hear that the first ones failed.
        self._places = asyncio.Semaphore(THREADS_MAX)

    async def token(self, hang_seconds: float | None) -> Credential:
        """As in `Tokens`."""
        while True:  # ends with a failure, or when the scout has come back
            async with self._places:
                failure = self._quiet.failure
                if failure is None:
                    return await _within(hang_seconds, self._own())
                if self._quiet.seconds:
                    raise failure.with_traceback(None)  # it failed for those before
            await _within(hang_seconds, self._scout)

    def renew(self) -> None:
        """Do nothing: nobody would use it."""

    async def close(self) -> None:
        """As in `Tokens`."""
        for call in (self._scout, *self._under_way):
            await call.close()

    def _own(self) -> Shared[Credential]:
        call = Shared(self._mint)
        self._under_way.add(call)
        call.start().add_done_callback(lambda _: self._under_way.discard(call))
        return call


async def _within(hang_seconds: float | None, call: Shared[Credential]) -> Credential:
    try:
        async with asyncio.timeout(hang_seconds):
            return await call.result()
    except TimeoutError:
        detail = f"no answer within {hang_seconds:g} seconds"
        raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from None
