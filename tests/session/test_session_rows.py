"""Pages of the open connections: in order, whole, bounded, and made in slices."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.observe.session_page import SESSIONS_PAGE_MAX, SessionPage, merge_pages
from proxy.session.drain import OpenSession, OpenSessions
from proxy.session.session_rows import PAUSE_SECONDS, SLICE_ROWS, page_of

NUMBERS = (2, 3, 7, 8, 20)


@asynccontextmanager
async def connections(*numbers: int) -> AsyncIterator[OpenSessions]:
    """Yield a register of connections with these numbers, which say nothing."""
    sessions, over = OpenSessions(), asyncio.Event()

    async def serve(_entry: OpenSession) -> None:
        await over.wait()

    for number in numbers:
        sessions.start(serve, number)
    yield sessions
    over.set()
    await sessions.wait_closed()


def ids(page: SessionPage) -> list[int]:
    return [row["id"] for row in page["sessions"]]


async def test_pages_follow_each_other_without_a_gap() -> None:
    async with connections(*NUMBERS) as sessions:
        first = await page_of(sessions, 0, 2)
        assert (ids(first), first["next"], first["total"]) == ([2, 3], 3, 5)
        second = await page_of(sessions, 3, 2)
        assert (ids(second), second["next"]) == ([7, 8], 8)
        last = await page_of(sessions, 8, 2)
        assert (ids(last), last["next"]) == ([20], None)
        assert ids(await page_of(sessions, 3, 3)) == [7, 8, 20]
        assert ids(await page_of(sessions, 20, 3)) == []


async def test_a_page_is_bounded_and_the_event_loop_runs_between_its_slices() -> None:
    async with connections(*range(1, SESSIONS_PAGE_MAX + 2)) as sessions:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        page = await page_of(sessions, 0, 10 * SESSIONS_PAGE_MAX)
        slices = (loop.time() - begun) / PAUSE_SECONDS
    assert len(page["sessions"]) == SESSIONS_PAGE_MAX
    assert page["next"] == SESSIONS_PAGE_MAX
    assert slices > SESSIONS_PAGE_MAX / SLICE_ROWS - 0.5  # a timer may be early by a part of a ms


async def test_a_short_page_has_a_pause_too() -> None:
    # Those who ask for few rows at a time would take all of the time of sessions.
    async with connections(*NUMBERS) as sessions:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await page_of(sessions, 0, 1)
        assert loop.time() - begun > PAUSE_SECONDS / 2


async def test_pages_of_several_processes_are_one() -> None:
    async with connections(*NUMBERS[::2]) as one, connections(*NUMBERS[1::2]) as other:
        found, after = [], 0
        while True:
            pages = [await page_of(sessions, after, 2) for sessions in (one, other)]
            page = merge_pages(pages, 2)
            assert (page["total"], page["complete"]) == (5, True)
            found += ids(page)
            if page["next"] is None:
                break
            after = page["next"]
    assert found == list(NUMBERS)
    assert merge_pages([None, *pages], 2)["complete"] is False
    assert merge_pages([None], 2) == {"total": 0, "sessions": [], "next": None, "complete": False}
