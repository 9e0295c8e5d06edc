"""An operator's connection to the catalogue, with the locks of its operations, and its retries.

For: one connection that is replaced when it is lost. Not for: what is done with it (`operations`).

Invariant: the connection that `use` returns holds the advisory lock of every operation that `lock`
was granted and `unlock` has not released. If another process took one meanwhile, `use` fails.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Final, Self, TypeVar
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.catalogue.model import Connection
from proxy.catalogue.operation import Tools
from proxy.errors import ProxyError

# A step is tried five times: at once, and after these waits, which reach over a restart or a wake.
RETRY_SECONDS: Final = (1.0, 3.0, 10.0, 30.0)

THE_CATALOGUE: Final = "the catalogue"

_OWN_WORDS: Final = frozenset(reason.value.word for reason in Reason)
_Result = TypeVar("_Result")


class TakenOver(CatalogueError):
    """Another operator has completed or undone this operation, or does so now."""

    def __init__(self, op_id: UUID, *, transient: bool = False) -> None:
        text = f"another operator has taken over the operation {op_id}"
        hint = "Look at the rows, and try again."
        super().__init__(Reason.OPERATION_PENDING, text, hint, transient=transient)


class HeldConnection:
    """The connection; use it with `async with`."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._connection: Connection | None = None
        self._stack = AsyncExitStack()
        self._locks: set[UUID] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def use(self) -> Connection:
        """Return the connection, a new one if it was lost.

        Raises TakenOver if a lock is held by another connection; but that may be the one before,
        whose end the server has not noticed yet.
        """
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        await self._close()
        opened = self._tools.databases.catalogue()
        self._connection = await self._stack.enter_async_context(opened)
        for op_id in self._locks:
            if not await self._lock(op_id):
                await self._close()
                raise TakenOver(op_id, transient=True)
        return self._connection

    async def lock(self, op_id: UUID) -> bool:
        """Take an operation's lock. Return whether it was free, or is held here already."""
        await self.use()
        if op_id not in self._locks and await self._lock(op_id):
            self._locks.add(op_id)
        return op_id in self._locks

    async def unlock(self, op_id: UUID) -> None:
        """Release an operation's lock, if it is held here."""
        if op_id not in self._locks:
            return
        self._locks.discard(op_id)
        if self._connection is not None and not self._connection.is_closed():
            with suppress(*driver_errors()):
                query = "select pg_catalog.pg_advisory_unlock($1)"
                await self._connection.execute(query, lock_key(op_id))

    async def repeat(self, where: str, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return what the call returns; call again if the failure may pass.

        `where` is the database in words. Raises CatalogueError.
        """
        for seconds in (*RETRY_SECONDS, None):
            try:
                return await call()
            except driver_errors(CatalogueError, ProxyError) as error:
                failure = translated(error, where)
                if not failure.transient or seconds is None:
                    raise failure from error
            self._tools.progress(f"{failure.message}; trying again in {seconds:.0f} s")
            await self._tools.sleep(seconds)
        raise AssertionError("the last try returns or raises")

    async def step(self, where: str, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return as `repeat`. A failure that is none of our own refusals is STEP_FAILED."""
        try:
            return await self.repeat(where, call)
        except CatalogueError as error:
            if error.reason in _OWN_WORDS:
                raise
            raise CatalogueError(Reason.STEP_FAILED, error.message, error.hint) from error

    async def _lock(self, op_id: UUID) -> bool:
        assert self._connection is not None
        query = "select pg_catalog.pg_try_advisory_lock($1)"
        locked: bool = await self._connection.fetchval(query, lock_key(op_id))
        return locked

    async def _close(self) -> None:
        stack, self._stack, self._connection = self._stack, AsyncExitStack(), None
        with suppress(*driver_errors()):
            await stack.aclose()


def lock_key(op_id: UUID) -> int:
    """Return the key of an operation's advisory lock."""
    return int.from_bytes(op_id.bytes[:8], signed=True)
