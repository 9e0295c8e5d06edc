"""The connection over which single keys are looked up, and who may ask.

For: one connection for all look-ups, opened when one is wanted and closed when it is idle. Not for:
which keys are asked (`map_source`), or the feed's own connection.

Invariant: a proxy has at most this connection and the feed's. Questions are asked one after the
other; those for keys that are not known are few at a time, so that they do not crowd out the
others.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, cast

from proxy.catalogue.catalogue_reader import CatalogueReader, OpenReader
from proxy.errors import ErrorKind, ProxyError

UNKNOWN_AT_ONCE_MAX: Final = 8
# A compute that nothing else keeps awake should scale to zero.
IDLE_SECONDS: Final = 5.0

T = TypeVar("T")
Ask = Callable[[CatalogueReader], Awaitable[T]]


class LookupConnection:
    """Asks the catalogue over one connection. `run` keeps it; `close` it when that has ended."""

    def __init__(self, open_reader: OpenReader) -> None:
        self._open_reader = open_reader
        self._questions: asyncio.Queue[_Question] = asyncio.Queue()
        self._waiting: set[_Question] = set()
        self._unknown = asyncio.Semaphore(UNKNOWN_AT_ONCE_MAX)
        self._is_closed = False

    async def ask(self, question: "Ask[T]") -> T:
        """Return the answer. Raises ProxyError. A connection that was lost is opened once more."""
        if self._is_closed:
            raise _replaced()
        asked = _Question(question)
        self._questions.put_nowait(asked)
        self._waiting.add(asked)
        try:
            return cast(T, await asked.answer)
        finally:
            self._waiting.discard(asked)
            asked.answer.cancel()

    async def ask_unknown(self, question: "Ask[T]") -> T:
        """As `ask`, for keys of which nothing is known."""
        async with self._unknown:
            return await self.ask(question)

    async def run(self) -> None:
        """Answer, for as long as the task runs."""
        self._is_closed = False
        while True:  # one connection after the other
            first = await self._questions.get()
            if first.answer.done():
                continue
            try:
                async with self._open_reader() as reader:
                    await self._answer(reader, first)
            except ProxyError as error:
                self._fail_all(error)  # each would wait as long for the same

    def close(self) -> None:
        """Refuse all that wait, and all that come."""
        self._is_closed = True
        self._fail_all(_replaced())

    async def _answer(self, reader: CatalogueReader, first: "_Question") -> None:
        """Answer questions until none came for a while, or the connection is lost."""
        question = first
        while True:  # bounded by the idle time
            if not question.answer.done():
                try:
                    question.set(await question.ask(reader))
                except ProxyError as error:
                    if question is not first:  # an idle connection may have been closed meanwhile
                        self._questions.put_nowait(question)
                        return
                    question.fail(error)
                    return
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    question = await self._questions.get()
            except TimeoutError:
                return

    def _fail_all(self, error: ProxyError) -> None:
        for question in self._waiting:
            question.fail(error)


def _replaced() -> ProxyError:
    return ProxyError(ErrorKind.MAPPING_STALE, "the configuration has changed meanwhile")


class _Question:
    def __init__(self, ask: "Ask[object]") -> None:
        self.ask = ask
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def set(self, answer: object) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: ProxyError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error.with_traceback(None))
