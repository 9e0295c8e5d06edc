"""Stories that are run on the product's event loop and on asyncio's own."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest
import uvloop

from tests.support.peer import WAIT_SECONDS_MAX

NewLoop = Callable[[], asyncio.AbstractEventLoop]

LOOPS: Final = pytest.mark.parametrize(
    "new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
)


def run(new_loop: NewLoop, story: Callable[[], Awaitable[None]]) -> None:
    """Run a story on a loop of this kind. It fails if the loop reports an unhandled exception."""
    unhandled: list[Any] = []

    async def observed() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unhandled.append(context))
        async with asyncio.timeout(2 * WAIT_SECONDS_MAX):
            await story()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(observed())
    assert unhandled == []
