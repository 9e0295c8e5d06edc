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
from proxy.workspace.single_flight import Backoff, SingleFlight

Mint = Callable[[], Awaitable[Credential]]


class Minting(Protocol):
    """Either way."""

    async def token(self, hang_seconds: float | None) -> Credential:
        """Return a token minted for this asker, and perhaps for others. Raises ProxyError.

        A call that is under way for longer than `hang_seconds` is a failure; None: it is waited
        for. The time before it is made does not count.
        """

    def refresh(self) -> None:
        """Mint one that nobody waits for, unless a mint is under way."""

    async def close(self) -> None:
        """End the mints that are under way."""


class MintShared:
    """One token for all who wait."""

    def __init__(self, mint: Mint) -> None:
        self._call = SingleFlight(mint)

    async def token(self, hang_seconds: float | None) -> Credential:
        """As in `Minting`."""
        return await _within(hang_seconds, self._call)

    def refresh(self) -> None:
        """As in `Minting`."""
        self._call.start()

    async def close(self) -> None:
        """As in `Minting`."""
        await self._call.close()


class MintPerConnection:
    """A token for each, so many at a time. After a failure one of all finds out if it is over."""

    def __init__(self, mint: Mint, backoff: Backoff) -> None:
        """`backoff` says what the last mint failed with; whoever mints keeps it."""
        self._mint = mint
        self._backoff = backoff
        self._probe = SingleFlight(mint)
        self._under_way: set[SingleFlight[Credential]] = set()
        # More calls than threads would wait there, and not hear that the first ones failed.
        self._threads = asyncio.Semaphore(THREADS_MAX)

    async def token(self, hang_seconds: float | None) -> Credential:
        """As in `Minting`."""
        while True:  # ends with a failure, or when the scout has come back
            async with self._threads:
                failure = self._backoff.failure
                if failure is None:
                    return await _within(hang_seconds, self._own())
                if self._backoff.remaining_seconds:
                    raise failure.with_traceback(None)  # it failed for those before
            await _within(hang_seconds, self._probe)

    def refresh(self) -> None:
        """Do nothing: nobody would use it."""

    async def close(self) -> None:
        """As in `Minting`."""
        for call in (self._probe, *self._under_way):
            await call.close()

    def _own(self) -> SingleFlight[Credential]:
        call = SingleFlight(self._mint)
        self._under_way.add(call)
        call.start().add_done_callback(lambda _: self._under_way.discard(call))
        return call


async def _within(hang_seconds: float | None, call: SingleFlight[Credential]) -> Credential:
    try:
        async with asyncio.timeout(hang_seconds):
            return await call.result()
    except TimeoutError:
        detail = f"no answer within {hang_seconds:g} seconds"
        raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from None
